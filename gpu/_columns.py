"""Sums of columns of a matrix, and how channels lie over threads; see ``kernels/map_columns.cu``."""

from functools import cache
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


@cache
def _kernel(dtype: str, each: int) -> _device.Kernel:
    out = "float32" if dtype in ("bfloat16", "float16") else dtype
    return _device.Kernel.of(
        "map_columns.cu", "columns", {"STORE": store(dtype), "OUT": store(out), "EACH": each}
    )


def _sums(x: Array, parts: int, side: int) -> Array:
    rows, dim = x.shape
    out = _device.xp().empty((parts, dim), _shapes.real(x.dtype))
    each = min(_shapes.each(dim, x), _shapes.each(dim, out))
    side = lanes(dim, each, side)
    sizes = np.int64(rows), np.int32(dim), np.int32(side), np.int32(parts)
    blocks = -(-dim // (each * side)) * parts
    shared = THREADS * each * out.dtype.itemsize
    _device.launch(_kernel(_shapes.name(x.dtype), each), blocks, THREADS, (x, out, *sizes), shared=shared)
    return out


def column_sums(x: Array) -> Array:
    """``x.sum(0)`` of ``x (N, D)``, C-contiguous: the same every time. Half precision has sums in float32."""
    rows, dim = x.shape
    if not rows * dim:
        return _device.xp().zeros(dim, _shapes.real(x.dtype))
    across = -(-dim // (LANES * _shapes.each(dim, x)))
    parts = max(1, min(BUSY * _device.multiprocessors() // across, rows // WORTH))
    some = x if parts == 1 else _sums(x, parts, LANES)
    return _sums(some, 1, LANES_OF_PARTS)[0]


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    shapes = ("float32", 4), ("float32", 1), ("float64", 2), ("bfloat16", 4)
    return [_kernel(*shape) for shape in shapes]
