"""Elementwise loops of the layers, compiled.

A layer's time goes into matrix products, which BLAS does, and into activations and normalisations, each of
which NumPy would do in half a dozen passes over memory. The loops here do each of them in one. They are
serial on purpose: at a training step's sizes the matrix products are what a second thread helps with.

``math.exp`` is a function call that LLVM does not vectorise; :func:`exponential` in single precision is
straight-line code (Cody-Waite reduction and a polynomial, 1 ulp), which it does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.extending import overload

from fpnumba.cpu._jit import FASTMATH, stamped

F = TypeVar("F", bound=Callable[..., Any])

IDENTITY, RELU, SILU, SIGMOID = range(4)
# Numbers of a convolution on their way to its activation: they stay in the nearest cache.
SPAN = 2048


@cache
def sources_hash() -> str:
    """Digest of the sources of this folder: Numba keys a kernel on its own file, and ours call across
    files."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*kernels.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def compiled(function: F) -> F:
    """Compile when first called, keep the result on disk, hold no lock; the type checker sees the plain
    function."""
    dispatcher: Any = numba.njit(cache=True, nogil=True, fastmath=FASTMATH, error_model="numpy")(function)
    return cast(F, stamped(dispatcher, sources_hash()))


def exponential(x: Any) -> Any:
    """``exp(x)``; compiled for single precision it vectorises, and stays in the finite range."""
    return math.exp(x)


@overload(exponential, jit_options={"fastmath": FASTMATH})
def _exponential(x: Any) -> Any:
    if x == numba.float32:

        def single(x: Any) -> Any:
            # written so that a NaN passes through both comparisons
            y = np.float32(-87.0) if x < np.float32(-87.0) else x
            y = np.float32(88.0) if y > np.float32(88.0) else y
            k = np.floor(y * np.float32(1.44269504088896341) + np.float32(0.5))
            f = y - k * np.float32(0.693359375)
            f = f + k * np.float32(2.12194440e-4)
            p = np.float32(1.9875691500e-4)
            p = p * f + np.float32(1.3981999507e-3)
            p = p * f + np.float32(8.3334519073e-3)
            p = p * f + np.float32(4.1665795894e-2)
            p = p * f + np.float32(1.6666665459e-1)
            p = p * f + np.float32(5.0000001201e-1)
            p = p * f * f + f + np.float32(1.0)
            bits = (np.int32(k) + np.int32(127)) << np.int32(23)
            return p * np.int32(bits).view(np.float32)

        return single

    def double(x: Any) -> Any:
        return math.exp(x)

    return double


@compiled
def activate(kind: int, x: Any, y: Any) -> None:
    """``y = activation(x)`` over flat arrays; ``kind`` as above."""
    one = x.dtype.type(1.0)
    zero = x.dtype.type(0.0)
    if kind == SILU:
        for i in range(x.size):
            y[i] = x[i] / (one + exponential(-x[i]))
    elif kind == SIGMOID:
        for i in range(x.size):
            y[i] = one / (one + exponential(-x[i]))
    elif kind == RELU:
        for i in range(x.size):
            y[i] = zero if x[i] < zero else x[i]
    else:
        for i in range(x.size):
            y[i] = x[i]


@compiled
def activate_vjp(kind: int, x: Any, ybar: Any, xbar: Any) -> None:
    """``xbar = activation'(x) * ybar``, from the input of the activation."""
    one = x.dtype.type(1.0)
    zero = x.dtype.type(0.0)
    if kind == SILU:
        for i in range(x.size):
            s = one / (one + exponential(-x[i]))
            xbar[i] = ybar[i] * s * (one + x[i] * (one - s))
    elif kind == SIGMOID:
        for i in range(x.size):
            s = one / (one + exponential(-x[i]))
            xbar[i] = ybar[i] * s * (one - s)
    elif kind == RELU:
        for i in range(x.size):
            xbar[i] = ybar[i] if x[i] > zero else zero
    else:
        for i in range(x.size):
            xbar[i] = ybar[i]


