"""Compile kernels for a GPU that is not here: python compile_for.py TARGET OUT CASES.

TARGET: a GpuTargetConfig in text form. OUT: an existing directory for the dumps. CASES: JSON, a
list of {"kernel": a function of this module, its parameters after the architecture...}; each leaves
its dumps in OUT/<its index>, and beside them how many kernels a call launches (`launches`) and how
many arrays of packed codes it copies (`copies`). A kernel that a case before has compiled leaves
no dumps again. One process per target: jax's compile cache does not know the target.
"""

import json
import os
import re
import sys
from functools import partial
from pathlib import Path
from unittest import mock


def decode(
    architecture: str,
    key_bits: int,
    value_bits: int,
    head_dim: int,
    group: int,
    page_size: int = 64,
    sliding_window: int | None = None,
):
    """What is compiled, and its arguments (arrays or their shapes and dtypes)."""
    import jax
    import jax.numpy as jnp

    import pallas_kernels as pk
    from pallas_kernels import mosaic

    fmt = pk.KVFormat(key_bits, value_bits, page_size=page_size)
    cache = jax.eval_shape(lambda: pk.KVCache.create(fmt, 8, 4096, 8, head_dim))
    q = jax.ShapeDtypeStruct((8, 8 * group, head_dim), jnp.bfloat16)
    # What caps scores and what ends a window is compiled together.
    soft_cap = None if sliding_window is None else 30.0
    options = dict(soft_cap=soft_cap, sliding_window=sliding_window)
    return partial(mosaic.decode_attention, architecture=architecture, **options), (q, cache)


def prefill(
    architecture: str,
    key_bits: int,
    value_bits: int,
    head_dim: int,
    group: int,
    page_size: int,
    sliding_window: int | None = None,
):
    """Of two chunks of 1,024 tokens, appended to a cache that is given away."""
    del architecture  # that of the device
    import jax
    import jax.numpy as jnp

    import pallas_kernels as pk

    fmt = pk.KVFormat(key_bits, value_bits, page_size=page_size)
    cache = jax.eval_shape(lambda: pk.KVCache.create(fmt, 2, 8192, 8, head_dim))
    q = jax.ShapeDtypeStruct((2, 1024, 8 * group, head_dim), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, 1024, 8, head_dim), jnp.bfloat16)
    attend = partial(pk.attend, implementation="mosaic_gpu", sliding_window=sliding_window)

    def chunks(q, k, v, cache):
        out, cache = attend(q, k, v, cache)
        return attend(out, k, v, cache)

    return jax.jit(chunks, donate_argnums=3), (q, kv, kv, cache)


def encode(
    architecture: str, key_bits: int, value_bits: int, head_dim: int, page_size: int, new: int
):
    """An append to a cache that is given away."""
    del architecture  # one kernel is for all
    import jax
    import jax.numpy as jnp

    import pallas_kernels as pk
    from pallas_kernels.mosaic.encode import append

    fmt = pk.KVFormat(key_bits, value_bits, page_size=page_size)
    cache = jax.eval_shape(lambda: pk.KVCache.create(fmt, 2, 32768, 8, head_dim))
    # float32 where it is not usual, so that this compiles too
    dtype = jnp.bfloat16 if head_dim == 128 else jnp.float32
    new_tokens = jax.ShapeDtypeStruct((2, new, 8, head_dim), dtype)
    count = jax.ShapeDtypeStruct((2,), jnp.int32)
    return jax.jit(append, donate_argnums=0), (cache, new_tokens, new_tokens, count)


KERNELS = {"decode": decode, "encode": encode, "prefill": prefill}
ARCHITECTURES = {9: "hopper", 10: "blackwell"}


def compile_case(target: str, out: Path, kernel: str, **parameters) -> None:
    import jax
    from jax.experimental import topologies
    from jax.experimental.mosaic.gpu import utils
    from jax.sharding import NamedSharding, PartitionSpec

    from pallas_kernels import device

    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    here = NamedSharding(mesh, PartitionSpec())
    capability = mesh.devices.flat[0].compute_capability
    arch = tuple(int(part) for part in capability.split("."))
    function, arguments = KERNELS[kernel](ARCHITECTURES[arch[0]], **parameters)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments
    )
    # Without a GPU jax takes every target for (9, 0).
    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        mock.patch.object(utils, "_infer_arch", lambda: arch),
        mock.patch.object(device, "compute_capability", lambda x: capability),
    ):
        # What is compiled already says what it is given.
        function = function if hasattr(function, "lower") else jax.jit(function)
        compiled = function.lower(*arguments).compile()
    entry = str(compiled.as_text()).partition("\nENTRY ")[2]
    (out / "copies").write_text(str(len(re.findall(r" = u8\S* copy\(", entry))))
    (out / "launches").write_text(str(len(re.findall(r" (?:fusion|custom-call|copy)\(", entry))))


if __name__ == "__main__":
    target, out, cases = Path(sys.argv[1]).read_text(), Path(sys.argv[2]), json.loads(sys.argv[3])
    sys.path.insert(0, str(Path(__file__).parents[3]))
    for i, case in enumerate(cases):
        (out / str(i)).mkdir()
        os.environ["MOSAIC_GPU_DUMP_TO"] = str(out / str(i))
        compile_case(target, out / str(i), **case)
