"""The cases of `fpnumba.validate` for the fixed point with a matrix state: what its doors give, value and gradient."""

from collections.abc import Iterator, Sequence

import numpy as np

from fpnumba.arrays import Room
from fpnumba.mixers import CustomKind
from fpnumba.reference.mamba import Norm, System
from fpnumba.validate import Args, Array, Case, Shape

# Those with a way of their own through a step: on as many numbers as the rank, on matrices per step, on one for all.
KINDS = ("householder r=1", "householder r=3", "kronecker", "fixed")
STATE = 3
# The reference solves dense systems at every step: beyond these it would take minutes.
MOST_STEPS, MOST_CHANNELS = 70, 32


def mamba_cases(
    rng: np.random.Generator, shape: Shape, name: str, kind: str | CustomKind, params: tuple[Array, ...]
) -> Iterator[Case]:
    """Solve and pullback of (M), well within where its steps contract: with a LayerNorm and a gate, with an RMSNorm."""
    batch, steps, dim = shape
    if name not in KINDS or steps > MOST_STEPS or dim > MOST_CHANNELS:
        return
    args = {
        "params": params,
        "x": 4 * rng.standard_normal(shape),
        "delta": rng.uniform(0.1, 0.6, shape),
        "A": -rng.uniform(0.3, 1.5, (dim, STATE)),
        "B": 0.5 * rng.standard_normal((batch, steps, STATE)),
        "C": 0.5 * rng.standard_normal((batch, steps, STATE)),
        "D": rng.uniform(0.3, 0.8, dim),
        "gate": rng.uniform(0.4, 0.9, shape),
        "weight": rng.uniform(0.5, 1.0, dim),
        "bias": rng.standard_normal(dim),
        "initial": rng.standard_normal((batch, dim, STATE)),
        "y_bar": rng.standard_normal(shape),
        "last_bar": rng.standard_normal((batch, dim, STATE)),
    }

    def system(a: Args, gated: bool) -> System:
        norm = Norm(a["weight"], a["bias"] if gated else None, 1e-5, gated)
        gate = a["gate"] if gated else None
        parts = {name: a[name] for name in ("x", "delta", "A", "B", "C")}
        return System(kind, a["params"], skip=a["D"], gate=gate, norm=norm, **parts)

    def value(room: Room, a: Args, rtol: float) -> Sequence[Array]:
        out: list[Array] = []
        for gated in (True, False):
            solved = room.mamba.solve(system(a, gated), a["initial"], rtol=rtol)
            if (solved.status != 0).any():
                raise RuntimeError(f"status {sorted(set(solved.status.tolist()))}, expected all converged")
            out += [solved.value, solved.last_state]
        return out

    def gradient(room: Room, a: Args, rtol: float) -> Sequence[Array | None]:
        out: list[Array | None] = []
        for gated in (True, False):
            y = a["with gate" if gated else "without"]
            arguments = (a["initial"], y, a["y_bar"], a["last_bar"])
            bars, status = room.mamba.pullback(system(a, gated), *arguments, rtol=rtol)
            if (status != 0).any():
                raise RuntimeError(f"status {sorted(set(status.tolist()))}, expected all converged")
            out += [*bars.params, *bars[1:]]
        return out

    yield Case(f"{name}: matrix state", args, value, tolerance=True)
    # Everyone differentiates at the same point, so that errors of the value do not count twice.
    first, _, second, _ = value(Room("reference"), args, 1e-11)
    yield Case(
        f"{name}: matrix state, gradient",
        args | {"with gate": first, "without": second},
        gradient,
        tolerance=True,
    )
