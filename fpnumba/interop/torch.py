"""torch: tensors come in and go out through DLPack, without a copy.

bfloat16 has no NumPy dtype and is the exception: torch itself converts it, to float32 on the way in and back
on the way out.
"""

from importlib import import_module
from typing import Any

import numpy as np

from fpnumba.interop.dlpack import Taken


def dtype_name(array: Any) -> str:
    """Name of the stored dtype."""
    return str(array.dtype).removeprefix("torch.")


def take(array: Any) -> Taken:
    """View the memory of a tensor as a NumPy array (bfloat16: a float32 copy)."""
    if array.requires_grad:
        raise TypeError(
            "is a torch tensor that requires grad, which torch does not share; "
            "pass x.detach() and take the gradient with fpnumba.vjp"
        )
    return np.from_dlpack(array.float() if dtype_name(array) == "bfloat16" else array)


def give(result: Taken, like: Any) -> Any:
    """Hand the memory of `result` to torch, in the dtype of `like`."""
    torch = import_module("torch")
    if dtype_name(like) == "bfloat16":
        return torch.from_dlpack(result).to(torch.bfloat16)
    return torch.from_dlpack(result.astype(dtype_name(like), copy=False))
