"""The CPU room against the memory floor and against JAX, everything in one run."""

from collections.abc import Callable
from typing import Any

import numpy as np

import fpnumba as fp
from bench import mamba
from bench.timing import Row, copy_bandwidth, median_seconds

SHAPE = (8, 4096, 512)
RTOL = 1e-6


def _problem(shape: tuple[int, int, int], seed: int = 0) -> dict[str, Any]:
    """A Householder problem with contraction below one: lam in (0.05, 0.95), alpha in (0, 1)."""
    rng = np.random.default_rng(seed)
    batch, time, width = shape
    u = rng.standard_normal((batch, time, 1, width), dtype=np.float32)
    u /= np.linalg.norm(u, axis=-1, keepdims=True)
    return {
        "lam": rng.uniform(0.05, 0.95, shape).astype(np.float32),
        "x": rng.standard_normal(shape, dtype=np.float32),
        "mixer": fp.mixers.Householder(u, rng.uniform(0.05, 0.95, (batch, time, 1)).astype(np.float32)),
        "hbar": rng.standard_normal(shape, dtype=np.float32),
    }


def _label(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)


def _solve_bytes(problem: dict[str, Any]) -> int:
    """lam, x, u and alpha read once, h written once."""
    u, alpha = problem["mixer"].params
    return 3 * problem["x"].nbytes + u.nbytes + alpha.nbytes


class _Bench:
    """Rows as they come, and the copy bandwidth beside each: a shared machine drifts."""

    def __init__(self, report: Callable[[Row], None]) -> None:
        self._report, self._rows, self._copies = report, list[Row](), [copy_bandwidth()]

    def __call__(
        self, case: str, shape: tuple[int, ...], seconds: float, nbytes: int | None, note: str = ""
    ) -> float:
        self._copies.append(copy_bandwidth())
        share = None if nbytes is None else nbytes / seconds / (sum(self._copies[-2:]) / 2)
        self._rows.append(Row(case, _label(shape), seconds, nbytes, share, note))
        self._report(self._rows[-1])
        return seconds

    def record(self, **found: Any) -> dict[str, Any]:
        """The machine-readable record of what was `found`."""
        import numba

        return {
            "threads": numba.get_num_threads(),
            **found,
            "copy_bytes_per_second": self._copies,
            "rows": [row.as_dict() for row in self._rows],
        }


def layers(*, peers: bool, report: Callable[[Row], None]) -> dict[str, Any]:
    """Layers alone, which have a record of their own."""
    add = _Bench(report)
    return add.record(mamba=mamba.run(add, peers=peers), scaling={})


def run(*, quick: bool, peers: bool, report: Callable[[Row], None]) -> dict[str, Any]:
    """Measure every case, hand each row to `report` as it comes, and return the machine-readable record."""
    add = _Bench(report)
    shape = (8, 1024, 512) if quick else SHAPE
    p = _problem(shape)
    lam, x, mixer, hbar = p["lam"], p["x"], p["mixer"], p["hbar"]

    for reverse in (False, True):
        seconds = median_seconds(lambda r=reverse: fp.linear_scan(lam, x, reverse=r))
        add("linear_scan" + (" reverse" if reverse else ""), shape, seconds, 3 * x.nbytes)
    _, pullback = fp.vjp(fp.linear_scan, lam, x)
    # hbar, lam and h read, lam_bar and x_bar written
    add("linear_scan pullback", shape, median_seconds(lambda: pullback(hbar)), 5 * x.nbytes)

    values: dict[str, float] = {}
    answers: dict[str, Any] = {}
    for method in ("direct", "chunked", "sequential"):
        solver = fp.Solver(method=method, rtol=RTOL)
        answers[method] = fp.fixed_point_rnn(lam, mixer, x, solver=solver)
        seconds = median_seconds(lambda s=solver: fp.fixed_point_rnn(lam, mixer, x, solver=s))
        note = f"iterations {int(np.max(answers[method].iterations))}"
        values[method] = add(f"fixed_point_rnn {method}", shape, seconds, _solve_bytes(p), note)

        def both(s: fp.Solver = solver) -> object:
            _, pull = fp.vjp(fp.fixed_point_rnn, lam, mixer, x, solver=s)
            return pull(hbar)

        seconds = median_seconds(both)
        add(
            f"  value and exact gradient, {method}",
            shape,
            seconds,
            None,
            f"{seconds / values[method]:.2f} x value",
        )

    kron = _kronecker_problem(shape)
    solver = fp.Solver(method="chunked", rtol=RTOL)
    solution = fp.fixed_point_rnn(lam, kron, x, solver=solver)
    seconds = median_seconds(lambda: fp.fixed_point_rnn(lam, kron, x, solver=solver), repeats=3)
    add(
        "fixed_point_rnn chunked, Kronecker",
        shape,
        seconds,
        3 * x.nbytes + sum(a.nbytes for a in kron.params),
        f"iterations {int(np.max(solution.iterations))}",
    )

    found: dict[str, Any] = {}
    if peers:
        found["peer"] = _against_jax(p, shape, answers["chunked"], values, add)
    found["mamba"] = mamba.run(add, peers=peers)
    found["scaling"] = _scaling(quick, add)
    return add.record(**found)


def _kronecker_problem(shape: tuple[int, int, int]) -> Any:
    batch, time, width = shape
    d1 = 2 ** (int(np.log2(width)) // 2)
    rng = np.random.default_rng(1)

    def contraction(d: int) -> Any:
        k = rng.standard_normal((batch, time, d, d), dtype=np.float32)
        return k * np.float32(0.8) / np.linalg.norm(k, axis=(-2, -1), keepdims=True)

    return fp.mixers.Kronecker(contraction(d1), contraction(width // d1))


def _against_jax(p: dict[str, Any], shape: Any, ours: Any, values: dict[str, float], add: Any) -> Any:
    from bench.peers import jax_iterated_solve

    u, alpha = p["mixer"].params
    theirs = jax_iterated_solve(p["lam"], u[..., 0, :], alpha, p["x"], RTOL)
    answer = theirs()
    # A ratio between two answers means something only if they are the same answer.
    error = float(np.max(np.abs(answer - ours.value)) / np.max(np.abs(answer)))
    assert error < 1e-4, f"the peer's answer differs by {error:.1e}"
    seconds = median_seconds(theirs, repeats=2, warmup=0)
    ratios = {method: seconds / value for method, value in values.items()}
    note = ", ".join(f"{method} {ratio:.0f}x faster" for method, ratio in ratios.items())
    add("JAX jit, loop of associative_scan", shape, seconds, None, note)
    return {"seconds": seconds, "difference": error, "ratios": ratios}


def _scaling(quick: bool, add: Any) -> dict[str, Any]:
    """Time against length, two sequences: the exponent of a straight line through the logarithms."""
    record: dict[str, Any] = {}
    powers = range(10, 15 if quick else 18)
    for method in ("direct", "chunked"):
        solver = fp.Solver(method=method, rtol=RTOL)
        times = []
        for power in powers:
            p = _problem((2, 2**power, 512))
            lam, mixer, x = p["lam"], p["mixer"], p["x"]
            seconds = median_seconds(lambda: fp.fixed_point_rnn(lam, mixer, x, solver=solver), repeats=5)  # noqa: B023
            times.append(add(f"fixed_point_rnn {method}", x.shape, seconds, _solve_bytes(p)))
        slope = float(np.polyfit(np.log([2.0**k for k in powers]), np.log(times), 1)[0])
        record[method] = {"powers": list(powers), "seconds": times, "exponent": slope}
    return record
