"""Kernels under the address sanitizer: the tests marked `sanitize`, once more, in a process that loads it first."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import simt

HERE = Path(__file__).parent
ENVIRONMENT = simt.sanitizing()

pytestmark = pytest.mark.skipif(
    ENVIRONMENT is None, reason="no g++ with libasan: kernels run unsanitized only"
)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=ENVIRONMENT, timeout=900)


def test_marked_tests_pass_sanitized() -> None:
    files = [str(p) for p in sorted(HERE.glob("test_gpu_*.py")) if p != Path(__file__)]
    done = python("-m", "pytest", "-q", "-m", "sanitize", "-p", "no:cacheprovider", "-o", "addopts=", *files)
    told = done.stdout[-3000:] + done.stderr[-6000:]
    assert done.returncode == 0, told
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, told
    assert int(passed.group(1)) >= 6, told


@pytest.mark.parametrize(
    ("which", "n", "found"),
    [
        (35, 2 * 128, "heap-buffer-overflow"),
        (35, -1, "heap-buffer-overflow"),
        (25, 4 * 128, "use-after-poison"),
        (36, 0, "signed integer overflow"),
        (27, 0, "misaligned"),
    ],
)
def test_sanitizer_sees(which: int, n: int, found: str) -> None:
    done = python("-c", f"import test_gpu_simt; test_gpu_simt.trial({which}, n={n})")
    assert done.returncode != 0
    assert found in done.stderr
