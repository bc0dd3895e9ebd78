"""The JSON header of a safetensors file -> its tensors. Pure.

Accepts and refuses what the reference implementation does: serde_json's idea of JSON (no NaN, no
half of a surrogate pair, numbers within a double, 127 levels), serde's idea of its structs (fields
that nobody knows are ignored, known ones come once, a list of the fields will do; of two tensors
with one name the last counts), then `Metadata::validate` (in offset order tensors leave no hole
and do not overlap; no product of sizes exceeds 64 bits). Source: safetensors/src/tensor.rs.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


MAX_DEPTH = 127
MAX_SIZE = 2**64 - 1

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
    }.items()
}
# Packed types, which are known but not read.
PACKED_BITS: Mapping[str, int] = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


class Tensor(NamedTuple):
    """One entry of a header: the bytes [start, stop) after the header hold it in C order."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, for a key may come twice."""


def parse(text: bytes) -> tuple[dict[str, Tensor], int]:
    """The tensors of a header, in file order, and how many bytes of data they take.

    Raises:
      ValueError: the reference implementation would refuse it too (RecursionError among them is
        for the caller: nesting that Python's parser gives up on).
    """
    header = json.loads(
        text.decode(),
        object_pairs_hook=_Object,
        parse_int=_integer,
        parse_float=_float,
        parse_constant=_constant,
    )
    if not isinstance(header, _Object):
        raise ValueError("it is not an object")
    tensors: dict[str, Tensor] = {}
    metadata_seen = False
    for name, value in header:
        if name == "__metadata__":
            if metadata_seen:
                raise ValueError("__metadata__ occurs twice")
            metadata_seen = True
            _check_metadata(value)
        else:
            _check_text(name)
            tensors[name] = _tensor(name, value)
    in_order = sorted(tensors.items(), key=lambda item: item[1][2:])
    end = 0
    for name, tensor in in_order:
        if tensor.start != end or tensor.stop < tensor.start:
            raise ValueError(
                f"tensor {name!r} lies at [{tensor.start}, {tensor.stop}), not from {end} on"
            )
        end = tensor.stop
        nbytes = _nbytes(name, tensor)
        if nbytes != tensor.stop - tensor.start:
            raise ValueError(
                f"tensor {name!r}: {tensor.shape} of {tensor.dtype} does not take "
                f"{tensor.stop - tensor.start} bytes"
            )
    return dict(in_order), end


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, _Object):
        fields: dict[str, Any] = {}
        for key, field in value:
            if key in ("dtype", "shape", "data_offsets"):
                if key in fields:
                    raise ValueError(f"tensor {name!r} has the field {key!r} twice")
                fields[key] = field
            else:
                _check_text(key)
                _check_ignored(field, depth=2)
        if len(fields) < 3:
            raise ValueError(f"tensor {name!r} has only the fields {sorted(fields)}")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    elif isinstance(value, list) and len(value) == 3:
        dtype, shape, offsets = value
    else:
        raise ValueError(f"tensor {name!r} is {str(value)[:64]!r}, no tensor")
    if isinstance(dtype, _Object) and len(dtype) == 1 and dtype[0][1] is None:
        dtype = dtype[0][0]  # serde's other spelling of an enum
    if not isinstance(dtype, str) or dtype not in (*DTYPES, *PACKED_BITS):
        raise ValueError(f"tensor {name!r}: there is no dtype {str(dtype)[:64]!r}")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise ValueError(
            f"tensor {name!r}: shape={str(shape)[:64]}, data_offsets={str(offsets)[:64]}"
        )
    return Tensor(dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return type(value) is list and all(type(n) is int and n >= 0 for n in value)


def _nbytes(name: str, tensor: Tensor) -> int:
    elements = 1
    for n in tensor.shape:  # one by one: a zero at the end does not excuse what comes before
        elements *= n
        if elements > MAX_SIZE:
            raise ValueError(f"tensor {name!r}: {tensor.shape} exceeds 64 bits")
    bits = elements * bits_of(tensor.dtype)
    if bits > MAX_SIZE or bits % 8:
        raise ValueError(f"tensor {name!r}: {bits} bits are too many, or no whole bytes")
    return bits // 8


def bits_of(dtype: str) -> int:
    return PACKED_BITS.get(dtype) or DTYPES[dtype].itemsize * 8


def _check_metadata(value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, _Object) or not all(isinstance(v, str) for _, v in value):
        raise ValueError("__metadata__ is not a map of strings")
    for pair in value:
        for string in pair:
            _check_text(string)


def _check_ignored(value: Any, depth: int) -> None:
    """What nobody reads must be JSON that serde_json takes, too.

    Args:
      depth: levels that `value` lies below.
    """
    inside: list[Iterator[Any]] = [iter((value,))]
    while inside:
        item = next(inside[-1], inside)
        if item is inside:
            inside.pop()
        elif isinstance(item, str):
            _check_text(item)
        elif isinstance(item, list):
            if depth + len(inside) > MAX_DEPTH:
                raise ValueError(f"it nests deeper than {MAX_DEPTH} levels")
            pairs = isinstance(item, _Object)
            inside.append(itertools.chain.from_iterable(item) if pairs else iter(item))


def _check_text(string: str) -> None:
    """Raises UnicodeEncodeError, a ValueError, at half of a surrogate pair."""
    string.encode()


def _integer(digits: str) -> int | float:
    if digits == "-0":
        return -0.0
    number = int(digits) if len(digits) < 21 else MAX_SIZE + 1
    return number if -(2**63) <= number <= MAX_SIZE else _float(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:64]} is out of range")
    return number


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
