"""Every array is allocated once, by few programs."""

from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgds.allocation_calls import MAX_RESULTS, calls


BF16 = np.dtype("uint16")


def programs(found, devices) -> set:
    """What tells programs apart: results and devices."""
    return {
        tuple((spec, tuple(devices[i] for i in batch)) for spec, batch in call) for call in found
    }


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 7), st.integers(1, 40)), max_size=12),
    st.integers(0, 3),
)
def test_each_array_is_a_result_once(groups, several):
    wanted = [
        (((n, 3), BF16), device) for n, device, count in groups for _ in range(count * 5**several)
    ]
    specs = [spec for spec, _ in wanted]
    devices = [jax.devices()[device] for _, device in wanted]
    found = calls(specs, devices)
    assert sorted(i for call in found for _, batch in call for i in batch) == list(
        range(len(specs))
    )
    for call in found:
        assert 0 < len(call) <= MAX_RESULTS
        assert len({tuple(devices[i] for i in batch) for _, batch in call}) == 1
        for spec, batch in call:
            assert {specs[i] for i in batch} == {spec}


def layers(count: int, *per_layer: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [shape for _ in range(count) for shape in per_layer]


LLAMA_8B = layers(
    32,
    *[(4096, 4096)] * 2,
    *[(1024, 4096)] * 2,
    *[(14336, 4096)] * 2,
    (4096, 14336),
    *[(4096,)] * 2,
) + [(4096,), (128256, 4096), (128256, 4096)]


@pytest.mark.parametrize(
    ("shapes", "most"),
    [
        pytest.param([(8, 8)], 1, id="one"),
        pytest.param([(8, 8)] * 75, 1, id="75 alike"),
        pytest.param([(8, 8)] * 1000, 1, id="1,000 alike"),
        pytest.param([(8, 8)] * 997, 2, id="a prime number"),
        pytest.param([(n, 8) for n in range(200)], 4, id="all different"),
        pytest.param(layers(8, *[(n, 8) for n in range(100)]), 2, id="100 shapes a layer"),
        pytest.param(LLAMA_8B, 2, id="Llama 8B"),
        pytest.param(LLAMA_8B + layers(7, (9,), (8, 9)), 2, id="and one layer in four has others"),
    ],
)
@pytest.mark.parametrize("split", [1, 8])
def test_few_programs_and_calls(shapes, most, split):
    devices = jax.devices()[:split]
    found = calls([(s, BF16) for s in shapes for _ in devices], devices * len(shapes))
    assert len(programs(found, devices * len(shapes))) <= most
    assert len(found) <= max(20, len(shapes) // 4)


def test_the_first_program_has_the_most_bytes():
    shapes = [(4, 4)] * 30 + [(1 << 20, 8)] * 31
    found = calls([(s, BF16) for s in shapes], [jax.devices()[0]] * len(shapes))
    assert Counter(spec[0] for spec, _ in found[0])[1 << 20, 8] > 0
    assert {spec[0] for spec, _ in found[-1]} == {(1 << 20, 8)}  # the one left over
