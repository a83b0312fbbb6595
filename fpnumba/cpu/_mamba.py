"""Kernels of `fpnumba.cpu.mamba`: all steps of (M), and the adjoint of one; section 5 and 6 of docs/mathematics.md.

A step sees ``y`` only through the mixer. With one of low rank, ``P = U^T S U``, that is through the ``r`` numbers
``sigma = U y``, and with ``p = gate (r + w Q x)``, ``q_i = gate w u_i`` the step's map is

    tau = S sigma,   v = p + sum_i tau_i q_i,
    U norm(v) = (e + G tau) / sqrt(var(p) + 2 cov(p, q) tau + tau^T cov(q, q) tau + eps) + f,

so that after a handful of dot products an iteration is some arithmetic on ``r`` numbers. The others iterate on ``y``.
"""

import math

import numpy as np

from fpnumba.cpu._exp import exp
from fpnumba.cpu._jit import entry, kernel
from fpnumba.cpu._kinds import BLOCK, mix, mix_transpose, pull

# As in `fpnumba.reference.mamba`.
NEAR = 1e-3
PATIENCE = 4


@kernel
def dot(a, b):
    total = a.dtype.type(0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@kernel
def mean(a):
    total = a.dtype.type(0)
    for i in range(a.size):
        total += a[i]
    return total / a.dtype.type(a.size)


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
def decayed(delta, rates, state, c, out, r):
    """``out = exp(delta A) * H`` and ``r = out c`` of one step; ``state, out (D, N)`` may be the same."""
    for d in range(delta.size):
        rate, past, now, step = rates[d], state[d], out[d], delta[d]
        total = delta.dtype.type(0)
        for n in range(c.size):
            value = past[n] * exp(step * rate[n])
            now[n] = value
            total += value * c[n]
        r[d] = total


@kernel
def normal(v, mode, eps, n):
    """``n``: ``v`` centred (mode 2) and scaled (mode 1 and 2); returns the scale."""
    one = v.dtype.type(1)
    if mode == 0:
        for i in range(v.size):
            n[i] = v[i]
        return one
    middle = mean(v) if mode == 2 else v.dtype.type(0)
    total = v.dtype.type(0)
    for i in range(v.size):
        n[i] = v[i] - middle
        total += n[i] * n[i]
    scale = v.dtype.type(1 / math.sqrt(total / v.size + eps))
    for i in range(v.size):
        n[i] *= scale
    return scale


@kernel
def normal_vjp(n, scale, mode, weight, y_bar, v_bar):
    """Cotangent of ``v`` for ``y = weight * n``."""
    for i in range(n.size):
        v_bar[i] = y_bar[i] * weight[i]
    if mode == 0:
        return
    middle = mean(v_bar) if mode == 2 else n.dtype.type(0)
    along = dot(v_bar, n) / n.dtype.type(n.size)
    for i in range(n.size):
        v_bar[i] = scale * (v_bar[i] - middle - n[i] * along)


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


@entry
def solve_steps(
    first,
    last,
    p,
    work_size,
    u,
    alpha,
    direct,
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
    _, steps, dim = x.shape
    rank, kind = alpha.shape[2], x.dtype.type
    rows = np.zeros((2, BLOCK, dim), x.dtype)
    d, out, work = rows[0], rows[1], np.empty(work_size, x.dtype)
    scratch = np.empty((7, dim), x.dtype)
    r, w, v, n, held, weighted = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4], scratch[5]
    past = scratch[6]
    q, mq = np.empty((rank, dim), x.dtype), np.empty(rank)
    S, G, qq, m = (
        np.empty((rank, rank)),
        np.empty((rank, rank)),
        np.empty((rank, rank)),
        np.empty((rank, rank)),
    )
    e, f, pq, sigma, small = (
        np.empty(rank),
        np.empty(rank),
        np.empty(rank),
        np.empty(rank),
        np.empty((6, rank)),
    )
    unit = float(np.finfo(x.dtype).eps)
    for b in range(first, last):
        for t in range(steps):
            xt, yt, bt, ct, dt, zt = x[b, t], y[b, t], B[b, t], C[b, t], delta[b, t], gate[b, t]
            decayed(dt, rates, state[b], ct, state[b], r)
            bc = dot(bt, ct)
            for i in range(dim):
                w[i] = dt[i] * bc + skip[i]
                yt[i] = kind(0)
                d[0, i] = xt[i]
            count, moved, size = 0, 0.0, 0.0
            if direct:
                ut = u[b, t]
                weights_of(ut, alpha[b, t], product, S)
                mix(p, b, t, 1, d, out, work)
                for i in range(dim):
                    held[i] = out[0, i]
                    v[i] = r[i] + w[i] * out[0, i]
                    if gated:
                        v[i] *= zt[i]
                mp = float(mean(v)) if mode == 2 else 0.0
                pp = float(dot(v, v)) / dim - mp * mp
                for i in range(rank):
                    qi, ui = q[i], ut[i]
                    for k in range(dim):
                        qi[k] = w[k] * ui[k]
                    if gated:
                        for k in range(dim):
                            qi[k] *= zt[k]
                    mq[i] = float(mean(qi)) if mode == 2 else 0.0
                    pq[i] = float(dot(v, qi)) / dim - mp * mq[i]
                    f[i] = float(dot(ui, bias))
                    for j in range(i + 1):
                        qq[i, j] = float(dot(qi, q[j])) / dim - mq[i] * mq[j]
                        qq[j, i] = qq[i, j]
                for i in range(rank):
                    ui = ut[i]
                    for k in range(dim):
                        weighted[k] = ui[k] * weight[k]
                    total = float(mean(weighted)) * dim
                    e[i] = float(dot(weighted, v)) - mp * total
                    for j in range(rank):
                        G[i, j] = float(dot(weighted, q[j])) - mq[j] * total
                tight = max(1e-2 * rtol, 4 * unit)
                count = iterate_small(
                    e, G, f, pq, qq, pp, eps, mode, S, tight, max_iter, damping, sigma, small, m
                )
                tau, new = small[0], small[1]
                inverse = kind(small_map(e, G, f, pq, qq, pp, eps, mode, tau, new))
                # from tau to y, and what one more application would change
                times(S, new, small[2])
                ahead = kind(small_map(e, G, f, pq, qq, pp, eps, mode, small[2], small[3]))
                middle, later = mp, mp
                for i in range(rank):
                    middle += mq[i] * tau[i]
                    later += mq[i] * small[2, i]
                for k in range(dim):
                    w[k] = v[k]
                for i in range(rank):
                    qi, one, two = q[i], kind(tau[i]), kind(small[2, i])
                    for k in range(dim):
                        v[k] += one * qi[k]
                        w[k] += two * qi[k]
                far, top = kind(0), kind(0)
                for k in range(dim):
                    value = weight[k] * ((v[k] - kind(middle)) * inverse) + bias[k]
                    other = weight[k] * ((w[k] - kind(later)) * ahead) + bias[k]
                    far = max(far, abs(other - value))
                    top = max(top, abs(value))
                    yt[k] = value
                moved, size = float(far), float(top)
                if not math.isfinite(float(dot(yt, yt))):
                    moved = np.nan
                # u = Q x + P y
                for i in range(rank):
                    two, ui = kind(small[2, i]), ut[i]
                    for k in range(dim):
                        held[k] += two * ui[k]
            else:
                step_size, swings, before = kind(damping), 0, np.inf
                for i in range(dim):
                    past[i] = kind(0)
                while True:
                    for i in range(dim):
                        d[0, i] = xt[i] - yt[i]
                    mix(p, b, t, 1, d, out, work)
                    for i in range(dim):
                        held[i] = out[0, i] + yt[i]
                        v[i] = r[i] + w[i] * held[i]
                        if gated:
                            v[i] *= zt[i]
                    if count > 0 and (
                        moved <= max(atol + rtol * size, 8 * unit * size)
                        or count >= max_iter
                        or moved != moved
                    ):
                        break
                    count += 1
                    normal(v, mode, eps, n)
                    far, top, along = kind(0), kind(0), kind(0)
                    for i in range(dim):
                        change = weight[i] * n[i] + bias[i] - yt[i]
                        along += change * past[i]
                        past[i] = change
                        far = max(far, abs(change))
                        top = max(top, abs(yt[i]), abs(yt[i] + change))
                    moved, size = float(far), float(top)
                    if along < 0 and moved > 0.98 * before:
                        swings += 1
                    if swings >= PATIENCE:
                        step_size, swings = step_size / kind(2), 0
                    before = moved
                    for i in range(dim):
                        yt[i] += step_size * past[i]
                    if not math.isfinite(float(dot(yt, yt))):
                        moved = np.nan
            for i in range(dim):
                drive, row = dt[i] * held[i], state[b, i]
                for k in range(bt.size):
                    row[k] += drive * bt[k]
            iterations[b] = max(iterations[b], count)
            if moved != moved:
                residual[b] = np.nan
                met[b] = False
                continue
            residual[b] = max(residual[b], moved / max(size, 1e-300))
            if not moved <= max(atol + rtol * size, 8 * unit * size):
                met[b] = False


@entry
def pull_step(
    first,
    last,
    t,
    p,
    bar,
    work_size,
    u,
    alpha,
    direct,
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
    rtol,
    max_iter,
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
    met,
):
    """Step ``t``: ``past (B, D, N)`` is ``H_{t-1}``; ``G`` comes with the cotangent of ``H_t`` and leaves with that of
    ``H_{t-1}``."""
    dim, size = x.shape[2], B.shape[2]
    rank, kind = alpha.shape[2], x.dtype.type
    rows = np.zeros((3, BLOCK, dim), x.dtype)
    d, e, out, work = rows[0], rows[1], rows[2], np.empty(work_size, x.dtype)
    now = np.empty((dim, size), x.dtype)
    scratch = np.empty((10, dim), x.dtype)
    r, o, held, n, later, rhs = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4], scratch[5]
    v_bar, through, ones, last_change = scratch[6], scratch[7], scratch[8], scratch[9]
    S, m = np.empty((rank, rank)), np.empty((rank, rank))
    k, seen, left = np.empty(rank), np.empty(rank), np.empty((rank, dim), x.dtype)
    unit = float(np.finfo(x.dtype).eps)
    for i in range(dim):
        ones[i] = kind(1)
    for b in range(first, last):
        xt, yt, bt, ct, dt = x[b, t], y[b, t], B[b, t], C[b, t], delta[b, t]
        zt = gate[b, t] if gated else ones
        decayed(dt, rates, past[b], ct, now, r)
        bc = dot(bt, ct)
        for i in range(dim):
            d[0, i] = xt[i] - yt[i]
        mix(p, b, t, 1, d, out, work)
        for i in range(dim):
            held[i] = out[0, i] + yt[i]
            o[i] = r[i] + (dt[i] * bc + skip[i]) * held[i]
            rhs[i] = zt[i] * o[i]
        scale = normal(rhs, mode, eps, n)
        for i in range(dim):
            later[i] = dt[i] * dot(G[b, i], bt)
            e[0, i] = later[i]
            through[i] = (dt[i] * bc + skip[i]) * zt[i]
        mix_transpose(p, b, t, 1, e, out, work)
        for i in range(dim):
            rhs[i] = y_bar[b, t, i] + later[i] - out[0, i]
        zb = z[b, t]
        if direct:
            # z = rhs + U^T k,  k = S^T U (through * N^T z)
            ut = u[b, t]
            weights_of(ut, alpha[b, t], product, S)
            normal_vjp(n, scale, mode, weight, rhs, v_bar)
            for i in range(dim):
                v_bar[i] *= through[i]
            for i in range(rank):
                seen[i] = float(dot(ut[i], v_bar))
            for j in range(rank):
                lj = left[j]
                normal_vjp(n, scale, mode, weight, ut[j], lj)
                for i in range(dim):
                    lj[i] *= through[i]
            for i in range(rank):
                k[i] = 0.0
                for l in range(rank):
                    k[i] += S[l, i] * seen[l]
            for j in range(rank):
                for l in range(rank):
                    seen[l] = float(dot(ut[l], left[j]))
                for i in range(rank):
                    total = 0.0
                    for l in range(rank):
                        total += S[l, i] * seen[l]
                    m[i, j] = (1.0 if i == j else 0.0) - total
            eliminate(m, k)
            for i in range(dim):
                zb[i] = rhs[i]
            for j in range(rank):
                factor, uj = kind(k[j]), ut[j]
                for i in range(dim):
                    zb[i] += factor * uj[i]
        else:
            for i in range(dim):
                zb[i] = rhs[i]
                last_change[i] = kind(0)
            count, swings, before, step_size = 0, 0, np.inf, kind(1)
            while True:
                normal_vjp(n, scale, mode, weight, zb, v_bar)
                for i in range(dim):
                    e[0, i] = through[i] * v_bar[i]
                mix_transpose(p, b, t, 1, e, out, work)
                far, top, along = kind(0), kind(0), kind(0)
                for i in range(dim):
                    change = rhs[i] + e[0, i] - out[0, i] - zb[i]
                    along += change * last_change[i]
                    last_change[i] = change
                    far = max(far, abs(change))
                    top = max(top, abs(zb[i] + change))
                if along < 0 and float(far) > 0.98 * before:
                    swings += 1
                if swings >= PATIENCE:
                    step_size, swings = step_size / kind(2), 0
                before = float(far)
                for i in range(dim):
                    zb[i] += step_size * last_change[i]
                count += 1
                if not math.isfinite(float(dot(zb, zb))):
                    met[b] = False
                    break
                if float(far) <= max(rtol, 8 * unit) * float(top):
                    break
                if count >= max_iter:
                    met[b] = False
                    break
        normal_vjp(n, scale, mode, weight, zb, v_bar)
        db, cb, bb, gb, ub = delta_bar[b, t], C_bar[b, t], B_bar[b, t], gate_bar[b, t], u_bar[b, t]
        for j in range(size):
            cb[j] = kind(0)
            bb[j] = kind(0)
        for i in range(dim):
            weight_bar[b, i] += zb[i] * n[i]
            bias_bar[b, i] += zb[i]
            if gated:
                gb[i] = v_bar[i] * o[i]
            o_bar = zt[i] * v_bar[i]
            drive = dt[i] * held[i]
            row, coming, rate, total = now[i], G[b, i], rates[i], kind(0)
            rate_row, fed = rate_bar[b, i], kind(0)
            for j in range(size):
                bar_j = coming[j] + o_bar * ct[j]
                cb[j] += o_bar * (row[j] + drive * bt[j])
                bb[j] += drive * bar_j
                fed += bar_j * bt[j]
                exponent = bar_j * row[j]
                total += exponent * rate[j]
                rate_row[j] += exponent * dt[i]
                coming[j] = bar_j * exp(dt[i] * rate[j])
            ub[i] = skip[i] * o_bar + dt[i] * fed
            db[i] = held[i] * fed + total
            skip_bar[b, i] += o_bar * held[i]
            e[0, i] = ub[i]
            d[0, i] = xt[i] - yt[i]
        pull(p, bar, b, t, 1, d, e, out, work)
        for i in range(dim):
            x_bar[b, t, i] = out[0, i]
