"""Mixers of the GPU room against the reference: on the CPU through the stand-in, and on a device."""

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import strategies
from hall import error
from strategies import LOW_RANK, Problem

from fpnumba.gpu import _device, _mix, mixers
from fpnumba.reference import mixers as true

DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
# One rounding to the storage type.
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def real(dtype: str) -> Any:
    return np.float64 if dtype == "float64" else np.float32


def draw(kind: str, dim: int, rank: int, dtype: str, *, batch: int = 2, steps: int = 3) -> Problem:
    p = strategies.problem(dim + rank, kind, batch=batch, steps=steps, dim=dim, rank=rank, bound=1.5)
    return p.astype(DTYPES[dtype])


def given(room: Any, p: Problem) -> tuple[Any, Any, Any]:
    """Parameters, ``x`` and a cotangent, where the room has its arrays."""
    return tuple(room.give(a) for a in p.params), room.give(p.x), room.give(p.hbar)


def check(room: Any, p: Problem, dtype: str) -> None:
    """Nothing is further from the truth than two plain evaluations, which may be lucky, and a rounding."""
    unit = UNIT[np.dtype(real(dtype)).name]
    exact, plain = p.astype(np.longdouble), p.astype(real(dtype))
    params, x, ybar = given(room, p)
    pairs = []
    for door in ("apply", "apply_transpose"):
        values = [getattr(true, door)(of.kind, of.params, of.x) for of in (exact, plain)]
        pairs.append((door, getattr(mixers, door)(p.kind, params, x), *values))
    found = mixers.cotangent(p.kind, params, x, ybar)
    assert len(found) == len(params)
    rights, plains = (true.cotangent(of.kind, of.params, of.x, of.hbar) for of in (exact, plain))
    for n, (bar, right, near) in enumerate(zip(found, rights, plains, strict=True)):
        pairs.append((f"cotangent {n}", bar, right, near))
    for what, mine, right, near in pairs:
        mine = room.get(mine)
        assert mine.dtype == DTYPES[dtype]
        assert error(mine, right) <= 2 * max(error(near, right), 4 * unit) + UNIT[dtype], (what, p)


@pytest.mark.parametrize("kind", LOW_RANK)
@pytest.mark.parametrize(
    ("rank", "dim", "dtype"),
    [
        (0, 6, "float32"),
        (1, 40, "float32"),
        (2, 33, "float64"),
        (3, 24, "bfloat16"),
        (4, 1, "float64"),
        (5, 7, "float16"),
        (6, 130, "float64"),
        (7, 12, "float32"),
        (8, 36, "float64"),
        (11, 20, "float32"),
    ],
)
def test_low_rank(gpu_room: Any, kind: str, rank: int, dim: int, dtype: str) -> None:
    check(gpu_room, draw(kind, dim, rank, dtype), dtype)


def scarce(monkeypatch: pytest.MonkeyPatch, registers: int) -> None:
    """As if a step took more registers than it does: wide ones do."""
    monkeypatch.setattr(_mix, "REGISTERS", tuple((group, registers) for group, _ in _mix.REGISTERS))
    monkeypatch.setattr(_mix, "AT_MOST", ())


