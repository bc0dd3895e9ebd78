import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import packing


pack = jax.jit(packing.pack, static_argnums=1)
unpack = jax.jit(packing.unpack, static_argnums=1)


@settings(deadline=None)  # an example with a new shape compiles
@given(st.data())
def test_round_trip(data):
    bits = data.draw(st.sampled_from([2, 3, 4, 8]))
    batch = data.draw(st.sampled_from([(), (2, 3)]))
    n = data.draw(st.sampled_from([8, 16, 24, 64]))
    count = int(np.prod(batch)) * n
    raw = data.draw(st.binary(min_size=count, max_size=count))
    codes = np.frombuffer(raw, np.uint8).reshape(*batch, n) & np.uint8(2**bits - 1)
    planes = pack(jnp.asarray(codes), bits)
    assert sum(plane.size for plane in planes) * 8 == codes.size * bits
    assert all(plane.dtype == jnp.uint8 and plane.shape[:-1] == batch for plane in planes)
    np.testing.assert_array_equal(unpack(planes, bits), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "planes"),
    [
        (2, [0, 1, 2, 3, 3, 0, 0, 1], ["e443"]),
        (3, [0, 1, 2, 3, 4, 5, 6, 7], ["e4e4", "cc"]),
        (3, [4, 0, 0, 0, 0, 0, 0, 3], ["00c0", "01"]),
        (3, [4, 1] * 8 + [0, 5] * 8, ["44444444" * 2, "99999999"]),
        (4, [0, 1, 2, 3, 12, 13, 14, 15], ["183a5c7e"]),
        (4, [8, 0, 0, 0, 0, 0, 0, 15], ["80000078"]),
        (8, [0, 1, 2, 3, 4, 5, 6, 255], ["00010203040506ff"]),
    ],
)
def test_golden_bytes(bits, codes, planes):
    packed = packing.pack(jnp.asarray(codes, jnp.uint8), bits)
    assert [np.asarray(plane).tobytes().hex() for plane in packed] == planes


@pytest.mark.parametrize("n", [8, 16, 32, 64, 128, 256])
def test_where_each_sign_lies(n):
    """The places that the module's docstring states, one sign at a time."""
    for code in range(n):
        codes = np.zeros(n, np.uint8)
        codes[code] = 0b1000
        (plane,) = pack(jnp.asarray(codes), 4)
        field = 8 * (code // 8) + (4, 0, 5, 1, 6, 2, 7, 3).index(code % 8)
        assert set_bits(plane) == [4 * field + 3]

        _, plane = pack(jnp.asarray(codes >> 1), 3)
        run, half = min(n, 32), min(n, 32) // 2
        h, j, b = code % run // half, code % half // 2, code % 2
        assert set_bits(plane) == [code // run * run + 4 * j + 2 * h + b]


def set_bits(plane) -> list[int]:
    return np.flatnonzero(np.unpackbits(np.asarray(plane), bitorder="little")).tolist()


def test_odd_lengths_are_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        packing.pack(jnp.zeros((2, 12), jnp.uint8), 4)
