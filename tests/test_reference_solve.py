"""The reference solves: four ways and the dense RNN, one fixed point; their adjoints, one gradient."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from derivatives import assert_transposed, complex_step, dot, like
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    KINDS,
    LOW_RANK,
    RING,
    RING_WITHOUT_TRANSPOSE,
    Array,
    Problem,
    mixer_params,
    problem,
    problems,
    seeds,
)

from fpnumba.reference import mixers
from fpnumba.reference.scan import linear_scan
from fpnumba.reference.solve import (
    CONVERGED,
    DIVERGED,
    ILL_CONDITIONED,
    MAX_ITER,
    NONFINITE_INPUT,
    Solved,
    dense_transition,
    iterate,
    iterate_adjoint,
    rnn_cotangents,
    solve,
    solve_adjoint,
    solve_dense,
)

ALL = (*KINDS, RING, RING_WITHOUT_TRANSPOSE)
WAYS: dict[str, dict[str, Any]] = {
    "parallel": {"method": "parallel"},
    "chunked": {"method": "chunked", "chunk": 3},
    "sequential": {"method": "sequential"},
    "direct": {"method": "direct"},
}
# Down to rounding errors, among which the last iterates may go round in circles: compare values, not statuses
TIGHT: dict[str, Any] = {"rtol": 1e-15, "max_iter": 1000}

each_kind = pytest.mark.parametrize("kind", ALL, ids=str)
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
iterative = pytest.mark.parametrize("way", list(WAYS.values())[:-1], ids=list(WAYS)[:-1])


def forward(p: Problem, guess: Array | None = None, **how: Any) -> Solved:
    return solve(*p.system, p.x, p.initial, guess, **how)


def adjoint(p: Problem, guess: Array | None = None, **how: Any) -> Solved:
    return solve_adjoint(*p.system, p.hbar, guess, **how)


def assert_close(value: Array, expected: Array, rtol: float, *sources: Array | None) -> None:
    """To ``rtol`` of the largest entry of each sequence, its sources included: they may cancel."""
    assert value.shape == expected.shape
    if value.size:
        scale = np.full(len(value), 1e-300)
        for array in (expected, *(a for a in sources if a is not None)):
            scale = np.maximum(scale, np.abs(array).reshape(len(value), -1).max(axis=1))
        assert np.max(np.abs(value - expected) / scale[:, None, None]) <= rtol


RUNS: tuple[Any, ...] = (forward, adjoint)


def all_steps_at_once(p: Problem) -> Array:
    """``L - diag(g) P`` of every sequence, (B, T D, T D): (F) is this matrix times ``h``."""
    batch, steps, dim = p.x.shape
    P = np.eye(dim) - np.broadcast_to(mixers.to_dense(p.kind, p.params, dim), (batch, steps, dim, dim))
    M = np.zeros((batch, steps, dim, steps, dim))
    for t in range(steps):
        M[:, t, :, t, :] = np.eye(dim) - p.gate_or_default[:, t, :, None] * P[:, t]
        if t:
            M[:, t, :, t - 1, :] = -p.lam[:, t, :, None] * np.eye(dim)
    return M.reshape(batch, steps * dim, steps * dim)


# The fixed point


@each_kind
@given(data=st.data())
def test_all_ways_lead_to_the_dense_rnn(kind: Any, data: st.DataObject) -> None:
    p = data.draw(problems(kinds=[kind], ranks=(0, 3)))
    h = solve_dense(*p.system, p.x, p.initial)
    for way in WAYS.values():
        solved = forward(p, **way, **TIGHT)
        assert_close(solved.value, h, 1e-12, p.x, p.initial)


@each_kind
@given(data=st.data())
def test_all_ways_lead_to_the_dense_adjoint(kind: Any, data: st.DataObject) -> None:
    p = data.draw(problems(kinds=[kind], ranks=(0, 3), steps=(0, 6)))
    M = all_steps_at_once(p)
    s = np.linalg.solve(np.swapaxes(M, 1, 2), p.hbar.reshape(*M.shape[:2], 1)).reshape(p.x.shape)
    for way in WAYS.values():
        solved = adjoint(p, **way, **TIGHT)
        assert_close(solved.value, s, 1e-10, p.hbar)


@given(problems(kinds=ALL, steps=(1, 6)))
def test_the_dense_transition_is_what_carries_the_state(p: Problem) -> None:
    free = replace(p, x=np.zeros_like(p.x), initial=np.random.default_rng(0).standard_normal(p.x[:, 0].shape))
    A: Any = dense_transition(*p.system)
    h = solve(*p.system, free.x, free.initial, None, method="direct").value
    state: Any = free.initial
    for t in range(p.x.shape[1]):
        state = np.einsum("bij,bj->bi", A[:, t], state)
        np.testing.assert_allclose(h[:, t], state, rtol=1e-10, atol=1e-12)


@given(problems(kinds=KINDS, gated=False, steps=(1, 4), batches=(1, 2)))
def test_the_dense_transition_of_the_paper(p: Problem) -> None:
    q, dim = mixers.to_dense(p.kind, p.params, p.x.shape[-1]), p.x.shape[-1]
    # for g = 1 - lam: A = (I + (Lam^{-1} - I) Q)^{-1}
    A = np.linalg.inv(np.eye(dim) + (1 / p.lam - 1)[..., None] * q)
    np.testing.assert_allclose(dense_transition(*p.system), A, rtol=1e-8, atol=1e-9)


# Gradients


@each_kind
@given(data=st.data(), seed=seeds())
def test_the_exact_gradient(kind: Any, data: st.DataObject, seed: int) -> None:
    p = data.draw(problems(kinds=[kind], steps=(0, 6)))
    primals = [p.lam, p.gate, p.x, p.initial, *p.params]
    tangents = like(np.random.default_rng(seed), primals)
    h, s = forward(p, method="direct").value, adjoint(p, method="direct").value
    lam_bar, gate_bar, x_bar, initial_bar, params_bar = rnn_cotangents(*p.system, p.x, p.initial, h, s)
    bars = [lam_bar, gate_bar, x_bar, initial_bar, *params_bar]
    for bar, primal in zip(bars, primals, strict=True):
        assert primal is None or (bar is not None and bar.shape == primal.shape)
    assert initial_bar.shape == (p.x.shape[0], p.x.shape[2])

    def fixed_point(lam: Array, gate: Any, x: Array, initial: Any, *params: Array) -> Array:
        return solve_dense(p.kind, params, lam, gate, x, initial)

    assert_transposed((p.hbar, complex_step(fixed_point, primals, tangents)), (bars, tangents), rtol=1e-10)


@given(problems(kinds=KINDS, steps=(1, 6), batches=(1, 2)), seeds())
def test_the_exact_gradient_is_the_limit_of_the_unrolled_one(p: Problem, seed: int) -> None:
    primals = [p.lam, p.gate, p.x, p.initial, *p.params]
    tangents = like(np.random.default_rng(seed), primals)
    h, s = forward(p, **TIGHT), adjoint(p, **TIGHT)
    lam_bar, gate_bar, x_bar, initial_bar, params_bar = rnn_cotangents(
        *p.system, p.x, p.initial, h.value, s.value
    )

    def unrolled(lam: Array, gate: Any, x: Array, initial: Any, *params: Array) -> Array:
        h = np.zeros_like(p.x)
        for _ in range(int(s.iterations.max()) + 50):
            h = iterate(p.kind, params, lam, gate, x, initial, h)
        return h

    exact = ([lam_bar, gate_bar, x_bar, initial_bar, *params_bar], tangents)
    assert_transposed((p.hbar, complex_step(unrolled, primals, tangents)), exact, rtol=1e-10)


@given(problems(kinds=LOW_RANK, steps=(1, 5), batches=(1, 2), dims=(2, 4)), seeds())
def test_the_exact_gradient_against_central_differences(p: Problem, seed: int) -> None:
    arrays: list[Any] = [p.lam, p.gate, p.x, p.initial, *p.params]
    tangents = like(np.random.default_rng(seed), arrays)
    h, s = forward(p, **TIGHT).value, adjoint(p, **TIGHT).value
    lam_bar, gate_bar, x_bar, initial_bar, params_bar = rnn_cotangents(*p.system, p.x, p.initial, h, s)

    def loss(e: float) -> float:
        moved: list[Any] = [None if a is None else a + e * t for a, t in zip(arrays, tangents, strict=True)]
        lam, gate, x, initial, *params = moved
        return dot(p.hbar, solve(p.kind, tuple(params), lam, gate, x, initial, h, **TIGHT).value)

    e = 1e-5
    slope = dot([lam_bar, gate_bar, x_bar, initial_bar, *params_bar], tangents)
    assert abs((loss(e) - loss(-e)) / (2 * e) - slope) <= 1e-6 * max(1.0, abs(slope), abs(loss(0.0)))


@each_kind
@given(data=st.data(), seed=seeds())
def test_the_adjoint_iteration_is_the_transpose(kind: Any, data: st.DataObject, seed: int) -> None:
    p = data.draw(problems(kinds=[kind]))
    rng = np.random.default_rng(seed)
    s, w = rng.standard_normal(p.x.shape), rng.standard_normal(p.x.shape)
    # S^T (hbar + P^T (g s)) . w = hbar . S w + s . (g P S w)
    Sw = linear_scan(p.lam, w)
    PSw = Sw - mixers.apply(p.kind, p.params, Sw)
    assert_transposed(
        (iterate_adjoint(*p.system, p.hbar, s), w), ([p.hbar, s], [Sw, p.gate_or_default * PSw])
    )


@given(problems(kinds=ALL))
def test_one_step_and_neumann_gradients(p: Problem) -> None:
    zero = np.zeros_like(p.x)
    one_step = iterate_adjoint(*p.system, p.hbar, zero)
    np.testing.assert_array_equal(
        one_step, adjoint(p, max_iter=1).value, err_msg="one iteration is the one-step gradient"
    )
    after = np.concatenate([p.lam[:, 1:], np.zeros_like(p.lam[:, :1])], axis=1)
    np.testing.assert_array_equal(one_step, linear_scan(after, p.hbar, reverse=True))
    s, term = one_step, one_step
    for k in range(1, 4):
        term = iterate_adjoint(*p.system, zero, term)
        s = s + term
        np.testing.assert_allclose(adjoint(p, max_iter=k + 1, rtol=0).value, s, rtol=1e-9, atol=1e-11)


@each_way
@pytest.mark.parametrize("guess", [False, True])
def test_a_zero_cotangent_has_exactly_the_answer_zero(way: dict[str, Any], guess: bool) -> None:
    for kind in ALL:
        p = replace(problem(0, kind, gated=True), hbar=np.zeros((2, 7, 6)))
        solved = adjoint(p, p.h if guess else None, **way)
        assert (solved.status == CONVERGED).all()
        assert not solved.value.any()
        assert not solved.residual.any() or way["method"] == "direct"


# The iteration


@each_kind
def test_one_iteration_is_the_diagonal_rnn(kind: Any) -> None:
    p = problem(0, kind, gated=True)
    solved = forward(p, max_iter=1)
    diagonal = linear_scan(p.lam, p.gate_or_default * mixers.apply(p.kind, p.params, p.x), p.initial)
    np.testing.assert_array_equal(solved.value, diagonal)
    np.testing.assert_array_equal(solved.iterations, 1)
    np.testing.assert_array_equal(solved.status, MAX_ITER)


def test_parallel_is_the_iteration_repeated() -> None:
    p = problem(1, "kronecker")
    h = p.h
    for _ in range(4):
        h = iterate(*p.system, p.x, p.initial, h)
    solved = forward(p, p.h, max_iter=4, rtol=0)
    np.testing.assert_array_equal(solved.value, h)
    change = np.abs(iterate(*p.system, p.x, p.initial, h) - h).max(axis=(1, 2))
    again = forward(p, h, max_iter=1, rtol=0)
    np.testing.assert_allclose(again.residual, change / np.abs(again.value).max(axis=(1, 2)), rtol=1e-12)


@given(problems(kinds=KINDS, batches=(1, 3), steps=(1, 12)))
def test_parallel_is_one_chunk_and_sequential_is_chunks_of_one(p: Problem) -> None:
    for run in RUNS:
        whole, each = run(p), run(p, method="sequential")
        for chunk in (p.x.shape[1], 50, None):
            for a, b in zip(whole, run(p, method="chunked", chunk=chunk), strict=True):
                np.testing.assert_array_equal(a, b)
        for a, b in zip(each, run(p, method="chunked", chunk=1), strict=True):
            np.testing.assert_array_equal(a, b)


@iterative
def test_a_converged_warm_start_costs_one_check(way: dict[str, Any]) -> None:
    for kind in ALL:
        p = problem(2, kind)
        for run in RUNS:
            found = run(p, rtol=1e-13, **way)
            again = run(p, found.value, rtol=1e-9, **way)
            np.testing.assert_array_equal(again.iterations, 1)
            np.testing.assert_array_equal(again.chunk_iterations, 1)
            np.testing.assert_array_equal(again.status, CONVERGED)


@iterative
def test_a_looser_tolerance_takes_no_more_iterations(way: dict[str, Any]) -> None:
    p = problem(3, "householder", batch=4, steps=20, gated=True)
    for run in RUNS:
        counts = [run(p, rtol=rtol, **way).chunk_iterations for rtol in (1e-12, 1e-9, 1e-6, 1e-3, 1e-1)]
        for tight, loose in pairwise(counts):
            assert (loose <= tight).all()


@iterative
@given(p=problems(kinds=ALL, batches=(1, 3), steps=(1, 30)), rtol=st.sampled_from([1e-2, 1e-5, 1e-9]))
def test_the_whole_sequence_meets_the_tolerance(way: dict[str, Any], p: Problem, rtol: float) -> None:
    for run in RUNS:
        solved = run(p, rtol=rtol, **way)
        assert (solved.status == CONVERGED).all()
        again = (
            iterate(*p.system, p.x, p.initial, solved.value)
            if run is forward
            else iterate_adjoint(*p.system, p.hbar, solved.value)
        )
        change = np.abs(again - solved.value).max(axis=(1, 2))
        # what is tested is the change before the last iteration, which may still grow by the gate times P
        assert (change <= 1.5 * rtol * np.abs(solved.value).max(axis=(1, 2)) + 1e-13).all()
        assert (solved.residual <= rtol).all()


def test_counts_are_in_the_order_of_time() -> None:
    p = problem(4, "dplr", steps=10, initial=False)
    quiet = replace(p, x=p.x.copy(), hbar=p.hbar.copy())
    quiet.x[:, :4] = 0
    quiet.hbar[:, 8:] = 0
    for run, at in ((forward, [0, 1]), (adjoint, [4])):
        solved = run(quiet, method="chunked", chunk=2)
        assert solved.chunk_iterations.shape == (2, 5)
        assert (solved.chunk_iterations[:, at] == 1).all()
        others = np.delete(solved.chunk_iterations, at, axis=1)
        assert (others > 1).all()
        np.testing.assert_array_equal(solved.iterations, solved.chunk_iterations.max(axis=1))


def test_damping_mixes_a_step_with_what_it_came_from() -> None:
    p = problem(5, "monarch")
    undamped, damped = forward(p, p.h, max_iter=1).value, forward(p, p.h, max_iter=1, damping=0.25)
    np.testing.assert_allclose(damped.value, 0.75 * p.h + 0.25 * undamped, rtol=1e-14, atol=1e-15)
    change = np.abs(undamped - p.h).max(axis=(1, 2)) / np.abs(damped.value).max(axis=(1, 2))
    np.testing.assert_allclose(damped.residual, change, rtol=1e-14, err_msg="the change is told undamped")
    for run in RUNS:
        slow, quick = run(p, damping=0.5, **TIGHT), run(p, **TIGHT)
        assert_close(slow.value, quick.value, 1e-12)
        assert (slow.iterations > quick.iterations).all()


def test_damping_may_save_what_would_diverge() -> None:
    # P = -1.5 I: the undamped step changes sign and grows
    x, lam, gate = np.ones((1, 1, 2)), np.full((1, 1, 2), 0.5), np.ones((1, 1, 2))
    params = (2.5 * np.eye(2),)
    assert solve("fixed", params, lam, gate, x, None, None, max_iter=5000).status == DIVERGED
    saved = solve("fixed", params, lam, gate, x, None, None, damping=0.5, **TIGHT)
    assert saved.status == CONVERGED
    assert_close(saved.value, solve_dense("fixed", params, lam, gate, x, None), 1e-13)


# What one sequence or step has to do with another


@each_way
def test_the_future_changes_no_bit_of_the_past(way: dict[str, Any]) -> None:
    for kind in ALL:
        p = problem(6, kind, steps=9)
        how = {**way, "max_iter": 6, "rtol": 0.0}  # a count that the later steps have no say in
        h = forward(p, **how).value
        x = p.x.copy()
        x[:, 6:] *= -2
        np.testing.assert_array_equal(forward(replace(p, x=x), **how).value[:, :6], h[:, :6])
        np.testing.assert_array_equal(forward(p.until(6), **how).value, h[:, :6])


@each_way
def test_sequences_come_out_in_the_order_they_went_in(way: dict[str, Any]) -> None:
    for kind in ALL:
        p, order = problem(7, kind, batch=3), [2, 0, 1]
        for run in RUNS:
            whole, permuted = run(p, **way), run(p.take(order), **way)
            for a, b in zip(whole, permuted, strict=True):
                np.testing.assert_array_equal(a[order], b)


@each_way
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_sequence_leaves_the_others_bitwise_alone(way: dict[str, Any], bad: float) -> None:
    for kind in ALL:
        p = problem(8, kind, batch=3, steps=6)
        spoilt = replace(p, x=p.x.copy(), hbar=p.hbar.copy())
        spoilt.x[1, 4, 2] = spoilt.hbar[1, 4, 2] = bad
        for run in RUNS:
            before, after = run(p, **way), run(spoilt, **way)
            for a, b in zip(before, after, strict=True):
                np.testing.assert_array_equal(a[[0, 2]], b[[0, 2]])
            np.testing.assert_array_equal(after.status, [CONVERGED, NONFINITE_INPUT, CONVERGED])
            assert not np.isfinite(after.residual[1])
            assert after.iterations[1] <= before.iterations[1], "left early"


@each_way
def test_a_bad_mixer_or_state_is_bad_input(way: dict[str, Any]) -> None:
    for kind in ALL:
        p = problem(9, kind, batch=1)
        p.params[0].flat[0] = np.nan
        assert forward(p, **way).status == NONFINITE_INPUT
        assert adjoint(p, **way).status == NONFINITE_INPUT
    p = problem(9, "dplr", batch=1)
    assert forward(replace(p, initial=np.full((1, 6), np.inf)), **way).status == NONFINITE_INPUT
    assert forward(replace(p, lam=p.lam * np.nan), **way).status == NONFINITE_INPUT


@iterative
def test_a_divergent_mixer_is_said_to_diverge(way: dict[str, Any]) -> None:
    p = problem(10, "dense", batch=3)
    params = (p.params[0].copy(),)
    params[0][1] = 5 * np.eye(6)  # P = -4 I
    wild = replace(p, params=params, gate=np.ones_like(p.x))
    for run in RUNS:
        np.testing.assert_array_equal(run(wild, **way).status, [CONVERGED, DIVERGED, CONVERGED])
        np.testing.assert_array_equal(run(wild, max_iter=60, **way).status, [CONVERGED, MAX_ITER, CONVERGED])


def test_an_overflow_is_no_convergence() -> None:
    # from finite to infinite in one iteration: change, size and tolerance are all inf
    x = np.full((1, 3, 1), 1e308)
    for way in WAYS.values():
        solved = solve(
            "fixed", (np.eye(1),), np.full((1, 3, 1), 0.99), np.ones((1, 3, 1)), x, None, None, **way
        )
        assert solved.status == DIVERGED


# The direct way


@given(problems(kinds=LOW_RANK, ranks=(1, 1), bound=2.0, steps=(0, 10)))
def test_direct_exists_where_the_iteration_need_not_converge(p: Problem) -> None:
    h = forward(p, method="direct")
    # alpha up to 2: P has norm 2, and 1 - alpha sum(g u u) may come near zero
    fine = h.status == CONVERGED
    residual = iterate(*p.system, p.x, p.initial, h.value) - h.value
    assert np.abs(residual[fine]).max(initial=0) <= 1e-9 * (1 + np.abs(h.value[fine]).max(initial=0))


@pytest.mark.parametrize("kind", ["dplr", "householder", "dense"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(
    ("off", "status"), [(0.0, ILL_CONDITIONED), (1e-14, ILL_CONDITIONED), (1e-6, CONVERGED)]
)
def test_direct_says_that_a_step_is_nearly_singular(kind: str, rank: int, off: float, status: int) -> None:
    params: tuple[Array, ...] = np.eye(3)[None, None, :rank].repeat(2, axis=1), np.full((1, 2, rank), 1 - off)
    if kind == "dense":
        params = (mixers.to_dense("dplr", params, 3),)
    lam, gate, x = np.full((1, 2, 3), 0.5), np.ones((1, 2, 3)), np.ones((1, 2, 3))
    h = solve(kind, params, lam, gate, x, np.ones((1, 3)), None, method="direct")
    s = solve_adjoint(kind, params, lam, gate, x, None, method="direct")
    assert h.status == s.status == status
    assert bool(h.residual <= 1e-9) == (status == CONVERGED)  # NaN where there is no answer
    if off == 0:
        assert np.isnan(h.value).any()


@pytest.mark.parametrize("alpha", [0.5, 1.9, 1 - 1e-6, -3.0])
def test_the_condition_of_a_single_reflection(alpha: float) -> None:
    ones = np.ones((1, 1, 2))
    h = solve(
        "dplr",
        (ones[:, :, None] / 2**0.5, alpha * ones[..., :1]),
        ones,
        ones,
        ones,
        None,
        None,
        method="direct",
    )
    np.testing.assert_allclose(h.residual, 2.0**-52 * (1 + abs(alpha)) / abs(1 - alpha), rtol=1e-8)


def test_the_dense_oracle_agrees_with_a_negative_eigenvalue() -> None:
    # alpha near 2 and small lam: what the dense RNN can and the diagonal one cannot
    u = np.full((1, 1, 1, 2), 0.5**0.5)
    A = dense_transition("householder", (u, np.full((1, 1, 1), 1.9)), np.full((1, 1, 2), 0.2), None)
    assert np.linalg.eigvals(A[0, 0]).real.min() < 0


# Shapes, dtypes, bad arguments


@each_way
def test_leading_axes_broadcast(way: dict[str, Any]) -> None:
    rng = np.random.default_rng(11)
    params = mixer_params(rng, "householder", 2, 5, 6)
    lam, gate = rng.uniform(0.1, 0.9, (5, 6)), rng.uniform(0.1, 0.9, (3, 1, 1, 6))
    x, initial = rng.standard_normal((2, 5, 6)), rng.standard_normal((3, 1, 6))
    full: Any = [np.broadcast_to(a, (3, 2, 5, 6)).reshape(6, 5, 6) for a in (lam, gate, x)]
    flat = tuple(np.broadcast_to(p, (3, *p.shape)).reshape(6, *p.shape[1:]) for p in params)
    flat_initial = np.broadcast_to(initial, (3, 2, 6)).reshape(6, 6)

    h = solve("householder", params, lam, gate, x, initial, None, **way)
    assert h.value.shape == (3, 2, 5, 6)
    assert h.iterations.shape == h.residual.shape == h.status.shape == h.chunk_iterations.shape[:-1] == (3, 2)
    same = solve(*["householder", flat, *full, flat_initial, None], **way)
    np.testing.assert_array_equal(h.value.reshape(6, 5, 6), same.value)
    hbar = rng.standard_normal(h.value.shape)
    s = solve_adjoint("householder", params, lam, gate, hbar, None, **way)

    bars = rnn_cotangents("householder", params, lam, gate, x, initial, h.value, s.value)
    flat_bars = rnn_cotangents(
        *["householder", flat, *full, flat_initial, same.value, s.value.reshape(6, 5, 6)]
    )
    for bar, primal, whole in zip(
        (*bars[:4], *bars[4]), (lam, gate, x, initial, *params), (*flat_bars[:4], *flat_bars[4]), strict=True
    ):
        assert bar is not None
        assert whole is not None
        assert bar.shape == primal.shape
        np.testing.assert_allclose(bar.sum(), whole.sum(), rtol=1e-10, atol=1e-12)


@each_way
@each_kind
@pytest.mark.parametrize(("batch", "steps"), [(0, 4), (2, 0), (2, 1), (0, 0)])
def test_empty_and_short(way: dict[str, Any], kind: Any, batch: int, steps: int) -> None:
    p = problem(12, kind, batch=batch, steps=steps)
    for run in RUNS:
        solved = run(p, **way)
        chunks = {"parallel": 1, "direct": 1, "sequential": steps, "chunked": -(-steps // 3)}[way["method"]]
        assert solved.value.shape == (batch, steps, 6)
        assert solved.chunk_iterations.shape == (batch, chunks if steps else 0)
        assert solved.iterations.dtype == solved.chunk_iterations.dtype == np.int64
        assert (str(solved.residual.dtype), str(solved.status.dtype)) == ("float64", "int8")
        np.testing.assert_array_equal(solved.status, CONVERGED)
        if steps == 0:
            np.testing.assert_array_equal(solved.iterations, 0)
            np.testing.assert_array_equal(solved.residual, 0)
    bars = rnn_cotangents(*p.system, p.x, p.initial, p.h, p.hbar)
    if steps == 0:
        assert not bars[3].any()


def test_a_single_sequence_needs_no_leading_axis() -> None:
    p = problem(13, "dplr", batch=1)
    params = tuple(q[0] for q in p.params)
    assert p.initial is not None
    alone: Any = solve("dplr", params, p.lam[0], None, p.x[0], p.initial[0], None)
    whole: Any = forward(p)
    for a, b in zip(alone, whole, strict=True):
        np.testing.assert_array_equal(a, b[0])


@each_way
@each_kind
def test_float32_stays_float32_and_inputs_are_only_read(way: dict[str, Any], kind: Any) -> None:
    p = problem(14, kind, dtype=np.float32)
    for array in (*p.params, p.lam, p.x, p.initial, p.hbar, p.h):
        assert array is not None
        array.flags.writeable = False
    h, s = forward(p, p.h, **way), adjoint(p, p.h, **way)
    assert (h.status == CONVERGED).all()
    assert (s.status == CONVERGED).all()
    bars = rnn_cotangents(*p.system, p.x, p.initial, h.value, s.value)
    made = (h.value, s.value, bars[0], *bars[2:4], *bars[4])
    assert {a.dtype for a in made if a is not None} == {np.dtype(np.float32)}
    assert_close(h.value, solve_dense(*p.astype(np.float64).system, p.x, p.initial), 1e-4)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"method": "newton"}, "method: 'newton'; expected 'parallel'"),
        ({"chunk": 0, "method": "chunked"}, "chunk: 0; expected one"),
        ({"max_iter": 0}, "max_iter: 0; expected one"),
    ],
)
def test_bad_arguments_are_named(how: dict[str, Any], message: str) -> None:
    p = problem(0, "dplr")
    for run in RUNS:
        with pytest.raises(ValueError, match=message):
            run(p, **how)
