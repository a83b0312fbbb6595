"""Cotangents of all inputs of (F) for low-rank mixers, step after step, the adjoint solved on the way if asked.

Section 6 of docs/mathematics.md. With ``d = x - h``, ``e = g * s``, ``c = U d`` and ``k = U e``, the products
of one step need nothing but the ``r`` numbers ``c`` and ``k``: reflection ``i`` of a product sees ``v_i = d -
sum_{j<i} y_j u_j`` with ``y_i = alpha_i u_i . v_i`` and, from above, ``w_i = e - sum_{j>i} z_j u_j`` with
``z_i = alpha_i u_i . w_i``, so that

    u_bar_i = -y_i w_i - z_i v_i,   alpha_bar_i = -(u_i . v_i)(u_i . w_i),   x_bar = e - sum z_j u_j,
    Q d = d - sum y_j u_j.

In a sum of terms (DPLR) each sees ``d`` and ``e`` themselves.

Memory traffic: everything read once and written once, also where the adjoint is solved on the way. A step for one
vector is two passes over the channels, each from the last channel down: the first reads memory and takes the sums, the
second writes every result. For more vectors `touch` reads memory in that order, and the passes then find it in the
first-level cache.
"""

import numpy as np

from fpnumba.cpu._jit import entry, from_bits, inlined, kernel, stream_end, stream_row
from fpnumba.cpu._lanes import larger_bits, largest_bits, line_of, load, no_bits, no_lanes, store, total
from fpnumba.cpu._lowrank import (
    first_row,
    iterate_step,
    next_state,
    put_row,
    result_row,
    small_matrix,
    solve_small,
    sums,
)
from fpnumba.cpu._relax import DIVERGED, ILL_CONDITIONED, MAX_ITER

# Rows of scratch after those of `fpnumba.cpu._lowrank`, counted from 4 + r
D_ROW, E_ROW, LAM_ROW, GATE_ROW, EXTRA_ROWS = 0, 1, 2, 3, 4


@inlined
def sum_line(b, t, i, count, u, lam, gate, gated, x, h, source, solving, rows, q, gram, c):
    """The share of channels `i` to `i + count` in the sums of `sums_one`."""
    steps, dim = x.shape[1], x.shape[2]
    at = (b * steps + t) * dim + i
    one = x.dtype.type(1)
    vector = load(u, at, count)
    g = load(gate, at, count) if gated else one - load(lam, at, count)
    c = c + vector * (load(x, at, count) - load(h, at, count))
    if solving:
        v = g * vector
        q = q + v * (load(source, at, count) + load(rows, i, count))
        gram = gram + v * vector
    else:
        q = q + vector * (g * load(source, at, count))
    return q, gram, c


@inlined
def sums_one(b, t, u, lam, gate, gated, x, h, source, solving, rows, q, gram, c):
    """First pass of a step for one vector, from the last channel down; it is here that memory is first read.

    ``c = U d``, and while solving ``q = U (g * w)`` and ``G``. Otherwise `source` is ``s``, and ``q = U e``.
    """
    dim, line = x.shape[2], line_of(x)
    whole = dim // line * line
    q0, gram0, c0 = no_lanes(x), no_lanes(x), no_lanes(x)
    if whole < dim:
        q0, gram0, c0 = sum_line(
            b, t, whole, dim - whole, u, lam, gate, gated, x, h, source, solving, rows, q0, gram0, c0
        )  # fmt: skip
    i = whole
    while i > 0:
        i -= line
        q0, gram0, c0 = sum_line(
            b, t, i, line, u, lam, gate, gated, x, h, source, solving, rows, q0, gram0, c0
        )  # fmt: skip
    q[0] = total(q0)
    gram[0, 0] = total(gram0)
    c[0] = total(c0)


@inlined
def pull_line(
    b, t, i, count, u, lam, gate, gated, x, initial, h, s, source, solving, rows, lam_bar, gate_bar, u_bar, x_bar,
    stream, solution, y, z, largest,
):  # fmt: skip
    """Channels `i` to `i + count` of `pull_one`."""
    steps, dim = x.shape[1], x.shape[2]
    at = (b * steps + t) * dim + i
    one = x.dtype.type(1)
    vector, decay, x_line, h_line = (
        load(u, at, count),
        load(lam, at, count),
        load(x, at, count),
        load(h, at, count),
    )
    g = load(gate, at, count) if gated else one - decay
    before = load(h, at - dim, count) if t > 0 else load(initial, b * dim + i, count)
    state = load(source, at, count)
    if solving:
        state = (state + load(rows, i, count)) + solution * vector
        largest = larger_bits(largest, state)
    e = g * state
    mixed = x_line - y * vector
    # All loads before all stores: rows of different arrays often agree in the last 12 bits of their address, and a
    # load then waits for the store before it.
    if solving:
        store(rows, i, count, decay * state, False)
        store(s, at, count, state, stream)
    if gated:
        store(lam_bar, at, count, state * before, stream)
        store(gate_bar, at, count, state * mixed, stream)
    else:
        store(lam_bar, at, count, state * (before - mixed), stream)
    store(x_bar, at, count, e - z * vector, stream)
    store(u_bar, at, count, -y * e - z * (x_line - h_line), stream)
    return largest


