"""The published layer: golden cases, and every mixer and option against torch's autograd."""

import json
from pathlib import Path

import numpy as np
import pytest

import fpnumba as fp
from fpnumba import nn

GOLDEN = sorted((Path(__file__).parent / "golden").glob("fprnn_*.npz"))
BASE = "mixer.q_proj.parametrizations.weight.0.base"


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
    np.testing.assert_allclose(y, data["out.y"], rtol=0, atol=1e-13)
    np.testing.assert_allclose(x_bar, data["grad1.x"], rtol=0, atol=1e-13)
    # its counter is one high
    assert record[0].iterations.max() == meta["iterations"][0] - 1
    assert set(params_bar) == set(params)
    for name, bar in params_bar.items():
        np.testing.assert_allclose(bar, data[f"grad1.{name}"], rtol=1e-10, atol=1e-13)


def test_other_ways_to_the_golden_fixed_point():
    data = np.load(next(path for path in GOLDEN if "converged" in path.stem))
    meta = json.loads(bytes(data["meta"]))
    state = {name[6:]: data[name] for name in data.files if name.startswith("param.")}
    layer, params = fp.nn.from_official(meta, state)
    for solver in (
        fp.Solver(),
        fp.Solver("direct"),
        fp.Solver("parallel", rtol=1e-12),
        fp.Solver("chunked", chunk=4, rtol=1e-12),
        fp.Solver(acceleration="anderson", rtol=1e-12),
    ):
        layer.solver = solver
        np.testing.assert_allclose(layer(params, data["in.x"]), data["out.y"], rtol=0, atol=1e-9)


MIXERS = [
    ("householderproduct", 1),
    ("householderproduct", 3),
    ("dplr", 2),
    ("kronecker", 1),
    ("monarch", 4),
    ("nonselective", 1),
    ("mixture", 3),
]
OPTIONS = {
    "defaults": {"train": False},
    "symmetric, factored": {"symm_mixer": True, "mixer_proj_rank": 3},
    "no hidden state, no convolution, training": {
        "mixer_h_dep": False,
        "use_short_conv": False,
        "train": True,
    },
    "three differentiated steps": {
        "use_short_conv": False,
        "convergence_threshold": 1e-6,
        "n_backwards": 3,
    },
    "five iterations": {"train": True, "max_iter": 5, "convergence_threshold": -1.0},
}


def published(rng, *, d_model=8, train=False, **config):
    """Meta and a state of a case of the published code."""
    defaults = {
        "mixer_type": "householderproduct",
        "mixer_rank": 1,
        "mixer_proj_rank": -1,
        "convergence_threshold": 0.1,
        "max_iter": 1000,
        "norm_eps": 1e-6,
        "use_short_conv": True,
        "mixer_h_dep": True,
        "symm_mixer": False,
        "n_backwards": 1,
    }
    meta = {"cls": "FPRNN", "d_model": d_model, "train": train, "config": defaults | config}
    layer = nn.FPRNN(d_model, **nn.official.layer_options(meta["config"]))
    state = layer.init(rng, np.float64)
    state = {name: value + 0.1 * rng.standard_normal(value.shape) for name, value in state.items()}
    if config.get("mixer_type") == "nonselective":
        size = state["lambda_proj.bias"].size
        state[BASE] = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return meta, state


