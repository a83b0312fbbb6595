"""The mixing half of FP-Mamba's map with a Kronecker mixer at all rows at once, and its adjoint."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from gpu_machine import GpuRoom as Room
from hall import error

from fpnumba.gpu import _device
from fpnumba.gpu._mamba import Arguments
from fpnumba.gpu._mamba_kronecker_rows import Mix, fits
from fpnumba.nn.mixer_maps import KroneckerMap
from fpnumba.reference.mamba import System

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Columns of the mixer's arguments that are there to fill up.
SPARE = 3
NAMES = ("mixed", "B", "C", "x_bar", "mixer_bar", "b_bar", "c_bar")


class Problem(NamedTuple):
    """Arrays in double, some of them rounded, and what they are options of."""

    edges: tuple[int, int]
    arrays: dict[str, Any]
    seen: tuple[str, ...]
    options: dict[str, Any]

    def arguments(self, a: dict[str, Any]) -> Arguments:
        """As a layer gives them; `stacked` is only counted."""
        width = sum(a[name].shape[-1] for name in self.seen)
        stacked = None if a["fed"] is None else np.zeros((width, 1))
        return Arguments(a["mixer"], a["b"], a["c"], stacked, self.seen, **self.options)


def draw(
    rng: Any,
    edges: tuple[int, int],
    *,
    rows: tuple[int, int] = (2, 3),
    size: int = 5,
    seen: tuple[str, ...] = ("mixer", "b", "c"),
    fed: bool = True,
    y: bool = True,
    said: Any = np.float32,
    **options: Any,
) -> Problem:
    (d1, d2), count = edges, rows[0] * rows[1]
    outputs = sum(edge * (edge + 1) // 2 + edge for edge in edges)
    told = {"mixer": outputs + SPARE, "b": size, "c": size}
    shapes: dict[str, tuple[int, ...]] = {name: (*rows, n) for name, n in told.items()}
    shapes["fed"] = count, sum(told[name] for name in seen)
    shapes |= dict.fromkeys(("x", "y", "mixed_bar"), (*rows, d1 * d2))
    shapes |= dict.fromkeys(("B_bar", "C_bar"), (*rows, size))
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name in ("mixer", "fed"):
        arrays[name] = arrays[name].astype(said)
    arrays = {name: a.astype(np.float64) for name, a in arrays.items()}
    for name, there in (("fed", fed), ("y", y)):
        if not there:
            arrays[name] = None
    defaults = {"activation": "silu", "alpha_max": 0.9, "unit_eps": 1e-5, "bc_eps": 1e-6, "spectral": True}
    return Problem(edges, arrays, seen if fed else (), defaults | options)


def plain(p: Problem, dtype: Any) -> dict[str, Any]:
    """By the CPU's maps in this precision."""
    a: dict[str, Any] = {name: None if v is None else v.astype(dtype) for name, v in p.arrays.items()}
    told: dict[str, Any] = {}
    given, (batch, steps, dim) = p.arguments(a), a["x"].shape
    for name, at in zip(("mixer", "b", "c"), given.places[2:], strict=True):
        own = a[name]
        more = 0
        if a["fed"] is not None and at >= 0:
            more = a["fed"][:, at : at + own.shape[-1]].reshape(own.shape)
        told[name] = own + more
    map = KroneckerMap(
        dim,
        3,
        projection_rank=None,
        activation=given.activation,
        alpha_max=given.alpha_max,
        norm_eps=given.unit_eps,
        weight_norm=True,
        normalization="spectral" if given.spectral else "rows",
    )
    first, second = (edge * (edge + 1) // 2 for edge in p.edges)
    map.sizes, map.entries = p.edges, (first, second)
    arguments = np.ascontiguousarray(told["mixer"][..., :-SPARE])
    (_, (k1, k2)), kept = map.build(arguments)

    def wide(v: Any) -> Any:
        return v.reshape(batch, steps, *p.edges)

    gap, bar = wide(a["x"] if a["y"] is None else a["x"] - a["y"]), wide(a["mixed_bar"])
    across, flat = np.swapaxes, (batch, steps, dim)
    found = {"mixed": a["x"] - (k1 @ gap @ across(k2, -1, -2)).reshape(flat)}
    found["x_bar"] = a["mixed_bar"] - (across(k1, -1, -2) @ bar @ k2).reshape(flat)
    bars = -bar @ k2 @ across(gap, -1, -2), -across(bar, -1, -2) @ k1 @ gap
    mixer_bar = map.build_vjp(arguments, kept, bars)
    found["mixer_bar"] = np.concatenate([mixer_bar, np.zeros((batch, steps, SPARE), dtype)], axis=-1)
    for name in ("b", "c"):
        v, v_bar, eps = told[name], a[f"{name.upper()}_bar"], given.bc_eps
        found[name.upper()], found[f"{name}_bar"] = v, v_bar
        if eps is not None:
            length = np.sqrt((v * v).sum(-1, keepdims=True))
            unit = v / np.maximum(length, dtype(eps))
            along = np.where(length >= dtype(eps), (unit * v_bar).sum(-1, keepdims=True), dtype(0))
            found[name.upper()] = unit
            found[f"{name}_bar"] = (v_bar - along * unit) / np.maximum(length, dtype(eps))
    assert all(v.dtype == dtype for v in found.values())
    return found


def system_of(p: Problem, x: Any, size: int) -> Any:
    """Of the parameters only the edges are there."""
    empty = tuple(np.zeros((*x.shape[:2], 0, edge)) for edge in p.edges)
    B = np.zeros((*x.shape[:2], size), x.dtype)
    return System("kronecker", empty, x, None, None, B, B, None, None, None)


def found_by(room: Room, p: Problem, dtype: Any, said: Any) -> dict[str, Any]:
    """By the kernels."""
    dtypes = {"mixer": said, "fed": said}
    a: dict[str, Any] = {
        name: None if v is None else v.astype(dtypes.get(name, dtype)) for name, v in p.arrays.items()
    }
    there = {name: room.give(v) for name, v in a.items()}
    s = system_of(p, a["x"], a["b"].shape[-1])
    s = s._replace(x=there["x"], B=room.give(s.B), C=room.give(s.C))
    assert fits(s)
    given = p.arguments(there)
    mix = Mix(s, given, there["fed"], there["y"])
    places, total = given.cotangents
    told = room.give(np.full((a["x"].shape[0] * a["x"].shape[1], total), 7, said))
    x_bar = mix.pull(there["mixed_bar"], there["B_bar"], there["C_bar"], told, places)
    found = {"mixed": mix.mixed, "B": mix.B, "C": mix.C, "x_bar": x_bar}
    found = {name: room.get(v) for name, v in found.items()}
    told = room.get(told)
    for name, at in zip(("mixer", "b", "c"), places, strict=True):
        found[f"{name}_bar"] = told[:, at : at + a[name].shape[-1]].reshape(a[name].shape)
    assert found["mixed"].dtype == found["x_bar"].dtype == dtype
    return found


def rough(p: Problem, rng: Any) -> dict[str, float]:
    """Errors of a plain evaluation in single precision: the largest of some neighbours that differ in a last
    place, for that of one is a matter of luck where much cancels."""
    largest = dict.fromkeys(NAMES, 0.0)
    for n in range(6):
        near = {}
        for name, v in p.arrays.items():
            there = n and v is not None
            near[name] = np.float32(v * (1 + 2.0**-23 * rng.integers(-1, 2, v.shape))) if there else v
        q = p._replace(arrays={name: None if v is None else v.astype(np.float64) for name, v in near.items()})
        found, right = plain(q, np.float32), plain(q, np.float64)
        largest = {name: max(e, error(found[name], right[name])) for name, e in largest.items()}
    return largest


def held(room: Room, p: Problem, dtype: Any, said: Any = None) -> None:
    """Double is right to some last places, float as a plain evaluation in its precision."""
    right = plain(p, np.float64)
    found = found_by(room, p, dtype, said or dtype)
    errors = rough(p, np.random.default_rng(0)) if dtype == np.float32 else None
    for name in NAMES:
        allowed = 1e-12 if errors is None else 2 * errors[name] + 4 * 2.0**-24
        if said is not None and name in ("mixer_bar", "b_bar", "c_bar"):
            allowed += 2.0**-8
        assert error(found[name], right[name]) <= allowed, name
    assert (found["mixer_bar"][..., -SPARE:] == 0).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("spectral", [True, False])
@pytest.mark.parametrize("activation", ["identity", "silu", "relu"])
@pytest.mark.parametrize("edges", [(4, 6), (5, 3)])
def test_in_double(gpu_room: Room, edges: tuple[int, int], activation: str, spectral: bool, rng: Any) -> None:
    held(gpu_room, draw(rng, edges, activation=activation, spectral=spectral), np.float64)


@pytest.mark.parametrize("spectral", [True, False])
@pytest.mark.parametrize("activation", ["identity", "silu", "relu"])
@pytest.mark.parametrize("edges", [(8, 8), (5, 3)])
def test_in_single(gpu_room: Room, edges: tuple[int, int], activation: str, spectral: bool, rng: Any) -> None:
    held(gpu_room, draw(rng, edges, activation=activation, spectral=spectral), np.float32)


@pytest.mark.parametrize("edges", [(16, 32), (32, 32), (23, 9), (32, 2), (1, 7)])
def test_more_edges(gpu_room: Room, edges: tuple[int, int], rng: Any) -> None:
    held(gpu_room, draw(rng, edges, rows=(1, 2), size=16), np.float32)


@pytest.mark.parametrize(
    ("edges", "dtype"), [((33, 12), np.float32), ((48, 64), np.float32), ((7, 37), np.float64)]
)
def test_rows_that_are_too_long_for_registers(
    gpu_room: Room, edges: tuple[int, int], dtype: Any, rng: Any
) -> None:
    held(gpu_room, draw(rng, edges, rows=(1, 1), size=40), dtype)


@pytest.mark.parametrize("seen", [(), ("mixer",), ("b", "c"), ("mixer", "c")])
def test_what_sees(gpu_room: Room, seen: tuple[str, ...], rng: Any) -> None:
    held(gpu_room, draw(rng, (4, 6), seen=seen), np.float64)


@pytest.mark.parametrize(
    "options",
    [
        {"y": False},
        {"fed": False},
        {"y": False, "fed": False},
        {"bc_eps": None},
        {"bc_eps": 10.0},
        {"unit_eps": 3.0},
        {"alpha_max": 2.0},
    ],
    ids=str,
)
def test_what_may_differ(gpu_room: Room, options: dict[str, Any], rng: Any) -> None:
    held(gpu_room, draw(rng, (4, 6), **options), np.float64)


def test_arguments_of_zero(gpu_room: Room, rng: Any) -> None:
    """No factor is left, and nothing is divided by zero."""
    p = draw(rng, (4, 6), fed=False, activation="relu")
    p.arrays["mixer"][0, 1] = -1
    held(gpu_room, p, np.float64)
    held(gpu_room, p, np.float32)


@pytest.mark.parametrize("edges", [(8, 8), (4, 6)])
def test_half_of_what_is_said(gpu_room: Room, edges: tuple[int, int], rng: Any) -> None:
    held(gpu_room, draw(rng, edges, said=BFLOAT16), np.float32, BFLOAT16)


@pytest.mark.parametrize("name", ["mixer", "x", "fed", "b", "mixed_bar"])
def test_rows_that_are_not_finite_stay_alone(gpu_room: Room, name: str, rng: Any) -> None:
    p = draw(rng, (8, 5), rows=(1, 4))
    good = found_by(gpu_room, p, np.float32, np.float32)
    rows = p.arrays[name].reshape(4, -1)
    rows[1, 0], rows[2, :] = np.inf, np.nan
    bad = found_by(gpu_room, p, np.float32, np.float32)
    for part in NAMES:
        one, other = (v[part].reshape(4, -1)[[0, 3]] for v in (good, bad))
        np.testing.assert_array_equal(one, other, err_msg=part)
    assert not all(np.isfinite(bad[part]).all() for part in NAMES)


@pytest.mark.parametrize("rows", [(0, 3), (2, 0)])
def test_no_rows(gpu_room: Room, rows: tuple[int, int], rng: Any) -> None:
    held(gpu_room, draw(rng, (4, 6), rows=rows), np.float64)


def test_rows_that_begin_anywhere(gpu_room: Room, rng: Any) -> None:
    p = draw(rng, (4, 4), fed=False)
    right = found_by(gpu_room, p, np.float32, np.float32)
    a: dict[str, Any] = {
        name: None if v is None else v.astype(np.float32)
        for name, v in p.arrays.items()
        if name not in ("x", "y", "mixed_bar")
    }
    for name in ("x", "y", "mixed_bar"):
        own = p.arrays[name]
        shifted = np.concatenate([[0], own.ravel()]).astype(np.float32)
        a[name] = shifted
    there = {name: gpu_room.give(v) for name, v in a.items()}
    for name in ("x", "y", "mixed_bar"):
        there[name] = there[name][1:].reshape(p.arrays[name].shape)
    s = system_of(p, p.arrays["x"].astype(np.float32), a["b"].shape[-1])
    s = s._replace(x=there["x"], B=gpu_room.give(s.B), C=gpu_room.give(s.C))
    given = p.arguments(there)
    mix, (places, total) = Mix(s, given, None, there["y"]), given.cotangents
    told = gpu_room.give(np.zeros((6, total), np.float32))
    x_bar = mix.pull(there["mixed_bar"], there["B_bar"], there["C_bar"], told, places)
    np.testing.assert_array_equal(gpu_room.get(mix.mixed), right["mixed"])
    np.testing.assert_array_equal(gpu_room.get(x_bar), right["x_bar"])


@pytest.mark.parametrize(("edges", "dtype"), [((16, 32), np.float32), ((4, 6), np.float64)])
def test_threads_in_any_order(simt_device: Any, edges: tuple[int, int], dtype: Any, rng: Any) -> None:
    """No races, and the same to the last bit."""
    p, results = draw(rng, edges, rows=(1, 2)), []
    for seed in range(3):
        simt_device.seed, simt_device.races = seed, seed < 2
        results.append(found_by(Room("simt", lambda a: a, lambda a: a), p, dtype, dtype))
    for name in NAMES:
        np.testing.assert_array_equal(results[0][name], results[1][name], err_msg=name)
        np.testing.assert_array_equal(results[1][name], results[2][name], err_msg=name)


def test_what_fits(gpu_room: Room, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p = draw(rng, (32, 32), rows=(1, 1))
    s = system_of(p, p.arrays["x"].astype(np.float32), 5)
    assert fits(s)
    monkeypatch.setattr(_device, "shared_limit", lambda: 16 * 1024)
    assert not fits(s)
