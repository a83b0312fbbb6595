"""What is installed is what stands in the tree: a new subpackage that pyproject forgets must not pass."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOMES = {"fpnumba": ROOT / "fpnumba", "fpnumba/gpu": ROOT / "gpu", "fpnumba/reference": ROOT / "reference"}
SHIPPED = {".py", ".cu", ".cuh"}


def expected_files() -> set[str]:
    """Every source file of the tree under the name by which it should be installed."""
    names = {"fpnumba/py.typed"}
    for home, folder in HOMES.items():
        for file in folder.rglob("*"):
            if file.is_file() and file.suffix in SHIPPED:
                names.add(f"{home}/{file.relative_to(folder).as_posix()}")
    return names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel here needs setuptools >= 77")
    source = tmp_path_factory.mktemp("source")
    out = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools leaves a build/ folder whose stale files would hide a mistake.
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("fpnumba", "gpu", "reference"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                target = source / folder / file.relative_to(ROOT / folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run(
        [*command, "-w", str(out), str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == expected_files()


def test_version_is_stated_once() -> None:
    import fpnumba

    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    assert fpnumba.__version__ == project["version"]
    assert f"version: {project['version']}" in (ROOT / "CITATION.cff").read_text()


def test_import_is_quiet_and_compiles_nothing() -> None:
    """`import fpnumba` loads no room, no compiler and no optional package, and warns about nothing."""
    code = (
        "import sys, fpnumba\n"
        "heavy = {'numba', 'llvmlite', 'matplotlib', 'tqdm', 'safetensors', 'jax', 'torch', 'cupy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
