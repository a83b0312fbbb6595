"""Kernels of `fpnumba.cpu.mamba` for mixers of low rank: a step of (M), its adjoint, and what the doors call."""

import math

import numpy as np

from fpnumba.cpu._jit import entry, kernel
from fpnumba.cpu._mamba_parts import decayed, dot, mean, normal, normal_vjp, scan_bars, take_over
from fpnumba.cpu._mamba_small import eliminate, iterate_small, small_map, times, weights_of

# Rows of scratch that a step takes: vectors of D numbers; matrices and vectors of the rank's size, in double precision.
WIDE, SQUARE, SHORT = 9, 4, 13


@kernel
def mixed(u, alpha, product, x, out):
    """``out = Q x``; `x` and `out` may not be the same."""
    for k in range(x.size):
        out[k] = x[k]
    for i in range(alpha.size):
        ui = u[i]
        factor = alpha[i] * (dot(ui, out) if product else dot(ui, x))
        for k in range(x.size):
            out[k] -= factor * ui[k]


@kernel
def mixed_transpose(u, alpha, product, e, out):
    """``out = Q^T e``."""
    for k in range(e.size):
        out[k] = e[k]
    for i in range(alpha.size - 1, -1, -1):
        ui = u[i]
        factor = alpha[i] * (dot(ui, out) if product else dot(ui, e))
        for k in range(e.size):
            out[k] -= factor * ui[k]


@kernel
def step(
    u,
    alpha,
    product,
    x,
    delta,
    rates,
    b,
    c,
    skip,
    gate,
    gated,
    weight,
    bias,
    mode,
    eps,
    rtol,
    atol,
    max_iter,
    damping,
    state,
    y,
    wide,
    q,
    square,
    short,
):
    """Solve one step of one sequence, ``y``, and take ``state (D, N)`` over it.

    Returns the number of iterations, the residual, and whether the tolerance was met. The last four are scratch,
    ``q (r, D)``.
    """
    kind, dim, rank = x.dtype.type, x.size, alpha.size
    r, w, v, held, weighted = wide[0], wide[1], wide[2], wide[3], wide[4]
    S, G, qq, m = square[0], square[1], square[2], square[3]
    e, f, pq, mq, sigma, ahead_tau, spare = (
        short[0],
        short[1],
        short[2],
        short[3],
        short[4],
        short[5],
        short[6],
    )
    small = short[7:13]
    unit = float(np.finfo(x.dtype).eps)
    decayed(delta, rates, state, c, state, r)
    bc = dot(b, c)
    weights_of(u, alpha, product, S)
    mixed(u, alpha, product, x, held)
    for i in range(dim):
        w[i] = delta[i] * bc + skip[i]
        v[i] = r[i] + w[i] * held[i]
    if gated:
        for i in range(dim):
            v[i] *= gate[i]
    mp = float(mean(v)) if mode == 2 else 0.0
    pp = float(dot(v, v)) / dim - mp * mp
    for i in range(rank):
        qi, ui = q[i], u[i]
        for k in range(dim):
            qi[k] = w[k] * ui[k]
        if gated:
            for k in range(dim):
                qi[k] *= gate[k]
        mq[i] = float(mean(qi)) if mode == 2 else 0.0
        pq[i] = float(dot(v, qi)) / dim - mp * mq[i]
        f[i] = float(dot(ui, bias))
        for j in range(i + 1):
            qq[i, j] = float(dot(qi, q[j])) / dim - mq[i] * mq[j]
            qq[j, i] = qq[i, j]
    for i in range(rank):
        ui = u[i]
        for k in range(dim):
            weighted[k] = ui[k] * weight[k]
        total = float(mean(weighted)) * dim
        e[i] = float(dot(weighted, v)) - mp * total
        for j in range(rank):
            G[i, j] = float(dot(weighted, q[j])) - mq[j] * total
    tight = max(1e-2 * rtol, 4 * unit)
    count = iterate_small(e, G, f, pq, qq, pp, eps, mode, S, tight, max_iter, damping, sigma, small, m)
    tau, new = small[0], small[1]
    inverse = kind(small_map(e, G, f, pq, qq, pp, eps, mode, tau, new))
    # from tau to y, and what one more application would change
    times(S, new, ahead_tau)
    ahead = kind(small_map(e, G, f, pq, qq, pp, eps, mode, ahead_tau, spare))
    middle, later = mp, mp
    for i in range(rank):
        middle += mq[i] * tau[i]
        later += mq[i] * ahead_tau[i]
    for k in range(dim):
        w[k] = v[k]
    for i in range(rank):
        qi, one, two = q[i], kind(tau[i]), kind(ahead_tau[i])
        for k in range(dim):
            v[k] += one * qi[k]
            w[k] += two * qi[k]
    far, top, first, second = kind(0), kind(0), kind(middle), kind(later)
    for k in range(dim):
        value = weight[k] * ((v[k] - first) * inverse) + bias[k]
        other = weight[k] * ((w[k] - second) * ahead) + bias[k]
        far = max(far, abs(other - value))
        top = max(top, abs(value))
        y[k] = value
    # u = Q x + P y
    for i in range(rank):
        two, ui = kind(ahead_tau[i]), u[i]
        for k in range(dim):
            held[k] += two * ui[k]
    take_over(delta, held, b, state)
    moved, size = float(far), float(top)
    if not math.isfinite(float(dot(y, y))):
        return count, np.nan, False
    return count, moved / max(size, 1e-300), moved <= max(atol + rtol * size, 8 * unit * size)


