"""The solves in numba.cuda against the reference room: the same iterates, counts, status; and what solves promise."""

from dataclasses import replace

import numpy as np
import pytest
import strategies
from numpy.testing import assert_allclose, assert_array_equal
from rooms import close, given, host, of_cpu, ours, ours_direct, theirs

from fpnumba.gpu import portable
from fpnumba.reference import mixers
from fpnumba.reference import solve as reference

CONVERGED, MAX_ITER, DIVERGED, NONFINITE_INPUT, ILL_CONDITIONED = range(5)
ITERATIVE = ["kronecker", "monarch", "dense", "fixed", strategies.RING, strategies.RING_WITHOUT_TRANSPOSE]
KINDS = [*strategies.LOW_RANK, *ITERATIVE]
BOTH = pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])


def same(solved, expected, tolerance=1e-12) -> None:
    """Iterate by iterate the same solve."""
    close(solved.value, expected.value, tolerance)
    assert_array_equal(solved.status, expected.status)
    assert_array_equal(solved.chunk_iterations, expected.chunk_iterations)
    assert_array_equal(solved.iterations, expected.iterations)
    assert_allclose(solved.residual, expected.residual, rtol=1e-5, atol=1e-15)
    assert [a.dtype for a in solved[1:]] == [np.int64, np.float64, np.int8, np.int64]


# Where gate and initial state are given, chunks are cut and a rest is left, each kind meets each of these once.


@BOTH
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_chunks(kind, adjoint) -> None:
    p = strategies.problem(1, kind, steps=3, dim=6, rank=2, bound=0.5, gated=True)
    same(ours(p, adjoint, 2), theirs(p, adjoint, 2))
    p = strategies.problem(2, kind, batch=1, steps=3, dim=4, rank=1, bound=0.5, initial=False)
    solved = ours(p, adjoint, 3, rtol=1e-13)
    close(solved.value, theirs(p, adjoint).value)
    assert solved.status.tolist() == [CONVERGED]


@BOTH
@pytest.mark.parametrize("kind", ["kronecker", strategies.RING_WITHOUT_TRANSPOSE], ids=str)
def test_step_after_step(kind, adjoint) -> None:
    p = strategies.problem(3, kind, batch=1, steps=4, dim=4, bound=0.5)
    same(ours(p, adjoint, 1), theirs(p, adjoint, 1))


@BOTH
@pytest.mark.parametrize("kind", strategies.LOW_RANK)
def test_direct(kind, adjoint) -> None:
    for rank, gated, initial in ((0, False, True), (1, True, False), (3, False, True)):
        p = strategies.problem(4, kind, steps=4, dim=7, rank=rank, gated=gated, initial=initial)
        solved = ours_direct(p, adjoint)
        close(solved.value, theirs(p, adjoint).value)
        assert solved.status.tolist() == [CONVERGED] * 2
        assert solved.chunk_iterations.tolist() == [[1]] * 2
        assert (solved.residual < 1e-14).all()
        assert (solved.residual >= 2e-16).all()


@BOTH
@pytest.mark.parametrize("kind", strategies.LOW_RANK)
def test_low_rank_step_after_step(kind, adjoint) -> None:
    """What stops it is a bound of the change, as in the CPU room."""
    p = strategies.problem(5, kind, steps=4, dim=7, rank=1, bound=1.5)
    same(ours(p, adjoint, 1), of_cpu(p, adjoint))
    p = strategies.problem(6, kind, steps=3, dim=7, rank=3, gated=True)
    for options in ({}, {"atol": 0.1}, {"max_iter": 1}, {"max_iter": 3}):
        same(ours(p, adjoint, 1, **options), of_cpu(p, adjoint, **options))
    close(ours(p, adjoint, 1, max_iter=3).value, theirs(p, adjoint, 1, max_iter=3).value)
    solved = ours(p, adjoint, 1, rtol=1e-14)
    close(solved.value, theirs(p, adjoint).value)
    assert solved.status.tolist() == [CONVERGED] * 2


@BOTH
@pytest.mark.parametrize("kind", ["householder", "monarch", strategies.RING], ids=str)
def test_few_iterations_guess_and_damping(kind, adjoint) -> None:
    p = strategies.problem(7, kind, batch=1, steps=3, dim=4, rank=2)
    for options in ({"max_iter": 2}, {"damping": 0.6, "rtol": 1e-3}, {"guess": p.h, "rtol": 1e-3}):
        same(ours(p, adjoint, 2, **options), theirs(p, adjoint, 2, **options))
    # For low-rank mixers, a guess and damping leave the way of r unknowns.
    same(ours(p, adjoint, 1, guess=p.h, max_iter=3), theirs(p, adjoint, 1, guess=p.h, max_iter=3))


