"""Numba's device arrays: they come in and go out through ``__cuda_array_interface__``, without a copy."""

from typing import Any

from fpnumba.interop.dlpack import Taken


def dtype_name(array: Any) -> str:
    """Name of the stored dtype."""
    return str(array.dtype.name)


def take(array: Any) -> Taken:
    """View the memory of a device array as a CuPy array."""
    from fpnumba.gpu import _device

    return _device.xp().asarray(array)  # type: ignore[no-any-return]


def give(result: Taken, like: Any) -> Any:
    """Hand the memory of `result` to Numba, in the dtype of `like`.

    Numba takes an array as one whose work is done, or bound to a stream of its own. On the default stream, where Numba
    works too, nothing is waited for.
    """
    from numba import cuda

    from fpnumba.gpu import _device

    result = result.astype(like.dtype, copy=False)
    default = _device.xp().cuda.get_current_stream().ptr == 0
    return cuda.as_cuda_array(result, sync=not default)
