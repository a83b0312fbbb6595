"""`fp.Solver` and `fp.Adjoint`: options, the rules of `auto`, every policy, and what is said of a failure."""

import warnings
from typing import Any

import numpy as np
import pytest
from hall import ROOMS, TIGHT, assert_close, extras, in_room, inputs, mixer_of
from hypothesis import given
from hypothesis import strategies as st
from strategies import KINDS, problem, problems, seeds

import fpnumba as fp
from fpnumba.relax import relax
from fpnumba.solve import Solution, report

rooms = pytest.mark.parametrize("room", ROOMS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"method": "newton"},
            ValueError,
            "`method`: got 'newton', expected one of 'auto', 'parallel', 'chunked'",
        ),
        ({"rtol": -1e-3}, ValueError, "`rtol`: got -0.001, expected a number of at least 0"),
        ({"rtol": float("nan")}, ValueError, "`rtol`"),
        ({"rtol": "1e-3"}, TypeError, "`rtol`: got '1e-3'"),
        ({"atol": float("inf")}, ValueError, "`atol`"),
        ({"max_iter": 0}, ValueError, "`max_iter`: got 0, expected at least 1"),
        ({"max_iter": 2.5}, TypeError, "`max_iter`: got 2.5, expected a whole number"),
        ({"max_iter": True}, TypeError, "`max_iter`"),
        ({"chunk": 0}, ValueError, "`chunk`: got 0"),
        ({"method": "parallel", "chunk": 8}, ValueError, "`chunk`: needs method 'chunked'"),
        ({"damping": 0.0}, ValueError, r"`damping`: got 0.0, expected a number in \(0, 1\]"),
        ({"damping": 1.5}, ValueError, "`damping`"),
        ({"damping_decay": 0}, ValueError, "`damping_decay`"),
        ({"damping_patience": 0}, ValueError, "`damping_patience`"),
        ({"quantile": 0.0}, ValueError, "`quantile`"),
        ({"quantile": 0.5, "method": "chunked"}, ValueError, "`quantile`: needs method 'parallel'"),
        ({"quantile": 0.5, "chunk": 4}, ValueError, "`quantile`: needs method 'parallel' .*method='chunked'"),
        ({"quantile": 0.5, "method": "direct"}, ValueError, "`quantile`: needs"),
        ({"acceleration": "anderson", "method": "sequential"}, ValueError, "`acceleration`: needs"),
        ({"acceleration": "aitken"}, ValueError, "`acceleration`: got 'aitken'"),
        ({"damping_decay": 0.9, "method": "direct"}, ValueError, "`damping_decay`: needs"),
        ({"criterion": "published", "method": "direct"}, ValueError, "`criterion`: needs"),
        ({"criterion": "l2"}, ValueError, "`criterion`: got 'l2'"),
        ({"memory": 0}, ValueError, "`memory`"),
        (
            {"on_failure": "panic"},
            ValueError,
            "`on_failure`: got 'panic', expected one of 'warn', 'raise', 'ignore'",
        ),
    ],
)
def test_solver_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fp.Solver(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "exact"}, "`method`: got 'exact', expected one of 'implicit', 'one-step', 'neumann'"),
        ({"method": "neumann"}, "`terms`: method 'neumann' needs a number of terms"),
        ({"method": "neumann", "terms": 0}, "`terms`: got 0"),
        ({"terms": 3}, "`terms`: is for method 'neumann', got method='implicit'"),
        ({"rtol": -1.0}, "`rtol`"),
        ({"on_failure": ""}, "`on_failure`"),
    ],
)
def test_adjoint_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp.Adjoint(**options)


def test_options_are_values() -> None:
    assert fp.Solver(rtol=1e-3) == fp.Solver(rtol=1e-3)
    with pytest.raises(AttributeError):
        fp.Solver().rtol = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("solver", "rank", "forward", "backward"),
    [
        (fp.Solver(), 1, "direct", "direct"),
        (fp.Solver(), 8, "direct", "direct"),
        (fp.Solver(), 9, "chunked", "chunked"),
        (fp.Solver(), None, "chunked", "chunked"),
        (fp.Solver(chunk=16), 1, "chunked", "chunked"),
        (fp.Solver(max_iter=8), 1, "parallel", "direct"),
        (fp.Solver(max_iter=8), None, "parallel", "chunked"),
        (fp.Solver(quantile=0.75), 1, "parallel", "direct"),
        (fp.Solver(acceleration="anderson"), None, "parallel", "chunked"),
        (fp.Solver(damping_decay=0.9), 2, "parallel", "direct"),
        (fp.Solver(criterion="published"), 2, "parallel", "direct"),
        (fp.Solver("parallel"), 1, "parallel", "parallel"),
        (fp.Solver("sequential"), 1, "sequential", "sequential"),
        (fp.Solver("direct"), 20, "direct", "direct"),
    ],
)
def test_auto_follows_its_rules(solver: fp.Solver, rank: int | None, forward: str, backward: str) -> None:
    assert solver.way(rank) == forward
    assert solver.adjoint_way(rank) == backward


