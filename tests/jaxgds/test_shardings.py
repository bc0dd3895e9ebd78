"""Rules as shardings: the same as `prepare` records, which stock Orbax reads back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, PartitionSpec
from safetensors.flax import save_file

from jaxgds import models
from jaxgds.prepare import prepare
from jaxgds.rules import Rule, Rules, read_mesh, shipped
from jaxgds.shardings import with_shardings


CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_local_experts": 2,
    "vocab_size": 48,
}
MESH = Mesh(np.array(jax.devices("cpu")[:8]), ("tp",))


def leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.filterwarnings("ignore:.*[Ss]harding")  # taken from the file: that is what is tested
def test_they_are_those_that_prepare_records(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    weights = {n: jnp.ones(s, jnp.bfloat16) for n, s in models.parameters(CONFIG).items()}
    save_file(weights, tmp_path / "model.safetensors")
    prepare(tmp_path, tmp_path / "made", mesh=read_mesh("tp=8"), method="fp8")
    with ocp.PyTreeCheckpointer() as checkpointer:
        stock = checkpointer.restore(tmp_path / "made")
    target = with_shardings(stock, MESH, shipped(CONFIG))
    assert len(jax.tree.leaves(target)) > len(weights)  # scales, too
    split = 0
    for wanted, array in zip(jax.tree.leaves(target), jax.tree.leaves(stock), strict=True):
        assert wanted.sharding.is_equivalent_to(array.sharding, array.ndim)
        split += not wanted.sharding.is_fully_replicated
    assert split > 10


def test_several_axes_scalars_and_what_does_not_fit():
    mesh = Mesh(np.array(jax.devices("cpu")[:8]).reshape(2, 4), ("dp", "tp"))
    by = Rules("mine", (Rule(("w",), (("dp", "tp"), ())), Rule(("b*",), (("tp",),))))
    made = with_shardings({"w": leaf(16, 3), "b": leaf(8), "step": leaf()}, mesh, by)
    specs = {name: x.sharding.spec for name, x in made.items()}
    assert specs == {"w": PartitionSpec(("dp", "tp"), None), "b": PartitionSpec("tp"),
                     "step": PartitionSpec()}  # fmt: skip
    for target, match in (
        ({"x": leaf(8)}, "no rule is for the parameter 'x'"),
        ({"b": leaf(6)}, "6 does not divide by 4"),
        ({"w": leaf(16, 3), "w_scale": leaf(16, 1)}, "no contract"),
    ):
        with pytest.raises(ValueError, match=match):
            with_shardings(target, mesh, by)
