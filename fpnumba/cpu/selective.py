"""Mamba's selective scan in Numba, value and cotangents; `fpnumba.cpu.scan` has its doors.

Section 1 of docs/mathematics.md. The state of a block of channels, ``(N, width)``, stays in the first-level cache while
time passes. The cotangents need the states again, backwards: those at the boundaries of chunks are kept, and a chunk's
own are computed anew, so that no array ``(T, D, N)`` ever exists.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fpnumba.cpu import _threads, memory
from fpnumba.cpu._exp import exp
from fpnumba.cpu._jit import entry, kernel

__all__ = ["selective_scan", "selective_scan_vjp"]

Array: TypeAlias = NDArray[np.floating[Any]]

# Numbers of state in a block of channels: two blocks, or a chunk of states of the smaller, fit the nearest caches.
STATE_NUMBERS, CHUNK_NUMBERS = 4096, 2048
CHUNK = 16


@kernel
def step_rows(b, t, begin, width, x, delta, rates, heads, step, drive, decay):
    """What a step needs for each channel: ``delta``, ``delta * x`` and, in the Mamba-2 form, the decay."""
    if heads == 0:
        for i in range(width):
            d = np.uintp(begin + i)
            step[i] = delta[b, t, d]
            drive[i] = delta[b, t, d] * x[b, t, d]
        return
    size = x.shape[2] // heads  # channels per head
    i = 0
    while i < width:
        head = (begin + i) // size
        until = min(width, (head + 1) * size - begin)
        value = delta[b, t, head]
        factor = exp(value * rates[0, head])
        for k in range(until - i):
            d = np.uintp(i + k)
            step[d] = value
            decay[d] = factor
            drive[d] = value * x[b, t, np.uintp(begin) + d]
        i = until


@kernel
def advance(b, t, begin, width, rates, heads, B, state, step, drive, decay):
    """``H_t = exp(delta_t A) * H_{t-1} + (delta_t x_t) B_t^T``"""
    for n in range(B.shape[2]):
        into = B[b, t, n]
        if heads == 0:
            for i in range(width):
                state[n, i] = exp(step[i] * rates[n, np.uintp(begin + i)]) * state[n, i] + into * drive[i]
        else:
            for i in range(width):
                state[n, i] = decay[i] * state[n, i] + into * drive[i]


@kernel
def advance_and_read(b, t, begin, width, rates, heads, B, C, state, step, drive, decay, out):
    """`advance`, and ``out += H_t C_t``."""
    for n in range(B.shape[2]):
        into, weight = B[b, t, n], C[b, t, n]
        if heads == 0:
            for i in range(width):
                factor = exp(step[i] * rates[n, np.uintp(begin + i)])
                value = factor * state[n, i] + into * drive[i]
                state[n, i] = value
                out[i] += weight * value
        else:
            for i in range(width):
                value = decay[i] * state[n, i] + into * drive[i]
                state[n, i] = value
                out[i] += weight * value


@kernel
def advance_and_keep(b, t, begin, width, rates, heads, B, before, decays, k, step, drive, decay):
    """`advance` from ``before[k]`` to ``before[k + 1]``, keeping what multiplied the state, if it differs by state."""
    for n in range(B.shape[2]):
        into = B[b, t, n]
        if heads == 0:
            for i in range(width):
                factor = exp(step[i] * rates[n, np.uintp(begin + i)])
                decays[k, n, i] = factor
                before[k + 1, n, i] = factor * before[k, n, i] + into * drive[i]
        else:
            for i in range(width):
                before[k + 1, n, i] = decay[i] * before[k, n, i] + into * drive[i]


@kernel
def first_state(b, begin, width, initial, state):
    for n in range(state.shape[0]):
        for i in range(width):
            state[n, i] = initial[b, begin + i, n]


@entry
def scan_states(first, last, x, delta, rates, heads, B, C, skip, initial, y, last_state, groups):
    """Tasks are sequences times groups of channel blocks."""
    _, steps, dim = x.shape
    size = B.shape[2]
    widest = block_width(dim, size, STATE_NUMBERS)
    state = np.empty((size, widest), x.dtype)
    step, drive, decay, out = (
        np.empty(widest, x.dtype), np.empty(widest, x.dtype), np.empty(widest, x.dtype), np.empty(widest, x.dtype)
    )  # fmt: skip
    blocks = -(-dim // widest)
    for task in range(first, last):
        b, group = task // groups, task % groups
        for block in range(blocks * group // groups, blocks * (group + 1) // groups):
            begin = block * widest
            width = min(widest, dim - begin)
            first_state(b, begin, width, initial, state)
            for t in range(steps):
                step_rows(b, t, begin, width, x, delta, rates, heads, step, drive, decay)
                for i in range(width):
                    d = np.uintp(begin + i)
                    out[i] = skip[d] * x[b, t, d]
                advance_and_read(b, t, begin, width, rates, heads, B, C, state, step, drive, decay, out)
                for i in range(width):
                    y[b, t, np.uintp(begin + i)] = out[i]
            for n in range(size):
                for i in range(width):
                    last_state[b, begin + i, n] = state[n, i]


@kernel
def block_width(dim, size, numbers):
    """Channels of a block: whole vectors, and few enough for the cache."""
    return max(1, min(dim, max(16, min(128, numbers // max(size, 1) // 16 * 16))))


@entry
def pull_states(
    first, last, x, delta, rates, heads, B, C, skip, initial, ybar, last_bar,
    x_bar, step_bar, rate_bar, B_bar, C_bar, skip_bar, initial_bar, groups,
):  # fmt: skip
    """Tasks are sequences times groups of channel blocks. ``B_bar`` and ``C_bar`` have one part per group.

    ``H_bar_t = ybar_t C_t^T + exp(delta_{t+1} A) * H_bar_{t+1}``, chunk after chunk backwards.
    """
    _, steps, dim = x.shape
    size = B.shape[2]
    widest = block_width(dim, size, CHUNK_NUMBERS)
    chunks = -(-steps // CHUNK)
    state, bar = np.empty((size, widest), x.dtype), np.empty((size, widest), x.dtype)
    kept = np.empty((chunks, size, widest), x.dtype)
    before = np.empty((CHUNK + 1, size, widest), x.dtype)
    decays = np.empty((1 if heads else CHUNK, size, widest), x.dtype)
    step, drive, decay = np.empty(widest, x.dtype), np.empty(widest, x.dtype), np.empty(widest, x.dtype)
    drive_bar, exponent_bar = np.empty(widest, x.dtype), np.empty(widest, x.dtype)
    zero = x.dtype.type(0)
    blocks = -(-dim // widest)
    for task in range(first, last):
        b, group = task // groups, task % groups
        for block in range(blocks * group // groups, blocks * (group + 1) // groups):
            begin = block * widest
            width = min(widest, dim - begin)
            first_state(b, begin, width, initial, state)
            for c in range(chunks):
                for n in range(size):
                    for i in range(width):
                        kept[c, n, i] = state[n, i]
                for t in range(c * CHUNK, min((c + 1) * CHUNK, steps) if c + 1 < chunks else c * CHUNK):
                    step_rows(b, t, begin, width, x, delta, rates, heads, step, drive, decay)
                    advance(b, t, begin, width, rates, heads, B, state, step, drive, decay)
            first_state(b, begin, width, last_bar, bar)
            for back in range(chunks):
                c = chunks - 1 - back
                start = c * CHUNK
                length = min(CHUNK, steps - start)
                for n in range(size):
                    for i in range(width):
                        before[0, n, i] = kept[c, n, i]
                for k in range(length):
                    step_rows(b, start + k, begin, width, x, delta, rates, heads, step, drive, decay)
                    advance_and_keep(
                        b, start + k, begin, width, rates, heads, B, before, decays, k, step, drive, decay
                    )
                for turn in range(length):
                    k = length - 1 - turn
                    t = start + k
                    step_rows(b, t, begin, width, x, delta, rates, heads, step, drive, decay)
                    for i in range(width):
                        drive_bar[i] = zero
                        exponent_bar[i] = zero
                    for n in range(size):
                        out_of, into = C[b, t, n], B[b, t, n]
                        c_bar, b_bar = zero, zero
                        if heads == 0:
                            for i in range(width):
                                d = np.uintp(begin + i)
                                y_bar = ybar[b, t, d]
                                c_bar += y_bar * before[k + 1, n, i]
                                value = bar[n, i] + y_bar * out_of
                                b_bar += value * drive[i]
                                drive_bar[i] += value * into
                                value *= decays[k, n, i]
                                bar[n, i] = value
                                value *= before[k, n, i]
                                exponent_bar[i] += value * rates[n, d]
                                rate_bar[b, n, d] += value * step[i]
                        else:
                            for i in range(width):
                                y_bar = ybar[b, t, np.uintp(begin + i)]
                                c_bar += y_bar * before[k + 1, n, i]
                                value = bar[n, i] + y_bar * out_of
                                b_bar += value * drive[i]
                                drive_bar[i] += value * into
                                value *= decay[i]
                                bar[n, i] = value
                                exponent_bar[i] += value * before[k, n, i]
                        C_bar[group, b, t, n] += c_bar
                        B_bar[group, b, t, n] += b_bar
                    if heads == 0:
                        for i in range(width):
                            d = np.uintp(begin + i)
                            x_bar[b, t, d] = drive_bar[i] * step[i] + skip[d] * ybar[b, t, d]
                            step_bar[b, t, d] = drive_bar[i] * x[b, t, d] + exponent_bar[i]
                            skip_bar[b, d] += ybar[b, t, d] * x[b, t, d]
                    else:
                        per_head = dim // heads
                        for i in range(width):
                            d = np.uintp(begin + i)
                            rate = rates[0, (begin + i) // per_head]
                            x_bar[b, t, d] = drive_bar[i] * step[i] + skip[d] * ybar[b, t, d]
                            step_bar[b, t, d] = drive_bar[i] * x[b, t, d] + exponent_bar[i] * rate
                            rate_bar[b, 0, d] += exponent_bar[i] * step[i]
                            skip_bar[b, d] += ybar[b, t, d] * x[b, t, d]
            for n in range(size):
                for i in range(width):
                    initial_bar[b, begin + i, n] = bar[n, i]


def _groups(batch: int, dim: int, size: int) -> int:
    """Groups of channel blocks, where there are fewer sequences than threads."""
    if batch == 0 or batch >= _threads.count():
        return 1
    return max(1, min(-(-_threads.count() // batch), dim // 16))


def _rates(A: Array) -> tuple[Array, int]:
    """``A`` with channels last, ``(N, D)`` or ``(1, H)``, and the number of heads, 0 in Mamba's form."""
    if A.ndim == 1:
        return A[None], A.shape[0]
    return np.ascontiguousarray(A.T), 0


