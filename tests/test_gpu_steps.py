"""Low-rank solves and scans of the GPU room against the reference: on the CPU through the stand-in, and on a device."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hall import error

from fpnumba.gpu import _device, _shapes, _steps, scan, solve
from fpnumba.reference import scan as true_scan
from fpnumba.reference import solve as true

DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# One rounding to the storage type.
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
NAMES = ("lam", "u", "alpha", "x", "hbar", "gate", "initial")


def draw(
    batch: int,
    steps: int,
    dim: int,
    rank: int,
    dtype: str,
    *,
    gated: bool = True,
    start: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """A problem whose iteration converges, in its storage dtype."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((batch, steps, rank, dim))
    u /= np.maximum(np.linalg.norm(u, axis=-1, keepdims=True), 1e-30)
    found = {
        "lam": rng.uniform(0.05, 0.95, (batch, steps, dim)),
        "u": u,
        "alpha": rng.uniform(0.05, 0.9, (batch, steps, rank)) / max(rank, 1) ** 0.5,
        "x": rng.standard_normal((batch, steps, dim)),
        "hbar": rng.standard_normal((batch, steps, dim)),
        "gate": rng.uniform(0.1, 0.9, (batch, steps, dim)) if gated else None,
        "initial": rng.standard_normal((batch, dim)) if start else None,
    }
    return {k: None if a is None else a.astype(DTYPES[dtype]) for k, a in found.items()}


def wide(problem: dict[str, Any], dtype: Any = np.float64) -> dict[str, Any]:
    """The same numbers in a dtype that the reference computes in."""
    return {k: None if a is None else np.asarray(a).astype(dtype) for k, a in problem.items()}


def truth(kind: str, p: dict[str, Any]) -> tuple[Any, Any]:
    """``h`` and ``s`` by the reference, directly."""
    params = (p["u"], p["alpha"])
    h = true.solve(kind, params, p["lam"], p["gate"], p["x"], p["initial"], None, method="direct")
    s = true.solve_adjoint(kind, params, p["lam"], p["gate"], p["hbar"], None, method="direct")
    return h.value, s.value


def flat(bars: Any) -> list[Any]:
    """All cotangents in a row."""
    lam_bar, gate_bar, x_bar, initial_bar, params_bar = bars
    return [lam_bar, gate_bar, x_bar, initial_bar, *params_bar]


