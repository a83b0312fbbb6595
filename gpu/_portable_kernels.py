# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Kernels of the readable room: scans, mixing, the chunked solve, and what is said of a solve.

Sections 1, 3, 6 and 7 of docs/mathematics.md. A sequence of a solve is one block's work from its first
chunk to its last, so that nothing in a batch can reach anything else in it. Memory traffic is whatever the
caches make of it: this is the room to read, and the one that takes a user's own mixer.

Arrays come in tuples: the simulator would copy them, and check every index, where they come as they are.
Numba warns of grids of less than `FEWEST_BLOCKS` blocks. Blocks beyond the last sequence return at once.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from fpnumba.gpu._portable_block import SIMULATED, THREADS, block_largest, float64, larger
from fpnumba.gpu._report import CONVERGED, DIVERGED, ILL_CONDITIONED, MAX_ITER, NONFINITE_INPUT

FEWEST_BLOCKS = 1 if SIMULATED else 128

# What the values are before the first iteration
COLD, GUESS, ITERATE = 0, 1, 2


class System(NamedTuple):
    """(F), or its adjoint: ``source`` is ``x`` or ``hbar``. ``gate`` is read only where ``gated``."""

    lam: Any  # (B, T, D)
    gate: Any  # (B, T, D)
    gated: bool
    source: Any  # (B, T, D)
    initial: Any  # (B, D)


class Scratch(NamedTuple):
    """What a solve writes: the result; and each block what is to be mixed, the same mixed, the mixer's scratch."""

    value: Any  # (B, T, D)
    d: Any  # (B, chunk, D)
    mixed: Any  # (B, chunk, D)
    work: Any  # (B, whatever the mixer needs)


class Stopping(NamedTuple):
    eps: float
    rtol: float
    atol: float
    max_iter: int
    damping: float


# Section 1: the scan, a channel of a sequence for each thread


@cuda.jit
def scan(arrays, reverse):
    lam, x, initial, h = arrays
    batch, steps, dim = x.shape
    at = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if at >= batch * dim:
        return
    b, i = at // dim, at % dim
    state = initial[b, i]
    for k in range(steps):
        t = steps - 1 - k if reverse else k
        state = lam[b, t, i] * state + x[b, t, i]
        h[b, t, i] = state


@cuda.jit
def scan_vjp(arrays, reverse):
    """``s_t = hbar_t + lam_{t+1} s_{t+1}``, and with `reverse` time the other way."""
    lam, h, initial, hbar, lam_bar, x_bar, initial_bar = arrays
    batch, steps, dim = h.shape
    at = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if at >= batch * dim:
        return
    b, i = at // dim, at % dim
    state = h.dtype.type(0)  # lam_{t+1} s_{t+1}
    for k in range(steps):
        t = k if reverse else steps - 1 - k
        s = hbar[b, t, i] + state
        state = lam[b, t, i] * s
        before = t + 1 if reverse else t - 1
        x_bar[b, t, i] = s
        lam_bar[b, t, i] = s * (h[b, before, i] if 0 <= before < steps else initial[b, i])
    initial_bar[b, i] = state


# Section 2: mixing by itself, a piece of a sequence for each block


