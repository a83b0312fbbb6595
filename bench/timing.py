"""Timing that can be trusted: warmed up, repeated, the median kept, everything beside the copy bandwidth."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Row:
    """One measured case; `bytes` is the least traffic it needs (each input once, each output once)."""

    case: str
    shape: str
    seconds: float
    bytes: int | None = None
    of_copy: float | None = None
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def median_seconds(
    run: Callable[[], object], *, repeats: int = 7, warmup: int = 1, budget: float = 20.0
) -> float:
    """Median wall time of `run`, warmed up; stops once `budget` seconds are spent (two runs at least)."""
    for _ in range(warmup):
        run()
    times: list[float] = []
    started = time.perf_counter()
    for _ in range(repeats):
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
        if len(times) >= 2 and time.perf_counter() - started > budget:
            break
    return statistics.median(times)


def copy_bandwidth(megabytes: int = 256) -> float:
    """Bytes per second (read plus written) of a large copy over all of Numba's threads, right now."""
    from numba import njit, prange

    @njit(parallel=True)  # type: ignore[untyped-decorator]
    def copy(source: NDArray[np.float32], target: NDArray[np.float32]) -> None:
        for i in prange(source.size):
            target[i] = source[i]

    source = np.random.default_rng(0).random(megabytes * 2**18, dtype=np.float32)
    target = np.ones_like(source)
    seconds = median_seconds(lambda: copy(source, target), repeats=9, warmup=2)
    assert np.array_equal(source, target)
    return 2 * source.nbytes / seconds


def table(rows: list[Row], floor: str = "of copy") -> str:
    """Rows as an aligned text table; `floor` names the column of ratios to the floor."""
    head = ("case", "shape", "ms", "GB/s", floor, "note")
    body = []
    for row in rows:
        rate = "" if row.bytes is None else f"{row.bytes / row.seconds / 1e9:.1f}"
        share = "" if row.of_copy is None else f"{row.of_copy:.2f}"
        body.append((row.case, row.shape, f"{row.seconds * 1e3:.2f}", rate, share, row.note))
    widths = [max(len(line[k]) for line in [head, *body]) for k in range(len(head))]
    right = {2, 3, 4}
    lines = [
        "  ".join(
            cell.rjust(width) if k in right else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [head, *body]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