@inlined
def pull_one(
    b, t, u, lam, gate, gated, x, initial, h, s, source, solving, rows, lam_bar, gate_bar, u_bar, x_bar, stream,
    solution, y, z,
):  # fmt: skip
    """Second pass of a step for one vector: every cotangent, and while solving ``s``, and the start of the next step.

    Returns the bits of the largest entry of ``s`` if it solves.
    """
    dim, line = x.shape[2], line_of(x)
    whole = dim // line * line
    largest = no_bits(x)
    if whole < dim:
        largest = pull_line(
            b, t, whole, dim - whole, u, lam, gate, gated, x, initial, h, s, source, solving, rows,
            lam_bar, gate_bar, u_bar, x_bar, stream, solution, y, z, largest,
        )  # fmt: skip
    i = whole
    while i > 0:
        i -= line
        largest = pull_line(
            b, t, i, line, u, lam, gate, gated, x, initial, h, s, source, solving, rows,
            lam_bar, gate_bar, u_bar, x_bar, stream, solution, y, z, largest,
        )  # fmt: skip
    return largest_bits(largest)


@inlined
def touch(b, t, u, lam, gate, gated, x, h, source, touched):
    """Read one number of every line of a step from the last channel down, and take a sum that nobody needs.

    All passes of a step then find it in the first-level cache, in whatever order they go.
    """
    rank, dim = u.shape[2], u.shape[3]
    line = line_of(x)
    row = max(t - 1, 0)
    nothing = x.dtype.type(0)
    i = (dim - 1) // line * line
    while i >= 0:
        for m in range(rank):
            nothing += u[b, t, m, i]
        if gated:
            nothing += gate[b, t, i]
        nothing += (lam[b, t, i] + source[b, t, i]) + (x[b, t, i] + h[b, row, i])
        i -= line
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
def put(target, b, t, rows, row, stream):
    steps, dim = target.shape[1], target.shape[2]
    if stream:
        stream_row(target, (b * steps + t) * dim, rows, row * dim, dim)
    else:
        for i in range(dim):
            target[b, t, i] = rows[row, i]


@inlined
def solve_step(
    b, t, u, lam, hbar, S, rows, direct, rtol, atol, max_iter, counts, change, scale, status, rcond,
    q, p, y, bound, rho, spare, gram, system,
):  # fmt: skip
    """The ``r`` unknowns of a step into ``y``, from the sums."""
    if direct:
        condition = solve_small(gram, S, q, y, system, rho)
        if not condition >= rcond[b, 0]:  # keeps a NaN
            rcond[b, 0] = condition
        return
    count, dh, _, _, converged = iterate_step(
        b, t, u, True, lam, hbar, rows, gram, S, q, p, y, bound, rho, spare, scale[b, 0],
        rtol, atol, max_iter,
    )  # fmt: skip
    counts[b, t] = count
    if not dh <= change[b, 0]:  # keeps a NaN
        change[b, 0] = dh
    if not np.isfinite(dh):
        status[b, 0] = max(status[b, 0], DIVERGED)
    elif not converged:
        status[b, 0] = max(status[b, 0], MAX_ITER)


@inlined
def account(b, bits, scale, status):
    """Take the largest entry of a step into the report."""
    largest = np.float64(from_bits(bits))
    if not np.isfinite(largest):
        status[b, 0] = max(status[b, 0], DIVERGED)
    scale[b, 0] = max(scale[b, 0], largest)


