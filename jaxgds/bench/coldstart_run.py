"""One cold start in a fresh process: prints when each part of it was done, as one JSON line.

`python -m jaxgds.bench.coldstart_run LOADER CHECKPOINT CACHE DEVICES PROMPT STARTED`; CACHE is the
directory of JAX's persistent compilation cache ("" for none), PROMPT a number of tokens, STARTED
the monotonic clock when the process was started. The model is that of examples/serve_llama.py.
LOADER "naive" does one thing after the other, and a step is one program; "jaxgds" starts the
devices while it imports the rest, and loads while it compiles one program for all layers; "kept"
does not trace and compile, but takes the executables that "jaxgds" left in CACHE.
"""

import importlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any


KEPT = "step.executables"


def main(loader: str, path: str, cache: str, devices: int, prompt: int, started: float) -> None:
    seconds: dict[str, float] = {}
    last = started

    def done(name: str) -> None:
        nonlocal last
        now = time.monotonic()
        seconds[name], last = now - last, now

    import json

    import jax
    import numpy as np

    def start_devices() -> None:
        jax.block_until_ready([jax.device_put(np.zeros(8), d) for d in jax.devices()[:devices]])

    pool = ThreadPoolExecutor(1)
    starting = pool.submit(start_devices) if loader != "naive" else None
    ocp: Any = importlib.import_module("orbax.checkpoint") if loader == "naive" else None
    from flax import nnx

    import pallas_kernels as pk
    from examples import executables, llama_step
    from examples.llama_config import Config
    from examples.llama_tp import abstract_model, make_mesh
    from examples.sharded_cache import make_caches

    done("imports")
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    start_devices() if starting is None else starting.result()
    done("jax_init")

    folder = Path(path)
    config = json.loads((folder / "config.json").read_text())
    fp8 = json.loads((folder / "jaxgds.json").read_text())["quantize"] == "fp8"
    c = Config.of(config, fp8)
    mesh = make_mesh(devices)
    graph, state = abstract_model(c, mesh)
    target = nnx.to_pure_dict(state)
    tokens = np.arange(prompt, dtype=np.int32)[None] % c.vocab
    rest = (tokens, np.array([prompt], np.int32), np.float32(0), np.zeros(2, np.int32))

    def compiled() -> tuple[Any, Any, dict[str, float]]:
        times = [time.monotonic()]
        caches = make_caches(c.layers, mesh, pk.KVFormat(), 1, prompt + 64, c.kv_heads, c.head_dim)
        times.append(time.monotonic())
        arguments = (nnx.merge(graph, state), caches, *rest)
        parts = ("caches", "lower", "xla")
        if loader == "naive":
            lowered = llama_step.step.lower(*arguments)
            times.append(time.monotonic())
            programs = lowered.compile()
        elif loader == "jaxgds":
            lowered = llama_step.lowered(llama_step.arguments(*arguments))
            times.append(time.monotonic())
            programs = llama_step.compiled(lowered)
        else:
            parts = ("caches", "executables")
            given = llama_step.arguments(*arguments)
            kept = executables.load(Path(cache) / KEPT, given, mesh)
            assert kept is not None, "they are for other code"
            programs = llama_step.Programs(*kept)
        times.append(time.monotonic())
        took = {p: b - a for p, (a, b) in zip(parts, pairwise(times), strict=True)}
        return programs, caches, took

    if loader == "naive":
        done("build")
        with ocp.StandardCheckpointer() as checkpointer:
            tree = jax.block_until_ready(checkpointer.restore(folder, target))
        done("load")
        programs, caches, compiling = compiled()
        done("compile")
    else:
        import jaxgds

        done("build")
        tree, (programs, caches, compiling) = jaxgds.load_and_compile(folder, target, compiled)
        done("load_and_compile")
        report = jaxgds.last_report()
        assert report is not None and not report.fallbacks, report
        seconds |= {"load": report.seconds, "compile": sum(compiling.values())}
    nnx.replace_by_pure_dict(state, tree)
    arguments = (nnx.merge(graph, state), caches, *rest)
    if loader == "naive":
        token, _ = programs(*arguments)
    else:
        token, _ = llama_step.step_by_layers(*arguments, programs)
    token = int(token[0])
    done("prefill")
    found = {
        "seconds": seconds,
        "compile_seconds": compiling,
        "total": last - started,
        "token": token,
        "weight_bytes": sum(x.nbytes for x in jax.tree.leaves(tree)),
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(found))
    file = Path(cache) / KEPT
    if cache and loader == "jaxgds" and not file.exists():  # else it may come from the cache itself
        executables.save(file, programs, llama_step.arguments(*arguments), mesh)


if __name__ == "__main__":
    kind, folder, compiled_in = sys.argv[1:4]
    main(kind, folder, compiled_in, int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6]))
