"""Plain layers, losses, optimiser and schedules: values against their formulas, adjoints by the dot-product
test."""

import numpy as np
import pytest
from scipy import special

import fpnumba as fp
from fpnumba import nn
from fpnumba.nn import activations, schedules

LAYERS = {
    "linear": nn.Linear(3, 4),
    "linear without bias": nn.Linear(3, 4, bias=False),
    "rms norm": nn.RMSNorm(3, eps=0.1),
    "layer norm": nn.LayerNorm(3, eps=0.1),
    "gated unit": nn.SwiGLU(3, 5),
    "short convolution": nn.ShortConv(3, 4),
    "wide convolution": nn.ShortConv(3, 7, activation="identity"),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("shape", [(2, 5, 3), (5, 3), (2, 1, 2, 3), (0, 2, 3), (2, 0, 3)])
def test_adjoint_of_layer(layer, shape, rng):
    params = {n: rng.standard_normal(p.shape) for n, p in layer.init(rng, np.float64).items()}
    x = rng.standard_normal(shape)
    assert fp.check_adjoint(layer, params, x, tolerance=1e-8).passed
    y, pullback = layer.vjp(params, x)
    np.testing.assert_array_equal(y, layer(params, x))
    grads, x_bar = pullback(np.ones_like(y))
    assert {n: g.shape for n, g in grads.items()} == {n: p.shape for n, p in params.items()}
    assert x_bar.shape == shape


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_single_precision_stays_and_inputs_are_left_alone(layer, rng):
    params, x = layer.init(rng), rng.standard_normal((2, 8, 6)).astype(np.float32)[:, ::-2, ::2]
    x.flags.writeable = False
    wide = layer({n: p.astype(np.float64) for n, p in params.items()}, x.astype(np.float64))
    y, pullback = layer.vjp(params, x)
    grads, x_bar = pullback(y)
    assert {a.dtype for a in (y, x_bar, *grads.values())} == {np.dtype(np.float32)}
    np.testing.assert_allclose(y, wide, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activations(dtype, rng):
    x = np.concatenate([rng.standard_normal(1000) * 20, [0.0, -200.0, 200.0]]).astype(dtype)
    tolerance = 4 * np.finfo(dtype).eps
    for name, expected in (
        ("identity", x),
        ("relu", np.maximum(x, 0)),
        ("sigmoid", special.expit(x)),
        ("silu", x * special.expit(x)),
    ):
        np.testing.assert_allclose(activations.activate(name, x), expected, rtol=tolerance, atol=tolerance)
    assert np.isnan(activations.silu(np.array([np.nan], dtype))).all()
    np.testing.assert_array_equal(activations.sigmoid(np.array([-np.inf, np.inf], dtype)).round(30), [0, 1])
    ybar = rng.standard_normal(x.shape).astype(dtype)
    s = special.expit(x.astype(np.float64))
    np.testing.assert_allclose(
        activations.silu_vjp(x, ybar), ybar * s * (1 + x * (1 - s)), rtol=1e3 * tolerance, atol=20 * tolerance
    )
    with pytest.raises(ValueError, match="activation must be one of"):
        activations.check("tanh")


def test_norms_and_gated_unit_are_their_formulas(rng):
    x = rng.standard_normal((4, 3))
    params = {"weight": rng.standard_normal(3), "bias": rng.standard_normal(3)}
    scaled = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(nn.RMSNorm(3)(params, x), params["weight"] * scaled, rtol=1e-13)
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        nn.LayerNorm(3)(params, x), params["weight"] * normal + params["bias"], rtol=1e-12
    )
    unit = nn.SwiGLU(3)
    p = unit.init(rng, np.float64)
    gate = x @ p["gate.weight"].T
    inner = gate * special.expit(gate) * (x @ p["up.weight"].T)
    np.testing.assert_allclose(unit(p, x), inner @ p["down.weight"].T, rtol=1e-12)


def test_short_convolution_step_by_step_and_causality(rng):
    layer = nn.ShortConv(3, 4)
    params, x = layer.init(rng, np.float64), rng.standard_normal((2, 6, 3))
    y = layer(params, x)
    state = layer.initial_state((2,), np.float64)
    for t in range(6):
        now, state = layer.step(params, x[:, t], state)
        np.testing.assert_allclose(now, y[:, t], rtol=1e-12)
    for cut in (3, 5):  # what came before stands before the first step
        np.testing.assert_allclose(
            layer.vjp(params, x[:, cut:], past=x[:, cut - 3 : cut])[0], y[:, cut:], rtol=1e-12
        )
    later = x.copy()
    later[:, 3:] = np.nan
    np.testing.assert_array_equal(layer(params, later)[:, :3], y[:, :3])
    with pytest.raises(ValueError, match="width"):
        nn.ShortConv(3, 0)


def test_embedding(rng):
    layer = nn.Embedding(5, 3)
    params, tokens = layer.init(rng, np.float64), np.array([[0, 4, 4], [1, 0, 4]])
    y, pullback = layer.vjp(params, tokens)
    np.testing.assert_array_equal(y, params["weight"][tokens])
    ybar = rng.standard_normal(y.shape)
    expected = np.zeros((5, 3))
    np.add.at(expected, tokens, ybar)
    grads, nothing = pullback(ybar)
    np.testing.assert_allclose(grads["weight"], expected, rtol=1e-14)
    assert nothing is None
    with pytest.raises(TypeError, match="tokens must be integers"):
        layer(params, tokens * 1.0)
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 5\)"):
        layer(params, tokens + 1)


