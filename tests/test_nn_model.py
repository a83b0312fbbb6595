"""Whole models: gradients, decoding, configuration, and that they learn."""

import json

import numpy as np
import pytest

import fpnumba as fp
from fpnumba import nn
from fpnumba.train.threads import one_blas_thread


def small(**options):
    return nn.Model(5, 3, **{"d_model": 4, "layer": {"mixer": "householder", "alpha_max": 1.0}} | options)


@pytest.mark.parametrize("options", [{}, {"n_layers": 2, "mlp": 6}], ids=["one layer", "two blocks"])
def test_gradient(options, rng):
    model = small(**options)
    params = model.init(rng, np.float64)
    tokens, targets = rng.integers(0, 5, (2, 4)), rng.integers(0, 3, (2, 4))

    def loss(params):
        return nn.cross_entropy(model(params, tokens), targets)

    logits, pullback = model.vjp(params, tokens)
    np.testing.assert_array_equal(logits, model(params, tokens))
    grads, nothing = pullback(nn.cross_entropy_vjp(logits, targets)[1])
    assert nothing is None
    assert list(grads) == list(params)
    for name, grad in grads.items():
        v = rng.standard_normal(grad.shape)
        e = 1e-5
        slope = (
            loss({**params, name: params[name] + e * v}) - loss({**params, name: params[name] - e * v})
        ) / (2 * e)
        assert np.vdot(grad, v) == pytest.approx(slope, rel=1e-5, abs=1e-8), name


def test_decoding_is_the_whole(rng):
    model = small(n_layers=2, mlp=6, layer={"mixer": "dplr", "rank": 2, "short_conv": 3})
    params, tokens = model.init(rng, np.float64), rng.integers(0, 5, (3, 6))
    logits, state = model(params, tokens), model.initial_state((3,), np.float64)
    for t in range(6):
        now, state = model.step(params, tokens[:, t], state)
        np.testing.assert_allclose(now, logits[:, t], rtol=0, atol=1e-11)


def test_record_and_dtype(rng):
    model = small(n_layers=2)
    params, record = model.init(rng), []
    logits, pullback = model.vjp(params, rng.integers(0, 5, (3, 6)), record=record)
    grads, _ = pullback(logits)
    assert {a.dtype for a in (logits, *grads.values())} == {np.dtype(np.float32)}
    assert [solution.iterations.shape for solution in record] == [(3,), (3,)]
    wide = model.init(np.random.default_rng(0), np.float64)
    narrow = model.init(np.random.default_rng(0))
    for name, value in wide.items():
        np.testing.assert_array_equal(value.astype(np.float32), narrow[name])


def test_configuration_goes_through_json():
    model = small(
        mlp=8,
        layer={
            "mixer": "kronecker",
            "hidden": (),
            "solver": fp.Solver("chunked", chunk=8, rtol=1e-5),
            "adjoint": fp.Adjoint("neumann", terms=2),
        },
    )
    config = json.loads(json.dumps(model.config()))
    same = nn.Model.from_config(config)
    assert same.rnn.solver == model.rnn.solver
    assert same.rnn.adjoint == model.rnn.adjoint
    assert same.config() == model.config() == config
    assert small(layer={"solver": {"method": "parallel"}}).rnn.solver == fp.Solver("parallel")


def test_refusals():
    with pytest.raises(ValueError, match="n_layers"):
        small(n_layers=0)
    with pytest.raises(TypeError, match="tokens"):
        small()(small().init(np.random.default_rng(0)), np.zeros((1, 2)))


def parity(rng, batch, length):
    tokens = rng.integers(0, 2, (batch, length))
    return tokens, np.cumsum(tokens, axis=1) % 2


def train(steps, seed=0):
    """A model that learns parity, which takes a negative eigenvalue; deterministic."""
    rng = np.random.default_rng(seed)
    model = nn.Model(2, d_model=8, layer={"mixer": "householder", "solver": fp.Solver(on_failure="ignore")})
    params = model.init(rng)
    optimizer = nn.AdamW(nn.schedules.warmup_constant(1e-2, warmup=10), clip=1.0)
    state, losses = optimizer.init(params), []
    for _ in range(steps):
        tokens, targets = parity(rng, 64, 8)
        logits, pullback = model.vjp(params, tokens)
        loss, bar = nn.cross_entropy_vjp(logits, targets)
        params, state = optimizer.update(params, pullback(bar)[0], state)
        losses.append(loss)
    return model, params, losses


def test_learns_parity_and_generalises():
    # how far it generalises hangs on the last digits, and those on how BLAS shares its work
    with one_blas_thread():
        model, params, losses = train(400, seed=3)
    assert losses[0] > 0.5
    tokens, targets = parity(np.random.default_rng(1), 64, 32)
    assert nn.accuracy(model(params, tokens), targets) > 0.95


def test_training_is_deterministic():
    (_, first, losses), (_, second, again) = train(3), train(3)
    assert losses == again
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
