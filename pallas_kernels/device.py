"""Which GPU an array is on, or will be."""

import jax
from jax.core import Tracer
from jaxtyping import Array


def of(x: Array) -> jax.Device:
    """The device that holds `x`; if it is traced, the one that jit uses where nothing else is said.

    Of several devices the first: they are taken to be of one kind.
    """
    if not isinstance(x, Tracer):
        return min(x.devices(), key=lambda device: device.id)
    default = jax.config.jax_default_device
    if isinstance(default, str):
        return jax.devices(default)[0]
    return default or jax.local_devices()[0]


def traced(*trees: object) -> bool:
    """Whether any array in these is: where it will run is then certain only once it is lowered."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(trees))


def compute_capability(x: Array) -> str | None:
    """The compute capability of the GPU of `x`, such as "9.0"; None where that is no NVIDIA GPU."""
    device = of(x)
    return getattr(device, "compute_capability", None) if device.platform == "gpu" else None
