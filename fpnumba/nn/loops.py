"""The compiled loops of the layers as functions of arrays; `fpnumba.gpu.maps` has the same doors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.cpu._threads import run
from fpnumba.nn import kernels, mixer_kernels

Array = NDArray[Any]

ACTIVATIONS = {
    "identity": kernels.IDENTITY,
    "relu": kernels.RELU,
    "silu": kernels.SILU,
    "sigmoid": kernels.SIGMOID,
}


def activate(name: str, x: Array) -> Array:
    """``activation(x)``, elementwise."""
    y = np.empty_like(x)
    kernels.activate(ACTIVATIONS[name], x.reshape(-1), y.reshape(-1))
    return y


def activate_vjp(name: str, x: Array, ybar: Array) -> Array:
    """``activation'(x) * ybar``."""
    xbar = np.empty_like(x)
    kernels.activate_vjp(ACTIVATIONS[name], x.reshape(-1), ybar.reshape(-1), xbar.reshape(-1))
    return xbar


def gated(z: Array, y: Array, fed: Array | None = None, *, operand: bool = False) -> Array:
    """``silu(z + fed) * y``; here products take what they are given, `operand` or not."""
    z, out = z if fed is None else z + fed, np.empty_like(z)
    kernels.gated(z.reshape(-1), y.reshape(-1), out.reshape(-1))
    return out


def gated_vjp(
    z: Array, y: Array, bar: Array, fed: Array | None = None, *, operand: bool = False
) -> tuple[Array, Array]:
    """Cotangents of `z` and `y` of :func:`gated`."""
    z, zbar, ybar = z if fed is None else z + fed, np.empty_like(z), np.empty_like(y)
    kernels.gated_vjp(*(a.reshape(-1) for a in (z, y, bar, zbar, ybar)))
    return zbar, ybar


def weight(direction: Array, magnitude: Array, out: Array | None = None) -> Array:
    """``magnitude * direction / ||direction||`` row by row, ``(N, D)`` by ``(N, 1)``, into `out` if there is one."""
    found: Array = np.multiply(
        direction, magnitude / np.linalg.norm(direction, axis=1, keepdims=True), out=out
    )
    return found


def weight_vjp(direction: Array, magnitude: Array, weight_bar: Array) -> tuple[Array, Array]:
    """Cotangents of `direction` and `magnitude` of :func:`weight`."""
    norm = np.linalg.norm(direction, axis=1, keepdims=True)
    unit = direction / norm
    along = (weight_bar * unit).sum(1, keepdims=True)
    return (weight_bar - along * unit) * (magnitude / norm), along


def softplus(raw: Array, bias: Array, out: Array | None = None) -> Array:
    """``log(1 + exp(raw + bias))``, into `out` if there is one."""
    # what is not finite is told of in a solve's status
    with np.errstate(over="ignore", invalid="ignore"):
        found: Array = np.logaddexp(raw + bias, raw.dtype.type(0), out=out)
    return found


def softplus_vjp(y: Array, ybar: Array, *, operand: bool = False) -> Array:
    """Cotangent of what :func:`softplus` sees, from its value; here products take what they are given."""
    xbar: Array = -np.expm1(-y) * ybar
    return xbar


def normalize(y: Array, eps: float) -> tuple[Array, Array]:
    """``u = y / max(||y||, eps)`` row by row, ``(N, D)``, and the norms ``(N,)`` before the maximum."""
    u, norm = np.empty_like(y), np.empty(len(y), y.dtype)
    mixer_kernels.normalize(y, eps, u, norm)
    return u, norm


def normalize_vjp(u: Array, norm: Array, eps: float, ubar: Array) -> Array:
    """Cotangent of :func:`normalize`."""
    ybar = np.empty_like(u)
    mixer_kernels.normalize_vjp(u, norm, eps, ubar, ybar)
    return ybar


def kronecker_factor(
    p: Array, diag: Array, start: float, eps: float, spectral: bool, scale: float, flip: bool
) -> Array:
    """``K = scale * diag(diag) r / divisor``, transposed if `flip`: see :mod:`fpnumba.nn.mixer_kernels`."""
    k = np.empty((*diag.shape, diag.shape[1]), p.dtype)
    options = start, eps, spectral, scale, flip
    run(mixer_kernels.kronecker_factor, len(p), k.size * k.shape[-1], p, diag, *options, k)
    return k


def kronecker_factor_vjp(
    p: Array, diag: Array, start: float, eps: float, spectral: bool, scale: float, flip: bool, k_bar: Array
) -> tuple[Array, Array]:
    """Cotangents of `p` and `diag` of :func:`kronecker_factor`."""
    p_bar, diag_bar = np.empty_like(p), np.empty_like(diag)
    options = start, eps, spectral, scale, flip
    work = k_bar.size * k_bar.shape[-1]
    run(mixer_kernels.kronecker_factor_vjp, len(p), work, p, diag, *options, k_bar, p_bar, diag_bar)
    return p_bar, diag_bar


