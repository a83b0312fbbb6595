"""Iterated solves of the GPU room against the CPU room's, on NumPy arrays through the stand-in and on a device."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import strategies
from gpu_machine import GpuRoom as Room
from numpy.testing import assert_allclose, assert_array_equal
from strategies import Problem

from fpnumba.cpu import solve as cpu
from fpnumba.gpu import _device, _relax
from fpnumba.reference import solve as reference

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = ("float64", "float32", "float16", "bfloat16")
# kind, d1, d2: Kronecker factors, Monarch blocks and their size; rank and channels of the rest
SHAPES = (
    ("kronecker", 1, 1),
    ("kronecker", 3, 5),
    ("kronecker", 16, 8),
    ("monarch", 4, 3),
    ("monarch", 2, 16),
    ("monarch", 5, 8),
    ("dplr", 0, 6),
    ("dplr", 1, 33),
    ("dplr", 8, 20),
    ("householder", 0, 6),
    ("householder", 3, 33),
    ("householder", 8, 20),
    ("dplr", 9, 6),
    ("householder", 11, 33),
)
LARGE = (
    ("kronecker", 32, 32),
    ("kronecker", 25, 10),
    ("kronecker", 40, 36),
    ("monarch", 16, 64),
    ("monarch", 9, 120),
    ("monarch", 2, 130),
    ("householder", 2, 1100),
    ("householder", 9, 1100),
)


@pytest.fixture
def room(gpu_room: Room) -> Room:
    """The GPU room, by a shorter name."""
    return gpu_room


def made(
    kind: str,
    d1: int,
    d2: int,
    *,
    batch: int = 2,
    steps: int = 7,
    dtype: str = "float64",
    bound: float = 0.8,
    gated: bool = False,
    initial: bool = True,
    seed: int = 0,
) -> Problem:
    """A problem of a shape of `SHAPES`."""
    rng = np.random.default_rng(seed)
    low = kind in strategies.LOW_RANK
    rank, dim = (d1, d2) if low else (0, d1 * d2)
    options: dict[str, Any] = {"gated": gated, "initial": initial, "bound": bound, "slowest": 0.9}
    p = strategies.problem(
        rng, kind if low else "dplr", batch=batch, steps=steps, dim=dim, rank=rank, **options
    )
    if kind == "kronecker":
        shapes = (batch, steps, d1, d1), (batch, steps, d2, d2)
        p = replace(p, kind=kind, params=tuple(strategies._scaled(rng, s, bound**0.5) for s in shapes))
    elif kind == "monarch":
        blocks = strategies._scaled(rng, (batch, steps, d1, d2, d2), 1.0)
        p = replace(p, kind=kind, params=(blocks, rng.uniform(-bound, bound, (batch, steps, d1))))
    return p.astype(BFLOAT16 if dtype == "bfloat16" else dtype)


def lengths(p: Problem) -> tuple[int, ...]:
    """Of chunks: one step has kernels of its own, and low-rank mixers count in another way there."""
    return (3,) if p.kind in strategies.LOW_RANK else (1, 3)


def system(room: Room, p: Problem) -> tuple[Any, ...]:
    return p.kind, tuple(room.give(a) for a in p.params), room.give(p.lam), room.give(p.gate)


def ours(room: Room, p: Problem, adjoint: bool, chunk: int, guess: Any = None, **options: Any) -> Any:
    """The room's answer, back on the host."""
    source, initial = (p.hbar, None) if adjoint else (p.x, p.initial)
    given = {"rtol": 1e-6, "atol": 0.0, "max_iter": 1000, "damping": 1.0} | options
    arrays = room.give(source), room.give(initial), room.give(guess)
    solved = _relax.solve(*system(room, p), *arrays, adjoint=adjoint, chunk=chunk, **given)
    return type(solved)(*(room.get(a) for a in solved))


def theirs(p: Problem, adjoint: bool, chunk: int, guess: Any = None, **options: Any) -> Any:
    """The CPU room's answer: that of the same equations, for every mixer the general way."""
    options = {"method": "chunked", "chunk": chunk} | options
    if adjoint:
        return cpu.solve_adjoint(*p.system, p.hbar, guess, **options)
    return cpu.solve(*p.system, p.x, p.initial, guess, **options)


