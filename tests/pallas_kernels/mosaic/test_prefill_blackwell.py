"""The Blackwell prefill kernel, interpreted, against the plain jax.numpy implementation."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_prefill import assert_close, attend_both

import pallas_kernels as pk


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.gpu)], ids=["cpu", "gpu"])
def attend(request):
    """`attend_both` with the Blackwell kernel."""
    capability = getattr(jax.local_devices()[0], "compute_capability", "")
    if not request.param and not capability.startswith("10."):
        pytest.skip("the kernel is for Blackwell GPUs")
    return functools.partial(attend_both, request.param, architecture="blackwell")


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "head_dim", "group", "page_size"),
    [(4, 4, 128, 8, 64), (3, 8, 64, 1, 16), (2, 3, 256, 2, 128)],
)
def test_widths_groups_and_pages(attend, key_bits, value_bits, head_dim, group, page_size):
    fmt = pk.KVFormat(key_bits, value_bits, window=3, page_size=page_size)
    assert_close(attend(fmt, [4 + 3 + 128 + page_size + 5], 20, group, head_dim))


def test_ragged_lengths_counts_and_bfloat16(attend):
    fmt = pk.KVFormat(window=70, sinks=2)
    q_k_v = [400, 131, 1, 0], 90, 2, 64, [90, 33, 7, 0]
    pairs = list(attend(fmt, *q_k_v, dtype=jnp.bfloat16))
    assert not pairs[-1][0].any()
    assert_close(pairs, 8e-3)


@pytest.mark.parametrize(("soft_cap", "sliding_window"), [(3.0, None), (None, 90), (20.0, 330)])
def test_soft_cap_and_sliding_window(attend, soft_cap, sliding_window):
    options = {"soft_cap": soft_cap, "sliding_window": sliding_window}
    assert_close(attend(pk.KVFormat(4, 3, window=20), [300, 2], 70, 2, 64, **options))


def test_no_race(monkeypatch):
    """With one consumer: the detector takes two that share an allocation for rivals."""
    raise_at_races = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", raise_at_races)
    pairs = attend_both(True, pk.KVFormat(window=3), [300], 20, 2, 256, architecture="blackwell")
    assert_close(pairs)
