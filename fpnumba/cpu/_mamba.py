"""Kernels of `fpnumba.cpu.mamba` for mixers of any kind: all steps of (M), and the adjoint of one; section 5 and 6 of
docs/mathematics.md. Both iterate on ``y``."""

import math

import numpy as np

from fpnumba.cpu._jit import entry
from fpnumba.cpu._kinds import BLOCK, mix, mix_again, mix_transpose, pull
from fpnumba.cpu._mamba_parts import decayed, dot, normal, normal_vjp, scan_bars, take_over
from fpnumba.cpu._mamba_small import PATIENCE

# Changes of an adjoint that have grown so much since the first will not shrink: it has no solution that iterating
# finds, and what is found without the step's own Jacobian, as by the one-step gradient, takes its place.
GROWN = 1e4


@entry
def solve_steps(
    first,
    last,
    begin,
    end,
    shift,
    p,
    work_size,
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
    """Steps from ``begin`` to ``end`` of the sequences; ``state`` comes with the ``H`` before and leaves with the last.

    What mixes in step ``t``, and its ``B`` and ``C``, stand at ``t - shift``.
    """
    dim = x.shape[2]
    kind = x.dtype.type
    rows = np.zeros((2, BLOCK, dim), x.dtype)
    d, out, work = rows[0], rows[1], np.empty(work_size, x.dtype)
    scratch = np.empty((6, dim), x.dtype)
    r, w, v, n, held, past = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4], scratch[5]
    unit = float(np.finfo(x.dtype).eps)
    for b in range(first, last):
        for t in range(begin, end):
            at = t - shift
            xt, yt, bt, ct, dt, zt = x[b, t], y[b, t], B[b, at], C[b, at], delta[b, t], gate[b, t]
            decayed(dt, rates, state[b], ct, state[b], r)
            bc = dot(bt, ct)
            for i in range(dim):
                w[i] = dt[i] * bc + skip[i]
                yt[i] = kind(0)
                past[i] = kind(0)
            count, moved, size = 0, 0.0, 0.0
            step_size, swings, before = kind(damping), 0, np.inf
            while True:
                for i in range(dim):
                    d[0, i] = xt[i] - yt[i]
                if count == 0:
                    mix(p, b, at, 1, d, out, work)
                else:
                    mix_again(p, b, at, 1, d, out, work)
                for i in range(dim):
                    held[i] = out[0, i] + yt[i]
                    v[i] = r[i] + w[i] * held[i]
                if gated:
                    for i in range(dim):
                        v[i] *= zt[i]
                enough = moved <= max(atol + rtol * size, 8 * unit * size)
                if count > 0 and (enough or count >= max_iter or moved != moved):
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
            take_over(dt, held, bt, state[b])
            iterations[b] = max(iterations[b], count)
            if moved != moved:
                residual[b] = np.nan
                met[b] = False
                continue
            residual[b] = max(residual[b], moved / max(size, 1e-300))
            if not moved <= max(atol + rtol * size, 8 * unit * size):
                met[b] = False


@entry
def known_states(first, last, begin, end, shift, p, work_size, x, delta, rates, B, C, y, states):
    """``states[k] (B, D, N)``, the state after ``k`` of the steps from ``begin`` to ``end``, of a known ``y``; the
    first is given. What mixes in step ``t`` stands at ``t - shift``."""
    dim = x.shape[2]
    rows = np.zeros((2, BLOCK, dim), x.dtype)
    d, out, work = rows[0], rows[1], np.empty(work_size, x.dtype)
    scratch = np.empty((2, dim), x.dtype)
    held, r = scratch[0], scratch[1]
    for b in range(first, last):
        for t in range(begin, end):
            xt, yt, now = x[b, t], y[b, t], states[t - begin + 1, b]
            for i in range(dim):
                d[0, i] = xt[i] - yt[i]
            mix(p, b, t - shift, 1, d, out, work)
            for i in range(dim):
                held[i] = out[0, i] + yt[i]
            decayed(delta[b, t], rates, states[t - begin, b], C[b, t], now, r)
            take_over(delta[b, t], held, B[b, t], now)


@entry
def pull_step(
    first,
    last,
    t,
    shift,
    p,
    bar,
    work_size,
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
    ``H_{t-1}``. What mixes, and its cotangents, stand at ``t - shift``."""
    at = t - shift
    dim, size = x.shape[2], B.shape[2]
    kind = x.dtype.type
    rows = np.zeros((3, BLOCK, dim), x.dtype)
    d, e, out, work = rows[0], rows[1], rows[2], np.empty(work_size, x.dtype)
    now = np.empty((dim, size), x.dtype)
    scratch = np.empty((8, dim), x.dtype)
    o, held, n, later, rhs = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    v_bar, through, last_change = scratch[5], scratch[6], scratch[7]
    unit = float(np.finfo(x.dtype).eps)
    for b in range(first, last):
        xt, yt, bt, ct, dt, zt = x[b, t], y[b, t], B[b, t], C[b, t], delta[b, t], gate[b, t]
        decayed(dt, rates, past[b], ct, now, o)
        bc = dot(bt, ct)
        for i in range(dim):
            d[0, i] = xt[i] - yt[i]
        mix(p, b, at, 1, d, out, work)
        for i in range(dim):
            held[i] = out[0, i] + yt[i]
            through[i] = dt[i] * bc + skip[i]
            o[i] += through[i] * held[i]
            rhs[i] = o[i]
            later[i] = dt[i] * dot(G[b, i], bt)
            e[0, i] = later[i]
        if gated:
            for i in range(dim):
                rhs[i] *= zt[i]
                through[i] *= zt[i]
        scale = normal(rhs, mode, eps, n)
        mix_transpose(p, b, at, 1, e, out, work)
        zb = z[b, t]
        for i in range(dim):
            rhs[i] = y_bar[b, t, i] + later[i] - out[0, i]
            zb[i] = rhs[i]
            last_change[i] = kind(0)
        count, swings, before, step_size, first_far = 0, 0, np.inf, kind(1), np.inf
        while True:
            normal_vjp(n, scale, mode, weight, zb, v_bar)
            for i in range(dim):
                e[0, i] = through[i] * v_bar[i]
            mix_transpose(p, b, at, 1, e, out, work)
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
            if float(far) <= max(rtol, 8 * unit) * float(top):
                break
            if count == 1:
                first_far = float(far)
            if count >= max_iter or not float(far) <= GROWN * first_far:
                met[b] = False
                if not float(far) < first_far:
                    for i in range(dim):
                        zb[i] = rhs[i]
                break
        normal_vjp(n, scale, mode, weight, zb, v_bar)
        ub = u_bar[b, t]
        for i in range(dim):
            weight_bar[b, i] += zb[i] * n[i]
            bias_bar[b, i] += zb[i]
        scan_bars(
            dt,
            held,
            bt,
            ct,
            skip,
            zt,
            gated,
            v_bar,
            o,
            rates,
            now,
            G[b],
            gate_bar[b, t],
            B_bar[b, t],
            C_bar[b, t],
            delta_bar[b, t],
            ub,
            rate_bar[b],
            skip_bar[b],
        )
        for i in range(dim):
            e[0, i] = ub[i]
            d[0, i] = xt[i] - yt[i]
        pull(p, bar, b, at, 1, d, e, out, work)
        for i in range(dim):
            x_bar[b, t, i] = out[0, i]
