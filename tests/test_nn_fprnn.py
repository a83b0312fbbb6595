"""The FP-RNN layer: all ways agree, gradients are exact, decoding equals the whole, failures are seen."""

import dataclasses

import numpy as np
import pytest
from derivatives import slopes_and_gradients

import fpnumba as fp
from fpnumba import nn
from fpnumba.nn import low_rank

TIGHT = {"rtol": 1e-13, "max_iter": 3000}
MIXERS = [
    ("householder", 1),
    ("householder", 3),
    ("dplr", 2),
    ("kronecker", 1),
    ("monarch", 2),
    ("dense", 1),
    ("fixed", 1),
    ("mixture", 3),
]
ALL = pytest.mark.parametrize(("mixer", "rank"), MIXERS)
HIDDEN = pytest.mark.parametrize("hidden", [("mixer",), ()], ids=["hidden", "input only"])


@pytest.fixture(autouse=True)
def plain_room():
    """NumPy for these small cases: kernels of the compiled room would take longer to compile than to be
    useful."""
    with fp.arrays.use_room("reference"):
        yield


def build(mixer, rank, *, solver=None, adjoint=None, d_model=4, seed=1, **options):
    """A layer that solves tightly, and parameters whose mixers do something."""
    layer = nn.FPRNN(
        d_model,
        mixer=mixer,
        rank=rank,
        solver=solver or fp.Solver(**TIGHT),
        adjoint=adjoint or fp.Adjoint(**TIGHT),
        **{"expand": 1, "alpha_max": 1.0} | options,
    )
    params = layer.init(np.random.default_rng(seed), np.float64)
    return layer, {n: 4 * p if n.endswith("original0") else p for n, p in params.items()}


@ALL
@HIDDEN
def test_all_ways_agree_and_decoding_too(mixer, rank, hidden, rng):
    options = {"hidden": hidden, "short_conv": 3 if hidden else None}
    layer, params = build(mixer, rank, **options)
    x = rng.standard_normal((2, 6, 4))
    y = layer(params, x)
    for method, chunk in (("parallel", None), ("chunked", 1), ("chunked", 4), ("sequential", None)):
        layer.solver = fp.Solver(method, chunk=chunk, **TIGHT)
        record = []
        np.testing.assert_allclose(layer(params, x, record=record), y, rtol=0, atol=1e-11)
        assert record[0].converged.all()
        assert record[0].value.shape == (2, 6, 4)
    state, steps = layer.initial_state((2,), np.float64), []
    sizes = {n: s.shape for n, s in state.items()}
    for t in range(6):
        now, state = layer.step(params, x[:, t], state)
        steps.append(now)
    np.testing.assert_allclose(np.stack(steps, 1), y, rtol=0, atol=1e-11)
    assert {n: s.shape for n, s in state.items()} == sizes


@pytest.mark.parametrize(
    ("mixer", "rank", "options"),
    [
        ("householder", 1, {}),
        ("householder", 2, {"symmetric": True, "projection_rank": 3}),
        ("dplr", 2, {"short_conv": 2, "weight_norm": False}),
        ("dplr", 1, {"hidden": (), "alpha_max": 2.0}),
        ("kronecker", 1, {}),
        ("kronecker", 1, {"symmetric": True, "projection_rank": 3, "normalization": "rows"}),
        ("kronecker", 1, {"hidden": ()}),
        ("monarch", 2, {"hidden": ()}),
        ("monarch", 2, {}),
        ("dense", 1, {}),
        ("fixed", 1, {}),
        ("mixture", 2, {"hidden": ()}),
        ("mixture", 2, {}),
    ],
)
def test_exact_gradient(mixer, rank, options, rng):
    layer, params = build(mixer, rank, **options)
    for name, slope, gradient in slopes_and_gradients(layer, params, rng.standard_normal((2, 3, 4)), rng):
        assert gradient == pytest.approx(slope, rel=1e-6, abs=1e-7), name


def test_exact_gradient_by_the_public_test(rng):
    layer, params = build("householder", 1)
    assert fp.check_adjoint(layer, params, rng.standard_normal((2, 3, 4)), tolerance=1e-6).passed