def same(solved: Any, expected: Any, tolerance: float, counts: int = 0) -> None:
    assert_allclose(solved.value, expected.value, rtol=tolerance, atol=tolerance)
    assert_array_equal(solved.status, expected.status)
    assert abs(solved.chunk_iterations - expected.chunk_iterations).max(initial=0) <= counts
    assert_array_equal(solved.iterations, solved.chunk_iterations.max(axis=1, initial=0))
    for got, want in zip(solved, expected, strict=True):
        assert got.shape == want.shape


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_like_the_cpu_room(room: Room, shape: Any, adjoint: bool) -> None:
    for chunk, gated, initial in ((2, False, True), (5, True, False), (7, False, False), (1, True, True)):
        p = made(*shape, gated=gated, initial=initial)
        if chunk == 1 and shape[0] in strategies.LOW_RANK:
            continue  # there the CPU room counts in another way
        expected = theirs(p, adjoint, chunk, rtol=1e-10)
        solved = ours(room, p, adjoint, chunk, rtol=1e-10)
        same(solved, expected, 1e-12)
        assert_allclose(solved.residual, expected.residual, rtol=1e-2, atol=1e-12)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_single_precision(room: Room, shape: Any, adjoint: bool) -> None:
    p = made(*shape, dtype="float32", steps=11)
    exact = p.astype("float64")
    for chunk in (*lengths(p), 8, 11):
        solved = ours(room, p, adjoint, chunk)
        assert solved.value.dtype == np.float32
        same(solved._replace(value=solved.value.astype(float)), theirs(exact, adjoint, chunk), 2e-5, counts=4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_half_types_are_solved_in_single_precision(room: Room, shape: Any, adjoint: bool, dtype: str) -> None:
    p = made(*shape, dtype=dtype, steps=6, gated=adjoint)
    for chunk in (*lengths(p), 6):
        solved = ours(room, p, adjoint, chunk)
        assert solved.value.dtype == p.x.dtype
        want = theirs(p.astype("float64"), adjoint, chunk)
        eps = float(ml_dtypes.finfo(p.x.dtype).eps)
        assert_allclose(solved.value.astype(float), want.value, rtol=eps, atol=1e-5)
        assert (solved.status == 0).all()
        assert abs(solved.iterations - want.iterations).max() <= 4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_steps(room: Room, shape: Any, dtype: str) -> None:
    p = made(*shape, batch=1, steps=3, dtype=dtype, bound=0.5)
    tolerance = 1e-9 if dtype == "float64" else 2e-5
    for adjoint, chunk in ((False, 2), (True, 3), (False, 1), (True, 1)):
        if chunk == 1 and p.kind in strategies.LOW_RANK:
            continue
        expected = theirs(p.astype("float64"), adjoint, chunk, rtol=1e-3)
        same(ours(room, p, adjoint, chunk, rtol=1e-3), expected, tolerance)


@pytest.mark.parametrize("shape", [("kronecker", 16, 8), ("monarch", 2, 16), ("householder", 2, 33)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_that_do_not_fit_into_shared_memory(
    room: Room, shape: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = made(*shape, dtype=dtype, steps=9)
    for adjoint, chunk in ((False, 9), (True, 4)):
        near = ours(room, p, adjoint, chunk)
        with monkeypatch.context() as patch:
            patch.setattr(_device, "shared_limit", lambda: 0)
            far = ours(room, p, adjoint, chunk)
        same(far._replace(value=far.value.astype(float)), near._replace(value=near.value.astype(float)), 2e-5)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("shape", [("kronecker", 3, 5), ("monarch", 4, 3), ("dplr", 2, 6)], ids=str)
def test_few_steps_and_no_sequences(room: Room, shape: Any, steps: int) -> None:
    for batch in (0, 2):
        p = made(*shape, batch=batch, steps=steps)
        for adjoint in (False, True):
            same(ours(room, p, adjoint, 4, rtol=1e-10), theirs(p, adjoint, 4, rtol=1e-10), 1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_few_iterations_are_the_reference_s(room: Room, shape: Any) -> None:
    p = made(*shape)
    cases = [
        (max_iter, adjoint, chunk) for max_iter in (1, 2) for adjoint in (False, True) for chunk in (1, 4, 7)
    ]
    for max_iter, adjoint, chunk in cases:
        if chunk in (*lengths(p), 4, 7):
            solved = ours(room, p, adjoint, chunk, max_iter=max_iter)
            options: dict[str, Any] = {"method": "chunked", "chunk": chunk, "max_iter": max_iter}
            if adjoint:
                want = reference.solve_adjoint(*p.system, p.hbar, None, **options)
            else:
                want = reference.solve(*p.system, p.x, p.initial, None, **options)
            assert_allclose(solved.value, want.value, rtol=1e-12, atol=1e-12)
            assert_array_equal(solved.status, want.status)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_warm_start_and_damping(room: Room, shape: Any) -> None:
    p = made(*shape)
    for adjoint in (False, True):
        for damping in (1.0, 0.6):
            cold = ours(room, p, adjoint, 3, rtol=1e-10, damping=damping)
            guess = p.h if damping == 1 else None
            if damping != 1 or p.kind not in strategies.LOW_RANK:
                same(cold, theirs(p, adjoint, 3, rtol=1e-10, damping=damping), 1e-12)
            warm = ours(room, p, adjoint, 3, guess, rtol=1e-10, damping=damping)
            if guess is not None:
                same(warm, theirs(p, adjoint, 3, guess, rtol=1e-10, damping=damping), 1e-12)
            again = ours(room, p, adjoint, 3, cold.value, damping=damping)
            assert (again.iterations == 1).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zero_in_zero_out(room: Room, shape: Any) -> None:
    p = made(*shape)
    still = replace(p, x=np.zeros_like(p.x), initial=None, hbar=np.zeros_like(p.hbar))
    for adjoint in (False, True):
        for guess in (None, p.h):
            for chunk in lengths(p):
                solved = ours(room, still, adjoint, chunk, guess)
                assert not solved.value.any()
                assert (solved.iterations == 1).all()
                assert (solved.status == cpu.CONVERGED).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_nan_stays_in_its_sequence(room: Room, shape: Any, dtype: str) -> None:
    clean = made(*shape, batch=3, dtype=dtype)
    p = made(*shape, batch=3, dtype=dtype)
    p.x[1, 4, -1] = np.nan
    p.hbar[1, 3, 0] = np.inf
    for adjoint in (False, True):
        for chunk in lengths(p):
            before, solved = ours(room, clean, adjoint, chunk), ours(room, p, adjoint, chunk)
            assert solved.status.tolist() == [cpu.CONVERGED, cpu.NONFINITE_INPUT, cpu.CONVERGED]
            assert_array_equal(solved.value[[0, 2]], before.value[[0, 2]])
            assert_array_equal(solved.residual[[0, 2]], before.residual[[0, 2]])
            assert not np.isfinite(solved.residual[1])
            counts = theirs(p, adjoint, chunk).chunk_iterations[1]
            assert abs(solved.chunk_iterations[1] - counts).max() <= (4 if dtype == "float32" else 0)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] > 0], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_nan_in_the_mixer(room: Room, shape: Any, dtype: str) -> None:
    for which in (0, 1):
        p = made(*shape, batch=2, dtype=dtype)
        p.params[which][1, 2].reshape(-1)[-1] = np.nan
        for adjoint in (False, True):
            for chunk in lengths(p):
                assert ours(room, p, adjoint, chunk).status.tolist() == [cpu.CONVERGED, cpu.NONFINITE_INPUT]


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] > 0], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_divergence_is_said(room: Room, shape: Any, dtype: str) -> None:
    p = made(*shape, dtype=dtype, bound=0.8)
    wild = replace(p, params=(p.params[0], p.params[1] * 100), lam=np.full_like(p.lam, 0.1))
    for adjoint in (False, True):
        for chunk in lengths(p):
            assert (ours(room, wild, adjoint, chunk, max_iter=100_000).status == cpu.DIVERGED).all()
            assert (ours(room, wild, adjoint, chunk, max_iter=2).status == cpu.MAX_ITER).all()


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [(("kronecker", 16, 8), 4), (("kronecker", 5, 7), 3), (("monarch", 20, 16), 1), (("monarch", 4, 3), 3)],
    ids=str,
)
def test_the_order_of_threads_is_of_no_consequence(simt_device: Any, shape: Any, chunk: int) -> None:
    """Neither does a sequence depend on how many multiprocessors it is spread over."""
    room = Room("simt", lambda a: a, lambda a: a)
    p = made(*shape, batch=3, dtype="float32", gated=True)
    for adjoint in (False, True):
        first, *others = [
            _with(simt_device, lambda: ours(room, p, adjoint, chunk), seed, resident, multiprocessors)  # noqa: B023
            for seed, resident, multiprocessors in ((0, 1, 2), (1, 2, 2), (2, 3, 1000))
        ]
        for other in others:
            for a, b in zip(first, other, strict=True):
                assert_array_equal(a, b)


