"""One step of the recurrence with a Householder or DPLR mixer, and its adjoint, compiled: everything but the
products with ``F_h``.

The linear step is solved directly. With ``d = v - h`` and ``c_i`` what reflection ``i`` sees of it,

    P d = sum_i alpha_i c_i u_i,      L c = U d,      L = I + tril(U U^T, -1) diag(alpha)   (DPLR: L = I),

so that (F), ``h = w - g * P d`` with ``w = lam h_{t-1} + g v``, is ``M c = U (v - w)``, ``M = L - U diag(g)
U^T diag(alpha)``. The adjoint ``s = r + P^T (g * s)`` is ``s = r + U^T k``, ``M^T k = alpha * U (g * r)``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fpnumba.nn.kernels import IDENTITY, RELU, SILU, compiled, exponential


@compiled
def small_solve(m: Any, x: Any) -> float:
    """Solve ``m x = b`` in place, ``b`` in ``x``, by elimination with row pivots; return the smallest
    pivot's size."""
    size = x.size
    smallest = np.inf
    for k in range(size):
        best = k
        for i in range(k + 1, size):
            if abs(m[i, k]) > abs(m[best, k]):
                best = i
        if best != k:
            for j in range(size):
                m[k, j], m[best, j] = m[best, j], m[k, j]
            x[k], x[best] = x[best], x[k]
        smallest = min(smallest, abs(m[k, k]))
        for i in range(k + 1, size):
            factor = m[i, k] / m[k, k]
            for j in range(k + 1, size):
                m[i, j] -= factor * m[k, j]
            x[i] -= factor * x[k]
    for k in range(size - 1, -1, -1):
        for j in range(k + 1, size):
            x[k] -= m[k, j] * x[j]
        x[k] /= m[k, k]
    return smallest


@compiled
def system(u: Any, alpha: Any, lam: Any, product: Any, m: Any) -> float:
    """Fill ``m`` with ``M``; return ``1 + max |M - I|``, against which its pivots are judged."""
    one, zero = lam.dtype.type(1.0), lam.dtype.type(0.0)
    rank, dim = u.shape
    size = one
    for i in range(rank):
        for j in range(i + 1):
            gated, plain = zero, zero
            ui, uj = u[i], u[j]
            for d in range(dim):
                both = ui[d] * uj[d]
                gated += (one - lam[d]) * both
                plain += both
            m[i, j] = -gated * alpha[j]
            m[j, i] = -gated * alpha[i]
            if product and j < i:
                m[i, j] += plain * alpha[j]
            size = max(size, one + abs(m[i, j]), one + abs(m[j, i]))
    for i in range(rank):
        m[i, i] += one
    return float(size)


@compiled
def forward_step(
    t: int,
    at: int,
    more: Any,
    a: Any,
    lam: Any,
    v: Any,
    initial: Any,
    kind: int,
    eps: float,
    alpha_max: float,
    product: Any,
    u: Any,
    norm: Any,
    alpha: Any,
    c: Any,
    h: Any,
    condition: Any,
) -> None:
    """Step ``t`` of every sequence.

    ``a[:, at] += more`` are the pre-activations, ``(B, ., r D + r)``; ``u, norm, alpha, c`` are written at
    ``at``, ``h`` at ``t``. ``condition (B,)`` keeps the smallest reciprocal condition so far.
    """
    batch, _, dim = h.shape
    rank = alpha.shape[2]
    one, zero = h.dtype.type(1.0), h.dtype.type(0.0)
    top = h.dtype.type(alpha_max)
    m = np.empty((rank, rank), h.dtype)
    x = np.empty(rank, h.dtype)
    for b in range(batch):
        row, ub, hb, lb, vb = a[b, at], u[b, at], h[b, t], lam[b, t], v[b, t]
        before = initial[b] if t == 0 else h[b, t - 1]
        for i in range(row.size):
            row[i] += more[b, i]
        for i in range(rank):
            total = zero
            # a slice: an index that is a sum might be negative, for all that the compiler knows
            piece, ui = row[i * dim : (i + 1) * dim], ub[i]
            if kind == SILU:
                for d in range(dim):
                    y = piece[d] / (one + exponential(-piece[d]))
                    ui[d] = y
                    total += y * y
            else:
                for d in range(dim):
                    y = piece[d]
                    if kind == RELU and y < zero:
                        y = zero
                    ui[d] = y
                    total += y * y
            length = np.sqrt(total)
            norm[b, at, i] = length
            inverse = h.dtype.type(1.0 / max(length, eps))
            # v - w = lam * (v - h_{t-1})
            seen = zero
            for d in range(dim):
                y = ui[d] * inverse
                ui[d] = y
                seen += y * lb[d] * (vb[d] - before[d])
            x[i] = seen
            alpha[b, at, i] = top / (one + exponential(-row[rank * dim + i]))
        size = system(ub, alpha[b, at], lb, product, m)
        condition[b] = min(condition[b], small_solve(m, x) / size)
        for d in range(dim):
            hb[d] = zero
        for i in range(rank):
            c[b, at, i] = x[i]
            factor = alpha[b, at, i] * x[i]
            ui = ub[i]
            for d in range(dim):
                hb[d] += factor * ui[d]
        for d in range(dim):
            gate = one - lb[d]
            hb[d] = lb[d] * before[d] + gate * (vb[d] - hb[d])


