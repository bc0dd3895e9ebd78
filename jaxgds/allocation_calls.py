"""Which program calls allocate which arrays.

To compile a program costs almost the same whatever the number of its results, and competes with the
reads for cores and for the interpreter. So there are few programs: the arrays of one layer, say,
are results of one program that is called once a layer, and what is left over are those of another.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import jax
import numpy as np


# Results per program: more take longer to compile than to read into.
MAX_RESULTS = 64
# In the time of a result: of compiling a program, and of calling one.
_PROGRAM, _CALL = 10.0, 0.4
# Nothing is read before the first program is compiled. The others' results matter less.
_LATER = 0.25

type Spec = tuple[tuple[int, ...], np.dtype]
type Call = list[tuple[Spec, list[int]]]  # each with its destinations, on different devices


def calls(specs: Sequence[Spec], devices: Sequence[jax.Device]) -> list[Call]:
    """Program calls that allocate one array for each (shape, dtype) on its device.

    Calls with equal specs on equal devices run one program. That with the most bytes comes first,
    for the others compile while those bytes are read.
    """
    programs = [p for alike in _by_devices(specs, devices) for p in _programs(alike)]
    programs.sort(key=lambda program: -sum(map(_call_nbytes, program)))
    return [call for program in programs for call in program]


def _by_devices(
    specs: Sequence[Spec], devices: Sequence[jax.Device]
) -> list[list[tuple[Spec, list[list[int]]]]]:
    """For each set of devices, its specs with their destinations, one per device at a time."""
    waiting: dict[Spec, dict[jax.Device, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, (spec, device) in enumerate(zip(specs, devices, strict=True)):
        waiting[spec][device].append(i)
    found: dict[tuple[jax.Device, ...], list[tuple[Spec, list[list[int]]]]] = defaultdict(list)
    for spec, queues in waiting.items():
        start = 0
        for stop in sorted({len(queue) for queue in queues.values()}):
            some = {d: queue for d, queue in queues.items() if len(queue) >= stop}
            batches = [[queue[k] for queue in some.values()] for k in range(start, stop)]
            found[tuple(some)].append((spec, batches))
            start = stop
    return list(found.values())


def _programs(alike: Sequence[tuple[Spec, list[list[int]]]]) -> Iterator[list[Call]]:
    """Each program's calls: of those called `turns` times, and of those for what is left over."""
    counts = [len(batches) for _, batches in alike]
    turns = min(
        {max(1, count // part) for count in set(counts) for part in range(1, 17)},
        key=lambda turns: (_cost(counts, turns), turns),
    )
    taken = [count // turns for count in counts]
    per_turn = [
        [
            (spec, batch)
            for (spec, batches), n in zip(alike, taken, strict=True)
            for batch in batches[turn * n : (turn + 1) * n]
        ]
        for turn in range(turns)
    ]
    for start in range(0, len(per_turn[0]), MAX_RESULTS):
        yield [one[start : start + MAX_RESULTS] for one in per_turn]
    rest = [
        (spec, batch)
        for (spec, batches), n in zip(alike, taken, strict=True)
        for batch in batches[turns * n :]
    ]
    for some in itertools.batched(rest, MAX_RESULTS):
        yield [list(some)]


def _cost(counts: Sequence[int], turns: int) -> float:
    """What it costs to call some programs `turns` times, each as large as it then must be."""
    results, rest = (sum(f(c, turns) for c in counts) for f in (int.__floordiv__, int.__mod__))
    often, once = -(-results // MAX_RESULTS), -(-rest // MAX_RESULTS)
    compiled = (often + once) * _PROGRAM + min(results, MAX_RESULTS) + _LATER * rest
    return compiled + (turns * often + once) * _CALL


def _call_nbytes(call: Call) -> int:
    return sum(math.prod(shape) * t.itemsize * len(batch) for (shape, t), batch in call)
