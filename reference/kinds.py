"""The kinds of channel mixing, each with its equations: apply, transpose, cotangents, dense form.

Section 2 of docs/mathematics.md. The doors of the room are in `fpnumba.reference.mixers`, which says what
``params`` are; here vectors are ``(..., D)`` and every leading axis broadcasts.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.floating[Any]]
Params: TypeAlias = tuple[Array, ...]


def outer(a: Array, b: Array) -> Array:
    """``a b^T``."""
    return a[..., :, None] * b[..., None, :]


def matvec(matrix: Array, x: Array) -> Array:
    """``M x``."""
    y: Array = np.einsum("...ij,...j->...i", matrix, x)
    return y


def transpose(matrix: Array) -> Array:
    """``M^T``."""
    return np.swapaxes(matrix, -1, -2)


# One reflection, I - alpha u u^T: the brick of DPLR and Householder. u (..., D), alpha (...).


def reflect(u: Array, alpha: Array, x: Array) -> Array:
    """``x - alpha u (u . x)``; its own transpose."""
    y: Array = x - (alpha * (u * x).sum(axis=-1))[..., None] * u
    return y


def reflect_cotangent(u: Array, alpha: Array, x: Array, ybar: Array) -> tuple[Array, Array]:
    """``u_bar = -alpha ((u.x) ybar + (u.ybar) x)`` and ``alpha_bar = -(u.ybar) (u.x)``; section 6."""
    ux, uy = (u * x).sum(axis=-1), (u * ybar).sum(axis=-1)
    return -(alpha * ux)[..., None] * ybar - (alpha * uy)[..., None] * x, -uy * ux


# DPLR: Q = I - sum_i alpha_i u_i u_i^T


def dplr_apply(params: Params, x: Array) -> Array:
    """``Q x = x - sum_i alpha_i u_i (u_i . x)``; symmetric, so that this is the transpose as well."""
    u, alpha = params
    return x - matvec(transpose(u), alpha * matvec(u, x))


def dplr_cotangent(params: Params, x: Array, ybar: Array) -> Params:
    """Section 6: every term of the sum has the cotangent of one reflection."""
    u, alpha = params
    return reflect_cotangent(u, alpha, x[..., None, :], ybar[..., None, :])


def dplr_dense(params: Params) -> Array:
    """``I - U^T diag(alpha) U``."""
    u, alpha = params
    return np.eye(u.shape[-1], dtype=u.dtype) - transpose(u) @ (alpha[..., None] * u)


# Householder: Q = (I - alpha_r u_r u_r^T) ... (I - alpha_1 u_1 u_1^T)


def householder_apply(params: Params, x: Array) -> Array:
    """One reflection after the other, reflection 1 first."""
    u, alpha = params
    for i in range(u.shape[-2]):
        x = reflect(u[..., i, :], alpha[..., i], x)
    return x


def householder_transpose(params: Params, y: Array) -> Array:
    """The same reflections, the last one first."""
    u, alpha = params
    return householder_apply((u[..., ::-1, :], alpha[..., ::-1]), y)


def householder_cotangent(params: Params, x: Array, ybar: Array) -> Params:
    """The chain rule through the single reflections."""
    u, alpha = params
    inputs = []
    for i in range(u.shape[-2]):
        inputs.append(x)
        x = reflect(u[..., i, :], alpha[..., i], x)
    lead = np.broadcast_shapes(u.shape[:-2], alpha.shape[:-1], x.shape[:-1], ybar.shape[:-1])
    dtype = np.result_type(u, alpha, x, ybar)
    u_bar, alpha_bar = np.zeros((*lead, *u.shape[-2:]), dtype), np.zeros((*lead, alpha.shape[-1]), dtype)
    for i in reversed(range(u.shape[-2])):
        u_i, alpha_i = u[..., i, :], alpha[..., i]
        u_bar[..., i, :], alpha_bar[..., i] = reflect_cotangent(u_i, alpha_i, inputs[i], ybar)
        ybar = reflect(u_i, alpha_i, ybar)
    return u_bar, alpha_bar


def householder_dense(params: Params) -> Array:
    """The product of the single reflections' matrices."""
    u, alpha = params
    eye = np.eye(u.shape[-1], dtype=u.dtype)
    q = np.broadcast_to(eye, (*np.broadcast_shapes(u.shape[:-2], alpha.shape[:-1]), *eye.shape)).copy()
    for i in range(u.shape[-2]):
        q = (eye - alpha[..., i, None, None] * outer(u[..., i, :], u[..., i, :])) @ q
    return q