@compiled
def backward_step(
    t: int,
    carry: Any,
    hbar: Any,
    a: Any,
    lam: Any,
    v: Any,
    initial: Any,
    kind: int,
    eps: float,
    alpha_max: float,
    product: Any,
    u: Any,
    norm: Any,
    alpha: Any,
    c: Any,
    h: Any,
    abar: Any,
    v_bar: Any,
    lam_bar: Any,
    condition: Any,
) -> None:
    """Adjoint of step ``t``: ``carry (B, D)`` comes with the cotangent of ``h_t`` from later steps, and
    leaves with ``lam_t s_t``; ``abar, v_bar, lam_bar`` are written at ``t``."""
    batch, _, dim = h.shape
    rank = alpha.shape[2]
    one, zero = h.dtype.type(1.0), h.dtype.type(0.0)
    top = h.dtype.type(alpha_max)
    m, mt = np.empty((rank, rank), h.dtype), np.empty((rank, rank), h.dtype)
    k = np.empty(rank, h.dtype)
    s, e, ubar = np.empty(dim, h.dtype), np.empty(dim, h.dtype), np.empty(dim, h.dtype)
    seen = np.empty((rank + 1, dim), h.dtype)
    first, last = seen[0], seen[rank]
    for b in range(batch):
        row, ub, hb, lb, vb, ab = a[b, t], u[b, t], h[b, t], lam[b, t], v[b, t], abar[b, t]
        before = initial[b] if t == 0 else h[b, t - 1]
        hb_bar, cb, vb_bar, lb_bar = hbar[b, t], carry[b], v_bar[b, t], lam_bar[b, t]
        for d in range(dim):
            s[d] = hb_bar[d] + cb[d]
        for i in range(rank):
            total = zero
            ui = ub[i]
            for d in range(dim):
                total += ui[d] * (one - lb[d]) * s[d]
            k[i] = alpha[b, t, i] * total
        size = system(ub, alpha[b, t], lb, product, m)
        for i in range(rank):
            for j in range(rank):
                mt[i, j] = m[j, i]
        condition[b] = min(condition[b], small_solve(mt, k) / size)
        for i in range(rank):
            ui, ki = ub[i], k[i]
            for d in range(dim):
                s[d] += ki * ui[d]
        for d in range(dim):
            e[d] = (one - lb[d]) * s[d]
            first[d] = vb[d] - hb[d]
        # what each reflection saw; the last row is Q d
        for i in range(rank):
            factor = alpha[b, t, i] * c[b, t, i]
            ui, now, later = ub[i], seen[i], seen[i + 1]
            for d in range(dim):
                later[d] = now[d] - factor * ui[d]
        for d in range(dim):
            lb_bar[d] = s[d] * (before[d] - (last[d] + hb[d]))
            cb[d] = lb[d] * s[d]
            vb_bar[d] = e[d]
        for i in range(rank - 1, -1, -1):
            # a reflection sees what the later ones leave of e; the terms of DPLR all see the same
            along = zero
            ui = ub[i]
            for d in range(dim):
                along += ui[d] * e[d]
            ci, strength = c[b, t, i], alpha[b, t, i]
            saw = seen[i] if product else first
            along_u = zero
            for d in range(dim):
                bar = -strength * (ci * e[d] + along * saw[d])
                ubar[d] = bar
                along_u += ui[d] * bar
            length = norm[b, t, i]
            if length < eps:
                along_u = zero
            inverse = h.dtype.type(1.0 / max(length, eps))
            piece, bars = row[i * dim : (i + 1) * dim], ab[i * dim : (i + 1) * dim]
            if kind == SILU:
                for d in range(dim):
                    z = piece[d]
                    open_ = one / (one + exponential(-z))
                    bars[d] = (ubar[d] - along_u * ui[d]) * inverse * open_ * (one + z * (one - open_))
            else:
                for d in range(dim):
                    bar = (ubar[d] - along_u * ui[d]) * inverse
                    bars[d] = bar if kind == IDENTITY or piece[d] > zero else zero
            ab[rank * dim + i] = -ci * along * strength * (one - strength / top)
            leaves = strength * along
            for d in range(dim):
                vb_bar[d] -= leaves * ui[d]
            if product:
                for d in range(dim):
                    e[d] -= leaves * ui[d]
