"""Channel mixing, the doors: ``Q_t x``, transpose, dense form, cotangents and contraction bound.

Section 2 of docs/mathematics.md. A mixer is a pair ``(kind, params)``. The leading axes of the arrays in
``params`` broadcast against those of the vectors:

    "dplr", "householder"   u (..., T, r, D), alpha (..., T, r)
    "kronecker"             k1 (..., T, d1, d1), k2 (..., T, d2, d2)
    "monarch"               blocks (..., T, J, b, b), alpha (..., T, J)
    "dense"                 q (..., T, D, D)
    "fixed"                 q (D, D)

or ``kind`` is an object with functions for one step of one sequence, a `CustomKind`. The equations are in
`fpnumba.reference.kinds`.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from fpnumba.reference import kinds
from fpnumba.reference.kinds import Array, CustomKind, Params, transpose, wy_triangle
from fpnumba.reference.scan import sum_to

__all__ = [
    "CustomKind",
    "Kind",
    "Params",
    "apply",
    "apply_transpose",
    "broadcast_params",
    "contraction_bound",
    "cotangent",
    "low_rank",
    "spectral_norm",
    "steps_shape",
    "to_dense",
    "wy_triangle",
]

Kind: TypeAlias = str | CustomKind


class _Rules(NamedTuple):
    apply: Callable[[Params, Array], Array]
    transpose: Callable[[Params, Array], Array]
    cotangent: Callable[[Params, Array, Array], Params]
    dense: Callable[[Params], Array]
    axes: tuple[int, ...]  # how many axes of each parameter belong to one step


_DENSE = _Rules(kinds.dense_apply, kinds.dense_transpose, kinds.dense_cotangent, kinds.dense_dense, (2,))
_RULES = {
    "dplr": _Rules(kinds.dplr_apply, kinds.dplr_apply, kinds.dplr_cotangent, kinds.dplr_dense, (2, 1)),
    "householder": _Rules(
        kinds.householder_apply,
        kinds.householder_transpose,
        kinds.householder_cotangent,
        kinds.householder_dense,
        (2, 1),
    ),
    "kronecker": _Rules(
        kinds.kronecker_apply,
        kinds.kronecker_transpose,
        kinds.kronecker_cotangent,
        kinds.kronecker_dense,
        (2, 2),
    ),
    "monarch": _Rules(
        kinds.monarch_apply, kinds.monarch_transpose, kinds.monarch_cotangent, kinds.monarch_dense, (3, 1)
    ),
    "dense": _DENSE,
    "fixed": _DENSE,
}


def _rules(kind: str) -> _Rules:
    if kind not in _RULES:
        raise ValueError(f"kind: no mixer is named {kind!r}; expected one of {', '.join(_RULES)}")
    return _RULES[kind]


def apply(kind: Kind, params: Params, x: Array) -> Array:
    """``Q_t x_t`` for every step.

    Section 2 of docs/mathematics.md.

    Parameters
    ----------
    kind : str or CustomKind
    params : tuple of arrays
        As the head of this module says.
    x : (..., T, D) array

    Returns
    -------
    (..., T, D) array

    Raises
    ------
    ValueError
        If no mixer is named ``kind``.

    Examples
    --------
    >>> apply("dplr", (np.array([[1.0, 0.0]]), np.array([2.0])), np.array([3.0, 4.0]))
    array([-3.,  4.])
    """
    return _rules(kind).apply(params, x) if isinstance(kind, str) else kinds.custom_apply(kind, params, x)


def apply_transpose(kind: Kind, params: Params, y: Array) -> Array:
    """``Q_t^T y_t`` for every step; the adjoint of `apply` in ``x``.

    Section 2 of docs/mathematics.md.

    Parameters
    ----------
    kind, params
        As for `apply`.
    y : (..., T, D) array

    Returns
    -------
    (..., T, D) array

    Raises
    ------
    ValueError
        If no mixer is named ``kind``.

    Examples
    --------
    >>> apply_transpose("fixed", (np.array([[0.0, 1.0], [2.0, 0.0]]),), np.array([[3.0, 4.0]]))
    array([[8., 3.]])
    """
    if isinstance(kind, str):
        return _rules(kind).transpose(params, y)
    return kinds.custom_transpose(kind, params, y)


def cotangent(kind: Kind, params: Params, x: Array, ybar: Array) -> Params:
    """Cotangents of the parameters of ``y = Q x``.

    Section 6 of docs/mathematics.md.

    Parameters
    ----------
    kind, params
        As for `apply`.
    x, ybar : (..., T, D) arrays

    Returns
    -------
    tuple of arrays, each of the shape of its parameter

    Raises
    ------
    ValueError
        If no mixer is named ``kind``.

    Examples
    --------
    >>> cotangent("fixed", (np.eye(2),), np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]]))
    (array([[3., 6.],
           [4., 8.]]),)
    """
    if isinstance(kind, str):
        bars = _rules(kind).cotangent(params, x, ybar)
    else:
        bars = kinds.custom_cotangent(kind, params, x, ybar)
    return tuple(sum_to(bar, p.shape) for bar, p in zip(bars, params, strict=True))


def to_dense(kind: Kind, params: Params, dim: int, *, axes: int = 2) -> Array:
    """``Q_t`` as matrices, written down from their definition rather than by applying them.

    Section 2 of docs/mathematics.md. A user's own mixer is applied to the unit vectors.

    Parameters
    ----------
    kind, params
        As for `apply`.
    dim : int
        ``D``.
    axes : int
        How many leading axes the parameters of a user's own mixer have; two are ``(B, T)``.

    Returns
    -------
    (..., T, D, D) array; (D, D) for "fixed"

    Raises
    ------
    ValueError
        If no mixer is named ``kind``.

    Examples
    --------
    >>> to_dense("dplr", (np.array([[[1.0, 0.0]]]), np.array([[2.0]])), 2)
    array([[[-1.,  0.],
            [ 0.,  1.]]])
    """
    if isinstance(kind, str):
        return _rules(kind).dense(params)
    return kinds.custom_dense(kind, params, dim, axes)


def low_rank(kind: Kind, params: Params) -> tuple[Array, Array] | None:
    """``U`` and ``S`` with ``P = I - Q = U^T S U`` for the kinds of rank ``r``; None for the others.

    Section 2 of docs/mathematics.md.

    Parameters
    ----------
    kind, params
        As for `apply`.

    Returns
    -------
    u : (..., T, r, D) array
    S : (..., T, r, r) array
        ``diag(alpha)`` for DPLR, the compact WY triangle for Householder.

    Examples
    --------
    >>> u, S = low_rank("dplr", (np.eye(2)[None], np.array([[0.5, 0.25]])))
    >>> S
    array([[[0.5 , 0.  ],
            [0.  , 0.25]]])
    """
    if kind == "dplr":
        u, alpha = params
        return u, alpha[..., None] * np.eye(alpha.shape[-1], dtype=alpha.dtype)
    if kind == "householder":
        u, alpha = params
        return u, wy_triangle(u, alpha)
    return None


def spectral_norm(matrix: Array) -> Array:
    """Largest singular value.

    NaN where a matrix is not finite: LAPACK would refuse the whole batch for it.

    Parameters
    ----------
    matrix : (..., m, n) array

    Returns
    -------
    (...) array

    Examples
    --------
    >>> spectral_norm(np.array([[0.0, 2.0], [1.0, 0.0]]))
    array(2.)
    """
    if 0 in matrix.shape:
        return np.zeros(matrix.shape[:-2], matrix.dtype)
    finite = np.asarray(np.isfinite(matrix).all(axis=(-1, -2)))
    norm = np.linalg.norm(np.where(finite[..., None, None], matrix, 0), ord=2, axis=(-2, -1))
    return np.asarray(np.where(finite, norm, np.nan), matrix.dtype)


def low_rank_norm(u: Array, S: Array) -> Array:
    """``||U^T S U||_2 = ||R S R^T||_2`` where ``U^T = W R`` with orthonormal columns in ``W``.

    By a QR and not from the Gram matrix, which squares the condition of nearly parallel rows.
    """
    finite = np.isfinite(u).all(axis=(-1, -2), keepdims=True)
    R = np.linalg.qr(np.where(finite, transpose(u), 0)).R
    return spectral_norm(np.where(finite, R @ S @ transpose(R), np.nan).astype(S.dtype))


def contraction_bound(kind: Kind, params: Params, dim: int | None = None) -> Array:
    """``||P_t||_2`` with ``P = I - Q``: where it is below one, the iteration contracts.

    Theorem 3.1, in section 3 of docs/mathematics.md. Exact for every kind: from ``r x r`` matrices for the
    kinds of rank ``r``, ``||K1|| ||K2||`` for Kronecker, ``max_j |alpha_j| ||M_j||`` for Monarch, from ``P``
    itself for the others.

    Parameters
    ----------
    kind, params
        As for `apply`; those of a user's own mixer are ``(B, T, ...)``.
    dim : int, optional
        ``D``; a user's own mixer needs it.

    Returns
    -------
    (..., T) array; 0-d for "fixed"

    Raises
    ------
    ValueError
        If no mixer is named ``kind``, or ``dim`` is missing.

    Examples
    --------
    >>> contraction_bound("householder", (np.array([[[0.6, 0.8]]]), np.array([[1.5]])))
    array([1.5])
    """
    factors = low_rank(kind, params)
    if factors is not None:
        return low_rank_norm(*factors)
    if kind == "kronecker":
        return spectral_norm(params[0]) * spectral_norm(params[1])
    if kind == "monarch":
        blocks, alpha = params
        return np.asarray((np.abs(alpha) * spectral_norm(blocks)).max(axis=-1, initial=0))
    if dim is None:
        if not isinstance(kind, str):
            raise ValueError("dim: missing; the parameters of a user's own mixer do not tell the channels")
        dim = params[0].shape[-1]
    q = to_dense(kind, params, dim)
    return spectral_norm(np.eye(dim, dtype=q.dtype) - q)


def steps_shape(kind: Kind, params: Params, axes: int) -> tuple[int, ...]:
    """The ``(..., T)`` that parameters are given for; the first ``axes`` axes in a user's own mixer.

    Examples
    --------
    >>> steps_shape("dense", (np.ones((7, 3, 3)),), 1)
    (7,)
    """
    if kind == "fixed":
        return ()
    if isinstance(kind, str):
        own = _rules(kind).axes
        return np.broadcast_shapes(*(p.shape[: p.ndim - n] for p, n in zip(params, own, strict=True)))
    return np.broadcast_shapes(*(p.shape[:axes] for p in params))


def broadcast_params(kind: Kind, params: Params, steps: tuple[int, ...]) -> tuple[Kind, Params]:
    """The same mixer with all parameters given for all ``steps``, ``(..., T)``; "fixed" becomes "dense".

    Examples
    --------
    >>> kind, params = broadcast_params("fixed", (np.eye(2),), (3, 5))
    >>> kind, params[0].shape
    ('dense', (3, 5, 2, 2))
    """
    if isinstance(kind, str):
        own = [p.shape[p.ndim - n :] for p, n in zip(params, _rules(kind).axes, strict=True)]
    else:
        own = [p.shape[len(steps) :] for p in params]
    full = tuple(np.broadcast_to(p, (*steps, *shape)) for p, shape in zip(params, own, strict=True))
    return ("dense" if kind == "fixed" else kind), full
