"""One step of FP-Mamba with a mixer of low rank, and its adjoint, from the arguments of the parameters on.

    u_i = activation(a_i) / max(|activation(a_i)|, eps),   alpha_i = top sigmoid(.),   b, c = p / max(|p|, bc_eps),

then the step of (M). What the steps have in common, the products with the hidden state, is between the calls.
"""

import math

import numpy as np

from fpnumba.cpu._exp import exp
from fpnumba.cpu._jit import entry, kernel
from fpnumba.cpu._mamba_low_rank import SHORT, SQUARE, WIDE, mixed, step, step_back
from fpnumba.cpu._mamba_parts import decayed, dot, take_over

# Activations, numbered as in `fpnumba.nn.kernels`.
IDENTITY, RELU, SILU = 0, 1, 2


@kernel
def unit(p, eps, out):
    """``out = p / max(|p|, eps)``, `p` itself for a negative ``eps``; returns ``|p|``."""
    length = math.sqrt(dot(p, p))
    inverse = p.dtype.type(1 / max(length, eps)) if eps >= 0 else p.dtype.type(1)
    for i in range(p.size):
        out[i] = p[i] * inverse
    return p.dtype.type(length)


@kernel
def unit_vjp(out, length, eps, out_bar, bar):
    """Cotangent of `unit` into ``bar``, which may be ``out_bar``."""
    kind = out.dtype.type
    along = dot(out, out_bar) if length >= eps and eps >= 0 else kind(0)
    inverse = kind(1 / max(float(length), eps)) if eps >= 0 else kind(1)
    for i in range(out.size):
        bar[i] = (out_bar[i] - along * out[i]) * inverse


@kernel
def vectors(a, activation, eps, top, u, norm, alpha):
    """``u (r, D)``, its lengths before normalisation and ``alpha (r,)`` from pre-activations ``a (r D + r)``."""
    rank, dim, one, zero = u.shape[0], u.shape[1], a.dtype.type(1), a.dtype.type(0)
    for i in range(rank):
        piece, ui = a[i * dim : (i + 1) * dim], u[i]
        if activation == SILU:
            for k in range(dim):
                ui[k] = piece[k] / (one + exp(-piece[k]))
        elif activation == RELU:
            for k in range(dim):
                ui[k] = zero if piece[k] < zero else piece[k]
        else:
            for k in range(dim):
                ui[k] = piece[k]
        norm[i] = unit(ui, eps, ui)
        alpha[i] = a.dtype.type(top) / (one + exp(-a[rank * dim + i]))


@kernel
def vectors_vjp(a, activation, eps, top, u, norm, alpha, u_bar, alpha_bar, a_bar):
    """Cotangent of `vectors`; ``u_bar`` is overwritten."""
    rank, dim, one, zero = u.shape[0], u.shape[1], a.dtype.type(1), a.dtype.type(0)
    for i in range(rank):
        piece, bars, ubi = a[i * dim : (i + 1) * dim], a_bar[i * dim : (i + 1) * dim], u_bar[i]
        unit_vjp(u[i], norm[i], eps, ubi, ubi)
        if activation == SILU:
            for k in range(dim):
                opened = one / (one + exp(-piece[k]))
                bars[k] = ubi[k] * opened * (one + piece[k] * (one - opened))
        else:
            for k in range(dim):
                bars[k] = ubi[k] if activation == IDENTITY or piece[k] > zero else zero
        a_bar[rank * dim + i] = alpha_bar[i] * alpha[i] * (one - alpha[i] / a.dtype.type(top))


@kernel
def softplus(raw, bias, out):
    one, zero = raw.dtype.type(1), raw.dtype.type(0)
    for i in range(raw.size):
        x = raw[i] + bias[i]
        # 1 + e is rounded, and what it lost is put back: log1p without a call
        small = exp(-abs(x))
        total = one + small
        out[i] = max(x, zero) + math.log(total) + (small - (total - one)) / total


@entry
def softplus_rows(first, last, raw, bias, out):
    """``out = log(1 + exp(raw + bias))``; ``raw, out (N, D)``."""
    for n in range(first, last):
        softplus(raw[n], bias, out[n])