def test_cross_entropy(rng):
    logits, targets = rng.standard_normal((2, 3, 4)) * 5, rng.integers(0, 4, (2, 3))
    targets[1, 2] = -100
    log_p = logits - special.logsumexp(logits, axis=-1, keepdims=True)
    counted = np.argwhere(targets != -100)
    expected = -np.mean([log_p[(*i, targets[tuple(i)])] for i in counted])
    assert nn.cross_entropy(logits, targets) == pytest.approx(expected, rel=1e-13)
    loss, bar = nn.cross_entropy_vjp(logits, targets)
    assert loss == pytest.approx(expected, rel=1e-13)
    direction = rng.standard_normal(logits.shape)
    e = 1e-5
    slope = nn.cross_entropy(logits + e * direction, targets) - nn.cross_entropy(
        logits - e * direction, targets
    )
    assert np.vdot(bar, direction) == pytest.approx(slope / (2 * e), rel=1e-8)
    assert not bar[1, 2].any()
    # far logits overflow nothing
    assert np.isfinite(nn.cross_entropy(np.array([[1e5, -1e5]]), np.array([1])))
    nothing = np.full((2, 3), -100)
    loss, bar = nn.cross_entropy_vjp(logits, nothing)
    assert loss == 0
    assert not bar.any()
    assert np.isnan(nn.accuracy(logits, nothing))
    right = np.mean([logits[tuple(i)].argmax() == targets[tuple(i)] for i in counted])
    assert nn.accuracy(logits, targets) == pytest.approx(right)


def test_targets_that_are_not_scored(rng):
    logits, targets = rng.standard_normal((2, 3, 4)), rng.integers(0, 4, (2, 3))
    left_out = rng.random((2, 3)) < 0.5
    left_out[0, 0], left_out[0, 1] = True, False
    masked = np.where(left_out, -1, targets)
    logits[0, 0] = np.nan  # nobody looks there
    loss, bar = nn.cross_entropy_vjp(logits, masked)
    short_loss, short_bar = nn.cross_entropy_vjp(logits[~left_out], targets[~left_out])
    assert loss == nn.cross_entropy(logits, masked) == pytest.approx(short_loss, rel=1e-13)
    np.testing.assert_allclose(bar[~left_out], short_bar, rtol=1e-13)
    assert not bar[left_out][1:].any()
    right = (logits.argmax(-1) == targets)[~left_out]
    assert nn.accuracy(logits, masked) == pytest.approx(right.mean())
    # beside a value of the caller's
    both = np.where(masked == 2, -100, masked)
    assert nn.cross_entropy(logits, both) == nn.cross_entropy(logits, masked, ignore=2)