@compiled
def gated(z: Any, y: Any, out: Any) -> None:
    """``out = silu(z) * y`` over flat arrays."""
    one = z.dtype.type(1.0)
    for i in range(z.size):
        out[i] = z[i] / (one + exponential(-z[i])) * y[i]


@compiled
def gated_vjp(z: Any, y: Any, bar: Any, zbar: Any, ybar: Any) -> None:
    """Cotangents of :func:`gated`."""
    one = z.dtype.type(1.0)
    for i in range(z.size):
        s = one / (one + exponential(-z[i]))
        zbar[i] = bar[i] * y[i] * s * (one + z[i] * (one - s))
        ybar[i] = bar[i] * (z[i] * s)


@compiled
def _convolve(x: Any, weight: Any, bias: Any, past: Any, first: int, inner: Any) -> None:
    """``inner = bias + sum_k w_k x_{t-(W-1)+k}`` of some steps of a sequence; ``past`` stands before the first."""
    width, channels = weight.shape
    for i in range(len(inner)):
        for c in range(channels):
            inner[i, c] = bias[c]
        for k in range(width):
            source = first + i - (width - 1) + k
            if source >= 0:
                for c in range(channels):
                    inner[i, c] += weight[k, c] * x[source, c]
            else:
                for c in range(channels):
                    inner[i, c] += weight[k, c] * past[source + width - 1, c]


