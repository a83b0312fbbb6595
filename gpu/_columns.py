"""Sums of columns of a matrix, and how channels lie over threads; see ``kernels/map_columns.cu``."""

from typing import Any

import numpy as np

from fpnumba.gpu import _device, _shapes
from fpnumba.gpu._report import store

Array = Any

# Threads of a block, and how many of them lie side by side at most; fewer in the sum of parts, for more blocks.
THREADS, LANES, LANES_OF_PARTS = 256, 32, 8
# Blocks that keep a multiprocessor busy, and rows that are worth a block.
BUSY, WORTH = 8, 64


def lanes(dim: int, each: int, most: int) -> int:
    """Threads side by side that take `dim` channels, `each` at a time: a power of two."""
    count = 1
    while count < most and count * each < dim:
        count *= 2
    return count


def _kernel(dtype: str, each: int) -> _device.Kernel:
    return _device.Kernel.of("map_columns.cu", "columns", {"STORE": store(dtype), "EACH": each})


def _sums(x: Array, parts: int, side: int) -> Array:
    rows, dim = x.shape
    out = _shapes.empty_like(x, parts, dim)
    each = _shapes.each(dim, x, out)
    side = lanes(dim, each, side)
    sizes = np.int64(rows), np.int32(dim), np.int32(side), np.int32(parts)
    blocks = -(-dim // (each * side)) * parts
    shared = THREADS * each * x.dtype.itemsize
    _device.launch(_kernel(_shapes.name(x.dtype), each), blocks, THREADS, (x, out, *sizes), shared=shared)
    return out


def column_sums(x: Array) -> Array:
    """``x.sum(0)`` of ``x (N, D)``, C-contiguous: the same every time."""
    rows, dim = x.shape
    if not rows * dim:
        return _device.xp().zeros(dim, x.dtype)
    across = -(-dim // (LANES * _shapes.each(dim, x)))
    parts = max(1, min(BUSY * _device.multiprocessors() // across, rows // WORTH))
    some = x if parts == 1 else _sums(x, parts, LANES)
    return _sums(some, 1, LANES_OF_PARTS)[0]


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    return [_kernel("float32", 4), _kernel("float32", 1), _kernel("float64", 2)]