@entry
def forward_step(
    first,
    last,
    t,
    at,
    place,
    a,
    b_argument,
    c_argument,
    activation,
    unit_eps,
    top,
    product,
    bc_eps,
    x,
    delta,
    rates,
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
    u,
    norm,
    alpha,
    b,
    b_norm,
    c,
    c_norm,
    y,
    iterations,
    residual,
    met,
):
    """Step ``t`` of the sequences: ``y`` and what is told of it at ``t``, the parameters at ``at``.

    ``a (B, ., r D + r)``, used at `place`, ``b_argument, c_argument (B, T, N)``. ``state (B, D, N)`` is taken over
    the step.
    """
    dim, rank = x.shape[2], alpha.shape[2]
    wide, q = np.empty((WIDE, dim), x.dtype), np.empty((rank, dim), x.dtype)
    square, short = np.empty((SQUARE, rank, rank)), np.empty((SHORT, rank))
    for i in range(first, last):
        vectors(a[i, place], activation, unit_eps, top, u[i, at], norm[i, at], alpha[i, at])
        b_norm[i, at] = unit(b_argument[i, t], bc_eps, b[i, at])
        c_norm[i, at] = unit(c_argument[i, t], bc_eps, c[i, at])
        count, left, good = step(
            u[i, at],
            alpha[i, at],
            product,
            x[i, t],
            delta[i, t],
            rates,
            b[i, at],
            c[i, at],
            skip,
            gate[i, t],
            gated,
            weight,
            bias,
            mode,
            eps,
            rtol,
            atol,
            max_iter,
            damping,
            state[i],
            y[i, t],
            wide,
            q,
            square,
            short,
        )
        iterations[i, t] = count
        # a NaN stays
        residual[i] = left if left != left else max(left, residual[i])
        met[i] = met[i] and good


@entry
def decayed_states(first, last, begin, u, alpha, product, x, delta, rates, b, c, y, state, now):
    """``now[:, k] = exp(delta A) * H`` before each step ``begin + k`` of a span; ``state`` comes with the ``H`` before
    the first, and is overwritten."""
    wide = np.empty((2, x.shape[2]), x.dtype)
    d, held = wide[0], wide[1]
    for i in range(first, last):
        for k in range(now.shape[1]):
            t = begin + k
            decayed(delta[i, t], rates, state[i], c[i, t], now[i, k], d)
            xt, yt, past, later = x[i, t], y[i, t], now[i, k], state[i]
            for j in range(d.size):
                d[j] = xt[j] - yt[j]
            mixed(u[i, t], alpha[i, t], product, d, held)
            for j in range(d.size):
                held[j] += yt[j]
                row, source = later[j], past[j]
                for l in range(row.size):
                    row[l] = source[l]
            take_over(delta[i, t], held, b[i, t], later)


@entry
def backward_step(
    first,
    last,
    t,
    at,
    a,
    activation,
    unit_eps,
    top,
    product,
    bc_eps,
    x,
    delta,
    rates,
    skip,
    gate,
    gated,
    weight,
    mode,
    eps,
    u,
    norm,
    alpha,
    b,
    b_norm,
    c,
    c_norm,
    now,
    G,
    y,
    y_bar,
    carry,
    z,
    x_bar,
    a_bar,
    delta_bar,
    b_bar,
    c_bar,
    gate_bar,
    rate_bar,
    skip_bar,
    weight_bar,
    bias_bar,
):
    """Adjoint of step ``t``, of which ``now[:, at]`` is the decayed state; ``carry (B, D)`` is what later steps add to
    ``y_bar``, and ``G (B, D, N)`` goes back over the step. Cotangents of arguments are written at ``t``."""
    dim, rank = x.shape[2], alpha.shape[2]
    wide, q = np.empty((WIDE, dim), x.dtype), np.empty((rank, dim), x.dtype)
    square, short = np.empty((SQUARE, rank, rank)), np.empty((SHORT, rank))
    total, drive_bar = np.empty(dim, x.dtype), np.empty(dim, x.dtype)
    u_bar, alpha_bar = np.empty((rank, dim), x.dtype), np.empty(rank, x.dtype)
    for i in range(first, last):
        here, more = y_bar[i, t], carry[i]
        for k in range(dim):
            total[k] = here[k] + more[k]
        step_back(
            u[i, t],
            alpha[i, t],
            product,
            x[i, t],
            delta[i, t],
            rates,
            b[i, t],
            c[i, t],
            skip,
            gate[i, t],
            gated,
            weight,
            mode,
            eps,
            now[i, at],
            G[i],
            y[i, t],
            total,
            z[i, t],
            drive_bar,
            x_bar[i, t],
            delta_bar[i, t],
            b_bar[i, t],
            c_bar[i, t],
            gate_bar[i, t],
            rate_bar[i],
            skip_bar[i],
            weight_bar[i],
            bias_bar[i],
            u_bar,
            alpha_bar,
            wide,
            q,
            square,
            short,
        )
        vectors_vjp(
            a[i, t],
            activation,
            unit_eps,
            top,
            u[i, t],
            norm[i, t],
            alpha[i, t],
            u_bar,
            alpha_bar,
            a_bar[i, t],
        )
        unit_vjp(b[i, t], b_norm[i, t], bc_eps, b_bar[i, t], b_bar[i, t])
        unit_vjp(c[i, t], c_norm[i, t], bc_eps, c_bar[i, t], c_bar[i, t])
