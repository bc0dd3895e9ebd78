"""The command `jaxgds`."""

import argparse
import json
import sys
from collections.abc import Sequence

from jaxgds.errors import CheckpointError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status (2: the caller's mistake)."""
    parser = argparse.ArgumentParser(
        prog="jaxgds", description="Restore sharded JAX checkpoints fast, and look into them."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="what a checkpoint holds: arrays, chunks, codec, share that is read in place",
        description="Lists the arrays of an Orbax or safetensors checkpoint from its metadata "
        "alone, and says how much of it can be read without decompression.",
    )
    inspect.add_argument("path", help="Orbax item or step directory, safetensors file or directory")
    inspect.add_argument("--json", metavar="FILE", help="write the same as JSON ('-': to stdout)")
    inspect.set_defaults(run=_inspect)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (CheckpointError, ValueError) as e:
        print(f"jaxgds {args.command}: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `jaxgds inspect ... | head`
        sys.stderr.close()
        return 0


def _inspect(args: argparse.Namespace) -> int:
    from jaxgds.inspect import inspect, table

    found = inspect(args.path)
    if args.json != "-":
        print(table(found))
    _write_json(args.json, found)
    return 0


def _write_json(file: str | None, value: object) -> None:
    if file == "-":
        json.dump(value, sys.stdout, indent=1)
        print()
    elif file:
        with open(file, "w") as f:
            json.dump(value, f, indent=1)
            f.write("\n")
