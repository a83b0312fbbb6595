"""The hall over any room: the canonical problems of `strategies` as arguments of the public functions."""

from typing import Any

import numpy as np
from strategies import RING, RING_WITHOUT_TRANSPOSE, OwnMixer, Problem

import fpnumba as fp

ROOMS = ("reference", "cpu")

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


def assert_close(actual: Any, desired: Any, rtol: float) -> None:
    """Equal relative to the largest element: what a tolerance on the maximum can promise."""
    actual, desired = np.asarray(actual), np.asarray(desired)
    assert actual.shape == desired.shape
    scale = float(np.abs(desired).max(initial=0.0))
    np.testing.assert_allclose(actual, desired, rtol=0, atol=rtol * scale + 1e-300)


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
