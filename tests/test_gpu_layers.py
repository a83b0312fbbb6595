"""What layers need of a device, door by door: against the formulas in float64, and against the loops of the CPU."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gpu_machine import GpuRoom as Room
from test_gpu_maps import close

from fpnumba import relax
from fpnumba.gpu import maps
from fpnumba.gpu._look import wild
from fpnumba.nn import loops
from fpnumba.solve import Solver, Status

DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])
VALUES: dict[str, Callable[[Any], Any]] = {
    "identity": lambda v: v,
    "relu": lambda v: np.maximum(v, 0),
    "silu": lambda v: v / (1 + np.exp(-v)),
    "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
}
SLOPES: dict[str, Callable[[Any], Any]] = {
    "identity": np.ones_like,
    "relu": lambda v: (v > 0).astype(v.dtype),
    "silu": lambda v: VALUES["sigmoid"](v) * (1 + v * (1 - VALUES["sigmoid"](v))),
    "sigmoid": lambda v: VALUES["sigmoid"](v) * (1 - VALUES["sigmoid"](v)),
}


def draw(rng: Any, dtype: str, *shapes: tuple[int, ...]) -> list[Any]:
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def convolution(x: Any, taps: Any, bias: Any, activation: str, past: Any, y_bar: Any) -> tuple[Any, ...]:
    """Value and cotangents, in float64."""
    x, taps, bias, past, y_bar = (a.astype(np.float64) for a in (x, taps, bias, past, y_bar))
    steps, width = x.shape[1], len(taps)
    whole = np.concatenate([past, x], axis=1)
    windows = [whole[:, k : k + steps] for k in range(width)]
    inner = bias + sum(taps[k] * windows[k] for k in range(width))
    g = SLOPES[activation](inner) * y_bar
    whole_bar = np.zeros_like(whole)
    for k in range(width):
        whole_bar[:, k : k + steps] += taps[k] * g
    taps_bar = np.stack([(g * window).sum((0, 1)) for window in windows])
    return VALUES[activation](inner), whole_bar[:, width - 1 :], taps_bar, g.sum((0, 1))


CONVOLUTIONS = [
    (2, 37, 12, 4),
    (3, 2, 5, 4),  # shorter than the filter, an odd number of channels
    (2, 1, 8, 3),
    (1, 70, 1030, 2),  # more channels than a block takes
    (5, 40, 6, 1),
    (2, 9, 4, 11),  # a channel a thread
    (0, 4, 3, 4),
    (2, 0, 3, 4),
]


@DTYPES
@pytest.mark.parametrize(
    ("activation", "shape"),
    [("silu", s) for s in CONVOLUTIONS] + [(name, CONVOLUTIONS[0]) for name in VALUES if name != "silu"],
    ids=str,
)
def test_convolution(
    gpu_room: Room, activation: str, shape: tuple[int, int, int, int], dtype: str, rng: Any
) -> None:
    batch, _, channels, width = shape
    x, y_bar, taps, bias, past = draw(
        rng, dtype, *[shape[:3]] * 2, (width, channels), (channels,), (batch, width - 1, channels)
    )
    give, get = gpu_room.give, gpu_room.get
    for before in (past, None):
        wanted = convolution(
            x, taps, bias, activation, np.zeros_like(past) if before is None else past, y_bar
        )
        for doors, to, back in ((loops, np.copy, np.asarray), (maps, give, get)):
            given = [to(a) for a in (x, taps, bias)]
            then = None if before is None else to(before)
            close(back(doors.conv(*given, activation, then)), wanted[0], dtype)
            bars = doors.conv_vjp(*given, activation, then, to(y_bar))
            for found, right in zip(bars, wanted[1:], strict=True):
                close(back(found), right, dtype)


@DTYPES
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 3), (700, 16), (300, 1030), (1000, 6), (4097, 64), (0, 4), (3, 0)], ids=str
)
def test_sums_of_columns(gpu_room: Room, shape: tuple[int, int], dtype: str, rng: Any) -> None:
    (x,) = draw(rng, dtype, shape)
    found = gpu_room.get(maps.column_sums(gpu_room.give(x)))
    assert found.dtype == x.dtype
    assert found.shape == shape[1:]
    np.testing.assert_allclose(
        found,
        x.sum(0, dtype=np.float64),
        rtol=0,
        atol=1e-10 if dtype == "float64" else 2e-5 * shape[0] ** 0.5,
    )
    if x.size:
        x[shape[0] // 2, 0] = np.nan
        found = gpu_room.get(maps.column_sums(gpu_room.give(x)))
        assert np.flatnonzero(np.isnan(found)).tolist() == [0]


def norm(x: Any, weight: Any, eps: float, y_bar: Any) -> tuple[Any, ...]:
    """RMSNorm and its cotangents, in float64."""
    x, weight, y_bar = (a.astype(np.float64) for a in (x, weight, y_bar))
    scale = 1 / np.sqrt((x * x).sum(1) / max(x.shape[1], 1) + eps)
    normal, inner = x * scale[:, None], weight * y_bar
    along = (inner * normal).sum(1, keepdims=True) / max(x.shape[1], 1)
    return weight * normal, scale, scale[:, None] * (inner - normal * along), (y_bar * normal).sum(0)


@DTYPES
@pytest.mark.parametrize("shape", [(5, 3), (70, 33), (3, 700), (41, 129), (1, 5000), (0, 4)], ids=str)
def test_rms_norm(gpu_room: Room, shape: tuple[int, int], dtype: str, rng: Any) -> None:
    x, y_bar, weight = draw(rng, dtype, shape, shape, shape[1:])
    x[:1] *= 1e-4
    wanted = norm(x, weight, 1e-5, y_bar)
    given = gpu_room.give(x), gpu_room.give(weight)
    y, scale = maps.rms_norm(*given, 1e-5)
    x_bar, weight_bar = maps.rms_norm_vjp(*given, scale, gpu_room.give(y_bar))
    for found, right in zip((y, scale, x_bar, weight_bar), wanted, strict=True):
        close(gpu_room.get(found), right, dtype)


@DTYPES
def test_gates(gpu_room: Room, dtype: str, rng: Any) -> None:
    z, y, bar = draw(rng, dtype, *[(3, 7, 5)] * 3)
    wide = [a.astype(np.float64) for a in (z, y, bar)]
    wanted = (
        VALUES["silu"](wide[0]) * wide[1],
        SLOPES["silu"](wide[0]) * wide[1] * wide[2],
        VALUES["silu"](wide[0]) * wide[2],
    )
    give, get = gpu_room.give, gpu_room.get
    for doors, to, back in ((loops, np.copy, np.asarray), (maps, give, get)):
        close(back(doors.gated(to(z), to(y))), wanted[0], dtype)
        for found, right in zip(doors.gated_vjp(to(z), to(y), to(bar)), wanted[1:], strict=True):
            close(back(found), right, dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(3, 70, 12), (2, 5, 7), (1, 1, 1), (2, 3, 300), (0, 2, 3)], ids=str)
@pytest.mark.parametrize("rule", ["max", "published"])
def test_steps_of_an_iteration(
    gpu_room: Room, rule: Any, shape: tuple[int, int, int], dtype: str, rng: Any
) -> None:
    h, new = draw(rng, dtype, shape, shape)
    damping = np.linspace(1.0, 0.25, shape[0]).astype(dtype)
    if shape[0] > 1:
        new[1, -1, -1] = np.nan
    if shape[0] > 2:
        damping[2] = -1
        new[2, 0, 0] = np.nan  # not looked at
    give, solver = gpu_room.give, Solver(criterion=rule)
    found, measures = (
        gpu_room.get(a) for a in maps.advance(*map(give, (h, new, damping)), rule == "published")
    )
    change = new - h
    proposal = h + damping[:, None, None] * change
    wanted = relax._measured(proposal, new, change, solver).T
    going = damping >= 0
    assert found.dtype == measures.dtype == h.dtype
    tolerance = 1e-14 if dtype == "float64" else 1e-6
    np.testing.assert_allclose(found[going], proposal[going], rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(found[~going], h[~going])
    np.testing.assert_allclose(measures[going, : wanted.shape[1]], wanted[going], rtol=tolerance)
    assert not np.isnan(measures[~going]).any()


POLICIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "damped": {"damping": 0.7, "damping_decay": 0.8, "damping_patience": 3, "max_iter": 60},
    "most": {"quantile": 0.5},
    "published": {"criterion": "published", "damping_decay": 0.9, "damping_patience": 5},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_an_iteration_is_that_of_the_host(
    gpu_room: Room, policy: str, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate, x = np.array([0.1, 0.5, 0.97, -1.05, 0.3])[:, None, None], rng.standard_normal((5, 6, 3))
    x[4, 2, 1] = np.nan
    solver = Solver(rtol=1e-5, on_failure="ignore", **{"max_iter": 200, **POLICIES[policy]})

    def finite(b: int) -> bool:
        return b != 4

    wanted, history = relax.relax(lambda h: rate * h + x, np.zeros_like(x), solver, finite)
    if gpu_room.name == "simt":
        monkeypatch.setattr(relax, "_kernels", lambda h: maps)
    r, v = gpu_room.give(rate), gpu_room.give(x)
    found, their_history = relax.relax(
        lambda h: r * h + v, 0 * gpu_room.give(np.zeros_like(x)), solver, finite
    )
    np.testing.assert_array_equal(found.status, wanted.status)
    assert found.status[4] == Status.NONFINITE_INPUT
    np.testing.assert_array_equal(found.iterations, wanted.iterations)
    # residuals are differences of numbers near one
    np.testing.assert_allclose(their_history, history, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(gpu_room.get(found.value), wanted.value, rtol=1e-10)


@DTYPES
def test_sequences_that_are_not_finite(gpu_room: Room, dtype: str, rng: Any) -> None:
    long, short, row = draw(rng, dtype, (4, 5000, 3), (4, 2), (4, 7, 1))
    long[1, 4999, 2], short[3, 1], row[0, 3, 0] = np.nan, -np.inf, np.inf
    long[2, 0, 0] = np.finfo(dtype).max
    give, get = gpu_room.give, gpu_room.get
    assert get(wild(give(long), None, give(short))).tolist() == [0, 1, 0, 1]
    first = wild(give(long))
    assert get(first).tolist() == [0, 1, 0, 0]
    row[1, 0, 0] = np.nan
    assert get(wild(give(row), give(short), only=first)).tolist() == [0, 1, 0, 0]
    assert get(wild(give(long[:0]), give(short[:0]))).shape == (0,)
    assert get(wild(give(short[:, :0]))).tolist() == [0] * 4


def test_they_are_the_same_every_time(simt_device: Any, rng: Any) -> None:
    x, y_bar, taps, bias = draw(rng, "float32", *[(2, 50, 36)] * 2, (4, 36), (36,))
    results = []
    for seed in range(3):
        simt_device.seed, simt_device.races = seed, seed == 0
        flat = x.reshape(-1, 36)
        y, scale = maps.rms_norm(flat, bias, 1e-5)
        results.append(
            [
                *maps.conv_vjp(x, taps, bias, "silu", None, y_bar),
                maps.column_sums(flat),
                *(y, *maps.rms_norm_vjp(flat, bias, scale, flat)),
                *maps.advance(x, y_bar, np.ones(2, np.float32), False),
            ]
        )
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)
