"""From a checkpoint to generated text: restore with jaxgds, then serve with a packed KV cache.

python -m examples.demo
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh
from tokenizers import Tokenizer
from tqdm import tqdm

import jaxgds
import jaxgds.orbax
import pallas_kernels as pk
from examples import download, fp8, llama, perplexity, restore, smollm2
from jaxgds import check, jobs, prepare, rules


K4V4 = pk.KVFormat(key_bits=4, value_bits=4)
QUALITY: dict[str, llama.Format] = {
    "bf16": "bf16",
    "fp8": "fp8",
    "k4v4": K4V4,
    "k4v3": pk.KVFormat(key_bits=4, value_bits=3),
    "k3v3": pk.KVFormat(key_bits=3, value_bits=3),
}
CHECKPOINTS = {"zstd": "checkpoint", "raw": "checkpoint-raw", "fp8": "checkpoint-fp8"}
LOADERS = ("orbax", "jaxgds")
PASSAGE = Path(__file__).with_name("lighthouse.txt")
QUESTIONS = ("When was the lighthouse built, and by whom?", "Summarise the text.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(".demo"))
    parser.add_argument("--repeats", type=int, default=3, help="of each restore")
    parser.add_argument("--new-tokens", type=int, default=80)
    parser.add_argument("--windows", type=int, default=2, help="of the perplexity text")
    parser.add_argument("--window", type=int, default=2048, help="tokens in each")
    parser.add_argument("--chunk", type=int, default=64, help="tokens read at a time")
    args = parser.parse_args()
    start = time.perf_counter()
    restore.use_two_cpu_devices()
    # The restores are processes beside this one: none of them may take a whole GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    folder = args.folder.resolve()
    home = folder / "smollm2"

    step(1, "Save SmolLM2-135M-Instruct with Orbax, and prepare it for all devices, also in FP8")
    prose = download.fetch(download.PROSE, folder)
    reader = smollm2.open_gguf(download.fetch(download.MODEL, folder))
    tokenizer = smollm2.read_tokenizer(reader)
    saved = save(reader, home)

    step(2, "Restore it, each time in a fresh process and with the files out of the page cache")
    runs = {(c, by): [] for c in CHECKPOINTS for by in LOADERS}
    for _ in range(args.repeats):
        for (checkpoint, loader), results in runs.items():
            results.append(restore_once(home, checkpoint, loader))
    wanted = {"zstd": saved, "raw": saved, "fp8": runs["fp8", "orbax"][0]["sha256"]}
    identical = all(r["sha256"] == wanted[c] for (c, _), results in runs.items() for r in results)
    if not identical:
        raise SystemExit("The restored weights are not those that were saved.")
    restored = {key: median_run(results) for key, results in runs.items()}
    show_restores(restored, args.repeats)
    print(
        f"All {len(saved)} arrays are bit-identical to what was saved, in every restore; in FP8, "
        "to what Orbax restores."
    )

    step(3, "Answer two questions about a text, with a bf16 and with a 4-bit KV cache")
    with jaxgds.orbax.installed():
        model = load(home, "zstd")
    print(f"The text is {PASSAGE.name}.")
    bf16, k4v4 = (answer(model, tokenizer, fmt, args.new_tokens) for fmt in ("bf16", K4V4))
    ratio = bf16.bytes_per_token / k4v4.bytes_per_token
    print(
        f"A token takes {bf16.bytes_per_token:,} bytes of cache in bf16 and "
        f"{k4v4.bytes_per_token:,} packed: {ratio:.2f} times less.\n"
        f"The newest {K4V4.window} tokens and the first {K4V4.sinks} of each sequence stay bf16.\n"
        "The answers only illustrate: the questions were picked among others because so small a\n"
        "model answers them, and greedy answers part at the first near-tie. Step 4 measures."
    )

    step(4, "Perplexity of news prose, read through each cache")
    articles = (line.strip() for line in prose.read_text().splitlines())
    tokens = tokenizer.encode("\n\n".join(articles)).ids
    tokens = np.array(tokens[: args.windows * args.window], np.int32).reshape(args.windows, -1)
    quality = perplexity.compare(model, tokens, QUALITY, args.chunk)
    show_quality(quality, tokens.shape, args.chunk)
    del model
    with jaxgds.orbax.installed():
        model = load(home, "fp8")
    weights = perplexity.compare(model, tokens, {"bf16": "bf16"}, args.chunk)["bf16"].perplexity
    delta = weights / quality["bf16"].perplexity - 1
    print(f"With the weights from FP8 and a bf16 cache: {weights:.3f} ({delta:+.2%}).")

    result = {
        "restore_seconds": {by: restored["zstd", by]["seconds"] for by in LOADERS},
        "peak_host_bytes": {by: restored["zstd", by]["peak_host_bytes"] for by in LOADERS},
        "restore_seconds_raw": {by: restored["raw", by]["seconds"] for by in LOADERS},
        "peak_host_bytes_raw": {by: restored["raw", by]["peak_host_bytes"] for by in LOADERS},
        "restore_seconds_fp8": {by: restored["fp8", by]["seconds"] for by in LOADERS},
        "peak_host_bytes_fp8": {by: restored["fp8", by]["peak_host_bytes"] for by in LOADERS},
        "restore_seconds_of_all_runs": {
            f"{c}-{by}": result["all_seconds"] for (c, by), result in restored.items()
        },
        "weight_bytes": restored["zstd", "jaxgds"]["weight_bytes"],
        "bit_identical": identical,
        "report": restored["zstd", "jaxgds"]["report"],
        "weight_bytes_fp8": restored["fp8", "jaxgds"]["weight_bytes"],
        "report_raw": restored["raw", "jaxgds"]["report"],
        "report_fp8": restored["fp8", "jaxgds"]["report"],
        "text": {"bf16": bf16.text, "k4v4": k4v4.text},
        "tokens_per_second": {"bf16": bf16.tokens_per_second, "k4v4": k4v4.tokens_per_second},
        "compile_seconds": {"bf16": bf16.compile_seconds, "k4v4": k4v4.compile_seconds},
        "kv_bytes_per_token": {"bf16": bf16.bytes_per_token, "k4v4": k4v4.bytes_per_token},
        "kv_ratio": ratio,
        "perplexity": {name: q.perplexity for name, q in quality.items()},
        "perplexity_fp8_weights": weights,
        "kl": {name: q.kl for name, q in quality.items()},
        "perplexity_text": {
            "source": f"{download.PROSE.member} in {download.PROSE.package} 4.4.0",
            "windows": args.windows,
            "window": args.window,
            "chunk": args.chunk,
        },
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jaxgds", "jax", "flax", "orbax-checkpoint")
        },
        "seconds": time.perf_counter() - start,
    }
    (folder / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nDone in {result['seconds']:.0f} s; the numbers are in {args.folder}/demo.json")


# 1. Save


def save(reader, home: Path) -> dict[str, str]:
    """Write config.json and the checkpoints; returns the arrays' hashes."""
    config = smollm2.read_config(reader)
    _, target = llama.abstract_model(config, Mesh(jax.devices(), ("model",)))
    target, state = nnx.to_flat_state(target), {}
    weights = smollm2.read_weights(reader, config)
    for path, x in tqdm(weights, "convert", len(reader.tensors), unit="array", disable=None):
        param = dict(target)[path]
        state[path] = param.replace(jax.device_put(x, param.get_value().sharding))
    state = nnx.from_flat_state(state)
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    with waiting("save"), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(home / CHECKPOINTS["zstd"], state, force=True)
    make(home)
    kinds = {"zstd": "by Orbax, zstd", "raw": "prepared", "fp8": "prepared, FP8"}
    for name, kind in kinds.items():
        files = [f for f in (home / CHECKPOINTS[name]).rglob("*") if f.is_file()]
        size = sum(f.stat().st_size for f in files)
        print(f"{CHECKPOINTS[name]}: {size / 1e6:.0f} MB ({kind}), {len(files)} files")
    return restore.hashes(state)


