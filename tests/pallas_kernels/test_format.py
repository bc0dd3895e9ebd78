import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KVFormat


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_bits": 5}, "key_bits=5 is not one of"),
        ({"value_bits": 0}, "value_bits=0 is not one of"),
        ({"window": -1}, "window=-1 is negative"),
        ({"sinks": -4}, "sinks=-4 is negative"),
        ({"page_size": 48}, "page_size=48 is not one of"),
        ({"seed": -1}, "seed=-1 is not in"),
        ({"seed": 2**64}, "is not in"),
        ({"scale_mode": "l2"}, "scale_mode='l2' is not one of"),
    ],
)
def test_a_setting_out_of_range_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        KVFormat(**changes)


def test_is_frozen_and_hashable():
    assert hash(KVFormat()) == hash(KVFormat(key_bits=4)) != hash(KVFormat(seed=1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        KVFormat().seed = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "heads", "head_dim", "expected"),
    [
        (4, 4, 1, 64, 68),
        (4, 4, 8, 128, 8 * 132),
        (4, 3, 1, 128, 116),
        (3, 3, 3, 64, 3 * 52),
        (2, 8, 1, 256, 324),
    ],
)
def test_bytes_per_token(key_bits, value_bits, heads, head_dim, expected):
    assert KVFormat(key_bits, value_bits).bytes_per_token(heads, head_dim) == expected


@pytest.mark.parametrize(
    ("window", "page_size", "slots"), [(128, 64, 192), (0, 64, 64), (1, 16, 32), (100, 32, 160)]
)
def test_the_ring_holds_a_window_and_a_filling_page(window, page_size, slots):
    assert KVFormat(window=window, page_size=page_size).ring_slots == slots


def test_packed_counts_whole_pages_beyond_sinks_and_window():
    fmt = KVFormat(window=10, sinks=3, page_size=16)
    lengths = np.arange(200)
    expected = np.maximum(0, lengths - 13) // 16 * 16
    assert [fmt.packed(int(n)) for n in lengths] == expected.tolist()
    np.testing.assert_array_equal(fmt.packed(jnp.asarray(lengths)), expected)
