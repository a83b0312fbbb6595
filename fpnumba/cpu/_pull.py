"""Cotangents of all inputs of (F) for low-rank mixers, step after step, the adjoint solved on the way if asked.

Section 6 of docs/mathematics.md. With ``d = x - h``, ``e = g * s``, ``c = U d`` and ``k = U e``, the products
of one step need nothing but the ``r`` numbers ``c`` and ``k``: reflection ``i`` of a product sees ``v_i = d -
sum_{j<i} y_j u_j`` with ``y_i = alpha_i u_i . v_i`` and, from above, ``w_i = e - sum_{j>i} z_j u_j`` with
``z_i = alpha_i u_i . w_i``, so that

    u_bar_i = -y_i w_i - z_i v_i,   alpha_bar_i = -(u_i . v_i)(u_i . w_i),   x_bar = e - sum z_j u_j,
    Q d = d - sum y_j u_j.

In a sum of terms (DPLR) each sees ``d`` and ``e`` themselves.

Memory traffic: everything read once and written once, also where the adjoint is solved on the way.
"""

import numpy as np

from fpnumba.cpu._jit import STRIP_BYTES, entry, from_bits, inlined, kernel, stream_end, stream_row
from fpnumba.cpu._lowrank import (
    first_row,
    iterate_step,
    next_state,
    put_row,
    result_row,
    small_matrix,
    solve_small,
    sums,
    sums_rank_one,
)
from fpnumba.cpu._relax import DIVERGED, ILL_CONDITIONED, MAX_ITER

# Rows of scratch after those of `fpnumba.cpu._lowrank`, counted from 4 + r
D_ROW, E_ROW, LAM_ROW, GATE_ROW, EXTRA_ROWS = 0, 1, 2, 3, 4