@kernel
def adjoint(u, alpha, product, through, n, scale, mode, weight, rhs, z, v_bar, left, square, short):
    """Solve ``z = rhs + P^T diag(through) N^T z`` with ``N`` the norm's derivative.

    That is ``z = rhs + U^T k``, ``k = S^T U (through * N^T z)``. The last four are scratch, ``left (r, D)``.
    """
    rank, dim, kind = alpha.size, z.size, z.dtype.type
    S, m, k, seen = square[0], square[1], short[0], short[1]
    weights_of(u, alpha, product, S)
    normal_vjp(n, scale, mode, weight, rhs, v_bar)
    for i in range(dim):
        v_bar[i] *= through[i]
    for i in range(rank):
        seen[i] = float(dot(u[i], v_bar))
    for j in range(rank):
        lj = left[j]
        normal_vjp(n, scale, mode, weight, u[j], lj)
        for i in range(dim):
            lj[i] *= through[i]
    for i in range(rank):
        k[i] = 0.0
        for l in range(rank):
            k[i] += S[l, i] * seen[l]
    for j in range(rank):
        for l in range(rank):
            seen[l] = float(dot(u[l], left[j]))
        for i in range(rank):
            total = 0.0
            for l in range(rank):
                total += S[l, i] * seen[l]
            m[i, j] = (1.0 if i == j else 0.0) - total
    eliminate(m, k)
    for i in range(dim):
        z[i] = rhs[i]
    for j in range(rank):
        factor, uj = kind(k[j]), u[j]
        for i in range(dim):
            z[i] += factor * uj[i]


@kernel
def mixer_bars(u, alpha, product, d, e, u_bar, alpha_bar, x_bar, seen):
    """Cotangents of ``Q d`` for ``e``: of ``u``, ``alpha`` and (``x_bar``) of ``d``. Scratch ``seen (r, D)``."""
    rank, dim = alpha.size, d.size
    # what each reflection saw
    for i in range(rank):
        now = seen[i]
        if i == 0 or not product:
            for k in range(dim):
                now[k] = d[k]
        else:
            past, ui = seen[i - 1], u[i - 1]
            factor = alpha[i - 1] * dot(ui, past)
            for k in range(dim):
                now[k] = past[k] - factor * ui[k]
    for k in range(dim):
        x_bar[k] = e[k]
    for i in range(rank - 1, -1, -1):
        # a reflection sees what the later ones leave of e; the terms of DPLR all see the same
        ui, ubi, saw = u[i], u_bar[i], seen[i]
        ci = dot(ui, saw)
        if product:
            along = dot(ui, x_bar)
            for k in range(dim):
                ubi[k] = -alpha[i] * (ci * x_bar[k] + along * saw[k])
        else:
            along = dot(ui, e)
            for k in range(dim):
                ubi[k] = -alpha[i] * (ci * e[k] + along * saw[k])
        alpha_bar[i] = -ci * along
        factor = alpha[i] * along
        for k in range(dim):
            x_bar[k] -= factor * ui[k]


