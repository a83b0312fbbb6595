"""The selective scan of the GPU room against the reference: on the CPU through the stand-in, and on a device."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hall import error
from strategies import Selective, selective

from fpnumba.gpu import _device, scan, use_engine
from fpnumba.gpu import selective as layouts
from fpnumba.reference import scan as true

DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# One rounding to the storage type.
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def draw(dtype: str, seed: int = 0, **shape: Any) -> Selective:
    """A problem in its storage dtype."""
    return _in(selective(seed, **shape), DTYPES[dtype])


def _in(p: Selective, dtype: Any) -> Selective:
    return Selective(*(None if a is None else np.asarray(a).astype(dtype) for a in p))


def carried(room: Any, p: Selective) -> Selective:
    """The same where the room takes it."""
    return Selective(*(room.give(a) for a in p))


def both(door: Any, p: Selective) -> list[Any]:
    """Value and cotangents."""
    return [*door.selective_scan(*p.primals), *door.selective_scan_vjp(*p)]


def remembered(p: Selective) -> float:
    """Steps that the slowest state remembers; exp(0) = 1 is exact."""
    rate = float(np.abs(p.A.astype(np.float64)).min(initial=np.inf)) * float(p.delta.astype(np.float64).sum())
    return min(p.x.shape[1], p.delta.size / rate) if rate else 0.0


def held_to_a_plain_evaluation(room: Any, p: Selective, dtype: str) -> None:
    """No result errs by more than twice what the equations err by, taken step by step in the same dtypes.

    Where that is nothing to speak of, because only a few numbers were rounded, by a few roundings: of the arithmetic,
    and one of the storage. A device's own exponentials of float32 are good to two units and need not err evenly, so
    that a state gathers these over the steps that it remembers.
    """
    compute = np.float64 if dtype == "float64" else np.float32
    exact = both(true, _in(p, np.longdouble if dtype == "float64" else np.float64))
    plain = both(true, _in(p, compute))
    floor = 4 * UNIT["float64" if dtype == "float64" else "float32"] + UNIT[dtype]
    if room.name != "simt" and dtype != "float64":
        floor += 2 * UNIT["float32"] * remembered(p)
    found = both(scan, carried(room, p))
    for mine, theirs, right in zip(found, plain, exact, strict=True):
        assert (mine is None) == (right is None)
        if mine is not None:
            assert mine.dtype == DTYPES[dtype]
            stored = theirs.astype(DTYPES[dtype])
            assert error(room.get(mine), right) <= 2 * max(error(stored, right), floor)


SHAPES: list[dict[str, Any]] = [
    {"batch": 2, "steps": 37, "dim": 33, "size": 16},
    {"batch": 3, "steps": 7, "dim": 6, "size": 4, "skip": False},
    {"batch": 2, "steps": 5, "dim": 131, "size": 16, "initial": False},
    {"batch": 1, "steps": 200, "dim": 5, "size": 9},  # split in time
    {"batch": 1, "steps": 9, "dim": 3, "size": 100},
    {"batch": 2, "steps": 21, "dim": 12, "heads": 3, "size": 20},
    {"batch": 1, "steps": 260, "dim": 10, "heads": 2, "size": 5},  # split in time
    {"batch": 2, "steps": 6, "dim": 9, "heads": 9, "size": 1},
    {"batch": 2, "steps": 1, "dim": 1, "size": 1},
    {"batch": 2, "steps": 0, "dim": 6, "size": 4},
    {"batch": 2, "steps": 0, "dim": 6, "heads": 2, "size": 4, "skip": False},
    {"batch": 0, "steps": 3, "dim": 6, "size": 4},
    {"batch": 0, "steps": 3, "dim": 6, "heads": 3, "size": 4},
]


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(gpu_room: Any, shape: dict[str, Any], dtype: str) -> None:
    held_to_a_plain_evaluation(gpu_room, draw(dtype, **shape), dtype)


@pytest.mark.parametrize("size", [16, 64, 256, 300])
@pytest.mark.parametrize("heads", [None, 4])
def test_any_number_of_states(gpu_room: Any, heads: int | None, size: int) -> None:
    held_to_a_plain_evaluation(
        gpu_room, draw("float32", batch=1, steps=9, dim=68, heads=heads, size=size), "float32"
    )


@pytest.mark.parametrize("rate", [2.0, 0.01, 0.0])
@pytest.mark.parametrize("heads", [None, 2])
def test_segments_of_time_however_slowly_the_state_decays(
    gpu_room: Any, heads: int | None, rate: float
) -> None:
    steps = 520 if gpu_room.name == "simt" else 6000
    for dtype in ("float64", "float32"):
        p = draw(dtype, batch=1, steps=steps, dim=6, heads=heads, size=4)
        p = p._replace(A=(p.A * rate).astype(p.A.dtype))
        given = carried(gpu_room, p)
        for gradient in (False, True):
            assert layouts._call(given.x, given.A, given.B, gradient=gradient).segments > 2
        held_to_a_plain_evaluation(gpu_room, p, dtype)


def test_goes_on_from_its_last_state(gpu_room: Any) -> None:
    p = draw("float64", batch=2, steps=30, dim=20, size=16)
    y, last = (gpu_room.get(a) for a in scan.selective_scan(*carried(gpu_room, p).primals))
    state, parts = p.initial, []
    for piece in (slice(0, 11), slice(11, 12), slice(12, 30)):
        x, delta, B, C = (np.ascontiguousarray(a[:, piece]) for a in (p.x, p.delta, p.B, p.C))
        q = p._replace(x=x, delta=delta, B=B, C=C, initial=state)
        part, state = (gpu_room.get(a) for a in scan.selective_scan(*carried(gpu_room, q).primals))
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), y, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(state, last, rtol=1e-13, atol=1e-13)


def test_without_a_last_cotangent(gpu_room: Any) -> None:
    p = draw("float32", batch=1, steps=200, dim=6, size=4)
    none = scan.selective_scan_vjp(*carried(gpu_room, p)[:8], None)
    zero = scan.selective_scan_vjp(*carried(gpu_room, p._replace(last_bar=0 * p.last_bar)))
    for a, b in zip(none, zero, strict=True):
        np.testing.assert_array_equal(gpu_room.get(a), gpu_room.get(b))


def test_a_sequence_does_not_depend_on_those_around_it(gpu_room: Any) -> None:
    p = draw("float32", batch=4, steps=40, dim=24, size=16)
    broken = p._replace(x=p.x.copy())
    broken.x[1, 7, 3] = np.nan
    turned = Selective(
        *(a if a.ndim < 3 else np.ascontiguousarray(a[::-1]) for a in p)  # A and D belong to all
    )
    one, two, three = (
        [gpu_room.get(a) for a in both(scan, carried(gpu_room, q))] for q in (p, turned, broken)
    )
    for a, b, c in zip(one, two, three, strict=True):
        if a.ndim == 3:
            np.testing.assert_array_equal(a, b[::-1])
            np.testing.assert_array_equal(a[[0, 2, 3]], c[[0, 2, 3]])
    y, last, x_bar = three[:3]
    assert np.isnan(y[1, 7:, 3]).all()
    assert np.isnan(last[1, 3]).all()
    assert np.isfinite(np.delete(y[1], 3, axis=1)).all()
    assert np.isfinite(y[1, :7]).all()
    assert np.isfinite(x_bar).all()  # linear in x


def test_sequences_that_go_through_the_gradient_in_groups(
    gpu_room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = carried(gpu_room, draw("float32", batch=19, steps=20, dim=7, size=4))
    whole = scan.selective_scan_vjp(*p)
    monkeypatch.setattr(layouts, "KEPT_BYTES", 0)
    monkeypatch.setattr(_device, "multiprocessors", lambda: 2)
    call = layouts._call(p.x, p.A, p.B, gradient=True)
    assert layouts._together(call, 2) == 8
    for a, b in zip(whole, scan.selective_scan_vjp(*p), strict=True):
        np.testing.assert_array_equal(gpu_room.get(a), gpu_room.get(b))


def test_arrays_that_begin_anywhere(gpu_room: Any) -> None:
    p = draw("float32", batch=2, steps=9, dim=12, size=16)

    def shifted(a: Any) -> Any:
        whole = gpu_room.give(np.zeros(a.size + 1, a.dtype))
        whole[1:] = gpu_room.give(a).reshape(-1)
        return whole[1:].reshape(a.shape)

    q = Selective(*(shifted(a) for a in p))
    assert _device.address(q.initial) % 16
    for a, b in zip(both(scan, q), both(scan, carried(gpu_room, p)), strict=True):
        np.testing.assert_array_equal(gpu_room.get(a), gpu_room.get(b))


def test_what_there_are_no_kernels_for(gpu_room: Any) -> None:
    p = carried(gpu_room, draw("float32", batch=1, steps=1, dim=1, size=513))
    with pytest.raises(ValueError, match=r"`B`: got N = 513; the GPU room has kernels up to N = 512"):
        scan.selective_scan(*p.primals)
    p = carried(gpu_room, draw("float32"))
    with use_engine("numba"):
        with pytest.raises(ValueError, match=r"engine: 'numba' has no kernels for selective_scan"):
            scan.selective_scan(*p.primals)
        with pytest.raises(ValueError, match=r"engine: 'numba' has no kernels for selective_scan"):
            scan.selective_scan_vjp(*p)


@pytest.mark.parametrize("heads", [None, 3])
def test_orders_of_threads_do_not_matter(simt_device: Any, heads: int | None) -> None:
    seen = []
    for shape in ({"steps": 200, "dim": 9, "size": 5}, {"steps": 19, "dim": 141, "size": 20}):
        p = draw("float32", batch=1, heads=heads, **shape)
        for seed, resident in ((0, 1), (1, 2), (2, 4)):
            simt_device.seed, simt_device.resident = seed, resident
            seen.append(both(scan, p))
        for other in seen[1:]:
            for a, b in zip(other, seen[0], strict=True):
                np.testing.assert_array_equal(a, b)
        seen.clear()


@pytest.mark.parametrize("heads", [None, 3])
def test_no_thread_reads_what_another_is_writing(simt_device: Any, heads: int | None) -> None:
    simt_device.races = True
    both(scan, draw("float32", batch=1, steps=70, dim=141, heads=heads, size=20))
    both(scan, draw("bfloat16", batch=1, steps=200, dim=9, heads=heads, size=5))


@pytest.mark.sanitize
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_no_access_is_out_of_bounds(simt_device: Any, dtype: str, heads: int | None) -> None:
    both(scan, draw(dtype, batch=2, steps=7, dim=69, heads=heads, size=13))
    both(scan, draw(dtype, batch=1, steps=200, dim=9, heads=heads, size=16))
