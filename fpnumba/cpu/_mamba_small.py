"""The iteration of a step of (M) with a mixer of low rank, on ``r`` numbers; section 5 of docs/mathematics.md.

A step sees ``y`` only through the mixer. With one of low rank, ``P = U^T S U``, that is through the ``r`` numbers
``sigma = U y``, and with ``p = gate (r + w Q x)``, ``q_i = gate w u_i`` the step's map is

    tau = S sigma,   v = p + sum_i tau_i q_i,
    U norm(v) = (e + G tau) / sqrt(var(p) + 2 cov(p, q) tau + tau^T cov(q, q) tau + eps) + f,

so that after a handful of dot products an iteration is some arithmetic on ``r`` numbers.
"""

import math

import numpy as np

from fpnumba.cpu._jit import kernel
from fpnumba.cpu._mamba_parts import dot

# As in `fpnumba.reference.mamba`.
NEAR = 1e-3
PATIENCE = 4


@kernel
def eliminate(m, x):
    """Solve ``m x = b`` in place, ``b`` in ``x``, by elimination with row pivots."""
    size = x.size
    for k in range(size):
        best = k
        for i in range(k + 1, size):
            if abs(m[i, k]) > abs(m[best, k]):
                best = i
        if best != k:
            for j in range(size):
                m[k, j], m[best, j] = m[best, j], m[k, j]
            x[k], x[best] = x[best], x[k]
        for i in range(k + 1, size):
            factor = m[i, k] / m[k, k]
            for j in range(k + 1, size):
                m[i, j] -= factor * m[k, j]
            x[i] -= factor * x[k]
    for k in range(size - 1, -1, -1):
        for j in range(k + 1, size):
            x[k] -= m[k, j] * x[j]
        x[k] /= m[k, k]


@kernel
def weights_of(u, alpha, product, S):
    """``S`` of ``P = U^T S U``: ``diag(alpha)``, for a product times ``(I + tril(U U^T, -1) diag(alpha))^{-1}``."""
    rank = alpha.size
    for j in range(rank):
        for i in range(rank):
            S[i, j] = 1.0 if i == j else 0.0
    if product:
        for i in range(rank):
            for k in range(i):
                factor = float(dot(u[i], u[k])) * float(alpha[k])
                for j in range(k + 1):
                    S[i, j] -= factor * S[k, j]
    for i in range(rank):
        for j in range(rank):
            S[i, j] *= float(alpha[i])


@kernel
def small_map(e, G, f, pq, qq, pp, eps, mode, tau, out):
    """``F`` of the module's docstring into `out`; returns ``1 / sqrt(.)``."""
    rank = tau.size
    inverse = 1.0
    if mode != 0:
        var = pp + eps
        for i in range(rank):
            var += 2 * pq[i] * tau[i]
            for j in range(rank):
                var += tau[i] * qq[i, j] * tau[j]
        inverse = 1 / math.sqrt(max(var, eps))
        if math.isnan(var):
            inverse = var
    for i in range(rank):
        total = e[i]
        for j in range(rank):
            total += G[i, j] * tau[j]
        out[i] = total * inverse + f[i]
    return inverse


@kernel
def times(S, x, out):
    for i in range(x.size):
        out[i] = 0.0
        for j in range(x.size):
            out[i] += S[i, j] * x[j]


@kernel
def iterate_small(e, G, f, pq, qq, pp, eps, mode, S, tolerance, max_iter, damping, sigma, small, m):
    """From ``sigma = 0``: iterate, and near the fixed point use Newton's method. Returns the number of iterations.

    `small` holds six vectors, the first ``tau`` at the end.
    """
    rank = sigma.size
    tau, new, jump, there, gt = small[0], small[1], small[2], small[3], small[4]
    before, ratio, last = np.inf, np.inf, np.inf
    for i in range(rank):
        sigma[i] = 0.0
        tau[i] = 0.0
    inverse = small_map(e, G, f, pq, qq, pp, eps, mode, tau, new)
    count, swings = 0, 0
    past = small[5]
    for i in range(rank):
        past[i] = 0.0
    while True:
        count += 1
        moved, size, along = 0.0, 0.0, 0.0
        for i in range(rank):
            along += past[i] * (new[i] - sigma[i])
            past[i] = new[i] - sigma[i]
            moved = max(moved, abs(new[i] - sigma[i]))
            size = max(size, abs(new[i]), abs(sigma[i]))
        done = moved <= tolerance * size or count >= max_iter or not math.isfinite(moved)
        if not math.isfinite(before):
            last = ratio
        else:
            last, ratio = ratio, moved / before
        before = moved
        if along < 0 and ratio > 0.98:
            swings += 1
        if swings >= PATIENCE:
            damping, swings = damping / 2, 0
        if not done and ratio < 1 and last < 1 and moved <= NEAR * (1 - ratio) * size:
            # (I - F' S) jump = new - sigma
            for i in range(rank):
                gt[i] = (new[i] - f[i]) * inverse * inverse
                jump[i] = new[i] - sigma[i]
            for i in range(rank):
                for j in range(rank):
                    total = 0.0
                    for k in range(rank):
                        slope = pq[k]
                        for l in range(rank):
                            slope += qq[k, l] * tau[l]
                        total += (G[i, k] * inverse - (gt[i] * slope if mode != 0 else 0.0)) * S[k, j]
                    m[i, j] = (1.0 if i == j else 0.0) - total
            eliminate(m, jump)
            far = 0.0
            for i in range(rank):
                far = max(far, abs(jump[i]))
                jump[i] += sigma[i]
            if far <= 2 * NEAR * size:
                times(S, jump, gt)
                ahead = small_map(e, G, f, pq, qq, pp, eps, mode, gt, there)
                left = 0.0
                for i in range(rank):
                    left = max(left, abs(there[i] - jump[i]))
                if left < 0.5 * moved:
                    for i in range(rank):
                        sigma[i], new[i], tau[i] = jump[i], there[i], gt[i]
                    inverse, before = ahead, np.inf
                    continue
        for i in range(rank):
            sigma[i] = new[i] if done else sigma[i] + damping * (new[i] - sigma[i])
        times(S, sigma, tau)
        if done:
            return count
        inverse = small_map(e, G, f, pq, qq, pp, eps, mode, tau, new)