@ALL
@HIDDEN
def test_exact_gradient_is_the_limit_of_the_series(mixer, rank, hidden, rng):
    layer, params = build(mixer, rank, hidden=hidden, short_conv=2)
    x, y_bar = rng.standard_normal((2, 2, 4, 4))
    exact_bar, exact_x = layer.vjp(params, x)[1](y_bar)
    layer.adjoint = fp.Adjoint("neumann", terms=400)
    series_bar, series_x = layer.vjp(params, x)[1](y_bar)
    np.testing.assert_allclose(series_x, exact_x, rtol=0, atol=1e-10)
    for name, bar in exact_bar.items():
        np.testing.assert_allclose(series_bar[name], bar, rtol=0, atol=1e-9 * (1 + np.abs(bar).max()))
    if hidden and mixer != "fixed":
        # no terms at all is the one-step gradient at the same point, and that is another one
        layer.adjoint = fp.Adjoint("one-step")
        _, one_x = layer.vjp(params, x)[1](y_bar)
        assert np.abs(one_x - exact_x).max() > 1e-6


@HIDDEN
@pytest.mark.parametrize("mixer", ["householder", "kronecker"])
def test_one_iteration_is_a_diagonal_rnn_with_its_exact_gradient(mixer, hidden, rng):
    few = fp.Solver("parallel", max_iter=1, on_failure="ignore")
    layer, params = build(
        mixer, 1, hidden=hidden, solver=few, adjoint=fp.Adjoint("one-step"), symmetric=True, projection_rank=3
    )
    x, record = 2 * rng.standard_normal((2, 3, 4)), []
    layer(params, x, record=record)
    assert (record[0].iterations == 1).all()
    for name, slope, gradient in slopes_and_gradients(layer, params, x, rng):
        assert gradient == pytest.approx(slope, rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("mixer", ["householder", "dplr"])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": True, "activation": "relu"},
        {"projection_rank": 3, "alpha_max": 2.0},
        {"projection_rank": 2, "symmetric": True, "activation": "identity", "weight_norm": False},
    ],
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_fused_steps_are_the_steps_through_the_doors(mixer, rank, options, dtype, rng, monkeypatch):
    layer, params = build(mixer, rank, **options)
    params = {n: p.astype(dtype) for n, p in params.items()}
    x, y_bar = rng.standard_normal((2, 3, 6, 4)).astype(dtype)
    y, pullback = layer.vjp(params, x)
    bars, x_bar = pullback(y_bar)
    monkeypatch.setattr(layer, "_sequential", lambda cell, keep: low_rank.solve(cell, layer.map, keep=keep))
    record = []
    fused, pullback = layer.vjp(params, x, record=record)
    fused_bars, fused_x_bar = pullback(y_bar)
    tolerance = 1e-11 if dtype == np.float64 else 2e-4
    assert record[0].converged.all()
    for found, wanted in [(fused, y), (fused_x_bar, x_bar), *((fused_bars[n], bars[n]) for n in bars)]:
        assert found.dtype == dtype
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * (1 + np.abs(wanted).max()))
    np.testing.assert_allclose(layer(params, x), fused, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", ["auto", "chunked", "fused"])
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 1, 4), (3, 4), (2, 1, 3, 4)])
def test_any_leading_axes_and_empty_ones(method, shape, rng, monkeypatch):
    for mixer, conv in (("householder", 3), ("kronecker", None), ("fixed", None), ("mixture", None)):
        layer, params = build(
            mixer, 2, solver=fp.Solver("auto" if method == "fused" else method), short_conv=conv
        )
        if method == "fused" and mixer == "householder":
            monkeypatch.setattr(
                layer, "_sequential", lambda c, keep, m=layer.map: low_rank.solve(c, m, keep=keep)
            )
        x, record = rng.standard_normal(shape), []
        y, pullback = layer.vjp(params, x, record=record)
        bars, x_bar = pullback(y)
        assert y.shape == x_bar.shape == shape
        assert record[0].status.shape == record[0].iterations.shape == shape[:-2]
        assert {n: b.shape for n, b in bars.items()} == {n: p.shape for n, p in params.items()}


