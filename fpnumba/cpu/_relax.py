"""The iterative ways for every mixer: chunk after chunk, iterated over all channels until it meets the tolerance.

One iteration of a chunk is one pass: step ``t`` is mixed from its old value only, and scanned from the new value of the
step before, so that new values can overwrite old ones. While a chunk is iterated its data stays in cache. Sections 3, 6
and 7 of docs/mathematics.md.
"""

import numpy as np

from fpnumba.cpu._jit import entry, from_bits, kernel, magnitude_bits
from fpnumba.cpu._kinds import BLOCK, mix, mix_transpose

# Where the state that comes into a chunk is to be found
INITIAL, ROW_BEFORE, ZERO = 0, 1, 2
# What the values are before the first iteration
COLD, GUESS, ITERATE = 0, 1, 2

CONVERGED, MAX_ITER, DIVERGED, NONFINITE_INPUT, ILL_CONDITIONED = 0, 1, 2, 3, 4


@kernel
def forward_pass(p, b, begin, end, block, lam, gate, gated, x, value, state, d, out, work, damping):
    """One iteration of (F) over a chunk; returns the bits of ``max|f(h) - h|`` and ``max|h|``."""
    dim = x.shape[2]
    one = x.dtype.type(1)
    new_share = x.dtype.type(damping)
    old_share = one - new_share
    change = magnitude_bits(x.dtype.type(0))
    size = change
    for t in range(begin, end, block):
        n = min(block, end - t)
        for k in range(n):
            for i in range(dim):
                d[k, i] = x[b, t + k, i] - value[b, t + k, i]
        mix(p, b, t, n, d, out, work)
        for k in range(n):
            for i in range(dim):
                decay = lam[b, t + k, i]
                g = gate[b, t + k, i] if gated else one - decay
                old = value[b, t + k, i]
                f = decay * state[i] + g * (old + out[k, i])
                state[i] = f
                new = old_share * old + new_share * f
                value[b, t + k, i] = new
                change = max(change, magnitude_bits(f - old))
                size = max(size, magnitude_bits(new))
    return change, size