def wy_triangle(u: Array, alpha: Array) -> Array:
    """The compact WY form of a product of reflections: ``S`` with ``Q = I - U^T S U``.

    Section 2 of docs/mathematics.md. One more reflection from the left appends a row to ``S``:
    ``S_ii = alpha_i`` and ``S_i,<i = -alpha_i (u_i U_<i^T) S_<i``. There is no division, so that
    ``alpha = 0`` is no special case.

    Parameters
    ----------
    u : (..., r, D) array
    alpha : (..., r) array

    Returns
    -------
    S : (..., r, r) array, lower triangular

    Examples
    --------
    >>> u, alpha, x = np.array([[1.0, 0.0], [0.6, 0.8]]), np.array([0.5, 2.0]), np.array([1.0, 2.0])
    >>> S = wy_triangle(u, alpha)
    >>> np.allclose(x - u.T @ (S @ (u @ x)), householder_apply((u, alpha), x))
    True
    """
    rank, gram = u.shape[-2], u @ transpose(u)
    lead = np.broadcast_shapes(u.shape[:-2], alpha.shape[:-1])
    S = np.zeros((*lead, rank, rank), np.result_type(u, alpha))
    for i in range(rank):
        S[..., i, :i] = -alpha[..., i, None] * matvec(transpose(S[..., :i, :i]), gram[..., i, :i])
        S[..., i, i] = alpha[..., i]
    return S


# Kronecker: Q = I - K1 (x) K2, on vectors seen as d1 x d2 matrices, row by row


def _as_matrix(params: Params, x: Array) -> Array:
    return x.reshape(*x.shape[:-1], params[0].shape[-1], params[1].shape[-1])


def kronecker_apply(params: Params, x: Array) -> Array:
    """``Q x = x - vec(K1 X K2^T)``."""
    k1, k2 = params
    mixed = k1 @ _as_matrix(params, x) @ transpose(k2)
    return x - mixed.reshape(*mixed.shape[:-2], x.shape[-1])


def kronecker_transpose(params: Params, y: Array) -> Array:
    """``Q^T y = y - vec(K1^T Y K2)``."""
    k1, k2 = params
    return kronecker_apply((transpose(k1), transpose(k2)), y)


def kronecker_cotangent(params: Params, x: Array, ybar: Array) -> Params:
    """``K1_bar = -Y_bar K2 X^T`` and ``K2_bar = -Y_bar^T K1 X``."""
    k1, k2 = params
    X, Y_bar = _as_matrix(params, x), _as_matrix(params, ybar)
    return -(Y_bar @ k2 @ transpose(X)), -(transpose(Y_bar) @ k1 @ X)


def kronecker_dense(params: Params) -> Array:
    """``I - K1 (x) K2``."""
    k1, k2 = params
    dim = k1.shape[-1] * k2.shape[-1]
    product: Array = np.einsum("...ij,...kl->...ikjl", k1, k2)
    return np.eye(dim, dtype=product.dtype) - product.reshape(*product.shape[:-4], dim, dim)


# Monarch: Q = I - blockdiag(alpha_j M_j)


def _as_blocks(params: Params, x: Array) -> Array:
    return x.reshape(*x.shape[:-1], *params[0].shape[-3:-1])


def monarch_apply(params: Params, x: Array) -> Array:
    """``(Q x)_j = x_j - alpha_j M_j x_j``, block by block."""
    blocks, alpha = params
    mixed = alpha[..., None] * matvec(blocks, _as_blocks(params, x))
    return x - mixed.reshape(*mixed.shape[:-2], x.shape[-1])


def monarch_transpose(params: Params, y: Array) -> Array:
    """``(Q^T y)_j = y_j - alpha_j M_j^T y_j``."""
    blocks, alpha = params
    return monarch_apply((transpose(blocks), alpha), y)


def monarch_cotangent(params: Params, x: Array, ybar: Array) -> Params:
    """``M_bar_j = -alpha_j ybar_j x_j^T`` and ``alpha_bar_j = -ybar_j . (M_j x_j)``."""
    blocks, alpha = params
    xs, ys = _as_blocks(params, x), _as_blocks(params, ybar)
    return -alpha[..., None, None] * outer(ys, xs), -(ys * matvec(blocks, xs)).sum(axis=-1)


def monarch_dense(params: Params) -> Array:
    """``I - blockdiag(alpha_j M_j)``."""
    blocks, alpha = params
    scaled = alpha[..., None, None] * blocks
    count, size = scaled.shape[-3:-1]
    q = np.zeros((*scaled.shape[:-3], count * size, count * size), scaled.dtype)
    for j in range(count):
        block = slice(j * size, (j + 1) * size)
        q[..., block, block] = -scaled[..., j, :, :]
    return q + np.eye(count * size, dtype=q.dtype)