@BOTH
def test_absolute_tolerance(adjoint) -> None:
    p = strategies.problem(8, "dense", batch=1, steps=3, dim=4)
    same(ours(p, adjoint, 2, atol=1e-2), theirs(p, adjoint, 2, atol=1e-2))


@BOTH
@pytest.mark.parametrize("kind", ["dplr", "kronecker"])
def test_zero_in_zero_out(kind, adjoint) -> None:
    p = strategies.problem(9, kind, steps=3, dim=4, initial=False)
    still = replace(p, x=np.zeros_like(p.x), hbar=np.zeros_like(p.hbar))
    for chunk, guess in ((1, None), (2, p.h)):
        solved = ours(still, adjoint, chunk, guess)
        assert not solved.value.any()
        assert (solved.iterations <= 1).all()
        assert (solved.status == CONVERGED).all()


def test_zero_chunk_after_others() -> None:
    """A chunk into which nothing comes, between chunks into which something does."""
    p = strategies.problem(10, "fixed", batch=1, steps=6, dim=3, initial=False)
    p.x[:, :2] = 0
    p.hbar[:, 4:] = 0
    for adjoint in (False, True):
        same(ours(p, adjoint, 2, guess=p.h), theirs(p, adjoint, 2, guess=p.h))


@BOTH
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_iteration(kind, adjoint) -> None:
    p = strategies.problem(11, kind, steps=3, dim=4, gated=not adjoint)
    q = given(p)
    if adjoint:
        new = portable.iterate(*q.system, q.hbar, None, q.h, adjoint=True)
        close(new, reference.iterate_adjoint(*p.system, p.hbar, p.h))
    else:
        new = portable.iterate(*q.system, q.x, q.initial, q.h, adjoint=False)
        close(new, reference.iterate(*p.system, p.x, p.initial, p.h))
    assert_array_equal(host(q.h), p.h)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_cotangents(kind, gated) -> None:
    p = strategies.problem(12, kind, steps=3, dim=6, rank=3, gated=gated, initial=gated)
    q = given(p)
    bars = portable.pull(*q.system, q.x, q.initial, q.h, q.hbar)
    close(bars, reference.rnn_cotangents(*p.system, p.x, p.initial, p.h, p.hbar))


@pytest.mark.parametrize("kind", ["householder", "kronecker", strategies.RING], ids=str)
def test_adjoint_of_the_solve(kind) -> None:
    """``<hbar, h(x)> = <x_bar, x>`` for what is linear in ``x``, without the reference."""
    p = strategies.problem(13, kind, batch=1, steps=4, dim=4, bound=0.5, initial=False)
    q = given(p)
    h, s = (ours(p, adjoint, 4, rtol=1e-14).value for adjoint in (False, True))
    x_bar = host(portable.pull(*q.system, q.x, None, given(h), given(s))[2])
    assert abs((p.hbar * h).sum() - (x_bar * p.x).sum()) < 1e-12 * np.abs(p.hbar).sum()


@BOTH
@pytest.mark.parametrize(
    ("kind", "chunk"), [("householder", 1), ("householder", 2), ("fixed", 3), (strategies.RING, 3), ("dplr", 0)]
)  # fmt: skip
def test_nan_stays_in_its_sequence(kind, chunk, adjoint) -> None:
    p = strategies.problem(14, kind, batch=3, steps=3, dim=4, bound=0.5)
    solve = ours_direct if chunk == 0 else lambda p, adjoint: ours(p, adjoint, chunk, rtol=1e-3)
    before = solve(p, adjoint)
    p.x[1, 1, 2] = np.nan
    p.hbar[1, 1, 1] = np.inf
    solved = solve(p, adjoint)
    assert solved.status.tolist() == [CONVERGED, NONFINITE_INPUT, CONVERGED]
    for ours_, theirs_ in zip(solved, before, strict=True):
        assert_array_equal(ours_[[0, 2]], theirs_[[0, 2]])


def test_nan_in_a_shared_matrix_is_everybody_s() -> None:
    p = strategies.problem(15, "fixed", batch=2, steps=2, dim=3)
    p.params[0][1, 1] = np.nan
    assert ours(p, False, 2).status.tolist() == [NONFINITE_INPUT] * 2


@pytest.mark.parametrize("kind", ["householder", "kronecker"])
def test_indifferent_to_the_batch(kind) -> None:
    p = strategies.problem(16, kind, batch=3, steps=3, dim=4, bound=0.5)
    whole, part = (ours(one, False, 2, rtol=1e-3) for one in (p, p.take([2, 0])))
    for ours_, theirs_ in zip(part, whole, strict=True):
        assert_array_equal(ours_, theirs_[[2, 0]])


