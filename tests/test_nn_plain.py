"""Mamba and the LSTM: values against plain loops, gradients against differences, decoding, whole models."""

import doctest
import importlib
from typing import Any

import numpy as np
import pytest
from derivatives import slopes_and_gradients
from numpy.testing import assert_allclose
from scipy import special

import fpnumba as fp
from fpnumba import nn

LAYERS: dict[str, Any] = {
    "mamba": nn.Mamba(4, d_state=3),
    "mamba with biases, no convolution": nn.Mamba(4, d_state=2, d_inner=5, short_conv=None, bias=True),
    "mamba, wide steps": nn.Mamba(4, expand=1, d_state=1, dt_rank=3, short_conv=2),
    "lstm": nn.LSTM(4),
    "lstm with a width of its own": nn.LSTM(4, d_inner=6),
}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


def moved(layer: Any, rng: np.random.Generator) -> dict[str, Any]:
    """Parameters of which none is zero or one."""
    return {n: p + 0.3 * rng.standard_normal(p.shape) for n, p in layer.init(rng, np.float64).items()}


def silu(x: Any) -> Any:
    return x * special.expit(x)


def mamba_step_by_step(layer: nn.Mamba, p: dict[str, Any], x: Any) -> Any:
    """One sequence ``(T, d_model)``, from the equations."""
    xz = x @ p["in_proj.weight"].T + p.get("in_proj.bias", 0)
    u, z = xz[:, : layer.d_inner], xz[:, layer.d_inner :]
    if layer.conv is not None:
        taps = p["conv1d.weight"][:, 0]
        padded = np.concatenate([np.zeros((taps.shape[1] - 1, layer.d_inner)), u])
        u = np.stack(
            [
                silu(p["conv1d.bias"] + sum(taps[:, k] * padded[t + k] for k in range(taps.shape[1])))
                for t in range(len(x))
            ]
        )
    state, out = np.zeros((layer.d_inner, layer.d_state)), []
    for u_t, z_t in zip(u, z, strict=True):
        raw, b, c = np.split(p["x_proj.weight"] @ u_t, np.cumsum([layer.dt_rank, layer.d_state]))
        delta = np.log1p(np.exp(p["dt_proj.weight"] @ raw + p["dt_proj.bias"]))
        state = np.exp(delta[:, None] * -np.exp(p["A_log"])) * state + np.outer(delta * u_t, b)
        y = state @ c + p["D"] * u_t
        out.append(p["out_proj.weight"] @ (silu(z_t) * y) + p.get("out_proj.bias", 0))
    return np.stack(out)


def lstm_step_by_step(layer: nn.LSTM, p: dict[str, Any], x: Any) -> Any:
    """One sequence ``(T, d_model)``, from the equations."""
    h, c, out = np.zeros(layer.d_inner), np.zeros(layer.d_inner), []
    for x_t in x:
        i, f, g, o = np.split(p["weight_ih"] @ x_t + p["weight_hh"] @ h + p["bias"], 4)
        c = special.expit(f) * c + special.expit(i) * np.tanh(g)
        h = special.expit(o) * np.tanh(c)
        out.append(p["out_proj.weight"] @ h if layer.projected else h)
    return np.stack(out)


@each_layer
def test_value_is_the_equations(layer: Any, rng: np.random.Generator) -> None:
    params, x = moved(layer, rng), rng.standard_normal((2, 3, 7, 4))
    loop = mamba_step_by_step if isinstance(layer, nn.Mamba) else lstm_step_by_step
    wanted = np.array([[loop(layer, params, sequence) for sequence in group] for group in x])
    assert_allclose(layer(params, x), wanted, rtol=1e-11, atol=1e-12)


@each_layer
def test_gradient(layer: Any, rng: np.random.Generator) -> None:
    params, x = moved(layer, rng), rng.standard_normal((2, 5, 4))
    for name, slope, gradient in slopes_and_gradients(layer, params, x, rng):
        assert gradient == pytest.approx(slope, rel=1e-7, abs=1e-8), name
    assert fp.check_adjoint(layer, params, x, tolerance=1e-8).passed