@kernel
def step_back(
    u,
    alpha,
    product,
    x,
    delta,
    rates,
    b,
    c,
    skip,
    gate,
    gated,
    weight,
    mode,
    eps,
    now,
    G,
    y,
    y_bar,
    z,
    u_bar,
    x_bar,
    delta_bar,
    b_bar,
    c_bar,
    gate_bar,
    rate_bar,
    skip_bar,
    weight_bar,
    bias_bar,
    vectors_bar,
    alpha_bar,
    wide,
    q,
    square,
    short,
):
    """Differentiate one step at its fixed point ``y``; ``now = exp(delta A) * H_{t-1}``.

    ``G`` comes with the cotangent of ``H_t`` and leaves with that of ``H_{t-1}``; ``z``, of which the step is
    differentiated, is for `y_bar`; `vectors_bar` is of ``u``, `u_bar` of ``u_t`` in (M). The last four are scratch.
    """
    dim = x.size
    d, held, o, n, later, rhs = wide[0], wide[1], wide[2], wide[3], wide[4], wide[5]
    v_bar, through, back = wide[6], wide[7], wide[8]
    bc = dot(b, c)
    for i in range(dim):
        d[i] = x[i] - y[i]
    mixed(u, alpha, product, d, held)
    for i in range(dim):
        held[i] += y[i]
        through[i] = delta[i] * bc + skip[i]
        o[i] = dot(now[i], c) + through[i] * held[i]
        rhs[i] = o[i]
        later[i] = delta[i] * dot(G[i], b)
    if gated:
        for i in range(dim):
            rhs[i] *= gate[i]
            through[i] *= gate[i]
    scale = normal(rhs, mode, eps, n)
    mixed_transpose(u, alpha, product, later, back)
    for i in range(dim):
        rhs[i] = y_bar[i] + later[i] - back[i]
    adjoint(u, alpha, product, through, n, scale, mode, weight, rhs, z, v_bar, q, square, short)
    normal_vjp(n, scale, mode, weight, z, v_bar)
    for i in range(dim):
        weight_bar[i] += z[i] * n[i]
        bias_bar[i] += z[i]
    scan_bars(
        delta,
        held,
        b,
        c,
        skip,
        gate,
        gated,
        v_bar,
        o,
        rates,
        now,
        G,
        gate_bar,
        b_bar,
        c_bar,
        delta_bar,
        u_bar,
        rate_bar,
        skip_bar,
    )
    mixer_bars(u, alpha, product, d, u_bar, vectors_bar, alpha_bar, x_bar, q)


@entry
def solve_steps(
    first,
    last,
    u,
    alpha,
    product,
    x,
    delta,
    rates,
    B,
    C,
    skip,
    gate,
    gated,
    weight,
    bias,
    mode,
    eps,
    rtol,
    atol,
    max_iter,
    damping,
    state,
    y,
    iterations,
    residual,
    met,
):
    """All steps of the sequences; ``state`` comes with ``H_0`` and leaves with the last."""
    steps, dim, rank = x.shape[1], x.shape[2], alpha.shape[2]
    wide, q = np.empty((WIDE, dim), x.dtype), np.empty((rank, dim), x.dtype)
    square, short = np.empty((SQUARE, rank, rank)), np.empty((SHORT, rank))
    for b in range(first, last):
        for t in range(steps):
            count, left, good = step(
                u[b, t],
                alpha[b, t],
                product,
                x[b, t],
                delta[b, t],
                rates,
                B[b, t],
                C[b, t],
                skip,
                gate[b, t],
                gated,
                weight,
                bias,
                mode,
                eps,
                rtol,
                atol,
                max_iter,
                damping,
                state[b],
                y[b, t],
                wide,
                q,
                square,
                short,
            )
            iterations[b] = max(iterations[b], count)
            # a NaN stays
            residual[b] = left if left != left else max(left, residual[b])
            met[b] = met[b] and good


@entry
def pull_step(
    first,
    last,
    t,
    vectors_bar,
    alpha_bar,
    u,
    alpha,
    product,
    x,
    delta,
    rates,
    B,
    C,
    skip,
    gate,
    gated,
    weight,
    mode,
    eps,
    past,
    G,
    y,
    y_bar,
    z,
    u_bar,
    x_bar,
    delta_bar,
    B_bar,
    C_bar,
    gate_bar,
    rate_bar,
    skip_bar,
    weight_bar,
    bias_bar,
):
    """Step ``t``: ``past (B, D, N)`` is ``H_{t-1}``; ``G`` comes with the cotangent of ``H_t`` and leaves with that of
    ``H_{t-1}``."""
    dim, rank = x.shape[2], alpha.shape[2]
    wide, q = np.empty((WIDE, dim), x.dtype), np.empty((rank, dim), x.dtype)
    square, short = np.empty((SQUARE, rank, rank)), np.empty((SHORT, rank))
    now = np.empty((dim, B.shape[2]), x.dtype)
    for b in range(first, last):
        decayed(delta[b, t], rates, past[b], C[b, t], now, wide[0])
        step_back(
            u[b, t],
            alpha[b, t],
            product,
            x[b, t],
            delta[b, t],
            rates,
            B[b, t],
            C[b, t],
            skip,
            gate[b, t],
            gated,
            weight,
            mode,
            eps,
            now,
            G[b],
            y[b, t],
            y_bar[b, t],
            z[b, t],
            u_bar[b, t],
            x_bar[b, t],
            delta_bar[b, t],
            B_bar[b, t],
            C_bar[b, t],
            gate_bar[b, t],
            rate_bar[b],
            skip_bar[b],
            weight_bar[b],
            bias_bar[b],
            vectors_bar[b, t],
            alpha_bar[b, t],
            wide,
            q,
            square,
            short,
        )
