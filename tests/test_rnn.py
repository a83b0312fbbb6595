"""`fp.fixed_point_rnn` over every room: all ways to the same fixed point, and what must not change it."""

import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hall import (
    ROOMS,
    TIGHT,
    assert_close,
    assert_same,
    dense_solve,
    dense_system,
    extras,
    in_room,
    inputs,
    mixer_of,
    ways,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import KINDS, RING, Problem, problem, problems, seeds

import fpnumba as fp

ALL = (*KINDS, RING)
rooms = pytest.mark.parametrize("room", ROOMS)
METHODS = ("parallel", "chunked", "sequential", "direct")


def _solver(method: str, **options: object) -> fp.Solver:
    chunk = {"chunk": 3} if method == "chunked" else {}
    return fp.Solver(method, **chunk, **options)  # type: ignore[arg-type]


@rooms
@given(problems(kinds=ALL))
def test_all_ways_give_the_dense_solution(room: str, p: Problem) -> None:
    dense = dense_solve(*dense_system(p), p)
    with in_room(room):
        for solver in ways(p, room):
            solution = fp.fixed_point_rnn(*inputs(p), **extras(p), solver=solver)
            assert solution.method == solver.method
            assert solution.converged.all()
            assert_close(solution.value, dense, 1e-12)


@rooms
@given(problems(kinds=("dplr", "householder"), bound=1.95, ranks=(1, 1)))
def test_direct_reaches_beyond_contraction(room: str, p: Problem) -> None:
    # alpha near 2: the iteration would diverge, the solution exists
    p = replace(p, lam=0.6 + 0.35 * p.lam)
    with in_room(room):
        solution = fp.fixed_point_rnn(*inputs(p), **extras(p), solver=fp.Solver("direct"))
    matrix, right = dense_system(p)
    fine = (solution.status == fp.Status.CONVERGED) | (solution.status == fp.Status.ILL_CONDITIONED)
    assert fine.all()
    if right.size:
        condition = float(np.linalg.cond(matrix).max())
        assert_close(solution.value, dense_solve(matrix, right, p), 1e-14 * (10 + condition))


@rooms
@given(problems(kinds=ALL, batches=(1, 2), steps=(1, 12)), st.integers(1, 12))
@pytest.mark.parametrize("method", METHODS)
def test_causal_bitwise(room: str, method: str, p: Problem, until: int) -> None:
    if method == "direct" and p.kind not in ("dplr", "householder"):
        return
    # A fixed number of iterations, so that the rest of the sequence cannot move the stop
    solver = _solver(method, rtol=0.0, max_iter=4, on_failure="ignore")
    until = min(until, p.x.shape[1])
    if method == "chunked":
        until = min(-(-until // 3) * 3, p.x.shape[1])
    rng = np.random.default_rng(0)
    later = replace(p, x=p.x.copy(), lam=p.lam.copy())
    later.x[:, until:] = rng.standard_normal(later.x[:, until:].shape)
    later.lam[:, until:] = rng.uniform(0.1, 0.9, later.x[:, until:].shape)
    with in_room(room):
        one = fp.fixed_point_rnn(*inputs(p), **extras(p), solver=solver).value
        two = fp.fixed_point_rnn(*inputs(later), **extras(later), solver=solver).value
    np.testing.assert_array_equal(one[:, :until], two[:, :until])


@rooms
@given(problems(kinds=ALL, batches=(1, 2), steps=(2, 12)), st.integers(1, 11))
def test_going_on_from_the_final_state(room: str, p: Problem, at: int) -> None:
    at = min(at, p.x.shape[1] - 1)
    head, tail = p.until(at), _after(p, at)
    with in_room(room):
        whole = fp.fixed_point_rnn(*inputs(p), **extras(p), solver=TIGHT["solver"]).value
        first = fp.fixed_point_rnn(*inputs(head), **extras(head), solver=TIGHT["solver"]).value
        tail = replace(tail, initial=np.ascontiguousarray(first[:, -1]))
        second = fp.fixed_point_rnn(*inputs(tail), **extras(tail), solver=TIGHT["solver"]).value
    assert_close(np.concatenate([first, second], axis=1), whole, 1e-12)


def _after(p: Problem, at: int) -> Problem:
    def cut(a: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return np.ascontiguousarray(a[:, at:])

    params = p.params if p.kind == "fixed" else tuple(cut(a) for a in p.params)
    gate = None if p.gate is None else cut(p.gate)
    return replace(p, params=params, lam=cut(p.lam), gate=gate, x=cut(p.x), hbar=cut(p.hbar), h=cut(p.h))


@rooms
@given(problems(kinds=ALL, batches=(1, 4)), st.randoms(use_true_random=False))
@pytest.mark.parametrize("method", ["auto", "parallel", "sequential"])
def test_sequences_do_not_know_their_place(room: str, method: str, p: Problem, random: object) -> None:
    order = list(range(p.x.shape[0]))
    random.shuffle(order)  # type: ignore[attr-defined]
    solver = _solver(method, rtol=1e-9)
    with in_room(room):
        one = fp.fixed_point_rnn(*inputs(p), **extras(p), solver=solver)
        shuffled = p.take(order)
        two = fp.fixed_point_rnn(*inputs(shuffled), **extras(shuffled), solver=solver)
    np.testing.assert_array_equal(one.value[order], two.value)
    np.testing.assert_array_equal(one.iterations[order], two.iterations)


@rooms
@given(problems(kinds=ALL, batches=(1, 2), steps=(1, 12)))
@pytest.mark.parametrize("method", ["parallel", "chunked", "sequential"])
def test_a_warm_start_costs_the_check(room: str, method: str, p: Problem) -> None:
    with in_room(room):
        found = fp.fixed_point_rnn(*inputs(p), **extras(p), solver=TIGHT["solver"])
        again = fp.fixed_point_rnn(
            *inputs(p), **extras(p), guess=found.value, solver=_solver(method, rtol=1e-9)
        )
    assert (again.iterations == 1).all()
    assert (again.chunk_iterations == 1).all()
    assert_close(again.value, found.value, 1e-9)


@rooms
@given(problems(kinds=ALL, batches=(1, 2)))
@pytest.mark.parametrize("method", ["parallel", "chunked", "sequential"])
def test_a_tighter_tolerance_never_takes_fewer_iterations(room: str, method: str, p: Problem) -> None:
    with in_room(room):
        counts = [
            fp.fixed_point_rnn(*inputs(p), **extras(p), solver=_solver(method, rtol=rtol)).iterations
            for rtol in (1e-1, 1e-3, 1e-6, 1e-10)
        ]
    assert all((a <= b).all() for a, b in pairwise(counts))


@rooms
@given(problems(kinds=ALL, batches=(1, 2), steps=(1, 8)))
def test_one_iteration_is_the_diagonal_rnn(room: str, p: Problem) -> None:
    with in_room(room):
        solution = fp.fixed_point_rnn(
            *inputs(p), **extras(p), solver=fp.Solver(max_iter=1, on_failure="ignore")
        )
        diagonal = fp.linear_scan(p.lam, p.gate_or_default * mixer_of(p).apply(p.x), initial=p.initial)
    assert (solution.iterations == 1).all()
    assert_close(solution.value, diagonal, 1e-14)


@rooms
@given(
    seeds(),
    st.sampled_from(ALL),
    st.integers(0, 2),
    st.sampled_from(["x", "lam", "gate", "initial", "mixer"]),
)
@pytest.mark.parametrize("method", METHODS)
def test_nan_stays_in_its_sequence(
    room: str, method: str, seed: int, kind: object, bad: int, where: str
) -> None:
    p = problem(seed, kind, batch=3, steps=7, gated=True)  # type: ignore[arg-type]
    if (method == "direct" and kind not in ("dplr", "householder")) or (where == "mixer" and kind == "fixed"):
        return
    solver = _solver(method, rtol=1e-9, on_failure="ignore")
    with in_room(room):
        clean = fp.fixed_point_rnn(*inputs(p), **extras(p), solver=solver)
        copies = {n: getattr(p, n).copy() for n in ("x", "lam", "gate", "initial")}
        params = tuple(a.copy() for a in p.params)
        (params[0] if where == "mixer" else copies[where])[bad].flat[-1] = np.nan
        p = replace(p, **copies, params=params)
        dirty = fp.fixed_point_rnn(*inputs(p), **extras(p), solver=solver)
    others = [b for b in range(3) if b != bad]
    np.testing.assert_array_equal(dirty.value[others], clean.value[others])
    np.testing.assert_array_equal(dirty.status[others], clean.status[others])
    np.testing.assert_array_equal(dirty.iterations[others], clean.iterations[others])
    assert dirty.status[bad] == fp.Status.NONFINITE_INPUT


@rooms
@pytest.mark.parametrize("kind", [*KINDS, "own"])
@pytest.mark.parametrize("method", ["parallel", "chunked", "sequential"])
def test_a_divergent_mixer_ends_flagged(room: str, method: str, kind: str) -> None:
    p = problem(0, RING if kind == "own" else kind, batch=2, steps=9, dim=4, rank=1, gated=True, bound=0.5)
    wild = 300.0
    if kind in ("dense", "fixed"):
        params = (np.eye(4) - wild * (np.eye(4) - p.params[0]),)
    elif kind == "kronecker":
        params = (wild * p.params[0], p.params[1])
    else:
        params = (p.params[0], wild * p.params[1])
    cls = type(mixer_of(p))
    low_rank = kind in ("dplr", "householder")
    mixer = cls(*params, alpha_max=None) if low_rank else cls(*params)  # type: ignore[call-arg]
    with in_room(room):
        assert mixer.contraction_bound().max() > 1
        with pytest.warns(fp.ConvergenceWarning, match=r"2 of 2 sequences did not converge"):
            solution = fp.fixed_point_rnn(p.lam, mixer, p.x, gate=p.gate, solver=_solver(method))
        assert not solution.converged.any()
        assert set(solution.status.tolist()) <= {fp.Status.DIVERGED, fp.Status.MAX_ITER}
        with pytest.raises(fp.ConvergenceError, match=r"DIVERGED|MAX_ITER") as error:
            fp.fixed_point_rnn(p.lam, mixer, p.x, gate=p.gate, solver=_solver(method, on_failure="raise"))
        assert not error.value.solution.converged.any()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fp.fixed_point_rnn(p.lam, mixer, p.x, gate=p.gate, solver=_solver(method, on_failure="ignore"))


@rooms
def test_a_singular_step_is_ill_conditioned(room: str) -> None:
    # 1 - alpha sum(g u u) = 0
    u, alpha = np.array([[[1.0, 0.0]]]), np.array([[2.0]])
    lam = np.full((1, 2), 0.5)
    with in_room(room), pytest.warns(fp.ConvergenceWarning, match=r"ILL_CONDITIONED"):
        solution = fp.fixed_point_rnn(lam, fp.mixers.DPLR(u, alpha), np.ones((1, 2)))
    assert solution.status == fp.Status.ILL_CONDITIONED


@rooms
def test_the_transition_is_the_dense_one(room: str) -> None:
    # h_1 = A_1 h_0 where x = 0: the columns of A, one batch entry for each
    p = problem(3, "householder", batch=1, steps=1, dim=4, rank=2)
    mixer, lam = mixer_of(p), p.lam[0, 0]
    with in_room(room):
        q = mixer.to_dense()[0, 0]
        h = fp.fixed_point_rnn(p.lam, mixer, np.zeros((4, 1, 4)), initial=np.eye(4)).value
    closed = np.linalg.inv(np.eye(4) + (np.diag(1 / lam) - np.eye(4)) @ q)
    assert_close(h[:, 0].T, closed, 1e-12)


@rooms
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch", "steps"), [((), 0), ((), 1), ((0,), 3), ((2, 0), 1), ((2, 1), 3), ((1, 2, 2), 2)]
)
def test_any_leading_axes(room: str, kind: str, batch: tuple[int, ...], steps: int) -> None:
    flat = problem(1, kind, batch=int(np.prod(batch)), steps=steps, dim=4)

    def deep(a: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return a.reshape(batch + a.shape[1:])

    params = flat.params if kind == "fixed" else tuple(deep(a) for a in flat.params)
    mixer = mixer_of(replace(flat, params=params))
    assert flat.initial is not None
    with in_room(room):
        solution = fp.fixed_point_rnn(deep(flat.lam), mixer, deep(flat.x), initial=deep(flat.initial))
        same = fp.fixed_point_rnn(*inputs(flat), **extras(flat))
    assert solution.value.shape == (*batch, steps, 4)
    for name in ("status", "converged", "iterations", "residual"):
        assert getattr(solution, name).shape == batch
    np.testing.assert_array_equal(solution.value.reshape(same.value.shape), same.value)
    assert "converged" in repr(solution)


def test_declared_bound_on_lam() -> None:
    p = problem(0, "fixed", batch=2, steps=3, dim=2)
    with fp.arrays.use_room("reference"):
        fp.fixed_point_rnn(*inputs(p), lam_bound=1.0)
    p.lam[1, 2, 0] = -1.5
    with pytest.raises(ValueError, match=r"`lam`: got -1.5 at index \(1, 2, 0\), outside .*lam_bound=1.0"):
        fp.fixed_point_rnn(*inputs(p), lam_bound=1.0)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("mixer", {"mixer": np.eye(4)}),
        ("solver", {"solver": "direct"}),
        ("adjoint", {"adjoint": "implicit"}),
    ],
)
def test_wrong_objects_are_named(argument: str, change: dict[str, object]) -> None:
    p = problem(0, "fixed", batch=2, steps=3, dim=4)
    lam, mixer, x = inputs(p)
    mixer = change.pop("mixer", mixer)
    with pytest.raises(TypeError, match=rf"`{argument}`: got"):
        fp.fixed_point_rnn(lam, mixer, x, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lam", (2, 4, 4), r"`lam`: got shape \(2, 4, 4\), expected \(..., T=3, D=4\)"),
        ("x", (4,), r"`x`: got shape \(4,\), expected \(..., T, D\)"),
        ("gate", (2, 3, 5), r"`gate`: got shape \(2, 3, 5\), expected \(..., T=3, D=4\)"),
        ("gate", (3, 3, 4), r"`gate`: got leading axes \(3,\), expected axes that broadcast with \(2,\)"),
        ("initial", (5,), r"`initial`: got shape \(5,\), expected \(..., D=4\)"),
        ("guess", (2, 1, 4), r"`guess`: got shape \(2, 1, 4\), expected"),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...], message: str) -> None:
    p = problem(0, "fixed", batch=2, steps=3, dim=4)
    arrays = {"lam": p.lam, "x": p.x} | {name: np.zeros(shape)}
    lam, x = arrays.pop("lam"), arrays.pop("x")
    with pytest.raises(ValueError, match=message):
        fp.fixed_point_rnn(lam, mixer_of(p), x, **arrays)


def test_a_mixer_for_something_else_is_named() -> None:
    p = problem(0, "kronecker", batch=2, steps=3, dim=4)
    with pytest.raises(ValueError, match=r"`mixer`: Kronecker\(.* is for 4 channels, expected 6"):
        fp.fixed_point_rnn(np.zeros((3, 6)), mixer_of(p), np.zeros((3, 6)))
    with pytest.raises(
        ValueError, match=r"`mixer.k1`: got shape \(2, 3, 2, 2\), expected \(..., T=5, d1, d1\)"
    ):
        fp.fixed_point_rnn(np.zeros((5, 4)), mixer_of(p), np.zeros((5, 4)))


@rooms
def test_float16_is_stored_small_and_computed_in_float32(room: str) -> None:
    p = problem(0, "householder", batch=2, steps=20, dim=6, rank=1).astype(np.float16)
    with in_room(room):
        half = fp.fixed_point_rnn(*inputs(p), **extras(p)).value
        full = p.astype(np.float32)
        single = fp.fixed_point_rnn(*inputs(full), **extras(full)).value
    assert half.dtype == np.float16
    assert_same(half, single.astype(np.float16), room)
