"""The readable GPU room, in a process of its own: the CUDA simulator has to be chosen before anything imports Numba."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from fpnumba.gpu import _device, portable

HERE = Path(__file__).parent
needs_numba_cuda = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed"
)


def run(*command: str, simulator: bool) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1" if simulator else "0"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=HERE.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@needs_numba_cuda
def test_in_the_simulator(capsys: pytest.CaptureFixture[str]) -> None:
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/simulated", simulator=True)
    with capsys.disabled():
        print(f"\ntests/simulated: {done.stdout.strip().splitlines()[-1]}", end=" ")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


@needs_numba_cuda
def test_compiles_for_a_device() -> None:
    """What types and code NVVM makes of the kernels, where it is installed (numba-cuda[cu13]); that needs no GPU."""
    done = run("tests/simulated/compile_all.py", simulator=False)
    if "NVVM is missing" in done.stdout:
        pytest.skip("NVVM is not installed")
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_takes_nothing_along() -> None:
    code = "import sys, fpnumba.gpu.portable; print([m for m in sys.modules if m in ('numba.cuda', 'cupy')])"
    assert run("-c", code, simulator=False).stdout.strip() == "[]"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """As if numba.cuda had never been imported, and be it afterwards."""
    monkeypatch.setattr(_device, "xp", lambda: np)
    monkeypatch.delattr(numba, "cuda", raising=False)
    portable._kernels.cache_clear()
    yield monkeypatch
    portable._kernels.cache_clear()


def test_missing_numba_cuda_is_said(fresh) -> None:
    fresh.setitem(sys.modules, "numba.cuda", None)
    with pytest.raises(ImportError, match=r"pip install 'fpnumba\[cuda13\]'"):
        portable.linear_scan(np.ones((1, 2, 3)), np.ones((1, 2, 3)))


def test_numbas_own_copy_is_not_enough(fresh) -> None:
    fresh.setattr(numba, "cuda", type("module", (), {"implementation": "Built-in"}), raising=False)
    with pytest.raises(ImportError, match=r"pip install 'fpnumba\[cuda13\]'"):
        portable.linear_scan(np.ones((1, 2, 3)), np.ones((1, 2, 3)))


def test_a_numpy_that_numba_cuda_cannot_have_is_said() -> None:
    with (
        pytest.raises(ImportError, match=r"does not work with NumPy .*pip install 'numpy<2.5'"),
        portable._explained(),
    ):
        raise AttributeError("module 'numpy' has no attribute 'row_stack'")
    with pytest.raises(AttributeError, match="of a user"), portable._explained():
        raise AttributeError("of a user's own")
