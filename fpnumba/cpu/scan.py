"""Sequence mixing in Numba: the diagonal scan and Mamba's selective scan, values and cotangents.

Section 1 of docs/mathematics.md. Memory traffic of `linear_scan`: ``lam`` and ``x`` read once, ``h`` written once.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fpnumba.cpu import _threads, memory
from fpnumba.cpu._jit import STRIP_BYTES, entry, kernel, stream_end, stream_row, streams
from fpnumba.cpu.selective import selective_scan, selective_scan_vjp

__all__ = ["linear_scan", "linear_scan_vjp", "selective_scan", "selective_scan_vjp"]

Array: TypeAlias = NDArray[np.floating[Any]]


@entry
def _scan(first, last, lam, x, initial, h, reverse, blocks, stream):
    """Tasks are sequences times channel blocks."""
    _, steps, dim = x.shape
    strip = STRIP_BYTES // x.itemsize
    state = np.empty(dim, x.dtype)
    for task in range(first, last):
        b, j = task // blocks, task % blocks
        begin, width = block_bounds(dim, blocks, j)
        strips = -(-width // strip)
        for i in range(width):
            d = np.uintp(begin + i)
            state[d] = initial[b, d]
        for k in range(steps):
            t = steps - 1 - k if reverse else k
            for n in range(strips):
                offset = (strips - 1 - n if reverse else n) * strip
                for i in range(min(strip, width - offset)):
                    d = np.uintp(begin + offset + i)
                    state[d] = lam[b, t, d] * state[d] + x[b, t, d]
            if stream:
                stream_row(h, (b * steps + t) * dim + begin, state, begin, width)
            else:
                for i in range(width):
                    d = np.uintp(begin + i)
                    h[b, t, d] = state[d]
    stream_end()


@entry
def _scan_vjp(first, last, lam, h, initial, hbar, lam_bar, x_bar, initial_bar, reverse, blocks, stream):
    """``s_t = hbar_t + lam_{t+1} s_{t+1}``; all three inputs read once, both results written once."""
    _, steps, dim = h.shape
    strip = STRIP_BYTES // h.itemsize
    state = np.empty(dim, h.dtype)  # lam_{t+1} s_{t+1}
    rows = np.empty((2, dim), h.dtype)
    for task in range(first, last):
        b, j = task // blocks, task % blocks
        begin, width = block_bounds(dim, blocks, j)
        strips = -(-width // strip)
        for i in range(width):
            state[np.uintp(begin + i)] = 0
        for k in range(steps):
            t = k if reverse else steps - 1 - k
            before = t + 1 if reverse else t - 1
            inside = 0 <= before < steps
            row = before if inside else t
            for n in range(strips):
                offset = (n if reverse else strips - 1 - n) * strip
                for i in range(min(strip, width - offset)):
                    d = np.uintp(begin + offset + i)
                    s = hbar[b, t, d] + state[d]
                    state[d] = lam[b, t, d] * s
                    rows[0, d] = s
                    rows[1, d] = s * (h[b, row, d] if inside else initial[b, d])
            at = (b * steps + t) * dim + begin
            if stream:
                stream_row(x_bar, at, rows, begin, width)
                stream_row(lam_bar, at, rows, dim + begin, width)
            else:
                for i in range(width):
                    d = np.uintp(begin + i)
                    x_bar[b, t, d] = rows[0, d]
                    lam_bar[b, t, d] = rows[1, d]
        for i in range(width):
            d = np.uintp(begin + i)
            initial_bar[b, d] = state[d]
    stream_end()


@kernel
def block_bounds(dim, blocks, j):
    """First channel of block `j`, and how many it has: whole cache lines, but for the last block."""
    width = -(-dim // blocks)
    width = -(-width // 16) * 16
    begin = min(j * width, dim)
    return begin, min(begin + width, dim) - begin


def channel_blocks(batch: int, dim: int) -> int:
    """Blocks into which to cut the channels so that there is work for every thread."""
    if batch == 0:
        return 1
    return max(1, min(-(-_threads.count() // batch), dim // 64))


def zeros_if_none(initial: Array | None, shape: tuple[int, ...], dtype: Any) -> Array:
    """``initial``, or zeros in its place."""
    return np.zeros(shape, dtype) if initial is None else initial


def linear_scan(lam: Array, x: Array, initial: Array | None = None, reverse: bool = False) -> Array:
    """Diagonal linear recurrence ``h_t = lam_t * h_{t-1} + x_t`` with ``h_0 = initial``.

    Section 1 of docs/mathematics.md. With `reverse` time runs backwards, ``h_t = lam_t * h_{t+1} + x_t``, and
    `initial` enters after the last step.

    Parameters
    ----------
    lam, x : (B, T, D) C-contiguous arrays of one dtype, float32 or float64
    initial : (B, D) array, optional
        Zeros if left out.
    reverse : bool

    Returns
    -------
    h : (B, T, D) array

    Examples
    --------
    >>> from fpnumba.cpu.scan import linear_scan
    >>> linear_scan(np.full((1, 3, 1), 0.5), np.ones((1, 3, 1))).ravel()
    array([1.  , 1.5 , 1.75])
    """
    batch, _, dim = x.shape
    h = memory.empty(x.shape, x.dtype)
    blocks = channel_blocks(batch, dim)
    initial = zeros_if_none(initial, (batch, dim), x.dtype)
    _threads.run(_scan, batch * blocks, x.size, lam, x, initial, h, reverse, blocks, streams(3 * h.nbytes, h))
    return h


def linear_scan_vjp(
    lam: Array, h: Array, initial: Array | None, reverse: bool, hbar: Array
) -> tuple[Array, Array, Array]:
    """Cotangents of `linear_scan` at its output `h`.

    Section 1 of docs/mathematics.md: ``s_t = hbar_t + lam_{t+1} * s_{t+1}``, then ``x_bar_t = s_t``,
    ``lam_bar_t = s_t * h_{t-1}`` and ``initial_bar = lam_1 * s_1``. With `reverse` all of time is turned round.

    Parameters
    ----------
    lam : (B, T, D) array
    h : (B, T, D) array
        What `linear_scan` returned.
    initial : (B, D) array or None
    reverse : bool
        As given to `linear_scan`.
    hbar : (B, T, D) array
        Cotangent of `h`.

    Returns
    -------
    lam_bar, x_bar : (B, T, D) arrays
    initial_bar : (B, D) array

    Examples
    --------
    >>> from fpnumba.cpu.scan import linear_scan, linear_scan_vjp
    >>> lam, x = np.full((1, 3, 1), 0.5), np.ones((1, 3, 1))
    >>> lam_bar, x_bar, initial_bar = linear_scan_vjp(lam, linear_scan(lam, x), None, False, np.ones((1, 3, 1)))
    >>> lam_bar.ravel(), x_bar.ravel(), initial_bar
    (array([0. , 1.5, 1.5]), array([1.75, 1.5 , 1.  ]), array([[0.875]]))
    """
    batch, _, dim = h.shape
    lam_bar, x_bar = memory.empty(h.shape, h.dtype), memory.empty(h.shape, h.dtype)
    initial_bar = np.empty((batch, dim), h.dtype)
    blocks = channel_blocks(batch, dim)
    initial = zeros_if_none(initial, (batch, dim), h.dtype)
    stream = streams(5 * h.nbytes, lam_bar, x_bar)
    arrays = (lam, h, initial, hbar, lam_bar, x_bar, initial_bar)
    _threads.run(_scan_vjp, batch * blocks, h.size, *arrays, reverse, blocks, stream)
    return lam_bar, x_bar, initial_bar
