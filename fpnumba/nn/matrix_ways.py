"""The sequential way to the fixed point of :class:`fpnumba.nn.matrix_state.MatrixCell`, and the exact gradient.

Once ``y_{t-1}`` is final, so are the parameters of step ``t``, and a room solves the step (section 5 of
docs/mathematics.md). The exact gradient goes backward in time: the adjoint of the step, then the dependence of its
parameters on ``y_{t-1}``. States are kept at the ends of spans of steps and made again within.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.nn import backend, matrix_device, ways
from fpnumba.nn.backend import contiguous, product
from fpnumba.nn.basic import rows
from fpnumba.nn.matrix_state import SPAN, MatrixBars, MatrixCell, MatrixMade, doors
from fpnumba.nn.recurrence import Solve
from fpnumba.nn.ways import Verdict
from fpnumba.solve import Adjoint, Solution, Solved, Solver

Array = NDArray[Any]


@dataclass
class Kept:
    """What the way back needs: the parameters of every step, and the state before every span."""

    made: list[MatrixMade]
    states: list[Array]


def tight(solver: Solver, share: float) -> dict[str, Any]:
    """Tolerances of a step.

    The published rule is about the iteration of a whole batch, whose threshold says nothing about one step.
    """
    told = solver if solver.criterion == "max" else Solver()
    return {
        "rtol": told.rtol * share,
        "atol": told.atol * share,
        "max_iter": told.max_iter,
        "damping": told.damping,
    }


def solve_sequential(cell: MatrixCell, solver: Solver, *, keep: bool) -> tuple[Solve, tuple[Array, Array]]:
    """Step after step; also what the steps after these start from."""
    batch, steps, _ = cell.v.shape
    options = tight(solver, cell.share())
    if matrix_device.serves(cell):
        return matrix_device.solve(cell, options, keep=keep)
    y, verdict, kept = np.empty_like(cell.v), Verdict(batch), Kept([], [])
    before, state = cell.initial
    for t in range(steps):
        if keep and t % SPAN == 0:
            kept.states.append(state)
        here = cell.part(slice(t, t + 1), (before, state))
        made = here.mix(here.v)
        solved = doors(made.mixer[0], y).solve(made.system, state, **options)
        y[:, t] = before = contiguous(solved.value[:, 0])
        state = solved.last_state
        verdict.add(
            Solved(solved.value, solved.iterations, solved.residual, solved.status, solved.iterations)
        )
        if keep:
            kept.made.append(made)
    found = Solve(y, verdict.solution(y, "sequential"), steps=[kept] if keep else [])
    return found, (before, state)


def pull_sequential(
    cell: MatrixCell, found: Solve, y_bar: Array, adjoint: Adjoint
) -> tuple[MatrixBars, Solution]:
    """The exact gradient, backward in time."""
    if matrix_device.serves(cell) and not found.steps and found.h.size:
        together = ways.pull_together(cell, found.h, y_bar, adjoint)
        if together is not None:
            return together
        found = replace(found, steps=[matrix_device.keep(cell, found.h)])
    if found.steps and isinstance(found.steps[0], matrix_device.Kept):
        return matrix_device.pull(cell, found, y_bar, adjoint)
    bars, y = MatrixBars.zeros(cell), found.h
    batch, steps, _ = y.shape
    options = {"rtol": adjoint.rtol * cell.share(), "atol": adjoint.atol, "max_iter": adjoint.max_iter}
    kept = found.steps[0] if found.steps else _keep(cell, y)
    fed = None if cell.stacked is None else backend.zeros((batch, steps, len(cell.stacked)), y)
    verdict, before, z = Verdict(batch), cell.before(y), np.empty_like(y)
    last, more = np.zeros_like(cell.initial[1]), np.zeros_like(cell.initial[0])
    for begin in range((steps - 1) // SPAN * SPAN, -1, -SPAN) if steps else ():
        span = range(begin, min(begin + SPAN, steps))
        states = [kept.states[begin // SPAN]]
        for t in span[:-1]:
            states.append(cell.states(kept.made[t], contiguous(y[:, t : t + 1]), states[-1]))
        for t in reversed(span):
            made = kept.made[t]
            y_t = contiguous(y[:, t : t + 1])
            pulled, status = doors(made.mixer[0], y).pullback(
                made.system, states[t - begin], y_t, (y_bar[:, t] + more)[:, None], last, **options
            )
            verdict.add_status(status)
            last, z[:, t] = pulled.initial, pulled.y[:, 0]
            fed_bar = bars.absorb(made, pulled, slice(t, t + 1))
            if fed_bar is not None and fed is not None and cell.stacked is not None:
                fed[:, t] = fed_bar[:, 0]
                more = product(fed_bar[:, 0], cell.stacked)
    if fed is not None and bars.stacked is not None:
        bars.stacked += product(rows(fed), rows(before), transposed=(True, False))
    return bars, verdict.solution(z, "sequential")


def _keep(cell: MatrixCell, y: Array) -> Kept:
    """What :func:`solve_sequential` would have kept, for an ``y`` that was found in another way."""
    kept, (before, state) = Kept([], []), cell.initial
    for t in range(y.shape[1]):
        if t % SPAN == 0:
            kept.states.append(state)
        here = cell.part(slice(t, t + 1), (before, state))
        y_t = contiguous(y[:, t : t + 1])
        kept.made.append(here.mix(y_t))
        before, state = y_t[:, 0], cell.states(kept.made[-1], y_t, state)
    return kept
