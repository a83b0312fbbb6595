"""All steps of FP-Mamba with a Kronecker mixer, and their adjoint, compiled: each thread takes its own sequences
through time, products with the feedback weights included.

Those products are sums in an order that does not depend on how many sequences are multiplied together, so results
do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fpnumba.cpu._jit import entry, room_hash, stamped
from fpnumba.cpu._kinds import Kronecker
from fpnumba.cpu._mamba import known_states, pull_step, solve_steps
from fpnumba.cpu._mamba_fused import softplus, unit, unit_vjp
from fpnumba.cpu._mamba_parts import dot
from fpnumba.cpu._tiles import BYTES, ROWS, VECTORS, add_product
from fpnumba.nn.kernels import SIGMOID, activate, activate_vjp, sources_hash
from fpnumba.nn.mixer_kernels import kronecker_factor, kronecker_factor_vjp
from fpnumba.solve import Status

CONVERGED, MAX_ITER = int(Status.CONVERGED), int(Status.MAX_ITER)
DIVERGED, NONFINITE_INPUT = int(Status.DIVERGED), int(Status.NONFINITE_INPUT)


def fused(function: Callable[..., Any]) -> Any:
    """As :func:`fpnumba.cpu._jit.entry`, for what calls kernels of that folder and of this one."""
    return stamped(entry(function), room_hash(), sources_hash())


def panel_width(itemsize: int) -> int:
    """Columns of a panel: those of a tile of :mod:`fpnumba.cpu._tiles`."""
    return VECTORS * BYTES // itemsize


def panels(weight: Any) -> Any:
    """A matrix ``(inner, columns)`` as :func:`multiply` takes it: panels of columns, ``(., inner, width)``, filled up
    with zeros."""
    inner, columns = weight.shape
    width = panel_width(weight.itemsize)
    whole = columns // width
    packed = np.zeros((-(-columns // width), inner, width), weight.dtype)
    packed[:whole] = weight[:, : whole * width].reshape(inner, whole, width).swapaxes(0, 1)
    packed[whole:, :, : columns - whole * width] = weight[:, whole * width :]
    return packed


@fused
def multiply(a: Any, packed: Any, piece: Any, out: Any) -> None:
    """``out = a W``: ``a (rows, inner)`` with a multiple of `ROWS` rows, ``packed`` from :func:`panels`, ``piece (rows,
    width)`` scratch."""
    count, inner, width = packed.shape
    rows, one = a.shape[0], a.dtype.type(1)
    for k in range(count):
        piece[:] = a.dtype.type(0)
        add_product(a, 0, inner, 1, rows, inner, packed, k * inner * width, width, one, piece, 0)
        for i in range(rows):
            for j in range(width):
                out[i, k * width + j] = piece[i, j]


@fused
def finite(a: Any) -> bool:
    """Whether all of a flat array is."""
    total = a.dtype.type(0)
    for i in range(a.size):
        total += a[i]
    # a sum may overflow where no term has
    if math.isfinite(total):
        return True
    for i in range(a.size):  # noqa: SIM110
        if not math.isfinite(a[i]):
            return False
    return True


@fused
def seen(base: Any, fed: Any, at: int, argument: Any) -> None:
    """``argument = base + fed[at:]``, or for a negative ``at`` the base."""
    for j in range(base.size):
        argument[j] = base[j] + fed[at + j] if at >= 0 else base[j]


@fused
def handed(bar: Any, at: int, row: Any) -> None:
    """``row[at:] = bar``, the adjoint of :func:`seen`; for a negative ``at`` nothing."""
    if at >= 0:
        for j in range(bar.size):
            row[at + j] = bar[j]


@fused
def step_sizes(argument: Any, weight: Any, bias: Any, small: Any, delta: Any) -> None:
    """``delta (D,)`` from the argument of a step: ``weight (rank, D)``, without rows for the identity; ``small (2,
    H)`` is scratch."""
    raw, found = small[0], small[1]
    if weight.shape[0] == 0:
        for h in range(raw.size):
            raw[h] = argument[h]
    else:
        raw[:] = raw.dtype.type(0)
        for r in range(weight.shape[0]):
            factor, row = argument[r], weight[r]
            for h in range(raw.size):
                raw[h] += factor * row[h]
    softplus(raw, bias, found)
    channels = delta.size // raw.size
    for h in range(raw.size):
        for i in range(channels):
            delta[h * channels + i] = found[h]


@fused
def step_sizes_vjp(
    delta: Any, delta_bar: Any, weight: Any, raw_bar: Any, argument_bar: Any, wanted: Any
) -> None:
    """Cotangent of what softplus sees, summed over the channels of a head, and if `wanted` of the argument."""
    channels = delta.size // raw_bar.size
    for h in range(raw_bar.size):
        total = delta.dtype.type(0)
        for i in range(channels):
            total += delta_bar[h * channels + i]
        raw_bar[h] = -delta.dtype.type(math.expm1(-delta[h * channels])) * total
    if not wanted:
        return
    if weight.shape[0] == 0:
        for h in range(raw_bar.size):
            argument_bar[h] = raw_bar[h]
    for r in range(weight.shape[0]):
        argument_bar[r] = dot(weight[r], raw_bar)


@fused
def factors(
    argument: Any, activation: int, start: float, eps: float, spectral: Any, top: float,
    p1: Any, diag1: Any, p2: Any, diag2: Any, k1: Any, k2: Any, build: Any,
) -> None:  # fmt: skip
    """The factors of one step from pre-activations ``(outputs,)``, or if not to `build` only what they are made of;
    all others with a leading axis of one."""
    n1, n2, d1, d2 = p1.shape[1], p2.shape[1], diag1.shape[1], diag2.shape[1]
    ends = n1 + n2
    activate(activation, argument[0:n1], p1[0])
    activate(activation, argument[n1:ends], p2[0])
    activate(SIGMOID, argument[ends : ends + d1], diag1[0])
    activate(SIGMOID, argument[ends + d1 : ends + d1 + d2], diag2[0])
    if build:
        kronecker_factor(0, 1, p1, diag1, start, eps, spectral, top, True, k1)
        kronecker_factor(0, 1, p2, diag2, start, eps, spectral, 1.0, False, k2)


@fused
def factors_vjp(
    argument: Any, activation: int, start: float, eps: float, spectral: Any, top: float,
    p1: Any, diag1: Any, p2: Any, diag2: Any, k1_bar: Any, k2_bar: Any,
    p1_bar: Any, diag1_bar: Any, p2_bar: Any, diag2_bar: Any, bar: Any,
) -> None:  # fmt: skip
    """Cotangent of the pre-activations of :func:`factors`."""
    n1, n2, d1, d2 = p1.shape[1], p2.shape[1], diag1.shape[1], diag2.shape[1]
    ends, one = n1 + n2, argument.dtype.type(1)
    kronecker_factor_vjp(0, 1, p1, diag1, start, eps, spectral, top, True, k1_bar, p1_bar, diag1_bar)
    kronecker_factor_vjp(0, 1, p2, diag2, start, eps, spectral, 1.0, False, k2_bar, p2_bar, diag2_bar)
    activate_vjp(activation, argument[0:n1], p1_bar[0], bar[0:n1])
    activate_vjp(activation, argument[n1:ends], p2_bar[0], bar[n1:ends])
    for i in range(d1):
        bar[ends + i] = diag1_bar[0, i] * diag1[0, i] * (one - diag1[0, i])
    for i in range(d2):
        bar[ends + d1 + i] = diag2_bar[0, i] * diag2[0, i] * (one - diag2[0, i])


@fused
def forward(
    first: int, last: int, keep: Any, span: int,
    packed: Any, at_mixer: int, at_b: int, at_c: int, at_lambda: int,
    a_base: Any, b_base: Any, c_base: Any, lambda_base: Any,
    a: Any, b_argument: Any, c_argument: Any, lambda_argument: Any, step_weight: Any, step_bias: Any,
    activation: int, start: float, unit_eps: float, spectral: Any, top: float, bc_eps: float,
    x: Any, delta: Any, rates: Any, skip: Any, gate: Any, gated: Any,
    weight: Any, bias: Any, mode: int, eps: float,
    rtol: float, atol: float, max_iter: int, damping: float,
    y_initial: Any, initial: Any, state: Any, states: Any,
    k1: Any, k2: Any, b: Any, b_norm: Any, c: Any, c_norm: Any,
    y: Any, iterations: Any, residual: Any, status: Any, count: Any, left: Any, met: Any,
) -> None:  # fmt: skip
    """All steps of the sequences.

    What the hidden state gives stands from ``at_...`` on in the columns behind ``packed``, or nowhere if that is
    negative; with a base ``(B, T, n)`` it makes an argument, which may be the base itself. With `keep` arguments and
    parameters of a step are written at its place and the state before each `span` of steps into ``states``; otherwise
    all at place 0. ``state (B, D, N)`` comes with the initial one. ``count``, ``left`` and ``met (B,)`` are of one
    step.
    """
    _, steps, dim = x.shape
    own, number = last - first, x.dtype
    rows = -(-own // ROWS) * ROWS
    before = np.zeros((rows, dim), number)
    piece = np.empty((rows, packed.shape[2]), number)
    more = np.empty((rows, packed.shape[0] * packed.shape[2]), number)
    d1, d2 = k1.shape[2], k2.shape[2]
    p1, p2 = np.empty((1, d1 * (d1 + 1) // 2), number), np.empty((1, d2 * (d2 + 1) // 2), number)
    diag1, diag2 = np.empty((1, d1), number), np.empty((1, d2), number)
    small = np.empty((2, step_bias.size), number)
    p, work = Kronecker(k1, k2), 2 * d1 * d2 + d2 * d2
    for t in range(steps):
        at = t if keep else 0
        if packed.shape[0]:
            for i in range(own):
                row = y_initial[first + i] if t == 0 else y[first + i, t - 1]
                for j in range(dim):
                    before[i, j] = row[j]
            multiply(before, packed, piece, more)
        for i in range(first, last):
            fed = more[i - first]
            seen(a_base[i, t], fed, at_mixer, a[i, at])
            seen(b_base[i, t], fed, at_b, b_argument[i, at])
            seen(c_base[i, t], fed, at_c, c_argument[i, at])
            if at_lambda >= 0:
                seen(lambda_base[i, t], fed, at_lambda, lambda_argument[i, at])
                step_sizes(lambda_argument[i, at], step_weight, step_bias, small, delta[i, t])
            b_norm[i, at] = unit(b_argument[i, at], bc_eps, b[i, at])
            c_norm[i, at] = unit(c_argument[i, at], bc_eps, c[i, at])
            factors(
                a[i, at], activation, start, unit_eps, spectral, top,
                p1, diag1, p2, diag2, k1[i, at : at + 1], k2[i, at : at + 1], True,
            )  # fmt: skip
            count[i], left[i], met[i] = 0, 0.0, True
            if keep and t % span == 0:
                kept, now = states[t // span, i], state[i]
                for j in range(dim):
                    for n in range(now.shape[1]):
                        kept[j, n] = now[j, n]
        solve_steps(
            first, last, t, t + 1, t - at, p, work, x, delta, rates, b, c, skip, gate, gated,
            weight, bias, mode, eps, rtol, atol, max_iter, damping, state, y, count, left, met,
        )  # fmt: skip
        for i in range(first, last):
            iterations[i, t] = count[i]
            # a NaN stays
            residual[i] = left[i] if left[i] != left[i] else max(left[i], residual[i])
            # and so does the first failure
            if status[i] != CONVERGED:
                continue
            if not (finite(y[i, t]) and finite(state[i].reshape(-1))):
                good = finite(x[i, t]) and finite(delta[i, t]) and finite(b[i, at]) and finite(c[i, at])
                good = good and (not gated or finite(gate[i, t]))
                good = good and (t > 0 or finite(initial[i].reshape(-1)))
                status[i] = DIVERGED if good else NONFINITE_INPUT
            elif not met[i]:
                status[i] = MAX_ITER


@fused
def backward(
    first: int, last: int, span: int,
    packed: Any, at_mixer: int, at_b: int, at_c: int, at_lambda: int,
    a: Any, step_weight: Any,
    activation: int, start: float, unit_eps: float, spectral: Any, top: float, bc_eps: float,
    x: Any, delta: Any, rates: Any, skip: Any, gate: Any, gated: Any,
    weight: Any, mode: int, eps: float, rtol: float, max_iter: int,
    k1: Any, k2: Any, b: Any, b_norm: Any, c: Any, c_norm: Any, y: Any,
    states: Any, pasts: Any, here1: Any, here2: Any, bar1: Any, bar2: Any, G: Any,
    y_bar: Any, z: Any, x_bar: Any, a_bar: Any, delta_bar: Any, b_bar: Any, c_bar: Any, gate_bar: Any,
    rate_bar: Any, skip_bar: Any, weight_bar: Any, bias_bar: Any, raw_bar: Any, fed: Any,
    status: Any, met: Any,
) -> None:  # fmt: skip
    """The adjoint of :func:`forward`, backward in time.

    ``y_bar (B, T, D)`` is added to; it may be ``delta_bar``, and that ``raw_bar``, for a step needs each of them before
    it writes the next. ``pasts (span, B, D, N)`` is of one span of steps; ``here`` and ``bar (B, 1, ., .)``, the
    factors and their cotangents, are of one step. ``fed (B, T, n)`` receives what each step hands back to the products
    with the hidden state.
    """
    _, steps, dim = x.shape
    own, number = last - first, x.dtype
    rows = -(-own // ROWS) * ROWS
    given = np.zeros((rows, fed.shape[2]), number)
    piece = np.empty((rows, packed.shape[2]), number)
    more = np.empty((rows, packed.shape[0] * packed.shape[2]), number)
    d1, d2 = k1.shape[2], k2.shape[2]
    p1, p2 = np.empty((1, d1 * (d1 + 1) // 2), number), np.empty((1, d2 * (d2 + 1) // 2), number)
    p1_bar, p2_bar = np.empty_like(p1), np.empty_like(p2)
    diag1, diag2 = np.empty((1, d1), number), np.empty((1, d2), number)
    diag1_bar, diag2_bar = np.empty_like(diag1), np.empty_like(diag2)
    p, bar, work = Kronecker(here1, here2), Kronecker(bar1, bar2), 2 * d1 * d2 + d2 * d2
    spans = -(-steps // span)
    for turn in range(spans):
        begin = (spans - 1 - turn) * span
        end = min(begin + span, steps)
        for i in range(first, last):
            pasts[0, i] = states[spans - 1 - turn, i]
        # the state after the last of them is the next span's
        for t in range(begin, end - 1):
            for i in range(first, last):
                here1[i, 0] = k1[i, t]
                here2[i, 0] = k2[i, t]
            two = pasts[t - begin : t - begin + 2]
            known_states(first, last, t, t + 1, t, p, work, x, delta, rates, b, c, y, two)
        for back in range(end - begin):
            t = end - 1 - back
            for i in range(first, last):
                here1[i, 0] = k1[i, t]
                here2[i, 0] = k2[i, t]
                met[i] = True
            # what comes to stand in x_bar is not needed before that any more
            pull_step(
                first, last, t, t, p, bar, work, x, delta, rates, b, c, skip, gate, gated,
                weight, mode, eps, rtol, max_iter, pasts[t - begin], G, y, y_bar, z, x_bar, x_bar, delta_bar,
                b_bar, c_bar, gate_bar, rate_bar, skip_bar, weight_bar, bias_bar, met,
            )  # fmt: skip
            for i in range(first, last):
                if status[i] == CONVERGED:
                    if not finite(z[i, t]):
                        status[i] = DIVERGED
                    elif not met[i]:
                        status[i] = MAX_ITER
                unit_vjp(b[i, t], b_norm[i, t], bc_eps, b_bar[i, t], b_bar[i, t])
                unit_vjp(c[i, t], c_norm[i, t], bc_eps, c_bar[i, t], c_bar[i, t])
                factors(
                    a[i, t], activation, start, unit_eps, spectral, top,
                    p1, diag1, p2, diag2, bar1[i], bar2[i], False,
                )  # fmt: skip
                factors_vjp(
                    a[i, t], activation, start, unit_eps, spectral, top,
                    p1, diag1, p2, diag2, bar1[i], bar2[i],
                    p1_bar, diag1_bar, p2_bar, diag2_bar, a_bar[i, t],
                )  # fmt: skip
                row, wanted = fed[i, t], at_lambda >= 0
                rank = row.size - at_lambda if wanted else 0
                step_sizes_vjp(
                    delta[i, t], delta_bar[i, t], step_weight, raw_bar[i, t], row[row.size - rank :], wanted
                )
                handed(a_bar[i, t], at_mixer, row)
                handed(b_bar[i, t], at_b, row)
                handed(c_bar[i, t], at_c, row)
                handed(row, 0, given[i - first])
            if packed.shape[0] and t:
                multiply(given, packed, piece, more)
                for i in range(first, last):
                    into, of = y_bar[i, t - 1], more[i - first]
                    for j in range(dim):
                        into[j] += of[j]
