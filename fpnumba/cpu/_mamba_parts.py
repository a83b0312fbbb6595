"""What every step of (M) is made of, whatever its mixer; section 5 and 6 of docs/mathematics.md."""

import math

from fpnumba.cpu._exp import exp
from fpnumba.cpu._jit import kernel


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
def take_over(delta, u, b, state):
    """``state += (delta u) b^T``."""
    for i in range(delta.size):
        drive, row = delta[i] * u[i], state[i]
        for k in range(b.size):
            row[k] += drive * b[k]


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
def scan_bars(
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
):
    """From the cotangent of what the norm sees to those behind it, and ``G (D, N)`` over the step."""
    zero = delta.dtype.type(0)
    size = b.size
    for j in range(size):
        c_bar[j] = zero
        b_bar[j] = zero
    for i in range(delta.size):
        o_bar = v_bar[i]
        if gated:
            gate_bar[i] = v_bar[i] * o[i]
            o_bar *= gate[i]
        drive, step_size = delta[i] * held[i], delta[i]
        row, coming, rate, total = now[i], G[i], rates[i], zero
        rate_row, fed = rate_bar[i], zero
        for j in range(size):
            bar_j = coming[j] + o_bar * c[j]
            c_bar[j] += o_bar * (row[j] + drive * b[j])
            b_bar[j] += drive * bar_j
            fed += bar_j * b[j]
            exponent = bar_j * row[j]
            total += exponent * rate[j]
            rate_row[j] += exponent * step_size
            coming[j] = bar_j * exp(step_size * rate[j])
        u_bar[i] = skip[i] * o_bar + step_size * fed
        delta_bar[i] = held[i] * fed + total
        skip_bar[i] += o_bar * held[i]
