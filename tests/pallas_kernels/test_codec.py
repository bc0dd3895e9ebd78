import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard

import pallas_kernels as pk
from pallas_kernels import codebook, packing
from pallas_kernels.rotation import signs


BITS = (2, 3, 4, 8)
BITS_AND_MODES = [(2, "eden"), (3, "norm"), (4, "norm_preserving"), (8, "norm_preserving")]
HEAD_DIMS = (64, 128, 256)
BF16_ROUNDING = 2**-8  # of a scale, the only inexact thing a vector stores


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def relative_error(x, restored):
    """Squared error of each vector by its squared norm, float64."""
    x, restored = np.asarray(x, np.float64), np.asarray(restored, np.float64)
    return np.sum((restored - x) ** 2, axis=-1) / np.sum(x**2, axis=-1)


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_distortion_is_as_computed(bits, d):
    errors = [
        relative_error(x, pk.quantize(x, bits, scale_mode="norm").dequantize())
        for x in (jnp.asarray(gaussian(20_000, d, seed=i)) for i in range(5))
    ]
    assert np.mean(errors) == pytest.approx(pk.distortion(bits, d), rel=0.01)


@pytest.mark.parametrize(("bits", "mode"), BITS_AND_MODES)
def test_agrees_with_float64_arithmetic(bits, mode):
    d, seed = 128, 5
    x = gaussian(500, d) * np.exp(gaussian(500, 1, seed=1))
    got = pk.quantize(jnp.asarray(x), bits, seed, mode)

    x = x.astype(np.float64)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    y = (x * signs(d, seed)) @ hadamard(d) / np.sqrt(d)
    grid = np.concatenate([codebook.magnitudes(bits), -codebook.magnitudes(bits)])
    u = y / norm * np.sqrt(d) * codebook.divisor(bits)
    nearest = np.abs(u[..., None] - grid).argmin(axis=-1)
    if bits == 8:  # e4m3's sign bit stands at 128, and 127 is no code
        nearest = np.where(nearest >= 127, nearest - 127 + 128, nearest)
    codes = np.asarray(packing.unpack(got.codes, bits))
    assert (codes != nearest).mean() < 1e-4  # float32 decides otherwise only at a midpoint

    levels = np.asarray(codebook.decode(jnp.asarray(codes), bits), np.float64)
    scale = {
        "norm": norm[..., 0] / (np.sqrt(d) * codebook.divisor(bits)),
        "norm_preserving": norm[..., 0] / np.linalg.norm(levels, axis=-1),
        "eden": norm[..., 0] ** 2 / np.sum(y * levels, axis=-1),
    }[mode]
    assert got.scale.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.scale.astype(jnp.float32), scale, rtol=BF16_ROUNDING)
    restored = scale[:, None] * (levels @ hadamard(d) / np.sqrt(d)) * signs(d, seed)
    np.testing.assert_allclose(got.dequantize(), restored, rtol=0.01, atol=1e-2 * norm.max() / d)


@pytest.mark.parametrize("bits", BITS)
def test_eden_keeps_the_inner_product_of_every_vector(bits):
    x = gaussian(5000, 128)
    restored = pk.quantize(jnp.asarray(x), bits, scale_mode="eden").dequantize()
    x = x.astype(np.float64)
    ratio = np.sum(x * np.asarray(restored, np.float64), axis=-1) / np.sum(x * x, axis=-1)
    np.testing.assert_allclose(ratio, 1, atol=BF16_ROUNDING)


def adversarial(d):
    noise, eye = gaussian(d, d), np.eye(d, dtype=np.float32)
    outliers = np.where(np.isin(np.arange(d), [1, 7, d // 2, d - 1]), 20.0, 1.0).astype(np.float32)
    return {
        "one-hot": np.concatenate([eye, -3 * eye]),
        "constant": np.ones((1, d), np.float32),
        "large mean": 100 + noise,
        "outlier channels": noise * outliers,
        "norms of 1e-4": noise * np.float32(1e-4),
        "norms of 1e4": noise * np.float32(1e4),
        "near float32's smallest": noise * np.float32(1e-36),
        "near float32's largest": noise * np.float32(5e37),
    }


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_adversarial_vectors_keep_their_norm_and_a_small_error(bits, d):
    kinds = adversarial(d)
    x = np.concatenate(list(kinds.values()))
    restored = np.asarray(pk.quantize(jnp.asarray(x), bits).dequantize(), np.float64)
    norms = (np.linalg.norm(vectors, axis=-1) for vectors in (restored, x.astype(np.float64)))
    np.testing.assert_allclose(*norms, rtol=BF16_ROUNDING)
    errors = relative_error(x, restored)
    ends = np.cumsum([len(vectors) for vectors in kinds.values()])
    means = {
        kind: part.mean() for kind, part in zip(kinds, np.split(errors, ends[:-1]), strict=True)
    }
    assert {k: e for k, e in means.items() if not e < 2 * pk.distortion(bits, d)} == {}
    assert means["one-hot"] < BF16_ROUNDING**2  # but for the scale's rounding, exact


@pytest.mark.parametrize(("bits", "mode"), BITS_AND_MODES)
def test_zeros_stay_zeros_and_damage_stays_visible(bits, mode):
    x = np.stack([gaussian(64)] * 5)
    x[1] = 0
    x[2, 3], x[3, 4], x[4, 5] = np.inf, np.nan, -np.inf
    code = pk.quantize(jnp.asarray(x), bits, scale_mode=mode)
    restored = np.asarray(code.dequantize())
    assert (restored[1] == 0).all() and code.scale[1] == 0
    assert np.isnan(restored[2:]).all()
    assert np.isfinite(restored[0]).all()
    levels = codebook.decode(packing.unpack(code.codes, bits), bits)
    assert np.isfinite(levels).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_takes_each_float_dtype_and_any_batch(dtype):
    x = jnp.asarray(gaussian(2, 3, 64), dtype)
    code = pk.quantize(x, 3, seed=9)
    assert code.scale.shape == (2, 3)
    assert [plane.shape for plane in code.codes] == [(2, 3, 16), (2, 3, 8)]
    assert (code.bits, code.head_dim, code.seed) == (3, 64, 9)
    single = pk.quantize(x[1, 2], 3, seed=9).dequantize(jnp.bfloat16)
    assert single.dtype == jnp.bfloat16
    np.testing.assert_array_equal(single, code.dequantize(jnp.bfloat16)[1, 2])


def test_is_a_pytree_that_jit_returns_with_the_same_bits():
    x = jnp.asarray(gaussian(40, 64))
    eager, jitted = pk.quantize(x), jax.jit(pk.quantize)(x)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    jax.tree.map(np.testing.assert_array_equal, eager.codes, jitted.codes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pk.quantize(jnp.zeros((2, 80))), "head_dim=80 is not one of"),
        (lambda: pk.quantize(jnp.zeros((2, 64)), 5), "bits=5 is not one of"),
        (lambda: pk.quantize(jnp.zeros((2, 64)), seed=-1), "seed=-1 is not in"),
        (
            lambda: pk.quantize(jnp.zeros((2, 64)), scale_mode="l2"),  # pyright: ignore
            "scale_mode='l2' is not one of",
        ),
        (lambda: pk.quantize(jnp.zeros((2, 64), jnp.int32)), "int32.* cast x first"),
        (lambda: pk.quantize(jnp.float32(1)), "no head_dim axis"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