def make(home: Path) -> None:
    """What `jaxgds prepare` does: a shard a chunk for the mesh of all devices, as is and in FP8."""
    config = llama.Config(**json.loads((home / "config.json").read_text()))
    _, target = llama.abstract_model(config, Mesh(jax.devices(), ("model",)))
    mesh = rules.Mesh({"model": jax.device_count()})
    methods: dict[str, jobs.Method | None] = {"raw": None, "fp8": "fp8"}
    for name, method in methods.items():
        path = home / CHECKPOINTS[name]
        shutil.rmtree(path, ignore_errors=True)
        source = home / CHECKPOINTS["zstd"]
        prepare.prepare(source, path, mesh=mesh, rules=fp8.rules(target), method=method)
        if problems := check.check(path)["problems"]:
            raise SystemExit("\n".join(problems))


# 2. Restore


def restore_once(home: Path, checkpoint: str, loader: str) -> dict:
    """Run restore.py in a process of its own and return what it measured."""
    name = CHECKPOINTS[checkpoint]
    evict(home / name)
    out = home / f"{name}-{loader}.json"
    command = [sys.executable, "-m", "examples.restore", str(home), "--checkpoint", name]
    with waiting(f"restore {name} with {loader}"):
        subprocess.run(
            [*command, "--loader", loader, "--json", str(out)],
            check=True,
            cwd=Path(__file__).parents[1],
            stdout=subprocess.DEVNULL,
        )
    return json.loads(out.read_text())