def selective_scan(
    x: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    initial: Array | None = None,
) -> tuple[Array, Array]:
    """Mamba's scan, ``H_t = exp(delta_t A) * H_{t-1} + (delta_t x_t) B_t^T``, ``y_t = H_t C_t + D * x_t``.

    Section 1 of docs/mathematics.md. A one-dimensional `A` selects the Mamba-2 form: one decay per head, channel ``d``
    belonging to head ``d // (D / H)``.

    Parameters
    ----------
    x : (B, T, D) C-contiguous array, float32 or float64
    delta : (B, T, D) array, (B, T, H) in the Mamba-2 form
    A : (D, N) array, (H,) in the Mamba-2 form
    B, C : (B, T, N) arrays
    D : (D,) array, optional
        Skip connection.
    initial : (B, D, N) array, optional
        Zeros if left out.

    Returns
    -------
    y : (B, T, D) array
    last_state : (B, D, N) array

    Examples
    --------
    >>> from fpnumba.cpu.scan import selective_scan
    >>> ones = np.ones((1, 2, 1))
    >>> y, last = selective_scan(ones, ones, np.log(0.5) * ones[0, :1], ones, ones)
    >>> y.ravel(), last
    (array([1. , 1.5]), array([[[1.5]]]))
    """
    batch, _, dim = x.shape
    size = B.shape[-1]
    y = memory.empty(x.shape, x.dtype)
    last_state = np.empty((batch, dim, size), x.dtype)
    rates, heads = _rates(A)
    skip = np.zeros(dim, x.dtype) if D is None else D
    initial = np.zeros(last_state.shape, x.dtype) if initial is None else initial
    groups = _groups(batch, dim, size)
    arrays = (x, delta, rates, heads, B, C, skip, initial, y, last_state)
    _threads.run(scan_states, batch * groups, 8 * x.size * size, *arrays, groups)
    return y, last_state