@pytest.mark.parametrize("slowest", [0.9999, 0.3])
def test_segments_of_time(simt_device: Any, slowest: float) -> None:
    """A slow decay, so that corrections reach far, and a quick one, so that they stop."""
    room = Room("simt", lambda a: a, lambda a: a)
    p = made("kronecker", 3, 5, batch=2, steps=83, dtype="float32")
    p = replace(p, lam=np.full_like(p.lam, slowest))
    exact = p.astype("float64")
    for adjoint, chunk in ((False, 4), (True, 3)):
        first, *others = [
            _with(simt_device, lambda: ours(room, p, adjoint, chunk, rtol=1e-7), seed, resident, 8)  # noqa: B023
            for seed, resident in ((0, 1), (1, 2), (2, 8))
        ]
        assert simt_device.launches[-2].blocks > 2
        want = theirs(exact, adjoint, chunk, rtol=1e-10)
        assert_allclose(first.value, want.value, rtol=1e-4, atol=1e-4 * abs(want.value).max())
        assert (first.status == cpu.CONVERGED).all()
        for other in others:
            for a, b in zip(first, other, strict=True):
                assert_array_equal(a, b)
    p.x[1, 40, 3] = np.nan
    _with(simt_device, lambda: None, 1, 1, 8)
    assert ours(room, p, False, 4).status.tolist() == [cpu.CONVERGED, cpu.NONFINITE_INPUT]


