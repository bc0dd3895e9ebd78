"""Rules for parameter names, as the shardings of a restore target."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgds import rules
from jaxgds.load import leaf_name
from jaxgds.rules import Rules


_SCALE = "_scale"  # what `prepare` appends to the name of a quantised parameter


def with_shardings(target: Any, mesh: Mesh, by: Rules) -> Any:
    """The same tree of shapes and dtypes, each with the sharding that the rules give it.

    Args:
      target: pytree of `jax.ShapeDtypeStruct` (or arrays), such as an abstract `nnx.State`. The
        names that rules match are its key paths joined by dots.
      by: as `jaxgds.rules.read_rules` or `jaxgds.rules.shipped` gives them. The scales of a
        quantised parameter lie where its rule puts the channels that they belong to.

    Raises:
      ValueError: a parameter without a rule, or one that does not divide by the mesh.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(target)
    leaves = {leaf_name(path): leaf for path, leaf in flat}
    axes = rules.Mesh(dict(mesh.shape))

    def spec(name: str, shape: tuple[int, ...]) -> rules.Spec:
        if not shape:
            return ()
        base = name.removesuffix(_SCALE)
        if base == name or base not in leaves:
            return rules.fitted(by.of(name), name, shape, axes).spec
        rule = rules.fitted(by.of(base), base, leaves[base].shape, axes)
        if rule.contract is None:
            raise ValueError(f"{name!r}: the rule for {base!r} has no contract to scale along")
        return (*rule.spec[: rule.contract], (), *rule.spec[rule.contract + 1 :])

    placed = [
        jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=NamedSharding(
                mesh, PartitionSpec(*(entry or None for entry in spec(name, leaf.shape)))
            ),
        )
        for name, leaf in leaves.items()
    ]
    return jax.tree_util.tree_unflatten(treedef, placed)