@inlined
def touch(b, t, u, lam, gate, gated, x, h, s, solving, c, k, touched):
    """``c = U d`` for the last vector, and ``k = U e`` where ``s`` is given, in strips.

    It is here that a step first reads ``x``, ``h``, and ``h_{t-1}``, of which it takes a sum that nobody needs: see
    `fpnumba.cpu._jit.STRIP_BYTES`.
    """
    rank, dim = u.shape[2], u.shape[3]
    zero, one = x.dtype.type(0), x.dtype.type(1)
    strip = STRIP_BYTES // x.itemsize
    strips = -(-dim // strip)
    m = rank - 1
    row = max(t - 1, 0)
    cm, km, nothing = zero, zero, zero
    for n in range(strips):
        offset = (strips - 1 - n) * strip
        if solving:
            for j in range(min(strip, dim - offset)):
                i = np.uintp(offset + j)
                cm += u[b, t, m, i] * (x[b, t, i] - h[b, t, i])
                nothing += h[b, row, i]
        else:
            for j in range(min(strip, dim - offset)):
                i = np.uintp(offset + j)
                g = gate[b, t, i] if gated else one - lam[b, t, i]
                cm += u[b, t, m, i] * (x[b, t, i] - h[b, t, i])
                km += u[b, t, m, i] * (g * s[b, t, i])
                nothing += h[b, row, i]
    c[m] = cm
    k[m] = km
    touched[0] = nothing


@inlined
def differences(b, t, lam, gate, gated, x, h, rows, first):
    """``d = x - h`` and ``e = g * s``"""
    dim = x.shape[2]
    one = x.dtype.type(1)
    for i in range(dim):
        g = gate[b, t, i] if gated else one - lam[b, t, i]
        rows[first, i] = x[b, t, i] - h[b, t, i]
        rows[first + 1, i] = g * rows[3, i]


@inlined
def projections(b, t, u, rows, first, c, k):
    """``c = U d`` and ``k = U e``"""
    rank, dim = u.shape[2], u.shape[3]
    for back in range(rank):
        m = rank - 1 - back
        cm, km = rows.dtype.type(0), rows.dtype.type(0)
        for i in range(dim):
            cm += u[b, t, m, i] * rows[first, i]
            km += u[b, t, m, i] * rows[first + 1, i]
        c[m], k[m] = cm, km


@inlined
def products(b, t, u, plain):
    """``U U^T`` below the diagonal."""
    rank, dim = u.shape[2], u.shape[3]
    for m in range(rank):
        for n in range(m):
            dot = u.dtype.type(0)
            for i in range(dim):
                dot += u[b, t, m, i] * u[b, t, n, i]
            plain[m, n] = dot


@kernel
def weights(b, t, alpha, product, plain, c, k, alpha_bar, y, z):
    """``y`` and ``z``, and the cotangent of ``alpha``; see the head of this module."""
    rank = alpha.shape[2]
    for m in range(rank):
        total = c[m]
        if product:
            for n in range(m):
                total -= plain[m, n] * y[n]
        c[m] = total
        y[m] = alpha[b, t, m] * total
    for back in range(rank):
        m = rank - 1 - back
        total = k[m]
        if product:
            for n in range(m + 1, rank):
                total -= plain[n, m] * z[n]
        z[m] = alpha[b, t, m] * total
        alpha_bar[b, t, m] = -c[m] * total


@inlined
def pull_rank_one(b, t, u, lam, gate, gated, x, h, initial, rows, y, z):
    """All rows of a step for one vector. Row 4 becomes ``u_bar``, 5 ``x_bar``, then those of ``lam`` and the gate."""
    dim = x.shape[2]
    one = x.dtype.type(1)
    y0, z0 = rows.dtype.type(y[0]), rows.dtype.type(z[0])
    inside = t > 0
    row = t - 1 if inside else 0
    for i in range(dim):
        before = h[b, row, i] if inside else initial[b, i]
        g = gate[b, t, i] if gated else one - lam[b, t, i]
        s = rows[3, i]
        e = g * s
        vector = u[b, t, 0, i]
        mixed = x[b, t, i] - y0 * vector
        rows[4, i] = -(y0 * e) - z0 * (x[b, t, i] - h[b, t, i])
        rows[5, i] = e - z0 * vector
        if gated:
            rows[7, i] = s * before
            rows[8, i] = s * mixed
        else:
            rows[7, i] = s * (before - mixed)


@inlined
def pull_any_rank(b, t, u, product, lam_is_gate, x, h, initial, rows, y, z):
    """As `pull_rank_one`: rows 4 to 3 + r become ``u_bar``, and those after them ``x_bar``, of ``lam`` and the gate."""
    rank, dim = u.shape[2], u.shape[3]
    first = 4 + rank
    for back in range(rank):
        m = rank - 1 - back
        ym, zm = rows.dtype.type(y[m]), rows.dtype.type(z[m])
        if product:
            for i in range(dim):
                w = rows[first + 1, i]
                rows[4 + m, i] = -(ym * w)
                rows[first + 1, i] = w - zm * u[b, t, m, i]
        else:
            for i in range(dim):
                rows[4 + m, i] = -(ym * rows[first + 1, i]) - zm * rows[first, i]
    if not product:
        for m in range(rank):
            ym, zm = rows.dtype.type(y[m]), rows.dtype.type(z[m])
            for i in range(dim):
                rows[first + 1, i] -= zm * u[b, t, m, i]
                rows[first, i] -= ym * u[b, t, m, i]
    else:
        for m in range(rank):
            ym, zm = rows.dtype.type(y[m]), rows.dtype.type(z[m])
            for i in range(dim):
                v = rows[first, i]
                rows[4 + m, i] -= zm * v
                rows[first, i] = v - ym * u[b, t, m, i]
    inside = t > 0
    row = t - 1 if inside else 0
    for i in range(dim):
        before = h[b, row, i] if inside else initial[b, i]
        s = rows[3, i]
        mixed = h[b, t, i] + rows[first, i]
        rows[first, i] = rows[first + 1, i]
        rows[first + 2, i] = s * (before - mixed) if lam_is_gate else s * before
        rows[first + 3, i] = s * mixed


@inlined
def store(target, b, t, rows, row, stream):
    steps, dim = target.shape[1], target.shape[2]
    if stream:
        stream_row(target, (b * steps + t) * dim, rows, row * dim, dim)
    else:
        for i in range(dim):
            target[b, t, i] = rows[row, i]


@kernel
def pull_segment(
    b, begin, end, u, alpha, product, lam, gate, gated, x, initial, h, s,
    lam_bar, gate_bar, u_bar, alpha_bar, x_bar, stream, hbar, solving, direct, eps, rtol, atol, max_iter,
    counts, change, scale, status, rcond,
    rows, q, p, c, k, y, z, bound, rho, spare, gram, plain, S, system,
):  # fmt: skip
    """Steps ``begin`` to ``end`` of one sequence, counted from the last one backwards."""
    _, steps, dim = x.shape
    rank = u.shape[2]
    first = 4 + rank
    for n in range(begin, end):
        t = steps - 1 - n
        if solving:
            if n == begin:
                first_row(b, t, True, False, False, lam, initial, s, rows)
            if rank == 1:
                sums_rank_one(b, t, u, True, lam, gate, gated, hbar, rows, q, p, gram)
                S[0, 0] = alpha[b, t, 0]
            else:
                sums(b, t, u, True, product, lam, gate, gated, hbar, rows, q, p, gram, plain)
                small_matrix(b, t, alpha, True, product, plain, S)
            if direct:
                condition = solve_small(gram, S, q, y, system, rho)
                if not condition >= rcond[b, 0]:  # keeps a NaN
                    rcond[b, 0] = condition
                _, size = result_row(b, t, u, True, lam, hbar, rows, y)
                largest = np.float64(from_bits(size))
                dh, converged = 0.0, True
            else:
                count, dh, _, largest, converged = iterate_step(
                    b, t, u, True, lam, hbar, rows, gram, S, q, p, y, bound, rho, spare, scale[b, 0],
                    rtol, atol, max_iter,
                )  # fmt: skip
                counts[b, t] = count
                if not dh <= change[b, 0]:  # keeps a NaN
                    change[b, 0] = dh
            if not np.isfinite(largest) or not np.isfinite(dh):
                status[b, 0] = max(status[b, 0], DIVERGED)
            elif not converged:
                status[b, 0] = max(status[b, 0], MAX_ITER)
            scale[b, 0] = max(scale[b, 0], largest)
            next_state(b, t, True, lam, rows)
            put_row(b, t, s, rows, 3, stream, False)
        touch(b, t, u, lam, gate, gated, x, h, s, solving, c, k, spare)
        if not solving:
            for i in range(dim):
                rows[3, i] = s[b, t, i]
            if product and rank > 1:
                products(b, t, u, plain)
        if rank > 1:
            differences(b, t, lam, gate, gated, x, h, rows, first)
            projections(b, t, u, rows, first, c, k)
        elif solving:
            k[0] = q[0] + gram[0, 0] * y[0]  # U (g * s), without another sum
        weights(b, t, alpha, product, plain, c, k, alpha_bar, y, z)
        if rank == 1:
            pull_rank_one(b, t, u, lam, gate, gated, x, h, initial, rows, y, z)
        else:
            pull_any_rank(b, t, u, product, not gated, x, h, initial, rows, y, z)
        if stream:
            stream_row(u_bar, (b * steps + t) * rank * dim, rows, 4 * dim, rank * dim)
        else:
            for m in range(rank):
                for i in range(dim):
                    u_bar[b, t, m, i] = rows[4 + m, i]
        store(x_bar, b, t, rows, first, stream)
        store(lam_bar, b, t, rows, first + 2, stream)
        if gated:
            store(gate_bar, b, t, rows, first + 3, stream)
    if direct and rcond[b, 0] < 1e3 * eps:
        status[b, 0] = max(status[b, 0], ILL_CONDITIONED)


@entry
def pull_steps(
    first, last, u, alpha, product, lam, gate, gated, x, initial, h, s, lam_bar, gate_bar, u_bar, alpha_bar, x_bar,
    segments, stream, hbar, solving, direct, eps, rtol, atol, max_iter, counts, change, scale, status, rcond,
):  # fmt: skip
    """Tasks are sequences times segments of time; with `solving`, sequences."""
    steps, rank, dim = u.shape[1], u.shape[2], u.shape[3]
    rows = np.empty((4 + rank + EXTRA_ROWS, dim), x.dtype)
    q, p, c, k = np.zeros(rank), np.zeros(rank), np.zeros(rank), np.zeros(rank)
    y, z, bound = np.zeros(rank), np.zeros(rank), np.zeros(rank)
    rho, spare = np.zeros(rank), np.zeros(rank)
    gram, plain = np.zeros((rank, rank)), np.zeros((rank, rank))
    S, system = np.zeros((rank, rank)), np.zeros((rank, rank))
    for task in range(first, last):
        b, j = task // segments, task % segments
        pull_segment(
            b, steps * j // segments, steps * (j + 1) // segments, u, alpha, product, lam, gate, gated, x, initial,
            h, s, lam_bar, gate_bar, u_bar, alpha_bar, x_bar, stream, hbar, solving, direct, eps, rtol, atol,
            max_iter, counts, change, scale, status, rcond,
            rows, q, p, c, k, y, z, bound, rho, spare, gram, plain, S, system,
        )  # fmt: skip
    stream_end()
