"""The sequential way of FP-Mamba on a GPU with a mixer of rank one: a product of matrices and a kernel a step.

Does what :func:`fpnumba.nn.matrix_ways.solve_sequential` and ``pull_sequential`` do with the doors of a room; tests
hold the two to each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.nn import backend
from fpnumba.nn.basic import rows
from fpnumba.nn.matrix_state import MatrixBars, MatrixCell
from fpnumba.nn.mixer_maps import LowRankMap
from fpnumba.nn.recurrence import Solve
from fpnumba.nn.ways import Verdict
from fpnumba.reference.mamba import System
from fpnumba.solve import Solution, Solved

Array = NDArray[Any]


@dataclass
class Kept:
    """What the way back needs: the arguments, and what the room kept."""

    given: Any
    made: Any


def serves(cell: MatrixCell) -> bool:
    """Whether there are kernels for this recurrence."""
    if backend.on_host(cell.v) or not isinstance(cell.map, LowRankMap) or "lambda" in cell.feedback:
        return False
    if cell.map.rank != 1 or cell.map.stack.factored or cell.fixed is not None:
        return False
    return bool(backend.room(cell.v).mamba.makes(_system(cell, empty=True), cell.map.activation))


def _system(cell: MatrixCell, *, empty: bool = False) -> System:
    """The system, without the numbers of what the kernels make."""
    batch, steps, dim = cell.v.shape
    shape = (batch, 0 if empty else steps)
    u, alpha = backend.empty((*shape, 1, dim), cell.v), backend.empty((*shape, 1), cell.v)
    base, kind = cell.base, cell.map.kind
    if empty:
        B, C, delta = base["b"], base["c"], base["lambda"]
    else:
        B, C = (backend.empty(base[name].shape, cell.v) for name in ("b", "c"))
        delta = cell.steps.delta(base["lambda"])
    return System(kind, (u, alpha), cell.v, delta, cell.A, B, C, cell.skip, cell.gate, cell.norm)


def solve(cell: MatrixCell, options: dict[str, Any], *, keep: bool) -> tuple[Solve, tuple[Array, Array]]:
    """As :func:`fpnumba.nn.matrix_ways.solve_sequential`."""
    map, doors = cell.map, backend.room(cell.v).mamba
    assert isinstance(map, LowRankMap)
    given = doors.Arguments(
        *(backend.contiguous(cell.base[name]) for name in ("mixer", "b", "c")),
        cell.stacked,
        tuple(cell.feedback),
        map.activation,
        map.alpha_max,
        map.norm_eps,
        cell.bc_eps,
    )
    y, last, solved, made = doors.solve_made(_system(cell), given, cell.initial, keep=keep, **options)
    verdict = Verdict(len(y))
    verdict.add(Solved(y, *solved, solved[0]))
    end = y[:, -1] if y.shape[1] else cell.initial[0]
    found = Solve(y, verdict.solution(y, "sequential"), steps=[Kept(given, made)] if keep else [])
    return found, (backend.contiguous(end), last)


def pull(cell: MatrixCell, found: Solve, y_bar: Array) -> tuple[MatrixBars, Solution]:
    """As :func:`fpnumba.nn.matrix_ways.pull_sequential`."""
    kept, bars, y = found.steps[0], cell.bars(), found.h
    pulled, fed_bar, status = backend.room(y).mamba.pull_made(
        kept.made, kept.given, y, backend.contiguous(y_bar), None
    )
    bars.base = {"mixer": pulled.params, "b": pulled.B, "c": pulled.C}
    bars.v, bars.A, bars.skip, bars.gate = pulled.x, pulled.A, pulled.skip, pulled.gate
    bars.norm_weight, bars.norm_bias = pulled.weight, pulled.bias
    raw_bar = -np.expm1(-kept.made.system.delta) * pulled.delta
    flat_bar = rows(raw_bar)
    bars.step_bias = flat_bar.sum(0)
    if cell.steps.weight is not None:
        bars.step_weight = backend.product(flat_bar, rows(cell.base["lambda"]), transposed=(True, False))
        raw_bar = backend.product(flat_bar, cell.steps.weight).reshape(cell.base["lambda"].shape)
    bars.base["lambda"] = raw_bar
    if cell.stacked is not None:
        bars.stacked = backend.product(rows(fed_bar), rows(cell.before(y)), transposed=(True, False))
    verdict = Verdict(len(y))
    verdict.add_status(status)
    return bars, verdict.solution(pulled.y, "sequential")
