"""Which parameter is sharded how: name patterns -> PartitionSpec, from a TOML file.

    [[rule]]
    names = ["model.layers.*.self_attn.[qkv]_proj.weight"]
    spec = ["tp"]
    contract = 1

`names` are shell patterns (`*` spans dots) for a parameter's key path joined by dots; the first
rule that fits decides, and every parameter needs one. `spec` names a mesh axis for each dimension:
"" for none, a list for several; dimensions left out are not split. `contract` is the dimension
that the model's matrix product sums over: only parameters that have it are quantised, with one
scale for each index of the other dimensions.
"""

import fnmatch
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# In a wheel the rules lie within the package, in a checkout beside it.
_SHIPPED = [Path(__file__).with_name("configs"), Path(__file__).parents[1] / "configs"]
_FAMILIES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "qwen3_moe": "qwen",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "gemma3_text": "gemma",
    "mixtral": "mixtral",
}


type Spec = tuple[tuple[str, ...], ...]  # of each dimension, the mesh axes it is split over


@dataclass(frozen=True)
class Rule:
    names: tuple[str, ...]
    spec: Spec
    contract: int | None = None


@dataclass(frozen=True)
class Rules:
    file: str
    rules: tuple[Rule, ...]

    def of(self, name: str) -> Rule:
        """The first rule whose patterns fit. Raises ValueError if there is none."""
        for rule in self.rules:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in rule.names):
                return rule
        raise ValueError(
            f"{self.file}: no rule is for the parameter {name!r}; add one to a copy of this file "
            "and pass it as --rules"
        )


@dataclass(frozen=True)
class Mesh:
    """Names and sizes of a mesh's axes; a device's rank counts through them, the last fastest."""

    axes: Mapping[str, int]

    @property
    def size(self) -> int:
        return math.prod(self.axes.values())

    def parts(self, spec: Spec) -> tuple[int, ...]:
        """Into how many parts each dimension is split."""
        return tuple(math.prod(self.axes[axis] for axis in axes) for axes in spec)

    def owner(self, spec: Spec, part: tuple[int, ...]) -> int:
        """The lowest rank that holds this part of an array."""
        at = dict.fromkeys(self.axes, 0)
        for index, axes in zip(part, spec, strict=True):
            for axis in reversed(axes):
                index, at[axis] = divmod(index, self.axes[axis])
        rank = 0
        for axis, size in self.axes.items():
            rank = rank * size + at[axis]
        return rank


def read_mesh(text: str) -> Mesh:
    """`tp=8` or `dp=2,tp=4`. Raises ValueError for anything else."""
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name.isidentifier() or not size.isdecimal() or int(size) < 1 or name in axes:
            raise ValueError(f"mesh {text!r}: expected axis=size, such as tp=8 or dp=2,tp=4")
        axes[name] = int(size)
    return Mesh(axes)


def read_rules(file: str | Path) -> Rules:
    """Reads a rules file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not TOML, or not rules.
    """
    try:
        content = tomllib.loads(Path(file).read_text())
        if content.keys() != {"rule"}:
            raise ValueError(f"it has {sorted(content)} at its top, not just [[rule]]")
        return Rules(str(file), tuple(map(_rule, content["rule"])))
    except (ValueError, TypeError) as e:  # TOMLDecodeError is a ValueError
        raise ValueError(f"{file}: not a rules file: {e}") from e


def _rule(entry: Mapping[str, Any]) -> Rule:
    if not {"names", "spec"} <= entry.keys() <= {"names", "spec", "contract"}:
        raise ValueError(f"a rule has names, spec and perhaps contract; this one has {list(entry)}")
    names, contract = entry["names"], entry.get("contract")
    spec = tuple(
        tuple(axes) if isinstance(axes, list) else (axes,) if axes else () for axes in entry["spec"]
    )
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"names = {names!r} is not a list of patterns")
    flat = [axis for axes in spec for axis in axes]
    if not all(isinstance(axis, str) and axis for axis in flat) or len(set(flat)) < len(flat):
        raise ValueError(f"spec = {entry['spec']!r} does not name each mesh axis once")
    if contract is not None and (type(contract) is not int or contract < 0):
        raise ValueError(f"{contract=} is not the number of a dimension")
    return Rule(tuple(names), spec, contract)


def has_rules(config: Mapping[str, Any] | None) -> bool:
    """Whether rules ship for this model's family."""
    return (config or {}).get("model_type") in _FAMILIES


def shipped(config: Mapping[str, Any] | None) -> Rules:
    """The rules that ship for a model's family, by `model_type` of its config.json.

    Raises:
      ValueError: none ship for it.
    """
    kind = (config or {}).get("model_type")
    family = _FAMILIES.get(kind or "")
    if family is None:
        raise ValueError(
            f"no sharding rules ship for the model type {kind!r} (they do for "
            f"{', '.join(_FAMILIES)}): pass --rules FILE"
        )
    folder = next(folder for folder in _SHIPPED if (folder / "rules").is_dir())
    return read_rules(folder / "rules" / f"{family}.toml")


def fitted(rule: Rule, name: str, shape: tuple[int, ...], mesh: Mesh) -> Rule:
    """`rule` with a spec as long as `shape`.

    Raises:
      ValueError: the rule does not fit the array or the mesh.
    """
    needed = 0 if rule.contract is None else max(2, rule.contract + 1)
    if len(shape) < max(needed, len(rule.spec)):
        raise ValueError(f"{name!r} has shape {shape}, too few dimensions for {rule}")
    spec = rule.spec + ((),) * (len(shape) - len(rule.spec))
    for size, axes in zip(shape, spec, strict=True):
        if absent := [axis for axis in axes if axis not in mesh.axes]:
            raise ValueError(
                f"the rule for {name!r} splits over {absent}, which the mesh {dict(mesh.axes)} "
                "lacks: name its axes in --mesh (of size 1 if nothing is to be split)"
            )
        parts = math.prod(mesh.axes[axis] for axis in axes)
        if size % parts:
            raise ValueError(
                f"{name!r} has shape {shape}, and {size} does not divide by {parts} (mesh axes "
                f"{axes}): use a smaller mesh, or rules that leave this dimension whole"
            )
    return Rule(rule.names, spec, rule.contract)
