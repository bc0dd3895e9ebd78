"""The commands `jaxgds bench ...`."""

import argparse
import dataclasses
import importlib
import json
import os
import stat
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from jaxgds.bench.checkpoints import FORMATS, PREPARED
from jaxgds.show import PLOT, numbers, positive, say, show, show_bench, stopped_by_sigterm


BENCHES = ("restore", "coldstart", "decode", "encode", "prefill", "quality")


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand for each of BENCHES."""
    commands = parser.add_subparsers(dest="bench", required=True, metavar="WHAT")
    _add_restore(commands)
    _add_coldstart(commands)
    _add_kernels(commands)
    _add_quality(commands)


def _add_restore(commands) -> None:
    restore = commands.add_parser(
        "restore",
        parents=[PLOT],
        help="jaxgds, Orbax and other loaders on the same bytes",
        description="Makes checkpoints of the same arrays in several formats, and restores each "
        "with every loader that is installed, in fresh processes, onto the first device. "
        "Rates are of restored bytes; ratios are against the pinned-copy ceiling (hot) or the "
        "O_DIRECT ceiling (--cold).",
    )
    restore.add_argument(
        "--dir", default=".bench", help="where checkpoints are made and kept (default: %(default)s)"
    )
    restore.add_argument(
        "--size",
        type=positive(float),
        default=2,
        metavar="GB",
        help="of each checkpoint (default: %(default)s)",
    )
    restore.add_argument(
        "--formats",
        type=_words,
        default=FORMATS,
        help=f"comma-separated, of {', '.join(FORMATS)} (the default) and {', '.join(PREPARED)} "
        "(written by jaxgds prepare, for one device and for two)",
    )
    restore.add_argument(
        "--repeat",
        type=positive(int),
        default=3,
        help="calls in each process (default: %(default)s); a loader that takes over 10 s gets no "
        "second one",
    )
    restore.add_argument(
        "--processes",
        type=positive(int),
        default=1,
        help="fresh processes for each loader, of whose first calls the median is reported "
        "(default: %(default)s)",
    )
    restore.add_argument(
        "--cold",
        action="store_true",
        help="drop the page cache before each call, one for each loader",
    )
    restore.set_defaults(run=_restore)


def _restore(args: argparse.Namespace) -> int:
    from jaxgds.bench import restore

    if unknown := set(args.formats) - {*FORMATS, *PREPARED}:
        raise ValueError(f"--formats: {sorted(unknown)} are not among {(*FORMATS, *PREPARED)}")
    size = int(args.size * 1e9)
    options = {name: getattr(args, name) for name in ("repeat", "cold", "processes")}
    run = partial(restore.run, os.path.abspath(args.dir), args.formats, size, **options)
    return _measure(args, run, restore)


def _add_coldstart(commands) -> None:
    coldstart = commands.add_parser(
        "coldstart",
        parents=[PLOT],
        help="from the start of a process to its first token, part by part",
        description="Makes a prepared checkpoint of random weights, and runs to the first token in "
        "fresh processes: stock Orbax and then compilation, against both at once, with a cold and "
        "a warm compilation cache, and with executables that are kept. The model is that of "
        "examples/serve_llama.py: run it from a checkout with the examples extra.",
    )
    coldstart.add_argument(
        "--model", default="llama-3.1-8b", help="as for plan (default: %(default)s)"
    )
    coldstart.add_argument("--layers", type=positive(int), help="fewer of them than the model has")
    coldstart.add_argument(
        "--weights", default="bf16", choices=("bf16", "fp8"), help="default: %(default)s"
    )
    coldstart.add_argument(
        "--devices",
        type=positive(int),
        default=1,
        help="the model is split over (default: %(default)s)",
    )
    coldstart.add_argument(
        "--prompt",
        type=positive(int),
        default=256,
        help="tokens of the prompt (default: %(default)s)",
    )
    coldstart.add_argument(
        "--repeat",
        type=positive(int),
        default=1,
        help="processes for each case (default: %(default)s)",
    )
    coldstart.add_argument(
        "--dir", default=".bench", help="where checkpoints are made and kept (default: %(default)s)"
    )
    coldstart.set_defaults(run=_coldstart)


def _coldstart(args: argparse.Namespace) -> int:
    from jaxgds import models
    from jaxgds.bench import coldstart

    config = models.read_config(args.model)
    if args.layers is not None:
        config |= {"num_hidden_layers": args.layers}
    options = {name: getattr(args, name) for name in ("devices", "prompt", "repeat")}
    run = partial(coldstart.run, args.dir, config, args.weights, **options)
    return _measure(args, run, coldstart)


def _add_kernels(commands) -> None:
    """decode, encode and prefill; each option sets the field of the bench's Sizes of its name."""
    shape = argparse.ArgumentParser(add_help=False, parents=[PLOT])
    shape.add_argument(
        "--batch", type=numbers, dest="batches", help="comma-separated numbers of sequences"
    )
    shape.add_argument(
        "--formats", type=_caches, help="comma-separated, such as K4V4 (bits of keys, values)"
    )
    shape.add_argument("--head-dim", type=int, choices=(64, 128, 256))
    shape.add_argument("--kv-heads", type=int)
    shape.add_argument("--repeat", type=int, help="calls a median is taken of")
    decode = commands.add_parser(
        "decode",
        parents=[shape],
        help="decode attention over compressed KV caches, against bf16 and ideal FP8",
        description="Checks the GPU kernels against the xla implementation, then times them: "
        "every format at every batch and number of tokens, with cuDNN and XLA in bf16, and the "
        "time that FP8 keys and values would take at the measured copy bandwidth. Without a GPU, "
        "xla alone on a small size.",
    )
    decode.add_argument(
        "--seq", type=numbers, dest="seqs", help="comma-separated tokens a sequence"
    )
    decode.add_argument("--group", type=int, help="query heads a KV head")
    encode = commands.add_parser(
        "encode",
        parents=[shape],
        help="appends to compressed KV caches, against the copy bandwidth",
        description="Checks the GPU kernel against the xla implementation, then times both: "
        "every number of new tokens, appended in place to a cache of every format. Rates are of "
        "bytes that have to be read and written. Without a GPU, xla alone on a small size.",
    )
    encode.add_argument(
        "--tokens", type=numbers, help="comma-separated tokens an append adds to a sequence"
    )
    encode.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of new tokens")
    prefill = commands.add_parser(
        "prefill",
        parents=[shape],
        help="attention of a prompt over a compressed KV cache, against bf16 flash attention",
        description="Checks the GPU kernel against the xla implementation, then times the "
        "attention of all chunks of a prompt, each over the packed tokens before it, beside "
        "cuDNN's bf16 attention of the whole prompt. Without a GPU, xla alone on a small size.",
    )
    prefill.add_argument(
        "--seq", type=numbers, dest="seqs", help="comma-separated tokens of a prompt"
    )
    prefill.add_argument("--chunk", type=int, help="tokens read at a time")
    prefill.add_argument("--group", type=int, help="query heads a KV head")
    for kernel in (decode, encode, prefill):
        kernel.set_defaults(run=_kernel)


