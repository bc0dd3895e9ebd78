"""What becomes of each tensor of a checkpoint that is prepared. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np

from jaxgds import quantize
from jaxgds.prepared import Array
from jaxgds.rules import Mesh, Rules, Spec, fitted
from jaxgds.sources import Model, Tensor


type Method = Literal["fp8"]


@dataclass(frozen=True)
class Job:
    """What becomes of one tensor of the source.

    Attributes:
      scale: of a quantised tensor, the array of its scales.
      contract: the dimension over which a scale is shared.
    """

    tensor: Tensor
    array: Array
    scale: Array | None = None
    contract: int = 0


def make_jobs(
    model: Model, rules: Rules, mesh: Mesh, method: Method | None, dtype: Any = None
) -> list[Job]:
    """What becomes of each tensor. Raises ValueError if rules, mesh and tensors do not fit."""
    to = _float_dtype(dtype) if dtype is not None else None
    tensors = {_plain_name(tensor): tensor for tensor in model.tensors}
    jobs = []
    for tensor in model.tensors:
        spec, contract, castable = _placed(tensor, tensors, rules, mesh)
        array = Array(
            tensor.keys,
            tensor.value_type,
            tensor.shape,
            tensor.dtype,
            spec,
            mesh.parts(spec),
        )
        if not castable or not _is_wide_float(tensor.dtype):
            jobs.append(Job(tensor, array))
        elif method == "fp8" and contract is not None:
            jobs.append(_quantised(tensor, array, contract))
        else:
            jobs.append(Job(tensor, replace(array, dtype=to or tensor.dtype)))
    names = [a.name for job in jobs for a in (job.array, job.scale) if a is not None]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(
            f"{model.path}: several arrays, or scales, would have the name {twice[0]!r}"
        )
    return jobs


def _plain_name(tensor: Tensor) -> str:
    return tensor.name.removesuffix(".value")  # of an nnx.Variable


def _placed(
    tensor: Tensor, tensors: Mapping[str, Tensor], rules: Rules, mesh: Mesh
) -> tuple[Spec, int | None, bool]:
    """Where a tensor's dimensions go, which one is summed over, and whether its dtype may change.

    The scales of a tensor that is quantised already go where its channels are.
    """
    if not tensor.shape:  # it cannot be split, so it needs no rule
        return (), None, tensor.value_type != "scalar"
    name = _plain_name(tensor)
    weight = tensors.get(name.removesuffix("_scale"))
    if weight is not None and weight is not tensor and weight.shape:
        rule = fitted(rules.of(_plain_name(weight)), weight.name, weight.shape, mesh)
        c = rule.contract
        if c is not None and tensor.shape == (*weight.shape[:c], 1, *weight.shape[c + 1 :]):
            return (*rule.spec[:c], (), *rule.spec[c + 1 :]), None, False
    rule = fitted(rules.of(name), tensor.name, tensor.shape, mesh)
    return rule.spec, rule.contract, tensor.value_type != "scalar"


def _float_dtype(dtype: Any) -> np.dtype:
    try:
        made = np.dtype(dtype)
    except TypeError as e:
        raise ValueError(f"{dtype=} is no data type") from e
    if not _is_wide_float(made):
        raise ValueError(f"{dtype=}: expected a floating-point type of 2 bytes or more")
    return made


def _is_wide_float(dtype: np.dtype) -> bool:
    """Whether it is a floating-point number that takes more than a byte."""
    return dtype.itemsize > 1 and jax.dtypes.issubdtype(dtype, np.floating)


def _quantised(tensor: Tensor, array: Array, contract: int) -> Job:
    def without[T](items: Sequence[T], other: T) -> tuple[T, ...]:
        return (*items[:contract], other, *items[contract + 1 :])

    # Beside `weight` lies `weight_scale`; an nnx.Variable's own last key is `value`.
    last = len(array.keys) - 1 - (len(array.keys) > 1 and array.keys[-1][0] == "value")
    key, kind = array.keys[last]
    scale = Array(
        (*array.keys[:last], (f"{key}_scale", kind), *array.keys[last + 1 :]),
        array.value_type,
        without(array.shape, 1),
        np.dtype(np.float32),
        without(array.spec, ()),
        without(array.parts, 1),
    )
    return Job(tensor, replace(array, dtype=quantize.FP8), scale, contract)
