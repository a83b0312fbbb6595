"""Shape classes: how many channels a thread takes at once, how many threads and blocks."""

import math
from functools import cache
from typing import Any

import numpy as np

from fpnumba.gpu import _device

# Bytes that one access moves at most.
ACCESS = 16


@cache
def name(dtype: Any) -> str:
    """The name of a dtype."""
    return str(np.dtype(dtype).name)


def each(dim: int, *arrays: Any) -> int:
    """Neighbouring channels that one access can move in all of `arrays`, whose rows have `dim` channels.

    A power of two that divides `dim`, at most 16 bytes, and such that every array begins at a multiple of it.
    """
    size, begin = arrays[0].dtype.itemsize, 0
    for array in arrays:
        if array is not None:
            begin |= _device.address(array)
    width = ACCESS // size
    while width > 1 and (dim % width or begin % (width * size)):
        width //= 2
    return int(width)


def aligned(*arrays: Any) -> tuple[Any, ...]:
    """The arrays, and a copy of what does not begin where the widest access may: a part of another array can."""
    return tuple(a.copy() if a is not None and _device.address(a) % ACCESS else a for a in arrays)


def threads(dim: int, width: int, most: int) -> int:
    """Threads of a block, whole warps, for `dim` channels at `width` a thread; at most `most`."""
    return min(most, max(32, -(-math.ceil(dim / width) // 32) * 32))


def empty_like(like: Any, *shape: int) -> Any:
    """An array of this shape in the dtype of `like`."""
    return _device.xp().empty(shape or like.shape, like.dtype)


def real(dtype: Any) -> Any:
    """The dtype that a storage dtype is computed in."""
    return np.float64 if dtype == np.float64 else np.float32