def _kernel(args: argparse.Namespace) -> int:
    import jax

    bench = importlib.import_module(f"jaxgds.bench.{args.bench}")
    try:
        gpu = jax.devices()[0].platform == "gpu"
    except (RuntimeError, AssertionError) as e:  # of a backend that does not start
        raise ValueError(f"JAX has no device to run on: {e or 'see jaxgds doctor'}") from e
    sizes = bench.GPU if gpu else bench.CPU
    names = [field.name for field in dataclasses.fields(sizes)]
    asked = {n: x for n in names if (x := getattr(args, n, None)) is not None}
    run = partial(bench.run, dataclasses.replace(sizes, **asked), args.formats or bench.FORMATS)
    return _measure(args, run, bench)


def _add_quality(commands) -> None:
    quality = commands.add_parser(
        "quality",
        parents=[PLOT],
        help="perplexity and KL of compressed KV caches against bf16",
        description="Reads a text with a small model through each cache, chunk by chunk, and "
        "compares the next-token distributions with those of a bf16 cache. The model code comes "
        "from the repository's examples/: run it from a checkout with the examples extra.",
    )
    quality.add_argument(
        "--model", default="smollm2", choices=("smollm2", "gemma3"), help="default: %(default)s"
    )
    quality.add_argument(
        "--dir", default=".demo", help="where downloads are kept (default: %(default)s)"
    )
    quality.add_argument(
        "--formats", type=_caches, help="comma-separated, such as K4V4 (keys, values) or fp8"
    )
    quality.add_argument(
        "--window",
        type=numbers,
        default="128",
        help="newest tokens in bf16; comma-separated (default: %(default)s)",
    )
    quality.add_argument(
        "--sinks",
        type=numbers,
        default="4",
        help="first tokens in bf16; comma-separated (default: %(default)s)",
    )
    quality.add_argument(
        "--key-offset",
        default="on",
        choices=("on", "off", "both"),
        help="subtract a mean key (default: %(default)s)",
    )
    quality.add_argument("--texts", type=positive(int), help="how many texts are read")
    quality.add_argument("--tokens", type=positive(int), help="of each text")
    quality.add_argument(
        "--chunk",
        type=positive(int),
        default=64,
        help="tokens read at a time (default: %(default)s)",
    )
    quality.set_defaults(run=_quality)


