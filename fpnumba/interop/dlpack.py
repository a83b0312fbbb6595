"""Any library with DLPack and an array-API namespace: exchange without a copy, on the CPU and on a GPU."""

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Taken: TypeAlias = NDArray[Any]


def dtype_name(array: Any) -> str:
    """Name of the stored dtype, read from the exchanged array: the one spelling that all libraries share."""
    return str(take(array).dtype.name)


def on_gpu(array: Any) -> bool:
    """Whether an array that has a place lies on a GPU: on neither of DLPack's 1, the CPU, and 3, its pinned memory."""
    try:
        return int(array.__dlpack_device__()[0]) not in (1, 3)
    except Exception:  # a traced array, or one in several places
        return False


def take(array: Any) -> Taken:
    """View the memory of `array` as a NumPy array, or as a CuPy array if it lies on a GPU."""
    if on_gpu(array):
        from fpnumba.gpu import _device

        return _device.xp().from_dlpack(array)  # type: ignore[no-any-return]
    return np.from_dlpack(array)


def importer(array: Any) -> Callable[[Any], Any] | None:
    """The library's own ``from_dlpack``, of its array-API namespace or top module; None where it has none."""
    if hasattr(array, "__array_namespace__"):
        found = getattr(array.__array_namespace__(), "from_dlpack", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    top = sys.modules.get(type(array).__module__.partition(".")[0])
    return getattr(top, "from_dlpack", None)


def give(result: Taken, like: Any) -> Any:
    """Hand the memory of `result` to the library of `like`."""
    from_dlpack = importer(like)
    assert from_dlpack is not None, "checked when the array came in"
    return from_dlpack(result.astype(take(like).dtype, copy=False))