def _with(machine: Any, run: Callable[[], Any], seed: int, resident: int, multiprocessors: int) -> Any:
    machine.seed, machine.resident, machine.multiprocessors = seed, resident, multiprocessors
    return run()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_iteration_and_cotangents(room: Room, shape: Any, dtype: str) -> None:
    small = {"float64": 1e-12, "float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}[dtype]
    for gated, initial in ((False, True), (True, False)):
        p = made(*shape, steps=4, gated=gated, initial=initial, dtype=dtype)
        exact = p.astype("float64")
        one = _relax.iterate(
            *system(room, p), room.give(p.x), room.give(p.initial), room.give(p.h), adjoint=False
        )
        back = _relax.iterate(*system(room, p), room.give(p.hbar), None, room.give(p.h), adjoint=True)
        for got, want in (
            (one, reference.iterate(*exact.system, exact.x, exact.initial, exact.h)),
            (back, reference.iterate_adjoint(*exact.system, exact.hbar, exact.h)),
        ):
            assert_allclose(room.get(got).astype(float), want, rtol=small, atol=small)
        arrays = (room.give(a) for a in (p.x, p.initial, p.h, p.hbar))
        bars = _relax.pull(*system(room, p), *arrays)
        expected = reference.rnn_cotangents(*exact.system, exact.x, exact.initial, exact.h, exact.hbar)
        for got, want in zip((*bars[:4], *bars[4]), (*expected[:4], *expected[4]), strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                assert got.dtype == p.x.dtype
                assert_allclose(room.get(got).astype(float), want, rtol=small, atol=4 * small)


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_one_iteration_and_cotangents_of_large_steps(room: Room, shape: Any, dtype: str) -> None:
    p = made(*shape, batch=1, steps=2, dtype=dtype)
    exact, small = p.astype("float64"), 1e-11 if dtype == "float64" else 1e-4
    one = _relax.iterate(
        *system(room, p), room.give(p.x), room.give(p.initial), room.give(p.h), adjoint=False
    )
    want = reference.iterate(*exact.system, exact.x, exact.initial, exact.h)
    assert_allclose(room.get(one), want, rtol=small, atol=small)
    bars = _relax.pull(*system(room, p), *(room.give(a) for a in (p.x, p.initial, p.h, p.hbar)))
    expected = reference.rnn_cotangents(*exact.system, exact.x, exact.initial, exact.h, exact.hbar)
    for got, want in zip(
        (bars[0], *bars[2:4], *bars[4]), (expected[0], *expected[2:4], *expected[4]), strict=True
    ):
        assert_allclose(room.get(got), want, rtol=small, atol=small)


def test_nothing_to_pull(room: Room) -> None:
    for batch, steps in ((0, 3), (2, 0)):
        p = made("kronecker", 3, 5, batch=batch, steps=steps)
        bars = _relax.pull(*system(room, p), *(room.give(a) for a in (p.x, p.initial, p.h, p.hbar)))
        assert [room.get(bars[n]).shape for n in (0, 2, 3)] == [p.x.shape, p.x.shape, (batch, 15)]
        assert not room.get(bars[3]).any()
        assert _relax.iterate(*system(room, p), room.give(p.x), None, room.give(p.h), adjoint=False).size == 0


def test_default_chunk_fits(room: Room) -> None:
    for kind, d1, d2 in (*SHAPES, *LARGE):
        p = made(kind, d1, d2, batch=1, steps=1)
        for dtype in ("float64", "float32", "float16"):
            chunk = _relax.default_chunk(kind, p.params, p.x.shape[2], np.dtype(dtype))
            assert 1 <= chunk <= _relax.LONGEST_CHUNK


def test_unknown_kind(room: Room) -> None:
    p = made("kronecker", 1, 1)
    with pytest.raises(ValueError, match="kind: 'sideways'"):
        ours(room, replace(p, kind="sideways"), False, 2)


@pytest.mark.parametrize(
    ("kind", "d1", "d2"), [("kronecker", 4, 8), ("kronecker", 40, 36), ("monarch", 2, 16)]
)
def test_arrays_that_begin_anywhere(room: Room, kind: str, d1: int, d2: int) -> None:
    p = made(kind, d1, d2, dtype="float32", gated=True, steps=3)

    def shifted(a: Any) -> Any:
        whole = room.give(np.zeros(a.size + 1, a.dtype))
        whole[1:] = room.give(a).reshape(-1)
        assert _device.address(whole[1:]) % 16
        return whole[1:].reshape(a.shape)

    results = []
    for put in (room.give, shifted):
        params, (lam, gate, x, initial, hbar) = (
            tuple(put(a) for a in arrays) for arrays in (p.params, (p.lam, p.gate, p.x, p.initial, p.hbar))
        )
        options: dict[str, Any] = {"chunk": 2, "rtol": 1e-5, "atol": 0.0, "max_iter": 50, "damping": 1.0}
        h = _relax.solve(kind, params, lam, gate, x, initial, None, adjoint=False, **options).value
        s = _relax.solve(kind, params, lam, gate, hbar, None, None, adjoint=True, **options).value
        again = _relax.iterate(kind, params, lam, gate, x, initial, put(room.get(h)), adjoint=False)
        bars = _relax.pull(kind, params, lam, gate, x, initial, put(room.get(h)), put(room.get(s)))
        results.append([room.get(a) for a in (h, s, again, *bars[:4], *bars[4])])
    for one, other in zip(*results, strict=True):
        assert_array_equal(one, other)