@pytest.mark.parametrize(("kind", "rank"), MIXERS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_against_torch(kind, rank, options, rng):
    pytest.importorskip("torch", reason="torch is the oracle of this test")
    import torch_twin

    meta, state = published(rng, mixer_type=kind, mixer_rank=rank, **options)
    x, cotangent = rng.standard_normal((2, 4, 7, 8))
    y, x_bar, params_bar, count = torch_twin.case(meta, state, x, cotangent)
    layer, params = nn.from_official(meta, state)
    record = []
    with fp.arrays.use_room("reference"):
        found, pullback = layer.vjp(params, x, record=record)
        found_bar, found_x_bar = pullback(cotangent)
    assert record[0].iterations.max() == count
    np.testing.assert_allclose(found, y, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found_x_bar, x_bar, rtol=0, atol=1e-11)
    params_bar.pop(BASE, None)
    for name, bar in params_bar.items():
        np.testing.assert_allclose(found_bar[name], bar, rtol=1e-9, atol=1e-11 * (1 + np.abs(bar).max()))
    # what torch says nothing about is not used
    assert not any(found_bar[name].any() for name in found_bar.keys() - params_bar.keys())


def test_selective_dense_against_torch(rng):
    pytest.importorskip("torch", reason="torch is the oracle of this test")
    import torch_twin

    # the mixer itself: the published layer has 256 channels with it
    size = 6
    mixer = nn.FPRNN(size, expand=1, mixer="dense", norm_eps=1e-6).map
    params = mixer.init(rng, np.float64)
    p, v, ybar = (rng.standard_normal((2, 3, n)) for n in (2 * size, size, size))
    weights = mixer.stack.weights(params, np.float64)
    a = p @ weights.first.T + weights.bias
    (_, built), kept = mixer.build(a)
    q_bar = ybar[..., :, None] * v[..., None, :]
    abar = mixer.build_vjp(a, kept, (q_bar,))

    import torch

    tensors = {f"mixer.{n}": torch.tensor(value) for n, value in params.items()}
    seen = torch.tensor(p, requires_grad=True)
    y = torch_twin.dense(tensors, seen, torch.tensor(v), eps=1e-6)
    y.backward(torch.tensor(ybar))
    np.testing.assert_allclose((built[0] @ v[..., None])[..., 0], y.detach().numpy(), rtol=1e-11)
    np.testing.assert_allclose(abar @ weights.first, seen.grad.numpy(), rtol=1e-8, atol=1e-12)


def test_orthogonal_parametrisation_is_that_of_torch(rng):
    torch = pytest.importorskip("torch", reason="torch is the oracle of this test")
    linear = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(6, 6, bias=False).double())
    original = linear.parametrizations.weight.original
    with torch.no_grad():
        original += torch.tensor(rng.standard_normal((6, 6)))
    bar = rng.standard_normal((6, 6))
    linear.weight.backward(torch.tensor(bar))
    mixer = nn.FPRNN(3, mixer="fixed").map
    mixer.base = linear.parametrizations.weight[0].base.numpy()
    params = {mixer.name: original.detach().numpy()}
    np.testing.assert_allclose(mixer.matrix(params), linear.weight.detach().numpy(), atol=1e-13)
    found = mixer.matrix_vjp(params, bar)[mixer.name]
    np.testing.assert_allclose(found, original.grad.numpy(), atol=1e-12)


def test_compiled_modules_and_single_precision(rng):
    meta, state = published(rng, mixer_type="kronecker")
    state = {
        n.replace("mixer.", "mixer._orig_mod.", 1) if n.startswith("mixer.") else n: v
        for n, v in state.items()
    }
    layer, params = nn.from_official(meta, {n: v.astype(np.float32) for n, v in state.items()})
    assert not any("_orig_mod" in name for name in params)
    with fp.arrays.use_room("reference"):
        assert layer(params, np.ones((1, 3, 8), np.float32)).dtype == np.float32


def test_refusals_name_the_culprit(rng):
    meta, state = published(rng)
    with pytest.raises(ValueError, match="'FPMamba2'"):
        nn.from_official(meta | {"cls": "FPMamba2"}, state)
    with pytest.raises(ValueError, match="d_model"):
        nn.from_official({"cls": "FPRNN"}, state)
    with pytest.raises(ValueError, match="mixer_type"):
        nn.from_official({"d_model": 8, "config": {"mixer_type": "attention"}}, state)
    with pytest.raises(ValueError, match=r"state lacks b_proj\.weight"):
        nn.from_official(meta, {n: v for n, v in state.items() if n != "b_proj.weight"})
    with pytest.raises(ValueError, match="which this configuration does not use"):
        nn.from_official(meta, state | {"A_log": np.ones(3)})
    with pytest.raises(ValueError, match=r"b_proj\.weight has shape"):
        nn.from_official(meta, state | {"b_proj.weight": np.ones((3, 3))})
    with pytest.raises(ValueError, match="float32, float64"):
        nn.from_official(meta, state | {"b_proj.weight": state["b_proj.weight"].astype(np.float32)})
    meta, state = published(rng, mixer_type="nonselective")
    state.pop(BASE)
    with pytest.raises(ValueError, match="base"):
        nn.from_official(meta, state)