@rooms
def test_auto_says_what_it_took(room: str) -> None:
    taken = {}
    with in_room(room):
        for kind in KINDS:
            p = problem(0, kind, batch=1, steps=3, dim=4)
            taken[kind] = fp.fixed_point_rnn(*inputs(p)).method
    assert taken == {
        "dplr": "direct",
        "householder": "direct",
        "kronecker": "chunked",
        "monarch": "chunked",
        "dense": "chunked",
        "fixed": "chunked",
    }


def test_a_direct_solve_that_does_not_exist_is_refused_by_name() -> None:
    p = problem(0, "kronecker", batch=1, steps=3, dim=4)
    with pytest.raises(ValueError, match=r"(?i)kronecker"):
        fp.fixed_point_rnn(*inputs(p), solver=fp.Solver("direct"))


# The policies


@rooms
@given(problems(kinds=KINDS, batches=(1, 3)))
@pytest.mark.parametrize(
    "options",
    [
        {"acceleration": "anderson"},
        {"acceleration": "anderson", "memory": 2, "damping": 0.7},
        {"quantile": 1.0},
        {"damping": 0.6},
        {"damping_decay": 0.9, "damping_patience": 3},
        {"criterion": "published"},
        {"criterion": "published", "damping": 0.99, "damping_decay": 0.9},
    ],
    ids=str,
)
def test_every_policy_finds_the_same_point(room: str, options: dict[str, Any], p: Any) -> None:
    with in_room(room):
        expected = fp.fixed_point_rnn(*inputs(p), **extras(p), solver=TIGHT["solver"]).value
        solution = fp.fixed_point_rnn(
            *inputs(p), **extras(p), solver=fp.Solver("parallel", rtol=1e-12, max_iter=5000, **options)
        )
    assert solution.converged.all()
    assert_close(solution.value, expected, 1e-9)


@rooms
def test_the_loop_in_hand_is_the_loop_of_the_room(room: str) -> None:
    p = problem(0, "kronecker", batch=3, steps=9, dim=6)
    with in_room(room):
        here = fp.fixed_point_rnn(*inputs(p), **extras(p), solver=fp.Solver("parallel", quantile=1.0))
        there = fp.fixed_point_rnn(*inputs(p), **extras(p), solver=fp.Solver("parallel"))
    np.testing.assert_array_equal(here.iterations, there.iterations)
    assert_close(here.value, there.value, 1e-13)
    assert here.history is not None
    assert here.history.shape == (here.iterations.max(), 3)
    assert there.history is None
    # A sequence that is done rests: its last residual stays
    np.testing.assert_allclose(here.history[-1], here.residual)
    np.testing.assert_allclose(here.residual, there.residual, rtol=1e-6)


@rooms
def test_anderson_needs_fewer_iterations_where_contraction_is_slow(room: str) -> None:
    p = problem(0, "dense", batch=4, steps=8, dim=8, bound=0.97, gated=True)
    p.gate[:] = 1.0  # type: ignore[index]
    with in_room(room):
        plain = fp.fixed_point_rnn(*inputs(p), **extras(p), solver=fp.Solver("parallel"))
        fast = fp.fixed_point_rnn(*inputs(p), **extras(p), solver=fp.Solver(acceleration="anderson"))
    assert fast.converged.all()
    assert fast.iterations.sum() < 0.8 * plain.iterations.sum()


def test_anderson_forgets_where_the_past_misleads() -> None:
    # A kink: what was learned on one side is wrong on the other
    def step(h: Any) -> Any:
        return np.where(h < 1.0, 0.9 * h + 0.3, 0.2 * h + 1.0)

    plain, _ = relax(step, np.full((2, 1, 3), -50.0), fp.Solver(rtol=1e-10), lambda b: True)
    fast, _ = relax(
        step, np.full((2, 1, 3), -50.0), fp.Solver(rtol=1e-10, acceleration="anderson"), lambda b: True
    )
    assert (fast.status == fp.Status.CONVERGED).all()
    assert_close(fast.value, plain.value, 1e-8)