@pytest.mark.parametrize("chunk", [1, 2])
def test_divergence_is_said(chunk) -> None:
    p = strategies.problem(17, "householder", batch=1, rank=1, steps=2, dim=3)
    u = np.zeros_like(p.params[0])
    u[..., 0] = 1.0
    wild = replace(p, params=(u, np.full_like(p.params[1], 80.0)), lam=np.full_like(p.lam, 0.1))
    assert ours(wild, False, chunk).status.tolist() == [DIVERGED]
    assert ours(wild, True, chunk, max_iter=5).status.tolist() == [MAX_ITER]
    # The direct way solves it all the same, and says when it cannot.
    close(ours_direct(wild, False).value, theirs(wild, False).value)
    singular = replace(wild, params=(u, np.full_like(p.params[1], 1 / 0.9)))
    assert ours_direct(singular, False).status.tolist() == [ILL_CONDITIONED]
    assert ours_direct(singular, True).status.tolist() == [ILL_CONDITIONED]


@pytest.mark.parametrize("kind", ["dplr", "dense", strategies.RING], ids=str)
def test_empty(kind) -> None:
    for batch, steps in ((0, 3), (2, 0)):
        p = strategies.problem(18, kind, batch=batch, steps=steps, dim=4, gated=True)
        for adjoint in (False, True):
            for chunk in (1, 2):
                same(ours(p, adjoint, chunk), theirs(p, adjoint, chunk))
        q = given(p)
        bars = portable.pull(*q.system, q.x, q.initial, q.h, q.hbar)
        close(bars, reference.rnn_cotangents(*p.system, p.x, p.initial, p.h, p.hbar))
        if kind == "dplr":
            assert ours_direct(p, False).iterations.tolist() == [1] * batch if steps else [0] * batch


def test_single_and_half_precision() -> None:
    exact = strategies.problem(19, "householder", batch=1, steps=3, dim=4, bound=0.5, gated=True)
    expected = theirs(exact, False).value
    for dtype, tolerance in ((np.float32, 1e-6), (np.float16, 3e-3)):
        p = exact.astype(dtype)
        for solved in (ours(p, False, 1), ours(p, False, 3), ours_direct(p, False)):
            assert solved.value.dtype == dtype
            assert solved.residual.dtype == np.float64
            assert solved.status.tolist() == [CONVERGED]
            assert_allclose(solved.value.astype(np.float64), expected, atol=tolerance)


def test_only_low_rank_has_a_direct_way() -> None:
    for kind, name in (("kronecker", "kronecker"), (strategies.RING, "ring")):
        with pytest.raises(ValueError, match=f"needs a mixer of low rank .*got '{name}'"):
            ours_direct(strategies.problem(20, kind), False)


def test_low_rank_as_a_user_would_write_it() -> None:
    """One reflection as a user's own mixer: the same solve as the built-in one, by other threads."""

    def apply(x, out, u, alpha):
        dot = 0.0
        for i in range(x.shape[0]):
            dot += u[i] * x[i]
        for i in range(x.shape[0]):
            out[i] = x[i] - alpha[0] * dot * u[i]

    def cotangent(x, ybar, xbar, u, alpha, u_bar, alpha_bar):
        ux, uy = 0.0, 0.0
        for i in range(x.shape[0]):
            ux += u[i] * x[i]
            uy += u[i] * ybar[i]
        alpha_bar[0] = -ux * uy
        for i in range(x.shape[0]):
            xbar[i] = ybar[i] - alpha[0] * uy * u[i]
            u_bar[i] = -alpha[0] * (ux * ybar[i] + uy * x[i])

    p = strategies.problem(21, "householder", steps=5, dim=4, rank=1)
    kind = strategies.OwnMixer("reflection", apply, cotangent)
    own = replace(p, kind=kind, params=(p.params[0][:, :, 0].copy(), p.params[1]))
    for adjoint in (False, True):
        mine, built_in = (ours(one, adjoint, 5, rtol=1e-10) for one in (own, p))
        close(mine.value, built_in.value)
        assert_array_equal(mine.iterations, built_in.iterations)
    q = given(own)
    bars = portable.pull(*q.system, q.x, q.initial, q.h, q.hbar)
    expected = reference.rnn_cotangents(*p.system, p.x, p.initial, p.h, p.hbar)
    close(bars[:4], expected[:4])
    close(bars[4][0], expected[4][0][:, :, 0])
    close(bars[4][1], expected[4][1])
    close(portable.to_dense(kind, q.params, 4), mixers.to_dense("householder", p.params, 4))