def test_losses_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"targets must have shape \(2,\)"):
        nn.cross_entropy(np.zeros((2, 3)), np.zeros(3, int))
    with pytest.raises(TypeError, match="targets must be integers"):
        nn.cross_entropy(np.zeros((2, 3)), np.zeros(2))
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 3\)"):
        nn.accuracy(np.zeros((2, 3)), np.array([0, 3]))


def adamw(params, grads, steps, *, rate, decay, clip):
    """AdamW as its paper writes it."""
    params = {n: p.copy() for n, p in params.items()}
    m, v = ({n: np.zeros_like(p) for n, p in params.items()} for _ in range(2))
    for t in range(1, steps + 1):
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for n, g in grads.items():
            g = g * min(1.0, clip / norm)
            m[n] = 0.9 * m[n] + 0.1 * g
            v[n] = 0.99 * v[n] + 0.01 * g**2
            if params[n].ndim > 1:
                params[n] -= rate(t - 1) * decay * params[n]
            params[n] -= rate(t - 1) * (m[n] / (1 - 0.9**t)) / (np.sqrt(v[n] / (1 - 0.99**t)) + 1e-8)
    return params


def test_adamw_is_its_formula(rng):
    params = {
        "w": rng.standard_normal((3, 2)),
        "bias": rng.standard_normal(2),
        "rest": rng.standard_normal(2),
    }
    grads = {"w": rng.standard_normal((3, 2)), "bias": rng.standard_normal(2)}
    rate = schedules.warmup_cosine(0.1, warmup=2, total=6)
    optimizer = nn.AdamW(rate, betas=(0.9, 0.99), weight_decay=0.3, clip=0.5)
    given = {n: p.copy() for n, p in params.items()}
    found, state = params, optimizer.init(params)
    for _ in range(4):
        found, state = optimizer.update(found, grads, state)
    expected = adamw({n: given[n] for n in grads}, grads, 4, rate=rate, decay=0.3, clip=0.5)
    for n in grads:
        np.testing.assert_allclose(found[n], expected[n], rtol=1e-12)
        np.testing.assert_array_equal(params[n], given[n])
    np.testing.assert_array_equal(found["rest"], given["rest"])
    assert int(state["step"]) == 4
    assert set(state) == {"step", *(f"{k}.{n}" for k in "mv" for n in params)}
    with pytest.raises(ValueError, match="which params lacks"):
        optimizer.update(params, {"x": grads["w"]}, state)
    with pytest.raises(ValueError, match="has shape"):
        optimizer.update(params, {"w": grads["bias"]}, state)


@pytest.mark.parametrize(
    "options", [{"betas": (1.0, 0.9)}, {"eps": 0.0}, {"weight_decay": -1.0}, {"clip": 0.0}]
)
def test_adamw_refuses(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        nn.AdamW(0.1, **options)


def test_schedules():
    assert [schedules.warmup_linear(2.0, warmup=2, total=4)(t) for t in range(6)] == [1, 2, 2, 1, 0, 0]
    cosine = schedules.warmup_cosine(1.0, warmup=1, total=5, floor=0.5)
    np.testing.assert_allclose([cosine(t) for t in (0, 1, 3, 5, 9)], [1, 1, 0.75, 0.5, 0.5])
    assert schedules.warmup_constant(1.0, warmup=0)(0) == schedules.constant(1.0)(7) == 1
    with pytest.raises(ValueError, match="total must exceed warmup"):
        schedules.warmup_cosine(1.0, warmup=5, total=5)
    with pytest.raises(ValueError, match="rate"):
        schedules.constant(-1.0)
