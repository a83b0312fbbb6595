"""Where the arrays of a layer lie, and what computes there.

Layers are written once, over NumPy's functions, which serve CuPy's arrays too. What those functions do not do, or do in
too many passes, has a door here: compiled loops for NumPy's arrays, `fpnumba.gpu.maps` for CuPy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.arrays import Room, host_room, namespace, served_by

Array = NDArray[Any]


def on_host(array: Array) -> bool:
    """Whether an array is NumPy's."""
    return isinstance(array, np.ndarray)


def room(array: Array) -> Room:
    """The room that serves an array."""
    return host_room() if on_host(array) else served_by(array)


def kernels(array: Array) -> ModuleType:
    """The loops for an array: :mod:`fpnumba.nn.loops`, or their twins on a device."""
    if on_host(array):
        from fpnumba.nn import loops

        return loops
    from fpnumba.gpu import maps

    return maps


def contiguous(array: Array) -> Array:
    """The array, C-contiguous."""
    found: Array = namespace(array).ascontiguousarray(array)
    return found


def empty(shape: tuple[int, ...], like: Array) -> Array:
    """An array of this shape, where `like` lies and of its dtype, not filled in."""
    found: Array = namespace(like).empty(shape, like.dtype)
    return found


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    """The same, of zeros."""
    found: Array = namespace(like).zeros(shape, like.dtype)
    return found


def ones(shape: tuple[int, ...], like: Array) -> Array:
    """The same, of ones."""
    found: Array = namespace(like).ones(shape, like.dtype)
    return found


def joined(arrays: Sequence[Array], axis: int = 0) -> Array:
    """The arrays after each other along an axis, C-contiguous."""
    if on_host(arrays[0]):
        return np.concatenate(arrays, axis=axis)
    found: Array = kernels(arrays[0]).joined(list(arrays), axis)
    return found


def product(a: Array, b: Array, *, transposed: tuple[bool, bool] = (False, False)) -> Array:
    """The product of two matrices, each of which may be taken transposed.

    On a GPU in the precision of `fpnumba.gpu.use_precision`.
    """
    if on_host(a):
        found: Array = (a.T if transposed[0] else a) @ (b.T if transposed[1] else b)
        return found
    return kernels(a).product(a, b, transposed)  # type: ignore[no-any-return]


def column_sums(x: Array) -> Array:
    """``x.sum(0)`` of a matrix."""
    found: Array = x.sum(0) if on_host(x) else kernels(x).column_sums(contiguous(x))
    return found


def recorded(array: Array) -> bool:
    """Whether work on this array is only recorded (`fpnumba.gpu.capture`): its values cannot be looked at."""
    if on_host(array):
        return False
    from fpnumba.gpu import recording

    return recording() is not None
