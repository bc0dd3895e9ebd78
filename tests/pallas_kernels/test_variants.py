"""quantize_prod and quantize_split against float64 arithmetic and exact expectations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special
from scipy.linalg import hadamard

import pallas_kernels as pk
from pallas_kernels import codebook, variants
from pallas_kernels.rotation import signs


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def unit(*shape, seed=0):
    x = gaussian(*shape, seed=seed)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def distortion(bits, n):
    """Expected squared error of a random unit vector of length n, by adaptive quadrature."""
    if bits == 0:
        return 1.0
    levels = np.array([math.sqrt(2 / math.pi)])
    if bits > 1:
        levels = codebook.magnitudes(bits) / codebook.divisor(bits)
    levels = levels / math.sqrt(n)
    edges = [0, *((levels[1:] + levels[:-1]) / 2), 1]
    half = (n - 1) / 2

    def integrand(x, level):
        return (1 - x * x) ** (half - 1) / special.beta(0.5, half) * (x - level) ** 2

    cells = zip(edges, edges[1:], levels, strict=False)
    parts = [integrate.quad(integrand, a, min(b, 1), (c,))[0] for a, b, c in cells if a < 1]
    return 2 * n * sum(parts)


def prod_variance(bits, n):
    """length * variance of <q, x>, unit vectors, orthogonal S: (1 / E[|u|]^2 / n - 1) D."""
    mean = integrate.quad(
        lambda u: 2 * u * (1 - u * u) ** ((n - 3) / 2) / special.beta(0.5, (n - 1) / 2), 0, 1
    )[0]
    return (1 / (n * mean**2) - 1) * distortion(bits - 1, n)


# Published simulations with an orthogonal S at length 128, where q and x are orthogonal.
TABLE = {1: 0.574, 2: 0.205, 3: 0.0655, 4: 0.0193}


@pytest.mark.parametrize(
    ("bits", "n"), [(1, 128), (2, 128), (3, 128), (4, 128), (4, 64), (3, 96), (2, 200)]
)
def test_variance_of_prod_is_as_computed(bits, n):
    x, q = unit(3000, n, seed=bits), unit(2000, n, seed=100 + bits)
    got = np.asarray(pk.quantize_prod(jnp.asarray(x), bits).inner(jnp.asarray(q)), np.float64)
    variance = n * np.mean((got - q.astype(np.float64) @ x.T) ** 2)
    assert variance == pytest.approx(prod_variance(bits, n), rel=0.02)
    if n == 128:
        assert variance == pytest.approx(TABLE[bits], rel=0.03)


@pytest.mark.parametrize(("bits", "seeds"), [(1, 150), (2, 150), (4, 100)])
def test_prod_is_unbiased_over_seeds(bits, seeds):
    """Also for q along x, where plain codes shrink every product."""
    x = unit(40, 64, seed=1).astype(np.float64)
    q = 0.8 * x[:8] + 0.6 * unit(8, 64, seed=2)
    exact = q @ x.T
    errors = []
    with jax.disable_jit():  # else it compiles for each seed
        for seed in range(seeds):
            got = pk.quantize_prod(jnp.asarray(x, jnp.float32), bits, seed)
            errors.append(np.asarray(got.inner(jnp.asarray(q, jnp.float32)), np.float64) - exact)
    errors = np.stack(errors)
    along = np.einsum("sii->si", errors[:, :8, :8]).mean(axis=1)  # one mean a seed
    for x in (along, errors.mean(axis=(1, 2))):
        assert abs(x.mean()) < 4 * x.std() / math.sqrt(seeds)
    if bits < 4:  # the test would see mse codes' bias
        shrinkage = distortion(bits, 64) * 0.8
        assert shrinkage > 8 * along.std() / math.sqrt(seeds)


@pytest.mark.parametrize(("bits", "n"), [(1, 64), (2, 128), (3, 64), (4, 40)])
def test_prod_agrees_with_float64_arithmetic(bits, n):
    x, q = gaussian(50, n), gaussian(7, n, seed=1)
    got = pk.quantize(jnp.asarray(x), bits, 3, variant="prod")
    rotation = np.asarray(variants._rotate(jnp.eye(n), 3), np.float64)
    sketch = variants.orthogonal(n, 3, stream=2).astype(np.float64)
    levels = np.asarray(variants._levels(got.codes.planes, bits - 1, n), np.float64)
    rotated = levels * np.asarray(got.codes.scale, np.float64)[:, None]
    residual = x @ rotation - rotated
    sign = np.where(residual @ sketch < 0, -1.0, 1.0)
    packed = np.packbits(sign < 0, axis=-1, bitorder="little")
    assert np.unpackbits(packed ^ np.asarray(got.signs)).mean() < 1e-3
    size = np.linalg.norm(residual, axis=-1) * math.gamma((n + 1) / 2) / math.gamma(n / 2)
    np.testing.assert_allclose(got.residual_scale, size * math.sqrt(math.pi) / n, rtol=1e-5)
    sign = np.where(np.unpackbits(np.asarray(got.signs), axis=-1, bitorder="little"), -1.0, 1.0)
    restored = (rotated + sign @ sketch.T * np.asarray(got.residual_scale)[:, None]) @ rotation.T
    np.testing.assert_allclose(got.dequantize(), restored, atol=2e-5)
    np.testing.assert_allclose(got.inner(jnp.asarray(q)), q @ restored.T, atol=2e-4)
    one = got.inner(jnp.asarray(q[0]))
    np.testing.assert_allclose(one, q[0] @ restored.T, atol=2e-4)


@pytest.mark.parametrize(("bits", "count", "n"), [(2, 32, 128), (3, 32, 128), (2, 64, 128)])
def test_distortion_of_a_split_is_that_of_its_instances(bits, count, n):
    outliers = np.sort(np.random.default_rng(0).permutation(n)[:count]).tolist()
    others = np.setdiff1d(np.arange(n), outliers)
    x = gaussian(30_000, n, seed=bits)
    x[:, outliers] *= 10
    restored = np.asarray(pk.quantize_split(jnp.asarray(x), bits, outliers).dequantize())
    for channels, b in ((outliers, bits + 1), (others, bits)):
        size = np.sum(x[:, channels].astype(np.float64) ** 2, axis=-1)
        error = np.sum((restored - x)[:, channels].astype(np.float64) ** 2, axis=-1) / size
        assert error.mean() == pytest.approx(distortion(b, len(channels)), rel=0.01)


def test_a_split_serves_outliers_that_one_instance_cannot():
    x = gaussian(2000, 128) * np.where(np.arange(128) % 4 == 1, 10, 1).astype(np.float32)
    outliers = pk.outlier_channels(jnp.asarray(x[:100]), 32)
    assert outliers == tuple(range(1, 128, 4))
    error = {}
    for name, code in {
        "split": pk.quantize_split(jnp.asarray(x), 2, outliers),
        "3 bits": pk.quantize(jnp.asarray(x), 3),
    }.items():
        error[name] = np.mean((np.asarray(code.dequantize()) - x)[:, 0::4] ** 2)
    assert error["split"] < error["3 bits"] / 5  # on the channels that are no outliers


@pytest.mark.parametrize(
    ("bits", "count", "expected"), [(2, 32, 2.5), (3, 32, 3.5), (2, 64, 2.75), (3, 64, 3.75)]
)
def test_bits_of_a_split_are_what_it_stores(bits, count, expected):
    code = pk.quantize_split(jnp.ones((5, 128)), bits, range(count))
    stored = sum(x.nbytes for x in jax.tree.leaves((code.outliers, code.others)))
    assert code.bits_per_number == expected == stored * 8 / (5 * 128)


@pytest.mark.parametrize("n", [8, 32, 96, 200])
def test_matrices_are_orthogonal_and_differ(n):
    rotation, sketch = variants.orthogonal(n, 7), variants.orthogonal(n, 7, stream=2)
    for matrix in (rotation, sketch, variants.orthogonal(n, 2**64 - 1)):
        matrix = matrix.astype(np.float64)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-6)
    assert np.abs(rotation @ sketch.T).max() < 1 - 1e-3


def test_matrices_never_change():
    """From Philox's words and exact formulas: codes written today are read tomorrow."""
    words = np.random.Philox(key=5 + (1 << 64)).random_raw(64)
    rows = [
        math.sqrt(-2 * math.log(((int(w) >> 32) + 0.5) / 2**32))
        * math.cos(2 * math.pi * (int(w) & 0xFFFFFFFF) / 2**32)
        for w in words
    ]
    basis = []  # Gram and Schmidt's: Q's columns, R's diagonal positive
    for column in np.array(rows).reshape(8, 8).T:
        column = column - sum((b @ column * b for b in basis), np.zeros(8))
        basis.append(column / np.linalg.norm(column))
    np.testing.assert_allclose(variants.orthogonal(8, 5), np.stack(basis, axis=1), atol=1e-6)
    assert (int(words[0]), int(words[63])) == GOLDEN