@compiled
def conv(kind: int, x: Any, weight: Any, bias: Any, past: Any, y: Any) -> None:
    """Depthwise causal convolution and activation, ``y_t = activation(bias + sum_k w_k x_{t-(W-1)+k})``.

    ``x, y (B, T, C)``, ``weight (W, C)``, and ``past (B, W-1, C)`` stands before the first step.
    """
    batch, steps, channels = x.shape
    span = max(1, SPAN // max(channels, 1))
    inner = np.empty((span, channels), x.dtype)
    for b in range(batch):
        for first in range(0, steps, span):
            count = min(span, steps - first)
            _convolve(x[b], weight, bias, past[b], first, inner[:count])
            activate(kind, inner[:count].reshape(-1), y[b, first : first + count].reshape(-1))


@compiled
def conv_vjp(
    kind: int,
    x: Any,
    weight: Any,
    bias: Any,
    past: Any,
    ybar: Any,
    xbar: Any,
    weight_bar: Any,
    bias_bar: Any,
) -> None:
    """Cotangents of :func:`conv`; adds into arrays that start at zero."""
    batch, steps, channels = x.shape
    width, span = weight.shape[0], max(1, SPAN // max(channels, 1))
    inner, bar = np.empty((span, channels), x.dtype), np.empty((span, channels), x.dtype)
    for b in range(batch):
        for first in range(0, steps, span):
            count = min(span, steps - first)
            if kind != IDENTITY:
                _convolve(x[b], weight, bias, past[b], first, inner[:count])
            outer = ybar[b, first : first + count]
            activate_vjp(kind, inner[:count].reshape(-1), outer.reshape(-1), bar[:count].reshape(-1))
            for i in range(count):
                for c in range(channels):
                    bias_bar[c] += bar[i, c]
                for k in range(width):
                    source = first + i - (width - 1) + k
                    if source >= 0:
                        for c in range(channels):
                            weight_bar[k, c] += bar[i, c] * x[b, source, c]
                            xbar[b, source, c] += bar[i, c] * weight[k, c]
                    else:
                        for c in range(channels):
                            weight_bar[k, c] += bar[i, c] * past[b, source + width - 1, c]


@compiled
def rms_norm(x: Any, weight: Any, eps: float, y: Any, scale: Any) -> None:
    """``y = weight * x * scale``, ``scale = 1 / sqrt(mean(x^2) + eps)``; ``x (N, D)``."""
    rows, width = x.shape
    for n in range(rows):
        total = x.dtype.type(0.0)
        for d in range(width):
            total += x[n, d] * x[n, d]
        factor = x.dtype.type(1.0 / math.sqrt(total / width + eps))
        scale[n] = factor
        for d in range(width):
            y[n, d] = weight[d] * (x[n, d] * factor)


@compiled
def rms_norm_vjp(x: Any, weight: Any, scale: Any, ybar: Any, xbar: Any, weight_bar: Any) -> None:
    """Cotangents of :func:`rms_norm`; ``weight_bar`` is added to."""
    rows, width = x.shape
    for n in range(rows):
        factor = scale[n]
        total = x.dtype.type(0.0)
        for d in range(width):
            total += weight[d] * ybar[n, d] * x[n, d]
        correction = total * factor * factor * factor / x.dtype.type(width)
        for d in range(width):
            weight_bar[d] += ybar[n, d] * x[n, d] * factor
            xbar[n, d] = weight[d] * ybar[n, d] * factor - x[n, d] * correction


@compiled
def lstm_step(gates: Any, fed: Any, before: Any, c: Any, h: Any) -> None:
    """``c = f before + i g`` and ``h = o tanh(c)`` with the activated gates, which `gates` is left with."""
    batch, width = c.shape
    one, two = c.dtype.type(1.0), c.dtype.type(2.0)
    for b in range(batch):
        for d in range(4 * width):
            # tanh(x) = 2 sigmoid(2 x) - 1
            scale = two if 2 * width <= d < 3 * width else one
            open_ = scale / (one + exponential(-scale * (gates[b, d] + fed[b, d])))
            gates[b, d] = open_ - one if 2 * width <= d < 3 * width else open_
        for d in range(width):
            cell = gates[b, width + d] * before[b, d] + gates[b, d] * gates[b, 2 * width + d]
            c[b, d] = cell
            h[b, d] = gates[b, 3 * width + d] * (two / (one + exponential(-two * cell)) - one)


@compiled
def lstm_step_vjp(
    gates: Any, before: Any, c: Any, h_bar: Any, fed_bar: Any, c_bar: Any, raw_bar: Any
) -> None:
    """Cotangents of :func:`lstm_step`: of the gates before their activations, and in `c_bar` of `before`."""
    batch, width = c.shape
    one, two = c.dtype.type(1.0), c.dtype.type(2.0)
    for b in range(batch):
        for d in range(width):
            i, f, g, o = gates[b, d], gates[b, width + d], gates[b, 2 * width + d], gates[b, 3 * width + d]
            squashed = two / (one + exponential(-two * c[b, d])) - one
            out = h_bar[b, d] + fed_bar[b, d]
            cell = c_bar[b, d] + out * o * (one - squashed * squashed)
            raw_bar[b, d] = cell * g * i * (one - i)
            raw_bar[b, width + d] = cell * before[b, d] * f * (one - f)
            raw_bar[b, 2 * width + d] = cell * i * (one - g * g)
            raw_bar[b, 3 * width + d] = out * squashed * o * (one - o)
            c_bar[b, d] = cell * f


@compiled
def scatter_rows(indices: Any, rows: Any, table: Any) -> None:
    """``table[indices[n]] += rows[n]``, in order, so that the sum is the same every time."""
    for n in range(indices.size):
        for d in range(rows.shape[1]):
            table[indices[n], d] += rows[n, d]


@compiled
def adamw(
    p: Any,
    g: Any,
    m: Any,
    v: Any,
    scale: float,
    rate: float,
    decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    out: Any,
) -> None:
    """One AdamW step over flat arrays: ``m`` and ``v`` are overwritten, the new parameters go to ``out``.

    ``scale`` is what clipping multiplies the gradient with; ``rate`` and ``eps`` carry the bias corrections.
    """
    kind = p.dtype.type
    b1, c1, b2, c2 = kind(beta1), kind(1.0 - beta1), kind(beta2), kind(1.0 - beta2)
    clip, step, shrink, tiny = kind(scale), kind(rate), kind(1.0 - decay), kind(eps)
    for i in range(p.size):
        grad = clip * g[i]
        m[i] = b1 * m[i] + c1 * grad
        v[i] = b2 * v[i] + c2 * grad * grad
        out[i] = shrink * p[i] - step * m[i] / (np.sqrt(v[i]) + tiny)
