"""What all commands do with their result: a table for people, JSON for programs, a plot."""

import argparse
import errno
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


JSON = argparse.ArgumentParser(add_help=False)
JSON.add_argument("--json", metavar="FILE", help="write the result as JSON ('-': to stdout)")
PLOT = argparse.ArgumentParser(add_help=False, parents=[JSON])
PLOT.add_argument("--plot", metavar="FILE", help="draw the results (needs matplotlib)")


def show(args: argparse.Namespace, found: Any, table: Any) -> None:
    """Prints the table, and writes JSON where --json says; '-' is stdout, without the table."""
    if args.json == "-":
        json.dump(found, sys.stdout, indent=1)
        print()
        return
    print(table(found))
    if args.json:
        with open(args.json, "w") as f:
            json.dump(found, f, indent=1)
            f.write("\n")


def show_bench(args: argparse.Namespace, found: Any, bench: ModuleType) -> int:
    """As `show`, and the plot; returns the exit status: 1 if a result is an error."""
    show(args, found, bench.table)
    if args.plot:
        bench.plot(found, args.plot)
    return 1 if any("error" in row for row in found["results"]) else 0


def check_files(args: argparse.Namespace) -> None:
    """Raises at once what would else be found after the work: that its result cannot be written."""
    plot = getattr(args, "plot", None)
    for file in filter(None, (args.json if args.json != "-" else None, plot)):
        folder = os.path.dirname(file) or "."
        if not os.path.isdir(folder):
            raise FileNotFoundError(errno.ENOENT, "no such directory to write to", folder)
        if os.path.isdir(file):
            raise IsADirectoryError(errno.EISDIR, "a directory, not a file to write to", file)
        if not os.access(file if os.path.exists(file) else folder, os.W_OK):
            raise PermissionError(errno.EACCES, "cannot be written", file)
    if plot:
        try:
            from matplotlib.backend_bases import FigureCanvasBase
        except ModuleNotFoundError as e:
            raise ValueError("--plot needs matplotlib: pip install matplotlib") from e
        kinds = FigureCanvasBase.get_supported_filetypes()
        if (kind := os.path.splitext(plot)[1][1:].lower()) and kind not in kinds:
            raise ValueError(f"--plot {plot}: it can be one of {', '.join(sorted(kinds))}")


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """In this block SIGTERM (of `timeout`, of Slurm) is a KeyboardInterrupt: all is cleared up."""

    def stop(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # `timeout` sends it twice
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse: what `kind` (int, float) makes of an option, if that is positive and finite."""

    def read(text: str) -> Any:
        if not 0 < (value := kind(text)) < math.inf:
            raise ValueError(text)
        return value

    read.__name__ = f"positive {kind.__name__}"  # for argparse's errors
    return read


def numbers(text: str) -> tuple[int, ...]:
    """For argparse: whole numbers with commas between them."""
    return tuple(map(int, text.split(",")))


numbers.__name__ = "comma-separated numbers"


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