SHAPES = [
    # kind, batch, steps, dim, rank, dtype, gated, start
    ("householder", 3, 20, 70, 1, "float64", True, True),
    ("householder", 2, 9, 64, 2, "float64", False, True),
    ("dplr", 2, 9, 65, 3, "float64", False, False),
    ("householder", 2, 12, 33, 8, "float64", True, True),
    ("dplr", 1, 5, 40, 6, "float64", True, False),
    ("householder", 1, 150, 17, 1, "float64", False, True),  # split in time
    ("householder", 1, 150, 12, 4, "float64", True, True),
    ("householder", 1, 7, 300, 1, "float32", False, True),
    ("dplr", 2, 6, 48, 5, "float32", True, True),
    ("householder", 2, 7, 64, 1, "bfloat16", False, True),
    ("householder", 1, 6, 50, 2, "float16", True, True),
    ("dplr", 2, 1, 16, 1, "float32", True, False),
    ("dplr", 2, 0, 16, 1, "float32", True, True),
    ("householder", 0, 4, 16, 1, "float32", False, False),
    ("householder", 2, 4, 16, 0, "float64", False, True),
    ("householder", 1, 3, 1, 1, "float64", False, True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["direct", "sequential"])
def test_agrees_with_the_reference(gpu_room: Any, shape: Any, method: str) -> None:
    kind, batch, steps, dim, rank, dtype, gated, start = shape
    given = draw(batch, steps, dim, rank, dtype, gated=gated, start=start)
    h, s = truth(kind, wide(given))
    p = {k: gpu_room.give(a) for k, a in given.items()}
    params, rest = (p["u"], p["alpha"]), (p["lam"], p["gate"])
    rtol = 1e-13 if dtype == "float64" else 1e-6
    # What the iteration leaves over, and roundings of the storage and of the arithmetic.
    slack = (
        (0 if method == "direct" else 20 * rtol)
        + UNIT[dtype]
        + 8 * UNIT["float64" if dtype == "float64" else "float32"]
    )
    options: dict[str, Any] = {"method": method, "rtol": rtol}
    forward = solve.solve(kind, params, *rest, p["x"], p["initial"], None, **options)
    assert error(gpu_room.get(forward.value), h) <= slack
    adjoint = solve.solve_adjoint(kind, params, *rest, p["hbar"], None, **options)
    assert error(gpu_room.get(adjoint.value), s) <= slack
    both, bars = solve.rnn_pullback(
        kind, params, *rest, p["x"], p["initial"], forward.value, p["hbar"], None, **options
    )
    assert error(gpu_room.get(both.value), s) <= slack
    q = wide(given)
    at = wide({"h": np.asarray(gpu_room.get(forward.value))})["h"]
    wanted = true.rnn_cotangents(kind, (q["u"], q["alpha"]), q["lam"], q["gate"], q["x"], q["initial"], at, s)
    for found, right in zip(flat(bars), flat(wanted), strict=True):
        assert (found is None) == (right is None)
        if found is not None:
            assert error(gpu_room.get(found), right) <= 12 * slack
    alone = solve.rnn_cotangents(kind, params, *rest, p["x"], p["initial"], forward.value, adjoint.value)
    of = wide({"s": np.asarray(gpu_room.get(adjoint.value))})["s"]
    wanted = true.rnn_cotangents(
        kind, (q["u"], q["alpha"]), q["lam"], q["gate"], q["x"], q["initial"], at, of
    )
    for found, right in zip(flat(alone), flat(wanted), strict=True):
        if found is not None:
            assert error(gpu_room.get(found), right) <= 12 * (
                UNIT[dtype] + UNIT["float64" if dtype == "float64" else "float32"]
            )
    for solved in (forward, adjoint, both):
        assert gpu_room.get(solved.status).tolist() == [0] * batch
        counts = gpu_room.get(solved.chunk_iterations)
        assert counts.shape == (batch, steps if method == "sequential" else min(steps, 1))
        assert gpu_room.get(solved.iterations).tolist() == counts.max(axis=1, initial=0).tolist()


@pytest.mark.parametrize("kind", ["dplr", "householder"])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_errors_of_float32_are_those_of_a_plain_evaluation(gpu_room: Any, kind: str, rank: int) -> None:
    given = draw(2, 60, 96, rank, "float32", gated=False)
    right = truth(kind, wide(given))
    plain = truth(kind, wide(given, np.float32))
    p = {k: gpu_room.give(a) for k, a in given.items()}
    params = (p["u"], p["alpha"])
    found = solve.solve(kind, params, p["lam"], None, p["x"], p["initial"], None, method="direct")
    back = solve.solve_adjoint(kind, params, p["lam"], None, p["hbar"], None, method="direct")
    for mine, theirs, exact in zip((found.value, back.value), plain, right, strict=True):
        assert error(gpu_room.get(mine), exact) <= 2 * error(theirs, exact)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "shape", [(3, 40, 70), (1, 700, 12), (2, 300, 7), (0, 3, 4), (2, 0, 4), (1, 1, 1)], ids=str
)
def test_scan(gpu_room: Any, shape: tuple[int, int, int], reverse: bool, dtype: str) -> None:
    given = draw(*shape, 1, dtype, start=not reverse)
    q = wide(given)
    p = {k: gpu_room.give(a) for k, a in given.items()}
    h = scan.linear_scan(p["lam"], p["x"], p["initial"], reverse)
    right = true_scan.linear_scan(q["lam"], q["x"], q["initial"], reverse=reverse)
    slack = 2 * UNIT[dtype] + 4 * UNIT["float64" if dtype == "float64" else "float32"]
    assert error(gpu_room.get(h), right) <= slack
    bars = scan.linear_scan_vjp(p["lam"], h, p["initial"], reverse, p["hbar"])
    at = wide({"h": np.asarray(gpu_room.get(h))})["h"]
    wanted = true_scan.linear_scan_vjp(q["lam"], at, q["initial"], reverse, q["hbar"])
    for found, exact in zip(bars, wanted, strict=True):
        assert error(gpu_room.get(found), exact) <= 2 * slack


@pytest.mark.parametrize("decay", [0.5, 0.999, 1.0])
def test_scan_in_segments_carries_what_does_not_decay(gpu_room: Any, decay: float) -> None:
    steps, dim = 1000, 8
    lam = np.full((1, steps, dim), decay)
    x = np.random.default_rng(1).standard_normal((1, steps, dim))
    h = gpu_room.get(scan.linear_scan(gpu_room.give(lam), gpu_room.give(x)))
    assert error(h, true_scan.linear_scan(lam, x, None)) <= 1e-14


