"""The fused way of FP-Mamba with a Kronecker mixer against the one with the doors of a room, on the CPU."""

import numba
import numpy as np
import pytest

import fpnumba as fp
from fpnumba import nn
from fpnumba.nn import matrix_kronecker

TIGHT = {"rtol": 1e-12, "max_iter": 4000}
# Far enough from rounding that it does not decide when an iteration ends.
FAR = {"rtol": 1e-7}
EVERYTHING = ("lambda", "mixer", "b", "c")


def build(kind="FPMamba", *, solver=None, adjoint=None, dtype=np.float64, **options):
    """A layer of 12 channels, factors of 3 and 4, and parameters at which its iteration converges."""
    shared = {
        "d_inner": 12,
        "d_state": 5,
        "mixer": "kronecker",
        "alpha_max": 1.0,
        "solver": solver or fp.Solver(**FAR),
        "adjoint": adjoint or fp.Adjoint(**FAR),
    }
    if kind == "FPMamba2":
        shared["head_dim"] = 4
    layer = getattr(nn, kind)(6, **shared | options)
    params = layer.init(np.random.default_rng(1), dtype)
    params["in_proj.weight"] *= 6
    params["mixer.diag.bias"] -= 1
    return layer, params


def outcome(layer, params, x, y_bar):
    """Everything that a call says."""
    record = []
    y, pullback = layer.vjp(params, x, record=record)
    bars, x_bar = pullback(y_bar)
    told = record[0]
    return {
        "y": y,
        "x_bar": x_bar,
        **bars,
        "status": told.status,
        "iterations": told.iterations,
        "every iteration": told.chunk_iterations,
        "residual": told.residual,
    }


def both(layer, params, x, y_bar, monkeypatch):
    """The outcomes of the fused way and of the other."""
    with fp.arrays.use_room("cpu"):
        assert matrix_kronecker.serves(layer.map)
        fused = outcome(layer, params, x, y_bar)
        with monkeypatch.context() as patch:
            patch.setattr(matrix_kronecker, "serves", lambda map: False)
            plain = outcome(layer, params, x, y_bar)
    return fused, plain


def assert_equal(fused, plain, atol=1e-10):
    assert fused.keys() == plain.keys()
    for name in ("status", "iterations", "every iteration"):
        np.testing.assert_array_equal(fused.pop(name), plain.pop(name), err_msg=name)
    np.testing.assert_allclose(fused.pop("residual"), plain.pop("residual"), rtol=0.5, atol=1e-14)
    for name, right in plain.items():
        size = 1 + np.abs(right).max(initial=0)
        assert fused[name].dtype == right.dtype, name
        np.testing.assert_allclose(fused[name], right, rtol=0, atol=atol * size, err_msg=name)


@pytest.mark.parametrize("kind", ["FPMamba", "FPMamba2"])
@pytest.mark.parametrize(
    "hidden", [(), ("mixer",), ("lambda",), ("b", "c"), ("lambda", "c"), ("mixer", "b"), EVERYTHING], ids=str
)
def test_equal_whatever_sees_the_hidden_state(kind, hidden, monkeypatch, rng):
    layer, params = build(kind, hidden=hidden)
    # more than two spans, and sequences that do not fill a tile
    x, y_bar = rng.standard_normal((2, 5, 37, 6))
    fused, plain = both(layer, params, x, y_bar, monkeypatch)
    assert not fused["status"].any()
    assert_equal(fused, plain)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("FPMamba", {"gate": "inside"}),
        ("FPMamba", {"gate": "both", "normalization": "rows"}),
        ("FPMamba", {"activation": "relu"}),
        ("FPMamba", {"activation": "identity", "bc_norm": False}),
        ("FPMamba", {"activation": "sigmoid", "normalization": "rows", "hidden": EVERYTHING}),
        ("FPMamba", {"short_conv": 3, "bias": True, "weight_norm": False}),
        ("FPMamba", {"symmetric": True, "dt_rank": 3, "hidden": EVERYTHING}),
        ("FPMamba", {"d_inner": 256, "d_state": 16, "hidden": EVERYTHING}),
        ("FPMamba", {"d_inner": 13, "d_state": 2}),
        ("FPMamba2", {"gate": "outside", "channel_skip": True}),
        ("FPMamba2", {"gate": "inside", "normalization": "rows", "hidden": EVERYTHING}),
        ("FPMamba2", {"head_dim": 1, "hidden": EVERYTHING}),
    ],
)
def test_equal_with_every_option(kind, options, monkeypatch, rng):
    layer, params = build(kind, **options)
    x, y_bar = rng.standard_normal((2, 3, 19, 6))
    assert_equal(*both(layer, params, x, y_bar, monkeypatch))


def test_equal_in_single_precision(monkeypatch, rng):
    loose = {"rtol": 1e-6}
    layer, params = build(solver=fp.Solver(**loose), adjoint=fp.Adjoint(**loose), dtype=np.float32)
    x, y_bar = rng.standard_normal((2, 3, 19, 6)).astype(np.float32)
    fused, plain = both(layer, params, x, y_bar, monkeypatch)
    for outcomes in (fused, plain):
        # where rounding decides
        for name in ("iterations", "every iteration"):
            outcomes[name] = np.zeros(1)
    assert_equal(fused, plain, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 9, 6), (2, 0, 6), (2, 1, 6), (9, 6), (2, 2, 9, 6)])
