"""The FP-Mamba layers: all ways agree, gradients are exact, decoding equals the whole; golden cases."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from derivatives import slopes_and_gradients

import fpnumba as fp
from fpnumba import nn

GOLDEN = sorted((Path(__file__).parent / "golden").glob("fpmamba_*.npz"))
TIGHT = {"rtol": 1e-12, "max_iter": 4000}
MIXERS = [
    ("householder", 1),
    ("householder", 3),
    ("dplr", 2),
    ("kronecker", 1),
    ("monarch", 2),
    ("dense", 1),
    ("fixed", 1),
    ("mixture", 2),
]
ALL = pytest.mark.parametrize(("mixer", "rank"), MIXERS)
EVERYTHING = ("lambda", "mixer", "b", "c")


def build(mixer, rank, *, solver=None, adjoint=None, seed=1, **options):
    """A layer that solves tightly, and parameters at which every mixer's iteration converges.

    The norm stretches what the mixer leaves, so the vectors that drive the iteration are made large.
    """
    layer = nn.FPMamba(
        4,
        mixer=mixer,
        rank=rank,
        solver=solver or fp.Solver(**TIGHT),
        adjoint=adjoint or fp.Adjoint(**TIGHT),
        **{"expand": 1, "d_state": 3, "alpha_max": 1.0, "hidden": EVERYTHING} | options,
    )
    params = layer.init(np.random.default_rng(seed), np.float64)
    params["in_proj.weight"] *= 6
    params["dt_proj.bias"] += 3
    if mixer == "fixed":
        params[f"mixer.{layer.map.name}"] *= 0.1
    return layer, params


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("room", ["reference", "cpu"])
def test_golden(path, room):
    data = np.load(path, allow_pickle=False)
    meta = json.loads(bytes(data["meta"]))
    state = {name[6:]: data[name] for name in data.files if name.startswith("param.")}
    layer, params = fp.nn.from_official(meta, state)
    record = []
    with fp.arrays.use_room(room):
        y, pullback = fp.vjp(layer, params, data["in.x"], record=record)
        params_bar, x_bar = pullback(data["cot.y"])
    np.testing.assert_allclose(y, data["out.y"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(x_bar, data["grad1.x"], rtol=0, atol=1e-12)
    # its counter is one high
    assert record[0].iterations.max() == meta["iterations"][0] - 1
    assert set(params_bar) == set(params)
    for name, bar in params_bar.items():
        # these it keeps in single precision, gradients as well
        atol = 1e-6 if name in ("A_log", "D", "dt_proj.bias") else 1e-11
        np.testing.assert_allclose(bar, data[f"grad1.{name}"], rtol=1e-10, atol=atol)


def single(path, room):
    """Errors of value and input gradient in float32: root mean squares over those of the golden case."""
    data = np.load(path, allow_pickle=False)
    meta = json.loads(bytes(data["meta"]))
    state = {name[6:]: data[name].astype(np.float32) for name in data.files if name.startswith("param.")}
    layer, params = fp.nn.from_official(meta, state)
    with fp.arrays.use_room(room):
        y, pullback = fp.vjp(layer, params, data["in.x"].astype(np.float32))
        _, x_bar = pullback(data["cot.y"].astype(np.float32))
    assert y.dtype == x_bar.dtype == np.float32
    pairs = ((y, data["out.y"]), (x_bar, data["grad1.x"]))
    return [np.sqrt(np.mean((one - right) ** 2) / np.mean(right**2)) for one, right in pairs]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_in_single_precision(path):
    """At most twice as far from the float64 case as plain NumPy in float32."""
    for found, plain in zip(single(path, "cpu"), single(path, "reference"), strict=True):
        assert 0 < plain < 1e-3
        assert found <= 2 * plain


@ALL
@pytest.mark.parametrize("hidden", [EVERYTHING, ()], ids=["hidden", "input only"])
def test_all_ways_agree_and_decoding_too(mixer, rank, hidden, rng):
    layer, params = build(mixer, rank, hidden=hidden, short_conv=3 if hidden else None)
    x = rng.standard_normal((2, 6, 4))
    with fp.arrays.use_room("reference"):
        y = layer(params, x)
        for method, chunk in (("parallel", None), ("chunked", 1), ("chunked", 4), ("sequential", None)):
            layer.solver = fp.Solver(method, chunk=chunk, **TIGHT)
            record = []
            np.testing.assert_allclose(layer(params, x, record=record), y, rtol=0, atol=1e-9)
            assert record[0].converged.all()
            assert record[0].value.shape == (2, 6, 4)
        # some steps at once, the others one by one, through a file in between
        first, state = layer.prefill(params, x[:, :2])
        middle, state = layer.prefill(params, x[:, 2:4], state)
        buffer = io.BytesIO()
        np.savez(buffer, **state)
        buffer.seek(0)
        state, steps = dict(np.load(buffer)), [first, middle]
        sizes = {n: s.shape for n, s in state.items()}
        for t in (4, 5):
            now, state = layer.step(params, x[:, t], state)
            steps.append(now[:, None])
    np.testing.assert_allclose(np.concatenate(steps, 1), y, rtol=0, atol=1e-9)
    assert {n: s.shape for n, s in state.items()} == sizes


@pytest.mark.parametrize("seed", range(4))
def test_ways_agree_where_a_step_has_several_fixed_points(seed):
    layer = nn.FPMamba(4, d_state=4, solver=fp.Solver(rtol=1e-10, max_iter=4000))
    params = layer.init(np.random.default_rng(seed), np.float64)
    x = np.random.default_rng(100 + seed).standard_normal((4, 10, 4))
    with fp.arrays.use_room("reference"):
        y = layer(params, x)
        for solver in (fp.Solver("parallel", **TIGHT), fp.Solver("chunked", chunk=4, **TIGHT)):
            layer.solver = solver
            np.testing.assert_allclose(layer(params, x), y, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("mixer", "rank", "options"),
    [
        ("householder", 1, {}),
        ("householder", 2, {"symmetric": True, "projection_rank": 3, "gate": "inside"}),
        ("dplr", 2, {"short_conv": 2, "weight_norm": False, "gate": "both"}),
        ("dplr", 1, {"hidden": ("c",), "bias": True}),
        ("kronecker", 1, {"hidden": ("mixer", "b")}),
        ("kronecker", 1, {"symmetric": True, "projection_rank": 3, "normalization": "rows"}),
        ("monarch", 2, {"bc_norm": False}),
        ("dense", 1, {"hidden": ("lambda",)}),
        ("fixed", 1, {"hidden": EVERYTHING}),
        ("mixture", 2, {"dt_rank": 2}),
    ],
)
def test_exact_gradient(mixer, rank, options, rng):
    layer, params = build(mixer, rank, **options)
    with fp.arrays.use_room("reference"):
        pairs = slopes_and_gradients(layer, params, rng.standard_normal((2, 3, 4)), rng)
        for name, slope, gradient in pairs:
            assert gradient == pytest.approx(slope, rel=2e-6, abs=1e-7), name


@ALL
def test_exact_gradient_is_the_limit_of_the_series(mixer, rank, rng):
    layer, params = build(mixer, rank, short_conv=2)
    x, y_bar = rng.standard_normal((2, 2, 4, 4))
    with fp.arrays.use_room("reference"):
        exact_bar, exact_x = layer.vjp(params, x)[1](y_bar)
        layer.adjoint = fp.Adjoint("neumann", terms=2000 if mixer == "dense" else 200)
        series_bar, series_x = layer.vjp(params, x)[1](y_bar)
        np.testing.assert_allclose(series_x, exact_x, rtol=0, atol=1e-8)
        for name, bar in exact_bar.items():
            np.testing.assert_allclose(series_bar[name], bar, rtol=0, atol=1e-8 * (1 + np.abs(bar).max()))
        layer.adjoint = fp.Adjoint("one-step")
        _, one_x = layer.vjp(params, x)[1](y_bar)
    assert np.abs(one_x - exact_x).max() > 1e-6


@pytest.mark.parametrize("room", ["reference", "cpu"])
@pytest.mark.parametrize(("mixer", "gate"), [("householder", "both"), ("kronecker", "inside")])
def test_scalar_decays_with_heads(mixer, gate, room, rng):
    layer = nn.FPMamba2(
        4,
        d_state=3,
        head_dim=4,
        mixer=mixer,
        gate=gate,
        alpha_max=1.0,
        hidden=EVERYTHING,
        short_conv=3,
        channel_skip=gate == "inside",
        bias=True,
        solver=fp.Solver(**TIGHT),
        adjoint=fp.Adjoint(**TIGHT),
    )
    params = layer.init(np.random.default_rng(3), np.float64)
    params["in_proj.weight"] *= 6
    x = rng.standard_normal((2, 3, 4))
    with fp.arrays.use_room(room):
        for name, slope, gradient in slopes_and_gradients(layer, params, x, rng):
            assert gradient == pytest.approx(slope, rel=2e-6, abs=1e-7), name
        y, state = layer(params, x), layer.initial_state((2,), np.float64)
        for t in range(3):
            now, state = layer.step(params, x[:, t], state)
            np.testing.assert_allclose(now, y[:, t], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("mixer", "rank"), [("householder", 2), ("kronecker", 1), ("mixture", 2)])
def test_rooms_agree(mixer, rank, rng):
    layer, params = build(mixer, rank, short_conv=3)
    x, y_bar = rng.standard_normal((2, 3, 20, 4))
    found = {}
    for room in ("reference", "cpu"):
        with fp.arrays.use_room(room):
            y, pullback = layer.vjp(params, x)
            found[room] = y, *pullback(y_bar)
    (y, bars, x_bar), (y_, bars_, x_bar_) = found.values()
    np.testing.assert_allclose(y_, y, rtol=0, atol=1e-9)
    np.testing.assert_allclose(x_bar_, x_bar, rtol=0, atol=1e-8)
    for name, bar in bars.items():
        np.testing.assert_allclose(bars_[name], bar, rtol=0, atol=1e-8 * (1 + np.abs(bar).max()))


def test_decoding_equals_the_whole_over_thousands_of_steps(rng):
    layer = nn.FPMamba(8, d_state=4, alpha_max=1.0, solver=fp.Solver(rtol=1e-8))
    params = layer.init(np.random.default_rng(0), np.float64)
    x = rng.standard_normal((1, 2000, 8))
    with fp.arrays.use_room("cpu"):
        y, state = layer(params, x), layer.initial_state((1,), np.float64)
        error = 0.0
        for t in range(x.shape[1]):
            now, state = layer.step(params, x[:, t], state)
            error = max(error, np.abs(now - y[:, t]).max())
    assert error < 1e-6
    # what is kept of the parameters is noticed to have changed
    changed, _ = layer.step({n: 1.1 * p for n, p in params.items()}, x[:, 0], state)
    params["z_y_proj.parametrizations.weight.original0"][...] = 0
    params["mixer.u_proj.parametrizations.weight.original1"] *= -1
    again, _ = layer.step(params, x[:, 0], state)
    fresh = nn.FPMamba(8, d_state=4, alpha_max=1.0, solver=layer.solver)
    np.testing.assert_array_equal(again, fresh.step(params, x[:, 0], state)[0])
    assert np.abs(changed - again).max() > 1e-3


def test_models_of_several_layers(rng):
    tokens = rng.integers(0, 5, (2, 6))
    for kind, options in (("FPMamba", {}), ("FPMamba2", {"head_dim": 4})):
        model = nn.Model(
            5,
            d_model=8,
            n_layers=2,
            layer={"kind": kind, "d_state": 3, "hidden": ["mixer", "c"], "alpha_max": 1.0, **options},
        )
        model = nn.Model.from_config(json.loads(json.dumps(model.config())))
        params = model.init(np.random.default_rng(0), np.float64)
        with fp.arrays.use_room("reference"):
            logits, pullback = model.vjp(params, tokens)
            bars, _ = pullback(np.ones_like(logits))
            state = model.initial_state((2,), np.float64)
            for t in range(6):
                now, state = model.step(params, tokens[:, t], state)
                np.testing.assert_allclose(now, logits[:, t], rtol=0, atol=1e-6)
        assert sorted(bars) == sorted(params)
    with pytest.raises(ValueError, match="kind of the layer"):
        nn.Model(5, d_model=8, layer={"kind": "GRU"})


def test_diagnostics_of_the_one_step_gradient(rng):
    layer, params = build("householder", 1, hidden=("mixer", "b", "c"))
    x, y_bar = rng.standard_normal((2, 2, 5, 4))
    with fp.arrays.use_room("reference"):
        found = nn.gradient_diagnostics(layer, params, x, y_bar)
        # a layer whose parameters see nothing and that mixes nothing has but one gradient
        plain, plain_params = build("fixed", 1, hidden=())
        plain_params[f"mixer.{plain.map.name}"][...] = 0
        same = nn.gradient_diagnostics(plain, plain_params, x, y_bar)
    assert found.converged
    assert found.descends == (found.cosine > 0)
    assert 0 < found.rate < 1
    assert found.contracts
    assert set(found.cosines) == set(params)
    assert same.cosine == pytest.approx(1)
    assert same.input_cosine == pytest.approx(1)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (3, 4), (2, 1, 3, 4)])
@pytest.mark.parametrize("method", ["auto", "chunked", "parallel"])
def test_any_leading_axes_and_empty_ones(shape, method, rng):
    layer, params = build("householder", 1, solver=fp.Solver(method, rtol=1e-9, max_iter=4000), short_conv=3)
    x, record = rng.standard_normal(shape), []
    with fp.arrays.use_room("reference"):
        y, pullback = layer.vjp(params, x, record=record)
        bars, x_bar = pullback(y)
        _, state = layer.prefill(params, x)
    assert y.shape == x_bar.shape == shape
    assert record[0].status.shape == shape[:-2]
    assert {n: b.shape for n, b in bars.items()} == {n: p.shape for n, p in params.items()}
    assert {n: s.shape for n, s in state.items()} == {
        n: s.shape for n, s in layer.initial_state(shape[:-2]).items()
    }


def test_a_broken_sequence_is_its_own_affair(rng):
    layer, params = build("householder", 1)
    x = rng.standard_normal((3, 5, 4))
    with fp.arrays.use_room("cpu"):
        y = layer(params, x)
        x[1, 2] = np.nan
        with pytest.warns(fp.ConvergenceWarning, match="FPMamba: 1 of 3"):
            found = layer(params, x)
    np.testing.assert_array_equal(found[[0, 2]], y[[0, 2]])
    np.testing.assert_array_equal(found[1, :2], y[1, :2])
    assert np.isnan(found[1, 2:]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": ("lam",)}, "hidden must be some of"),
        ({"gate": "around"}, "gate must be one of"),
        ({"d_state": 0}, "d_state must be at least 1"),
        ({"dt_rank": 0}, "dt_rank must be at least 1"),
        ({"mixer": "attention"}, "mixer must be one of"),
    ],
)
def test_refusals_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        nn.FPMamba(4, **options)
    with pytest.raises(ValueError, match="head_dim must divide"):
        nn.FPMamba2(4, head_dim=3)


# Where an iteration wanders for hundreds of steps, rounding decides where it goes: those are cut short.
SHORT = {"train": True, "max_iter": 12}
PUBLISHED = {
    "defaults": {"train": False},
    "symmetric, factored, gate inside": {
        "symm_mixer": True,
        "mixer_proj_rank": 3,
        "glu_in_loop": True,
        **SHORT,
    },
    "input only, convolution, training": {"mixer_h_dep": False, "use_short_conv": True, "train": True},
    "gate inside, three differentiated steps": {
        "glu_in_loop": True,
        "use_short_conv": True,
        "n_backwards": 3,
        **SHORT,
    },
    "seven iterations": {"train": True, "max_iter": 7, "convergence_threshold": -1.0, "bias": True},
}


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        ("householderproduct", 1),
        ("householderproduct", 3),
        ("dplr", 2),
        ("kronecker", 1),
        ("monarch", 4),
        ("nonselective", 1),
    ],
)
@pytest.mark.parametrize("options", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_layer_against_torch(kind, rank, options, rng):
    pytest.importorskip("torch", reason="torch is the oracle of this test")
    import torch_twin

    config = {
        "mixer_type": kind,
        "mixer_rank": rank,
        "d_state": 3,
        "convergence_threshold": 0.1,
        "max_iter": 100,
        "norm_eps": 1e-6,
        "use_short_conv": False,
        "mixer_h_dep": True,
        "symm_mixer": False,
        "glu_in_loop": False,
        "n_backwards": 1,
    } | {name: value for name, value in options.items() if name != "train"}
    meta = {"cls": "FPMamba", "d_model": 8, "train": options.get("train", False), "config": config}
    state = nn.FPMamba(8, **nn.official.mamba_options(config)).init(rng, np.float64)
    state = {name: value + 0.1 * rng.standard_normal(value.shape) for name, value in state.items()}
    # where the two libraries round the exponential alike
    state["A_log"] = np.log(np.broadcast_to([1.0, 2.0, 3.0], (16, 3))).astype(np.float32).astype(np.float64)
    base = "mixer.q_proj.parametrizations.weight.0.base"
    if kind == "nonselective":
        state[base] = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    x, cotangent = rng.standard_normal((2, 4, 7, 8))
    y, x_bar, params_bar, count = torch_twin.case(meta, state, x, cotangent)
    layer, params = nn.from_official(meta, state)
    record = []
    with fp.arrays.use_room("reference"):
        found, pullback = layer.vjp(params, x, record=record)
        found_bar, found_x_bar = pullback(cotangent)
    assert record[0].iterations.max() == count
    np.testing.assert_allclose(found, y, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found_x_bar, x_bar, rtol=0, atol=1e-8)
    params_bar.pop(base, None)
    for name, bar in params_bar.items():
        atol = 1e-6 if name in ("A_log", "D", "dt_proj.bias") else 1e-8
        np.testing.assert_allclose(found_bar[name], bar, rtol=1e-7, atol=atol * (1 + np.abs(bar).max()))