def test_what_is_not_finite_goes_on_to_the_end_of_its_sequence_alone(gpu_room: Any) -> None:
    given = draw(2, 400, 12, 1, "float64")
    clean = {k: gpu_room.give(a) for k, a in given.items()}
    given["x"] = given["x"].copy()
    given["x"][0, 50, 3] = np.nan
    p = {k: gpu_room.give(a) for k, a in given.items()}
    h = gpu_room.get(scan.linear_scan(p["lam"], p["x"], p["initial"]))
    assert np.isnan(h[0, 50:, 3]).all()
    assert np.isfinite(np.delete(h[0], 3, axis=1)).all()
    assert np.isfinite(h[0, :50]).all()
    np.testing.assert_array_equal(
        h[1], gpu_room.get(scan.linear_scan(clean["lam"], clean["x"], clean["initial"]))[1]
    )
    for method in ("direct", "sequential"):
        params = (p["u"], p["alpha"])
        solved = solve.solve("dplr", params, p["lam"], None, p["x"], p["initial"], None, method=method)
        found = gpu_room.get(solved.value)
        assert gpu_room.get(solved.status).tolist() == [solve.NONFINITE_INPUT, solve.CONVERGED]
        assert np.isnan(found[0, 50:]).all()
        assert np.isfinite(found[0, :50]).all()
        alone = solve.solve("dplr", params, p["lam"], None, clean["x"], p["initial"], None, method=method)
        np.testing.assert_array_equal(found[1], gpu_room.get(alone.value)[1])


def test_statuses(gpu_room: Any) -> None:
    given = draw(1, 30, 16, 1, "float64", gated=False, start=False)
    given["alpha"] = given["alpha"] * 0 + 40.0  # the iteration diverges, the direct way exists
    p = {k: gpu_room.give(a) for k, a in given.items()}
    params, rest = (p["u"], p["alpha"]), (p["lam"], None, p["x"], None, None)
    found = solve.solve("dplr", params, *rest, method="sequential")
    assert gpu_room.get(found.status).tolist() == [solve.DIVERGED]
    found = solve.solve("dplr", params, *rest, method="sequential", max_iter=3)
    assert gpu_room.get(found.status).tolist() == [solve.MAX_ITER]
    assert gpu_room.get(found.iterations).tolist() == [3]
    found = solve.solve("dplr", params, *rest, method="direct")
    assert gpu_room.get(found.status).tolist() == [solve.CONVERGED]
    given["lam"] = given["lam"] * 0
    given["alpha"] = given["alpha"] * 0 + 1.0  # I - P is singular
    p = {k: gpu_room.give(a) for k, a in given.items()}
    found = solve.solve("dplr", (p["u"], p["alpha"]), p["lam"], None, p["x"], None, None, method="direct")
    assert gpu_room.get(found.status)[0] in (solve.ILL_CONDITIONED, solve.DIVERGED)


def test_first_iterates_are_those_of_the_reference(gpu_room: Any) -> None:
    given = draw(2, 12, 20, 3, "float64")
    p = {k: gpu_room.give(a) for k, a in given.items()}
    for count in (1, 2, 5):
        options: dict[str, Any] = {"method": "sequential", "max_iter": count, "rtol": 0.0}
        args = (given["lam"], given["gate"], given["x"], given["initial"], None)
        right = true.solve("householder", (given["u"], given["alpha"]), *args, **options)
        mine = (p["lam"], p["gate"], p["x"], p["initial"], None)
        found = solve.solve("householder", (p["u"], p["alpha"]), *mine, **options)
        assert error(gpu_room.get(found.value), right.value) <= 1e-14
        assert gpu_room.get(found.iterations).tolist() == [count, count]
        assert gpu_room.get(found.status).tolist() == right.status.tolist()


def test_zero_cotangent_gives_exactly_zero(gpu_room: Any) -> None:
    given = draw(2, 10, 20, 2, "float32")
    p = {k: gpu_room.give(a) for k, a in given.items()}
    params, none = (p["u"], p["alpha"]), gpu_room.give(np.zeros_like(given["x"]))
    for method in ("direct", "sequential"):
        solved, bars = solve.rnn_pullback(
            "householder",
            params,
            p["lam"],
            p["gate"],
            p["x"],
            p["initial"],
            p["x"],
            none,
            None,
            method=method,
        )
        assert gpu_room.get(solved.status).tolist() == [0, 0]
        for bar in flat(bars):
            assert not np.asarray(gpu_room.get(bar)).any()


