"""FP-Mamba with a Kronecker mixer that kernels make on the way, against the CPU, and against the doors of the room."""

from typing import Any

import numpy as np
import pytest
from gpu_machine import GpuRoom as Room
from test_gpu_nn import Host, close, compare, put, room
from test_mamba import problem

from fpnumba import nn
from fpnumba.gpu import _device, _mamba, _mamba_kronecker, mamba
from fpnumba.nn import matrix_device
from fpnumba.nn.mixer_maps import KroneckerMap
from fpnumba.reference import mamba as plain
from fpnumba.solve import Adjoint, Solver

__all__ = ["room"]

TIGHT: dict[str, Any] = {
    "solver": Solver(rtol=1e-12, on_failure="ignore"),
    "adjoint": Adjoint(rtol=1e-12, on_failure="ignore"),
}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows": {"normalization": "rows"},
    "gate inside": {"gate": "inside", "activation": "relu"},
    "edges that differ": {"d_inner": 24, "activation": "identity", "gate": "both"},
    "edges that are odd": {"d_inner": 15, "d_state": 2},
    "edges of one": {"d_inner": 7, "hidden": ("mixer",)},
    "many states": {"d_inner": 6, "d_state": 33},
    "mixer does not see": {"hidden": ("b", "c")},
    "nothing sees": {"hidden": (), "bc_norm": False},
}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """These kernels and no others: how many steps were pulled is counted; the host looks at nothing."""
    pulled: list[int] = []
    before = _mamba_kronecker._Back.pull

    def pull(self: Any, t: int, *rest: Any) -> Any:
        pulled.append(t)
        return before(self, t, *rest)

    def watch(*_: Any) -> Any:
        raise AssertionError("the host watches")

    monkeypatch.setattr(_mamba_kronecker._Back, "pull", pull)
    monkeypatch.setattr(_device, "Watch", watch)
    return pulled


def layer_of(kind: type[Any] = nn.FPMamba, **options: Any) -> Any:
    return kind(8, **{"mixer": "kronecker", "alpha_max": 0.7, "d_state": 4} | TIGHT | options)


