"""`fp.vjp` and `fp.check_adjoint` over every room: exact gradients against dense and unrolled ones."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hall import (
    ROOMS,
    TIGHT,
    assert_close,
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
from strategies import (
    KINDS,
    RING,
    RING_WITHOUT_TRANSPOSE,
    Problem,
    Selective,
    problem,
    problems,
    seeds,
    selectives,
)

import fpnumba as fp

ALL = (*KINDS, RING)
rooms = pytest.mark.parametrize("room", ROOMS)


def _options(p: Problem) -> dict[str, Any]:
    return {name: array for name, array in extras(p).items() if array is not None}


def _assert_bars_close(one: Any, two: Any, rtol: float) -> None:
    """Cotangents of `fp.fixed_point_rnn` against others."""
    for a, b in zip(one, two, strict=True):
        if isinstance(a, fp.mixers.Mixer):
            assert type(a) is type(b)
            for left, right in zip(a.params, b.params, strict=True):
                assert_close(left, right, rtol)
        else:
            assert_close(a, b, rtol)
    assert one.options.keys() == two.options.keys()
    for name in one.options:
        assert_close(one.options[name], two.options[name], rtol)


# The dot-product identity, J v by central differences: for every function


@rooms
@given(problems(), st.booleans())
def test_linear_scan(room: str, p: Problem, reverse: bool) -> None:
    with in_room(room):
        initial = {} if p.initial is None else {"initial": p.initial}
        report = fp.check_adjoint(fp.linear_scan, p.lam, p.x, reverse=reverse, **initial)
    assert report.passed
    assert len(report.errors) == 2 + len(initial)


@rooms
@given(selectives())
def test_selective_scan(room: str, p: Selective) -> None:
    options = {n: a for n, a in (("D", p.D), ("initial", p.initial)) if a is not None}
    with in_room(room):
        report = fp.check_adjoint(fp.selective_scan, p.x, p.delta, p.A, p.B, p.C, **options)
        assert len(report.errors) == 5 + len(options)
        # One of the two cotangents may be left out
        (_, last), pullback = fp.vjp(fp.selective_scan, p.x, p.delta, p.A, p.B, p.C, **options)
        alone = pullback((p.ybar, None))
        zero = pullback((p.ybar, np.zeros_like(last)))
    for a, b in zip(alone, zero, strict=True):
        np.testing.assert_array_equal(a, b)


@rooms
@given(problems(kinds=(*ALL, RING_WITHOUT_TRANSPOSE), batches=(1, 2), steps=(1, 3), dims=(1, 4), bound=1.9))
@pytest.mark.parametrize("method", ["apply", "apply_transpose", "to_dense"])
def test_mixers(room: str, method: str, p: Problem) -> None:
    mixer = mixer_of(p)
    vectors = () if method == "to_dense" else (p.x,)
    with in_room(room):
        report = fp.check_adjoint(getattr(type(mixer), method), mixer, *vectors)
        assert len(report.errors) == len(mixer.params) + len(vectors)
        # The bound method holds its mixer constant
        out, pullback = fp.vjp(getattr(mixer, method), *vectors)
        whole_out, whole = fp.vjp(getattr(type(mixer), method), mixer, *vectors)
        bar = np.ones_like(out)
        np.testing.assert_array_equal(out, whole_out)
        assert len(pullback(bar)) == len(vectors)
        for a, b in zip(pullback(bar), whole(bar)[1:], strict=True):
            np.testing.assert_array_equal(a, b)


@rooms
@given(problems(kinds=ALL, batches=(1, 2), steps=(0, 4), dims=(1, 4)))
@pytest.mark.parametrize("method", ["auto", "parallel"])
def test_fixed_point_rnn(room: str, method: str, p: Problem) -> None:
    options = _options(p) | TIGHT | {"solver": fp.Solver(method, rtol=5e-14, max_iter=5000)}
    with in_room(room):
        report = fp.check_adjoint(fp.fixed_point_rnn, *inputs(p), **options)
    assert len(report.errors) == 2 + len(p.params) + len(_options(p))


# The exact gradient


def _dense_bars(p: Problem) -> fp.Cotangents:
    """The adjoint of the one linear system that (F) is, by LAPACK, and section 6 from there."""
    matrix, right = dense_system(p)
    h = dense_solve(matrix, right, p)
    s = dense_solve(matrix.swapaxes(-1, -2), p.hbar.reshape(right.shape), p)
    with fp.arrays.use_room("reference"):
        mixer = mixer_of(p)
        dense, to_params = fp.vjp(type(mixer).to_dense, mixer)
        q = np.broadcast_to(dense, (*p.x.shape, p.x.shape[-1]))
        e, d = p.gate_or_default * s, p.x - h
        (mixer_bar,) = to_params(_sum_like(e[..., :, None] * d[..., None, :], dense))
    mixed = np.einsum("btij,btj->bti", q, d) + h
    state = np.zeros_like(p.x[:, 0]) if p.initial is None else p.initial
    before = np.concatenate([state[:, None], h[:, :-1]], axis=1)
    options = {} if p.gate is None else {"gate": s * mixed}
    if p.initial is not None:
        options["initial"] = p.lam[:, 0] * s[:, 0]
    lam_bar = s * before if p.gate is not None else s * (before - mixed)
    return fp.Cotangents((lam_bar, mixer_bar, np.einsum("btij,bti->btj", q, e)), options)


def _sum_like(array: Any, target: Any) -> Any:
    return array.sum(axis=(0, 1)) if target.ndim == 2 else array


@rooms
@given(problems(kinds=ALL, steps=(1, 12)))
def test_exact_is_the_dense_adjoint_every_way(room: str, p: Problem) -> None:
    dense = _dense_bars(p)
    with in_room(room):
        for solver in ways(p, room):
            _, pullback = fp.vjp(
                fp.fixed_point_rnn, *inputs(p), **_options(p), solver=solver, adjoint=TIGHT["adjoint"]
            )
            bars = pullback(p.hbar)
            assert bars.solution is not None
            assert bars.solution.converged.all()
            assert bars.solution.method == solver.method
            _assert_bars_close(bars, dense, 1e-10)


@rooms
@given(problems(kinds=ALL, batches=(1, 2), steps=(1, 6), bound=0.7, gated=True))
def test_exact_is_the_unrolled_gradient_in_the_limit(room: str, p: Problem) -> None:
    # Backpropagation through every iteration, each a composition of public functions
    mixer, gate, count = mixer_of(p), p.gate_or_default, 120
    with in_room(room):
        h, tape = np.zeros_like(p.x), []
        for _ in range(count):
            mixed, mix = fp.vjp(type(mixer).apply, mixer, p.x - h)
            h, scan = fp.vjp(fp.linear_scan, p.lam, gate * (mixed + h), initial=np.zeros_like(p.x[:, 0]))
            tape.append((mix, scan))
        hbar, lam_bar, x_bar = p.hbar, np.zeros_like(p.lam), np.zeros_like(p.x)
        bars = [np.zeros_like(a) for a in mixer.params]
        for mix, scan in reversed(tape):
            decay_bar, driven_bar = scan(hbar)
            mixer_bar, difference_bar = mix(gate * driven_bar)
            lam_bar += decay_bar
            x_bar += difference_bar
            for total, part in zip(bars, mixer_bar.params, strict=True):
                total += part
            hbar = gate * driven_bar - difference_bar
        _, pullback = fp.vjp(fp.fixed_point_rnn, p.lam, mixer, p.x, gate=p.gate, **TIGHT)
        exact = pullback(p.hbar)
    assert_close(lam_bar, exact[0], 1e-8)
    for a, b in zip(bars, exact[1].params, strict=True):
        assert_close(a, b, 1e-8)
    assert_close(x_bar, exact[2], 1e-8)


@rooms
@given(problems(kinds=ALL, batches=(1, 2), steps=(1, 8), bound=0.7))
def test_truncated_gradients_approach_the_exact_one(room: str, p: Problem) -> None:
    with in_room(room):

        def bars(adjoint: fp.Adjoint) -> fp.Cotangents:
            _, pullback = fp.vjp(
                fp.fixed_point_rnn, *inputs(p), **_options(p), solver=TIGHT["solver"], adjoint=adjoint
            )
            return pullback(p.hbar)  # type: ignore[no-any-return]

        exact, one, series = (
            bars(TIGHT["adjoint"]),
            bars(fp.Adjoint("one-step")),
            bars(fp.Adjoint("neumann", terms=150)),
        )
        _assert_bars_close(series, exact, 1e-8)
        # One step is the gradient through one more iteration: z = hbar
        s = fp.linear_scan(_next(p.lam), p.hbar, reverse=True)
        expected = mixer_of(p).apply_transpose(p.gate_or_default * s)
    assert one.solution is None
    assert_close(one[2], expected, 1e-12)
    assert series.solution is not None
    assert (series.solution.iterations == 151).all()
    assert series.solution.converged.all()


def _next(lam: Any) -> Any:
    return np.concatenate([lam[:, 1:], np.zeros_like(lam[:, :1])], axis=1)


@rooms
def test_neumann_terms_are_iterations(room: str) -> None:
    p = problem(5, "dense", batch=2, steps=6, dim=4)
    with in_room(room):
        arguments = (fp.fixed_point_rnn, *inputs(p))
        _, pullback = fp.vjp(*arguments, adjoint=fp.Adjoint("neumann", terms=3))
        three = pullback(p.hbar)
        s = np.zeros_like(p.hbar)
        mixer = mixer_of(p)
        for _ in range(4):
            e = p.gate_or_default * s
            s = fp.linear_scan(_next(p.lam), p.hbar + e - mixer.apply_transpose(e), reverse=True)
        assert_close(three[2], mixer.apply_transpose(p.gate_or_default * s), 1e-12)
    assert (three.solution.status == fp.Status.MAX_ITER).all()
    assert "neumann" in repr(three.solution)


@rooms
@given(problems(kinds=ALL))
@pytest.mark.parametrize("method", ["auto", "parallel", "chunked", "sequential"])
def test_zero_gives_exactly_zero(room: str, method: str, p: Problem) -> None:
    with in_room(room):
        _, pullback = fp.vjp(fp.fixed_point_rnn, *inputs(p), **_options(p), solver=fp.Solver(method))
        bars = pullback(np.zeros_like(p.x))
    for bar in (bars[0], *bars[1].params, bars[2], *bars.options.values()):
        assert not np.asarray(bar).any()
    assert bars.solution.converged.all()


@rooms
@given(seeds(), st.sampled_from(ALL), st.integers(0, 2))
@pytest.mark.parametrize("method", ["auto", "parallel", "sequential"])
def test_nan_cotangent_stays_in_its_sequence(room: str, method: str, seed: int, kind: Any, bad: int) -> None:
    p = problem(seed, kind, batch=3, steps=5, gated=True)
    with in_room(room):
        _, pullback = fp.vjp(
            fp.fixed_point_rnn,
            *inputs(p),
            **_options(p),
            solver=fp.Solver(method),
            adjoint=fp.Adjoint(on_failure="ignore"),
        )
        clean = pullback(p.hbar)
        hbar = p.hbar.copy()
        hbar[bad, -1, 0] = np.nan
        dirty = pullback(hbar)
    others = [b for b in range(3) if b != bad]
    assert dirty.solution.status[bad] == fp.Status.NONFINITE_INPUT
    for a, b in zip(
        (dirty[0], dirty[2], *dirty.options.values()),
        (clean[0], clean[2], *clean.options.values()),
        strict=True,
    ):
        np.testing.assert_array_equal(a[others], b[others])
    if kind != "fixed":
        for a, b in zip(dirty[1].params, clean[1].params, strict=True):
            np.testing.assert_array_equal(a[others], b[others])


@rooms
def test_an_adjoint_that_does_not_converge_says_so(room: str) -> None:
    p = problem(0, "dense", batch=2, steps=5, dim=4)
    with in_room(room):
        _, pullback = fp.vjp(fp.fixed_point_rnn, *inputs(p), adjoint=fp.Adjoint(max_iter=2))
        with pytest.warns(fp.ConvergenceWarning, match=r"the adjoint of fixed_point_rnn: 2 of 2"):
            bars = pullback(p.hbar)
        assert (bars.solution.status == fp.Status.MAX_ITER).all()
        _, pullback = fp.vjp(
            fp.fixed_point_rnn, *inputs(p), adjoint=fp.Adjoint(max_iter=2, on_failure="raise")
        )
        with pytest.raises(fp.ConvergenceError):
            pullback(p.hbar)


@rooms
@pytest.mark.parametrize(
    "policy", [{"quantile": 0.75}, {"acceleration": "anderson"}, {"criterion": "published"}, {"max_iter": 60}]
)
def test_policies_forward_leave_the_gradient_exact(room: str, policy: dict[str, Any]) -> None:
    p = problem(0, "householder", batch=2, steps=5, dim=4)
    with in_room(room):
        solver = fp.Solver(**({"rtol": 1e-13} | policy | {"on_failure": "ignore"}))
        _, pullback = fp.vjp(fp.fixed_point_rnn, *inputs(p), **_options(p), solver=solver)
        bars = pullback(p.hbar)
    assert bars.solution.method == "direct"
    _assert_bars_close(bars, _dense_bars(p), 1e-6)


# Broadcasting, dtypes, conventions


@rooms
@pytest.mark.parametrize("kind", KINDS)
def test_cotangents_have_the_shapes_of_their_primals(room: str, kind: str) -> None:
    full = problem(0, kind, batch=3, steps=4, dim=4, gated=True)
    assert full.gate is not None
    assert full.initial is not None
    lam, gate, initial = full.lam[:1], full.gate[0], full.initial[0]
    params = full.params if kind == "fixed" else tuple(a[1] for a in full.params)
    mixer = mixer_of(replace(full, params=params))
    with in_room(room):
        solution, pullback = fp.vjp(
            fp.fixed_point_rnn, lam, mixer, full.x, gate=gate, initial=initial, **TIGHT
        )
        bars = pullback(full.hbar)
        # The same, written out
        wide = replace(
            full,
            lam=np.repeat(lam, 3, axis=0),
            gate=np.repeat(gate[None], 3, axis=0),
            initial=np.repeat(initial[None], 3, axis=0),
            params=params if kind == "fixed" else tuple(np.repeat(a[None], 3, axis=0) for a in params),
        )
        same, wide_pullback = fp.vjp(fp.fixed_point_rnn, *inputs(wide), **_options(wide), **TIGHT)
        wide_bars = wide_pullback(full.hbar)
        report = fp.check_adjoint(fp.fixed_point_rnn, lam, mixer, full.x, gate=gate, initial=initial)
    assert report.passed
    np.testing.assert_array_equal(solution.value, same.value)
    assert_close(bars[0], wide_bars[0].sum(axis=0, keepdims=True), 1e-13)
    assert_close(bars[2], wide_bars[2], 1e-13)
    assert_close(bars.options["gate"], wide_bars.options["gate"].sum(axis=0), 1e-13)
    assert_close(bars.options["initial"], wide_bars.options["initial"].sum(axis=0), 1e-13)
    for a, b, given_ in zip(bars[1].params, wide_bars[1].params, mixer.params, strict=True):
        assert a.shape == given_.shape
        assert_close(a, b if kind == "fixed" else b.sum(axis=0), 1e-13)


@rooms
def test_dtypes_of_cotangents(room: str) -> None:
    p = problem(0, "dplr", batch=2, steps=4, dim=4)
    for dtype in (np.float16, np.float32, np.float64):
        q = p.astype(dtype)
        with in_room(room):
            _, pullback = fp.vjp(fp.fixed_point_rnn, *inputs(q), **_options(q))
            bars = pullback(q.hbar)
        found = (bars[0], *bars[1].params, bars[2], *bars.options.values())
        assert {bar.dtype for bar in found} == {np.dtype(dtype)}


@rooms
def test_mixers_with_fewer_axes_than_their_vectors(room: str) -> None:
    rng = np.random.default_rng(0)
    mixer = fp.mixers.Monarch(rng.normal(size=(5, 2, 2, 2)), rng.normal(size=(3, 5, 2)))
    with in_room(room):
        fp.check_adjoint(fp.mixers.Monarch.apply, mixer, rng.normal(size=(2, 1, 5, 4)))
        fp.check_adjoint(fp.mixers.Monarch.to_dense, mixer)
        fixed = fp.mixers.Fixed(rng.normal(size=(4, 4)))
        assert fp.check_adjoint(fp.mixers.Fixed.to_dense, fixed).passed
        assert fixed.to_dense().shape == (4, 4)


@rooms
def test_out_bar_is_checked(room: str) -> None:
    p = problem(0, "fixed", batch=2, steps=4, dim=4)
    with in_room(room):
        _, pullback = fp.vjp(fp.fixed_point_rnn, *inputs(p))
        with pytest.raises(ValueError, match=r"`out_bar`: got shape \(4, 4\), expected \(2, 4, 4\)"):
            pullback(p.hbar[0])
        with pytest.raises(TypeError, match=r"`out_bar`: got numpy float32, expected numpy float64"):
            pullback(p.hbar.astype(np.float32))
        with pytest.raises(TypeError, match=r"`out_bar`: got list"):
            pullback([1.0])
        _, pair = fp.vjp(fp.selective_scan, p.x, p.lam, -np.ones((4, 1)), p.x[..., :1], p.x[..., :1])
        with pytest.raises(TypeError, match=r"expected a pair"):
            pair(p.hbar)


def test_a_pullback_stays_in_its_room_and_can_be_called_again() -> None:
    p = problem(0, "dplr", batch=1, steps=4, dim=4)
    with fp.arrays.use_room("reference"):
        _, pullback = fp.vjp(fp.fixed_point_rnn, *inputs(p))
        inside = pullback(p.hbar)
    outside = pullback(p.hbar)
    _assert_bars_close(outside, inside, 0.0)


def test_unknown_functions_and_objects() -> None:
    with pytest.raises(
        TypeError, match=r"`fun`: sin has no adjoint here; known are linear_scan, selective_scan, fixed_"
    ):
        fp.vjp(np.sin, np.ones(3))
    with pytest.raises(TypeError, match=r"has no adjoint here"):
        fp.vjp([1, 2], np.ones(3))
    mixer = fp.mixers.Fixed(np.eye(2))
    with pytest.raises(TypeError, match=r"contraction_bound has no adjoint here"):
        fp.vjp(mixer.contraction_bound)


class Square:
    """A layer in miniature: parameters in a dict, and a pullback of its own."""

    def __init__(self, slope: float = 2.0) -> None:
        self.slope = slope

    def __call__(self, params: dict[str, Any], x: Any, *, shift: Any = None) -> Any:
        return params["scale"] * x**2 + (0.0 if shift is None else shift)

    def vjp(self, params: dict[str, Any], x: Any, *, shift: Any = None) -> Any:
        def pullback(bar: Any) -> Any:
            scale_bar = np.sum(x**2 * bar, axis=0)
            return {"scale": scale_bar}, self.slope * params["scale"] * x * bar

        return self(params, x, shift=shift), pullback


def test_objects_with_a_vjp_of_their_own() -> None:
    params, x = {"scale": np.arange(1.0, 4.0)}, np.ones((2, 3))
    out, pullback = fp.vjp(Square(), params, x)
    assert out.shape == x.shape
    assert set(pullback(out)[0]) == {"scale"}
    report = fp.check_adjoint(Square(), params, x, shift=np.ones(3))  # no cotangent for shift: not varied
    assert set(report.errors) == {"primal 0['scale']", "primal 1"}


def test_a_wrong_adjoint_is_caught_and_named() -> None:
    with pytest.raises(fp.AdjointError, match=r"primal 1: <ybar, J v> = .* but <J\^T ybar, v> = ") as error:
        fp.check_adjoint(Square(slope=2.001), {"scale": np.ones(3)}, np.ones((2, 3)))
    report = error.value.report
    assert report.worst == "primal 1"
    assert not report.passed
    assert report.error > report.tolerance

    class Missing(Square):
        def vjp(self, params: dict[str, Any], x: Any, *, shift: Any = None) -> Any:
            return self(params, x), lambda bar: ({}, 2 * params["scale"] * x * bar)

    with pytest.raises(TypeError, match=r"no cotangent for primal 0"):
        fp.check_adjoint(Missing(), {"scale": np.ones(3)}, np.ones((2, 3)))
    with pytest.raises(TypeError, match=r"nothing to vary"):
        fp.check_adjoint(Square(), {"scale": 2}, 3)


class Bent:
    """``x / |x|``, only for `x` in one direction: near the origin it bends within a short step, and beyond it ends."""

    def __call__(self, x: Any) -> Any:
        if (x[..., 0] <= 0).any():
            raise ValueError("x: expected the first channel to be positive")
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def vjp(self, x: Any) -> Any:
        y, size = self(x), np.linalg.norm(x, axis=-1, keepdims=True)
        return y, lambda bar: ((bar - y * np.sum(y * bar, axis=-1, keepdims=True)) / size,)


def test_steps_of_the_dot_product_test_suit_the_function() -> None:
    x = np.random.default_rng(0).uniform(0.1, 0.5, (3, 4))
    assert fp.check_adjoint(Bent(), x).passed
    for size in (0.1, 0.03):  # 4e-3 alone, extrapolated, would be wrong in the fifth digit and before
        assert fp.check_adjoint(Bent(), size * x).passed
    with pytest.raises(ValueError, match="first channel"):
        fp.check_adjoint(Bent(), 1e-2 * x)
    assert fp.check_adjoint(Bent(), 1e-2 * x, step=1e-4).passed
    with pytest.raises(ValueError, match="step: 0"):
        fp.check_adjoint(Bent(), x, step=0)


def test_nan_does_not_pass_the_dot_product_test() -> None:
    with pytest.raises(fp.AdjointError), fp.arrays.use_room("reference"):
        fp.check_adjoint(fp.linear_scan, np.ones((2, 1)), np.array([[np.nan], [1.0]]))
