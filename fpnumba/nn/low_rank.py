"""The sequential way with a Householder or DPLR mixer, fused: one matrix product and one compiled loop per
step.

Does what :func:`fpnumba.nn.ways.solve_sequential` and ``pull_sequential`` do with the doors of a room;
tests hold the two to each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.nn import low_rank_kernels as kernels
from fpnumba.nn.basic import rows
from fpnumba.nn.loops import ACTIVATIONS
from fpnumba.nn.mixer_maps import LowRankMap
from fpnumba.nn.recurrence import Bars, Cell, Solve
from fpnumba.solve import Solution, Status

Array = NDArray[Any]


@dataclass
class Kept:
    """What the way back needs: pre-activations, ``u`` and its norms before normalisation, ``alpha``,
    ``c``."""

    arguments: Array
    a: Array
    u: Array
    norm: Array
    alpha: Array
    c: Array


def _options(map: LowRankMap) -> tuple[int, float, float, bool]:
    return ACTIVATIONS[map.activation], map.norm_eps, map.alpha_max, map.kind == "householder"


def solve(cell: Cell, map: LowRankMap, *, keep: bool) -> Solve:
    """Step after step; ``keep`` what the gradient needs, or one step's worth of it."""
    batch, steps, dim = cell.v.shape
    rank, dtype, factored = map.rank, cell.v.dtype, map.stack.factored
    span = steps if keep else 1
    arguments = cell.base
    if factored and cell.feedback is not None:
        arguments = cell.base.copy()
    a = np.zeros((batch, span, map.stack.outputs), dtype)
    if keep and not factored:
        a[...] = cell.base
    u = np.empty((batch, span, rank, dim), dtype)
    norm, alpha, c = (np.empty((batch, span, rank), dtype) for _ in range(3))
    h, condition = np.empty_like(cell.v), np.full(batch, np.inf)
    more = np.zeros((batch, map.stack.inner), dtype)
    before = cell.initial
    # a sequence that overflows is flagged below
    with np.errstate(over="ignore", invalid="ignore"):
        for t in range(steps):
            at = t if keep else 0
            if cell.feedback is not None:
                np.matmul(before, cell.feedback.T, out=more)
            if factored:
                if cell.feedback is not None:
                    arguments[:, t] += more
                pre = cell.weights.expand(arguments[:, t])
                a[:, at] = 0
            elif keep:
                pre = more
            else:
                pre = more
                a[:, 0] = cell.base[:, t]
            kernels.forward_step(
                t,
                at,
                pre,
                a,
                cell.lam,
                cell.v,
                cell.initial,
                *_options(map),
                u,
                norm,
                alpha,
                c,
                h,
                condition,
            )
            before = h[:, t]
    kept = [Kept(arguments, a, u, norm, alpha, c)] if keep else []
    return Solve(h, _solution(h, condition, cell.finite, steps), steps=kept)


def pull(cell: Cell, map: LowRankMap, found: Solve, hbar: Array) -> tuple[Bars, Solution]:
    """The exact gradient, backward in time; see :func:`fpnumba.nn.ways.pull_sequential`."""
    kept: Kept = found.steps[0]
    batch, steps, dim = cell.v.shape
    bars, hbar = Bars.zeros(cell), np.ascontiguousarray(hbar)
    abar = np.empty_like(kept.a)
    carry, condition = np.zeros((batch, dim), cell.v.dtype), np.full(batch, np.inf)
    with np.errstate(over="ignore", invalid="ignore"):
        for t in range(steps - 1, -1, -1):
            kernels.backward_step(
                t,
                carry,
                hbar,
                kept.a,
                cell.lam,
                cell.v,
                cell.initial,
                *_options(map),
                kept.u,
                kept.norm,
                kept.alpha,
                kept.c,
                found.h,
                abar,
                bars.v,
                bars.lam,
                condition,
            )
            if cell.feedback is not None and t:
                carry += cell.weights.expand_transpose(abar[:, t]) @ cell.feedback
    bars.base = cell.weights.expand_vjp(kept.arguments, abar, bars.seconds)
    if bars.feedback is not None:
        bars.feedback += rows(bars.base).T @ rows(cell.before(found.h))
    return bars, _solution(
        bars.v, condition, lambda b: bool(np.isfinite(hbar[b]).all()) and cell.finite(b), steps
    )


def _solution(value: Array, condition: NDArray[np.float64], finite: Any, steps: int) -> Solution:
    """Status from the smallest reciprocal condition of each sequence, as the rooms report a direct solve."""
    eps = float(np.finfo(value.dtype).eps)
    status = np.where(condition < 1e3 * eps, Status.ILL_CONDITIONED, Status.CONVERGED).astype(np.int8)
    for b in np.flatnonzero(~np.isfinite(value.sum(axis=(1, 2)))):
        if not np.isfinite(value[b]).all():
            status[b] = Status.DIVERGED if finite(int(b)) else Status.NONFINITE_INPUT
    counts = np.full(len(value), min(steps, 1), np.int64)
    residual = eps / np.maximum(condition, np.finfo(np.float64).tiny)
    return Solution(value, status, counts, residual, "sequential", np.ones((len(value), steps), np.int64))
