"""From activations to mixer parameters, compiled, and the adjoints: rows of ``N = B * T``, which threads
share.

Triangles are filled row by row: entry ``(i, k)``, ``k >= i``, of an upper triangle ``U``. The adjoints
compute the small matrices again rather than keep them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fpnumba.nn.kernels import compiled


@compiled
def normalize(y: Any, eps: float, u: Any, norm: Any) -> None:
    """``u = y / max(||y||, eps)`` row by row; ``y, u (N, D)``, ``norm (N,)`` before the maximum."""
    for n in range(y.shape[0]):
        total = y.dtype.type(0.0)
        for d in range(y.shape[1]):
            total += y[n, d] * y[n, d]
        norm[n] = np.sqrt(total)
        inverse = y.dtype.type(1.0 / max(norm[n], eps))
        for d in range(y.shape[1]):
            u[n, d] = y[n, d] * inverse


@compiled
def normalize_vjp(u: Any, norm: Any, eps: float, ubar: Any, ybar: Any) -> None:
    """Cotangent of :func:`normalize`."""
    for n in range(u.shape[0]):
        along = u.dtype.type(0.0)
        if norm[n] >= eps:
            for d in range(u.shape[1]):
                along += u[n, d] * ubar[n, d]
        inverse = u.dtype.type(1.0 / max(norm[n], eps))
        for d in range(u.shape[1]):
            ybar[n, d] = (ubar[n, d] - along * u[n, d]) * inverse


@compiled
def fill(p: Any, upper: Any) -> None:
    """Write the entries ``p`` into the upper triangle; the rest of ``upper`` is zero already."""
    size = upper.shape[0]
    at = 0
    for i in range(size):
        for k in range(i, size):
            upper[i, k] = p[at]
            at += 1


@compiled
def gram(upper: Any, m: Any) -> None:
    """``m = U U^T`` of an upper triangle."""
    size = upper.shape[0]
    for i in range(size):
        for j in range(i, size):
            total = upper.dtype.type(0.0)
            for k in range(j, size):
                total += upper[i, k] * upper[j, k]
            m[i, j] = total
            m[j, i] = total


@compiled
def gram_vjp(upper: Any, mbar: Any, pbar: Any) -> None:
    """``pbar``: the upper triangle of ``(mbar + mbar^T) U``."""
    size = upper.shape[0]
    at = 0
    for i in range(size):
        for k in range(i, size):
            total = upper.dtype.type(0.0)
            for j in range(k + 1):
                total += (mbar[i, j] + mbar[j, i]) * upper[j, k]
            pbar[at] = total
            at += 1


@compiled
def scaled_gram(
    p: Any, eps: float, spectral: Any, upper: Any, m: Any, norm: Any, r: Any, x: Any, length: Any
) -> float:
    """``r``: the rows of ``m = U U^T`` normalised; return what it is to be divided by.

    With ``spectral`` that is the estimate of the largest eigenvalue after 16 power iterations from ``x[0]``,
    plus ``eps``; otherwise one. ``x (17, d)`` and ``length (16,)`` receive the iterates and their norms.
    """
    size = upper.shape[0]
    fill(p, upper)
    gram(upper, m)
    normalize(m, eps, r, norm)
    if not spectral:
        return 1.0
    for l in range(length.size):
        total = m.dtype.type(0.0)
        for i in range(size):
            product = m.dtype.type(0.0)
            for j in range(size):
                product += r[i, j] * x[l, j]
            x[l + 1, i] = product
            total += product * product
        length[l] = np.sqrt(total)
        inverse = m.dtype.type(1.0 / max(length[l], 1e-12))
        for i in range(size):
            x[l + 1, i] *= inverse
    last = length.size
    sigma = m.dtype.type(0.0)
    for i in range(size):
        product = m.dtype.type(0.0)
        for j in range(size):
            product += r[i, j] * x[last, j]
        sigma += x[last - 1, i] * product
    return float(sigma + eps)


@compiled
def kronecker_factor(
    begin: int,
    end: int,
    p: Any,
    diag: Any,
    start: float,
    eps: float,
    spectral: Any,
    scale: float,
    flip: Any,
    k: Any,
) -> None:
    """One factor of a Kronecker mixer: ``K = scale * diag(diag) r / divisor``, transposed if ``flip``; rows
    from ``begin`` to ``end``.

    ``p (N, d (d + 1) / 2)``, ``diag (N, d)``, ``k (N, d, d)``.
    """
    size = diag.shape[1]
    upper, m, r = (
        np.zeros((size, size), p.dtype),
        np.empty((size, size), p.dtype),
        np.empty((size, size), p.dtype),
    )
    norm, x, length = np.empty(size, p.dtype), np.empty((17, size), p.dtype), np.empty(16, p.dtype)
    x[0, :] = start
    for n in range(begin, end):
        divisor = scaled_gram(p[n], eps, spectral, upper, m, norm, r, x, length)
        factor = p.dtype.type(scale / divisor)
        for i in range(size):
            for j in range(size):
                if flip:
                    k[n, j, i] = factor * diag[n, i] * r[i, j]
                else:
                    k[n, i, j] = factor * diag[n, i] * r[i, j]


@compiled
def kronecker_factor_vjp(
    begin: int,
    end: int,
    p: Any,
    diag: Any,
    start: float,
    eps: float,
    spectral: Any,
    scale: float,
    flip: Any,
    kbar: Any,
    pbar: Any,
    diag_bar: Any,
) -> None:
    """Cotangents of :func:`kronecker_factor`, through the power iteration."""
    size = diag.shape[1]
    upper, m, r = (
        np.zeros((size, size), p.dtype),
        np.empty((size, size), p.dtype),
        np.empty((size, size), p.dtype),
    )
    norm, x, length = np.empty(size, p.dtype), np.empty((17, size), p.dtype), np.empty(16, p.dtype)
    rbar, mbar = np.empty((size, size), p.dtype), np.empty((size, size), p.dtype)
    xbar, wbar, before = np.empty(size, p.dtype), np.empty(size, p.dtype), np.empty(size, p.dtype)
    x[0, :] = start
    last = length.size
    for n in range(begin, end):
        divisor = scaled_gram(p[n], eps, spectral, upper, m, norm, r, x, length)
        factor = p.dtype.type(scale / divisor)
        inner = p.dtype.type(0.0)
        for i in range(size):
            total = p.dtype.type(0.0)
            for j in range(size):
                bar = kbar[n, j, i] if flip else kbar[n, i, j]
                total += bar * r[i, j]
                rbar[i, j] = factor * diag[n, i] * bar
            diag_bar[n, i] = factor * total
            inner += factor * total * diag[n, i]
        if spectral:
            # sigma = x_15^T r x_16
            sigma_bar = p.dtype.type(-inner / divisor)
            for i in range(size):
                before[i] = p.dtype.type(0.0)
                xbar[i] = p.dtype.type(0.0)
            for i in range(size):
                left = sigma_bar * x[last - 1, i]
                product = p.dtype.type(0.0)
                for j in range(size):
                    rbar[i, j] += left * x[last, j]
                    product += r[i, j] * x[last, j]
                    xbar[j] += left * r[i, j]
                before[i] = sigma_bar * product
            # x_{l+1} = normalize(r x_l), backwards; x_15 has a cotangent of its own
            for l in range(last - 1, -1, -1):
                along = p.dtype.type(0.0)
                if length[l] >= 1e-12:
                    for i in range(size):
                        along += xbar[i] * x[l + 1, i]
                inverse = p.dtype.type(1.0 / max(length[l], 1e-12))
                for i in range(size):
                    wbar[i] = (xbar[i] - along * x[l + 1, i]) * inverse
                for j in range(size):
                    xbar[j] = before[j] if l == last - 1 else p.dtype.type(0.0)
                for i in range(size):
                    for j in range(size):
                        rbar[i, j] += wbar[i] * x[l, j]
                        xbar[j] += wbar[i] * r[i, j]
        normalize_vjp(r, norm, eps, rbar, mbar)
        gram_vjp(upper, mbar, pbar[n])


@compiled
def monarch_block(begin: int, end: int, p: Any, eps: float, blocks: Any) -> None:
    """``M = U U^T / (largest column norm + eps)``; ``p (N, b (b + 1) / 2)``, ``blocks (N, b, b)``."""
    size = blocks.shape[1]
    upper = np.zeros((size, size), p.dtype)
    for n in range(begin, end):
        fill(p[n], upper)
        gram(upper, blocks[n])
        largest = p.dtype.type(0.0)
        for i in range(size):
            total = p.dtype.type(0.0)
            for j in range(size):
                total += blocks[n, i, j] * blocks[n, i, j]
            largest = max(largest, total)
        inverse = p.dtype.type(1.0 / (math.sqrt(largest) + eps))
        for i in range(size):
            for j in range(size):
                blocks[n, i, j] *= inverse


@compiled
def monarch_block_vjp(begin: int, end: int, p: Any, eps: float, blocks_bar: Any, pbar: Any) -> None:
    """Cotangent of :func:`monarch_block`; of equal columns the first one counts as the largest."""
    size = blocks_bar.shape[1]
    upper, m = np.zeros((size, size), p.dtype), np.empty((size, size), p.dtype)
    mbar = np.empty((size, size), p.dtype)
    for n in range(begin, end):
        fill(p[n], upper)
        gram(upper, m)
        largest, where = p.dtype.type(-1.0), 0
        inner = p.dtype.type(0.0)
        for i in range(size):
            total = p.dtype.type(0.0)
            for j in range(size):
                total += m[i, j] * m[i, j]
                inner += blocks_bar[n, i, j] * m[i, j]
            if total > largest:
                largest, where = total, i
        norm = p.dtype.type(math.sqrt(largest))
        inverse = p.dtype.type(1.0 / (norm + eps))
        for i in range(size):
            for j in range(size):
                mbar[i, j] = blocks_bar[n, i, j] * inverse
        # the norm is that of column `where`, which is row `where` too
        if norm > 0:
            for i in range(size):
                mbar[i, where] -= inner * inverse * inverse * m[i, where] / norm
        gram_vjp(upper, mbar, pbar[n])