# Dense and Fixed: any matrix, one for each step or one for all


def dense_apply(params: Params, x: Array) -> Array:
    """``Q x``."""
    return matvec(params[0], x)


def dense_transpose(params: Params, y: Array) -> Array:
    """``Q^T y``."""
    return matvec(transpose(params[0]), y)


def dense_cotangent(params: Params, x: Array, ybar: Array) -> Params:
    """``Q_bar = ybar x^T``."""
    return (outer(ybar, x),)


def dense_dense(params: Params) -> Array:
    """``Q``."""
    return params[0].copy()


# A user's own: one call for every step of every sequence


class CustomKind(Protocol):
    """A user's own mixer: functions of one step of one sequence, plain Python or compiled from it.

    ``apply(x, out, *params_t)`` writes ``out = Q x``. ``cotangent(x, ybar, xbar, *params_t, *params_bar_t)``
    writes ``xbar = Q^T ybar`` and the cotangents of the parameters. ``apply_transpose(y, out, *params_t)``
    may be None, and is then what ``cotangent`` writes to ``xbar``. Vectors are ``(D,)``; ``params_t`` are
    ``params[..., t, ...]``, a 0-d array where a step has one number.
    """

    @property
    def name(self) -> str: ...
    @property
    def apply(self) -> Callable[..., Any]: ...
    @property
    def cotangent(self) -> Callable[..., Any]: ...
    @property
    def apply_transpose(self) -> Callable[..., Any] | None: ...


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The Python function behind a compiled one."""
    plain: Callable[..., Any] = getattr(function, "py_func", function)
    return plain


def _broadcast(params: Params, x: Array) -> tuple[Params, Array]:
    """Everything for every step; a parameter has as many leading axes as ``x``."""
    axes = x.ndim - 1
    steps = np.broadcast_shapes(x.shape[:-1], *(p.shape[:axes] for p in params))
    full = tuple(np.broadcast_to(p, (*steps, *p.shape[axes:])) for p in params)
    return full, np.broadcast_to(x, (*steps, x.shape[-1]))


def _custom_map(function: Callable[..., Any], params: Params, x: Array) -> Array:
    params, x = _broadcast(params, x)
    y = np.zeros(x.shape, np.result_type(x, *params))
    for step in np.ndindex(x.shape[:-1]):
        function(x[step], y[step], *(p[(*step, ...)] for p in params))
    return y


def _custom_pullback(kind: CustomKind, params: Params, x: Array, ybar: Array) -> tuple[Array, Params]:
    function = _plain(kind.cotangent)
    x, ybar = np.broadcast_arrays(x, ybar)
    params, x = _broadcast(params, x)
    _, ybar = _broadcast(params, ybar)
    xbar = np.zeros(x.shape, np.result_type(x, ybar, *params))
    bars = tuple(np.zeros(p.shape, p.dtype) for p in params)
    for step in np.ndindex(x.shape[:-1]):
        of_step = (a[(*step, ...)] for a in (*params, *bars))
        function(x[step], ybar[step], xbar[step], *of_step)
    return xbar, bars


def custom_apply(kind: CustomKind, params: Params, x: Array) -> Array:
    """``Q x`` by the user's ``apply``."""
    return _custom_map(_plain(kind.apply), params, x)


def custom_transpose(kind: CustomKind, params: Params, y: Array) -> Array:
    """``Q^T y`` by the user's ``apply_transpose``, or else by ``cotangent``."""
    function = getattr(kind, "apply_transpose", None)
    if function is None:
        return _custom_pullback(kind, params, np.zeros_like(y), y)[0]
    return _custom_map(_plain(function), params, y)


def custom_cotangent(kind: CustomKind, params: Params, x: Array, ybar: Array) -> Params:
    """The parameters' cotangents by the user's ``cotangent``."""
    return _custom_pullback(kind, params, x, ybar)[1]


def custom_dense(kind: CustomKind, params: Params, dim: int, axes: int) -> Array:
    """``Q`` column by column, from the unit vectors; parameters have ``axes`` leading axes."""
    steps = np.broadcast_shapes(*(p.shape[:axes] for p in params))
    eye = np.eye(dim, dtype=np.result_type(np.float32, *params))
    rows = [custom_apply(kind, params, np.broadcast_to(unit, (*steps, dim))) for unit in eye]
    return np.stack(rows, axis=-1) if rows else np.zeros((*steps, 0, 0), eye.dtype)