@rooms
@given(seeds(), st.integers(0, 3))
@pytest.mark.parametrize(
    "options", [{"acceleration": "anderson"}, {"damping_decay": 0.9, "damping_patience": 2}], ids=str
)
def test_policies_keep_sequences_apart(room: str, options: dict[str, Any], seed: int, bad: int) -> None:
    p = problem(seed, "monarch", batch=4, steps=5, dim=4)
    solver = fp.Solver(on_failure="ignore", **options)
    with in_room(room):
        clean = fp.fixed_point_rnn(*inputs(p), **extras(p), solver=solver)
        p.x[bad, 1, 0] = np.nan
        dirty = fp.fixed_point_rnn(*inputs(p), **extras(p), solver=solver)
    others = [b for b in range(4) if b != bad]
    np.testing.assert_array_equal(dirty.value[others], clean.value[others])
    np.testing.assert_array_equal(dirty.iterations[others], clean.iterations[others])
    assert dirty.status[bad] == fp.Status.NONFINITE_INPUT
    assert dirty.iterations[bad] == 1


def _rates(*rates: float) -> Any:
    """Sequences that contract at these rates, towards one."""
    factor = np.array(rates)[:, None, None]
    return lambda h: factor * h + (1 - factor)


def test_quantile_stops_the_batch_when_enough_have_converged() -> None:
    start = np.zeros((4, 1, 1))
    step = _rates(0.1, 0.2, 0.5, 0.999)
    everyone, _ = relax(step, start, fp.Solver(rtol=1e-4, max_iter=20_000), lambda b: True)
    most, history = relax(step, start, fp.Solver(rtol=1e-4, max_iter=20_000, quantile=0.75), lambda b: True)
    np.testing.assert_array_equal(most.iterations[:3], everyone.iterations[:3])
    assert most.iterations[3] == everyone.iterations[2] == len(history)
    assert most.status.tolist() == [0, 0, 0, fp.Status.MAX_ITER]
    # That one is late is what was asked for
    report("f", _solution(most), "raise", quantile=0.75)
    with pytest.raises(fp.ConvergenceError, match=r"1 of 4 sequences did not converge. 1 MAX_ITER"):
        report("f", _solution(most), "raise", quantile=1.0)


def _solution(solved: Any) -> Solution:
    return Solution(
        solved.value, solved.status, solved.iterations, solved.residual, "parallel", solved.chunk_iterations
    )


def test_quantile_does_not_wait_for_what_is_not_finite() -> None:
    def step(h: Any) -> Any:
        new = _rates(0.1, 0.2, 0.5)(h)
        new[1] = np.nan
        return new

    solved, _ = relax(step, np.zeros((3, 1, 1)), fp.Solver(quantile=1.0), lambda b: False)
    assert solved.status.tolist() == [0, fp.Status.NONFINITE_INPUT, 0]
    with pytest.raises(fp.ConvergenceError, match=r"1 NONFINITE_INPUT"):
        report("f", _solution(solved), "raise", quantile=0.5)


def test_divergence_is_told_from_bad_input() -> None:
    solved, _ = relax(lambda h: 1e200 * h + 1, np.zeros((1, 2, 1)), fp.Solver(), lambda b: True)
    assert solved.status.tolist() == [fp.Status.DIVERGED]
    assert solved.iterations.tolist() < [5]


def test_damping_schedule() -> None:
    # h <- -1.2 h + 2.2 diverges undamped; smaller steps converge
    def step(h: Any) -> Any:
        return -1.2 * h + 2.2

    lost, _ = relax(step, np.zeros((1, 1, 1)), fp.Solver(max_iter=200), lambda b: True)
    assert lost.status.tolist() == [fp.Status.MAX_ITER]
    found, history = relax(
        step,
        np.zeros((1, 1, 1)),
        fp.Solver(max_iter=200, damping_decay=0.8, damping_patience=3),
        lambda b: True,
    )
    assert found.status.tolist() == [fp.Status.CONVERGED]
    assert_close(found.value, np.ones((1, 1, 1)), 1e-5)
    assert history[-1, 0] < 1e-5


