"""Sequence mixing: the diagonal scan and Mamba's selective scan, values and cotangents.

Section 1 of docs/mathematics.md. Loops over time, a line for each term of the equation.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["linear_scan", "linear_scan_vjp", "selective_scan", "selective_scan_vjp", "sum_to"]

Array: TypeAlias = NDArray[np.floating[Any]]


def sum_to(array: Array, shape: tuple[int, ...]) -> Array:
    """Sum ``array`` over the axes along which an array of ``shape`` was broadcast to it.

    The cotangent of broadcasting: a cotangent has the shape of its primal.

    Parameters
    ----------
    array : (..., *shape) array, or one to which ``shape`` broadcasts
    shape : tuple of int

    Returns
    -------
    array of ``shape``

    Examples
    --------
    >>> sum_to(np.ones((4, 3, 2)), (3, 1))
    array([[8.],
           [8.],
           [8.]])
    """
    array = array.sum(axis=tuple(range(array.ndim - len(shape))))
    stretched = tuple(axis for axis, size in enumerate(shape) if size == 1 and array.shape[axis] != 1)
    return np.asarray(array.sum(axis=stretched, keepdims=True))


def linear_scan(lam: Array, x: Array, initial: Array | None = None, reverse: bool = False) -> Array:
    """Diagonal linear recurrence ``h_t = lam_t * h_{t-1} + x_t`` with ``h_0 = initial``.

    Section 1 of docs/mathematics.md. With ``reverse`` time runs backwards, ``h_t = lam_t * h_{t+1} + x_t``,
    and ``initial`` enters after the last step.

    Parameters
    ----------
    lam, x : (..., T, D) arrays, broadcast against each other
    initial : (..., D) array, optional
        Zeros if left out.
    reverse : bool

    Returns
    -------
    h : (..., T, D) array

    Examples
    --------
    >>> linear_scan(np.full((3, 1), 0.5), np.ones((3, 1))).ravel()
    array([1.  , 1.5 , 1.75])
    """
    state = np.zeros(x.shape[-1], x.dtype) if initial is None else initial
    full = np.broadcast_shapes(lam.shape, x.shape, (*state.shape[:-1], 1, state.shape[-1]))
    lam, x = np.broadcast_to(lam, full), np.broadcast_to(x, full)
    h = np.empty(full, np.result_type(lam, x, state))
    steps = range(full[-2])
    for t in reversed(steps) if reverse else steps:
        state = lam[..., t, :] * state + x[..., t, :]
        h[..., t, :] = state
    return h


def preceding(h: Array, initial: Array | None = None, reverse: bool = False) -> Array:
    """The state each step starts from, ``h_{t-1}`` with ``h_0 = initial``; with ``reverse``, ``h_{t+1}``."""
    before = np.zeros_like(h)
    if h.shape[-2] == 0:
        return before
    if reverse:
        before[..., :-1, :] = h[..., 1:, :]
    else:
        before[..., 1:, :] = h[..., :-1, :]
    if initial is not None:
        before[..., -1 if reverse else 0, :] = initial
    return before


def following(lam: Array) -> Array:
    """``lam_{t+1}``, which the adjoint's scan multiplies with; zero after the last step."""
    return preceding(lam, reverse=True)


def preceding_cotangent(lam: Array, s: Array, reverse: bool = False) -> Array:
    """Cotangent of the state before the first step, ``lam_1 * s_1``; zero if there is no step."""
    if s.shape[-2] == 0:
        return np.zeros((*s.shape[:-2], s.shape[-1]), s.dtype)
    first = -1 if reverse else 0
    return np.broadcast_to(lam, s.shape)[..., first, :] * s[..., first, :]


