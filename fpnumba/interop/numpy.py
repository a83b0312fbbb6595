"""NumPy, the library at home: nothing to exchange."""

from functools import cache
from typing import Any

import numpy as np

from fpnumba.interop.dlpack import Taken


def dtype_name(array: Any) -> str:
    """Name of the stored dtype; a byte-swapped one has the name of its native twin."""
    return _name(array.dtype)


@cache
def _name(dtype: np.dtype[Any]) -> str:
    return str(dtype.name)


def take(array: Any) -> Taken:
    """Return the array itself."""
    return np.asarray(array)


def give(result: Taken, like: Any) -> Any:
    """Return the result in the (native) dtype of `like`."""
    return result.astype(like.dtype.newbyteorder("="), copy=False)
