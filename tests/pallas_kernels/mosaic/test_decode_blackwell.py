"""The Blackwell decode kernel against the plain implementation, and its machine code by parts.

The interpreter runs the kernel, tcgen05 and tensor memory included, but for the machine code that
decodes codes and splits float16 into e4m3. That runs on Hopper GPUs too, and is tested there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attend import assert_close, attend_both
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels as pk
from pallas_kernels import codebook, device, mosaic, packing
from pallas_kernels.mosaic import blackwell, levels, row_levels


TILE = 128


def capability() -> int:
    return int(getattr(jax.local_devices()[0], "compute_capability", "0").partition(".")[0])


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.gpu)], ids=["cpu", "gpu"])
def attend(request):
    """`attend_both` with the Blackwell kernel."""
    if not request.param and capability() != 10:
        pytest.skip("the kernel is for Blackwell GPUs")
    return functools.partial(attend_both, request.param, architecture="blackwell")


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "head_dim", "group"),
    [(4, 4, 128, 8), (3, 8, 64, 3), (2, 3, 256, 16), (8, 2, 64, 1)],
)
def test_every_width_and_group(attend, key_bits, value_bits, head_dim, group):
    fmt = pk.KVFormat(key_bits, value_bits, window=3)
    got, want = attend(fmt, [4 + 3 + 2 * 64 + 5], group, head_dim, mosaic.Config(splits=1))
    assert_close(got, want)


def test_ragged_lengths_and_more_splits_than_tiles(attend):
    fmt = pk.KVFormat(window=8)
    lengths = [4 + 8 + 5 * 64, 4 + 8 + 64 + 1, 4 + 8 + 63, 2, 0]
    got, want = attend(fmt, lengths, 2, 64, mosaic.Config(splits=2, stages=1))
    assert not got[-1].any()
    for one, other in zip(got[:-1], want[:-1], strict=True):  # no sequence hides in the others
        assert_close(one, other)


@pytest.mark.parametrize(
    ("page_size", "head_dim", "soft_cap", "sliding_window"),
    [(16, 64, 2.0, 90), (32, 128, None, 180), (128, 64, 3.0, None)],
)
def test_page_sizes_soft_cap_and_sliding_window(
    attend, page_size, head_dim, soft_cap, sliding_window
):
    fmt = pk.KVFormat(4, 3, window=9, page_size=page_size)
    options = {"soft_cap": soft_cap, "sliding_window": sliding_window}
    got, want = attend(fmt, [300, 150], 4, head_dim, mosaic.Config(splits=1), **options)
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)


def test_no_race(monkeypatch):
    """Tensor memory and what tcgen05 reads are not overwritten too early, over several tiles."""
    raise_at_races = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", raise_at_races)
    fmt = pk.KVFormat(4, 4, window=3)
    got, want = attend_both(
        True, fmt, [4 + 3 + 5 * TILE], 8, 64, mosaic.Config(splits=1), architecture="blackwell"
    )
    assert_close(got, want)


@pytest.fixture
def gpu():
    if capability() < 9:
        pytest.skip("e4m3 conversions need Hopper or newer")


def run(kernel, out, scratch, *arguments):
    """`kernel` in one thread block; its refs are the arguments, the outputs and scratch."""
    return plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=scratch,
        grid=(1,),
        grid_names=("x",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*arguments)


def store(ref, x, layout):
    @levels.inline(arg_types=(plgpu.RefType(), layout))
    def store(_, ref, x):
        x.store_untiled(ref, optimized=False)

    store(ref, x)


def decoded(packed, bits: int) -> np.ndarray:
    """The oracle: levels of packed rows, float32."""
    return np.asarray(codebook.decode(packing.unpack(packed, bits), bits), np.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("bits", "head_dim", "page_size"),
    [(2, 64, 16), (2, 128, 64), (2, 256, 128), (3, 64, 16), (3, 64, 128), (3, 128, 32)]
    + [(3, 256, 64), (4, 64, 32), (4, 128, 64), (4, 256, 16), (8, 64, 128), (8, 256, 64)],
)
def test_machine_code_decodes_tiles(bits, head_dim, page_size):
    rng = np.random.default_rng(bits + head_dim)
    n = min(head_dim, TILE)
    # 0x7f and 0xff are not numbers in e4m3: no code is one of them.
    codes = rng.integers(0, 2**bits - (bits == 8), (2, TILE, head_dim)).astype(np.uint8)
    codes[(codes == 0x7F) & (bits == 8)] = 0
    k, v = jnp.asarray(codes)
    v_pages = v.reshape(-1, page_size, head_dim).swapaxes(1, 2)
    planes = (*packing.pack(k, bits), *packing.pack(v_pages, bits))
    count = len(planes) // 2
    pages = TILE // page_size
    widths = packing.plane_bits(bits)
    page = head_dim * page_size
    layouts = [row_levels.transforms(head_dim * w // 8, page * w // 8) for w in widths]
    layouts += [row_levels.transforms(page_size * w // 8, page * w // 8) for w in widths]
    lines = [plane.reshape(-1, 128) for plane in planes]
    scales = jnp.asarray(rng.standard_normal((pages, page_size)), jnp.bfloat16)
    scales = jnp.pad(scales, ((0, 0), (0, max(0, 64 - page_size))))
    table = jnp.asarray(levels.tables(bits))

    def kernel(table, scales, *refs):
        refs = list(refs)
        planes, refs = refs[: len(lines)], refs[len(lines) :]
        k_out, v_out, scale_out, token_out, *tiles, ready = refs
        for plane, tile in zip(planes, tiles, strict=True):
            plgpu.copy_gmem_to_smem(plane, tile, ready)
        plgpu.barrier_wait(ready)
        words = (table[0], table[1])
        of_k, of_v = slice(0, count), slice(count, None)
        k = row_levels.load_keys(
            tiles[of_k], layouts[of_k], words, bits, head_dim, bits, interpret=False
        )
        four, row = plgpu.Layout.TCGEN05_TMEM_NATIVE(4), row_levels.LAYOUT.reduce(1)
        store(k_out, k, four)
        for i in range(v_out.shape[0]):
            channels = bits, head_dim, page_size, i * TILE
            v = row_levels.load_values(
                tiles[of_v], layouts[of_v], words, *channels, interpret=False
            )
            store(v_out.at[i], v, four)
        store(scale_out, row_levels.load_scales(scales, bits, page_size, interpret=False), row)
        store(token_out, row_levels.tokens(bits, interpret=False), row)

    f8 = jnp.float8_e4m3fn
    out = (
        jax.ShapeDtypeStruct((TILE, head_dim), f8),
        jax.ShapeDtypeStruct((max(1, head_dim // TILE), TILE, n), f8),
        jax.ShapeDtypeStruct((TILE,), jnp.float32),
        jax.ShapeDtypeStruct((TILE,), jnp.float32),
    )
    scratch = [
        plgpu.SMEM(x.shape, x.dtype, transforms=t) for x, t in zip(lines, layouts, strict=True)
    ]
    barrier = plgpu.Barrier(num_arrivals=len(lines))
    got = run(kernel, out, (*scratch, barrier), table, scales, *lines)
    k_got, v_got, scale_got, token_got = (np.asarray(x, np.float32) for x in got)
    tokens = row_levels.order(bits, TILE)
    k_want = decoded(packing.pack(k, bits), bits)[tokens][:, row_levels.order(bits, head_dim)]
    np.testing.assert_array_equal(k_got, k_want)
    v_want = decoded(packing.pack(v, bits), bits).T
    v_want = np.concatenate(np.split(v_want, TILE // n, axis=1)).reshape(v_got.shape)
    np.testing.assert_array_equal(v_got, v_want[..., row_levels.order(bits, n)])
    want = np.asarray(scales, np.float32)[:, :page_size].reshape(-1)[tokens]
    np.testing.assert_array_equal(scale_got, want)
    np.testing.assert_array_equal(token_got, tokens)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("layout", "m", "n"),
    [("rows", 128, 8), ("rows", 128, 16), ("wgmma", 64, 8), ("wgmma", 256, 16)],
)
def test_machine_code_splits_float16_into_e4m3(layout, m, n):
    """TMA brings the tile back out of tcgen05's layout; the parts sum up to float16's digits."""
    layout = row_levels.LAYOUT if layout == "rows" else plgpu.Layout.WGMMA
    rng = np.random.default_rng(m + n)
    x = 256 * rng.uniform(-1, 1, (m, n)) * np.exp2(-rng.integers(0, 12, (m, n)))
    x = jnp.asarray(x, jnp.float16).astype(jnp.float32)

    def kernel(x, out, ref):
        values = plgpu.load(x, layout=layout, optimized=False)
        blackwell.store_parts(ref, values, layout, interpret=False)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(ref, out)
        plgpu.wait_smem_to_gmem(0)

    shape = (blackwell.PARTS * n, m)
    out = jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn)
    got = run(kernel, out, [blackwell.smem8(shape)], x)
    parts = np.asarray(got, np.float64).reshape(blackwell.PARTS, n, m)
    assert np.abs(parts).max() <= 256
    total = sum(part / blackwell.STEP**i for i, part in enumerate(parts))
    np.testing.assert_allclose(total, np.asarray(x, np.float64).T, rtol=2**-12, atol=2**-20)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [16, 64, 256])
def test_order_is_a_permutation_within_words(bits, n):
    order = row_levels.order(bits, n)
    assert sorted(order) == list(range(n)) and (order // 16 == np.arange(n) // 16).all()


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [("9.0", "hopper"), ("10.0", "blackwell"), ("10.3", "blackwell"), ("12.0", None), (None, None)],
)
def test_kernels_are_chosen_by_compute_capability(monkeypatch, capability, architecture):
    monkeypatch.setattr(device, "compute_capability", lambda x: capability)
    x = jnp.zeros(1)
    if architecture:
        assert mosaic.architecture(x) == architecture
    else:
        with pytest.raises(NotImplementedError, match="9.0 or 10.x"):
            mosaic.architecture(x)
