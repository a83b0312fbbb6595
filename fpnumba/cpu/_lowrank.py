"""Low-rank mixers, step after step: ``P = U^T S U`` of rank ``r`` leaves ``r`` unknown numbers per step.

Section 3 of docs/mathematics.md. With ``w = lam * h_{t-1} + g * x`` (F) is ``h = w - g * U^T S rho``, and
``rho = U (x - h)`` obeys ``rho = U (x - w) + G S rho`` with ``G = U diag(g) U^T``: solved directly, or
iterated from ``U (x - h^0)``, which gives the iterates ``h^l`` of (F) exactly. The adjoint likewise, with
time reversed: ``w = hbar + lam_{t+1} s_{t+1}``, ``s = w + U^T S^T rho`` and ``rho = U (g * s) = U (g * w) + G
S^T rho``.

One step is two passes over the channels: the first reads everything and takes all sums, the second writes the
result. Its data is in the first-level cache by then. However many iterations a step needs, they cost no
traffic at all. What is tested against the tolerance is a bound of the change of the iterate, ``sum_i max_d |g
u_i| |d(S rho)_i|``, exact for rank one.

Memory traffic: ``lam``, ``source`` and ``u`` read once (and the gate, if there is one), the result written once.
"""

import numpy as np

from fpnumba.cpu._jit import (
    STRIP_BYTES,
    entry,
    from_bits,
    inlined,
    kernel,
    magnitude_bits,
    stream_end,
    stream_row,
)
from fpnumba.cpu._relax import DIVERGED, ILL_CONDITIONED, MAX_ITER

# Rows of scratch: the state that comes in, w, g (forward) or the result (adjoint), x - w or g w
STATE, W, G_ROW, R_ROW, V_ROWS = 0, 1, 2, 3, 4
EPS64 = float(np.finfo(np.float64).eps)
LARGEST = float(np.finfo(np.float64).max)


