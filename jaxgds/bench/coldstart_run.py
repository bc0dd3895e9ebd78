"""One cold start in a fresh process: prints when each part of it was done, as one JSON line.

`python -m jaxgds.bench.coldstart_run LOADER CHECKPOINT CACHE DEVICES PROMPT STARTED`; CACHE is the
directory of JAX's persistent compilation cache ("" for none), PROMPT a number of tokens, STARTED
the monotonic clock when the process was started. The model is that of examples/serve_llama.py.
LOADER "naive" does one thing after the other; "jaxgds" starts the devices while it imports the
rest, and loads while it compiles; "kept" does not trace and compile, but takes the executable that
"jaxgds" left in CACHE.
"""

import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any


KEPT = "step.executable"


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
    import orbax.checkpoint as ocp
    from flax import nnx

    import pallas_kernels as pk
    from examples import serve_llama
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
        if loader == "kept":
            parts, step = ("caches", "executable"), kept(Path(cache) / KEPT, arguments, mesh)
        else:
            parts = ("caches", "trace", "lower", "xla")
            traced = serve_llama.step.trace(*arguments)
            times.append(time.monotonic())
            lowered = traced.lower()
            times.append(time.monotonic())
            step = lowered.compile()
        times.append(time.monotonic())
        return step, caches, {p: b - a for p, (a, b) in zip(parts, pairwise(times), strict=True)}

    if loader == "naive":
        done("build")
        with ocp.StandardCheckpointer() as checkpointer:
            tree = jax.block_until_ready(checkpointer.restore(folder, target))
        done("load")
        step, caches, compiling = compiled()
        done("compile")
    else:
        import jaxgds

        done("build")
        tree, (step, caches, compiling) = jaxgds.load_and_compile(folder, target, compiled)
        done("load_and_compile")
        report = jaxgds.last_report()
        assert report is not None and not report.fallbacks, report
        seconds |= {"load": report.seconds, "compile": sum(compiling.values())}
    nnx.replace_by_pure_dict(state, tree)
    token, _ = step(nnx.merge(graph, state), caches, *rest)
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
        keep(step, file)


def keep(step: Any, file: Path) -> None:
    """Writes an executable, for processes on the same machine with the same code and versions."""
    from jax.experimental.serialize_executable import serialize

    payload, _, results = serialize(step)
    file.write_bytes(pickle.dumps((payload, results)))


def kept(file: Path, arguments: tuple, mesh: Any) -> Any:
    """The executable for `arguments` on the devices of `mesh` that `keep` wrote."""
    import jax
    from jax.experimental.serialize_executable import deserialize_and_load

    import pallas_kernels.mosaic  # noqa: F401  (loads the library that its kernels are linked with)

    payload, results = pickle.loads(file.read_bytes())
    arguments_of = jax.tree.structure((arguments, {}))
    devices = list(mesh.devices.flat)
    return deserialize_and_load(payload, arguments_of, results, execution_devices=devices)


if __name__ == "__main__":
    kind, folder, compiled_in = sys.argv[1:4]
    main(kind, folder, compiled_in, int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6]))
