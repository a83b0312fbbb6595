"""Channel mixing in Numba: ``Q x``, ``Q^T y`` and cotangents; section 2 of docs/mathematics.md.

A mixer is ``(kind, params)``, see `fpnumba.reference.mixers`; here every parameter has the axes ``(B, T, ...)``, except
that of "fixed". Dense forms and bounds are LAPACK's work and come from the reference room.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fpnumba.cpu import _threads, memory
from fpnumba.cpu._jit import entry
from fpnumba.cpu._kinds import BLOCK, as_mixer, block_size, mix, mix_transpose, pull, work_size
from fpnumba.reference.mixers import contraction_bound, to_dense

__all__ = ["apply", "apply_transpose", "contraction_bound", "cotangent", "to_dense"]

Array: TypeAlias = NDArray[np.floating[Any]]
Params: TypeAlias = tuple[Array, ...]


@entry
def _apply(first, last, p, transposed, x, y, block, work_size, segments):
    """Tasks are sequences times segments of time."""
    _, steps, dim = x.shape
    d = np.zeros((BLOCK, dim), x.dtype)
    out = np.empty((BLOCK, dim), x.dtype)
    work = np.empty(work_size, x.dtype)
    for task in range(first, last):
        b, j = task // segments, task % segments
        end = steps * (j + 1) // segments
        for t in range(steps * j // segments, end, block):
            n = min(block, end - t)
            for k in range(n):
                for i in range(dim):
                    d[k, i] = x[b, t + k, i]
            if transposed:
                mix_transpose(p, b, t, n, d, out, work)
            else:
                mix(p, b, t, n, d, out, work)
            for k in range(n):
                for i in range(dim):
                    y[b, t + k, i] = out[k, i]


@entry
def _cotangent(first, last, p, bar, x, ybar, block, work_size, segments):
    """Tasks are sequences times segments of time."""
    _, steps, dim = x.shape
    rows = np.zeros((3, BLOCK, dim), x.dtype)
    work = np.empty(work_size, x.dtype)
    for task in range(first, last):
        b, j = task // segments, task % segments
        end = steps * (j + 1) // segments
        for t in range(steps * j // segments, end, block):
            n = min(block, end - t)
            for k in range(n):
                for i in range(dim):
                    rows[0, k, i] = x[b, t + k, i]
                    rows[1, k, i] = ybar[b, t + k, i]
            pull(p, bar, b, t, n, rows[0], rows[1], rows[2], work)


def time_segments(batch: int, steps: int) -> int:
    """Pieces into which to cut the time of each sequence so that there is work for every thread."""
    if batch == 0:
        return 1
    return max(1, min(-(-4 * _threads.count() // batch), steps // 64))


def _applied(kind: Any, params: Params, x: Array, transposed: bool) -> Array:
    p = as_mixer(kind, params)
    y = memory.empty(x.shape, x.dtype)
    batch, steps, _ = x.shape
    segments = time_segments(batch, steps)
    work = sum(a.size for a in params) if kind != "fixed" else x.size * x.shape[-1]
    _threads.run(_apply, batch * segments, work, p, transposed, x, y, block_size(p), work_size(p), segments)
    return y


def apply(kind: Any, params: Params, x: Array) -> Array:
    """``Q_t x_t`` for every step.

    Section 2 of docs/mathematics.md.

    Parameters
    ----------
    kind : str or CustomKind
    params : tuple of arrays
        As in `fpnumba.reference.mixers`, ``(B, T, ...)``; C-contiguous and of the dtype of `x`.
    x : (B, T, D) array

    Returns
    -------
    (B, T, D) array

    Raises
    ------
    ValueError
        If `kind` is a name of no mixer.

    Examples
    --------
    >>> from fpnumba.cpu.mixers import apply
    >>> apply("dplr", (np.array([[[[1.0, 0.0]]]]), np.array([[[2.0]]])), np.array([[[3.0, 4.0]]]))
    array([[[-3.,  4.]]])
    """
    return _applied(kind, params, x, False)


def apply_transpose(kind: Any, params: Params, y: Array) -> Array:
    """``Q_t^T y_t`` for every step.

    Section 2 of docs/mathematics.md.

    Parameters
    ----------
    kind, params
        As for `apply`.
    y : (B, T, D) array

    Returns
    -------
    (B, T, D) array

    Raises
    ------
    ValueError
        As `apply`.

    Examples
    --------
    >>> from fpnumba.cpu.mixers import apply_transpose
    >>> apply_transpose("fixed", (np.array([[0.0, 1.0], [2.0, 0.0]]),), np.array([[[3.0, 4.0]]]))
    array([[[8., 3.]]])
    """
    return _applied(kind, params, y, True)


def empty_bars(kind: Any, params: Params) -> Params:
    """Memory for the cotangents of `params`."""
    if kind == "fixed":
        return tuple(np.empty_like(p) for p in params)
    return tuple(memory.empty(p.shape, p.dtype) for p in params)


def shared_cotangent(x: Array, ybar: Array) -> Array:
    """``q_bar = sum_bt ybar x^T`` of a matrix that all steps share."""
    dim = x.shape[-1]
    return np.asarray(ybar.reshape(-1, dim).T @ x.reshape(-1, dim))


def cotangent(kind: Any, params: Params, x: Array, ybar: Array) -> Params:
    """Cotangents of the parameters of ``y = Q x``.

    Section 6 of docs/mathematics.md.

    Parameters
    ----------
    kind, params
        As for `apply`.
    x, ybar : (B, T, D) arrays

    Returns
    -------
    tuple of arrays, each of the shape of its parameter

    Raises
    ------
    ValueError
        As `apply`.

    Examples
    --------
    >>> from fpnumba.cpu.mixers import cotangent
    >>> cotangent("fixed", (np.eye(2),), np.array([[[1.0, 2.0]]]), np.array([[[3.0, 4.0]]]))
    (array([[3., 6.],
           [4., 8.]]),)
    """
    if kind == "fixed":
        return (shared_cotangent(x, ybar),)
    p, bars = as_mixer(kind, params), empty_bars(kind, params)
    batch, steps, _ = x.shape
    segments = time_segments(batch, steps)
    work = sum(a.size for a in params)
    _threads.run(
        _cotangent,
        batch * segments,
        work,
        p,
        as_mixer(kind, bars),
        x,
        ybar,
        block_size(p),
        work_size(p),
        segments,
    )
    return bars
