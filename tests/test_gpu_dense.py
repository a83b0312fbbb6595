"""Dense and Fixed solves of the GPU room against the CPU room and the reference."""

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import strategies
from hall import error
from strategies import Problem

from fpnumba.cpu import solve as cpu
from fpnumba.gpu import _dense, _device, _report
from fpnumba.reference import solve as true

KINDS = ("fixed", "dense")
DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
# One rounding to the storage type.
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
OPTIONS: dict[str, Any] = {"rtol": 1e-6, "atol": 0.0, "max_iter": 1000, "damping": 1.0}


def solved(
    room: Any, p: Problem, adjoint: bool, chunk: int, guess: Any = None, **options: Any
) -> _report.Solved:
    """By the room; the result where NumPy finds it."""
    source, initial = (p.hbar, None) if adjoint else (p.x, p.initial)
    params = tuple(room.give(a) for a in p.params)
    arrays = (room.give(a) for a in (p.lam, p.gate, source, initial, guess))
    with np.errstate(all="ignore"):
        found = _dense.solve(p.kind, params, *arrays, adjoint=adjoint, chunk=chunk, **(OPTIONS | options))
    return _report.Solved(*(room.get(a) for a in found))


def on_cpu(p: Problem, adjoint: bool, chunk: int, guess: Any = None, **options: Any) -> Any:
    """The same by the CPU room."""
    options = OPTIONS | options | {"method": "chunked", "chunk": chunk}
    if adjoint:
        return cpu.solve_adjoint(*p.system, p.hbar, guess, **options)
    return cpu.solve(*p.system, p.x, p.initial, guess, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("guessed", [False, True])
def test_iterations_are_those_of_the_cpu_room(gpu_room: Any, kind: str, adjoint: bool, guessed: bool) -> None:
    for gated in (False, True):
        p = strategies.problem(3, kind, batch=3, steps=11, dim=6, gated=gated)
        guess = p.h if guessed else None
        for chunk, damping, atol in ((11, 1.0, 0.0), (4, 0.7, 1e-3), (1, 1.0, 0.0)):
            options = {"damping": damping, "atol": atol}
            mine = solved(gpu_room, p, adjoint, chunk, guess, **options)
            theirs = on_cpu(p, adjoint, chunk, guess, **options)
            np.testing.assert_array_equal(mine.chunk_iterations, theirs.chunk_iterations)
            np.testing.assert_array_equal(mine.iterations, theirs.iterations)
            np.testing.assert_array_equal(mine.status, theirs.status)
            np.testing.assert_allclose(mine.residual, theirs.residual, rtol=1e-6)
            assert error(mine.value, theirs.value) <= 1e-13


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "dim"), [("float32", 20), ("float64", 7), ("float16", 16), ("bfloat16", 130)]
)
def test_solves_pulls_and_iterates_in_every_dtype(gpu_room: Any, kind: str, dtype: str, dim: int) -> None:
    p = strategies.problem(5, kind, batch=2, steps=9, dim=dim, gated=dtype != "float32", bound=0.7)
    p = p.astype(DTYPES[dtype])
    exact = p.astype(np.float64)
    real = 8 if dtype == "float64" else 4
    slack = 2 * UNIT[dtype] + 20 * UNIT[f"float{8 * real}"]
    tight = {"rtol": 1e-15 if real == 8 else 1e-7}
    for adjoint in (False, True):
        right = on_cpu(exact, adjoint, 9, rtol=1e-14).value
        for chunk in (9, 4):
            found = solved(gpu_room, p, adjoint, chunk, **tight)
            assert found.value.dtype == DTYPES[dtype]
            assert found.status.tolist() == [0, 0]
            # the last iteration moved it by four roundings at most
            assert error(found.value, right) <= slack + 40 * UNIT[f"float{8 * real}"]
    params = tuple(gpu_room.give(a) for a in p.params)
    rest = tuple(gpu_room.give(a) for a in (p.lam, p.gate))
    x, initial, hbar, h = (gpu_room.give(a) for a in (p.x, p.initial, p.hbar, p.h))
    ahead = _dense.iterate(kind, params, *rest, x, initial, h, adjoint=False)
    back = _dense.iterate(kind, params, *rest, hbar, None, h, adjoint=True)
    assert error(gpu_room.get(ahead), true.iterate(*exact.system, exact.x, exact.initial, exact.h)) <= slack
    assert error(gpu_room.get(back), true.iterate_adjoint(*exact.system, exact.hbar, exact.h)) <= slack
    for start in (initial, None):
        found = _dense.pull(kind, params, *rest, x, start, h, hbar)
        wanted = true.rnn_cotangents(
            *exact.system, exact.x, None if start is None else exact.initial, exact.h, exact.hbar
        )
        for mine, theirs in zip((*found[:4], *found[4]), (*wanted[:4], *wanted[4]), strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert gpu_room.get(mine).dtype == DTYPES[dtype]
                assert error(gpu_room.get(mine), theirs) <= slack


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "steps"), [(0, 4), (2, 0), (1, 1)])
def test_empty_and_single(gpu_room: Any, kind: str, batch: int, steps: int) -> None:
    p = strategies.problem(1, kind, batch=batch, steps=steps, dim=5)
    for adjoint in (False, True):
        mine, theirs = solved(gpu_room, p, adjoint, 3), on_cpu(p, adjoint, 3)
        assert mine.chunk_iterations.shape == theirs.chunk_iterations.shape
        assert error(mine.value, theirs.value) <= 1e-13
        assert mine.status.tolist() == theirs.status.tolist()
    params = tuple(gpu_room.give(a) for a in p.params)
    lam, x, h, s = (gpu_room.give(a) for a in (p.lam, p.x, p.h, p.hbar))
    found = _dense.pull(kind, params, lam, None, x, None, h, s)
    assert [a.shape for a in (found[0], found[2], found[3], found[4][0])] == [
        p.x.shape,
        p.x.shape,
        (batch, 5),
        p.params[0].shape,
    ]
    assert _dense.iterate(kind, params, lam, None, x, None, h, adjoint=False).shape == p.x.shape