@pytest.mark.parametrize("name", LAYERS)
def test_as_the_cpu(
    room: Room, name: str, alone: list[int], rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(room, layer_of(**LAYERS[name]), rng, monkeypatch)
    assert alone == [3, 2, 1, 0]


@pytest.mark.parametrize("normalization", ["spectral", "rows"])
def test_heads(
    room: Room, normalization: str, alone: list[int], rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(room, layer_of(nn.FPMamba2, head_dim=4, normalization=normalization), rng, monkeypatch)
    assert alone == [3, 2, 1, 0]


@pytest.mark.sanitize
def test_states_and_factors_are_made_again(
    room: Room, alone: list[int], rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_mamba, "KEPT_BYTES", 3 * 2 * 16 * 4 * 8)
    monkeypatch.setattr(_mamba_kronecker, "TRAIL_BYTES", 2 * 2 * 8 * 200)
    compare(room, layer_of(gate="inside"), rng, monkeypatch, steps=7)
    assert alone == [6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("options", [{"damping": 0.6}, {"alpha_max": 2.0}])
def test_iterations_are_those_of_the_room(
    room: Room, options: dict[str, Any], rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or fewer, near the end: those of what is put together of single kernels, which end at the same point."""
    solver = Solver(rtol=1e-10, damping=options.pop("damping", 1.0), on_failure="ignore", max_iter=300)
    layer = layer_of(**options, solver=solver)
    params = put(room, layer.init(rng, np.float64))
    x = room.give(rng.standard_normal((3, 6, 8)))
    found: list[list[Any]] = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(matrix_device, "serves", lambda cell: False)
        record: list[Any] = []
        y, pullback = layer.vjp(params, x, record=record)
        told = record[0]
        found.append(
            [room.get(a) for a in (told.iterations, told.converged, y, told.residual, pullback(y)[1])]
        )
    assert (found[0][0] <= found[1][0] + 1).all()
    assert found[0][0].min() > 5
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-8)


@pytest.mark.sanitize
@pytest.mark.parametrize("resident", [1, 2])
def test_factors_in_registers(
    room: Room, resident: int, alone: list[int], rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_mamba_kronecker, "_resident", lambda of, batch: resident)
    single(room, rng, monkeypatch, d_inner=16 * 16)
    assert len(alone) == 3


@pytest.mark.parametrize(
    ("edges", "normalization"), [((16, 32), "rows"), ((16, 32), "spectral"), ((32, 32), "spectral")]
)
def test_larger_factors_in_registers(
    room: Room, edges: tuple[int, int], normalization: str, alone: list[int], rng: Any, monkeypatch: Any
) -> None:
    options = {"d_inner": edges[0] * edges[1], "normalization": normalization, "gate": "inside"}
    single(room, rng, monkeypatch, steps=2, batch=1, **options)
    assert len(alone) == 2


def test_the_widest(room: Room, alone: list[int], rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    single(room, rng, monkeypatch, d_inner=48 * 50, steps=2, batch=1, d_state=4)
    assert len(alone) == 2


def single(room: Room, rng: Any, monkeypatch: Any, *, steps: int = 3, batch: int = 2, **options: Any) -> None:
    """In single precision, against the CPU in double: a step's tolerance and rounding, some steps long."""
    told = Solver(rtol=1e-6, on_failure="ignore"), Adjoint(rtol=1e-6, on_failure="ignore")
    layer = layer_of(**{"d_state": 16, "solver": told[0], "adjoint": told[1]} | options)
    double = layer.init(rng, np.float64)
    x, y_bar = rng.standard_normal((2, batch, steps, 8))

    def on_the_host() -> Any:
        y, pullback = layer_of(**{"d_state": 16} | options).vjp(double, x)
        return y, *pullback(y_bar)

    y, grads, x_bar = Host(monkeypatch)(on_the_host)
    narrow = {name: a.astype(np.float32) for name, a in double.items()}
    found, pullback = layer.vjp(put(room, narrow), room.give(x.astype(np.float32)))
    close(room, found, y, 1e-4)
    their_grads, their_bar = pullback(room.give(y_bar.astype(np.float32)))
    close(room, their_grads, grads, 3e-4)
    close(room, their_bar, x_bar, 3e-4)


def given_alone(
    rng: Any, norm: str | None, heads: int | None, dim: int, size: int, alpha_max: float = 0.7
) -> Any:
    """A system that lacks its factors and the arguments of them where nothing sees the hidden state."""
    batch, steps = 2, 3
    system, initial = problem(
        rng, "kronecker", norm, heads=heads, batch=batch, steps=steps, dim=dim, size=size
    )
    map = KroneckerMap(
        dim, 3, projection_rank=None, activation="silu", alpha_max=alpha_max, norm_eps=1e-5, weight_norm=True
    )
    a = rng.standard_normal((batch, steps, map.stack.outputs))
    empty = tuple(np.zeros((batch, 0, edge, edge)) for edge in map.sizes)
    given = mamba.Arguments(
        a, system.B.copy(), system.C.copy(), None, (), "silu", map.alpha_max, map.norm_eps, None
    )
    (kind, params), kept = map.build(a)
    assert kind == "kronecker"
    return system._replace(params=params), system._replace(params=empty), initial, given, map, kept


def put_there(room: Room, thing: Any) -> Any:
    """A tuple of arrays with its arrays carried to the room."""
    if (isinstance(thing, tuple) and thing and not isinstance(thing[0], str | tuple)) or hasattr(
        thing, "_fields"
    ):
        moved = [put_there(room, one) for one in thing]
        return type(thing)(*moved) if hasattr(thing, "_fields") else tuple(moved)
    return room.give(thing) if isinstance(thing, np.ndarray) else thing


@pytest.mark.parametrize("dim", [6, 24])
def test_steps_that_go_back_and_forth(
    gpu_room: Room, dim: int, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are damped, as where the room's single kernels are put together, and end at the same point, both ways."""
    right, lacking, initial, given, map, kept = given_alone(rng, "layer", None, dim, 3, alpha_max=5.0)
    gate, x = -np.abs(right.gate) - 0.5, 0.1 * right.x
    halved: list[bool] = []
    before = mamba._Swing.factor

    def factor(self: Any, change: Any, moved: Any) -> Any:
        then = self._factor
        now = before(self, change, moved)
        halved.append(bool((now < then).any()))
        return now

    monkeypatch.setattr(mamba._Swing, "factor", factor)
    get, options = gpu_room.get, dict[str, Any](rtol=1e-10, max_iter=400)
    right, lacking, given = (put_there(gpu_room, one) for one in (right, lacking, given))
    right, lacking = (one._replace(gate=gpu_room.give(gate), x=gpu_room.give(x)) for one in (right, lacking))
    start, y_bar = gpu_room.give(initial), gpu_room.give(rng.standard_normal(gate.shape))
    wanted = mamba.solve(right, start, **options)
    assert any(halved)
    nothing = gpu_room.give(np.zeros(gate[:, 0].shape))
    y, last, told, made = mamba.solve_made(lacking, given, (nothing, start), keep=True, **options)
    assert (get(told[0]) <= get(wanted.iterations) + 2).all()
    assert get(told[2]).tolist() == get(wanted.status).tolist() == [0, 0]
    np.testing.assert_allclose(get(y), get(wanted.value), rtol=0, atol=1e-8)
    np.testing.assert_allclose(get(last), get(wanted.last_state), rtol=0, atol=1e-8)
    halved.clear()
    bars, status = mamba.pullback(right, start, wanted.value, y_bar, None, **options)
    assert any(halved)
    found, _, their_status = mamba.pull_made(made, given, y, y_bar, None, **options)
    assert get(their_status).tolist() == get(status).tolist() == [0, 0]
    a_bar = map.build_vjp(get(given.mixer), kept, tuple(get(p) for p in bars.params))
    for one, other in ((found.x, bars.x), (found.y, bars.y), (found.gate, bars.gate)):
        np.testing.assert_allclose(get(one), get(other), rtol=0, atol=1e-7 * (1 + np.abs(get(other)).max()))
    np.testing.assert_allclose(get(found.params), a_bar, rtol=0, atol=1e-7 * (1 + np.abs(a_bar).max()))


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("heads", [None, 2])
def test_every_norm(gpu_room: Room, norm: str | None, heads: int | None, rng: Any) -> None:
    right, lacking, initial, given, map, kept = given_alone(rng, norm, heads, 6, 5)
    wanted = plain.solve(right, initial, rtol=1e-13)
    y_bar, last_bar = rng.standard_normal(right.x.shape), rng.standard_normal(initial.shape)
    bars, _ = plain.pullback(right, initial, wanted.value, y_bar, last_bar)
    give, get = gpu_room.give, gpu_room.get

    def there(thing: Any) -> Any:
        return put_there(gpu_room, thing)

    arguments = there(given)
    start = give(np.zeros(right.x[:, 0].shape)), give(initial)
    y, last, told, made = mamba.solve_made(
        there(lacking), arguments, start, keep=True, rtol=1e-13, max_iter=2000
    )
    assert (get(told[2]) == 0).all()
    np.testing.assert_allclose(get(y), wanted.value, rtol=0, atol=1e-10)
    np.testing.assert_allclose(get(last), wanted.last_state, rtol=0, atol=1e-10)
    found, fed_bar, status = mamba.pull_made(
        made, arguments, y, give(y_bar), give(last_bar), rtol=1e-13, max_iter=2000
    )
    assert (get(status) == 0).all()
    assert fed_bar.shape == (2, 3, 0)
    a_bar = map.build_vjp(given.mixer, kept, bars.params)
    pairs = {name: (getattr(found, name), getattr(bars, name)) for name in plain.Bars._fields}
    pairs["params"] = found.params, a_bar
    for name, (one, other) in pairs.items():
        if other is None:
            assert one is None
        else:
            np.testing.assert_allclose(
                get(one), other, rtol=0, atol=1e-9 * (1 + np.abs(other).max()), err_msg=name
            )


def test_factors_are_those_of_the_cpu(gpu_room: Room, rng: Any) -> None:
    dim, batch = 20, 3
    map = KroneckerMap(
        dim, 3, projection_rank=None, activation="silu", alpha_max=0.9, norm_eps=1e-5, weight_norm=True
    )
    a = rng.standard_normal((batch, 2, map.stack.outputs))
    (_, params), _ = map.build(a)
    of = _mamba_kronecker.layout("float64", map.sizes, 2, False, False, 4, True, "silu")
    given = mamba.Arguments(gpu_room.give(a), None, None, None, (), "silu", 0.9, 1e-5, None)
    factors = gpu_room.give(np.zeros((2, batch, of.factors)))
    _mamba_kronecker._Makers(of, given, batch, 2).launches(given.mixer, None, -1, 2, None, factors, None)()
    for b in range(batch):
        for t in range(2):
            flat = np.concatenate([p[b, t].ravel() for p in params])
            np.testing.assert_allclose(gpu_room.get(factors)[t, b], flat, rtol=0, atol=1e-12)


def test_status(room: Room, rng: Any) -> None:
    layer = layer_of(solver=Solver(rtol=1e-10, on_failure="ignore"))
    params = put(room, layer.init(rng, np.float64))
    x = rng.standard_normal((3, 5, 8))
    x[1, 3, 2] = np.nan
    record: list[Any] = []
    good = room.get(layer(params, room.give(x), record=record))
    assert room.get(record[0].converged).tolist() == [True, False, True]
    np.testing.assert_allclose(room.get(layer(params, room.give(x[:1]))), good[:1], rtol=0, atol=1e-12)
    few = layer_of(solver=Solver("sequential", rtol=1e-10, max_iter=2, on_failure="ignore"))
    record.clear()
    few(params, room.give(x[::2].copy()), record=record)
    assert not room.get(record[0].converged).any()
    assert room.get(record[0].iterations).tolist() == [2, 2]


def test_an_adjoint_that_stops_too_early(room: Room, rng: Any) -> None:
    layer = layer_of(adjoint=Adjoint(rtol=1e-12, max_iter=1, on_failure="raise"))
    params, x = put(room, layer.init(rng, np.float64)), room.give(rng.standard_normal((2, 4, 8)))
    y, pullback = layer.vjp(params, x)
    with pytest.raises(Exception, match="adjoint"):
        pullback(y)


@pytest.mark.parametrize("dim", [24, 256])
def test_threads_in_any_order(simt_device: Any, dim: int, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No races, and the same to the last bit."""
    dtype = np.float64 if dim == 24 else np.float32
    _, lacking, initial, given, *_ = given_alone(rng, "layer", None, dim, 4)

    def narrow(thing: Any) -> Any:
        fields = {
            n: a.astype(dtype) if hasattr(a, "shape") and a.shape else a for n, a in thing._asdict().items()
        }
        return thing._replace(**fields)

    system = narrow(lacking)._replace(
        params=tuple(p.astype(dtype) for p in lacking.params), norm=narrow(lacking.norm)
    )
    stacked = 0.1 * rng.standard_normal((given.mixer.shape[2] + 4, dim))
    given = narrow(given)._replace(stacked=stacked.astype(dtype), seen=("mixer", "b"))
    start = np.zeros_like(system.x[:, 0]), initial.astype(dtype)
    y_bar, results = rng.standard_normal(system.x.shape).astype(dtype), []
    for seed in range(3):
        simt_device.seed, simt_device.races = seed, seed < 2
        monkeypatch.setattr(_mamba_kronecker, "_resident", lambda of, batch, seed=seed: 2 if seed else 1)
        y, last, _, made = mamba.solve_made(system, given, start, keep=True, rtol=1e-6)
        bars, fed_bar, _ = mamba.pull_made(made, given, y, y_bar, None, rtol=1e-6)
        results.append([y, last, bars.params, bars.x, bars.delta, bars.A, bars.skip, fed_bar])
    for one, two in zip(results[1], results[2], strict=True):
        np.testing.assert_array_equal(one, two)


def test_what_is_served(gpu_room: Room, rng: Any) -> None:
    _, lacking, *_ = given_alone(rng, "layer", None, 6, 5)
    assert mamba.makes(lacking, "silu")
    assert not mamba.makes(lacking, "tanh")
    wide = lacking._replace(params=tuple(np.zeros((2, 0, edge, edge)) for edge in (1, 67)))
    assert not mamba.makes(wide, "silu")
