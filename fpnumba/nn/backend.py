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


def product(
    a: Array,
    b: Array,
    *,
    transposed: tuple[bool, bool] = (False, False),
    out: Array | None = None,
    add: bool = False,
) -> Array:
    """The product of two matrices, each of which may be taken transposed; into `out`, or added to what that has.

    On a GPU in the precision of `fpnumba.gpu.use_precision`; rows may lie apart.
    """
    if not on_host(a):
        return kernels(a).product(a, b, transposed, out, add=add)  # type: ignore[no-any-return]
    left, right = a.T if transposed[0] else a, b.T if transposed[1] else b
    if out is None or add:
        found: Array = left @ right
        if out is None:
            return found
        out += found
        return out
    return np.matmul(left, right, out=out)


def add_to_past(y_bar: Array, fed_bar: Array, weight: Array) -> None:
    """Add to the cotangents of ``y_{t-1}`` what step ``t`` says, ``fed_bar (B T, n) weight (n, D)``.

    In one product, which reaches over the ends of sequences, where it is taken back.
    """
    ends, flat = y_bar[:, -1].copy(), y_bar.reshape(-1, y_bar.shape[-1])
    product(fed_bar[1:], weight, out=flat[:-1], add=True)
    y_bar[:, -1] = ends


def operand(array: Array) -> Array:
    """The array as :func:`product` takes it: on a GPU in the precision asked for, rounded once for several products."""
    if on_host(array):
        return array
    found: Array = kernels(array).operand(array)
    return found


def plus(total: Array | None, part: Array) -> Array:
    """Their sum, where None is nothing."""
    if total is None:
        return part
    if total.dtype.itemsize == 2:  # as products take it
        total, part = total.astype(np.float32), part.astype(np.float32)
    found: Array = total + part
    return found


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


def repeated(array: Array) -> bool:
    """Whether work on this array is recorded, or run before it is: it has to be the same work both times."""
    if on_host(array):
        return False
    from fpnumba.gpu import _recording

    return _recording.recording() is not None or _recording.rehearsal()


def blind(array: Array) -> bool:
    """Whether work on this array is recorded, and no run before has told what it looks at."""
    if on_host(array):
        return False
    from fpnumba.gpu import _recording

    return _recording.blind()
