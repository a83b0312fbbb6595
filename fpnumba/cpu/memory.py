"""Memory for results, taken again when the last array that used it is gone.

A fresh large array is not free: the system hands out pages that it must zero first, at the first touch. For a
result of 64 MiB that takes longer than the scan which fills it. Results therefore come from blocks that earlier
results have left behind, as they do on a GPU, up to `LIMIT` bytes in all.
"""

import os
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

# Below this malloc recycles by itself.
SMALLEST = 1 << 20
# Blocks come in multiples of a huge page, so that nearly equal results share them.
GRAIN = 1 << 21
# Rows are written past the cache a line at a time.
ALIGNMENT = 64
LIMIT = int(os.environ.get("FPNUMBA_CACHE_BYTES", 1 << 29))

_free: dict[int, list[NDArray[np.uint8]]] = {}


class _Lease:
    """Owns one block while arrays use it; the base of each of them, so it outlives them all."""

    def __init__(self, block: NDArray[np.uint8], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._block = block
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": dtype.str,
            "data": (-(-block.ctypes.data // ALIGNMENT) * ALIGNMENT, False),
        }

    def __del__(self) -> None:
        # List and dict operations are atomic, so neither threads nor a collection amid another call hurt.
        try:
            if held_bytes() + self._block.nbytes <= LIMIT:
                _free.setdefault(self._block.nbytes, []).append(self._block)
        except TypeError:
            pass  # the interpreter is shutting down and this module's names are gone


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return an uninitialised C-contiguous array, like ``numpy.empty``, from recycled memory where it is large.

    Parameters
    ----------
    shape : tuple of int
    dtype : a NumPy dtype

    Returns
    -------
    ndarray

    Examples
    --------
    >>> from fpnumba.cpu.memory import empty
    >>> empty((2, 3), "float32").shape
    (2, 3)
    """
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if nbytes < SMALLEST:
        return np.empty(shape, dtype)
    size = -(-(nbytes + ALIGNMENT) // GRAIN) * GRAIN
    try:
        block = _free[size].pop()
    except (KeyError, IndexError):
        if held_bytes() + size > LIMIT:
            release()  # sizes have changed: what was kept no longer serves
        block = np.empty(size, np.uint8)
    return np.asarray(_Lease(block, shape, dtype))


def held_bytes() -> int:
    """Bytes that wait for the next result."""
    return sum(size * len(blocks) for size, blocks in list(_free.items()))


def release() -> None:
    """Give all waiting memory back to the system."""
    _free.clear()