def linear_scan_vjp(
    lam: Array, h: Array, initial: Array | None, reverse: bool, hbar: Array
) -> tuple[Array, Array, Array]:
    """Cotangents of `linear_scan` at its output ``h``.

    Section 1 of docs/mathematics.md: ``s_t = hbar_t + lam_{t+1} * s_{t+1}``, then ``x_bar_t = s_t``,
    ``lam_bar_t = s_t * h_{t-1}`` and ``initial_bar = lam_1 * s_1``. With ``reverse``, all of it backwards in
    time.

    Parameters
    ----------
    lam : (..., T, D) array
    h : (..., T, D) array
        What `linear_scan` returned.
    initial : (..., D) array or None
    reverse : bool
        As given to `linear_scan`.
    hbar : (..., T, D) array
        Cotangent of ``h``.

    Returns
    -------
    lam_bar : array of the shape of ``lam``
    x_bar : array of the shape of ``h``
    initial_bar : array of the shape of ``initial``; (..., D), that of one step of ``h``, if there was none

    Examples
    --------
    >>> lam, x = np.full((3, 1), 0.5), np.ones((3, 1))
    >>> lam_bar, x_bar, initial_bar = linear_scan_vjp(lam, linear_scan(lam, x), None, False, np.ones((3, 1)))
    >>> lam_bar.ravel(), x_bar.ravel(), initial_bar
    (array([0. , 1.5, 1.5]), array([1.75, 1.5 , 1.  ]), array([0.875]))
    """
    full = np.broadcast_to(lam, h.shape)
    after = preceding(full, reverse=not reverse)
    s = linear_scan(after, np.broadcast_to(hbar, h.shape), reverse=not reverse)
    lam_bar = s * preceding(h, initial, reverse)
    initial_bar = preceding_cotangent(full, s, reverse)
    shape = initial_bar.shape if initial is None else initial.shape
    return sum_to(lam_bar, lam.shape), s, sum_to(initial_bar, shape)


