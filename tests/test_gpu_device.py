"""What only a device can show: sizes, streams, repeatability, and what the sanitizers say."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gpu_machine
import pytest

from fpnumba.gpu import scan, solve

pytestmark = pytest.mark.gpu
if gpu_machine.has_device():
    import cupy


def problem(batch: int, steps: int, dim: int, rank: int, dtype: Any) -> dict[str, Any]:
    """A Householder problem, drawn on the device and in its own dtype."""
    rng = cupy.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return rng.random(shape, dtype=cupy.float32)

    u = draw(batch, steps, rank, dim) - 0.5
    u /= cupy.sqrt((u * u).sum(axis=-1, keepdims=True))
    found = {
        "lam": draw(batch, steps, dim) * 0.9 + 0.05,
        "u": u,
        "alpha": (draw(batch, steps, rank) * 0.9 + 0.05) / rank,
        "x": draw(batch, steps, dim) - 0.5,
        "hbar": draw(batch, steps, dim) - 0.5,
    }
    return {k: a.astype(dtype) for k, a in found.items()}


def everything(p: dict[str, Any], method: str) -> list[Any]:
    """Value and gradient, and the scan."""
    params = (p["u"], p["alpha"])
    h = solve.solve("householder", params, p["lam"], None, p["x"], None, None, method=method).value
    solved, bars = solve.rnn_pullback(
        "householder", params, p["lam"], None, p["x"], None, h, p["hbar"], None, method=method
    )
    return [h, solved.value, bars[0], bars[2], bars[3], *bars[4], scan.linear_scan(p["lam"], p["x"])]


@pytest.mark.parametrize("method", ["direct", "sequential"])
@pytest.mark.parametrize("shape", [(3, 900, 520, 1), (40, 300, 256, 3)])
def test_twenty_runs_are_equal_bit_for_bit(shape: tuple[int, int, int, int], method: str) -> None:
    p = problem(*shape, cupy.float32)
    first = everything(p, method)
    for _ in range(19):
        for a, b in zip(first, everything(p, method), strict=True):
            assert bool((a == b).all())


def test_two_streams_at_once() -> None:
    p, q = problem(4, 3000, 512, 1, cupy.float32), problem(60, 400, 256, 2, cupy.float32)
    alone = everything(p, "direct"), everything(q, "sequential")
    cupy.cuda.Device().synchronize()
    streams = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    for _ in range(10):
        with streams[0]:
            one = everything(p, "direct")
        with streams[1]:
            two = everything(q, "sequential")
        for stream in streams:
            stream.synchronize()
        for found, right in zip((one, two), alone, strict=True):
            for a, b in zip(found, right, strict=True):
                assert bool((a == b).all())


def test_a_thread_of_its_own() -> None:
    p = problem(4, 300, 64, 1, cupy.float32)
    here = everything(
        p, "direct"
    )  # compiled, and memory in the pool: the thread need not ask the runtime for anything
    cupy.cuda.Device().synchronize()
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(everything, p, "direct").result()
    for a, b in zip(here, there, strict=True):
        assert bool((a == b).all())


def test_more_than_two_to_the_31_elements() -> None:
    batch, steps, dim = 2, 2**20 + 5, 1024
    if cupy.cuda.runtime.memGetInfo()[0] < 40e9:
        pytest.skip("needs 40 GB of device memory")
    rng = cupy.random.default_rng(0)
    shape = (batch, steps, dim)
    lam, x = cupy.empty(shape, cupy.float16), cupy.empty(shape, cupy.float16)
    u, alpha = (
        cupy.empty((batch, steps, 1, dim), cupy.float16),
        cupy.full((batch, steps, 1), 0.7, cupy.float16),
    )
    for b in range(batch):
        for begin in range(0, steps, 2**17):
            part = slice(begin, min(begin + 2**17, steps))
            size = (part.stop - begin, dim)
            lam[b, part] = rng.random(size, dtype=cupy.float32) * 0.9 + 0.05
            x[b, part] = rng.random(size, dtype=cupy.float32) - 0.5
            u[b, part, 0] = (rng.random(size, dtype=cupy.float32) - 0.5) / (dim / 12) ** 0.5
    assert lam.size > 2**31
    tail = slice(steps - 64, steps)

    def end(a: Any) -> Any:
        return cupy.ascontiguousarray(a[:, tail])

    h = solve.solve("householder", (u, alpha), lam, None, x, None, None, method="direct").value
    again = solve.solve(
        "householder",
        (end(u), end(alpha)),
        end(lam),
        None,
        end(x),
        h[:, tail.start - 1].copy(),
        None,
        method="direct",
    ).value
    assert float(cupy.abs(end(h).astype(cupy.float32) - again.astype(cupy.float32)).max()) <= 2e-3
    s = scan.linear_scan(lam, x)
    part = scan.linear_scan(end(lam), end(x), s[:, tail.start - 1].copy())
    assert float(cupy.abs(end(s).astype(cupy.float32) - part.astype(cupy.float32)).max()) <= 4e-3
    del h, s, lam, x, u
    cupy.get_default_memory_pool().free_all_blocks()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_sanitizers_are_content(tool: str) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("no compute-sanitizer")
    small = Path(__file__).with_name("gpu_small.py")
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, str(small)],
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "done" in done.stdout
