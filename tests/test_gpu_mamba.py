"""The fixed point with a matrix state on the device, against the reference in float64."""

from typing import Any

import numpy as np
import pytest
from gpu_machine import GpuRoom as Room
from test_mamba import KINDS, NORMS, problem

from fpnumba.gpu import _mamba, mamba
from fpnumba.reference import mamba as plain

TIGHT = {"rtol": 1e-13, "max_iter": 4000}


def changed(thing: Any, change: Any) -> Any:
    """The same structure with every array changed."""
    if isinstance(thing, list | tuple):
        made = [changed(one, change) for one in thing]
        return type(thing)(*made) if hasattr(thing, "_fields") else type(thing)(made)
    return change(thing) if hasattr(thing, "dtype") and hasattr(thing, "shape") and thing.shape else thing


def compare(mine: Any, right: Any, tolerance: float, room: Room, name: str = "") -> None:
    if isinstance(right, list | tuple):
        for i, (one, other) in enumerate(zip(mine, right, strict=True)):
            compare(
                one, other, tolerance, room, f"{name}.{right._fields[i] if hasattr(right, '_fields') else i}"
            )
    elif right is None:
        assert mine is None, name
    else:
        found = room.get(mine)
        assert found.shape == right.shape, name
        np.testing.assert_allclose(
            found, right, rtol=0, atol=tolerance * (1 + np.abs(right).max(initial=0.0)), err_msg=name
        )