def _per_channel(A: Array, delta: Array, dim: int, size: int) -> tuple[Array, Array]:
    """Mamba-2's scalar decay per head written out as Mamba's: ``A (D, N)`` and ``delta (..., T, D)``."""
    if A.ndim == 2:
        return A, delta
    width = dim // A.shape[0]
    return np.repeat(A, width)[:, None] * np.ones((1, size), A.dtype), np.repeat(delta, width, axis=-1)


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

    Section 1 of docs/mathematics.md. A one-dimensional ``A`` selects the Mamba-2 form: one decay per head,
    and channel ``d`` belongs to head ``d // (D / H)``.

    Parameters
    ----------
    x : (..., T, D) array
    delta : (..., T, D) array, (..., T, H) in the Mamba-2 form
    A : (D, N) array, (H,) in the Mamba-2 form
    B, C : (..., T, N) arrays
    D : (D,) array, optional
        Skip connection.
    initial : (..., D, N) array, optional
        Zeros if left out.

    Returns
    -------
    y : (..., T, D) array
    last_state : (..., D, N) array

    Examples
    --------
    >>> ones = np.ones((2, 1))
    >>> y, last = selective_scan(ones, ones, np.log(0.5) * ones[:1], ones, ones)
    >>> y.ravel(), last
    (array([1. , 1.5]), array([[1.5]]))
    """
    y, states = _selective_states(x, delta, A, B, C, D, initial)
    return y, states[-1].copy()


def _selective_states(
    x: Array, delta: Array, A: Array, B: Array, C: Array, D: Array | None, initial: Array | None
) -> tuple[Array, list[Array]]:
    """The output of `selective_scan`, and the states ``H_0 .. H_T``."""
    steps, dim = x.shape[-2:]
    size = B.shape[-1]
    lead = np.broadcast_shapes(x.shape[:-2], delta.shape[:-2], B.shape[:-2], C.shape[:-2])
    if initial is not None:
        lead = np.broadcast_shapes(lead, initial.shape[:-2])
    dtype = np.result_type(*(a for a in (x, delta, A, B, C, D, initial) if a is not None))
    A, delta = _per_channel(A, delta, dim, size)
    state = np.zeros((*lead, dim, size), dtype)
    if initial is not None:
        state[...] = initial
    y = np.empty((*lead, steps, dim), dtype)
    states = [state]
    for t in range(steps):
        decay = np.exp(delta[..., t, :, None] * A)
        state = decay * state + (delta[..., t, :] * x[..., t, :])[..., None] * B[..., t, None, :]
        y[..., t, :] = (state * C[..., t, None, :]).sum(axis=-1)
        states.append(state)
    if D is not None:
        y += D * x
    return y, states


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
    ``H_bar_t = ybar_t C_t^T + exp(delta_{t+1} A) * H_bar_{t+1}``, and ``last_bar`` enters at the last step.

    Parameters
    ----------
    x, delta, A, B, C, D, initial
        As given to `selective_scan`.
    ybar : (..., T, D) array
        Cotangent of ``y``.
    last_bar : (..., D, N) array or None
        Cotangent of ``last_state``; None is zero.

    Returns
    -------
    x_bar, delta_bar, A_bar, B_bar, C_bar : arrays, each of the shape of its primal
    D_bar : (D,) array, or None without ``D``
    initial_bar : array of the shape of ``initial``; (..., D, N) if there was none

    Examples
    --------
    >>> ones = np.ones((2, 1))
    >>> A = np.log(0.5) * ones[:1]
    >>> bars = selective_scan_vjp(ones, ones, A, ones, ones, None, None, ones, None)
    >>> bars[0].ravel(), bars[-1]
    (array([1.5, 1. ]), array([[0.75]]))
    """
    dim, size = x.shape[-1], B.shape[-1]
    _, states = _selective_states(x, delta, A, B, C, D, initial)
    rate, step = _per_channel(A, delta, dim, size)
    lead, steps = states[0].shape[:-2], x.shape[-2]
    dtype = np.result_type(states[0], ybar)
    x_bar, step_bar = np.zeros((*lead, steps, dim), dtype), np.zeros((*lead, steps, dim), dtype)
    B_bar, C_bar = np.zeros((*lead, steps, size), dtype), np.zeros((*lead, steps, size), dtype)
    rate_bar = np.zeros((*lead, dim, size), dtype)
    state_bar = np.zeros((*lead, dim, size), dtype)
    if last_bar is not None:
        state_bar += last_bar
    for t in reversed(range(steps)):
        yb, xt, dt = ybar[..., t, :], x[..., t, :], step[..., t, :]
        # y_t = H_t C_t
        C_bar[..., t, :] = (yb[..., None] * states[t + 1]).sum(axis=-2)
        state_bar = state_bar + yb[..., None] * C[..., t, None, :]
        # H_t = decay * H_{t-1} + (delta_t x_t) B_t^T
        decay = np.exp(dt[..., None] * rate)
        exponent_bar = state_bar * states[t] * decay
        input_bar = (state_bar * B[..., t, None, :]).sum(axis=-1)
        B_bar[..., t, :] = (state_bar * (dt * xt)[..., None]).sum(axis=-2)
        x_bar[..., t, :] = input_bar * dt
        step_bar[..., t, :] = input_bar * xt + (exponent_bar * rate).sum(axis=-1)
        rate_bar += exponent_bar * dt[..., None]
        state_bar = decay * state_bar
    D_bar = None
    if D is not None:
        x_bar += D * ybar
        D_bar = sum_to(ybar * x, D.shape)
    if A.ndim == 1:  # back from channels to heads
        heads = A.shape[0]
        rate_bar = rate_bar.reshape(*lead, heads, dim // heads * size).sum(axis=-1)
        step_bar = step_bar.reshape(*lead, steps, heads, dim // heads).sum(axis=-1)
    return (
        sum_to(x_bar, x.shape),
        sum_to(step_bar, delta.shape),
        sum_to(rate_bar, A.shape),
        sum_to(B_bar, B.shape),
        sum_to(C_bar, C.shape),
        D_bar,
        sum_to(state_bar, state_bar.shape if initial is None else initial.shape),
    )