@inlined
def pull_segment_one(
    b, begin, end, u, alpha, product, lam, gate, gated, x, initial, h, s,
    lam_bar, gate_bar, u_bar, alpha_bar, x_bar, stream, hbar, solving, direct, eps, rtol, atol, max_iter,
    counts, change, scale, status, rcond,
    rows, q, p, c, k, y, z, bound, rho, spare, gram, plain, S, system,
):  # fmt: skip
    """`pull_segment` for one vector: two passes over the channels, from the last one down."""
    steps, dim = x.shape[1], x.shape[2]
    number = x.dtype.type
    for i in range(dim):
        rows[0, i] = 0
    for n in range(begin, end):
        t = steps - 1 - n
        sums_one(b, t, u, lam, gate, gated, x, h, hbar, solving, rows, q, gram, c)
        k[0] = q[0]
        solution = number(0)
        if solving:
            S[0, 0] = alpha[b, t, 0]
            solve_step(
                b, t, u, lam, hbar, S, rows, direct, rtol, atol, max_iter, counts, change, scale, status, rcond,
                q, p, y, bound, rho, spare, gram, system,
            )  # fmt: skip
            solution = number(y[0])
            k[0] += gram[0, 0] * y[0]  # U (g * s), without another sum
        weights(b, t, alpha, product, plain, c, k, alpha_bar, y, z)
        bits = pull_one(
            b, t, u, lam, gate, gated, x, initial, h, s, hbar, solving, rows, lam_bar, gate_bar, u_bar, x_bar, stream,
            solution, number(y[0]), number(z[0]),
        )  # fmt: skip
        if solving:
            account(b, bits, scale, status)


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
        touch(b, t, u, lam, gate, gated, x, h, hbar, spare)
        if solving:
            if n == begin:
                first_row(b, t, True, False, False, lam, initial, s, rows)
            sums(b, t, u, True, product, lam, gate, gated, hbar, rows, q, p, gram, plain)
            small_matrix(b, t, alpha, True, product, plain, S)
            solve_step(
                b, t, u, lam, hbar, S, rows, direct, rtol, atol, max_iter, counts, change, scale, status, rcond,
                q, p, y, bound, rho, spare, gram, system,
            )  # fmt: skip
            _, bits = result_row(b, t, u, True, lam, hbar, rows, y)
            account(b, bits, scale, status)
            next_state(b, t, True, lam, rows)
            put_row(b, t, s, rows, 3, stream, False)
        if not solving:
            for i in range(dim):
                rows[3, i] = s[b, t, i]
            if product:
                products(b, t, u, plain)
        differences(b, t, lam, gate, gated, x, h, rows, first)
        projections(b, t, u, rows, first, c, k)
        weights(b, t, alpha, product, plain, c, k, alpha_bar, y, z)
        pull_any_rank(b, t, u, product, not gated, x, h, initial, rows, y, z)
        if stream:
            stream_row(u_bar, (b * steps + t) * rank * dim, rows, 4 * dim, rank * dim)
        else:
            for m in range(rank):
                for i in range(dim):
                    u_bar[b, t, m, i] = rows[4 + m, i]
        put(x_bar, b, t, rows, first, stream)
        put(lam_bar, b, t, rows, first + 2, stream)
        if gated:
            put(gate_bar, b, t, rows, first + 3, stream)


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
        begin, end = steps * j // segments, steps * (j + 1) // segments
        # The flags of one case that is common and large as constants: a sixth of the whole time
        if rank == 1 and solving and stream and not gated:
            pull_segment_one(
                b, begin, end, u, alpha, product, lam, gate, False, x, initial,
                h, s, lam_bar, gate_bar, u_bar, alpha_bar, x_bar, True, hbar, True, direct, eps, rtol, atol,
                max_iter, counts, change, scale, status, rcond,
                rows, q, p, c, k, y, z, bound, rho, spare, gram, plain, S, system,
            )  # fmt: skip
        elif rank == 1:
            pull_segment_one(
                b, begin, end, u, alpha, product, lam, gate, gated, x, initial,
                h, s, lam_bar, gate_bar, u_bar, alpha_bar, x_bar, stream, hbar, solving, direct, eps, rtol, atol,
                max_iter, counts, change, scale, status, rcond,
                rows, q, p, c, k, y, z, bound, rho, spare, gram, plain, S, system,
            )  # fmt: skip
        else:
            pull_segment(
                b, begin, end, u, alpha, product, lam, gate, gated, x, initial,
                h, s, lam_bar, gate_bar, u_bar, alpha_bar, x_bar, stream, hbar, solving, direct, eps, rtol, atol,
                max_iter, counts, change, scale, status, rcond,
                rows, q, p, c, k, y, z, bound, rho, spare, gram, plain, S, system,
            )  # fmt: skip
        if direct and rcond[b, 0] < 1e3 * eps:
            status[b, 0] = max(status[b, 0], ILL_CONDITIONED)
    stream_end()