def evict(folder: Path) -> None:
    """Ask the kernel to drop the files from its page cache, so that they are read from disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def median_run(results: list[dict]) -> dict:
    """The run of median time, with the times of all."""
    ordered = sorted(results, key=lambda result: result["seconds"])
    return ordered[len(ordered) // 2] | {"all_seconds": [r["seconds"] for r in results]}


def show_restores(restored: dict[tuple[str, str], dict], repeats: int) -> None:
    print(f"{'checkpoint':<12}{'restored by':<13}{'seconds':>8}{'GB/s':>7}{'peak host memory':>19}")
    for (checkpoint, loader), r in restored.items():
        speed = r["weight_bytes"] / r["seconds"] / 1e9
        peak = f"+{r['peak_host_bytes'] / 1e6:.0f} MB"
        print(f"{checkpoint:<12}{loader:<13}{r['seconds']:>8.2f}{speed:>7.2f}{peak:>19}")
    weights, quantised = (restored[c, "jaxgds"]["weight_bytes"] for c in ("zstd", "fp8"))
    print(
        f"Median of {repeats} processes each. GB/s counts the {weights / 1e6:.0f} MB of weights "
        f"({quantised / 1e6:.0f} MB in FP8).\nPeak host memory is what the process grew by during "
        "the restore; on CPU devices the restored weights\nare part of it."
    )
    for checkpoint in CHECKPOINTS:
        print(f"jaxgds on {checkpoint}: {summary(restored[checkpoint, 'jaxgds']['report'])}")


def summary(report: dict) -> str:
    """The part of `jaxgds.last_report().to_dict()` that a person asks for first."""
    return (
        f"path {report['path']}, {report['arrays']} arrays, "
        f"{report['bytes_read'] / 1e6:.0f} MB read, {len(report['fallbacks'])} left to Orbax"
    )


def load(home: Path, checkpoint: str) -> llama.Llama:
    """The model on the first device: it is small, and its 3 key-value heads do not split."""
    config = llama.Config(**json.loads((home / "config.json").read_text()))
    graph, target = llama.abstract_model(config, Mesh(jax.devices()[:1], ("model",)))
    if checkpoint == "fp8":
        target = fp8.quantised(target)
    state = ocp.StandardCheckpointer().restore(home / CHECKPOINTS[checkpoint], target)
    if report := jaxgds.last_report():
        print(f"Restored onto one device: {summary(report.to_dict())}")
    if checkpoint == "fp8":
        state = fp8.dequantised(state)
    return nnx.merge(graph, jax.device_put(state, jax.devices()[0]))


# 3. Chat


@dataclasses.dataclass(frozen=True)
class Chat:
    text: str
    tokens_per_second: float
    compile_seconds: float
    bytes_per_token: int


def answer(model: llama.Llama, tokenizer: Tokenizer, fmt: llama.Format, new_tokens: int) -> Chat:
    """Answer the questions as one batch; prints the texts and returns what it measured."""
    passage = PASSAGE.read_text()
    prompts = [tokenizer.encode(smollm2.chat(f"{passage}\n{q}")).ids for q in QUESTIONS]
    longest = max(map(len, prompts))

    def caches():
        made = llama.make_caches(model.config, fmt, len(prompts), longest + new_tokens)
        return jax.device_put(made, jax.devices()[0])

    name = fmt if isinstance(fmt, str) else f"K{fmt.key_bits}V{fmt.value_bits}"
    begin = time.perf_counter()
    list(llama.generate(model, prompts, caches(), 2))  # compiles
    first = time.perf_counter() - begin
    answers, times = [[] for _ in prompts], []
    steps = llama.generate(model, prompts, caches(), new_tokens)
    total = longest - min(map(len, prompts)) + new_tokens
    for tokens in tqdm(steps, name, total, unit="token", leave=False, disable=None):
        times.append(time.perf_counter())
        for all_tokens, token in zip(answers, tokens, strict=True):
            if token is not None:
                all_tokens.append(token)
    per_second = len(prompts) * (len(times) - 1) / (times[-1] - times[0])
    texts = []
    for tokens in answers:
        texts.append(tokenizer.decode(tokens, skip_special_tokens=False).split(smollm2.END)[0])
    print(f"\n[{name}] {per_second:.1f} tokens/s after a first call of {first:.1f} s")
    print(f"Prompts of {' and '.join(str(len(p)) for p in prompts)} tokens.")
    for question, text in zip(QUESTIONS, texts, strict=True):
        print(f"  Q: {question}\n  A: {text}")
    per_token = sum(round(cache.bytes_per_token) for cache in caches())
    return Chat("\n\n".join(texts), per_second, first, per_token)


# 4. Perplexity


def show_quality(quality: dict[str, perplexity.Quality], shape: tuple, chunk: int) -> None:
    print(f"{'cache':<8}{'perplexity':>11}{'delta':>9}{'KL(bf16||cache)':>18}")
    for name, q in quality.items():
        delta = q.perplexity / quality["bf16"].perplexity - 1
        print(f"{name:<8}{q.perplexity:>11.3f}{delta:>9.2%}{q.kl:>18.5f}")
    print(
        f"{shape[0]} windows of {shape[1]} tokens in chunks of {chunk}, of "
        f"{Path(download.PROSE.member).name} from {download.PROSE.package} "
        f"{download.PROSE.version}\n(the Lee background corpus of news articles)."
    )


# Output


def step(number: int, title: str) -> None:
    print(f"\n{number}. {title}", flush=True)


@contextmanager
def waiting(label: str):
    """Show on a terminal that one long call is running, and for how long."""
    done = threading.Event()

    def tick():
        with tqdm(desc=label, bar_format="{desc} {elapsed}", leave=False, disable=None) as bar:
            while not done.wait(0.2):
                bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
