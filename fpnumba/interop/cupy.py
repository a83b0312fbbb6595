"""CuPy, the library at home on a GPU: nothing to exchange."""

from functools import cache
from typing import Any

from fpnumba.interop.dlpack import Taken


def dtype_name(array: Any) -> str:
    """Name of the stored dtype."""
    return _name(array.dtype)


@cache
def _name(dtype: Any) -> str:
    return str(dtype.name)


def take(array: Any) -> Taken:
    """Return the array itself."""
    return array  # type: ignore[no-any-return]


def give(result: Taken, like: Any) -> Any:
    """Return the result in the dtype of `like`."""
    return result.astype(like.dtype, copy=False)
