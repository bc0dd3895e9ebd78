"""Serve a Llama from a checkpoint: tensor parallel, weights in bf16 or FP8, KV cache in 4 bits.

jaxgds prepare Llama-3.1-8B-Instruct prepared --mesh tp=8 --quantize fp8
python -m examples.serve_llama prepared --prompt "The lighthouse on" --prompt "In 1847"
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

import jaxgds
import pallas_kernels as pk
from examples.generate import generate, prepared
from examples.llama_config import Config
from examples.llama_tp import Llama, abstract_model, make_mesh
from examples.sharded_cache import check_heads


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="checkpoint with its config.json")
    parser.add_argument("--prompt", action="append", default=[], help="text; needs tokenizer.json")
    parser.add_argument(
        "--tokens", type=numbers, action="append", default=[], help="a prompt as numbers: 1,2,3"
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=256, help="prompt tokens read at a time")
    parser.add_argument("--bits", type=int, nargs=2, default=(4, 4), help="of keys and values")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most probable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, help="how many; default all")
    parser.add_argument("--distributed", action="store_true", help="one of several processes")
    parser.add_argument("--executables", type=Path, help="a file that keeps what is compiled")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if not args.prompt and not args.tokens:
        parser.error("nothing to answer: give a --prompt, or --tokens")
    if min(args.new_tokens, args.chunk) < 1:
        parser.error("--new-tokens and --chunk are at least 1")
    for option in ("json", "executables"):
        file = getattr(args, option)
        if file and not file.parent.is_dir():
            parser.error(f"--{option}: there is no directory {file.parent}")
    if args.distributed and args.executables:
        parser.error("--executables is for one process")
    if args.executables:  # one that comes from JAX's own cache cannot be kept again
        jax.config.update("jax_enable_compilation_cache", False)
    if args.distributed:
        try:  # Slurm, Kubernetes, ...
            jax.distributed.initialize(heartbeat_timeout_seconds=30)
        except ValueError as e:
            parser.error(f"--distributed: nothing says which process this is of how many: {e}")
    with jaxgds.fail_together():  # of several processes
        try:  # what is wrong with the options is said before the weights are read
            fmt, mesh = pk.KVFormat(*args.bits), make_mesh(args.devices)
            prompts, tokenizer = read_prompts(args.path, args.tokens, args.prompt)
            how = (prompts, fmt, args.new_tokens, args.chunk)
            model, ready = load_and_compile(
                args.path, mesh, lambda model: prepared(model, *how, args.executables)
            )
        except (OSError, ValueError) as e:
            raise SystemExit(f"{type(e).__name__}: {e}") from e
        start = time.perf_counter()
        drawing = (args.temperature, args.seed, ends(args.path))
        answers = generate(model, *how, *drawing, ready)
        seconds = time.perf_counter() - start
    if jax.process_index() == 0:
        for prompt, answer in zip(prompts, answers, strict=True):
            text = tokenizer.decode(answer) if tokenizer else answer
            print(f"{len(prompt)} tokens -> {text}")
        print(f"{jaxgds.last_report()}; {sum(map(len, answers)) / seconds:.1f} tokens/s")
        if args.json:
            args.json.write_text(json.dumps({"answers": answers, "seconds": seconds}))


def numbers(text: str) -> list[int]:
    return list(map(int, text.split(",")))


def read_prompts(path: Path, tokens: list[list[int]], texts: list[str]) -> tuple[list, Any]:
    """The prompts as numbers; and the tokenizer, where there are texts."""
    vocabulary = Config.of(read_config(path)).vocab
    prompts, tokenizer = list(tokens), None
    if texts:
        from tokenizers import Tokenizer

        if not (file := path / "tokenizer.json").exists():
            raise FileNotFoundError(f"{file} is missing: a --prompt needs it, --tokens do not")
        tokenizer = Tokenizer.from_file(str(file))
        prompts += [tokenizer.encode(text).ids for text in texts]
    for prompt in prompts:
        if not prompt:
            raise ValueError("every prompt needs at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ValueError(f"a prompt has tokens that are none of the model's {vocabulary}")
    return prompts, tokenizer


def read_config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def load(path: Path, mesh: Mesh) -> Llama:
    """The model on the mesh, from `jaxgds prepare`, Orbax, or Hugging Face's safetensors."""
    return load_and_compile(path, mesh, lambda model: None)[0]


def load_and_compile[T](path: Path, mesh: Mesh, compile: Callable[[Llama], T]) -> tuple[Llama, T]:
    """The same, and what `compile` gives for the model without weights, while they are read."""
    config = read_config(path)
    prepared = path / "jaxgds.json"
    fp8 = prepared.exists() and json.loads(prepared.read_text())["quantize"] == "fp8"
    c = Config.of(config, fp8)
    check_heads(c.kv_heads, mesh)
    graph, state = abstract_model(c, mesh)
    shapes = nnx.merge(graph, state)
    weights, compiled = jaxgds.load_and_compile(
        path, nnx.to_pure_dict(state), lambda: compile(shapes)
    )
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state), compiled


def ends(path: Path) -> frozenset[int]:
    """The tokens that end an answer."""
    found = read_config(path).get("eos_token_id")
    return frozenset(found if isinstance(found, list) else () if found is None else (found,))


if __name__ == "__main__":
    main()