def test_equal_for_any_leading_axes_and_few_steps(shape, monkeypatch, rng):
    layer, params = build(hidden=EVERYTHING)
    x, y_bar = rng.standard_normal((2, *shape))
    assert_equal(*both(layer, params, x, y_bar, monkeypatch))


@pytest.mark.parametrize("where", ["input", "overflow", "start"])
def test_a_broken_sequence_is_its_own_affair(where, monkeypatch, rng):
    layer, params = build(hidden=EVERYTHING, solver=fp.Solver(on_failure="ignore", **FAR))
    layer.adjoint = fp.Adjoint(on_failure="ignore", **FAR)
    x, y_bar = rng.standard_normal((2, 5, 21, 6))
    with fp.arrays.use_room("cpu"):
        right = layer(params, x)
    if where == "start":
        with fp.arrays.use_room("cpu"):
            _, state = layer.prefill(params, x[:, :9])
            state["H"][1, 2, 3] = np.inf
            found = {}
            for way in ("fused", "plain"):
                record = []
                with monkeypatch.context() as patch:
                    if way == "plain":
                        patch.setattr(matrix_kronecker, "serves", lambda map: False)
                    y, after = layer.prefill(params, x[:, 9:], state, record=record)
                found[way] = y, after["H"], record[0].status
        assert found["fused"][2].tolist() == [0, fp.Status.NONFINITE_INPUT, 0, 0, 0]
        np.testing.assert_array_equal(found["fused"][2], found["plain"][2])
        for fused, plain in zip(found["fused"], found["plain"], strict=True):
            np.testing.assert_allclose(fused, plain, rtol=0, atol=1e-10)
        return
    x[1, 4, 2] = np.nan if where == "input" else 1e160
    fused, plain = both(layer, params, x, y_bar, monkeypatch)
    others = [0, 2, 3, 4]
    assert fused["status"][1] != 0
    assert not fused["status"][others].any()
    np.testing.assert_array_equal(fused["y"][others], right[others])
    np.testing.assert_array_equal(fused["y"][1, :4], right[1, :4])
    np.testing.assert_allclose(fused["y"], plain["y"], rtol=0, atol=1e-10)
    np.testing.assert_array_equal(fused["status"], plain["status"])
    np.testing.assert_array_equal(fused["every iteration"], plain["every iteration"])
    np.testing.assert_allclose(fused["x_bar"][others], plain["x_bar"][others], rtol=0, atol=1e-8)


def test_solves_that_end_early_say_so(monkeypatch, rng):
    options = {"max_iter": 3, "on_failure": "ignore"}
    layer, params = build(solver=fp.Solver(**options), adjoint=fp.Adjoint(**options))
    x, y_bar = rng.standard_normal((2, 3, 19, 6))
    fused, plain = both(layer, params, x, y_bar, monkeypatch)
    assert (fused["status"] == fp.Status.MAX_ITER).all()
    assert_equal(fused, plain)


def test_an_adjoint_that_grows_is_cut_off_in_both(monkeypatch, rng):
    layer, params = build(
        alpha_max=2.0,
        solver=fp.Solver(rtol=1e-10, max_iter=400, on_failure="ignore"),
        adjoint=fp.Adjoint(rtol=1e-10, max_iter=400, on_failure="warn"),
    )
    params["in_proj.weight"] /= 60
    params["mixer.diag.bias"] += 4
    x, y_bar = rng.standard_normal((2, 3, 17, 6))
    with pytest.warns(fp.ConvergenceWarning, match="adjoint of FPMamba") as told:
        fused, plain = both(layer, params, x, y_bar, monkeypatch)
    assert len({str(warning.message) for warning in told}) == 1
    for name, bar in plain.items():
        assert np.isfinite(bar).all(), name
    np.testing.assert_array_equal(fused["status"], plain["status"])
    np.testing.assert_array_equal(fused["every iteration"][0, 0], plain["every iteration"][0, 0])


def test_from_a_state_and_on_with_steps(monkeypatch, rng):
    layer, params = build(hidden=EVERYTHING, short_conv=3, solver=fp.Solver(**TIGHT))
    x = rng.standard_normal((2, 30, 6))
    found = []
    with fp.arrays.use_room("cpu"):
        whole = layer(params, x)
        for served in (True, False):
            with monkeypatch.context() as patch:
                if not served:
                    patch.setattr(matrix_kronecker, "serves", lambda map: False)
                first, state = layer.prefill(params, x[:, :10])
                middle, state = layer.prefill(params, x[:, 10:28], state)
                parts = [first, middle]
                for t in (28, 29):
                    now, state = layer.step(params, x[:, t], state)
                    parts.append(now[:, None])
            found.append((np.concatenate(parts, 1), state["y"], state["H"]))
    np.testing.assert_allclose(found[0][0], whole, rtol=0, atol=1e-10)
    for fused, plain in zip(*found, strict=True):
        np.testing.assert_allclose(fused, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("batch", [1, 5, 40])
def test_the_number_of_threads_changes_nothing(batch, rng):
    layer, params = build(d_inner=64, d_state=16, hidden=EVERYTHING)
    x, y_bar = rng.standard_normal((2, batch, 18, 6))
    found = []
    before = numba.get_num_threads()
    try:
        for count in sorted({1, numba.config.NUMBA_NUM_THREADS}):
            numba.set_num_threads(count)
            with fp.arrays.use_room("cpu"):
                found.append(outcome(layer, params, x, y_bar))
    finally:
        numba.set_num_threads(before)
    for name, right in found[0].items():
        np.testing.assert_array_equal(found[-1][name], right, err_msg=name)