@pytest.mark.parametrize("kind", LOW_RANK)
@pytest.mark.parametrize(
    ("rank", "dim", "dtype", "registers"),
    [(5, 65, "float32", 41), (5, 71, "float64", 50), (4, 99, "float16", 40), (2, 33, "float32", 36)],
)
def test_steps_over_a_whole_block_and_rows_in_tiles(
    gpu_room: Any,
    kind: str,
    rank: int,
    dim: int,
    dtype: str,
    registers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scarce(monkeypatch, registers)
    for vectors in (1, 2):
        real = 8 if dtype == "float64" else 4
        rows, group, _ = _mix._rows(dim, rank, 1, real, vectors, kind == "householder")
        assert rows < rank
        assert group > 32
    check(gpu_room, draw(kind, dim, rank, dtype), dtype)


@pytest.mark.parametrize(
    ("kind", "dim", "dtype"),
    [
        ("kronecker", 15, "float64"),
        ("kronecker", 36, "float32"),
        ("kronecker", 48, "float64"),
        ("kronecker", 7, "float32"),
        ("kronecker", 64, "bfloat16"),
        ("kronecker", 42, "float16"),
        ("monarch", 15, "float64"),
        ("monarch", 36, "float32"),
        ("monarch", 7, "float32"),
        ("monarch", 64, "bfloat16"),
        ("monarch", 42, "float16"),
        ("dense", 7, "float64"),
        ("dense", 40, "float32"),
        ("dense", 264, "bfloat16"),
        ("dense", 33, "float16"),
        ("fixed", 7, "float64"),
        ("fixed", 40, "float32"),
        ("fixed", 16, "bfloat16"),
        ("fixed", 33, "float16"),
    ],
)
def test_blocks(gpu_room: Any, kind: str, dim: int, dtype: str) -> None:
    check(gpu_room, draw(kind, dim, 1, dtype), dtype)


@pytest.mark.parametrize(("size", "dtype"), [(270, "float64"), (132, "float32")])
def test_monarch_of_one_large_block(gpu_room: Any, size: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    p = draw("dplr", size, 1, dtype, steps=2)
    blocks = rng.standard_normal((2, 2, 1, size, size)) / size**0.5
    params = (blocks.astype(DTYPES[dtype]), rng.uniform(0.5, 1, (2, 2, 1)).astype(DTYPES[dtype]))
    check(gpu_room, replace(p, kind="monarch", params=params), dtype)


def test_kronecker_at_tall_tiles(gpu_room: Any) -> None:
    rng = np.random.default_rng(0)
    p = draw("dplr", 33 * 36, 1, "float32", batch=1, steps=2)
    params = tuple((rng.standard_normal((1, 2, d, d)) / d**0.5).astype(np.float32) for d in (33, 36))
    check(gpu_room, replace(p, kind="kronecker", params=params), "float32")


def test_kronecker_that_does_not_fit_into_shared_memory(
    gpu_room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_device, "shared_limit", lambda: 0)
    for dtype in ("float64", "bfloat16"):
        check(gpu_room, draw("kronecker", 15, 1, dtype), dtype)


@pytest.mark.parametrize("kind", strategies.KINDS)
@pytest.mark.parametrize(("batch", "steps"), [(2, 0), (0, 3), (1, 1)])
def test_empty_and_single(gpu_room: Any, kind: str, batch: int, steps: int) -> None:
    p = draw(kind, 6, 2, "float64", batch=batch, steps=steps)
    check(gpu_room, p, "float64")
    params, _, _ = given(gpu_room, p)
    shape = (6, 6) if kind == "fixed" else (batch, steps, 6, 6)
    assert mixers.to_dense(kind, params, 6).shape == shape
    assert mixers.contraction_bound(kind, params).shape == shape[:-2]


@pytest.mark.parametrize("kind", strategies.KINDS)
def test_transposes_and_zeros(gpu_room: Any, kind: str) -> None:
    p = draw(kind, 12, 3, "float64")
    params, x, ybar = given(gpu_room, p)
    left = float(gpu_room.get((ybar * mixers.apply(kind, params, x)).sum()))
    right = float(gpu_room.get((mixers.apply_transpose(kind, params, ybar) * x).sum()))
    assert left == pytest.approx(right, rel=1e-12)
    none = gpu_room.give(np.zeros_like(p.x))
    for bar in mixers.cotangent(kind, params, x, none):
        assert not np.asarray(gpu_room.get(bar)).any()
    for door in (mixers.apply, mixers.apply_transpose):
        assert not np.asarray(gpu_room.get(door(kind, params, none))).any()


@pytest.mark.parametrize("kind", strategies.KINDS)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_dense_forms_and_bounds(gpu_room: Any, kind: str, dtype: str) -> None:
    p = draw(kind, 12, 3, dtype)
    exact = p.astype(np.float64)
    params, _, _ = given(gpu_room, p)
    slack = 2 * UNIT[dtype] + 40 * UNIT[np.dtype(real(dtype)).name]
    dense = gpu_room.get(mixers.to_dense(kind, params, 12))
    bound = gpu_room.get(mixers.contraction_bound(kind, params))
    assert dense.dtype == bound.dtype == DTYPES[dtype]
    assert error(dense, true.to_dense(kind, exact.params, 12)) <= slack
    right = true.contraction_bound(kind, exact.params)
    # what is rounded is Q, of size one, where the bound is that of I - Q
    assert (
        np.abs(bound.astype(np.float64) - right).max() <= (2 if kind in ("dense", "fixed") else 1) * slack * 2
    )


def test_bound_of_nearly_parallel_rows(gpu_room: Any) -> None:
    rng = np.random.default_rng(0)
    row = rng.standard_normal(9)
    u = np.stack([row, row + 1e-9 * rng.standard_normal(9), 0 * row])[None, None]
    for kind in LOW_RANK:
        params = (u, np.array([[[1.0, -1.0, 0.5]]]))
        bound = gpu_room.get(mixers.contraction_bound(kind, tuple(gpu_room.give(a) for a in params)))
        right = true.contraction_bound(kind, params)
        assert np.abs(bound - right).max() <= 1e-13 * float(row @ row)
    p = draw("householder", 6, 2, "float64")
    p.params[0][1, 2, 0, 3] = np.nan
    for kind in LOW_RANK:
        bound = gpu_room.get(mixers.contraction_bound(kind, given(gpu_room, p)[0]))
        assert np.isnan(bound).sum() == 1
        assert np.isnan(bound[1, 2])


@pytest.mark.parametrize("kind", ["dplr", "householder", "kronecker", "monarch", "dense"])
def test_what_is_not_finite_stays_in_its_step(gpu_room: Any, kind: str) -> None:
    p = draw(kind, 12, 2, "float64")
    before = gpu_room.get(mixers.apply(kind, *given(gpu_room, p)[:2]))
    p.x[1, 1, 4] = np.nan
    after = gpu_room.get(mixers.apply(kind, *given(gpu_room, p)[:2]))
    assert np.isnan(after[1, 1]).any()
    after[1, 1] = before[1, 1]
    np.testing.assert_array_equal(after, before)


def test_arrays_that_begin_anywhere(gpu_room: Any) -> None:
    """A view that is not at a multiple of 16 bytes takes narrower accesses."""
    p = draw("householder", 8, 2, "float32")
    params, x, _ = given(gpu_room, p)
    spare = gpu_room.give(np.zeros(p.x.size + 1, np.float32))
    shifted = spare[1:].reshape(p.x.shape)
    shifted[...] = x
    np.testing.assert_allclose(
        gpu_room.get(mixers.apply("householder", params, shifted)),
        gpu_room.get(mixers.apply("householder", params, x)),
        rtol=1e-5,
    )


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("kind", "dim"), [("dplr", 70), ("householder", 33), ("kronecker", 15), ("monarch", 15), ("dense", 33)]
)
def test_no_access_is_out_of_bounds(simt_device: Any, kind: str, dim: int) -> None:
    p = draw(kind, dim, 3, "float32", batch=1, steps=2)
    mixers.apply(kind, p.params, p.x)
    mixers.apply_transpose(kind, p.params, p.x)
    mixers.cotangent(kind, p.params, p.x, p.hbar)


@pytest.mark.parametrize(
    ("kind", "dim"), [("dplr", 70), ("householder", 33), ("kronecker", 15), ("monarch", 15), ("dense", 264)]
)
def test_orders_of_threads_do_not_matter(
    simt_device: Any, kind: str, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scarce(monkeypatch, 38)
    p = draw(kind, dim, 3, "float32", batch=1, steps=2)
    seen = []
    for seed in (0, 1, 2):
        simt_device.seed = seed
        y = mixers.apply(kind, p.params, p.x)
        seen.append([y, mixers.apply_transpose(kind, p.params, y), *mixers.cotangent(kind, p.params, p.x, y)])
    for other in seen[1:]:
        for a, b in zip(other, seen[0], strict=True):
            np.testing.assert_array_equal(a, b)


def test_engines(simt_device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own mixer goes to the portable kernels, and everything else that asks for them by name."""
    asked = []

    class Portable(ModuleType):
        def __getattr__(self, name: str) -> Any:
            def door(kind: Any, params: Any, *rest: Any) -> Any:
                asked.append((name, kind))
                return np.eye(6) * 0.5 if name == "to_dense" else (name,)

            return door

    import fpnumba.gpu

    portable = Portable("fpnumba.gpu.portable")
    monkeypatch.setitem(sys.modules, "fpnumba.gpu.portable", portable)
    monkeypatch.setattr(fpnumba.gpu, "portable", portable, raising=False)
    p, own = draw("dplr", 6, 2, "float64"), strategies.RING
    mixers.apply("dplr", p.params, p.x, engine="numba")
    mixers.apply_transpose(own, p.params, p.x)
    mixers.cotangent(own, p.params, p.x, p.hbar)
    mixers.to_dense(own, p.params, 6)
    bound = mixers.contraction_bound(own, p.params, 6)
    assert bound == pytest.approx(0.5)
    assert asked == [
        ("apply", "dplr"),
        ("apply_transpose", own),
        ("cotangent", own),
        ("to_dense", own),
        ("to_dense", own),
    ]
    with pytest.raises(ValueError, match="'raw' has no kernels for a user's own mixer"):
        mixers.apply(own, p.params, p.x, engine="raw")
    with pytest.raises(ValueError, match="engine: got 'fortran'"):
        mixers.apply("dplr", p.params, p.x, engine="fortran")
    with pytest.raises(ValueError, match="dim: missing"):
        mixers.contraction_bound(own, p.params)
    with pytest.raises(ValueError, match="'circulant' is not a mixer"):
        mixers.apply("circulant", (), p.x)


@pytest.mark.parametrize(
    ("kind", "rank", "dim", "dtype"),
    [
        ("dplr", 1, 1024, "float32"),
        ("householder", 4, 1024, "float32"),
        ("householder", 8, 1024, "float64"),
        ("householder", 8, 1024, "bfloat16"),
        ("householder", 5, 4099, "float32"),
        ("dplr", 8, 8192, "float32"),
        ("householder", 8, 8192, "float64"),
        ("householder", 3, 8192, "float16"),
        ("kronecker", 1, 1024, "float32"),
        ("kronecker", 1, 8192, "float64"),
        ("monarch", 1, 4096, "bfloat16"),
        ("dense", 1, 1024, "float32"),
        ("fixed", 1, 1024, "float32"),
    ],
)
@pytest.mark.gpu
def test_wide_steps_on_a_device(kind: str, rank: int, dim: int, dtype: str) -> None:
    from gpu_machine import GpuRoom

    cupy = _device.xp()
    room = GpuRoom("cupy", cupy.asarray, cupy.asnumpy)
    check(room, draw(kind, dim, rank, dtype, batch=1, steps=3), dtype)