def test_a_cluster_of_blocks_shares_a_wide_step(
    gpu_room: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if gpu_room.name == "simt":  # a small step that is made to look large
        monkeypatch.setattr(_steps, "SHARED_MOST", 40 * 1024)
        for kept in (_steps.layout, _steps._plan):
            kept.cache_clear()
            request.addfinalizer(kept.cache_clear)
        dim = 256
    else:
        dim = 8192
    given = draw(2, 5, dim, 8, "float64", gated=True)
    step = _steps.Step("solve_steps", "float64", 8, True, (("ADJOINT", 0),), True, True, False)
    assert _steps.layout(step, dim, 2).cluster > 1
    h, s = truth("householder", wide(given))
    p = {k: gpu_room.give(a) for k, a in given.items()}
    params = (p["u"], p["alpha"])
    for method in ("direct", "sequential"):
        options: dict[str, Any] = {"method": method, "rtol": 1e-13}
        found = solve.solve("householder", params, p["lam"], p["gate"], p["x"], p["initial"], None, **options)
        assert error(gpu_room.get(found.value), h) <= 1e-12
        both, _ = solve.rnn_pullback(
            "householder",
            params,
            p["lam"],
            p["gate"],
            p["x"],
            p["initial"],
            found.value,
            p["hbar"],
            None,
            **options,
        )
        assert error(gpu_room.get(both.value), s) <= 1e-12


def test_orders_of_threads_do_not_matter(simt_device: Any) -> None:
    given = draw(1, 150, 40, 2, "float32")
    params, rest = (given["u"], given["alpha"]), (given["lam"], given["gate"])
    seen = []
    for seed in (0, 1, 2):
        simt_device.seed = seed
        for method in ("direct", "sequential"):
            h = solve.solve(
                "householder", params, *rest, given["x"], given["initial"], None, method=method
            ).value
            _, bars = solve.rnn_pullback(
                "householder", params, *rest, given["x"], None, h, given["hbar"], None, method=method
            )
            seen.append([h, *flat(bars), scan.linear_scan(given["lam"], given["x"])])
    for i, one in enumerate(seen):
        for a, b in zip(one, seen[i % 2], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_array_equal(a, b)


def test_a_sequence_does_not_depend_on_its_batch(gpu_room: Any) -> None:
    given = draw(4, 40, 24, 2, "float32")
    p = {k: gpu_room.give(a) for k, a in given.items()}
    turned = {k: gpu_room.give(np.ascontiguousarray(a[::-1])) for k, a in given.items()}
    for method in ("direct", "sequential"):
        one, two = (
            solve.solve(
                "householder",
                (q["u"], q["alpha"]),
                q["lam"],
                q["gate"],
                q["x"],
                q["initial"],
                None,
                method=method,
            )
            for q in (p, turned)
        )
        np.testing.assert_array_equal(gpu_room.get(one.value), gpu_room.get(two.value)[::-1])


def test_arrays_that_begin_anywhere(gpu_room: Any) -> None:
    given = draw(2, 9, 16, 1, "float32", gated=False)

    def shifted(a: Any) -> Any:
        buffer = np.zeros(a.size + 1, a.dtype)
        whole = gpu_room.give(buffer)
        whole[1:] = gpu_room.give(a).reshape(-1)
        return whole[1:].reshape(a.shape)

    p = {k: None if a is None else shifted(a) for k, a in given.items()}
    assert _shapes.each(16, p["x"]) == 1
    h, _ = truth("dplr", wide(given))
    found = solve.solve(
        "dplr", (p["u"], p["alpha"]), p["lam"], None, p["x"], p["initial"], None, method="direct"
    )
    assert error(gpu_room.get(found.value), h) <= 1e-6
    assert _device.address(p["x"]) % 16


@pytest.mark.parametrize("low", [0.5, 0.97, 0.9999])
def test_segments_settle_however_slowly_lam_decays(gpu_room: Any, low: float) -> None:
    steps = 300 if gpu_room.name == "simt" else 3000
    given = draw(1, steps, 12, 2, "float64", gated=False)
    given["lam"] = low + (1 - low) * given["lam"]
    h, s = truth("householder", wide(given))
    p = {k: gpu_room.give(a) for k, a in given.items()}
    params = (p["u"], p["alpha"])
    for method in ("direct", "sequential"):
        options: dict[str, Any] = {"method": method, "rtol": 1e-13}
        found = solve.solve("householder", params, p["lam"], None, p["x"], p["initial"], None, **options)
        assert error(gpu_room.get(found.value), h) <= 1e-12
        both, _ = solve.rnn_pullback(
            "householder",
            params,
            p["lam"],
            None,
            p["x"],
            p["initial"],
            found.value,
            p["hbar"],
            None,
            **options,
        )
        assert error(gpu_room.get(both.value), s) <= 2e-12
