"""jaxgds doctor's advice: each problem is found by its facts alone, and names a way out."""

import copy

import pytest

from jaxgds.advice import advice


GPU = {"platform": "gpu", "kind": "H100", "bytes_limit": 60 * 10**9, "numa_node": 0}
GOOD = {
    "machine": {"cores": 32, "numa_nodes": 2},
    "devices": [GPU, GPU],
    "gds": {
        "nvidia_driver": True,
        "nvidia_fs": "2.25",
        "kvikio": "26.10",
        "cufile_error": None,
        "p2pdma": False,
        "ready": True,
    },
    "path": {
        "path": "/data/model",
        "mount": "/data",
        "kind": "lustre",
        "direct_io": True,
        "numa_node": None,
    },
    "checkpoint": {
        "nbytes": 10**11,
        "stored_nbytes": 10**11,
        "direct_nbytes": 10**11,
        "aligned_nbytes": 10**11,
        "codecs": {"raw": 9},
    },
}
NO_FS = {"gds.nvidia_fs": None, "gds.ready": False}
CPUS = {"devices": [{"platform": "cpu"}], "gds.nvidia_driver": False}
ZSTD = {"checkpoint.codecs": {"zstd": 9}, "checkpoint.direct_nbytes": 0}


def changed(facts: dict) -> dict:
    found = copy.deepcopy(GOOD)
    for name, value in facts.items():
        *way, last = name.split(".")
        place = found
        for key in way:
            place = place[key]
        place[last] = value
    return found


def test_nothing_to_say():
    assert advice(GOOD) == []
    assert advice(changed({"devices": [{"platform": "cpu"}], "gds.nvidia_driver": False})) == []
    without = {k: v for k, v in GOOD.items() if k not in ("path", "checkpoint")}
    assert advice(without) == []


@pytest.mark.parametrize(
    "facts, problem, way_out",
    [
        ({"devices": [{"platform": "cpu"}]}, "JAX sees no GPU", "pip install"),
        ({"gds.kvikio": None, "gds.ready": False}, "kvikio is not installed", "pip install"),
        (NO_FS, "No nvidia-fs driver", "modprobe nvidia-fs"),
        (
            {**NO_FS, "gds.cufile_error": "/x.json: wrong: correct it"},
            "cuFile does not start with its configuration",
            "/x.json: wrong: correct it",
        ),
        ({"path.kind": "overlay"}, "/data is overlay", "Copy the checkpoint"),
        ({"path.direct_io": False}, "refuses O_DIRECT", "copy them to"),
        (ZSTD, "100% of the checkpoint is compressed", "jaxgds prepare /data/model DST"),
        (ZSTD, "a GPU decodes the chunks that it takes as a whole", "use_compression=False"),
        ({**ZSTD, **CPUS}, "the CPU decodes it at well under", "use_compression=False"),
        ({"checkpoint.aligned_nbytes": 10**10}, "Only 10%", "jaxgds prepare /data/model DST"),
        ({"path.numa_node": 1}, "NUMA node 1, the GPUs are on [0]", "numactl --cpunodebind=1"),
        ({"machine.cores": 4}, "4 cores for 2 GPUs", "16 cores or more"),
        ({"checkpoint.nbytes": 2 * 10**11}, "more than the 120.0 GB", "MEM_FRACTION=0.95"),
    ],
)
def test_each_problem_has_its_text(facts, problem, way_out):
    (text,) = advice(changed(facts))
    assert problem in text and way_out in text


def test_unaligned_data_matter_to_gpudirect_storage_only():
    facts = {**NO_FS, "checkpoint.aligned_nbytes": 0}
    assert not any("4 KiB" in text for text in advice(changed(facts)))
