"""Weights of `llama.Llama` in FP8, as `jaxgds prepare --quantize fp8` stores them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxgds.rules import Rule, Rules


def rules(target: nnx.State) -> Rules:
    """The shardings of a restore target as rules; kernels [in, out] may be quantised."""
    found = []
    for path, param in nnx.to_flat_state(target):
        spec = tuple((axis,) if axis else () for axis in param.get_value().sharding.spec)
        contract = 0 if path[-1] == "kernel" else None
        found.append(Rule((".".join(map(str, path)),), spec, contract))
    return Rules("the model's shardings", tuple(found))


def quantised(target: nnx.State) -> nnx.State:
    """The restore target of a model whose kernels are FP8, each with a `kernel_scale` [1, out]."""
    params = {}
    for path, param in nnx.to_flat_state(target):
        params[path] = param
        if path[-1] == "kernel":
            x = param.get_value()
            mesh, spec = x.sharding.mesh, PartitionSpec(None, *x.sharding.spec[1:])
            scale = jax.ShapeDtypeStruct(
                (1, x.shape[1]), jnp.float32, sharding=NamedSharding(mesh, spec)
            )
            params[path] = param.replace(x.update(dtype=jnp.float8_e4m3fn))
            params[(*path[:-1], "kernel_scale")] = param.replace(scale)
    return nnx.from_flat_state(params)


def dequantised(state: nnx.State) -> nnx.State:
    """The state of a plain bf16 model, from one like `quantised`."""
    params = dict(nnx.to_flat_state(state))
    for path in [path for path in params if path[-1] == "kernel"]:
        scale = params.pop((*path[:-1], "kernel_scale"))[...]
        kernel = params[path][...].astype(jnp.float32) * scale
        params[path] = params[path].replace(kernel.astype(jnp.bfloat16))
    return nnx.from_flat_state(params)
