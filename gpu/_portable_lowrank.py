# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Low-rank mixers, step after step: ``P = U^T S U`` of rank ``r`` leaves ``r`` unknown numbers per step.

Section 3 of docs/mathematics.md. With ``w = lam * h_{t-1} + g * x`` (F) is ``h = w - g * U^T S rho``, and
``rho = U (x - h)`` obeys ``rho = U (x - w) + G S rho`` with ``G = U diag(g) U^T``: solved directly, or
iterated from ``U (x - h^0)``, which gives the iterates ``h^l`` of (F) exactly. The adjoint likewise, with
time reversed: ``w = hbar + lam_{t+1} s_{t+1}``, ``s = w + U^T S^T rho`` and ``rho = U (g * s) = U (g * w) +
G S^T rho``.

All threads of a block take the sums over the channels; the first solves for the ``r`` numbers. What is
tested against the tolerance is a bound of the change of the iterate, ``sum_i max_d |g u_i| |d(S rho)_i|``,
exact for rank one.
"""

import math
from functools import cache

import numpy as np
from numba import cuda

from fpnumba.gpu._portable_block import THREADS, block_largest, block_sum, float64, larger
from fpnumba.gpu._portable_kernels import adjoint_carry, forward_carry, gate_at, tolerance_share
from fpnumba.gpu._report import CONVERGED, DIVERGED, ILL_CONDITIONED, MAX_ITER

LARGEST = float(np.finfo(np.float64).max)
EPS64 = float(np.finfo(np.float64).eps)


# Serial code of the first thread, in numbers of float64


@cuda.jit(device=True)
def small_matrix(alpha, b, t, adjoint, product, plain, S):
    """``S``, or ``S^T`` in the adjoint: ``diag(alpha)``, or the compact WY triangle of a product of reflections."""
    rank = S.shape[0]
    for k in range(rank):
        for m in range(rank):
            S[k, m] = 0.0
    for k in range(rank):
        S[k, k] = alpha[b, t, k]
        if product:
            for m in range(k):
                total = 0.0
                for n in range(m, k):
                    total += plain[k, n] * (S[m, n] if adjoint else S[n, m])
                if adjoint:
                    S[m, k] = -S[k, k] * total
                else:
                    S[k, m] = -S[k, k] * total


@cuda.jit(device=True)
def multiply(matrix, vector, result):
    for k in range(vector.shape[0]):
        total = 0.0
        for m in range(vector.shape[0]):
            total += matrix[k, m] * vector[m]
        result[k] = total


@cuda.jit(device=True)
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
        norm = larger(norm, column)
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
                swapped = system[k, n]
                system[k, n] = system[best, n]
                system[best, n] = swapped
            swapped = rho[k]
            rho[k] = rho[best]
            rho[best] = swapped
        pivot = system[k, k]
        if not abs(pivot) >= smallest:  # keeps a NaN: once there, all pivots are
            smallest = abs(pivot)
        for m in range(k + 1, rank):
            factor = system[m, k] / pivot
            for n in range(k + 1, rank):
                system[m, n] -= factor * system[k, n]
            rho[m] -= factor * rho[k]
    for back in range(rank):
        k = rank - 1 - back
        total = rho[k]
        for n in range(k + 1, rank):
            total -= system[k, n] * rho[n]
        rho[k] = total / system[k, k]
    multiply(S, rho, y)
    return smallest / (1.0 + norm)


@cuda.jit(device=True)
def iterate_small(gram, S, q, y, bound, tolerance, count, max_iter, rho, after):
    """Iterate ``y = S rho``, ``rho = q + G y`` until the result changes by less than the tolerance.

    `count` iterations are behind, of which the last left `y`. Returns the count and the last change.
    """
    rank = q.shape[0]
    change = LARGEST
    while not change <= tolerance and math.isfinite(change) and count < max_iter:
        multiply(gram, y, rho)
        for k in range(rank):
            rho[k] += q[k]
        multiply(S, rho, after)
        change = 0.0
        for k in range(rank):
            change += bound[k] * abs(after[k] - y[k])
            y[k] = after[k]
        count += 1
    return count, change


# The kernel


def shared_numbers(rank: int) -> int:
    """Shared memory that the kernel needs besides ``parts``."""
    return 2 + (6 + 4 * rank) * rank


@cache
def solve(rank, product, adjoint, direct):
    """Step after step, directly or iterated, as a kernel; `product` is for a product of reflections."""

    @cuda.jit(device=True)
    def unmixed(system, value, b, t, i):
        """``w`` of one channel, and its gate."""
        g = gate_at(system, b, t, i)
        if adjoint:
            return system.source[b, t, i] + adjoint_carry(system, value, b, t, i), g
        return system.lam[b, t, i] * forward_carry(system, value, b, t, i) + g * system.source[b, t, i], g

    @cuda.jit(device=True)
    def result(system, u, y, value, b, t, i):
        """One channel of the result, for ``y = S rho``."""
        w, g = unmixed(system, value, b, t, i)
        total = value.dtype.type(0)
        for k in range(rank):
            total += value.dtype.type(y[k]) * u[b, t, k, i]
        if adjoint:
            return w + total
        return w - g * total

    @cuda.jit(device=True)
    def size_of_result(system, u, y, value, b, t, parts):
        size = 0.0
        for i in range(cuda.threadIdx.x, value.shape[2], THREADS):
            size = larger(size, abs(result(system, u, y, value, b, t, i)))
        return block_largest(size, parts)

    @cuda.jit(device=True)
    def sums(system, u, value, b, t, q, p, gram, plain, parts):
        """All sums over the channels: ``q = U (x - w)`` or ``U (g w)``, ``p = U x``, ``G``, and ``U U^T``."""
        zero = value.dtype.type(0)
        for k in range(rank):
            qk, pk = zero, zero
            for i in range(cuda.threadIdx.x, value.shape[2], THREADS):
                w, g = unmixed(system, value, b, t, i)
                if adjoint:
                    qk += u[b, t, k, i] * (g * w)
                else:
                    qk += u[b, t, k, i] * (system.source[b, t, i] - w)
                    pk += u[b, t, k, i] * system.source[b, t, i]
            q_sum = block_sum(qk, parts)
            p_sum = 0.0 if adjoint else block_sum(pk, parts)
            if cuda.threadIdx.x == 0:
                q[k], p[k] = q_sum, p_sum
            for m in range(k + 1):
                weighted, bare = zero, zero
                for i in range(cuda.threadIdx.x, value.shape[2], THREADS):
                    weighted += gate_at(system, b, t, i) * u[b, t, k, i] * u[b, t, m, i]
                    bare += u[b, t, k, i] * u[b, t, m, i]
                weighted_sum = block_sum(weighted, parts)
                bare_sum = block_sum(bare, parts) if product and m < k else 0.0
                if cuda.threadIdx.x == 0:
                    gram[k, m], gram[m, k], plain[k, m] = weighted_sum, weighted_sum, bare_sum

    @cuda.jit(device=True)
    def bounds(system, u, b, t, bound, parts):
        """``max_d |g u_k|``, or of ``|u_k|`` in the adjoint: how far one unit of ``y_k`` moves the result."""
        for k in range(rank):
            mine = 0.0
            for i in range(cuda.threadIdx.x, u.shape[3], THREADS):
                g = u.dtype.type(1) if adjoint else gate_at(system, b, t, i)
                mine = larger(mine, abs(g * u[b, t, k, i]))
            mine = block_largest(mine, parts)
            if cuda.threadIdx.x == 0:
                bound[k] = mine

    @cuda.jit
    def kernel(system, arrays, report, stop):
        u, alpha, value = arrays
        memory = cuda.shared.array(0, float64)
        parts, memory = memory[:THREADS], memory[THREADS:]
        said, memory = memory[:2], memory[2:]  # what the first thread has to say
        vectors = memory[: 6 * rank].reshape(6, rank)
        q, p, y, bound, rho, after = vectors[0], vectors[1], vectors[2], vectors[3], vectors[4], vectors[5]
        matrices = memory[6 * rank : (6 + 4 * rank) * rank].reshape(4, rank, rank)
        gram, plain, S, eliminated = matrices[0], matrices[1], matrices[2], matrices[3]
        first = cuda.threadIdx.x == 0
        b = cuda.blockIdx.x
        batch, steps, dim = value.shape
        if b >= batch:
            return
        worst, scale, rcond, status = 0.0, 0.0, 1.0, CONVERGED
        for n in range(steps):
            t = steps - 1 - n if adjoint else n
            sums(system, u, value, b, t, q, p, gram, plain, parts)
            if first:
                small_matrix(alpha, b, t, adjoint, product, plain, S)
            if direct:
                if first:
                    said[0] = solve_small(gram, S, q, y, eliminated, rho)
                cuda.syncthreads()
                condition = said[0]
                if not (condition >= rcond or rcond != rcond):  # a NaN stays
                    rcond = condition
                largest = size_of_result(system, u, y, value, b, t, parts)
                if not math.isfinite(largest):
                    status = max(status, DIVERGED)
            else:
                bounds(system, u, b, t, bound, parts)
                met = t + 1 if adjoint else t  # whose lam an error meets that comes into the step
                share = tolerance_share(system.lam, b, met, met + 1, steps, parts)
                if first:
                    multiply(S, p, y)
                    if adjoint:  # from zero
                        for k in range(rank):
                            y[k] = 0.0
                cuda.syncthreads()
                # The first iterate, from zero, is its own change: looked at only where that can be small enough.
                look = stop.max_iter == 1 or scale == 0 or stop.atol > 0
                count, change, largest, converged, done = 1, np.inf, 0.0, False, False
                while not done:
                    if look:
                        largest = size_of_result(system, u, y, value, b, t, parts)
                        if count == 1:
                            change = largest
                    tallest = largest if largest > scale else scale
                    tolerance = share * (stop.atol + stop.rtol * tallest)
                    tolerance = max(tolerance, 4 * EPS64 * tallest)
                    converged = change <= tolerance
                    if look and (converged or not math.isfinite(change) or count >= stop.max_iter):
                        done = True
                    else:
                        if first:
                            said[0], said[1] = iterate_small(
                                gram, S, q, y, bound, tolerance, count, stop.max_iter, rho, after
                            )
                        cuda.syncthreads()
                        count, change, look = int(said[0]), said[1], True
                worst = larger(worst, change)
                if not math.isfinite(largest) or not math.isfinite(change):
                    status = max(status, DIVERGED)
                elif not converged:
                    status = max(status, MAX_ITER)
                if first:
                    report.counts[b, t] = count
            scale = largest if largest > scale else scale
            for i in range(cuda.threadIdx.x, dim, THREADS):
                value[b, t, i] = result(system, u, y, value, b, t, i)
            # The barriers in `sums` hold the first thread of the next step until all have read `y`.
        if first:
            if direct and rcond < 1e3 * stop.eps:
                status = max(status, ILL_CONDITIONED)
            report.change[b, 0], report.scale[b, 0], report.state[b, 0] = worst, scale, status
            report.rcond[b, 0] = rcond

    return kernel
