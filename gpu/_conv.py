"""The short convolution of layers with its activation, and its adjoint; see ``kernels/map_conv.cu``."""

from typing import Any

import numpy as np

from fpnumba.gpu import _device, _shapes
from fpnumba.gpu._columns import THREADS, column_sums, lanes
from fpnumba.gpu._report import store

Array = Any

ACTS = {"identity": 0, "relu": 1, "silu": 2, "sigmoid": 3}
# Steps that are asked for at a time, of x, and of x and y_bar.
AHEAD, AHEAD_VJP = 4, 2
# Blocks that keep a multiprocessor busy, and a stretch of time at least.
BUSY, SHORTEST = 8, 16
# With more taps a thread has a single channel, so that they stay in registers.
FEW_TAPS = 8


def _kernel(name: str, dtype: str, width: int, each: int, activation: str) -> _device.Kernel:
    ahead = AHEAD if name == "conv" else AHEAD_VJP
    macros = {"STORE": store(dtype), "EACH": each, "W": width, "AHEAD": ahead, "ACT": ACTS[activation]}
    return _device.Kernel.of("map_conv.cu", name, macros)


def _layout(x: Array, width: int, *arrays: Array | None) -> tuple[int, int, int, tuple[Any, ...]]:
    """Channels of a thread, blocks, workers, and the sizes as kernels take them."""
    batch, steps, channels = x.shape
    each = _shapes.each(channels, x, *arrays) if width <= FEW_TAPS else 1
    side = lanes(channels, each, THREADS)
    across = -(-channels // (each * side))
    busy = max(1, BUSY * _device.multiprocessors() // across)  # blocks of the same channels
    workers = busy * THREADS // side
    stretches = max(1, min(steps // SHORTEST, -(-workers // max(batch, 1))))
    groups = min(busy, -(-batch * stretches * side // THREADS))
    sizes = np.int64(batch), np.int64(steps), np.int32(channels), np.int32(side), np.int64(stretches)
    return each, across * groups, groups * THREADS // side, sizes


def conv(
    x: Array, taps: Array, bias: Array, activation: str = "identity", past: Array | None = None
) -> Array:
    """``y_t = activation(bias + sum_k taps_k x_{t-(W-1)+k})``.

    Parameters
    ----------
    x : (B, T, C) C-contiguous array
    taps : (W, C) array
    bias : (C,) array
    activation : str
    past : (B, W - 1, C) array, optional
        What stands before the first step; zeros if left out.

    Returns
    -------
    (B, T, C) array
    """
    y, width = _shapes.empty_like(x), len(taps)
    taps, bias, past = _shapes.aligned(taps, bias, past)
    each, blocks, _, sizes = _layout(x, width, y)
    kernel = _kernel("conv", _shapes.name(x.dtype), width, each, activation)
    _device.launch(kernel, blocks if x.size else 0, THREADS, (x, past, taps, bias, y, *sizes))
    return y


def conv_vjp(
    x: Array, taps: Array, bias: Array, activation: str, past: Array | None, ybar: Array
) -> tuple[Array, Array, Array]:
    """Cotangents of `x`, `taps` and the bias of :func:`conv`; what stands before the first step has none."""
    xbar, (width, channels) = _shapes.empty_like(x), taps.shape
    taps, bias, past = _shapes.aligned(taps, bias, past)
    each, blocks, workers, sizes = _layout(x, width, ybar, xbar)
    parts = _shapes.empty_like(x, workers if x.size else 0, (width + 1) * channels)
    kernel = _kernel("conv_vjp", _shapes.name(x.dtype), width, each, activation)
    _device.launch(kernel, blocks if x.size else 0, THREADS, (x, past, taps, bias, ybar, xbar, parts, *sizes))
    sums = column_sums(parts).reshape(width + 1, channels)
    return xbar, sums[:width], sums[width]


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    cases = (("float32", 4, 4, "silu"), ("float32", 4, 1, "silu"), ("float64", 3, 2, "identity"))
    return [_kernel(name, *case) for name in ("conv", "conv_vjp") for case in cases]
