"""The command `jaxgds`."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jaxgds.bench.checkpoints import FORMATS


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
    doctor = commands.add_parser(
        "doctor",
        help="which I/O path this machine and this file system give, and why",
        description="Looks at the machine, JAX's devices, GPUDirect Storage and, given a PATH, "
        "at its file system; says which path a restore takes.",
    )
    doctor.add_argument("path", nargs="?", help="a checkpoint, or any directory")
    doctor.add_argument("--json", metavar="FILE", help="write the same as JSON ('-': to stdout)")
    doctor.set_defaults(run=_doctor)
    prepare = commands.add_parser(
        "prepare",
        help="pre-shard and pre-quantise into a checkpoint that stock Orbax still restores",
        description="Writes SRC (a safetensors directory or file, an Orbax checkpoint or a GGUF "
        "file) into the new directory DST, one chunk a shard of the mesh, laid out for direct "
        "I/O. With --check, proves DST against the source that it was made from, or against SRC.",
    )
    prepare.add_argument("source", metavar="SRC", help="with --check, may be left out")
    prepare.add_argument("destination", metavar="DST", nargs="?")
    prepare.add_argument("--mesh", default="tp=1", help="axes of the mesh, as in dp=2,tp=4")
    prepare.add_argument(
        "--rules", metavar="FILE", help="parameter name -> PartitionSpec; see configs/rules"
    )
    prepare.add_argument(
        "--quantize",
        default="none",
        choices=("none", "fp8"),
        help="fp8: e4m3 with a float32 scale per output channel; embeddings and norms stay",
    )
    prepare.add_argument("--dtype", help="of parameters that are not quantised, as in bfloat16")
    prepare.add_argument("--check", action="store_true", help="prove a prepared checkpoint")
    prepare.add_argument("--json", metavar="FILE", help="write the result ('-': to stdout)")
    prepare.set_defaults(run=_prepare)
    plan = commands.add_parser(
        "plan",
        help="HBM, context and load time of a model on a mesh of GPUs",
        description="Says what a model's weights and KV cache take on each GPU, how many tokens of "
        "context fit, and how fast it can load at best. Reads a config.json and nothing else.",
    )
    plan.add_argument(
        "model", nargs="?", help="a config.json, its directory, or a name such as llama-3.1-8b"
    )
    plan.add_argument("--gpu", default="H100", help="H100, H200, B200, or its memory in GB")
    plan.add_argument("--mesh", default="tp=1", help="axes of the mesh, as in dp=2,tp=4")
    plan.add_argument("--weights", default="bf16", choices=("bf16", "fp8"))
    plan.add_argument(
        "--kv", default="bf16,fp8,K4V4,K4V3,K3V3", help="comma-separated KV cache formats"
    )
    plan.add_argument("--sequences", default="1,8,64", help="comma-separated, at once on the mesh")
    plan.add_argument(
        "--activations", type=float, default=5, metavar="GB", help="kept free on each GPU"
    )
    plan.add_argument(
        "--storage", type=float, default=94, metavar="GiB/s", help="of the file system as a whole"
    )
    plan.add_argument(
        "--network", type=float, default=1200, metavar="Gbit/s", help="into each host"
    )
    plan.add_argument("--host-gpus", type=int, default=8, help="GPUs in a host")
    plan.add_argument("--rules", metavar="FILE", help="as for prepare")
    plan.add_argument(
        "--table", action="store_true", help="AWS's published figures beside this project's"
    )
    plan.add_argument("--json", metavar="FILE", help="write the same as JSON ('-': to stdout)")
    plan.set_defaults(run=_plan)
    bench = commands.add_parser("bench", help="measure: restore, decode, encode, prefill, quality")
    benches = bench.add_subparsers(dest="bench", required=True, metavar="WHAT")
    restore = benches.add_parser(
        "restore",
        help="jaxgds, Orbax and other loaders on the same bytes",
        description="Makes checkpoints of the same arrays in several formats, and restores each "
        "with every loader that is installed, in fresh processes, onto the first device. "
        "Rates are of restored bytes; ratios are against the pinned-copy ceiling (hot) or the "
        "O_DIRECT ceiling (--cold).",
    )
    restore.add_argument("--dir", default=".bench", help="where checkpoints are made and kept")
    restore.add_argument("--size", type=float, default=2, metavar="GB", help="of each checkpoint")
    restore.add_argument(
        "--formats", default=None, help="comma-separated, of " + ", ".join(FORMATS)
    )
    restore.add_argument("--repeat", type=int, default=3, help="calls in each process")
    restore.add_argument("--cold", action="store_true", help="drop the page cache before each call")
    restore.add_argument("--json", metavar="FILE", help="write the results ('-': to stdout)")
    restore.add_argument("--plot", metavar="FILE", help="draw the results (needs matplotlib)")
    restore.set_defaults(run=_bench_restore)
    decode = benches.add_parser(
        "decode",
        help="decode attention over compressed KV caches, against bf16 and ideal FP8",
        description="Checks the GPU kernels against the xla implementation, then times them: "
        "every format at every batch and number of tokens, with cuDNN and XLA in bf16, and the "
        "time that FP8 keys and values would take at the measured copy bandwidth. Without a GPU, "
        "xla alone on a small size.",
    )
    decode.add_argument("--seq", help="comma-separated tokens a sequence")
    decode.add_argument("--batch", help="comma-separated numbers of sequences")
    decode.add_argument("--formats", help="comma-separated, such as K4V4 (bits of keys, values)")
    decode.add_argument("--head-dim", type=int, choices=(64, 128, 256))
    decode.add_argument("--group", type=int, help="query heads a KV head")
    decode.add_argument("--kv-heads", type=int)
    decode.add_argument("--repeat", type=int, help="calls a median is taken of")
    decode.add_argument("--json", metavar="FILE", help="write the results ('-': to stdout)")
    decode.add_argument("--plot", metavar="FILE", help="draw the results (needs matplotlib)")
    decode.set_defaults(run=_bench_decode)
    encode = benches.add_parser(
        "encode",
        help="appends to compressed KV caches, against the copy bandwidth",
        description="Checks the GPU kernel against the xla implementation, then times both: "
        "every number of new tokens, appended in place to a cache of every format. Rates are of "
        "bytes that have to be read and written. Without a GPU, xla alone on a small size.",
    )
    encode.add_argument("--tokens", help="comma-separated tokens an append adds to a sequence")
    encode.add_argument("--batch", help="comma-separated numbers of sequences")
    encode.add_argument("--formats", help="comma-separated, such as K4V4 (bits of keys, values)")
    encode.add_argument("--head-dim", type=int, choices=(64, 128, 256))
    encode.add_argument("--kv-heads", type=int)
    encode.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of new tokens")
    encode.add_argument("--repeat", type=int, help="calls a median is taken of")
    encode.add_argument("--json", metavar="FILE", help="write the results ('-': to stdout)")
    encode.add_argument("--plot", metavar="FILE", help="draw the results (needs matplotlib)")
    encode.set_defaults(run=_bench_encode)
    prefill = benches.add_parser(
        "prefill",
        help="attention of a prompt over a compressed KV cache, against bf16 flash attention",
        description="Checks the GPU kernel against the xla implementation, then times the "
        "attention of all chunks of a prompt, each over the packed tokens before it, beside "
        "cuDNN's bf16 attention of the whole prompt. Without a GPU, xla alone on a small size.",
    )
    prefill.add_argument("--seq", help="comma-separated tokens of a prompt")
    prefill.add_argument("--chunk", type=int, help="tokens read at a time")
    prefill.add_argument("--batch", help="comma-separated numbers of sequences")
    prefill.add_argument("--formats", help="comma-separated, such as K4V4 (bits of keys, values)")
    prefill.add_argument("--head-dim", type=int, choices=(64, 128, 256))
    prefill.add_argument("--group", type=int, help="query heads a KV head")
    prefill.add_argument("--kv-heads", type=int)
    prefill.add_argument("--repeat", type=int, help="calls a median is taken of")
    prefill.add_argument("--json", metavar="FILE", help="write the results ('-': to stdout)")
    prefill.add_argument("--plot", metavar="FILE", help="draw the results (needs matplotlib)")
    prefill.set_defaults(run=_bench_prefill)
    quality = benches.add_parser(
        "quality",
        help="perplexity and KL of compressed KV caches against bf16",
        description="Reads a text with a small model through each cache, chunk by chunk, and "
        "compares the next-token distributions with those of a bf16 cache. The model code comes "
        "from the repository's examples/: run it from a checkout with the examples extra.",
    )
    quality.add_argument("--model", default="smollm2", choices=("smollm2", "gemma3"))
    quality.add_argument("--dir", default=".demo", help="where downloads are kept")
    quality.add_argument("--formats", help="comma-separated, such as K4V4 (keys, values) or fp8")
    quality.add_argument("--window", default="128", help="newest tokens in bf16; comma-separated")
    quality.add_argument("--sinks", default="4", help="first tokens in bf16; comma-separated")
    quality.add_argument(
        "--key-offset", default="on", choices=("on", "off", "both"), help="subtract a mean key"
    )
    quality.add_argument("--texts", type=int, help="how many texts are read")
    quality.add_argument("--tokens", type=int, help="of each text")
    quality.add_argument("--chunk", type=int, default=64, help="tokens read at a time")
    quality.add_argument("--json", metavar="FILE", help="write the results ('-': to stdout)")
    quality.add_argument("--plot", metavar="FILE", help="draw the results (needs matplotlib)")
    quality.set_defaults(run=_bench_quality)
    coldstart = benches.add_parser(
        "coldstart",
        help="from the start of a process to its first token, part by part",
        description="Makes a prepared checkpoint of random weights, and runs to the first token in "
        "fresh processes: stock Orbax and then compilation, against both at once, with a cold and "
        "a warm compilation cache. The model is that of examples/serve_llama.py: run it from a "
        "checkout with the examples extra.",
    )
    coldstart.add_argument("--model", default="llama-3.1-8b", help="as for plan")
    coldstart.add_argument("--layers", type=int, help="fewer of them than the model has")
    coldstart.add_argument("--weights", default="bf16", choices=("bf16", "fp8"))
    coldstart.add_argument("--devices", type=int, default=1, help="the model is split over")
    coldstart.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    coldstart.add_argument("--repeat", type=int, default=1, help="processes for each case")
    coldstart.add_argument("--dir", default=".bench", help="where checkpoints are made and kept")
    coldstart.add_argument("--json", metavar="FILE", help="write the results ('-': to stdout)")
    coldstart.add_argument("--plot", metavar="FILE", help="draw the results (needs matplotlib)")
    coldstart.set_defaults(run=_bench_coldstart)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except BrokenPipeError:  # `jaxgds inspect ... | head`
        sys.stderr.close()
        return 0
    except (OSError, ValueError, NotImplementedError) as e:  # CheckpointError is a ValueError
        print(f"jaxgds {args.command}: {e}", file=sys.stderr)
        return 2


def _inspect(args: argparse.Namespace) -> int:
    from jaxgds.inspect import inspect, table

    found = inspect(args.path)
    _show(args, found, table)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from jaxgds.doctor import doctor, table

    found = doctor(args.path)
    _show(args, found, table)
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from jaxgds import check, prepare, rules

    if args.check:
        source, destination = args.source, args.destination
        if destination is None:
            source, destination = None, source
        found = check.check(destination, source)
        _show(args, found, check.table)
        return 1 if found["problems"] else 0
    if args.destination is None:
        raise ValueError(f"expected SRC DST, found only {args.source!r}")
    found = prepare.prepare(
        args.source,
        args.destination,
        mesh=rules.read_mesh(args.mesh),
        rules=rules.read_rules(args.rules) if args.rules else None,
        method=None if args.quantize == "none" else args.quantize,
        dtype=args.dtype,
    )
    _show(args, found, prepare.table)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from jaxgds import capacity, models, published, rules

    if args.table:
        _show(args, published.compare(), published.table)
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
        [int(n) for n in args.sequences.split(",")],
        rules.read_rules(args.rules) if args.rules else None,
    )
    _show(args, found, capacity.table)
    return 0


def _bench_restore(args: argparse.Namespace) -> int:
    from jaxgds.bench import restore

    formats = tuple(args.formats.split(",")) if args.formats else FORMATS
    if unknown := set(formats) - set(FORMATS):
        raise ValueError(f"--formats: {sorted(unknown)} are not among {FORMATS}")
    found = restore.run(
        args.dir,
        formats,
        nbytes=int(args.size * 1e9),
        repeat=args.repeat,
        cold=args.cold,
        report=lambda text: print(text, file=sys.stderr, flush=True),
    )
    _show(args, found, restore.table)
    if args.plot:
        restore.plot(found, args.plot)
    return 1 if any("error" in row for row in found["results"]) else 0


def _bench_decode(args: argparse.Namespace) -> int:
    from dataclasses import replace

    import jax

    from jaxgds.bench import decode

    asked = {
        "seqs": _numbers(args.seq),
        "batches": _numbers(args.batch),
        **{name: getattr(args, name) for name in ("head_dim", "group", "kv_heads", "repeat")},
    }
    sizes = decode.GPU if jax.devices()[0].platform == "gpu" else decode.CPU
    sizes = replace(sizes, **{name: x for name, x in asked.items() if x is not None})
    found = decode.run(
        sizes,
        tuple(args.formats.split(",")) if args.formats else decode.FORMATS,
        report=lambda text: print(text, file=sys.stderr, flush=True),
    )
    _show(args, found, decode.table)
    if args.plot:
        decode.plot(found, args.plot)
    return 1 if any("error" in row for row in found["results"]) else 0


def _bench_encode(args: argparse.Namespace) -> int:
    from dataclasses import replace

    import jax

    from jaxgds.bench import encode

    asked = {
        "tokens": _numbers(args.tokens),
        "batches": _numbers(args.batch),
        **{name: getattr(args, name) for name in ("head_dim", "kv_heads", "dtype", "repeat")},
    }
    sizes = encode.GPU if jax.devices()[0].platform == "gpu" else encode.CPU
    sizes = replace(sizes, **{name: x for name, x in asked.items() if x is not None})
    found = encode.run(
        sizes,
        tuple(args.formats.split(",")) if args.formats else encode.FORMATS,
        report=lambda text: print(text, file=sys.stderr, flush=True),
    )
    _show(args, found, encode.table)
    if args.plot:
        encode.plot(found, args.plot)
    return 1 if any("error" in row for row in found["results"]) else 0


def _bench_prefill(args: argparse.Namespace) -> int:
    from dataclasses import replace

    import jax

    from jaxgds.bench import prefill

    asked = {
        "seqs": _numbers(args.seq),
        "batches": _numbers(args.batch),
        **{name: getattr(args, name) for name in ("chunk", "head_dim", "group", "kv_heads")},
        "repeat": args.repeat,
    }
    sizes = prefill.GPU if jax.devices()[0].platform == "gpu" else prefill.CPU
    sizes = replace(sizes, **{name: x for name, x in asked.items() if x is not None})
    found = prefill.run(
        sizes,
        tuple(args.formats.split(",")) if args.formats else prefill.FORMATS,
        report=lambda text: print(text, file=sys.stderr, flush=True),
    )
    _show(args, found, prefill.table)
    if args.plot:
        prefill.plot(found, args.plot)
    return 1 if any("error" in row for row in found["results"]) else 0


def _numbers(text: str | None) -> tuple[int, ...] | None:
    return tuple(map(int, text.split(","))) if text else None


def _bench_quality(args: argparse.Namespace) -> int:
    from jaxgds.bench import quality

    offsets = {"on": (True,), "off": (False,), "both": (True, False)}
    settings = quality.Settings(
        windows=tuple(map(int, args.window.split(","))),
        sinks=tuple(map(int, args.sinks.split(","))),
        key_offset=offsets[args.key_offset],
    )
    formats = args.formats.split(",") if args.formats else quality.FORMATS
    caches = quality.cases(formats, settings)
    name, texts, tokens = quality.MODELS[args.model]
    model, tokens, text = quality.load(
        args.model, args.dir, args.texts or texts, args.tokens or tokens
    )
    found = quality.run(model, tokens, caches, args.chunk)
    found |= {"model": name, "text": text}
    _show(args, found, quality.table)
    if args.plot:
        quality.plot(found, args.plot)
    return 0


def _bench_coldstart(args: argparse.Namespace) -> int:
    from jaxgds import models
    from jaxgds.bench import coldstart

    config = models.read_config(args.model)
    if args.layers is not None:
        config |= {"num_hidden_layers": args.layers}
    found = coldstart.run(
        args.dir,
        config,
        args.weights,
        devices=args.devices,
        prompt=args.prompt,
        repeat=args.repeat,
        report=lambda text: print(text, file=sys.stderr, flush=True),
    )
    _show(args, found, coldstart.table)
    if args.plot:
        coldstart.plot(found, args.plot)
    return 1 if any("error" in row for row in found["results"]) else 0


def _show(args: argparse.Namespace, found: Any, table: Callable[[Any], str]) -> None:
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
