"""A training script with an Orbax CheckpointManager: one line makes its restores go through jaxgds.

python -m examples.restore_orbax run --steps 20    # trains, saving every 5 steps
python -m examples.restore_orbax run --steps 40    # goes on from step 20
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxgds
import jaxgds.orbax


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.wide = nnx.Linear(64, 512, rngs=rngs)
        self.out = nnx.Linear(512, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.gelu(self.wide(x)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the checkpoints are")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--stock", action="store_true", help="without jaxgds, to compare")
    args = parser.parse_args()

    if not args.stock:
        jaxgds.orbax.install()  # <- the one line

    mesh = Mesh(np.array(jax.devices()), ("model",))
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))
    state = jax.device_put(state, jax.tree.map(lambda x: placed(x, mesh), state))
    step, loss = 0, None
    with ocp.CheckpointManager(args.folder.resolve()) as manager:
        if (latest := manager.latest_step()) is not None:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(latest, args=ocp.args.StandardRestore(target))
            step = latest
            how = "stock Orbax" if args.stock else jaxgds.last_report()
            print(f"step {latest}: {how}")
        while step < args.steps:
            state, loss = train_step(graph, state, *batch(step))
            step += 1
            if step % args.every == 0:
                manager.save(step, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        print(f"step {step}: " + (f"loss {float(loss):.9g}" if loss is not None else "done before"))


def placed(x: jax.Array, mesh: Mesh) -> NamedSharding:
    """The last dimension is split over the devices where it divides."""
    split = x.ndim > 0 and x.shape[-1] % mesh.size == 0
    spec = [None] * (x.ndim - 1) + ["model"] if split else []
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """The data of a step, the same whenever it is asked for."""
    x = np.random.default_rng(step).normal(size=(256, 64)).astype(np.float32)
    return x, np.sin(x[:, :8].sum(1, keepdims=True))


@jax.jit
def train_step(graph: nnx.GraphDef, state: nnx.State, x: jax.Array, y: jax.Array):
    model, optimizer = nnx.merge(graph, state)
    loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
    optimizer.update(model, grads)
    return nnx.state((model, optimizer)), loss


if __name__ == "__main__":
    main()