def both_ways(room: Room, double: Any, initial: Any, rng: Any, dtype: str) -> None:
    wanted = plain.solve(double, initial, **TIGHT)
    assert (wanted.status == 0).all()
    y_bar, last_bar = rng.standard_normal(wanted.value.shape), rng.standard_normal(initial.shape)
    bars, _ = plain.pullback(double, initial, wanted.value, y_bar, last_bar)
    new_bar = rng.standard_normal(wanted.value.shape)
    applied = plain.iterate(double, initial, y_bar)
    once = plain.application_vjp(double, initial, y_bar, new_bar)

    def put(thing: Any) -> Any:
        return changed(thing, lambda a: room.give(a.astype(dtype)))

    tolerance = 1e-10 if dtype == "float64" else 3e-4
    options = {"rtol": 1e-12 if dtype == "float64" else 1e-6, "max_iter": 4000}
    system, start = put(double), put(initial)
    found = mamba.solve(system, start, **options)
    assert (room.get(found.status) == 0).all()
    assert (room.get(found.residual) <= 10 * options["rtol"]).all()
    compare(found.value, wanted.value, tolerance, room, "value")
    compare(found.last_state, wanted.last_state, tolerance, room, "last")
    theirs, status = mamba.pullback(system, start, put(wanted.value), put(y_bar), put(last_bar), **options)
    assert (room.get(status) == 0).all()
    compare(theirs, bars, tolerance, room)
    compare(mamba.iterate(system, start, put(y_bar)), applied, tolerance, room, "iterate")
    compare(mamba.application_vjp(system, start, put(y_bar), put(new_bar)), once, tolerance, room)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_as_the_reference(gpu_room: Room, kind: str, norm: str | None, dtype: str, rng: Any) -> None:
    heads = 2 if norm == "rms" else None
    double, initial = problem(rng, kind, norm, heads=heads, gated=norm != "rms", steps=3, size=5)
    both_ways(gpu_room, double, initial, rng, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("rank", [1, 3])
def test_steps_wider_than_a_block(gpu_room: Room, rank: int, dtype: str, rng: Any) -> None:
    double, initial = problem(rng, "householder", "layer", steps=2, dim=6, size=4)
    dim = 700

    def wide(a: Any) -> Any:  # the axis of six channels becomes one of 700
        for axis in range(a.ndim):
            if a.shape[axis] == 6:
                a = np.repeat(a, -(-dim // 6), axis=axis).take(range(dim), axis=axis)
        return a + 0.1 * rng.standard_normal(a.shape) * (a.shape[-1] == dim)

    u = rng.standard_normal((2, 2, rank, dim))
    u /= np.linalg.norm(u, axis=-1, keepdims=True)
    params = (u, rng.uniform(0.1, 0.6, (2, 2, rank)))
    system = changed(double._replace(params=()), wide)._replace(params=params)
    both_ways(
        gpu_room, system._replace(delta=np.abs(system.delta), A=-np.abs(system.A)), wide(initial), rng, dtype
    )


def test_a_mixture_and_no_steps(gpu_room: Room, rng: Any) -> None:
    one, initial = problem(rng, "householder", "layer", steps=2)
    other, _ = problem(rng, "kronecker", "layer", steps=2)
    mixture = one._replace(kind="mixture", params=[("householder", one.params), ("kronecker", other.params)])
    both_ways(gpu_room, mixture, initial, rng, "float64")
    none = changed(one, lambda a: a[:, :0] if a.ndim > 2 else a)
    both_ways(gpu_room, none, initial, rng, "float64")


def test_status(gpu_room: Room, rng: Any) -> None:
    system, initial = problem(rng, "householder", "layer", batch=3)
    system.x[1, 2, 0] = np.nan
    put = gpu_room.give
    good = mamba.solve(changed(system, put), put(initial), rtol=1e-10)
    assert gpu_room.get(good.status).tolist() == [0, 3, 0]
    few = mamba.solve(changed(system, put), gpu_room.give(initial), rtol=1e-10, max_iter=1)
    assert gpu_room.get(few.status).tolist() == [1, 3, 1]
    alone = changed(system._replace(A=system.A), lambda a: gpu_room.give(a[:1] if len(a) == 3 else a))
    again = mamba.solve(alone, gpu_room.give(initial[:1]), rtol=1e-10)
    np.testing.assert_array_equal(gpu_room.get(again.value), gpu_room.get(good.value)[:1])


def test_threads_in_any_order(simt_device: Any, rng: Any) -> None:
    system, initial = problem(rng, "householder", "layer", dim=70, size=3, steps=2)
    y_bar, results = rng.standard_normal(system.x.shape), []
    for seed in range(3):
        simt_device.seed = seed
        found = mamba.solve(system, initial, rtol=1e-10)
        bars, _ = mamba.pullback(system, initial, found.value, y_bar, None)
        results.append([found.value, found.last_state, bars.x, bars.delta, bars.A, bars.params[0]])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def made(
    rng: Any,
    *,
    seen: tuple[str, ...],
    batch: int = 2,
    steps: int = 4,
    dim: int = 40,
    size: int = 5,
    **options: Any,
) -> Any:
    """Arguments of a mixer of rank one, of b and c, a system that lacks these, and where it begins."""
    system, _ = problem(rng, "householder", "layer", batch=batch, steps=steps, size=size, **options)

    def widened(a: Any) -> Any:
        if a.shape[-1] != 6:
            return a
        return np.ascontiguousarray(np.repeat(a, -(-dim // 6), axis=-1)[..., :dim])

    wide = changed(system._replace(params=()), widened)
    A = -rng.uniform(0.3, 1.5, (dim, size)) if system.A.ndim == 2 else system.A
    empty = (np.zeros((batch, steps, 1, dim)), np.zeros((batch, steps, 1)))
    wide = wide._replace(params=empty, A=A, x=rng.standard_normal((batch, steps, dim)))
    normal = rng.standard_normal
    width = (dim + 1) * ("mixer" in seen) + size * (("b" in seen) + ("c" in seen))
    given = _mamba.Arguments(
        normal((batch, steps, dim + 1)),
        normal((batch, steps, size)),
        normal((batch, steps, size)),
        0.3 * normal((width, dim)) / np.sqrt(dim) if width else None,
        seen,
        "silu",
        0.9,
        1e-5,
        1e-5,
    )
    return given, wide, (0.1 * normal((batch, dim)), 0.1 * normal((batch, dim, size)))


def put_made(room: Room, given: Any, system: Any, initial: Any) -> Any:
    return (
        given._replace(
            **{n: room.give(getattr(given, n)) for n in ("mixer", "b", "c")},
            stacked=None if given.stacked is None else room.give(given.stacked),
        ),
        changed(system, room.give),
        tuple(room.give(a) for a in initial),
    )


OPTIONS: dict[str, Any] = {"rtol": 1e-13, "atol": 0.0, "max_iter": 2000, "damping": 1.0}


@pytest.mark.parametrize("seen", [("mixer", "b", "c"), ("mixer",), ("c",), ()])
def test_parameters_made_on_the_way(gpu_room: Room, seen: tuple[str, ...], rng: Any) -> None:
    given, system, initial = made(rng, seen=seen)
    y, last, _, _, met, kept = _mamba.solve_made(
        *_ordered(put_made(gpu_room, given, system, initial)), keep=True, **OPTIONS
    )
    assert gpu_room.get(met).all()
    before, state = initial
    for t in range(4):
        fed, at = (before @ given.stacked.T if seen else None), 0
        parts = {}
        for name in ("mixer", "b", "c"):
            parts[name] = getattr(given, name)[:, t].copy()
            if name in seen and fed is not None:
                parts[name] += fed[:, at : at + parts[name].shape[1]]
                at += parts[name].shape[1]
        a = parts["mixer"][:, :-1]
        u = a / (1 + np.exp(-a))
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        alpha = 0.9 / (1 + np.exp(-parts["mixer"][:, -1:]))
        b, c = (parts[n] / np.linalg.norm(parts[n], axis=1, keepdims=True) for n in "bc")
        now = {n: getattr(system, n)[:, t : t + 1] for n in ("x", "delta", "gate")}
        step = system._replace(params=(u[:, None, None], alpha[:, None]), B=b[:, None], C=c[:, None], **now)
        found = plain.solve(step, state, rtol=1e-13)
        np.testing.assert_allclose(gpu_room.get(y)[:, t], found.value[:, 0], rtol=0, atol=1e-10)
        np.testing.assert_allclose(gpu_room.get(kept.system.params[0])[:, t, 0], u, rtol=0, atol=1e-12)
        before, state = found.value[:, 0], found.last_state
    np.testing.assert_allclose(gpu_room.get(last), state, rtol=0, atol=1e-10)


def _ordered(put: Any) -> Any:
    given, system, initial = put
    return system, given, initial


@pytest.mark.parametrize("seen", [("mixer", "b", "c"), ("b",)])
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("few", [False, True])
def test_the_gradient_of_parameters_made_on_the_way(
    gpu_room: Room,
    seen: tuple[str, ...],
    heads: int | None,
    few: bool,
    rng: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if few:  # states are made again, and held nowhere
        laid_out = _mamba._layout
        monkeypatch.setattr(_mamba, "_layout", lambda s: laid_out(s)._replace(resident=2))
        monkeypatch.setattr(_mamba, "KEPT_BYTES", 2 * 2 * 40 * 5 * 8)
    given, system, initial = made(rng, seen=seen, heads=heads)
    shape = system.x.shape
    y_bar, last_bar = rng.standard_normal(shape), rng.standard_normal(initial[1].shape)

    def value(given: Any, system: Any, initial: Any) -> float:
        put = _ordered(put_made(gpu_room, given, system, initial))
        y, last, *_ = _mamba.solve_made(*put, keep=False, **OPTIONS)
        return float(np.vdot(gpu_room.get(y), y_bar) + np.vdot(gpu_room.get(last), last_bar))

    put = _ordered(put_made(gpu_room, given, system, initial))
    y, *_, kept = _mamba.solve_made(*put, keep=True, **OPTIONS)
    bars, fed_bar = _mamba.pull_made(kept, put[1], y, gpu_room.give(y_bar), gpu_room.give(last_bar))
    found = {"mixer": bars.params, "b": bars.B, "c": bars.C}
    for name in ("mixer", "b", "c", "x", "delta", "A", "skip", "gate", "H", "stacked"):
        if name == "stacked":
            past = np.concatenate([initial[0][:, None], gpu_room.get(y)[:, :-1]], axis=1)
            point, bar = given.stacked, np.einsum("btw,btd->wd", gpu_room.get(fed_bar), past)
        elif name == "H":
            point, bar = initial[1], gpu_room.get(bars.initial)
        elif name in found:
            point, bar = getattr(given, name), gpu_room.get(found[name])
        else:
            point, bar = getattr(system, name), gpu_room.get(getattr(bars, name))
        direction, slopes = rng.standard_normal(point.shape), []
        for h in (1e-5, -1e-5):
            moved = point + h * direction
            if name == "H":
                slopes.append(value(given, system, (initial[0], moved)))
            elif name in found or name == "stacked":
                slopes.append(value(given._replace(**{name: moved}), system, initial))
            else:
                slopes.append(value(given, system._replace(**{name: moved}), initial))
        slope = (slopes[0] - slopes[1]) / 2e-5
        assert float(np.vdot(bar, direction)) == pytest.approx(slope, rel=1e-5, abs=1e-6), name
