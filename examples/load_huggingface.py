"""A directory of Hugging Face safetensors onto a mesh, into an nnx.State.

python -m examples.load_huggingface Llama-3.1-8B --devices 8

Every tensor is read once, straight into the shards that the rules in configs/rules ask for.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

import jaxgds
from examples.llama_config import Config
from examples.llama_tp import Llama, abstract_model, make_mesh


def load(path: Path, mesh: Mesh, prefix: str = "") -> Llama:
    """The model with its weights; of tensors, those whose names begin with `prefix`.

    Names in the files are those of the model's attributes; a model of your own with other names
    needs another `rename`, from the name in the file to the path of the nnx.Variable.
    """

    def rename(name: str) -> str | None:
        return name.removeprefix(prefix) if name.startswith(prefix) else None

    config = Config.of(json.loads((path / "config.json").read_text()))
    graph, target = abstract_model(config, mesh)
    return nnx.merge(graph, jaxgds.load(path, target, rename=rename))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="directory with config.json and *.safetensors")
    parser.add_argument("--devices", type=int, help="how many; default all")
    parser.add_argument("--prefix", default="", help="what the names in the files begin with")
    args = parser.parse_args()
    try:
        model = load(args.path, make_mesh(args.devices), args.prefix)
    except (OSError, ValueError) as e:  # a wrong path or option, or a damaged file
        raise SystemExit(f"{type(e).__name__}: {e}") from e
    print(jaxgds.last_report())
    held, split = Counter(), Counter()
    for x in jax.tree.leaves(nnx.state(model)):
        split[str(x.sharding.spec)] += 1
        for shard in x.addressable_shards:
            held[str(shard.device)] += shard.data.nbytes
    for spec, count in split.items():
        print(f"{count} arrays as {spec}")
    for device, nbytes in held.items():
        print(f"{device} holds {nbytes:,} bytes")


if __name__ == "__main__":
    main()
