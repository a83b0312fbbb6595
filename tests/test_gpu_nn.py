"""Layers on a device give what they give on the CPU: values, gradients, decoding, training."""

import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gpu_machine import GpuRoom as Room
from numpy.testing import assert_allclose

from fpnumba import nn
from fpnumba.arrays import Room as Doors
from fpnumba.arrays import use_room
from fpnumba.gpu import use_precision
from fpnumba.nn import backend, matrix_device, ways
from fpnumba.nn.layer import FixedPointLayer
from fpnumba.solve import Adjoint, Solver

EVERYTHING = ("lambda", "mixer", "b", "c")
SOLVER: dict[str, Any] = {"rtol": 1e-12, "on_failure": "ignore"}
LAYERS: dict[str, dict[str, Any]] = {
    "householder": {},
    "householder of two": {"rank": 2},
    "dplr, lambda sees": {"mixer": "dplr", "hidden": EVERYTHING},
    "kronecker": {"mixer": "kronecker"},
    "monarch": {"mixer": "monarch", "rank": 4},
    "dense": {"mixer": "dense"},
    "fixed": {"mixer": "fixed"},
    "mixture": {"mixer": "mixture", "rank": 2},
    "projected": {"projection_rank": 3},
    "symmetric, gate in the loop": {"symmetric": True, "gate": "both"},
    "convolved": {"short_conv": 3},
    "nothing sees": {"hidden": ()},
    "only lambda sees": {"hidden": ("lambda",)},
    "relu": {"activation": "relu", "hidden": ("mixer",)},
}


@pytest.fixture
def room(gpu_room: Room, monkeypatch: pytest.MonkeyPatch) -> Room:
    """The GPU room; in the stand-in its arrays are NumPy's, and layers are told that they are not on the host."""
    if gpu_room.name == "simt":
        from fpnumba.gpu import maps

        monkeypatch.setattr(backend, "on_host", lambda array: False)
        monkeypatch.setattr(sys.modules["fpnumba.relax"], "_kernels", lambda h: maps)
        monkeypatch.setattr(backend, "room", lambda array: Doors("gpu"))
    return gpu_room


