"""The fixed point with a matrix state in Numba, section 5 of docs/mathematics.md: doors as in
`fpnumba.reference.mamba`.

Sequences over threads. Products of several mixers ("mixture") are the reference room's.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.cpu import _mamba, _mamba_low_rank, _threads, mixers, scan
from fpnumba.cpu._kinds import as_mixer, work_size
from fpnumba.reference import mamba as reference
from fpnumba.reference.mamba import Bars, Norm, Solved, System, normalize, normalize_vjp
from fpnumba.reference.scan import _per_channel
from fpnumba.reference.solve import CONVERGED, DIVERGED, MAX_ITER, NONFINITE_INPUT

__all__ = [
    "Bars",
    "Norm",
    "Solved",
    "System",
    "application_vjp",
    "iterate",
    "normalize",
    "normalize_vjp",
    "pullback",
    "solve",
]

Array = NDArray[np.floating[Any]]

LOW_RANK = ("dplr", "householder")

# Steps between two states that a pullback keeps.
SPAN = 16


class _Doors:
    scan = scan
    mixers = mixers


def iterate(system: System, initial: Array | None, y: Array) -> Array:
    """One parallel iteration; see `fpnumba.reference.mamba.iterate`."""
    return reference.iterate(system, initial, y, _Doors)


def application_vjp(system: System, initial: Array | None, y: Array, new_bar: Array) -> Bars:
    """Cotangents of `iterate`; see `fpnumba.reference.mamba.application_vjp`."""
    return reference.application_vjp(system, initial, y, new_bar, _Doors)


def _scan_arguments(s: System) -> tuple[Any, ...]:
    A, delta = _per_channel(s.A, s.delta, s.x.shape[-1], s.B.shape[-1])
    gate = np.empty((*s.x.shape[:2], 0), s.x.dtype) if s.gate is None else s.gate
    arrays = (s.x, np.ascontiguousarray(delta), np.ascontiguousarray(A), s.B, s.C, s.skip, gate)
    return (*arrays, s.gate is not None)


def _norm_arguments(s: System) -> tuple[Array, Array, int, float]:
    dim, dtype = s.x.shape[-1], s.x.dtype
    if s.norm is None:
        return np.ones(dim, dtype), np.zeros(dim, dtype), 0, 0.0
    bias = np.zeros(dim, dtype) if s.norm.bias is None else s.norm.bias
    return s.norm.weight, bias, 2 if s.norm.centred else 1, float(s.norm.eps)


def solve(
    system: System,
    initial: Array | None,
    *,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int = 1000,
    damping: float = 1.0,
) -> Solved:
    """Solve (M) step by step; see `fpnumba.reference.mamba.solve`.

    Parameters
    ----------
    system : System
        Arrays (B, T, ...), C-contiguous, all float32 or all float64.
    initial : (B, D, N) array or None
    rtol, atol, max_iter, damping
        As there.

    Returns
    -------
    Solved

    Examples
    --------
    >>> from fpnumba.cpu.mamba import System, solve
    >>> ones, q = np.ones((1, 1, 2)), np.eye(2) / 2
    >>> system = System(
    ...     "fixed", (q,), ones, ones, -np.ones((2, 1)), ones[..., :1], ones[..., :1], 0 * ones[0, 0], None, None
    ... )
    >>> solve(system, None).value.round(4)
    array([[[1., 1.]]])
    """
    s = system
    if s.kind == "mixture":
        return reference.solve(s, initial, rtol=rtol, atol=atol, max_iter=max_iter, damping=damping)
    batch, steps, dim = s.x.shape
    shape = (batch, dim, s.B.shape[-1])
    state = np.zeros(shape, s.x.dtype) if initial is None else initial.copy()
    y, iterations = np.empty_like(s.x), np.zeros(batch, np.int64)
    residual, met = np.zeros(batch), np.ones(batch, bool)
    weight, bias, mode, eps = _norm_arguments(s)
    arguments = (*_scan_arguments(s), weight, bias, mode, eps)
    options = (float(rtol), float(atol), int(max_iter), float(damping))
    results = (state, y, iterations, residual, met)
    work = 32 * s.x.size * shape[2]
    if s.kind in LOW_RANK:
        mixer: tuple[Any, ...] = (*s.params, s.kind == "householder")
        _threads.run(_mamba_low_rank.solve_steps, batch, work, *mixer, *arguments, *options, *results)
    else:
        p = as_mixer(s.kind, s.params)
        mixer = (0, steps, 0, p, work_size(p))
        _threads.run(_mamba.solve_steps, batch, work, *mixer, *arguments, *options, *results)
    status = np.where(met, CONVERGED, MAX_ITER)
    wild = ~(np.isfinite(y).all((1, 2)) & np.isfinite(state).all((1, 2)))
    if wild.any():
        finite = reference.finite_inputs(s, initial)
        status = np.where(wild, np.where(finite, DIVERGED, NONFINITE_INPUT), status)
    return Solved(y, state, iterations, residual, status.astype(np.int8))


def pullback(
    system: System,
    initial: Array | None,
    y: Array,
    y_bar: Array,
    last_bar: Array | None,
    *,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int = 1000,
) -> tuple[Bars, NDArray[np.int8]]:
    """The exact gradient at the fixed point ``y``, backward in time; see `fpnumba.reference.mamba.pullback`.

    The adjoint of a step is a system of the mixer's rank, or iterated to `rtol`; `atol` is of no use to it.

    Parameters
    ----------
    system, initial
        As for `solve`.
    y, y_bar : (B, T, D) arrays
    last_bar : (B, D, N) array or None
    rtol, max_iter
        Of the adjoint of a step.

    Returns
    -------
    bars : Bars
    status : (B,) int8 array

    Examples
    --------
    >>> from fpnumba.cpu.mamba import System, pullback
    >>> ones, q = np.ones((1, 1, 2)), np.eye(2) / 2
    >>> system = System(
    ...     "fixed", (q,), ones, ones, -np.ones((2, 1)), ones[..., :1], ones[..., :1], 0 * ones[0, 0], None, None
    ... )
    >>> pullback(system, None, ones, ones, None)[0].x.round(5)
    array([[[1., 1.]]])
    """
    s = system
    if s.kind == "mixture":
        return reference.pullback(s, initial, y, y_bar, last_bar)
    batch, steps, dim = s.x.shape
    size, dtype = s.B.shape[-1], s.x.dtype
    states = (batch, dim, size)
    start = np.zeros(states, dtype) if initial is None else initial
    G = np.zeros(states, dtype) if last_bar is None else last_bar.copy()
    bar = mixers.empty_bars(s.kind, s.params)
    scanned = _scan_arguments(s)
    weight, _, mode, eps = _norm_arguments(s)
    z, u_bar, x_bar, delta_bar = (np.empty_like(s.x) for _ in range(4))
    B_bar, C_bar, gate_bar = np.empty_like(s.B), np.empty_like(s.C), np.empty_like(scanned[6])
    rate_bar = np.zeros(states, dtype)
    skip_bar, weight_bar, bias_bar = (np.zeros((batch, dim), dtype) for _ in range(3))
    met = np.ones(batch, bool)
    arguments: tuple[Any, ...] = (*scanned, weight, mode, eps)
    outputs: tuple[Any, ...] = (
        z,
        u_bar,
        x_bar,
        delta_bar,
        B_bar,
        C_bar,
        gate_bar,
        rate_bar,
        skip_bar,
        weight_bar,
        bias_bar,
    )
    if s.kind in LOW_RANK:
        kernel, arguments = _mamba_low_rank.pull_step, (*bar, *s.params, s.kind == "householder", *arguments)
    else:
        p, kernel = as_mixer(s.kind, s.params), _mamba.pull_step
        arguments = (0, p, as_mixer(s.kind, bar), work_size(p), *arguments, float(rtol), int(max_iter))
        outputs = (*outputs, met)
    u = reference.channel_mix(s, y, mixers) if steps > 1 else y
    spans = [start]

    def after(t: int, state: Array) -> Array:
        cut = (np.ascontiguousarray(a[:, t : t + 1]) for a in (u, s.delta))
        B, C = (np.ascontiguousarray(a[:, t : t + 1]) for a in (s.B, s.C))
        now, delta = cut
        found: Array = scan.selective_scan(now, delta, s.A, B, C, None, state)[1]
        return found

    for begin in range(SPAN, steps, SPAN):
        state = spans[-1]
        for t in range(begin - SPAN, begin):
            state = after(t, state)
        spans.append(state)
    y_bar = np.ascontiguousarray(y_bar)
    for span in reversed(range(len(spans))):
        steps_here = range(span * SPAN, min((span + 1) * SPAN, steps))
        pasts = [spans[span]]
        for t in steps_here[:-1]:
            pasts.append(after(t, pasts[-1]))
        for t in reversed(steps_here):
            past = pasts[t - steps_here[0]]
            _threads.run(kernel, batch, 32 * z.size * size, t, *arguments, past, G, y, y_bar, *outputs)
    if s.kind == "fixed":
        bar = (mixers.shared_cotangent(s.x - y, u_bar),)
    A_bar = rate_bar.sum(0)
    if s.A.ndim == 1:
        heads = s.A.shape[0]
        A_bar = A_bar.reshape(heads, -1).sum(-1)
        delta_bar = delta_bar.reshape(batch, steps, heads, dim // heads).sum(-1)
    good = met & np.isfinite(z).all((1, 2))
    status = np.where(good, CONVERGED, np.where(np.isfinite(z).all((1, 2)), MAX_ITER, DIVERGED)).astype(
        np.int8
    )
    bars = Bars(
        bar,
        x_bar,
        delta_bar,
        A_bar,
        B_bar,
        C_bar,
        skip_bar.sum(0),
        None if s.gate is None else gate_bar,
        None if s.norm is None else weight_bar.sum(0),
        None if s.norm is None or s.norm.bias is None else bias_bar.sum(0),
        G,
        z,
    )
    return bars, status