@inlined
def sums_rank_one(b, t, u, adjoint, lam, gate, gated, source, rows, q, p, gram):
    """First pass for one vector: ``q``, ``p`` and ``G``, and forward ``w`` and ``v = g u``.

    Backwards it goes in strips and stores nothing: where a loop does, it begins with a test of what overlaps what.
    """
    dim = source.shape[2]
    zero, one = source.dtype.type(0), source.dtype.type(1)
    q0, p0, g0 = zero, zero, zero
    if adjoint:
        strip = STRIP_BYTES // source.itemsize
        strips = -(-dim // strip)
        for n in range(strips):
            offset = (strips - 1 - n) * strip
            for k in range(min(strip, dim - offset)):
                i = np.uintp(offset + k)
                g = gate[b, t, i] if gated else one - lam[b, t, i]
                v = g * u[b, t, 0, i]
                q0 += v * (source[b, t, i] + rows[0, i])
                g0 += v * u[b, t, 0, i]
    else:
        for i in range(dim):
            decay = lam[b, t, i]
            g = gate[b, t, i] if gated else one - decay
            x = source[b, t, i]
            w = decay * rows[0, i] + g * x
            v = g * u[b, t, 0, i]
            q0 += u[b, t, 0, i] * (x - w)
            p0 += u[b, t, 0, i] * x
            g0 += v * u[b, t, 0, i]
            rows[1, i] = w
            rows[4, i] = v
    q[0] = q0
    p[0] = p0
    gram[0, 0] = g0


@inlined
def sums_backwards(b, t, u, lam, gate, gated, source, rows, q):
    """``q = U (g * w)`` in strips, and then ``w``, ``v_i = g u_i``."""
    rank, dim = u.shape[2], u.shape[3]
    zero, one = source.dtype.type(0), source.dtype.type(1)
    strip = STRIP_BYTES // source.itemsize
    strips = -(-dim // strip)
    for back in range(rank):
        m = rank - 1 - back
        qm = zero
        for n in range(strips):
            offset = (strips - 1 - n) * strip
            for k in range(min(strip, dim - offset)):
                i = np.uintp(offset + k)
                g = gate[b, t, i] if gated else one - lam[b, t, i]
                qm += u[b, t, m, i] * (g * (source[b, t, i] + rows[0, i]))
        q[m] = qm
    for i in range(dim):
        rows[1, i] = source[b, t, i] + rows[0, i]
        rows[2, i] = gate[b, t, i] if gated else one - lam[b, t, i]
    for m in range(rank):
        for i in range(dim):
            rows[4 + m, i] = rows[2, i] * u[b, t, m, i]


@inlined
def sums(b, t, u, adjoint, product, lam, gate, gated, source, rows, q, p, gram, plain):
    """First pass for any rank; ``plain`` is ``U U^T``, below the diagonal, which only reflections need."""
    rank, dim = u.shape[2], u.shape[3]
    zero, one = source.dtype.type(0), source.dtype.type(1)
    if adjoint:
        sums_backwards(b, t, u, lam, gate, gated, source, rows, q)
    else:
        for i in range(dim):
            decay = lam[b, t, i]
            g = gate[b, t, i] if gated else one - decay
            x = source[b, t, i]
            w = decay * rows[0, i] + g * x
            rows[1, i] = w
            rows[2, i] = g
            rows[3, i] = x - w
        for m in range(rank):
            qm, pm = zero, zero
            for i in range(dim):
                qm += u[b, t, m, i] * rows[3, i]
                pm += u[b, t, m, i] * source[b, t, i]
                rows[4 + m, i] = rows[2, i] * u[b, t, m, i]
            q[m] = qm
            p[m] = pm
    for k in range(rank):
        for m in range(k + 1):
            dot = zero
            for i in range(dim):
                dot += rows[4 + k, i] * u[b, t, m, i]
            gram[k, m] = dot
            gram[m, k] = dot
        if product:
            for m in range(k):
                dot = zero
                for i in range(dim):
                    dot += u[b, t, k, i] * u[b, t, m, i]
                plain[k, m] = dot


@inlined
def small_matrix(b, t, alpha, adjoint, product, plain, S):
    """``S``, or ``S^T`` in the adjoint: ``diag(alpha)``, or the compact WY triangle of a product of reflections."""
    rank = alpha.shape[2]
    for k in range(rank):
        for m in range(rank):
            S[k, m] = 0.0
    for k in range(rank):
        a = np.float64(alpha[b, t, k])
        if product:
            for m in range(k):
                total = 0.0
                for n in range(m, k):
                    total += plain[k, n] * (S[m, n] if adjoint else S[n, m])
                if adjoint:
                    S[m, k] = -a * total
                else:
                    S[k, m] = -a * total
        S[k, k] = a


@kernel
def multiply(matrix, vector, result):
    for k in range(vector.shape[0]):
        total = 0.0
        for m in range(vector.shape[0]):
            total += matrix[k, m] * vector[m]
        result[k] = total


@inlined
def solve_small(gram, S, q, y, system, rho):
    """``y = S rho``, ``(I - G S) rho = q``; returns an estimate of the reciprocal condition.

    Elimination with row pivoting. The estimate is the smallest pivot against ``1 + ||G S||_1``: what loses
    digits is the cancellation in ``I - G S``.
    """
    rank = q.shape[0]
    norm = 0.0
    for m in range(rank):
        column = 0.0
        for k in range(rank):
            total = 0.0
            for n in range(rank):
                total += gram[k, n] * S[n, m]
            column += abs(total)
            system[k, m] = (1.0 if k == m else 0.0) - total
        norm = max(norm, column)
    smallest = np.inf
    for k in range(rank):
        rho[k] = q[k]
    for k in range(rank):
        best = k
        for m in range(k + 1, rank):
            if abs(system[m, k]) > abs(system[best, k]):
                best = m
        if best != k:
            for n in range(rank):
                system[k, n], system[best, n] = system[best, n], system[k, n]
            rho[k], rho[best] = rho[best], rho[k]
        pivot = system[k, k]
        if not abs(pivot) >= smallest:  # keeps a NaN
            smallest = abs(pivot)
        for m in range(k + 1, rank):
            factor = system[m, k] / pivot
            for n in range(k + 1, rank):
                system[m, n] -= factor * system[k, n]
            rho[m] -= factor * rho[k]
    for step in range(rank):
        k = rank - 1 - step
        total = rho[k]
        for n in range(k + 1, rank):
            total -= system[k, n] * rho[n]
        rho[k] = total / system[k, k]
    multiply(S, rho, y)
    return smallest / (1.0 + norm)


@inlined
def result_row(b, t, u, adjoint, lam, source, rows, y):
    """Second pass: the result of the step, and in row 0 what the next step starts from.

    Returns the row that holds the result and the bits of its largest entry. It may be called again with another ``y``:
    what it starts from stays as it is until `next_state`.
    """
    rank, dim = u.shape[2], u.shape[3]
    size = magnitude_bits(rows.dtype.type(0))
    w = 1
    for k in range(1, rank):
        yk = rows.dtype.type(y[k])
        if adjoint:
            for i in range(dim):
                rows[2, i] = rows[w, i] + yk * u[b, t, k, i]
        else:
            for i in range(dim):
                rows[2, i] = rows[w, i] - yk * rows[4 + k, i]
        w = 2
    y0 = rows.dtype.type(y[0])
    if not adjoint:
        for i in range(dim):
            h = rows[w, i] - y0 * rows[4, i]
            size = max(size, magnitude_bits(h))
            rows[0, i] = h
        return 0, size
    if rank > 1:
        for i in range(dim):
            s = rows[2, i] + y0 * u[b, t, 0, i]
            size = max(size, magnitude_bits(s))
            rows[3, i] = s
    else:
        for i in range(dim):
            s = (source[b, t, i] + rows[0, i]) + y0 * u[b, t, 0, i]
            size = max(size, magnitude_bits(s))
            rows[3, i] = s
    return 3, size


@inlined
def next_state(b, t, adjoint, lam, rows):
    """What the next step starts from, in row 0: ``h_t``, which is there, or ``lam_t s_t``."""
    if adjoint:
        for i in range(rows.shape[1]):
            rows[0, i] = lam[b, t, i] * rows[3, i]


@inlined
def put_row(b, t, value, rows, result, stream, compare):
    """Store the result; returns by how much it differs from what was there, if asked."""
    dim = value.shape[2]
    moved = magnitude_bits(rows.dtype.type(0))
    if compare:
        for i in range(dim):
            moved = max(moved, magnitude_bits(rows[result, i] - value[b, t, i]))
    if stream:
        stream_row(value, (b * value.shape[1] + t) * dim, rows, result * dim, dim)
    else:
        for i in range(dim):
            value[b, t, i] = rows[result, i]
    return np.float64(from_bits(moved))


@inlined
def bounds(b, t, u, adjoint, rows, bound):
    """``max_d |g u_i|``, or of ``|u_i|`` in the adjoint: how far one unit of ``y_i`` moves the result."""
    rank, dim = u.shape[2], u.shape[3]
    for k in range(rank):
        bits = magnitude_bits(rows.dtype.type(0))
        if adjoint:
            for i in range(dim):
                bits = max(bits, magnitude_bits(u[b, t, k, i]))
        else:
            for i in range(dim):
                bits = max(bits, magnitude_bits(rows[4 + k, i]))
        bound[k] = from_bits(bits)


@inlined
def iterate_small(gram, S, q, y, bound, tolerance, count, max_iter, rho, spare):
    """Iterate ``y = S rho``, ``rho = q + G y`` until the result changes by less than the tolerance.

    `count` iterations are behind, of which the last left `y`. Returns the count and the last change.
    """
    rank = q.shape[0]
    change = LARGEST
    while not change <= tolerance and np.isfinite(change) and count < max_iter:
        for k in range(rank):
            total = q[k]
            for m in range(rank):
                total += gram[k, m] * y[m]
            rho[k] = total
        change = 0.0
        for k in range(rank):
            total = 0.0
            for m in range(rank):
                total += S[k, m] * rho[m]
            change += bound[k] * abs(total - y[k])
            spare[k] = total
        for k in range(rank):
            y[k] = spare[k]
        count += 1
    return count, change


@kernel
def first_row(b, t, adjoint, settling, first, lam, initial, value, rows):
    """What comes into step `t`: what the step before has left in `value`, or the start."""
    dim = value.shape[2]
    for i in range(dim):
        rows[0, i] = 0
    if settling:
        if adjoint:
            for i in range(dim):
                rows[0, i] = lam[b, t + 1, i] * value[b, t + 1, i]
        else:
            for i in range(dim):
                rows[0, i] = value[b, t - 1, i]
    elif first and not adjoint:
        for i in range(dim):
            rows[0, i] = initial[b, i]


@inlined
def step_share(b, t, steps, adjoint, lam):
    """`fpnumba.cpu._relax.tolerance_share` for a chunk of one step."""
    if steps == 1:
        return 1.0
    bits = magnitude_bits(lam.dtype.type(0))
    if adjoint:
        t += 1
    if t < steps:
        for i in range(lam.shape[2]):
            bits = max(bits, magnitude_bits(lam[b, t, i]))
    return 0.5 * max(1.0 / steps, 1.0 - np.float64(from_bits(bits)))


@kernel
def iterate_step(
    b, t, u, adjoint, lam, source, rows, gram, S, q, p, y, bound, rho, spare, before, rtol, atol, max_iter
):  # fmt: skip
    """One step the iterative way.

    Returns the iterations, the last change, the result's row, its largest entry and whether it converged.
    """
    bounds(b, t, u, adjoint, rows, bound)
    share = step_share(b, t, source.shape[1], adjoint, lam)
    if adjoint:
        for k in range(y.shape[0]):
            y[k] = 0.0
    else:
        multiply(S, p, y)
    count, change, largest, row = 1, np.inf, 0.0, 0
    # The first iterate started from zero and is its own change: looked at only where that can be small enough.
    look = max_iter == 1 or before == 0 or atol > 0
    while True:
        if look:
            row, size = result_row(b, t, u, adjoint, lam, source, rows, y)
            largest = np.float64(from_bits(size))
            if count == 1:
                change = largest
        tallest = max(before, largest)
        tolerance = max(share * (atol + rtol * tallest), 4 * EPS64 * tallest)
        if look and (change <= tolerance or not np.isfinite(change) or count >= max_iter):
            return count, change, row, largest, change <= tolerance
        count, change = iterate_small(gram, S, q, y, bound, tolerance, count, max_iter, rho, spare)
        look = True


@kernel
def solve_segment(
    b, j, u, alpha, product, adjoint, lam, gate, gated, source, initial, value, segments, settling,
    direct, eps, rtol, atol, max_iter, counts, change, scale, status, rcond, stream,
    rows, q, p, y, bound, rho, spare, gram, plain, S, system,
):  # fmt: skip
    """One segment of time of one sequence. Scratch comes as arguments: what a kernel owns it counts references of."""
    steps = source.shape[1]
    rank = u.shape[2]
    for n in range(steps * j // segments, steps * (j + 1) // segments):
        t = steps - 1 - n if adjoint else n
        if n == steps * j // segments:
            first_row(b, t, adjoint, settling, j == 0, lam, initial, value, rows)
        if rank == 1:
            sums_rank_one(b, t, u, adjoint, lam, gate, gated, source, rows, q, p, gram)
            S[0, 0] = alpha[b, t, 0]
        else:
            sums(b, t, u, adjoint, product, lam, gate, gated, source, rows, q, p, gram, plain)
            small_matrix(b, t, alpha, adjoint, product, plain, S)
        if direct:
            condition = solve_small(gram, S, q, y, system, rho)
            if not condition >= rcond[b, j]:  # keeps a NaN
                rcond[b, j] = condition
            row, size = result_row(b, t, u, adjoint, lam, source, rows, y)
            largest = np.float64(from_bits(size))
            if not np.isfinite(largest):
                status[b, j] = max(status[b, j], DIVERGED)
        else:
            count, dh, row, largest, converged = iterate_step(
                b, t, u, adjoint, lam, source, rows, gram, S, q, p, y, bound, rho, spare, scale[b, j],
                rtol, atol, max_iter,
            )  # fmt: skip
            counts[b, t] = max(counts[b, t], count)
            if not dh <= change[b, j]:  # keeps a NaN
                change[b, j] = dh
            if not np.isfinite(largest) or not np.isfinite(dh):
                status[b, j] = max(status[b, j], DIVERGED)
            elif not converged:
                status[b, j] = max(status[b, j], MAX_ITER)
        scale[b, j] = max(scale[b, j], largest)
        next_state(b, t, adjoint, lam, rows)
        moved = put_row(b, t, value, rows, row, stream, settling)
        if settling and moved <= 2 * eps * scale[b, j]:
            break
    if direct and rcond[b, j] < 1e3 * eps:
        status[b, j] = max(status[b, j], ILL_CONDITIONED)


@entry
def solve_steps(
    first, last, u, alpha, product, adjoint, lam, gate, gated, source, initial, value, segments, settling,
    direct, eps, rtol, atol, max_iter, counts, change, scale, status, rcond, stream,
):  # fmt: skip
    """Tasks are sequences times segments of time. A segment that is not the first begins from a zero state.

    With `settling`, tasks are sequences, and the segments that began from zero are done again, now that the state that
    comes into them is known, until they agree to within rounding with what is there: the correction decays with the
    product of the ``A_t``.
    """
    rank, dim = u.shape[2], u.shape[3]
    rows = np.empty((4 + rank, dim), source.dtype)
    q, p, y, bound = np.zeros(rank), np.zeros(rank), np.zeros(rank), np.zeros(rank)
    rho, spare = np.zeros(rank), np.zeros(rank)
    gram, plain = np.zeros((rank, rank)), np.zeros((rank, rank))
    S, system = np.zeros((rank, rank)), np.zeros((rank, rank))
    for task in range(first, last):
        b = task if settling else task // segments
        begin = 1 if settling else task % segments
        for j in range(begin, segments if settling else begin + 1):
            solve_segment(
                b, j, u, alpha, product, adjoint, lam, gate, gated, source, initial, value, segments, settling,
                direct, eps, rtol, atol, max_iter, counts, change, scale, status, rcond, stream,
                rows, q, p, y, bound, rho, spare, gram, plain, S, system,
            )  # fmt: skip
    stream_end()