def _quality(args: argparse.Namespace) -> int:
    from jaxgds.bench import quality

    offsets = {"on": (True,), "off": (False,), "both": (True, False)}[args.key_offset]
    settings = quality.Settings(windows=args.window, sinks=args.sinks, key_offset=offsets)
    caches = quality.cases(args.formats or quality.FORMATS, settings)
    name, texts, tokens = quality.MODELS[args.model]
    model, tokens, text = quality.load(
        args.model, args.dir, args.texts or texts, args.tokens or tokens
    )
    found = quality.run(model, tokens, caches, args.chunk) | {"model": name, "text": text}
    return show_bench(args, found, quality)


def _measure(args: argparse.Namespace, run: Callable[..., Any], bench: ModuleType) -> int:
    """Runs a benchmark and shows its result; of one that is cut off, what it has measured.

    The file of --json is written after every case, with "complete": false until the last: of a run
    that is killed it is what is left. SIGTERM (as of `timeout`) and Ctrl-C end a run with 130.
    """
    with stopped_by_sigterm():
        return _measure_and_keep(args, run, bench)


def _measure_and_keep(args: argparse.Namespace, run: Callable[..., Any], bench: ModuleType) -> int:
    found: dict[str, Any] = {}
    file = args.json
    if file == "-" or (file and os.path.lexists(file) and not stat.S_ISREG(os.lstat(file).st_mode)):
        file = None  # stdout, a pipe, a link: not to be replaced; `show` writes it, once

    def keep(so_far: dict[str, Any]) -> None:
        nonlocal found
        found = so_far | {"complete": False}
        if file:
            _write(file, found)

    try:
        found = run(report=say, keep=keep)
    except KeyboardInterrupt:
        say("stopped" if found else "stopped before the first result")
        if not found:
            return 130
    if file:
        _write(file, found)
        args.json = None
    if "complete" in found:
        show(args, found, bench.table)
        return 130
    return show_bench(args, found, bench)


def _write(file: str, found: dict[str, Any]) -> None:
    """The whole file or, if the process is killed here, the one from before."""
    part = f"{file}.part"
    with open(part, "w") as f:
        json.dump(found, f, indent=1)
        f.write("\n")
    os.replace(part, file)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _caches(text: str) -> tuple[str, ...]:
    """Formats of caches; k4v4 is K4V4."""
    return tuple(name if name in ("bf16", "fp8") else name.upper() for name in _words(text))
