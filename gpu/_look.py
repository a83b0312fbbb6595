"""Whether sequences are finite; see ``kernels/map_look.cu``."""

import math
from typing import Any

import numpy as np

from fpnumba.gpu import _device, _shapes
from fpnumba.gpu._report import FIELDS, store

Array = Any

# Blocks that keep a multiprocessor busy, and elements that are worth one.
BUSY, WORTH, THREADS = 8, 4096, 256


def _kernel(dtype: str) -> _device.Kernel:
    return _device.Kernel.of("map_look.cu", "look", {"STORE": store(dtype)})


def wild(*arrays: Array | None, only: Array | None = None) -> Array:
    """Which sequences have something in any of the arrays that is not finite.

    Parameters
    ----------
    *arrays : (B, ...) C-contiguous arrays of one dtype, or None
        At most eight.
    only : (B,) int32 array, optional
        Sequences where it is zero are not looked at, and count as finite.

    Returns
    -------
    (B,) int32 array
        Zeros and ones.
    """
    given = [array for array in arrays if array is not None]
    found, sizes = _device.xp().zeros(len(given[0]), np.int32), [math.prod(a.shape[1:]) for a in given]
    room = BUSY * _device.multiprocessors() // max(len(found), 1)
    parts = max(1, min(room, max(sizes) // WORTH))
    fields: list[Any] = []
    for array, size in zip(given, sizes, strict=True):
        fields += [array, np.int64(size)]
    fields += [None, np.int64(0)] * (FIELDS - len(given))
    kernel = _kernel(_shapes.name(given[0].dtype))
    _device.launch(kernel, len(found) * parts, THREADS, (found, only, np.int32(parts), *fields))
    return found


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    return [_kernel("float32"), _kernel("float64")]
