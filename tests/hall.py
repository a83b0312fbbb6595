"""The hall over any room: the canonical problems of `strategies` as arguments of the public functions.

A test takes its rooms from `ROOMS` and runs inside `in_room`: NumPy arrays go in and NumPy arrays come out, whatever
the room. For the GPU room they are carried to the device and back at the one place where the hall looks at what it was
given, so that everything behind that place is as it is for CuPy arrays.

Without a device the cases of the GPU room are skipped, unless FPNUMBA_PRETEND_GPU is set: then `pretend` stands in for
the device. With "1" the doors are the reference's, and what is tested is the hall alone; with "simt" they are the real
ones, whose kernels run on the CPU, slowly.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pretend
import pytest
from strategies import RING, RING_WITHOUT_TRANSPOSE, OwnMixer, Problem

import fpnumba as fp
from fpnumba.gpu import absent
from fpnumba.interop import numpy as at_home

# Why there is no device here, or None
ABSENT = absent()
PRETEND = None if ABSENT is None else os.environ.get("FPNUMBA_PRETEND_GPU")
# Left out, and counted, where there is no device: see conftest
ROOMS = ("reference", "cpu", pytest.param("gpu", marks=[] if PRETEND else pytest.mark.gpu))


def to_room(array: Any) -> Any:
    """Carry an array of NumPy to the GPU room."""
    xp, native = fp.arrays._gpu().xp(), array.dtype.newbyteorder("=")
    if xp is np:  # the device is pretended
        return np.require(array, native, ["ALIGNED"])
    return xp.asarray(np.ascontiguousarray(array, native))


def to_numpy(array: Any) -> Any:
    """Carry an array back."""
    return array if isinstance(array, np.ndarray) else array.get()


class _Carrier:
    """Exchanges NumPy arrays with the GPU room where `use_room` asks for it; nothing is exchanged elsewhere."""

    dtype_name = staticmethod(at_home.dtype_name)

    @staticmethod
    def take(array: Any) -> Any:
        return to_room(array) if fp.arrays._room.get() == "gpu" else at_home.take(array)

    @staticmethod
    def give(result: Any, like: Any) -> Any:
        return at_home.give(to_numpy(result), like)


_look, _neighbour = fp.arrays._look, fp.arrays.neighbour


def _look_and_carry(argument: str, array: Any) -> tuple[str, int | None]:
    kind, device = _look(argument, array)
    return kind, 0 if kind == "numpy" and fp.arrays._room.get() == "gpu" else device


@contextmanager
def in_room(room: str) -> Iterator[None]:
    """Let that room serve the calls of a block, on NumPy arrays."""
    with ExitStack() as stack:
        if room == "gpu":
            if PRETEND:
                stack.enter_context(pretend.device(kernels=PRETEND == "simt"))
            stack.enter_context(carried())
        stack.enter_context(fp.arrays.use_room(room))
        yield


@contextmanager
def carried() -> Iterator[None]:
    """Carry NumPy arrays to the GPU room and back, inside `use_room`."""
    neighbour = {"numpy": _Carrier}
    carry = {"_look": _look_and_carry, "neighbour": lambda kind: neighbour.get(kind) or _neighbour(kind)}
    with patch.multiple(fp.arrays, **carry):
        yield


_CLASSES: dict[Any, type[fp.mixers.Mixer]] = {
    "dplr": fp.mixers.DPLR,
    "householder": fp.mixers.Householder,
    "kronecker": fp.mixers.Kronecker,
    "monarch": fp.mixers.Monarch,
    "dense": fp.mixers.Dense,
    "fixed": fp.mixers.Fixed,
}

# Everything to the last digits, both ways.
TIGHT: dict[str, Any] = {
    "solver": fp.Solver(rtol=5e-14, max_iter=5000),
    "adjoint": fp.Adjoint(rtol=5e-14, max_iter=5000),
}


def _own(kind: OwnMixer) -> type[fp.mixers.Mixer]:
    return fp.mixers.define(
        "Ring", kind.apply, kind.cotangent, kind.apply_transpose, params={"weight": "D", "scale": "one"}
    )


# One class for each, so that a room compiles it once.
Ring, RingWithoutTranspose = _own(RING), _own(RING_WITHOUT_TRANSPOSE)
_OWN = {RING: Ring, RING_WITHOUT_TRANSPOSE: RingWithoutTranspose}


def mixer_of(p: Problem) -> fp.mixers.Mixer:
    """The public mixer of a canonical problem."""
    cls: Any = _CLASSES[p.kind] if isinstance(p.kind, str) else _OWN[p.kind]
    return cls(*p.params)  # type: ignore[no-any-return]


def inputs(p: Problem) -> tuple[Any, ...]:
    """The positional arguments of `fp.fixed_point_rnn`."""
    return p.lam, mixer_of(p), p.x


def extras(p: Problem) -> dict[str, Any]:
    """Its array options."""
    return {"gate": p.gate, "initial": p.initial}


def ways(p: Problem, room: str) -> list[fp.Solver]:
    """Every way in which this room solves this problem, tightly."""
    found = [
        fp.Solver("parallel", rtol=5e-14, max_iter=5000),
        fp.Solver("sequential", rtol=5e-14, max_iter=5000),
        *(fp.Solver("chunked", chunk=c, rtol=5e-14, max_iter=5000) for c in (2, 3, 5, 64)),
    ]
    if room == "reference" or p.kind in ("dplr", "householder"):
        found.append(fp.Solver("direct"))
    return found


def assert_same(actual: Any, desired: Any, room: str) -> None:
    """Equal to the last bit, or on a GPU, where sums go another way, to a few units in the last place."""
    if room != "gpu":
        np.testing.assert_array_equal(actual, desired)
        return
    eps = 2.0**-7 if actual.dtype.name == "bfloat16" else float(np.finfo(actual.dtype).eps)
    assert actual.dtype == desired.dtype
    assert_close(actual.astype(np.float64), desired.astype(np.float64), 4 * eps)


def assert_close(actual: Any, desired: Any, rtol: float) -> None:
    """Equal relative to the largest element: what a tolerance on the maximum can promise."""
    actual, desired = np.asarray(actual), np.asarray(desired)
    assert actual.shape == desired.shape
    scale = float(np.abs(desired).max(initial=0.0))
    np.testing.assert_allclose(actual, desired, rtol=0, atol=rtol * scale + 1e-300)


def error(found: Any, wanted: Any) -> float:
    """Largest error against the largest entry; infinite where something is not finite."""
    found, wanted = np.asarray(found).astype(np.longdouble), np.asarray(wanted).astype(np.longdouble)
    assert found.shape == wanted.shape
    if not np.isfinite(found).all():
        return np.inf
    return float(np.abs(found - wanted).max(initial=0) / max(np.abs(wanted).max(initial=0), 1e-300))


def dense_system(p: Problem) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(F) as one linear system ``M h = b`` for each sequence: ``M (B, TD, TD)``, ``b (B, TD)``."""
    batch, steps, dim = p.x.shape
    with fp.arrays.use_room("reference"):
        q = np.broadcast_to(mixer_of(p).to_dense(), (batch, steps, dim, dim))
    gate = p.gate_or_default
    matrix = np.zeros((batch, steps, dim, steps, dim))
    right = gate * np.einsum("btij,btj->bti", q, p.x)
    for t in range(steps):
        matrix[:, t, :, t, :] = np.eye(dim) - gate[:, t, :, None] * (np.eye(dim) - q[:, t])
        if t:
            matrix[:, t, :, t - 1, :] = -p.lam[:, t, :, None] * np.eye(dim)
        elif p.initial is not None:
            right[:, 0] += p.lam[:, 0] * p.initial
    return matrix.reshape(batch, steps * dim, steps * dim), right.reshape(batch, steps * dim)


def dense_solve(
    matrix: np.ndarray[Any, Any], right: np.ndarray[Any, Any], p: Problem
) -> np.ndarray[Any, Any]:
    """Solve such a system by LAPACK."""
    if right.size == 0:
        return np.zeros(p.x.shape)
    return np.linalg.solve(matrix, right[..., None])[..., 0].reshape(p.x.shape)