def monarch_block(p: Array, eps: float, size: int) -> Array:
    """``M = U U^T / (largest column norm + eps)``; ``p (N, b (b + 1) / 2)`` to ``(N, b, b)``."""
    blocks = np.empty((len(p), size, size), p.dtype)
    run(mixer_kernels.monarch_block, len(p), blocks.size * size, p, eps, blocks)
    return blocks


def monarch_block_vjp(p: Array, eps: float, blocks_bar: Array) -> Array:
    """Cotangent of :func:`monarch_block`."""
    p_bar = np.empty_like(p)
    work = blocks_bar.size * blocks_bar.shape[1]
    run(mixer_kernels.monarch_block_vjp, len(p), work, p, eps, blocks_bar, p_bar)
    return p_bar


def rms_norm(x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """``y = weight * x * scale``, and ``scale = 1 / sqrt(mean(x^2) + eps)``; ``x (N, D)``."""
    y, scale = np.empty_like(x), np.empty(len(x), x.dtype)
    kernels.rms_norm(x, weight, eps, y, scale)
    return y, scale


def rms_norm_vjp(x: Array, weight: Array, scale: Array, ybar: Array) -> tuple[Array, Array]:
    """Cotangents of `x` and `weight` of :func:`rms_norm`."""
    xbar, weight_bar = np.empty_like(x), np.zeros_like(weight)
    kernels.rms_norm_vjp(x, weight, scale, ybar, xbar, weight_bar)
    return xbar, weight_bar


def conv(
    x: Array, taps: Array, bias: Array, activation: str = "identity", past: Array | None = None
) -> Array:
    """``y_t = activation(bias + sum_k taps_k x_{t-(W-1)+k})``; ``x (B, T, C)``, ``taps (W, C)``.

    ``past (B, W - 1, C)`` stands before the first step, zeros if left out.
    """
    y = np.empty_like(x)
    kernels.conv(ACTIVATIONS[activation], x, taps, bias, _past(x, taps, past), y)
    return y


def conv_vjp(
    x: Array, taps: Array, bias: Array, activation: str, past: Array | None, ybar: Array
) -> tuple[Array, Array, Array]:
    """Cotangents of `x`, `taps` and the bias of :func:`conv`; what stands before the first step has none."""
    xbar, taps_bar, bias_bar = np.zeros_like(x), np.zeros_like(taps), np.zeros(x.shape[2], x.dtype)
    given = x, taps, bias, _past(x, taps, past), ybar
    kernels.conv_vjp(ACTIVATIONS[activation], *given, xbar, taps_bar, bias_bar)
    return xbar, taps_bar, bias_bar


def _past(x: Array, taps: Array, past: Array | None) -> Array:
    return np.zeros((len(x), len(taps) - 1, x.shape[2]), x.dtype) if past is None else past


def lstm_step(gates: Array, fed: Array, before: Array, c: Array, h: Array) -> None:
    """One step of an LSTM: `gates` (B, 4 D) become their activations, `c` and `h` (B, D) are written.

    `gates` holds what the input gives and `fed` what the state gives, in the order i, f, g, o; `before` is the cell of
    the step before.
    """
    kernels.lstm_step(gates, fed, before, c, h)


def lstm_step_vjp(
    gates: Array, before: Array, c: Array, h_bar: Array, fed_bar: Array, c_bar: Array, raw_bar: Array
) -> None:
    """Cotangent of the gates before their activations, into `raw_bar`; `c_bar` becomes that of `before`.

    The cotangent of ``h`` is ``h_bar + fed_bar``.
    """
    kernels.lstm_step_vjp(gates, before, c, h_bar, fed_bar, c_bar, raw_bar)


def scatter_rows(indices: NDArray[np.integer[Any]], rows: Array, count: int) -> Array:
    """A table ``(count, D)`` of the sums of the rows of each index, the same every time."""
    table = np.zeros((count, rows.shape[1]), rows.dtype)
    kernels.scatter_rows(indices, rows, table)
    return table


def adamw(
    p: Array, g: Array, m: Array, v: Array, scale: float, rate: float, decay: float, betas: Any, eps: float
) -> tuple[Array, Array, Array]:
    """One AdamW step of flat arrays: the new parameters and moments; see :mod:`fpnumba.nn.kernels`."""
    out, m, v = np.empty_like(p), m.copy(), v.copy()
    kernels.adamw(p, g, m, v, scale, rate, decay, betas[0], betas[1], eps, out)
    return out, m, v
