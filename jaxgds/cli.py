"""The command `jaxgds`."""

import argparse
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from jaxgds.bench.cli import BENCHES, add_bench
from jaxgds.show import JSON, check_files, numbers, positive, say, show, stopped_by_sigterm


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status (2: the caller's mistake, 130: stopped)."""
    parser, name = _parser(), "jaxgds"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    try:
        try:
            args = parser.parse_args(argv)
            name = " ".join([name, args.command, getattr(args, "bench", "")]).rstrip()
            check_files(args)
            return args.run(args)
        finally:
            if sys.stdout:  # None where it was closed
                sys.stdout.flush()
    except KeyboardInterrupt:
        say(f"{name}: stopped")
        return 130
    except BrokenPipeError:  # `jaxgds inspect ... | head`: what is left has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except subprocess.CalledProcessError as e:  # of a benchmark; it has said why, or e has
        why = (e.stderr or "").strip().splitlines() or ["see above"]
        say(f"{name}: a process of it failed with status {e.returncode}: {why[-1]}")
        return 1
    except (OSError, ValueError, NotImplementedError) as e:  # CheckpointError is a ValueError
        say(f"{name}: {_reason(e)}")
        return 2


def _reason(error: Exception) -> str:
    """What went wrong, the file first, without Python's "[Errno 2]"."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror


def _version() -> str:
    try:
        return version("jaxgds")
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        return "(not installed)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxgds", description="Restore sharded JAX checkpoints fast, and look into them."
    )
    parser.add_argument("--version", action="version", version=f"jaxgds {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        parents=[JSON],
        help="what a checkpoint holds: arrays, chunks, codec, share that is read in place",
        description="Lists the arrays of an Orbax or safetensors checkpoint from its metadata "
        "alone, and says how much of it can be read without decompression.",
    )
    inspect.add_argument("path", help="Orbax item or step directory, safetensors file or directory")
    inspect.set_defaults(run=_inspect)
    doctor = commands.add_parser(
        "doctor",
        parents=[JSON],
        help="which I/O path this machine and this file system give, and why",
        description="Looks at the machine, JAX's devices, GPUDirect Storage and, given a PATH, "
        "at its file system; says which path a restore takes.",
    )
    doctor.add_argument("path", nargs="?", help="a checkpoint, or any directory")
    doctor.set_defaults(run=_doctor)
    verify = commands.add_parser(
        "verify",
        parents=[JSON],
        help="read a whole checkpoint and compare it with its checksums",
        description="Names the file, the array and the offsets of what is damaged; the exit status "
        "is 1 then. Checksums are those of jaxgds prepare, of OCDBT nodes and of zstd frames.",
    )
    verify.add_argument("path", help="Orbax item or step directory, safetensors file or directory")
    verify.set_defaults(run=_verify)
    prepare = commands.add_parser(
        "prepare",
        parents=[JSON],
        help="pre-shard and pre-quantise into a checkpoint that stock Orbax still restores",
        description="Writes SRC (a safetensors directory or file, an Orbax checkpoint or a GGUF "
        "file) into the new directory DST, one chunk a shard of the mesh, laid out for direct "
        "I/O. With --check, proves DST against the source that it was made from, or against SRC.",
    )
    prepare.add_argument("source", metavar="SRC", help="with --check, may be left out")
    prepare.add_argument("destination", metavar="DST", nargs="?")
    prepare.add_argument(
        "--mesh", default="tp=1", help="its axes, as in dp=2,tp=4 (default: %(default)s)"
    )
    prepare.add_argument(
        "--rules",
        metavar="FILE",
        help="TOML, as in configs/rules; default: what ships for the model's family",
    )
    prepare.add_argument(
        "--quantize",
        default="none",
        choices=("none", "fp8"),
        help="fp8: e4m3 with a float32 scale per output channel; embeddings and norms stay",
    )
    prepare.add_argument(
        "--dtype",
        help="of floating-point parameters that are not quantised, as in bfloat16; default: theirs",
    )
    prepare.add_argument("--check", action="store_true", help="prove a prepared checkpoint")
    prepare.set_defaults(run=_prepare)
    plan = commands.add_parser(
        "plan",
        parents=[JSON],
        help="HBM, context and load time of a model on a mesh of GPUs",
        description="Says what a model's weights and KV cache take on each GPU, how many tokens of "
        "context fit, and how fast it can load at best. Reads a config.json and nothing else.",
    )
    plan.add_argument(
        "model", nargs="?", help="a config.json, its directory, or a name such as llama-3.1-8b"
    )
    plan.add_argument(
        "--gpu", default="H100", help="H100 (default), H200, B200, or its memory in GB"
    )
    plan.add_argument(
        "--mesh", default="tp=1", help="its axes, as in dp=2,tp=4 (default: %(default)s)"
    )
    plan.add_argument(
        "--weights", default="bf16", choices=("bf16", "fp8"), help="default: %(default)s"
    )
    plan.add_argument(
        "--kv",
        default="bf16,fp8,K4V4,K4V3,K3V3",
        help="formats of the KV cache (default: %(default)s)",
    )
    plan.add_argument(
        "--sequences",
        type=numbers,
        default="1,8,64",
        help="how many at once on the mesh (default: %(default)s)",
    )
    plan.add_argument(
        "--activations",
        type=float,
        default=5,
        metavar="GB",
        help="kept free on each GPU (default: %(default)s)",
    )
    plan.add_argument(
        "--storage",
        type=positive(float),
        default=94,
        metavar="GiB/s",
        help="of the file system as a whole (default: %(default)s)",
    )
    plan.add_argument(
        "--network",
        type=positive(float),
        default=1200,
        metavar="Gbit/s",
        help="into each host (default: %(default)s)",
    )
    plan.add_argument(
        "--host-gpus", type=positive(int), default=8, help="GPUs in a host (default: %(default)s)"
    )
    plan.add_argument("--rules", metavar="FILE", help="as for prepare")
    plan.add_argument(
        "--table", action="store_true", help="AWS's published figures beside this project's"
    )
    plan.set_defaults(run=_plan)
    add_bench(commands.add_parser("bench", help="measure: " + ", ".join(BENCHES)))
    return parser


def _inspect(args: argparse.Namespace) -> int:
    from jaxgds.inspect import inspect, table

    found = inspect(args.path)
    show(args, found, table)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from jaxgds.doctor import doctor, table

    found = doctor(args.path)
    show(args, found, table)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from jaxgds.verify import table, verify

    found = verify(args.path)
    show(args, found, table)
    return 1 if found["problems"] else 0


def _prepare(args: argparse.Namespace) -> int:
    from jaxgds import check, prepare, rules

    if args.check:
        source, destination = args.source, args.destination
        if destination is None:
            source, destination = None, source
        found = check.check(destination, source)
        show(args, found, check.table)
        return 1 if found["problems"] else 0
    if args.destination is None:
        raise ValueError(f"expected SRC DST, found only {args.source!r}")
    with stopped_by_sigterm():  # it removes what it has written
        found = prepare.prepare(
            args.source,
            args.destination,
            mesh=rules.read_mesh(args.mesh),
            rules=rules.read_rules(args.rules) if args.rules else None,
            method=None if args.quantize == "none" else args.quantize,
            dtype=args.dtype,
        )
    show(args, found, prepare.table)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from jaxgds import capacity, models, published, rules

    if args.table:
        show(args, published.compare(), published.table)
        return 0
    if args.model is None:
        raise ValueError(f"name a model: a config.json, or one of {', '.join(models.shipped())}")
    setup = capacity.Setup(
        capacity.read_gpu(args.gpu),
        rules.read_mesh(args.mesh),
        args.weights,
        activation_bytes=args.activations * 1e9,
        storage_rate=args.storage * 2**30,
        network_rate=args.network * 1e9 / 8,
        host_gpus=args.host_gpus,
    )
    found = capacity.plan(
        models.read_config(args.model),
        setup,
        [capacity.read_kv(name) for name in args.kv.split(",")],
        args.sequences,
        rules.read_rules(args.rules) if args.rules else None,
    )
    show(args, found, capacity.table)
    return 0