class Host:
    """The CPU, for a while."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch

    def __call__(self, function: Any) -> Any:
        with self._patch.context() as patch:
            patch.setattr(backend, "on_host", lambda array: isinstance(array, np.ndarray))
            patch.setattr(sys.modules["fpnumba.relax"], "_kernels", lambda h: None)
            patch.setattr(backend, "room", ROOM)
            return function()


ROOM, NEEDED = backend.room, ways._needed


def put(room: Room, params: Any) -> Any:
    return {name: room.give(np.ascontiguousarray(a)) for name, a in params.items()}


def close(room: Room, found: Any, wanted: Any, tolerance: float = 1e-8) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted:
            scale = 1 + np.abs(wanted[name]).max(initial=0.0)
            assert_allclose(room.get(found[name]), wanted[name], rtol=0, atol=tolerance * scale, err_msg=name)
    else:
        close(room, {"value": found}, {"value": wanted}, tolerance)


def compare(
    room: Room, layer: Any, rng: Any, monkeypatch: Any, *, steps: int = 4, tolerance: float = 1e-8
) -> None:
    params = layer.init(rng, np.float64)
    x, y_bar = rng.standard_normal((2, steps, layer.d_model)), rng.standard_normal((2, steps, layer.d_model))

    def on_the_host() -> Any:
        y, pullback = layer.vjp(params, x)
        return y, *pullback(y_bar)

    y, grads, x_bar = Host(monkeypatch)(on_the_host)
    record: list[Any] = []
    found, pullback = layer.vjp(put(room, params), room.give(x), record=record)
    assert type(found) is type(room.give(x))
    if isinstance(layer, FixedPointLayer):
        assert record[0].converged.shape == (2,)
    else:
        assert record == []
    close(room, found, y, tolerance)
    their_grads, their_bar = pullback(room.give(y_bar))
    close(room, their_grads, grads, tolerance)
    close(room, their_bar, x_bar, tolerance)


@pytest.mark.parametrize("name", LAYERS)
def test_fpmamba(room: Room, name: str, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"alpha_max": 0.6, "d_state": 3} | LAYERS[name]
    layer = nn.FPMamba(
        8, solver=Solver(**SOLVER), adjoint=Adjoint(rtol=1e-12, on_failure="ignore"), **options
    )
    compare(room, layer, rng, monkeypatch)


@pytest.mark.parametrize(
    ("mixer", "hidden"),
    [("householder", ("mixer", "b", "c")), ("householder", EVERYTHING), ("kronecker", EVERYTHING)],
)
def test_fpmamba2(room: Room, mixer: str, hidden: Any, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {
        "d_state": 3,
        "head_dim": 4,
        "alpha_max": 0.6,
        "short_conv": 2,
        "hidden": hidden,
    }
    layer = nn.FPMamba2(8, mixer=mixer, solver=Solver(**SOLVER), adjoint=Adjoint(rtol=1e-12), **options)
    compare(room, layer, rng, monkeypatch)


@pytest.mark.parametrize("method", ["parallel", "chunked"])
@pytest.mark.parametrize("adjoint", [Adjoint("one-step"), Adjoint("neumann", terms=3), Adjoint(rtol=1e-12)])
@pytest.mark.parametrize(
    "options",
    [
        {"hidden": ("mixer", "b", "c")},
        {"hidden": EVERYTHING, "gate": "both"},
        {"hidden": ("c",), "n_backwards": 2, "gate": "inside", "bias": True},
        {"mixer": "kronecker", "short_conv": 2},
        {"mixer": "kronecker", "hidden": ("b", "lambda"), "n_backwards": 1, "normalization": "rows"},
    ],
    ids=lambda options: options.get("mixer", "householder") + f" {len(options)}",
)
def test_other_ways(
    room: Room, method: str, adjoint: Adjoint, options: Any, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver = Solver(method, chunk=3 if method == "chunked" else None, **SOLVER)
    layer = nn.FPMamba(8, d_state=3, alpha_max=0.5, solver=solver, adjoint=adjoint, **options)
    compare(room, layer, rng, monkeypatch)


@pytest.mark.parametrize("mixer", ["householder", "kronecker"])
@pytest.mark.parametrize("pays", [True, False])
def test_the_adjoint_of_all_steps(
    room: Room, mixer: str, pays: bool, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By iterations of all steps, or where those would be too many, step after step."""
    layer = nn.FPMamba(
        8,
        d_state=3,
        mixer=mixer,
        alpha_max=0.5,
        hidden=EVERYTHING,
        solver=Solver("parallel", **SOLVER),
        adjoint=Adjoint(rtol=1e-12),
    )
    kept: list[Any] = []
    keep = matrix_device.keep
    monkeypatch.setattr(matrix_device, "keep", lambda *given: kept.append(keep(*given)) or kept[-1])
    monkeypatch.setattr(ways, "affordable_back", lambda *sizes: 1000)
    if not pays:
        monkeypatch.setattr(ways, "_needed", lambda history, rtol: 1e3)
    compare(room, layer, rng, monkeypatch)
    assert len(kept) == (not pays)


