"""Shape classes: how many channels a thread takes at once, how many threads and blocks."""

import math
from typing import Any

import numpy as np

from fpnumba.gpu import _device

# Bytes that one access moves at most.
ACCESS = 16


def each(dim: int, *arrays: Any) -> int:
    """Neighbouring channels that one access can move in all of `arrays`, whose rows have `dim` channels.

    A power of two that divides `dim`, at most 16 bytes, and such that every array begins at a multiple of it.
    """
    size = arrays[0].dtype.itemsize
    addresses = [_device.address(a) for a in arrays if a is not None]
    width = ACCESS // size
    while width > 1 and (dim % width or any(at % (width * size) for at in addresses)):
        width //= 2
    return width


def threads(dim: int, width: int, most: int) -> int:
    """Threads of a block, whole warps, for `dim` channels at `width` a thread; at most `most`."""
    return min(most, max(32, -(-math.ceil(dim / width) // 32) * 32))


def empty_like(like: Any, *shape: int) -> Any:
    """An array of this shape in the dtype of `like`."""
    return _device.xp().empty(shape or like.shape, like.dtype)


def real(dtype: Any) -> Any:
    """The dtype that a storage dtype is computed in."""
    return np.float64 if dtype == np.float64 else np.float32
