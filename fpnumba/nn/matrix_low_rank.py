"""The sequential way of FP-Mamba with a Householder or DPLR mixer, fused: one matrix product and one compiled loop per
step.

Does what :mod:`fpnumba.nn.matrix_ways` does with the doors of a room; tests hold the two to each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from fpnumba.arrays import host_room
from fpnumba.cpu import _mamba_fused as kernels
from fpnumba.cpu import memory
from fpnumba.cpu._threads import run
from fpnumba.nn.basic import rows
from fpnumba.nn.loops import ACTIVATIONS, softplus_vjp
from fpnumba.nn.matrix_state import SEGMENTS, SPAN, MatrixBars, MatrixCell
from fpnumba.nn.matrix_ways import tight
from fpnumba.nn.mixer_maps import LowRankMap, MixerMap
from fpnumba.nn.recurrence import Solve
from fpnumba.reference.mamba import Norm
from fpnumba.solve import Solution, Solver, Status

Array = NDArray[Any]


@dataclass
class Kept:
    """What the way back needs: arguments, pre-activations, the parameters made of them, and the state before every
    span."""

    arguments: dict[str, Array]
    a: Array
    made: tuple[Array, ...]
    delta: Array
    states: list[Array]


def serves(map: MixerMap) -> TypeGuard[LowRankMap]:
    """Whether this way is for that mixer, in the room that is in use."""
    return isinstance(map, LowRankMap) and host_room().name == "cpu"


def _mixer_options(map: LowRankMap) -> tuple[int, float, float, bool]:
    return ACTIVATIONS[map.activation], map.norm_eps, map.alpha_max, map.kind == "householder"


def norm_arguments(norm: Norm, bias: bool) -> tuple[Any, ...]:
    """Weight, bias if it is asked for, mode and eps."""
    shift = np.zeros_like(norm.weight) if norm.bias is None else norm.bias
    return (norm.weight, *([shift] if bias else []), 2 if norm.centred else 1, float(norm.eps))


def scan_arguments(cell: MatrixCell) -> tuple[Array, Array, Array, bool]:
    """Rates of every channel, skip, gate, and whether there is one."""
    dim, size = cell.initial[1].shape[1:]
    rates = cell.A
    if rates.ndim == 1:
        rates = np.repeat(rates, dim // len(rates))[:, None]
    rates = np.ascontiguousarray(np.broadcast_to(rates, (dim, size)))
    empty = np.empty((*cell.v.shape[:2], 0), cell.v.dtype)
    return rates, cell.skip, empty if cell.gate is None else cell.gate, cell.gate is not None


def step_sizes(cell: MatrixCell, argument: Array, *, alone: bool = False) -> Array:
    """``delta`` of every channel, ``(B, T, D)``; as :meth:`fpnumba.nn.matrix_state.Steps.delta`, compiled.

    `alone` on the thread of the caller.
    """
    weight, bias = cell.steps.weight, cell.steps.bias
    raw = rows(argument) if weight is None else rows(argument) @ weight.T
    delta = np.empty_like(raw)
    run(kernels.softplus_rows, len(raw), 0 if alone else 8 * raw.size, raw, bias, delta)
    dim = cell.v.shape[2]
    if delta.shape[1] != dim:
        delta = np.repeat(delta, dim // delta.shape[1], axis=1)
    return delta.reshape(*argument.shape[:-1], dim)


def solve(
    cell: MatrixCell, map: LowRankMap, solver: Solver, *, keep: bool
) -> tuple[Solve, tuple[Array, Array]]:
    """As :func:`fpnumba.nn.matrix_ways.solve_sequential`."""
    batch, steps, dim = cell.v.shape
    size, dtype, rank, span = cell.initial[1].shape[2], cell.v.dtype, map.rank, steps if keep else 1
    # what sees the hidden state is added to, step by step
    arguments = {
        name: base.copy() if name in cell.feedback else np.ascontiguousarray(base)
        for name, base in cell.base.items()
    }
    factored = map.stack.factored
    a = memory.empty((batch, span, map.stack.outputs), dtype) if factored else arguments["mixer"]
    u = memory.empty((batch, span, rank, dim), dtype)
    norm, alpha = (np.empty((batch, span, rank), dtype) for _ in range(2))
    b, c = (np.empty((batch, span, size), dtype) for _ in range(2))
    b_norm, c_norm = (np.empty((batch, span), dtype) for _ in range(2))
    made = u, norm, alpha, b, b_norm, c, c_norm
    delta = np.empty_like(cell.v) if "lambda" in cell.feedback else step_sizes(cell, cell.base["lambda"])
    state = np.array(cell.initial[1])
    states = [np.empty_like(state) for _ in range(0, steps, SPAN)] if keep else []
    y, iterations = np.empty_like(cell.v), np.zeros((batch, steps), np.int64)
    residual, met = np.zeros(batch), np.ones(batch, bool)
    told = tight(solver, cell.share())
    options = (float(told["rtol"]), float(told["atol"]), int(told["max_iter"]), float(told["damping"]))
    bc_eps = -1.0 if cell.bc_eps is None else cell.bc_eps
    fixed = (*_mixer_options(map), bc_eps, cell.v, delta, *scan_arguments(cell))
    fixed = (*fixed, *norm_arguments(cell.norm, True), *options)
    seen, results = (a, arguments["b"], arguments["c"]), (state, *made, y, iterations, residual, met)

    def walk(first: int, last: int) -> None:
        """All steps of some sequences."""
        mine = slice(first, last)
        # a sequence that overflows is flagged below
        with np.errstate(over="ignore", invalid="ignore"):
            for t in range(steps):
                if keep and t % SPAN == 0:
                    states[t // SPAN][mine] = state[mine]
                if cell.stacked is not None:
                    before = y[mine, t - 1] if t else cell.initial[0][mine]
                    more, start = before @ cell.stacked.T, 0
                    for name in SEGMENTS:
                        if name in cell.feedback:
                            end = start + len(cell.feedback[name])
                            arguments[name][mine, t] += more[:, start:end]
                            start = end
                at = t if keep else 0
                if factored:
                    a[mine, at] = cell.weights.expand(arguments["mixer"][mine, t])
                if "lambda" in cell.feedback:
                    delta[mine, t] = step_sizes(cell, arguments["lambda"][mine, t], alone=True)
                # a mixer without second factors has its pre-activations in place
                where = (t, at, at if factored else t)
                kernels.forward_step(first, last, *where, *seen, *fixed, *results)

    run(walk, batch, 16 * state.size * steps, shares_each=1)
    kept = [Kept(arguments, a, made, delta, states)] if keep else []
    status = _status(y, met, cell, cell.finite)
    found = Solution(y, status, iterations.max(-1, initial=0), residual, "sequential", iterations)
    last = np.ascontiguousarray(y[:, -1] if steps else cell.initial[0])
    return Solve(y, found, steps=kept), (last, state)


def pull(cell: MatrixCell, map: LowRankMap, found: Solve, y_bar: Array) -> tuple[MatrixBars, Solution]:
    """The exact gradient, backward in time; as :func:`fpnumba.nn.matrix_ways.pull_sequential`.

    The adjoint of a step is solved directly: tolerances are of no use to it.
    """
    kept: Kept = found.steps[0]
    batch, steps, dim = cell.v.shape
    size, dtype, y = cell.initial[1].shape[2], cell.v.dtype, found.h
    u, _, alpha, b, _, c, _ = kept.made
    bars, y_bar = cell.bars(), np.ascontiguousarray(y_bar)
    rates, skip, gate, gated = scan_arguments(cell)
    z, delta_bar, a_bar = np.empty_like(y), np.empty_like(y), memory.empty(kept.a.shape, dtype)
    gate_bar = np.empty_like(gate)
    rate_bar = np.zeros((batch, dim, size), dtype)
    skip_bar, weight_bar, bias_bar = (np.zeros((batch, dim), dtype) for _ in range(3))
    G, carry = np.zeros_like(rate_bar), np.zeros((batch, dim), dtype)
    passing = np.empty_like(G)
    now = memory.empty((batch, min(SPAN, steps), dim, size), dtype)
    bc_eps = -1.0 if cell.bc_eps is None else cell.bc_eps
    mixer, norm = _mixer_options(map), norm_arguments(cell.norm, False)
    fixed = (kept.a, *mixer, bc_eps, cell.v, kept.delta, rates, skip, gate, gated, *norm)
    outputs = (z, bars.v, a_bar, delta_bar, bars.base["b"], bars.base["c"], gate_bar)
    sums = (rate_bar, skip_bar, weight_bar, bias_bar)
    fed = None if cell.stacked is None else np.empty((batch, steps, len(cell.stacked)), dtype)
    raw_bar = np.empty((batch, steps, len(cell.steps.bias)), dtype)

    def walk(first: int, last: int) -> None:
        """All steps of some sequences, backward."""
        mine = slice(first, last)
        with np.errstate(over="ignore", invalid="ignore"):
            for begin in range((steps - 1) // SPAN * SPAN, -1, -SPAN) if steps else ():
                end = min(begin + SPAN, steps)
                passing[mine], here = kept.states[begin // SPAN][mine], now[:, : end - begin]
                scanned = (u, alpha, mixer[3], cell.v, kept.delta, rates, b, c, y, passing, here)
                kernels.decayed_states(first, last, begin, *scanned)
                for t in range(end - 1, begin - 1, -1):
                    given = (*fixed, *kept.made, now, G, y, y_bar, carry)
                    kernels.backward_step(first, last, t, t - begin, *given, *outputs, *sums)
                    if "lambda" in cell.feedback:
                        raw_bar[mine, t] = _raw_bar(kept.delta[mine, t], delta_bar[mine, t], raw_bar.shape[2])
                    if fed is not None and cell.stacked is not None:
                        _feed(cell, t, mine, a_bar, bars, raw_bar, fed)
                        np.matmul(fed[mine, t], cell.stacked, out=carry[mine])

    run(walk, batch, 16 * G.size * steps, shares_each=1)
    if "lambda" not in cell.feedback:
        raw_bar[...] = _raw_bar(kept.delta, delta_bar, raw_bar.shape[2])
    bars.base["mixer"] = cell.weights.expand_vjp(kept.arguments["mixer"], a_bar, bars.seconds)
    collect(
        cell,
        bars,
        kept.arguments["lambda"],
        y,
        raw_bar,
        fed,
        gate_bar,
        rate_bar,
        skip_bar,
        weight_bar,
        bias_bar,
    )
    status = _status(
        z, np.ones(batch, bool), cell, lambda i: bool(np.isfinite(y_bar[i]).all()) and cell.finite(i)
    )
    counts = np.ones((batch, steps), np.int64)
    return bars, Solution(z, status, counts.max(-1, initial=0), np.zeros(batch), "sequential", counts)


def collect(
    cell: MatrixCell,
    bars: MatrixBars,
    argument: Array,
    y: Array,
    raw_bar: Array,
    fed: Array | None,
    gate_bar: Array,
    rate_bar: Array,
    skip_bar: Array,
    weight_bar: Array,
    bias_bar: Array,
) -> None:
    """Add up over steps or sequences what kernels have left: `argument` of "lambda", cotangents ``raw_bar`` of what
    softplus sees and ``fed (B, T, n)`` of ``V y_{t-1}``, the others of each sequence."""
    bars.step_bias += rows(raw_bar).sum(0)
    bars.base["lambda"] = raw_bar
    if cell.steps.weight is not None and bars.step_weight is not None:
        bars.step_weight += rows(raw_bar).T @ rows(argument)
        bars.base["lambda"] = raw_bar @ cell.steps.weight
    if fed is not None and bars.stacked is not None:
        bars.stacked += rows(fed).T @ rows(cell.before(y))
    A_bar = rate_bar.sum(0)
    bars.A += A_bar if cell.A.ndim == 2 else A_bar.reshape(len(cell.A), -1).sum(-1)
    bars.skip += skip_bar.sum(0)
    bars.norm_weight += weight_bar.sum(0)
    if bars.norm_bias is not None:
        bars.norm_bias += bias_bar.sum(0)
    if bars.gate is not None:
        bars.gate = gate_bar


def _raw_bar(delta: Array, delta_bar: Array, width: int) -> Array:
    """Cotangent of what softplus sees, from its value, summed over the channels of a head."""
    raw = softplus_vjp(delta, delta_bar)
    return raw if raw.shape[-1] == width else raw.reshape(*raw.shape[:-1], width, -1).sum(-1)


def _feed(
    cell: MatrixCell, t: int, mine: slice, a_bar: Array, bars: MatrixBars, raw_bar: Array, fed: Array
) -> None:
    """What step ``t`` of some sequences hands back to ``V y_{t-1}``."""
    start = 0
    for name in SEGMENTS:
        if name not in cell.feedback:
            continue
        if name == "mixer":
            bar = cell.weights.expand_transpose(a_bar[mine, t])
        elif name == "lambda":
            weight = cell.steps.weight
            bar = raw_bar[mine, t] if weight is None else raw_bar[mine, t] @ weight
        else:
            bar = bars.base[name][mine, t]
        fed[mine, t, start : start + bar.shape[1]] = bar
        start += bar.shape[1]


def _status(value: Array, met: NDArray[np.bool_], cell: MatrixCell, finite: Any) -> NDArray[np.int8]:
    status = np.where(met, Status.CONVERGED, Status.MAX_ITER).astype(np.int8)
    for i in np.flatnonzero(~np.isfinite(value.sum(axis=(1, 2)))):
        if not np.isfinite(value[i]).all():
            status[i] = Status.DIVERGED if finite(int(i)) else Status.NONFINITE_INPUT
    return status
