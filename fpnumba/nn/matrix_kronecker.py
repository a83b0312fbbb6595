"""The sequential way of FP-Mamba with a Kronecker mixer, fused: one compiled loop over all steps in each direction.

Does what :mod:`fpnumba.nn.matrix_ways` does with the doors of a room; tests hold the two to each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from fpnumba.arrays import host_room
from fpnumba.cpu import memory
from fpnumba.cpu._threads import count, run
from fpnumba.nn import kronecker_kernels as kernels
from fpnumba.nn.loops import ACTIVATIONS
from fpnumba.nn.matrix_low_rank import collect, norm_arguments, scan_arguments, step_sizes
from fpnumba.nn.matrix_state import SEGMENTS, SPAN, MatrixBars, MatrixCell
from fpnumba.nn.matrix_ways import solve_sequential, tight
from fpnumba.nn.mixer_maps import KroneckerMap, MixerMap
from fpnumba.nn.recurrence import Solve
from fpnumba.solve import Adjoint, Solution, Solver

Array = NDArray[Any]

# For fewer steps that nothing is kept of, as in decoding, it does not pay to rearrange the feedback weights.
FEW = 8


@dataclass
class Kept:
    """What the way back needs: arguments, the parameters made of them, and the state before every span."""

    arguments: dict[str, Array]
    made: tuple[Array, ...]
    delta: Array
    states: Array


def serves(map: MixerMap) -> TypeGuard[KroneckerMap]:
    """Whether this way is for that mixer, in the room that is in use."""
    return isinstance(map, KroneckerMap) and not map.stack.factored and host_room().name == "cpu"


def _mixer_options(cell: MatrixCell, map: KroneckerMap) -> tuple[Any, ...]:
    bc_eps = -1.0 if cell.bc_eps is None else float(cell.bc_eps)
    activation, start = ACTIVATIONS[map.activation], 1.0 / float(np.sqrt(map.dim))
    return activation, start, float(map.norm_eps), map.spectral, float(map.alpha_max), bc_eps


def _places(cell: MatrixCell) -> tuple[int, ...]:
    """Where the rows of each segment begin in the stacked feedback weights, -1 for none."""
    places, at = [], 0
    for name in SEGMENTS:
        places.append(at if name in cell.feedback else -1)
        at += len(cell.feedback.get(name, ()))
    return tuple(places)


def _packed(weight: Array | None, dtype: np.dtype[Any]) -> Array:
    if weight is None:
        return np.empty((0, 0, kernels.panel_width(dtype.itemsize)), dtype)
    found: Array = kernels.panels(weight)
    return found


def _step_weight(cell: MatrixCell) -> Array:
    """``(rank, D)``, without rows where there is none."""
    weight = cell.steps.weight
    return np.empty((0, 0), cell.v.dtype) if weight is None else np.ascontiguousarray(weight.T)


def _shares(batch: int) -> int:
    """Shares for each thread: of sequences enough to be multiplied together."""
    return max(1, min(4, batch // (4 * count())))


def solve(
    cell: MatrixCell, map: KroneckerMap, solver: Solver, *, keep: bool
) -> tuple[Solve, tuple[Array, Array]]:
    """As :func:`fpnumba.nn.matrix_ways.solve_sequential`."""
    batch, steps, _ = cell.v.shape
    if steps < FEW and not keep:
        return solve_sequential(cell, solver, keep=False)
    size, dtype, span = cell.initial[1].shape[2], cell.v.dtype, steps if keep else 1
    bases = {name: np.ascontiguousarray(base) for name, base in cell.base.items()}
    # what does not see the hidden state is there already
    arguments = {
        name: base if keep and name not in cell.feedback else np.empty((batch, span, base.shape[2]), dtype)
        for name, base in bases.items()
    }
    k1, k2 = (memory.empty((batch, span, d, d), dtype) for d in map.sizes)
    b, c = (np.empty((batch, span, size), dtype) for _ in range(2))
    b_norm, c_norm = (np.empty((batch, span), dtype) for _ in range(2))
    made = k1, k2, b, b_norm, c, c_norm
    delta = np.empty_like(cell.v) if "lambda" in cell.feedback else step_sizes(cell, cell.base["lambda"])
    state = np.array(cell.initial[1])
    states = memory.empty((-(-steps // SPAN) if keep else 0, *state.shape), dtype)
    y, iterations = np.empty_like(cell.v), np.zeros((batch, steps), np.int64)
    residual, status = np.zeros(batch), np.zeros(batch, np.int8)
    told = tight(solver, cell.share())
    run(
        kernels.forward,
        batch,
        32 * state.size * steps,
        keep,
        SPAN,
        _packed(None if cell.stacked is None else cell.stacked.T, dtype),
        *_places(cell),
        *(bases[name] for name in SEGMENTS),
        *(arguments[name] for name in SEGMENTS),
        _step_weight(cell),
        cell.steps.bias,
        *_mixer_options(cell, map),
        cell.v,
        delta,
        *scan_arguments(cell),
        *norm_arguments(cell.norm, True),
        *(float(told["rtol"]), float(told["atol"]), int(told["max_iter"]), float(told["damping"])),
        *(np.ascontiguousarray(array) for array in cell.initial),
        state,
        states,
        *made,
        y,
        iterations,
        residual,
        status,
        *(np.empty(batch, np.int64), np.empty(batch), np.empty(batch, bool)),
        shares_each=_shares(batch),
    )
    kept = [Kept(arguments, made, delta, states)] if keep else []
    found = Solution(y, status, iterations.max(-1, initial=0), residual, "sequential", iterations)
    last = np.ascontiguousarray(y[:, -1] if steps else cell.initial[0])
    return Solve(y, found, steps=kept), (last, state)


def pull(
    cell: MatrixCell, map: KroneckerMap, found: Solve, y_bar: Array, adjoint: Adjoint
) -> tuple[MatrixBars, Solution]:
    """The exact gradient, backward in time; as :func:`fpnumba.nn.matrix_ways.pull_sequential`."""
    kept: Kept = found.steps[0]
    batch, steps, dim = cell.v.shape
    size, dtype, y = cell.initial[1].shape[2], cell.v.dtype, found.h
    bars, scanned = cell.bars(), scan_arguments(cell)
    # of each step, the kernel needs the first before it writes the second, and that before the third
    z, y_bar = np.empty_like(y), np.array(y_bar, order="C")
    delta_bar, heads = y_bar, len(cell.steps.bias)
    raw_bar = delta_bar if heads == dim else np.empty((batch, steps, heads), dtype)
    gate_bar = np.empty_like(scanned[2])
    rate_bar, G = (np.zeros((batch, dim, size), dtype) for _ in range(2))
    skip_bar, weight_bar, bias_bar = (np.zeros((batch, dim), dtype) for _ in range(3))
    pasts = memory.empty((min(SPAN, steps), batch, dim, size), dtype)
    ours = [np.empty((batch, 1, d, d), dtype) for _ in range(2) for d in map.sizes]
    fed = np.empty((batch, steps, 0 if cell.stacked is None else len(cell.stacked)), dtype)
    status = np.zeros(batch, np.int8)
    run(
        kernels.backward,
        batch,
        32 * G.size * steps,
        SPAN,
        _packed(cell.stacked, dtype),
        *_places(cell),
        kept.arguments["mixer"],
        _step_weight(cell),
        *_mixer_options(cell, map),
        cell.v,
        kept.delta,
        *scanned,
        *norm_arguments(cell.norm, False),
        *(float(adjoint.rtol * cell.share()), int(adjoint.max_iter)),
        *kept.made,
        y,
        kept.states,
        pasts,
        *ours,
        G,
        y_bar,
        *(z, bars.v, bars.base["mixer"], delta_bar, bars.base["b"], bars.base["c"], gate_bar),
        *(rate_bar, skip_bar, weight_bar, bias_bar, raw_bar, fed),
        status,
        np.empty(batch, bool),
        shares_each=_shares(batch),
    )
    del pasts, ours
    collect(
        cell,
        bars,
        kept.arguments["lambda"],
        y,
        raw_bar,
        None if cell.stacked is None else fed,
        gate_bar,
        rate_bar,
        skip_bar,
        weight_bar,
        bias_bar,
    )
    counts = np.ones((batch, steps), np.int64)
    return bars, Solution(z, status, counts.max(-1, initial=0), np.zeros(batch), "sequential", counts)
