"""The solves of the CPU room against the direct solve of the reference room, and what every solve promises."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from fpnumba.cpu import _jit, _lowrank, _threads, memory, solve
from fpnumba.reference import solve as reference

LOW_RANK = strategies.LOW_RANK
ITERATIVE = ("kronecker", "monarch", "dense", "fixed", strategies.RING, strategies.RING_WITHOUT_TRANSPOSE)
WAYS = st.sampled_from([("parallel", None), ("chunked", 3), ("chunked", None), ("sequential", None)])
TIGHT = {"rtol": 1e-14, "max_iter": 3000}


def ours(p, method="direct", chunk=None, guess=None, **options):
    return solve.solve(*p.system, p.x, p.initial, guess, method=method, chunk=chunk, **options)


def ours_adjoint(p, method="direct", chunk=None, guess=None, **options):
    return solve.solve_adjoint(*p.system, p.hbar, guess, method=method, chunk=chunk, **options)


def theirs(p) -> np.ndarray:
    return reference.solve(*p.system, p.x, p.initial, None, method="direct").value


def theirs_adjoint(p) -> np.ndarray:
    return reference.solve_adjoint(*p.system, p.hbar, None, method="direct").value


def same_cotangents(a, b, tolerance: float) -> None:
    for left, right in zip((*a[:4], *a[4]), (*b[:4], *b[4]), strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            assert_allclose(left, right, rtol=tolerance, atol=tolerance)


@given(strategies.problems(kinds=LOW_RANK, ranks=(0, 4)))
def test_direct(p) -> None:
    for solved, value in ((ours(p), theirs(p)), (ours_adjoint(p), theirs_adjoint(p))):
        assert_allclose(solved.value, value, rtol=1e-11, atol=1e-12)
        assert (solved.status == solve.CONVERGED).all()
        assert (solved.iterations == (1 if p.x.shape[1] else 0)).all()


@given(strategies.problems(kinds=(*LOW_RANK, *ITERATIVE), ranks=(0, 3)), WAYS)
def test_iterated(p, way) -> None:
    for solved, value in (
        (ours(p, *way, **TIGHT), theirs(p)),
        (ours_adjoint(p, *way, **TIGHT), theirs_adjoint(p)),
    ):
        assert_allclose(solved.value, value, rtol=1e-11, atol=1e-12)
        assert (solved.status == solve.CONVERGED).all()
        assert_array_equal(solved.iterations, solved.chunk_iterations.max(axis=1, initial=0))


@given(strategies.problems(kinds=(*LOW_RANK, "kronecker")), WAYS, st.integers(1, 3))
def test_few_iterations_are_the_reference_s(p, way, max_iter) -> None:
    """Iterate by iterate the same, so that a count that is part of a model means the same in each room."""
    chunk = way[1]
    if way[0] == "chunked" and chunk is None:
        chunk = solve.default_chunk(p.kind, p.params, p.x.shape[2], p.x.dtype)
    pairs = (
        (ours, reference.solve, (p.x, p.initial)),
        (ours_adjoint, reference.solve_adjoint, (p.hbar,)),
    )
    for run, check, arguments in pairs:
        solved = run(p, *way, max_iter=max_iter)
        expected = check(*p.system, *arguments, None, method=way[0], chunk=chunk, max_iter=max_iter)
        assert_allclose(solved.value, expected.value, rtol=1e-12, atol=1e-12)
        assert_array_equal(solved.status, expected.status)


@given(strategies.problems(kinds=(*LOW_RANK, *ITERATIVE)))
def test_one_iteration_and_cotangents(p) -> None:
    assert_allclose(
        solve.iterate(*p.system, p.x, p.initial, p.h),
        reference.iterate(*p.system, p.x, p.initial, p.h),
        atol=1e-12,
    )
    assert_allclose(
        solve.iterate_adjoint(*p.system, p.hbar, p.h),
        reference.iterate_adjoint(*p.system, p.hbar, p.h),
        atol=1e-12,
    )
    arguments = (*p.system, p.x, p.initial, p.h, p.hbar)
    same_cotangents(solve.rnn_cotangents(*arguments), reference.rnn_cotangents(*arguments), 1e-11)


@given(strategies.problems(kinds=(*LOW_RANK, "kronecker"), ranks=(0, 3)), WAYS, st.booleans())
def test_pullback_is_adjoint_and_cotangents(p, way, direct) -> None:
    way = ("direct", None) if direct and p.kind in LOW_RANK else way
    start = (*p.system, p.x, p.initial, p.h)
    solved, cotangents = solve.rnn_pullback(*start, p.hbar, None, method=way[0], chunk=way[1], **TIGHT)
    s = theirs_adjoint(p)
    assert_allclose(solved.value, s, rtol=1e-11, atol=1e-12)
    assert (solved.status == solve.CONVERGED).all()
    same_cotangents(cotangents, reference.rnn_cotangents(*start, s), 1e-10)
    assert_array_equal(solved.iterations, ours_adjoint(p, *way, **TIGHT).iterations)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("gated", [False, True])
def test_lines_that_are_not_full(dtype, gated) -> None:
    """One vector is taken in lines of 64 bytes: fewer channels than one, whole lines, and a rest beside them."""
    for dim in (1, 7, 8, 9, 15, 16, 17, 40, 64):
        p = strategies.problem(dim, "dplr", batch=2, steps=5, dim=dim, rank=1, gated=gated, dtype=dtype)
        exact = p.astype(np.float64)
        tolerance = 2e-5 if dtype == np.float32 else 1e-11
        s = theirs_adjoint(exact)
        expected = reference.rnn_cotangents(*exact.system, exact.x, exact.initial, exact.h, s)
        start = (*p.system, p.x, p.initial, p.h)
        for method in ("direct", "sequential"):
            solved, bars = solve.rnn_pullback(*start, p.hbar, None, method=method, rtol=tolerance / 10)
            assert_allclose(solved.value, s, rtol=tolerance, atol=tolerance)
            same_cotangents(bars, expected, tolerance)
        same_cotangents(solve.rnn_cotangents(*start, s.astype(dtype)), expected, tolerance)


@pytest.mark.parametrize("kind", ["householder", "kronecker"])
@pytest.mark.parametrize("gated", [False, True])
def test_single_precision(kind, gated) -> None:
    p = strategies.problem(1, kind, batch=2, steps=30, dim=36, rank=2, gated=gated, dtype=np.float32)
    exact = p.astype(np.float64)
    for way in (("parallel", None), ("chunked", 8), ("sequential", None), ("direct", None)):
        if way[0] == "direct" and kind == "kronecker":
            continue
        solved, adjoint = ours(p, *way), ours_adjoint(p, *way)
        assert solved.value.dtype == adjoint.value.dtype == np.float32
        assert_allclose(solved.value, theirs(exact), atol=1e-4)
        assert_allclose(adjoint.value, theirs_adjoint(exact), atol=1e-3)
    arguments = (p.x, p.initial, p.h, p.hbar)
    expected = reference.rnn_cotangents(*exact.system, *(a.astype(np.float64) for a in arguments))
    same_cotangents(solve.rnn_cotangents(*p.system, *arguments), expected, 1e-4)


@pytest.mark.parametrize("kind", ["householder", "kronecker"])
@pytest.mark.parametrize("method", ["chunked", "direct"])
def test_segments_of_time(kind, method, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence, three threads: segments begin from zero and are corrected."""
    if (kind, method) == ("kronecker", "direct"):
        pytest.skip("Kronecker has no direct way")
    monkeypatch.setattr(_threads, "count", lambda: 3)
    monkeypatch.setattr(_threads, "SMALLEST", 0)
    monkeypatch.setattr(solve, "SHORTEST_SEGMENT", 8)
    # A slow decay, so that corrections reach far, and a quick one, so that they stop.
    for slowest in (0.9999, 0.3):
        p = strategies.problem(4, kind, batch=1, steps=90, dim=6, slowest=slowest)
        if slowest > 0.99:
            p = replace(p, lam=np.full_like(p.lam, slowest))
        assert solve._split(1, 90, 1) == 3
        assert_allclose(ours(p, method, rtol=1e-13).value, theirs(p), rtol=1e-10, atol=1e-11)
        assert_allclose(ours_adjoint(p, method, rtol=1e-13).value, theirs_adjoint(p), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("dim", [64, 72])  # 72: a line that is not full at the end of each row
def test_writing_past_the_cache_changes_nothing(rank, dim, monkeypatch: pytest.MonkeyPatch) -> None:
    p = strategies.problem(5, "householder", steps=9, dim=dim, rank=rank, gated=True, dtype=np.float32)
    start = (*p.system, p.x, p.initial, p.h)

    def everything():
        solved, bars = solve.rnn_pullback(*start, p.hbar, None, method="direct")
        unsolved = solve.rnn_cotangents(*start, p.hbar)
        found = (ours(p).value, ours_adjoint(p).value, solved.value)
        return (*found, *bars[:4], *bars[4], *unsolved[:4], *unsolved[4])

    before = everything()
    monkeypatch.setattr(_jit, "STREAM_BYTES", 0)
    monkeypatch.setattr(memory, "SMALLEST", 0)  # so that every result is aligned
    for a, b in zip(everything(), before, strict=True):
        assert_array_equal(a, b)


@given(
    strategies.problems(kinds=(*LOW_RANK, "kronecker"), batches=(1, 3), steps=(1, 9)),
    WAYS,
    strategies.seeds(),
)
def test_causal_and_indifferent_to_the_batch(p, way, seed) -> None:
    rng = np.random.default_rng(seed)
    # A chunk of its own size whatever the length: the same steps are solved together.
    way = ("chunked", 4) if way[0] == "parallel" else way
    solved = ours(p, *way)
    batch, steps, _ = p.x.shape
    order = list(rng.permutation(batch))
    assert_array_equal(ours(p.take(order), *way).value, solved.value[order])
    at = int(rng.integers(steps))
    x = p.x.copy()
    x[:, at:] += 1
    # Whole chunks: those before the one that changes.
    size = {"sequential": 1}.get(
        way[0], way[1] or solve.default_chunk(p.kind, p.params, p.x.shape[2], p.x.dtype)
    )
    until = at // size * size
    assert_array_equal(ours(replace(p, x=x), *way).value[:, :until], solved.value[:, :until])


@pytest.mark.parametrize("kind", ["householder", "kronecker", "fixed"])
@pytest.mark.parametrize("method", ["parallel", "chunked", "sequential", "direct"])
def test_nan_stays_in_its_sequence(kind, method) -> None:
    if method == "direct" and kind not in LOW_RANK:
        pytest.skip("no direct way")
    p = strategies.problem(6, kind, batch=3, steps=12, dim=16)
    clean, clean_adjoint = ours(p, method), ours_adjoint(p, method)
    p.x[1, 4, 2] = np.nan
    p.hbar[1, 7, 1] = np.inf
    for solved, before in ((ours(p, method), clean), (ours_adjoint(p, method), clean_adjoint)):
        assert solved.status.tolist() == [solve.CONVERGED, solve.NONFINITE_INPUT, solve.CONVERGED]
        assert_array_equal(solved.value[[0, 2]], before.value[[0, 2]])
        assert_array_equal(solved.residual[[0, 2]], before.residual[[0, 2]])


@pytest.mark.parametrize("method", ["parallel", "chunked", "sequential"])
def test_divergence_is_said(method) -> None:
    p = strategies.problem(7, "householder", rank=1, bound=0.9, steps=20, dim=4)
    u = np.zeros_like(p.params[0])
    u[..., 0] = 1.0
    wild = replace(p, params=(u, np.full_like(p.params[1], 8.0)), lam=np.full_like(p.lam, 0.1))
    assert (ours(wild, method, max_iter=100_000).status == solve.DIVERGED).all()
    assert (ours(wild, method, max_iter=5).status == solve.MAX_ITER).all()
    # The direct way solves it all the same, and says when it cannot.
    assert_allclose(ours(wild).value, theirs(wild), rtol=1e-11)
    singular = replace(wild, params=(u, np.full_like(p.params[1], 1 / 0.9)))
    assert (ours(singular).status == solve.ILL_CONDITIONED).all()


@given(strategies.problems(kinds=(*LOW_RANK, *ITERATIVE)), WAYS)
def test_zero_in_zero_out(p, way) -> None:
    still = replace(p, x=np.zeros_like(p.x), initial=None, hbar=np.zeros_like(p.hbar))
    for solved in (ours(still, *way), ours_adjoint(still, *way), ours(still, *way, guess=p.h)):
        assert not solved.value.any()
        assert (solved.iterations <= 1).all()
        assert (solved.status == solve.CONVERGED).all()


@given(strategies.problems(kinds=(*LOW_RANK, "kronecker", "fixed")), WAYS, st.sampled_from([1.0, 0.6]))
def test_warm_start_and_damping(p, way, damping) -> None:
    solved = ours(p, *way, damping=damping, **TIGHT)
    assert_allclose(solved.value, theirs(p), rtol=1e-10, atol=1e-11)
    again = ours(p, *way, guess=solved.value, damping=damping)
    assert (again.iterations <= 1).all()
    assert (again.status == solve.CONVERGED).all()


@given(strategies.problems(kinds=(*LOW_RANK, "kronecker"), steps=(1, 9)), WAYS)
def test_iterations_do_not_grow_with_the_tolerance(p, way) -> None:
    counts = [ours(p, *way, rtol=rtol).iterations for rtol in (1e-10, 1e-6, 1e-2)]
    assert (counts[0] >= counts[1]).all()
    assert (counts[1] >= counts[2]).all()


def test_wrong_options() -> None:
    p = strategies.problem(8, "kronecker")
    with pytest.raises(ValueError, match="needs a mixer of low rank"):
        ours(p, "direct")
    with pytest.raises(ValueError, match="got 'ring'"):
        ours(strategies.problem(8, strategies.RING), "direct")
    with pytest.raises(ValueError, match="method: 'sideways'"):
        ours(p, "sideways")
    with pytest.raises(ValueError, match="chunk: 0 steps"):
        ours(p, "chunked", 0)
    with pytest.raises(ValueError, match="max_iter: 0"):
        ours(p, "parallel", max_iter=0)


def test_a_second_process_compiles_nothing() -> None:
    code = (
        "import numpy as np\n"
        "from fpnumba.cpu import _lowrank, _pull, _relax, scan, solve\n"
        "x, u = np.ones((1, 3, 4)), np.ones((1, 3, 1, 4)) / 2\n"
        "mixer = 'householder', (u, np.ones((1, 3, 1)) / 2)\n"
        "for method in ('direct', 'parallel'):\n"
        "    solve.solve(*mixer, x / 2, None, x, None, None, method=method)\n"
        "solve.rnn_pullback(*mixer, x / 2, None, x, None, x, x, None, method='direct')\n"
        "scan.linear_scan(x, x)\n"
        "kernels = (_lowrank.solve_steps, _pull.pull_steps, _relax.relax, scan._scan)\n"
        "print(sum(sum(k.stats.cache_misses.values()) for k in kernels), len([k for k in kernels if k.signatures]))\n"
    )
    for _ in range(2):  # the first may have to compile
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "4"]


def test_a_kernel_is_stale_when_any_file_of_the_room_changes() -> None:
    assert _jit.room_hash() in _lowrank.solve_steps._cache._cache_file._source_stamp
