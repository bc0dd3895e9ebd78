"""How the benchmarks of kernels time calls."""

import jax.numpy as jnp

from jaxgds.bench import sweep, timing


def test_what_is_timed_is_traced_once_and_its_first_result_is_checked():
    traced = []

    def f(shared, x):
        traced.append(x)
        return shared * x

    inputs = [(jnp.full(3, i + 1.0),) for i in range(5)]
    check = lambda result: {"first": result.tolist()}  # noqa: E731
    found = timing.measure(f, jnp.float32(2), inputs, 3, gpu=False, check=check)
    assert len(traced) == 1 and found["first"] == [2.0, 2.0, 2.0]
    assert found["us"] > 0


def test_noise_has_no_pattern_that_shows():
    numbers = sweep.noise(0, (64, 1000), "float32")
    assert abs(float(numbers.mean())) < 0.02 and abs(float(numbers.std()) - 4 / 12**0.5) < 0.01
    assert -2 <= float(numbers.min()) < -1.99 and 1.99 < float(numbers.max()) <= 2
    for other in (sweep.noise(1, (64, 1000), "float32"), numbers[:, ::-1], jnp.roll(numbers, 1)):
        assert abs(float(jnp.corrcoef(numbers.ravel(), other.ravel())[0, 1])) < 0.02
    counts = jnp.bincount(sweep.noise(2, (1 << 18,), "uint8"), length=256)
    assert 800 < int(counts.min()) and int(counts.max()) < 1250