@pytest.mark.parametrize("fused", [False, True])
def test_sequences_are_causal_and_on_their_own(fused, rng, monkeypatch):
    layer, params = build("householder", 2, short_conv=3)
    if fused:
        monkeypatch.setattr(layer, "_sequential", lambda c, keep: low_rank.solve(c, layer.map, keep=keep))
    x = rng.standard_normal((4, 6, 4))
    y = layer(params, x)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(layer(params, x[order]), y[order])
    later = x.copy()
    later[:, 4:] += 1
    np.testing.assert_array_equal(layer(params, later)[:, :4], y[:, :4])
    broken = x.copy()
    broken[1, 2] = np.nan
    with pytest.warns(fp.ConvergenceWarning, match="FPRNN: 1 of 4"):
        found = layer(params, broken)
    np.testing.assert_array_equal(found[[0, 2, 3]], y[[0, 2, 3]])
    assert np.isnan(found[1, 2:]).all()
    layer.solver, record = dataclasses.replace(layer.solver, on_failure="ignore"), []
    layer(params, broken, record=record)
    assert record[0].status.tolist() == [0, fp.Status.NONFINITE_INPUT, 0, 0]


def test_zero_cotangent_gives_exactly_zero(rng):
    for mixer in ("householder", "kronecker"):
        layer, params = build(mixer, 1)
        y, pullback = layer.vjp(params, rng.standard_normal((2, 3, 4)))
        bars, x_bar = pullback(np.zeros_like(y))
        assert not x_bar.any()
        assert not any(bar.any() for bar in bars.values())


def test_failures_are_seen(rng):
    layer, params = build("kronecker", 1, solver=fp.Solver("sequential", max_iter=2, rtol=1e-12))
    x = rng.standard_normal((2, 3, 4))
    with pytest.warns(fp.ConvergenceWarning, match="FPRNN: 2 of 2 sequences"):
        layer(params, x)
    layer.solver = dataclasses.replace(layer.solver, on_failure="raise")
    with pytest.raises(fp.ConvergenceError):
        layer(params, x)
    layer, params = build("kronecker", 1, adjoint=fp.Adjoint(max_iter=1, on_failure="raise"))
    y, pullback = layer.vjp(params, x)
    with pytest.raises(fp.ConvergenceError, match="adjoint of FPRNN"):
        pullback(y)


def test_policies_of_the_whole_iteration(rng):
    layer, params = build("householder", 1)
    x = rng.standard_normal((3, 5, 4))
    y = layer(params, x)
    for options in (
        {"acceleration": "anderson"},
        {"damping": 0.8},
        {"damping_decay": 0.9},
        {"quantile": 1.0},
    ):
        layer.solver, record = fp.Solver("parallel", **TIGHT, **options), []
        np.testing.assert_allclose(layer(params, x, record=record), y, atol=1e-10)
        assert record[0].method == "parallel"
        assert record[0].history.shape[1:] == (3,)
    layer.solver, record = fp.Solver(max_iter=5, on_failure="ignore"), []
    layer(params, x, record=record)
    assert record[0].method == "parallel"
    assert record[0].iterations.tolist() == [5, 5, 5]


def test_inputs_are_left_alone_and_strides_do_not_matter(rng):
    layer, params = build("householder", 1, short_conv=2)
    params = {n: p.astype(np.float32) for n, p in params.items()}
    x = rng.standard_normal((6, 8, 2)).astype(np.float32).T[:, ::-2]
    x = np.concatenate([x, x], axis=-1)[..., ::-3]
    for array in (x, *params.values()):
        array.flags.writeable = False
    y, pullback = layer.vjp(params, x)
    y.flags.writeable = False
    bars, x_bar = pullback(y[::1])
    same, _ = layer.vjp(params, np.ascontiguousarray(x))
    np.testing.assert_array_equal(y, same)
    assert {a.dtype for a in (y, x_bar, *bars.values())} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "attention"}, "mixer must be one of"),
        ({"hidden": ("lam",)}, "hidden must be"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"alpha_max": 2.5}, "alpha_max must lie in"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"mixer": "monarch", "rank": 3}, "must divide 8"),
        ({"mixer": "mixture", "rank": 1}, "rank of a mixture"),
        ({"mixer": "kronecker", "normalization": "none"}, "normalization must be"),
        ({"mixer": "dense", "solver": fp.Solver("direct")}, "needs a householder or dplr mixer"),
        ({"projection_rank": 0}, "projection_rank must be"),
        ({"n_backwards": -1}, "n_backwards must not"),
        ({"expand": 0}, "d_model and expand"),
    ],
)
def test_refusals_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        nn.FPRNN(4, **options)


def test_wrong_width_of_input(rng):
    layer, params = build("householder", 1)
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., T, 4\)"):
        layer(params, np.ones((2, 3, 5)))
