"""One step of the iteration in hand, `fpnumba.relax`; see ``kernels/map_advance.cu``."""

from functools import cache
from typing import Any

import numpy as np

from fpnumba.gpu import _device, _shapes
from fpnumba.gpu._report import store

Array = Any

# Threads of a block, and rows of them: a warp has one.
THREADS, ROWS = 256, 8


@cache
def _kernel(name: str, dtype: str, each: int) -> _device.Kernel:
    return _device.Kernel.of("map_advance.cu", name, {"STORE": store(dtype), "EACH": each})


def advance(h: Array, new: Array, damping: Array, published: bool) -> tuple[Array, Array]:
    """``h + damping * (new - h)``, and how far it went.

    Parameters
    ----------
    h, new : (B, T, D) C-contiguous arrays
    damping : (B,) array
        Of each sequence, in the dtype of `h`; negative for one that rests, whose `new` is not looked at.
    published : bool
        By which rule is measured; section 7 of docs/mathematics.md.

    Returns
    -------
    (B, T, D) array
    measures : (B, 2) array
        Largest ``|new - h|`` and largest magnitude of what is returned; by the published rule, the largest over the
        steps of ``max|new - h| / (max|new| + 1e-8)``, and zero. NaN is larger than anything; zeros of a sequence that
        rests.
    """
    batch, steps, dim = h.shape
    after = _shapes.empty_like(h)
    numbers, dtype = _shapes.empty_like(h, batch * steps, 2), _shapes.name(h.dtype)
    each = _shapes.each(dim, h, new, after)
    sizes = np.int64(batch * steps), np.int64(steps), np.int32(dim), np.int32(published)
    arguments = (h, new, damping, after, numbers, *sizes)
    _device.launch(_kernel("advance", dtype, each), -(-batch * steps // ROWS), THREADS, arguments)
    return after, most(numbers, batch)


def most(numbers: Array, batch: int) -> Array:
    """The largest of both numbers over the steps of a sequence: ``(B T, 2)`` to ``(B, 2)``."""
    measures, steps = _shapes.empty_like(numbers, batch, 2), len(numbers) // max(batch, 1)
    kernel = _kernel("advance_most", _shapes.name(numbers.dtype), 1)
    shared = 2 * ROWS * numbers.dtype.itemsize
    _device.launch(kernel, batch, THREADS, (numbers, measures, np.int64(steps)), shared=shared)
    return measures


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    found = [_kernel("advance", *shape) for shape in (("float32", 4), ("float32", 1), ("float64", 2))]
    return found + [_kernel("advance_most", dtype, 1) for dtype in ("float32", "float64")]
