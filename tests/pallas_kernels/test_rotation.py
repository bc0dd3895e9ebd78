import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard

from pallas_kernels import rotation
from pallas_kernels.rotation import signs


rotate = jax.jit(rotation.rotate, static_argnums=1)
unrotate = jax.jit(rotation.unrotate, static_argnums=1)
HEAD_DIMS = (64, 128, 256)
# Philox4x64-10's first raw outputs: a cache written today must still be read tomorrow.
GOLDEN = [
    (0, [0x02F4BA6408E4D89B, 0x3DD62B0B9CA8C5B2, 0x1C8667A55D902E79, 0x907D7A052FD5B4DC]),
    (1, [0x4DB6A27B756282DF, 0xD944FA03BABE0E2F, 0x27F872E577060D32, 0x07F697696A0482A2]),
    (2**64 - 1, [0x3C2521C58DDE5BFB, 0xB7A1AD5DAE1306D7, 0x6942EAE9FD2FEB84, 0xB7552E878D1C26FE]),
]


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_is_signs_then_hadamard(d):
    x = np.random.default_rng(d).standard_normal((3, 5, d))
    expected = (x * signs(d, 7)) @ hadamard(d) / np.sqrt(d)
    np.testing.assert_allclose(rotate(jnp.asarray(x, jnp.float32), 7), expected, atol=2e-6)


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_is_orthonormal(d):
    matrix = np.asarray(rotate(jnp.eye(d), 3), np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(d), atol=1e-6)
    np.testing.assert_allclose(unrotate(rotate(jnp.eye(d), 3), 3), np.eye(d), atol=1e-6)


def test_keeps_inner_products():
    q, k = np.random.default_rng(0).standard_normal((2, 1000, 128)).astype(np.float32)
    rotated = [np.asarray(rotate(jnp.asarray(x), 0), np.float64) for x in (q, k)]
    expected = np.sum(q.astype(np.float64) * k, axis=-1)
    np.testing.assert_allclose(np.sum(rotated[0] * rotated[1], axis=-1), expected, atol=2e-5)


def test_equal_vectors_turn_into_equal_bits_in_any_batch():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((300, 64)), jnp.float32)
    singly = jnp.concatenate([rotate(row[None], 0) for row in x[:20]])
    np.testing.assert_array_equal(rotate(x, 0)[:20], singly)


@pytest.mark.parametrize(("seed", "words"), GOLDEN)
def test_signs_never_change(seed, words):
    bits = np.packbits(signs(256, seed) < 0, bitorder="little").view("<u8")
    assert [int(word) for word in bits] == words
    assert set(signs(256, seed).tolist()) == {-1.0, 1.0}
    np.testing.assert_array_equal(signs(64, seed), signs(256, seed)[:64])


@pytest.mark.parametrize("d", [16, 80, 96, 512])
def test_other_head_dims_are_refused(d):
    with pytest.raises(ValueError, match=f"head_dim={d} is not one of"):
        rotate(jnp.zeros(d), 0)
