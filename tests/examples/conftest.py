import jax
import pytest
from flax import nnx

from examples.llama import Config, Llama


@pytest.fixture(scope="session")
def config() -> Config:
    """Three query heads per key head, odd sizes elsewhere; head_dim 64 as the codec needs."""
    return Config(
        vocab=259, dim=48, mlp_dim=80, layers=2, heads=6, kv_heads=2, head_dim=64, rope_theta=1e4
    )


@pytest.fixture(scope="session")
def model(config) -> Llama:
    """Random weights, scaled so that attention is far from uniform."""
    model = Llama(config, nnx.Rngs(0))
    for block in model.blocks:
        block.q.kernel[...] *= 2
        assert block.attn_norm.scale is not None
        block.attn_norm.scale[...] *= 1 + 0.5 * jax.random.normal(jax.random.key(1), (config.dim,))
    return model