GOLDEN = (0xB7BA3D0AE9C66485, 0xF2218ECB1CA26B89)


def test_matrices_are_uniform():
    """Mean 0, variance 1 / n everywhere, the diagonal too."""
    many = np.stack([variants.orthogonal(8, seed) for seed in range(2000)]).astype(np.float64)
    assert np.abs(many.mean(axis=0)).max() < 5 / math.sqrt(8 * 2000)
    np.testing.assert_allclose((many**2).mean(axis=0), 1 / 8, rtol=0.2)


def test_lengths_of_the_cache_are_rotated_as_in_the_cache():
    x = gaussian(3, 64)
    expected = (x * signs(64, 4)) @ hadamard(64) / 8
    np.testing.assert_allclose(variants._rotate(jnp.asarray(x), 4), expected, atol=1e-5)


QUANTIZERS = {
    "prod 1": lambda x: pk.quantize_prod(x, 1),
    "prod 4": lambda x: pk.quantize_prod(x, 4),
    "split": lambda x: pk.quantize_split(x, 3, range(32)),
}


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_zeros_stay_zeros_and_damage_stays_visible(quantizer):
    x = np.stack([gaussian(128)] * 6)
    x[1] = 0
    x[2, 3], x[3, 4], x[4, 5] = np.inf, np.nan, -np.inf
    x[5] *= np.float32(1e35)
    restored = np.asarray(quantizer(jnp.asarray(x)).dequantize())
    assert (restored[1] == 0).all()
    assert np.isnan(restored[2:5]).any(axis=1).all()
    np.testing.assert_allclose(restored[5] / np.float32(1e35), restored[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_are_pytrees_of_any_batch_and_dtype(quantizer):
    x = jnp.asarray(gaussian(2, 3, 128), jnp.bfloat16)
    code = jax.jit(quantizer)(x)
    restored = code.dequantize()
    assert restored.shape == x.shape and restored.dtype == jnp.float32
    np.testing.assert_allclose(quantizer(x[1, 2]).dequantize(), restored[1, 2], atol=1e-5)


def test_variant_names_the_same_codes():
    x = jnp.asarray(gaussian(5, 64))
    prod = pk.quantize(x, 3, 9, variant="prod")
    jax.tree.map(np.testing.assert_array_equal, prod, pk.quantize_prod(x, 3, 9))
    assert isinstance(pk.quantize(x, variant="mse"), pk.Quantized)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: pk.quantize(x, variant="qjl"), "variant='qjl' is not"),  # pyright: ignore
        (lambda x: pk.quantize(x, 4, 0, "norm", variant="prod"), "scale_mode='norm' does not"),  # pyright: ignore
        (lambda x: pk.quantize_prod(x, 5), "bits=5 is not one of"),
        (lambda x: pk.quantize_prod(x, 4, -1), "seed=-1 is not in"),
        (lambda x: pk.quantize_prod(x[:, :60]), "pad with zeros"),
        (lambda x: pk.quantize_prod(x.astype(jnp.int32)), "int32.* cast x first"),
        (lambda x: pk.quantize_prod(x).inner(x[:, :32]), r"q.shape=\(2, 32\) does not end in"),
        (lambda x: pk.quantize_split(x, 4, range(32)), "bits=4 is not one of"),
        (lambda x: pk.quantize_split(x, 2, range(20)), r"len\(outliers\)=20 is no multiple"),
        (lambda x: pk.quantize_split(x, 2, range(64)), r"len\(outliers\)=64 is no multiple"),
        (lambda x: pk.quantize_split(x, 2, range(60, 68)), "are not distinct channels"),
        (lambda x: pk.quantize_split(x, 2, [1] * 8), "are not distinct channels"),
        (lambda x: pk.outlier_channels(x, 65), "count=65 is not in"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, 64)))