@pytest.mark.parametrize("kind", KINDS)
def test_statuses(gpu_room: Any, kind: str) -> None:
    p = strategies.problem(2, kind, batch=2, steps=6, dim=5, bound=0.8)
    wild = replace(p, params=(40 * p.params[0],))
    assert solved(gpu_room, wild, False, 6, max_iter=4000).status.tolist() == [_report.DIVERGED] * 2
    few = solved(gpu_room, p, False, 3, max_iter=2)
    assert few.status.tolist() == [_report.MAX_ITER] * 2
    assert few.chunk_iterations.tolist() == [[2, 2]] * 2
    assert error(few.value, on_cpu(p, False, 3, max_iter=2).value) <= 1e-14


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adjoint", [False, True])
def test_what_is_not_finite_stays_in_its_sequence(gpu_room: Any, kind: str, adjoint: bool) -> None:
    p = strategies.problem(2, kind, batch=3, steps=8, dim=6)
    clean = solved(gpu_room, p, adjoint, 3)
    (p.hbar if adjoint else p.x)[1, 4, 2] = np.nan
    found = solved(gpu_room, p, adjoint, 3)
    theirs = on_cpu(p, adjoint, 3)
    assert found.status.tolist() == [0, _report.NONFINITE_INPUT, 0]
    np.testing.assert_array_equal(found.chunk_iterations, theirs.chunk_iterations)
    for a, b in zip(found, clean, strict=True):
        np.testing.assert_array_equal(a[[0, 2]], b[[0, 2]])
    np.testing.assert_array_equal(
        np.isnan(found.value[1]).any(axis=-1), np.isnan(theirs.value[1]).any(axis=-1)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_zero_in_zero_out(gpu_room: Any, kind: str) -> None:
    p = strategies.problem(4, kind, batch=2, steps=7, dim=6)
    still = replace(p, x=np.zeros_like(p.x), initial=None, hbar=np.zeros_like(p.hbar))
    for adjoint in (False, True):
        for guess in (None, p.h):
            for chunk in (7, 3):
                found = solved(gpu_room, still, adjoint, chunk, guess)
                assert not found.value.any()
                assert (found.iterations == 1).all()
                assert found.status.tolist() == [0, 0]
    # zero until something comes in, and after it only where nothing is carried
    late = replace(still, x=np.where(np.arange(7)[:, None] >= 3, p.x, 0.0))
    mine, theirs = (
        f(late) for f in (lambda q: solved(gpu_room, q, False, 3, p.h), lambda q: on_cpu(q, False, 3, p.h))
    )
    assert not mine.value[:, :3].any()
    np.testing.assert_array_equal(mine.chunk_iterations, theirs.chunk_iterations)
    params = tuple(gpu_room.give(a) for a in p.params)
    lam, x, h, none = (gpu_room.give(a) for a in (p.lam, p.x, p.h, still.hbar))
    found = _dense.pull(kind, params, lam, None, x, None, h, none)
    for bar in (found[0], *found[2:4], *found[4]):
        assert not np.asarray(gpu_room.get(bar)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_does_not_depend_on_its_batch(gpu_room: Any, kind: str) -> None:
    p = strategies.problem(6, kind, batch=4, steps=9, dim=6)
    turned = p.take([2, 0, 3, 1])
    one, two = solved(gpu_room, p, False, 4), solved(gpu_room, turned, False, 4)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a[[2, 0, 3, 1]], b)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_at_rest_are_left_alone(gpu_room: Any, kind: str) -> None:
    """One sequence takes long; the others have their answers from when they met the tolerance."""
    p = strategies.problem(7, kind, batch=3, steps=8, dim=6)
    lam = p.lam.copy()
    lam[1] *= 1e-3  # which makes its gate, and so its iteration, slow
    p = replace(p, lam=lam)
    together = solved(gpu_room, p, False, 8, rtol=1e-10)
    assert together.iterations[1] > together.iterations[0]
    for b in (0, 2):
        alone = solved(gpu_room, p.sequence(b), False, 8, rtol=1e-10)
        assert alone.iterations[0] == together.iterations[b]
        if kind == "dense" or gpu_room.name == "simt":
            np.testing.assert_allclose(alone.value[0], together.value[b], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_orders_of_threads_do_not_matter(simt_device: Any, kind: str) -> None:
    p = strategies.problem(8, kind, batch=2, steps=7, dim=150, dtype=np.float32)
    seen = []
    for seed, resident in ((0, 1), (1, 4), (2, 4)):
        simt_device.seed, simt_device.resident = seed, resident
        found = _dense.solve(
            kind, p.params, p.lam, None, p.x, p.initial, None, adjoint=False, chunk=3, **OPTIONS
        )
        bars = _dense.pull(kind, p.params, p.lam, None, p.x, p.initial, p.h, p.hbar)
        seen.append([*found, bars[0], *bars[2:4], *bars[4]])
    for other in seen[1:]:
        for a, b in zip(other, seen[0], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.sanitize
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adjoint", [False, True])
def test_no_access_is_out_of_bounds(simt_device: Any, kind: str, adjoint: bool) -> None:
    p = strategies.problem(9, kind, batch=2, steps=5, dim=9, gated=True, dtype=np.float32)
    source, initial = (p.hbar, None) if adjoint else (p.x, p.initial)
    _dense.solve(
        kind,
        p.params,
        p.lam,
        p.gate,
        source,
        initial,
        p.h,
        adjoint=adjoint,
        chunk=2,
        **(OPTIONS | {"rtol": 1e-2}),
    )
    _dense.iterate(kind, p.params, p.lam, p.gate, source, initial, p.h, adjoint=adjoint)
    _dense.pull(kind, p.params, p.lam, p.gate, p.x, p.initial, p.h, p.hbar)


def test_nothing_runs_on_long_after_the_last_sequence(simt_device: Any) -> None:
    p = strategies.problem(10, "fixed", batch=2, steps=6, dim=4)
    found = _dense.solve("fixed", p.params, p.lam, None, p.x, None, None, adjoint=False, chunk=6, **OPTIONS)
    scans = sum(launch.kernel.function == "dense_scan" for launch in simt_device.launches)
    assert scans == found.iterations.max() + 2
    simt_device.launches.clear()
    options = OPTIONS | {"max_iter": 3}
    _dense.solve("fixed", p.params, p.lam, None, p.x, None, None, adjoint=False, chunk=6, **options)
    assert sum(launch.kernel.function == "dense_scan" for launch in simt_device.launches) == 3


def test_watch(gpu_room: Any) -> None:
    counter = gpu_room.give(np.array([7], np.int32))
    watch = _device.Watch(counter, 2)
    seen = []
    for _ in range(7):
        seen.append(watch.look())
        counter -= 1
    assert seen == [None, None, 7, 6, 5, 4, 3]
    watch.close()


@pytest.mark.gpu
def test_tf32_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = _device.xp()
    assert not _device._takes_tf32()
    monkeypatch.setattr(_device, "_takes_tf32", lambda: True)
    with pytest.raises(RuntimeError, match="CUPY_TF32"):
        _device.matmul(cupy.eye(2, dtype=np.float32), cupy.eye(2, dtype=np.float32))
    _device.matmul(cupy.eye(2), cupy.eye(2))
