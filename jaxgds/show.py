"""What all commands do with their result: a table for people, JSON for programs, a plot."""

import argparse
import json
import sys
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
        try:
            bench.plot(found, args.plot)
        except ModuleNotFoundError as e:
            raise ValueError(f"--plot needs matplotlib: pip install matplotlib ({e})") from e
    return 1 if any("error" in row for row in found["results"]) else 0


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