@pytest.mark.parametrize("mixer", ["householder", "kronecker"])
def test_what_a_gradient_keeps(room: Room, mixer: str, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, and with states that are made again, where memory is scarce."""
    from fpnumba.gpu import _mamba, mamba

    layer = nn.FPMamba(
        8,
        d_state=3,
        mixer=mixer,
        alpha_max=0.5,
        solver=Solver("parallel", **SOLVER),
        adjoint=Adjoint(rtol=1e-12),
    )
    state = 2 * layer.d_inner * 3 * 8
    monkeypatch.setattr(mamba, "ALONE_BYTES", 4 * state)
    monkeypatch.setattr(_mamba, "KEPT_BYTES", 3 * state)
    compare(room, layer, rng, monkeypatch, steps=9)


@pytest.mark.sanitize
@pytest.mark.parametrize("mixer", ["householder", "kronecker"])
def test_the_published_rule(room: Room, mixer: str, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which moves the batch together, damps, and stops early."""
    rule: dict[str, Any] = {"criterion": "published", "rtol": 0.02, "damping": 0.7, "quantile": 0.75}
    layer = nn.FPMamba(
        8,
        d_state=3,
        mixer=mixer,
        solver=Solver("parallel", **rule, on_failure="ignore"),
        adjoint=Adjoint("one-step"),
        train_mode=True,
    )
    compare(room, layer, rng, monkeypatch)


@pytest.mark.parametrize("mixer", ["householder", "kronecker"])
def test_auto_counts_the_cost(room: Room, mixer: str, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps at once where that is cheaper, as far as the first residuals tell."""
    layer = nn.FPMamba(8, d_state=3, mixer=mixer, alpha_max=0.6, solver=Solver(**SOLVER))
    params, x = put(room, layer.init(rng, np.float64)), room.give(rng.standard_normal((2, 6, 8)))
    record: list[Any] = []
    wanted = room.get(layer(params, x, record=record))
    assert record[0].method == "sequential"  # six steps are not worth a try
    for most, method in ((ways.WORTH * ways.PROBE, "sequential"), (1000, "parallel")):
        monkeypatch.setattr(ways, "affordable", lambda *sizes, most=most: most)
        if method == "sequential":  # it takes more than that many iterations
            monkeypatch.setattr(ways, "_needed", lambda history, rtol: 1e3)
        found = room.get(layer(params, x, record=record))
        assert record[-1].method == method
        assert_allclose(found, wanted, rtol=0, atol=1e-9)
        monkeypatch.setattr(ways, "_needed", NEEDED)
    layer.vjp(params, x, record=record)
    assert record[-1].method == "sequential"  # the exact gradient needs what that leaves


def test_what_residuals_tell() -> None:
    history = np.array([[1.0, 1.0, 1.0, 1e-9], [0.5, 1.0, 0.1, 1e-10], [0.25, 1.0, 0.01, 1e-11]])
    assert_allclose(NEEDED(history[:, :1], 0.25 / 8), 3.0)
    assert NEEDED(history[:, 1:2], 1e-3) == np.inf
    assert NEEDED(history[:, 3:], 1e-3) == 0.0
    assert_allclose(NEEDED(history[:, [0, 2, 3]], 1e-3), np.log(0.004) / np.log(0.5))
    assert ways.affordable(512, 16, 1024) == 0
    assert ways.affordable_back(512, 16, 1024) < ways.PROBE * ways.WORTH < ways.affordable_back(8, 4096, 1024)
    assert ways.affordable(1, 16384, 1024) > ways.affordable(64, 1024, 1024) > 1


@pytest.mark.parametrize("criterion", ["published", "max"])
def test_as_many_iterations_as_before(
    room: Room, criterion: str, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a recording does in place of an iteration that looks how far it is."""
    from fpnumba.gpu import maps

    rule: dict[str, Any] = {"criterion": criterion, "rtol": 1e-3, "max_iter": 40, "on_failure": "ignore"}
    layer = nn.FPMamba(8, d_state=3, solver=Solver("parallel", **rule), train_mode=True)
    params, x = put(room, layer.init(rng, np.float64)), room.give(rng.standard_normal((3, 5, 8)))
    record: list[Any] = []
    wanted = room.get(layer(params, x, record=record))
    counts = [int(record[0].iterations.max()), 1]
    monkeypatch.setattr(maps, "rehearsed", lambda: counts.pop(0))
    found = room.get(layer(params, x, record=record))
    # a sequence that has met the tolerance rests otherwise
    assert_allclose(found, wanted, rtol=0, atol=1e-12 if criterion == "published" else 1e-2)
    assert record[1].converged.all()
    layer(params, x, record=record)
    assert list(record[2].iterations) == [1] * 3
    assert not record[2].converged.any()


@pytest.mark.parametrize("mixer", ["householder", "kronecker", "fixed"])
@pytest.mark.parametrize("hidden", [("mixer",), ()])
def test_fprnn(room: Room, mixer: str, hidden: Any, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adjoint = Adjoint(rtol=1e-12, on_failure="ignore")
    layer = nn.FPRNN(6, mixer=mixer, hidden=hidden, alpha_max=0.7, solver=Solver(**SOLVER), adjoint=adjoint)
    compare(room, layer, rng, monkeypatch)


@pytest.mark.parametrize(
    "layer", [nn.Mamba(8, d_state=3), nn.LSTM(8), nn.LSTM(8, d_inner=5)], ids=["mamba", "lstm", "wide lstm"]
)
def test_layers_without_a_fixed_point(
    room: Room, layer: Any, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(room, layer, rng, monkeypatch)
    params, x = put(room, layer.init(rng, np.float64)), room.give(rng.standard_normal((2, 5, 8)))
    whole = room.get(layer(params, x))
    _, state = layer.prefill(params, backend.contiguous(x[:, :3]))
    for t in range(3, 5):
        y, state = layer.step(params, backend.contiguous(x[:, t]), state)
        assert_allclose(room.get(y), whole[:, t], rtol=0, atol=1e-9)


def test_losses(room: Room, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = rng.standard_normal((3, 4, 5)), rng.integers(-1, 5, (3, 4))

    def scores(logits: Any, targets: Any) -> Any:
        loss, bar = nn.cross_entropy_vjp(logits, targets)
        return loss, nn.cross_entropy(logits, targets), nn.accuracy(logits, targets), bar

    wanted = Host(monkeypatch)(lambda: scores(logits, targets))
    found = scores(room.give(logits), room.give(targets))
    for one, other in zip(found, wanted, strict=True):
        assert_allclose(room.get(one), other, rtol=1e-12, atol=1e-14)
    # what is no class cannot raise without waiting for the device
    targets[1, 1] = 5
    loss, bar = nn.cross_entropy_vjp(room.give(logits), room.give(targets))
    assert np.isnan(room.get(loss))
    assert np.isnan(room.get(bar)).any(-1).sum() == 1
    nothing = np.full_like(targets, -1)
    loss, bar = nn.cross_entropy_vjp(room.give(logits), room.give(nothing))
    assert float(loss) == 0
    assert not room.get(bar).any()
    assert np.isnan(float(nn.accuracy(room.give(logits), room.give(nothing))))


@pytest.mark.parametrize("options", [{}, {"mixer": "kronecker", "short_conv": 3}])
def test_decoding_is_the_whole(room: Room, options: Any, rng: Any) -> None:
    layer = nn.FPMamba(8, d_state=3, alpha_max=0.6, solver=Solver(**SOLVER), **options)
    params, x = put(room, layer.init(rng, np.float64)), room.give(rng.standard_normal((2, 7, 8)))
    whole = room.get(layer(params, x))
    first, state = layer.prefill(params, backend.contiguous(x[:, :3]))
    outputs = [room.get(first)[:, t] for t in range(3)]
    for t in range(3, 7):
        y, state = layer.step(params, backend.contiguous(x[:, t]), state)
        outputs.append(room.get(y))
    assert_allclose(np.stack(outputs, 1), whole, rtol=0, atol=1e-9)


def test_a_model_trains(room: Room, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"kind": "FPMamba", "d_state": 3, "alpha_max": 0.6, "solver": Solver(**SOLVER)}
    model = nn.Model(7, 5, d_model=8, n_layers=2, layer=options, mlp=6)
    params, optimizer = model.init(rng, np.float64), nn.AdamW(1e-2, clip=1.0)
    tokens, targets = rng.integers(0, 7, (3, 4)), rng.integers(0, 5, (3, 4))
    targets[0, 0] = -100

    def train(params: Any, tokens: Any, targets: Any) -> Any:
        state, losses = optimizer.init(params), []
        for _ in range(3):
            logits, pullback = model.vjp(params, tokens)
            loss, bar = nn.cross_entropy_vjp(logits, targets)
            losses.append(float(loss))
            params, state = optimizer.update(params, pullback(bar)[0], state)
        return losses, params, nn.accuracy(logits, targets)

    losses, wanted, share = Host(monkeypatch)(lambda: train(params, tokens, targets))
    found, theirs, their_share = train(put(room, params), room.give(tokens), room.give(targets))
    assert_allclose(found, losses, rtol=1e-7)
    assert float(their_share) == share
    close(room, theirs, wanted, 1e-6)


@pytest.mark.parametrize(("name", "error"), [("float32", 3e-4), ("tf32", 2e-2), ("bfloat16", 0.1)])
@pytest.mark.parametrize("mixer", ["householder", "kronecker"])
@pytest.mark.parametrize(
    ("method", "adjoint"), [("auto", {}), ("parallel", {"method": "one-step"}), ("parallel", {})]
)
def test_precisions(
    room: Room,
    name: str,
    error: float,
    mixer: str,
    method: str,
    adjoint: Any,
    rng: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = nn.FPMamba(
        64,
        d_state=8,
        mixer=mixer,
        alpha_max=0.9,
        solver=Solver(method, rtol=1e-6, on_failure="ignore"),
        adjoint=Adjoint(rtol=1e-6, on_failure="ignore", **adjoint),
    )
    double = layer.init(rng, np.float64)
    x = rng.standard_normal((3, 9, 64))

    def exactly() -> Any:
        wanted, pullback = layer.vjp(double, x)
        return wanted, *pullback(np.ones_like(wanted))

    wanted, grads, x_bar = Host(monkeypatch)(exactly)
    bound = dict.fromkeys([*grads, "x"], 3 * error)
    if (mixer, name) == ("kronecker", "bfloat16"):
        # what the power iteration makes of eight bits: no more than twice as much as where they are all there is
        _, *plain = Host(monkeypatch)(lambda: coarsely(exactly, monkeypatch))
        for key, (one, right) in zip(bound, pairs(plain, (grads, x_bar)), strict=True):
            bound[key] = max(3 * error, 2 * distance(one, right))
    params = put(room, {n: a.astype(np.float32) for n, a in double.items()})
    with use_precision(name):
        found, their_pullback = layer.vjp(params, room.give(x.astype(np.float32)))
        theirs, their_bar = their_pullback(room.give(np.ones_like(wanted, np.float32)))
    assert found.dtype == their_bar.dtype == np.float32
    assert np.abs(room.get(found) - wanted).max() <= error * np.abs(wanted).max()
    for key, (own, right) in zip(bound, pairs((theirs, their_bar), (grads, x_bar)), strict=True):
        assert own.dtype == np.float32
        assert distance(room.get(own), right) <= bound[key], key


def pairs(some: Any, others: Any) -> Any:
    """Gradients of parameters and of the input beside each other."""
    return zip((*some[0].values(), some[1]), (*others[0].values(), others[1]), strict=True)


def distance(one: Any, other: Any) -> float:
    return float(np.abs(one - other).max() / (np.abs(other).max() + 1e-3))


def coarsely(function: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """With products whose factors and results are rounded to bfloat16."""

    def rounded(a: Any) -> Any:
        return a.astype(ml_dtypes.bfloat16).astype(a.dtype)

    def product(
        a: Any, b: Any, *, transposed: Any = (False, False), out: Any = None, add: bool = False
    ) -> Any:
        found = rounded(
            (rounded(a).T if transposed[0] else rounded(a)) @ (rounded(b).T if transposed[1] else rounded(b))
        )
        if out is None:
            return found
        out[...] = out + found if add else found
        return out

    with monkeypatch.context() as patch:
        for name in ("backend", "fpmamba", "layer", "matrix_layer", "matrix_state", "projections"):
            patch.setattr(f"fpnumba.nn.{name}.product", product)
        return function()


GOLDEN = sorted((Path(__file__).parent / "golden").glob("fpmamba_*_iter8.npz"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_in_single_precision(room: Room, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most twice as far from the published float64 case as plain NumPy in float32."""
    data = np.load(path, allow_pickle=False)
    meta = json.loads(bytes(data["meta"]))
    state = {name[6:]: data[name].astype(np.float32) for name in data.files if name.startswith("param.")}
    layer, params = nn.from_official(meta, state)
    x, y_bar = data["in.x"].astype(np.float32), data["cot.y"].astype(np.float32)

    def errors(y: Any, x_bar: Any) -> list[float]:
        pairs = ((room.get(y), data["out.y"]), (room.get(x_bar), data["grad1.x"]))
        return [np.sqrt(np.mean((one - right) ** 2) / np.mean(right**2)) for one, right in pairs]

    def plainly() -> tuple[Any, Any]:
        with use_room("reference"):
            y, pullback = layer.vjp(params, x)
            return y, pullback(y_bar)[1]

    plain = errors(*(room.give(a) for a in Host(monkeypatch)(plainly)))
    found, pullback = layer.vjp(put(room, params), room.give(x))
    for ours, theirs in zip(errors(found, pullback(room.give(y_bar))[1]), plain, strict=True):
        assert ours <= 2 * theirs


def test_an_adjoint_of_all_steps_that_grows(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterated until nothing is left of it, it gives way to the one that goes backward in time."""
    layer = nn.FPMamba(
        8,
        d_state=3,
        mixer="kronecker",
        alpha_max=2.0,
        solver=Solver("parallel", max_iter=20, on_failure="ignore"),
        adjoint=Adjoint(rtol=1e-9, on_failure="ignore"),
    )
    rng = np.random.default_rng(5)
    params = layer.init(rng, np.float64)
    params["out_norm.weight"] *= 100
    x, y_bar = rng.standard_normal((2, 4, 6, 8))
    monkeypatch.setattr(ways, "affordable_back", lambda *sizes: 1000)
    monkeypatch.setattr(ways, "_needed", lambda history, rtol: 0.0)
    _, pullback = layer.vjp(put(room, params), room.give(x))
    assert np.abs(room.get(pullback(room.give(y_bar))[1])).max() < 1e9


@pytest.mark.parametrize("made", [True, False])
def test_an_adjoint_that_does_not_shrink(room: Room, made: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step has no stable fixed point, its adjoint is not iterated into overflow."""
    if not made:
        monkeypatch.setattr(matrix_device, "serves", lambda cell: False)
    rng, adjoint = np.random.default_rng(5), Adjoint(rtol=1e-9, on_failure="ignore")
    layer = nn.FPMamba(
        8, d_state=3, mixer="kronecker", alpha_max=2.0, solver=Solver(**SOLVER), adjoint=adjoint
    )
    params = layer.init(rng, np.float64)
    params["out_norm.weight"] *= 100
    x, y_bar = rng.standard_normal((2, 4, 6, 8))

    def slope(params: Any, x: Any, y_bar: Any) -> tuple[Any, Any]:
        record: list[Any] = []
        _, pullback = layer.vjp(params, x, record=record)
        return record[0].converged, pullback(y_bar)[1]

    on_the_host = Host(monkeypatch)(lambda: slope(params, x, y_bar))
    for converged, x_bar in (on_the_host, slope(put(room, params), room.give(x), room.give(y_bar))):
        assert not np.all(converged)
        assert np.abs(room.get(x_bar)).max() < 1e9