@cache
def apply(mixer, transposed):
    """``y = Q x`` or ``Q^T x`` as a kernel."""
    mix = mixer.transpose if transposed else mixer.apply

    @cuda.jit
    def kernel(arrays, piece):
        params, x, y, work = arrays
        parts = cuda.shared.array(0, float64)
        batch, steps = x.shape[0], x.shape[1]
        pieces = -(-steps // piece)
        block = cuda.blockIdx.x
        if block >= batch * pieces:
            return
        b, begin = block // pieces, block % pieces * piece
        end = min(begin + piece, steps)
        mix(params, b, begin, end, x[b, begin:end], y[b, begin:end], work[block], parts)

    return kernel


@cache
def pull(mixer):
    """``xbar = Q^T ybar`` and the cotangents of ``y = Q x`` as a kernel."""
    pull_steps = mixer.pull

    @cuda.jit
    def kernel(arrays, piece):
        params, bars, x, ybar, xbar, work = arrays
        parts = cuda.shared.array(0, float64)
        batch, steps = x.shape[0], x.shape[1]
        pieces = -(-steps // piece)
        block = cuda.blockIdx.x
        if block >= batch * pieces:
            return
        b, begin = block // pieces, block % pieces * piece
        end = min(begin + piece, steps)
        pull_steps(
            params, bars, b, begin, end, x[b, begin:end], ybar[b, begin:end], xbar[b, begin:end],
            work[block], parts
        )  # fmt: skip

    return kernel


# Section 3: one channel's part in a step


@cuda.jit(device=True)
def gate_at(system, b, t, i):
    if system.gated:
        return system.gate[b, t, i]
    return system.lam.dtype.type(1) - system.lam[b, t, i]


@cuda.jit(device=True)
def forward_carry(system, value, b, t, i):
    """What comes into step `t`: ``h_{t-1}``."""
    if t == 0:
        return system.initial[b, i]
    return value[b, t - 1, i]


@cuda.jit(device=True)
def adjoint_carry(system, value, b, t, i):
    """What comes into step `t` of the adjoint: ``lam_{t+1} s_{t+1}``."""
    if t + 1 == value.shape[1]:
        return value.dtype.type(0)
    return system.lam[b, t + 1, i] * value[b, t + 1, i]


# Sections 3, 6 and 7: chunk after chunk, each iterated until it meets the tolerance


@cuda.jit(device=True)
def forward_rows(system, value, b, begin, end, d):
    """What an iteration mixes: ``d = x - h``."""
    for t in range(begin, end):
        for i in range(cuda.threadIdx.x, value.shape[2], THREADS):
            d[t - begin, i] = system.source[b, t, i] - value[b, t, i]


@cuda.jit(device=True)
def adjoint_rows(system, value, b, begin, end, d):
    """``e = g * s``"""
    for t in range(begin, end):
        for i in range(cuda.threadIdx.x, value.shape[2], THREADS):
            d[t - begin, i] = gate_at(system, b, t, i) * value[b, t, i]


@cuda.jit(device=True)
def forward_sweep(system, value, b, begin, end, d, mixed, damping):
    """Scan over a chunk that has been mixed; returns ``max|f(h) - h|`` and ``max|h|`` of the thread's channels."""
    new_share = value.dtype.type(damping)
    old_share = value.dtype.type(1) - new_share
    change, size = 0.0, 0.0
    for i in range(cuda.threadIdx.x, value.shape[2], THREADS):
        state = forward_carry(system, value, b, begin, i)
        for t in range(begin, end):
            old = value[b, t, i]
            state = system.lam[b, t, i] * state + gate_at(system, b, t, i) * (old + mixed[t - begin, i])
            new = old_share * old + new_share * state
            value[b, t, i] = new
            change = larger(change, abs(state - old))
            size = larger(size, abs(new))
    return change, size


@cuda.jit(device=True)
def adjoint_sweep(system, value, b, begin, end, d, mixed, damping):
    """The same backwards: ``s_t = hbar_t + (e - Q^T e)_t + lam_{t+1} s_{t+1}``."""
    new_share = value.dtype.type(damping)
    old_share = value.dtype.type(1) - new_share
    change, size = 0.0, 0.0
    for i in range(cuda.threadIdx.x, value.shape[2], THREADS):
        carry = adjoint_carry(system, value, b, end - 1, i)
        for back in range(end - begin):
            t = end - 1 - back
            k = t - begin
            old = value[b, t, i]
            s = system.source[b, t, i] + (d[k, i] - mixed[k, i]) + carry
            carry = system.lam[b, t, i] * s
            new = old_share * old + new_share * s
            value[b, t, i] = new
            change = larger(change, abs(s - old))
            size = larger(size, abs(new))
    return change, size


@cuda.jit(device=True)
def tolerance_share(lam, b, begin, end, chunks, parts):
    """The part of the tolerance that one chunk may use up; section 7. Steps are those whose ``lam`` an error meets.

    What is carried in leaves the chunk multiplied by ``L = max_d prod_t |lam|`` at most: errors of ``1 -
    L``, or of ``1 / chunks``, add up to one. Half of that: the other half is for what the mixing makes of
    the carried error.
    """
    if chunks == 1:
        return 1.0
    largest = 0.0
    if end <= lam.shape[1]:
        for i in range(cuda.threadIdx.x, lam.shape[2], THREADS):
            product = lam.dtype.type(1)
            for t in range(begin, end):
                product *= abs(lam[b, t, i])
            largest = larger(largest, product)
    largest = block_largest(largest, parts)
    share = 1.0 / chunks
    if 1.0 - largest > share:
        share = 1.0 - largest
    return 0.5 * share


@cache
def relax(mixer, adjoint):
    """The chunked solve of (F), or of its adjoint, as a kernel."""
    mix = mixer.transpose if adjoint else mixer.apply
    rows, sweep = (adjoint_rows, adjoint_sweep) if adjoint else (forward_rows, forward_sweep)
    carry_into = adjoint_carry if adjoint else forward_carry

    @cuda.jit(device=True)
    def nothing_comes_in(system, value, b, begin, end):
        """Whether zero is the exact answer for a chunk, which no relative tolerance finds from another guess."""
        something = 0
        for i in range(cuda.threadIdx.x, value.shape[2], THREADS):
            if carry_into(system, value, b, end - 1 if adjoint else begin, i) != 0:
                something = 1
            for t in range(begin, end):
                if system.source[b, t, i] != 0:
                    something = 1
        return cuda.syncthreads_or(np.int32(something)) == 0

    @cuda.jit
    def kernel(system, params, scratch, report, start, chunk, stop):
        parts = cuda.shared.array(0, float64)
        value, b = scratch.value, cuda.blockIdx.x
        batch, steps, dim = value.shape
        if b >= batch:
            return
        d, mixed, work = scratch.d[b], scratch.mixed[b], scratch.work[b]
        chunks = report.counts.shape[1]
        worst, scale, status = 0.0, 0.0, CONVERGED
        for n in range(chunks):
            c = chunks - 1 - n if adjoint else n
            begin = c * chunk
            end = min(begin + chunk, steps)
            late = (
                1 if adjoint else 0
            )  # an error carried into step t of the adjoint is multiplied by lam_{t+1}
            share = tolerance_share(system.lam, b, begin + late, end + late, chunks, parts)
            zero = start == COLD
            if start == GUESS:
                zero = nothing_comes_in(system, value, b, begin, end)
            if zero:
                for t in range(begin, end):
                    for i in range(cuda.threadIdx.x, dim, THREADS):
                        value[b, t, i] = 0
            count, change, before, converged = 0, 0.0, scale, False
            while not converged and math.isfinite(change) and count < stop.max_iter:
                rows(system, value, b, begin, end, d)
                cuda.syncthreads()
                mix(params, b, begin, end, d, mixed, work, parts)
                cuda.syncthreads()
                change, size = sweep(system, value, b, begin, end, d, mixed, stop.damping)
                change, size = block_largest(change, parts), block_largest(size, parts)
                count += 1
                scale = size if size > before else before
                tolerance = share * (stop.atol + stop.rtol * scale)
                tolerance = max(tolerance, 4 * stop.eps * scale)
                converged = math.isfinite(change) and change <= tolerance
            worst = larger(worst, change)
            if not converged:
                status = max(status, MAX_ITER if math.isfinite(change) else DIVERGED)
            if cuda.threadIdx.x == 0:
                report.counts[b, c] = count
        if cuda.threadIdx.x == 0:
            report.change[b, 0], report.scale[b, 0], report.state[b, 0] = worst, scale, status

    return kernel


# What became of each sequence


@cuda.jit
def summarise(report, fields, solved, direct, eps, tiny):
    """Residual, iterations and status of each sequence. One that went wrong has its inputs, `fields`, looked through.

    Fields are ``(B, n)`` arrays, or ``(1, n)`` where they are everybody's. The twin of kernels/report.cu.
    """
    parts = cuda.shared.array(0, float64)
    b = cuda.blockIdx.x
    batch, chunks = report.counts.shape
    if b >= batch:
        return
    most = 0
    for c in range(cuda.threadIdx.x, chunks, THREADS):
        count = 1 if direct else report.counts[b, c]
        solved.chunk_iterations[b, c] = count
        most = max(most, count)
    most = block_largest(most, parts)
    status = report.state[b, 0]
    if status in (DIVERGED, ILL_CONDITIONED):
        bad = 0
        for k in range(len(fields)):
            field = fields[k]
            row = min(b, field.shape[0] - 1)
            for n in range(cuda.threadIdx.x, field.shape[1], THREADS):
                if not math.isfinite(field[row, n]):
                    bad = 1
        if cuda.syncthreads_or(np.int32(bad)) != 0:
            status = NONFINITE_INPUT
    if cuda.threadIdx.x == 0:
        solved.iterations[b] = most
        solved.status[b] = status
        if direct:
            solved.residual[b] = eps / report.rcond[b, 0]
        else:
            solved.residual[b] = report.change[b, 0] / max(report.scale[b, 0], tiny)
