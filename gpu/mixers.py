"""Channel mixing on the device: ``Q x``, ``Q^T y``, cotangents, dense forms and contraction bounds.

Section 2 of docs/mathematics.md. A mixer is ``(kind, params)``, see `fpnumba.reference.mixers`; here every parameter
has the axes ``(B, T, ...)``, except that of "fixed", and lies C-contiguous in the dtype of the vectors. Half types are
computed in float32 and rounded once. A user's own mixer, and everything where the engine ``"numba"`` is asked for by
name, goes to `fpnumba.gpu.portable`.
"""

from collections.abc import Callable
from typing import Any

from fpnumba.gpu import _device, _mix, _shapes
from fpnumba.gpu._engine import tuned

__all__ = ["apply", "apply_transpose", "contraction_bound", "cotangent", "to_dense"]

Array = Any
Params = tuple[Array, ...]

KINDS = ("dplr", "householder", "kronecker", "monarch", "dense", "fixed")


def _portable(kind: Any, engine: str | None) -> Any:
    """The module of the readable kernels, where they serve this call; else None."""
    if isinstance(kind, str) and kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is not a mixer; expected one of {', '.join(KINDS)}")
    if tuned(kind, engine):
        return None
    from fpnumba.gpu import portable

    return portable


def _applied(kind: str, params: Params, x: Array, transposed: bool) -> Array:
    if kind in ("dplr", "householder"):
        return _mix.low_rank_apply(kind == "householder", params, x, transposed)
    if kind == "kronecker":
        return _mix.kronecker_apply(params, x, transposed)
    if kind == "fixed":
        return _mix.fixed_apply(params[0], x, transposed)
    return _mix.blocks_apply(params[0], params[1] if kind == "monarch" else None, x, transposed)


def apply(kind: Any, params: Params, x: Array, *, engine: str | None = None) -> Array:
    """``Q_t x_t`` for every step.

    Section 2 of docs/mathematics.md.

    Parameters
    ----------
    kind : str or CustomKind
    params : tuple of arrays
    x : (B, T, D) array
    engine : {"raw", "numba"}, optional
        The kernels by name; by default those of `fpnumba.gpu._engine`.

    Returns
    -------
    (B, T, D) array

    Raises
    ------
    ValueError
        If `kind` is a name of no mixer, or the engine "raw" is asked for by name for a user's own.
    """
    portable = _portable(kind, engine)
    if portable is not None:
        return portable.apply(kind, params, x)
    return _applied(kind, params, x, False)


def apply_transpose(kind: Any, params: Params, y: Array, *, engine: str | None = None) -> Array:
    """``Q_t^T y_t`` for every step.

    Section 2 of docs/mathematics.md.

    Parameters
    ----------
    kind, params, engine
        As for `apply`.
    y : (B, T, D) array

    Returns
    -------
    (B, T, D) array

    Raises
    ------
    ValueError
        As `apply`.
    """
    portable = _portable(kind, engine)
    if portable is not None:
        return portable.apply_transpose(kind, params, y)
    return _applied(kind, params, y, True)


def cotangent(kind: Any, params: Params, x: Array, ybar: Array, *, engine: str | None = None) -> Params:
    """Cotangents of the parameters of ``y = Q x``.

    Section 6 of docs/mathematics.md.

    Parameters
    ----------
    kind, params, engine
        As for `apply`.
    x, ybar : (B, T, D) arrays

    Returns
    -------
    tuple of arrays, each of the shape of its parameter

    Raises
    ------
    ValueError
        As `apply`.
    """
    portable = _portable(kind, engine)
    if portable is not None:
        bars: Params = portable.cotangent(kind, params, x, ybar)
        return bars
    if kind in ("dplr", "householder"):
        return _mix.low_rank_cotangent(kind == "householder", params, x, ybar)
    if kind == "kronecker":
        return _mix.kronecker_cotangent(params, x, ybar)
    if kind == "fixed":
        return (_mix.fixed_cotangent(params[0], x, ybar),)
    if kind == "dense":
        return (_mix.blocks_cotangent(params[0], None, x, ybar)[0],)
    blocks, alpha = params
    return _mix.blocks_cotangent(blocks, alpha, x, ybar)


# --- dense forms --------------------------------------------------------------------------------------------------


def _transpose(matrix: Array) -> Array:
    return matrix.swapaxes(-1, -2)


def _dplr_dense(params: Params) -> Array:
    u, alpha = params
    return _device.xp().eye(u.shape[-1], dtype=u.dtype) - _device.matmul(_transpose(u), alpha[..., None] * u)


def _householder_dense(params: Params) -> Array:
    """One reflection after the other, ``Q <- Q - alpha_i u_i (u_i^T Q)``."""
    u, alpha = params
    rank, dim = u.shape[-2:]
    q = _device.xp().zeros((*u.shape[:-2], dim, dim), u.dtype) + _device.xp().eye(dim, dtype=u.dtype)
    for i in range(rank):
        row = u[..., i : i + 1, :]
        q -= alpha[..., i, None, None] * _transpose(row) * _device.matmul(row, q)
    return q


def _kronecker_dense(params: Params) -> Array:
    k1, k2 = params
    dim = k1.shape[-1] * k2.shape[-1]
    product = k1[..., :, None, :, None] * k2[..., None, :, None, :]
    return _device.xp().eye(dim, dtype=k1.dtype) - product.reshape(*product.shape[:-4], dim, dim)


def _monarch_dense(params: Params) -> Array:
    blocks, alpha = params
    count, size = blocks.shape[-3:-1]
    q = _device.xp().zeros((*blocks.shape[:-3], count * size, count * size), blocks.dtype)
    for j in range(count):
        at = slice(j * size, (j + 1) * size)
        q[..., at, at] = -alpha[..., j, None, None] * blocks[..., j, :, :]
    return q + _device.xp().eye(count * size, dtype=q.dtype)