@kernel
def adjoint_pass(p, b, begin, end, block, lam, gate, gated, hbar, value, state, d, out, work, damping):
    """One iteration of the adjoint over a chunk, last step first; ``state`` is ``lam_{t+1} s_{t+1}``."""
    dim = hbar.shape[2]
    one = hbar.dtype.type(1)
    new_share = hbar.dtype.type(damping)
    old_share = one - new_share
    change = magnitude_bits(hbar.dtype.type(0))
    size = change
    blocks = -(-(end - begin) // block)
    for turn in range(blocks):
        t = begin + (blocks - 1 - turn) * block
        n = min(block, end - t)
        for k in range(n):
            for i in range(dim):
                g = gate[b, t + k, i] if gated else one - lam[b, t + k, i]
                d[k, i] = g * value[b, t + k, i]
        mix_transpose(p, b, t, n, d, out, work)
        for step in range(n):
            k = n - 1 - step
            for i in range(dim):
                old = value[b, t + k, i]
                f = hbar[b, t + k, i] + (d[k, i] - out[k, i]) + state[i]
                state[i] = lam[b, t + k, i] * f
                new = old_share * old + new_share * f
                value[b, t + k, i] = new
                change = max(change, magnitude_bits(f - old))
                size = max(size, magnitude_bits(new))
    return change, size


@kernel
def tolerance_share(b, begin, end, adjoint, lam, chunks, product):
    """The part of the tolerance that one chunk may use up, so that the whole still meets it; section 7.

    An error carried in leaves the chunk multiplied by ``L = max_d prod_t |lam|`` at most: errors of ``1 - L``, or of
    ``1 / chunks``, add up to one. Half of that: the other half is for what the mixing makes of the carried error.
    """
    if chunks == 1:
        return 1.0
    steps, dim = lam.shape[1], lam.shape[2]
    if adjoint:
        begin, end = begin + 1, end + 1
    largest = 0.0
    if end <= steps:
        for i in range(dim):
            product[i] = 1
        for t in range(begin, end):
            for i in range(dim):
                product[i] *= abs(lam[b, t, i])
        for i in range(dim):
            largest = max(largest, product[i])
    return 0.5 * max(1.0 / chunks, 1.0 - largest)


@kernel
def relax_chunk(
    p, b, begin, end, block, came, adjoint, start, lam, gate, gated, source, initial, value, rows, work,
    share, before, eps, rtol, atol, max_iter, damping,
):  # fmt: skip
    """Iterate one chunk. Returns iterations, last change, largest value and whether it converged."""
    steps, dim = source.shape[1], source.shape[2]
    carry, state = rows[0, 0], rows[0, 1]
    d, out = rows[1], rows[2]
    for i in range(dim):
        carry[i] = 0
    if came == ROW_BEFORE:
        if adjoint and end < steps:
            for i in range(dim):
                carry[i] = lam[b, end, i] * value[b, end, i]
        elif begin > 0 and not adjoint:
            for i in range(dim):
                carry[i] = value[b, begin - 1, i]
    elif came == INITIAL:
        for i in range(dim):
            carry[i] = initial[b, i]
    if start == GUESS:
        # Zero is the exact answer then, which no relative tolerance finds from another guess.
        bits = magnitude_bits(source.dtype.type(0))
        for i in range(dim):
            bits = max(bits, magnitude_bits(carry[i]))
        for t in range(begin, end):
            for i in range(dim):
                bits = max(bits, magnitude_bits(source[b, t, i]))
        if bits == 0:
            start = COLD
    if start == COLD:
        for t in range(begin, end):
            for i in range(dim):
                value[b, t, i] = 0
    count, change, scale, converged = 0, 0.0, before, False
    while not converged and np.isfinite(change) and count < max_iter:
        for i in range(dim):
            state[i] = carry[i]
        if adjoint:
            bits, size = adjoint_pass(
                p, b, begin, end, block, lam, gate, gated, source, value, state, d, out, work, damping
            )
        else:
            bits, size = forward_pass(
                p, b, begin, end, block, lam, gate, gated, source, value, state, d, out, work, damping
            )
        count += 1
        change = np.float64(from_bits(bits))
        scale = max(before, np.float64(from_bits(size)))
        converged = np.isfinite(change) and change <= max(share * (atol + rtol * scale), 4 * eps * scale)
    return count, change, scale, converged


@entry
def relax(
    first, last, p, adjoint, start, lam, gate, gated, source, initial, value, segments, chunk, block, work_size,
    eps, rtol, atol, max_iter, damping, counts, change, scale, status,
):  # fmt: skip
    """Tasks are sequences times segments of time. A segment that is not the first begins from a zero state."""
    _, steps, dim = source.shape
    rows = np.zeros((3, BLOCK, dim), source.dtype)
    work = np.empty(work_size, source.dtype)
    chunks = counts.shape[1]
    for task in range(first, last):
        b, j = task // segments, task % segments
        for q in range(chunks * j // segments, chunks * (j + 1) // segments):
            c = chunks - 1 - q if adjoint else q
            begin, end = c * chunk, min((c + 1) * chunk, steps)
            came = ROW_BEFORE
            if q == chunks * j // segments:
                came = ZERO if j > 0 or adjoint else INITIAL
            share = tolerance_share(b, begin, end, adjoint, lam, chunks, rows[0, 2])
            count, dh, size, converged = relax_chunk(
                p, b, begin, end, block, came, adjoint, start, lam, gate, gated, source, initial, value, rows, work,
                share, scale[b, j], eps, rtol, atol, max_iter, damping,
            )  # fmt: skip
            record(counts, change, scale, status, b, j, c, count, dh, size, converged)


@kernel
def record(counts, change, scale, status, b, j, c, count, dh, size, converged):
    """What became of a chunk."""
    counts[b, c] = max(counts[b, c], count)
    if not converged:
        status[b, j] = max(status[b, j], MAX_ITER if np.isfinite(dh) else DIVERGED)
    scale[b, j] = size
    if not dh <= change[b, j]:  # keeps a NaN
        change[b, j] = dh


@entry
def settle(
    first, last, p, adjoint, start, lam, gate, gated, source, initial, value, segments, chunk, block, work_size,
    eps, rtol, atol, max_iter, damping, counts, change, scale, status,
):  # fmt: skip
    """Correct the segments that began from zero, now that the state that comes into them is known.

    Tasks are sequences. The correction decays with the product of the ``A_t``: once a chunk leaves as it did before, to
    within rounding, so do all after it.
    """
    _, steps, dim = source.shape
    rows = np.zeros((3, BLOCK, dim), source.dtype)
    work = np.empty(work_size, source.dtype)
    left = np.empty(dim, source.dtype)
    chunks = counts.shape[1]
    for b in range(first, last):
        for j in range(1, segments):
            for q in range(chunks * j // segments, chunks * (j + 1) // segments):
                c = chunks - 1 - q if adjoint else q
                begin, end = c * chunk, min((c + 1) * chunk, steps)
                way_out = begin if adjoint else end - 1
                for i in range(dim):
                    left[i] = value[b, way_out, i]
                share = tolerance_share(b, begin, end, adjoint, lam, chunks, rows[0, 2])
                count, dh, size, converged = relax_chunk(
                    p, b, begin, end, block, ROW_BEFORE, adjoint, GUESS, lam, gate, gated, source, initial, value, rows,
                    work, share, scale[b, j], eps, rtol, atol, max_iter, damping,
                )  # fmt: skip
                record(counts, change, scale, status, b, j, c, count, dh, size, converged)
                moved = magnitude_bits(source.dtype.type(0))
                for i in range(dim):
                    moved = max(moved, magnitude_bits(value[b, way_out, i] - left[i]))
                if np.float64(from_bits(moved)) <= 2 * eps * scale[b, j]:
                    break