@each_layer
@pytest.mark.parametrize("shape", [(5, 4), (2, 1, 3, 4), (0, 2, 4), (2, 0, 4)])
def test_shapes_and_an_empty_record(layer: Any, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    params, x, record = moved(layer, rng), rng.standard_normal(shape), []
    y, pullback = layer.vjp(params, x, record=record)
    np.testing.assert_array_equal(y, layer(params, x, record=record))
    grads, x_bar = pullback(np.ones_like(y))
    assert y.shape == x_bar.shape == shape
    assert {n: g.shape for n, g in grads.items()} == {n: p.shape for n, p in params.items()}
    assert record == []


@each_layer
def test_single_precision_stays_and_inputs_are_left_alone(layer: Any, rng: np.random.Generator) -> None:
    params, x = layer.init(rng), rng.standard_normal((3, 9, 8)).astype(np.float32)[:, ::-2, ::2]
    x.flags.writeable = False
    wide = {n: p.astype(np.float64) for n, p in params.items()}
    wanted, pull_wide = layer.vjp(wide, x.astype(np.float64))
    y, pullback = layer.vjp(params, x)
    grads, x_bar = pullback(np.ones_like(y))
    wanted_grads, _ = pull_wide(np.ones_like(wanted))
    assert {a.dtype for a in (y, x_bar, *grads.values())} == {np.dtype(np.float32)}
    assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        assert_allclose(grad, wanted_grads[name], rtol=1e-4, atol=1e-4 * np.abs(wanted_grads[name]).max())


@each_layer
def test_decoding_is_the_whole(layer: Any, rng: np.random.Generator) -> None:
    params, x = moved(layer, rng), rng.standard_normal((2, 6, 4))
    whole, state = layer(params, x), layer.initial_state((2,), np.float64)
    first, after = layer.prefill(params, x[:, :2])
    assert_allclose(first, whole[:, :2], rtol=1e-12)
    for t in range(6):
        y, state = layer.step(params, x[:, t], state)
        assert_allclose(y, whole[:, t], rtol=1e-11, atol=1e-13)
        if t == 1:
            for name, value in state.items():
                assert_allclose(value, after[name], rtol=1e-12, atol=1e-13)


@each_layer
def test_the_past_alone_is_seen(layer: Any, rng: np.random.Generator) -> None:
    params, x = moved(layer, rng), rng.standard_normal((2, 6, 4))
    later = x.copy()
    later[:, 3:] += 1.0
    np.testing.assert_array_equal(layer(params, later)[:, :3], layer(params, x)[:, :3])


def test_refusals(rng: np.random.Generator) -> None:
    for make in (lambda: nn.Mamba(0), lambda: nn.LSTM(0)):
        with pytest.raises(ValueError, match="d_model must be at least 1"):
            make()
    with pytest.raises(ValueError, match="d_inner must be at least 1"):
        nn.LSTM(2, d_inner=0)
    for layer in LAYERS.values():
        with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., T, 4\)"):
            layer(layer.init(rng), np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("kind", ["Mamba", "LSTM"])
def test_models_of_them(kind: str, rng: np.random.Generator) -> None:
    options = {"kind": kind, "d_inner": 5}
    model = nn.Model(5, 3, d_model=4, n_layers=2, layer=options, mlp=6)
    assert not model.iterates
    assert nn.Model.from_config(model.config()).config() == model.config()
    params, record = model.init(rng, np.float64), []
    tokens, targets = rng.integers(0, 5, (2, 6)), rng.integers(-1, 3, (2, 6))
    logits, pullback = model.vjp(params, tokens, record=record)
    assert record == []
    grads, _ = pullback(nn.cross_entropy_vjp(logits, targets)[1])
    for name, grad in grads.items():
        v, e = rng.standard_normal(grad.shape), 1e-5
        up, down = ({**params, name: params[name] + s * e * v} for s in (1, -1))
        slope = nn.cross_entropy(model(up, tokens), targets) - nn.cross_entropy(model(down, tokens), targets)
        assert np.vdot(grad, v) == pytest.approx(slope / (2 * e), rel=1e-5, abs=1e-8), name
    state = model.initial_state((2,), np.float64)
    for t in range(6):
        now, state = model.step(params, tokens[:, t], state)
        assert_allclose(now, logits[:, t], rtol=1e-10, atol=1e-12)


def test_an_lstm_learns_parity() -> None:
    rng = np.random.default_rng(0)
    model = nn.Model(2, d_model=16, layer={"kind": "LSTM"})
    params, optimizer = model.init(rng), nn.AdamW(1e-2, clip=1.0)
    state = optimizer.init(params)
    for _ in range(300):
        tokens = rng.integers(0, 2, (64, 8))
        logits, pullback = model.vjp(params, tokens)
        _, bar = nn.cross_entropy_vjp(logits, tokens.cumsum(1) % 2)
        params, state = optimizer.update(params, pullback(bar)[0], state)
    tokens = rng.integers(0, 2, (64, 16))
    assert nn.accuracy(model(params, tokens), tokens.cumsum(1) % 2) > 0.95


@pytest.mark.parametrize("name", ["lstm", "mamba", "losses", "model"])
def test_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"fpnumba.nn.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