def _published(
    step: Any, y: Any, *, size: float, decay: float, patience: int, thresh: float, q: float, most: int
) -> Any:
    """The published optimiser, from its description in section 8 of docs/mathematics.md."""
    batch = y.shape[0]
    lowest, sizes, left, count = np.full(batch, np.inf), np.full(batch, size), np.full(batch, patience), 0
    while count == 0 or (np.quantile(lowest, q) >= thresh and sizes.max() >= 1e-3 and count < most):
        new = step(y)
        residual = (np.abs(y - new).max(-1) / (np.abs(new).max(-1) + 1e-8)).max(-1)
        y = sizes[:, None, None] * new + (1 - sizes[:, None, None]) * y
        left = np.where(residual < lowest, patience, left - 1)
        lowest = np.minimum(lowest, residual)
        sizes = np.where(left == 0, decay * sizes, sizes)
        left = np.where(left == 0, patience, left)
        count += 1
    return y, count


@given(seeds(), st.sampled_from([0.75, 1.0]), st.sampled_from([1e-1, 1e-6]))
def test_published_criterion(seed: int, quantile: float, thresh: float) -> None:
    rng = np.random.default_rng(seed)
    q, target = rng.uniform(-1.2, 0.9, (5, 1, 4)), rng.standard_normal((5, 3, 4))

    def step(h: Any) -> Any:
        return q * h + (1 - q) * target

    start = np.zeros((5, 3, 4))
    y, count = _published(step, start, size=0.99, decay=0.9, patience=4, thresh=thresh, q=quantile, most=60)
    solver = fp.Solver(
        criterion="published",
        quantile=quantile,
        rtol=thresh,
        damping=0.99,
        damping_decay=0.9,
        damping_patience=4,
        max_iter=60,
    )
    solved, history = relax(step, start, solver, lambda b: True)
    assert len(history) == count
    np.testing.assert_allclose(solved.value, y, rtol=1e-12, atol=1e-12)


def test_published_criterion_gives_up_when_steps_are_tiny() -> None:
    solver = fp.Solver(criterion="published", damping_decay=0.5, damping_patience=1, max_iter=1000)
    # A residual that is one half for ever: no iteration improves on it
    solved, history = relax(lambda h: 2 * h, np.ones((1, 1, 1)), solver, lambda b: True)
    assert solved.status.tolist() == [fp.Status.MAX_ITER]
    assert len(history) == 11  # the first one set the mark; 2^-10 is below 1e-3


# What is said


@rooms
def test_messages_say_how_many_and_what_to_do(room: str) -> None:
    p = problem(0, "dense", batch=3, steps=6, dim=4)
    with in_room(room):
        with pytest.warns(fp.ConvergenceWarning) as caught:
            solution = fp.fixed_point_rnn(*inputs(p), solver=fp.Solver(max_iter=3))
        message = str(caught[0].message)
        assert message.startswith(
            "fixed_point_rnn: 3 of 3 sequences did not converge. 3 MAX_ITER after 3 iterations"
        )
        assert "raise max_iter, loosen rtol" in message
        assert caught[0].filename == __file__  # the caller's line, not ours
        assert (solution.status == fp.Status.MAX_ITER).all()
        p.x[1, 0, 0] = np.inf
        with pytest.warns(
            fp.ConvergenceWarning, match=r"1 of 3 .* 1 NONFINITE_INPUT .*the first at 1\): the inputs"
        ):
            fp.fixed_point_rnn(*inputs(p))
        with pytest.raises(fp.ConvergenceError) as error:
            fp.fixed_point_rnn(*inputs(p), solver=fp.Solver(on_failure="raise"))
        assert error.value.solution.status.tolist() == [0, fp.Status.NONFINITE_INPUT, 0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fp.fixed_point_rnn(*inputs(p), solver=fp.Solver(on_failure="ignore"))


def test_every_status_has_a_message() -> None:
    assert len({status.message for status in fp.Status}) == len(fp.Status)
    assert [int(status) for status in fp.Status] == [0, 1, 2, 3, 4]


@rooms
def test_few_iterations_are_a_number(room: str) -> None:
    p = problem(0, "householder", batch=2, steps=12, dim=6, rank=2)
    mixer, gate = mixer_of(p), p.gate_or_default
    with in_room(room):
        solution = fp.fixed_point_rnn(
            p.lam, mixer, p.x, solver=fp.Solver(max_iter=8, rtol=0.0, damping=0.9, on_failure="ignore")
        )
        h = np.zeros_like(p.x)
        for _ in range(8):
            h = 0.1 * h + 0.9 * fp.linear_scan(p.lam, gate * (mixer.apply(p.x - h) + h))
    assert (solution.iterations == 8).all()
    assert_close(solution.value, h, 1e-13)
