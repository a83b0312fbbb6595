"""(F) as the dense linear RNN that it is: one exact step, its adjoint, and oracles with whole matrices.

Section 3 of docs/mathematics.md, "direct". Steps are for one sequence: vectors ``(D,)``, ``u (r, D)``,
``S (r, r)``.
"""

import numpy as np

from fpnumba.reference import mixers
from fpnumba.reference.kinds import Array, Params, matvec
from fpnumba.reference.mixers import Kind

__all__ = [
    "dense_adjoint_step",
    "dense_step",
    "dense_transition",
    "low_rank_adjoint_step",
    "low_rank_step",
    "solve_dense",
]


def _solve_one_minus(K: Array, b: Array) -> tuple[Array, float]:
    """``(I - K)^{-1} b`` and a reciprocal condition, ``1 / ((1 + ||K||_1) ||(I - K)^{-1}||_1)``.

    ``1 + ||K||`` and not ``||I - K||``: it is the difference that loses the digits, and a system of one
    equation would otherwise pass for well-conditioned however close to zero it is.
    """
    if len(b) == 0:
        return b, 1.0
    eye = np.eye(len(b), dtype=K.dtype)
    try:
        solved = np.linalg.solve(eye - K, np.column_stack([b, eye]))
    except np.linalg.LinAlgError:
        return np.full_like(b, np.nan), 0.0
    norm, norm_of_inverse = (np.abs(m).sum(axis=0).max() for m in (K, solved[:, 1:]))
    return solved[:, 0], float(1 / ((1 + norm) * norm_of_inverse))


def low_rank_step(u: Array, S: Array, gate: Array, w: Array, x: Array) -> tuple[Array, float]:
    """One step of (F) for ``P = U^T S U`` by an ``r x r`` system (Woodbury).

    With ``w = lam * h_{t-1} + g * x``, (F) is ``h = w - g * U^T S rho`` in the unknowns ``rho = U (x - h)``;
    applying ``U`` to ``x - h`` gives ``(I - U diag(g) U^T S) rho = U (x - w)``.
    """
    rho, rcond = _solve_one_minus((u * gate) @ u.T @ S, u @ (x - w))
    return w - gate * (u.T @ (S @ rho)), rcond


def low_rank_adjoint_step(u: Array, S: Array, gate: Array, v: Array) -> tuple[Array, float]:
    """One step of the adjoint, ``s = v + P^T (g * s)``, for ``P = U^T S U``.

    ``s = v + U^T S^T tau`` in the unknowns ``tau = U (g * s)``: ``(I - U diag(g) U^T S^T) tau = U (g * v)``.
    """
    tau, rcond = _solve_one_minus((u * gate) @ u.T @ S.T, u @ (gate * v))
    return v + u.T @ (S.T @ tau), rcond


def dense_step(q: Array, gate: Array, w: Array, x: Array) -> tuple[Array, float]:
    """One step of (F) for any ``Q``: ``h = w + d`` with ``(I - diag(g) P) d = -g * P (x - w)``."""
    P = np.eye(len(q), dtype=q.dtype) - q
    d, rcond = _solve_one_minus(gate[:, None] * P, -gate * (P @ (x - w)))
    return w + d, rcond


def dense_adjoint_step(q: Array, gate: Array, v: Array) -> tuple[Array, float]:
    """One step of the adjoint for any ``Q``: ``(I - P^T diag(g)) s = v``."""
    P = np.eye(len(q), dtype=q.dtype) - q
    return _solve_one_minus(P.T * gate, v)


# Oracles


def _matrices(kind: Kind, params: Params, gate: Array) -> tuple[Array, Array]:
    """``Q`` and ``I - diag(g) P``."""
    dim = gate.shape[-1]
    q, eye = mixers.to_dense(kind, params, dim), np.eye(dim)
    return q, eye - gate[..., :, None] * (eye - q)


def dense_transition(kind: Kind, params: Params, lam: Array, gate: Array | None) -> Array:
    """The transition of the dense RNN at the fixed point, ``A_t = (I - diag(g_t) P_t)^{-1} diag(lam_t)``.

    Section 3 of docs/mathematics.md. In float64, whatever the inputs.

    Parameters
    ----------
    kind, params
        The mixer, see `fpnumba.reference.mixers`; a user's own has parameters ``(B, T, ...)``.
    lam : (..., T, D) array
    gate : (..., T, D) array or None
        None is ``1 - lam``.

    Returns
    -------
    A : (..., T, D, D) array

    Raises
    ------
    numpy.linalg.LinAlgError
        If a step has no solution.

    Examples
    --------
    >>> dense_transition("fixed", (np.array([[0.5]]),), np.full((1, 1), 0.5), None)
    array([[[0.66666667]]])
    """
    _, matrix = _matrices(kind, params, 1 - lam if gate is None else gate)
    return np.linalg.solve(matrix, lam[..., :, None] * np.eye(lam.shape[-1]))


def solve_dense(
    kind: Kind, params: Params, lam: Array, gate: Array | None, x: Array, initial: Array | None
) -> Array:
    """The fixed point of (F) by its dense RNN.

    ``h_t = A_t h_{t-1} + (I - diag(g_t) P_t)^{-1} diag(g_t) Q_t x_t``, by section 3 of
    docs/mathematics.md. The oracle of `fpnumba.reference.solve.solve`; in float64, whatever the inputs.

    Parameters
    ----------
    kind, params, lam, gate
        As for `dense_transition`.
    x : (..., T, D) array
    initial : (..., D) array or None
        ``h_0``; None is zero.

    Returns
    -------
    h : (..., T, D) array

    Raises
    ------
    numpy.linalg.LinAlgError
        If a step has no solution.

    Examples
    --------
    >>> half = np.full((2, 1), 0.5)
    >>> solve_dense("fixed", (np.array([[0.5]]),), half, None, np.ones((2, 1)), None).ravel()
    array([0.33333333, 0.55555556])
    """
    gate = 1 - lam if gate is None else gate
    A = dense_transition(kind, params, lam, gate)
    q, matrix = _matrices(kind, params, gate)
    drive = np.linalg.solve(matrix, (gate * matvec(q, x))[..., None])[..., 0]
    state = np.zeros(x.shape[-1]) if initial is None else initial
    full = np.broadcast_shapes(A.shape[:-1], drive.shape, (*state.shape[:-1], 1, state.shape[-1]))
    A, drive = np.broadcast_to(A, (*full, full[-1])), np.broadcast_to(drive, full)
    h = np.zeros(full, np.result_type(A, drive, state))
    for t in range(full[-2]):
        state = matvec(A[..., t, :, :], state) + drive[..., t, :]
        h[..., t, :] = state
    return h