def selective_scan_vjp(
    x: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    initial: Array | None,
    ybar: Array,
    last_bar: Array | None,
) -> tuple[Array, Array, Array, Array, Array, Array | None, Array]:
    """Cotangents of `selective_scan`: the state's cotangent is a scan backwards in time.

    Section 1 of docs/mathematics.md, transposed:
    ``H_bar_t = ybar_t C_t^T + exp(delta_{t+1} A) * H_bar_{t+1}``, and `last_bar` enters at the last step.

    Parameters
    ----------
    x, delta, A, B, C, D, initial
        As given to `selective_scan`.
    ybar : (B, T, D) array
        Cotangent of ``y``.
    last_bar : (B, D, N) array or None
        Cotangent of ``last_state``; None is zero.

    Returns
    -------
    x_bar, delta_bar, A_bar, B_bar, C_bar : arrays, each of the shape of its primal
    D_bar : (D,) array, or None without `D`
    initial_bar : (B, D, N) array

    Examples
    --------
    >>> from fpnumba.cpu.scan import selective_scan_vjp
    >>> ones = np.ones((1, 2, 1))
    >>> bars = selective_scan_vjp(ones, ones, np.log(0.5) * ones[0, :1], ones, ones, None, None, ones, None)
    >>> bars[0].ravel(), bars[-1]
    (array([1.5, 1. ]), array([[[0.75]]]))
    """
    batch, steps, dim = x.shape
    size = B.shape[-1]
    rates, heads = _rates(A)
    skip = np.zeros(dim, x.dtype) if D is None else D
    states = (batch, dim, size)
    initial = np.zeros(states, x.dtype) if initial is None else initial
    last_bar = np.zeros(states, x.dtype) if last_bar is None else last_bar
    groups = _groups(batch, dim, size)
    x_bar, step_bar = memory.empty(x.shape, x.dtype), memory.empty(x.shape, x.dtype)
    rate_bar = np.zeros((batch, 1 if heads else size, dim), x.dtype)
    B_bar, C_bar = (np.zeros((groups, *B.shape), x.dtype) for _ in range(2))
    skip_bar, initial_bar = np.zeros((batch, dim), x.dtype), np.empty(states, x.dtype)
    inputs = (x, delta, rates, heads, B, C, skip, initial, ybar, last_bar)
    outputs = (x_bar, step_bar, rate_bar, B_bar, C_bar, skip_bar, initial_bar)
    _threads.run(pull_states, batch * groups, 16 * x.size * size, *inputs, *outputs, groups)
    if heads:
        delta_bar = step_bar.reshape(batch, steps, heads, dim // heads).sum(axis=-1)
        A_bar = rate_bar.reshape(batch, heads, dim // heads).sum(axis=(0, 2))
    else:
        delta_bar, A_bar = step_bar, np.ascontiguousarray(rate_bar.sum(axis=0).T)
    D_bar = None if D is None else skip_bar.sum(axis=0)
    return x_bar, delta_bar, A_bar, B_bar.sum(axis=0), C_bar.sum(axis=0), D_bar, initial_bar
