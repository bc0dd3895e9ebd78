"""Eight host devices, so that meshes are real on a machine without a GPU; and Ctrl-C."""

import os
import signal


if "JAX_PLATFORMS" not in os.environ and not os.path.exists("/dev/nvidiactl"):
    os.environ["JAX_PLATFORMS"] = "cpu"
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
# A shell has its background processes ignore it, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