_DENSE: dict[str, Callable[[Params], Array]] = {
    "dplr": _dplr_dense,
    "householder": _householder_dense,
    "kronecker": _kronecker_dense,
    "monarch": _monarch_dense,
    "dense": lambda params: params[0].copy(),
    "fixed": lambda params: params[0].copy(),
}


def _wide(params: Params) -> Params:
    """In the dtype that is computed in."""
    return tuple(p.astype(_shapes.real(p.dtype), copy=False) for p in params)


def to_dense(kind: Any, params: Params, dim: int, *, engine: str | None = None) -> Array:
    """``Q_t`` as matrices, from their definition; a user's own mixer is applied to the unit vectors.

    Section 2 of docs/mathematics.md.

    Parameters
    ----------
    kind, params, engine
        As for `apply`.
    dim : int
        ``D``.

    Returns
    -------
    (B, T, D, D) array; (D, D) for "fixed"

    Raises
    ------
    ValueError
        As `apply`.
    """
    portable = _portable(kind, engine)
    if portable is not None:
        return portable.to_dense(kind, params, dim)
    return _DENSE[kind](_wide(params)).astype(params[0].dtype, copy=False)


# --- contraction bounds -------------------------------------------------------------------------------------------


def _spectral_norm(matrix: Array) -> Array:
    """Largest singular values; NaN where a matrix is not finite."""
    xp = _device.xp()
    if 0 in matrix.shape:
        return xp.zeros(matrix.shape[:-2], matrix.dtype)
    finite = xp.isfinite(matrix).all(axis=(-1, -2))
    values = xp.linalg.svd(
        xp.where(finite[..., None, None], matrix, 0).astype(matrix.dtype), compute_uv=False
    )
    return xp.where(finite, values[..., 0], xp.nan).astype(matrix.dtype)


def _triangle(u: Array) -> Array:
    """``R`` with ``U^T = W R`` and orthonormal columns in ``W``, by modified Gram-Schmidt.

    Its ``R`` is as good as that of reflections, however parallel the rows are, and needs a few passes over `u` where a
    batch of QR decompositions would be slow.
    """
    rank = u.shape[-2]
    left = u.copy()
    R = _device.xp().zeros((*u.shape[:-2], rank, rank), u.dtype)
    for i in range(rank):
        row = left[..., i : i + 1, :]
        length = (row * row).sum(axis=-1, keepdims=True) ** 0.5
        unit = row / (length + (length == 0))
        R[..., i, i] = length[..., 0, 0]
        if i + 1 < rank:
            along = (unit * left[..., i + 1 :, :]).sum(axis=-1)
            R[..., i, i + 1 :] = along
            left[..., i + 1 :, :] -= along[..., None] * unit
    return R


def _wy_triangle(u: Array, alpha: Array) -> Array:
    """``S`` with ``Q = I - U^T S U``: ``S_ii = alpha_i`` and ``S_i,<i = -alpha_i (u_i U_<i^T) S_<i``."""
    rank = u.shape[-2]
    S = _device.xp().zeros((*u.shape[:-2], rank, rank), u.dtype)
    gram = _device.matmul(u, _transpose(u))
    for i in range(rank):
        if i:
            chained = (gram[..., i, :i, None] * S[..., :i, :i]).sum(axis=-2)
            S[..., i, :i] = -alpha[..., i, None] * chained
        S[..., i, i] = alpha[..., i]
    return S


def _low_rank_norm(kind: str, params: Params) -> Array:
    """``||U^T S U||_2 = ||R S R^T||_2``."""
    u, alpha = params
    R = _triangle(u)
    S = (
        _wy_triangle(u, alpha)
        if kind == "householder"
        else alpha[..., None] * _device.xp().eye(alpha.shape[-1], dtype=alpha.dtype)
    )
    return _spectral_norm(_device.matmul(_device.matmul(R, S), _transpose(R)))


def contraction_bound(
    kind: Any, params: Params, dim: int | None = None, *, engine: str | None = None
) -> Array:
    """``||P_t||_2`` with ``P = I - Q``: where it is below one, the iteration contracts.

    Theorem 3.1, in section 3 of docs/mathematics.md. Exact for every kind; NaN where parameters are not finite.

    Parameters
    ----------
    kind, params, engine
        As for `apply`.
    dim : int, optional
        ``D``; a user's own mixer needs it.

    Returns
    -------
    (B, T) array; 0-d for "fixed"

    Raises
    ------
    ValueError
        As `apply`, and if `dim` is missing.
    """
    xp = _device.xp()
    named = isinstance(kind, str)
    portable = _portable(kind, engine)
    if named and portable is None and kind not in ("dense", "fixed"):
        wide = _wide(params)
        if kind == "kronecker":
            bound = _spectral_norm(wide[0]) * _spectral_norm(wide[1])
        elif kind == "monarch":
            if 0 in wide[1].shape:
                bound = xp.zeros(wide[1].shape[:-1], wide[1].dtype)
            else:
                bound = (abs(wide[1]) * _spectral_norm(wide[0])).max(axis=-1)
        else:
            bound = _low_rank_norm(kind, wide)
        return bound.astype(params[0].dtype, copy=False)
    if dim is None:
        if not named:
            raise ValueError("dim: missing; the parameters of a user's own mixer do not tell the channels")
        dim = params[0].shape[-1]
    q = to_dense(kind, params, dim, engine=engine)
    (wide_q,) = _wide((q,))
    return _spectral_norm(xp.eye(dim, dtype=wide_q.dtype) - wide_q).astype(q.dtype, copy=False)
