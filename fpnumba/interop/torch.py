"""torch: tensors come in and go out through DLPack, without a copy.

bfloat16 has no NumPy dtype of its own. On the CPU torch itself converts it, to float32 on the way in and back on the
way out; on a GPU its bits are exchanged as integers, and read as the `ml_dtypes` dtype.
"""

from importlib import import_module
from typing import Any

import numpy as np

from fpnumba.interop.dlpack import Taken


def dtype_name(array: Any) -> str:
    """Name of the stored dtype."""
    return str(array.dtype).removeprefix("torch.")


def take(array: Any) -> Taken:
    """View the memory of a tensor as a NumPy array (bfloat16: a float32 copy), or as a CuPy array if it lies on a
    GPU."""
    if array.requires_grad:
        raise TypeError(
            "is a torch tensor that requires grad, which torch does not share; "
            "pass x.detach() and take the gradient with fpnumba.vjp"
        )
    small = dtype_name(array) == "bfloat16"
    if array.is_cuda:
        from fpnumba.gpu import _device

        if small:
            bits = array.view(import_module("torch").int16)
            return _device.xp().from_dlpack(bits).view(_bfloat16())  # type: ignore[no-any-return]
        return _device.xp().from_dlpack(array)  # type: ignore[no-any-return]
    return np.from_dlpack(array.float() if small else array)


def give(result: Taken, like: Any) -> Any:
    """Hand the memory of `result` to torch, in the dtype of `like`."""
    torch = import_module("torch")
    small = dtype_name(like) == "bfloat16"
    if small and like.is_cuda:
        return torch.from_dlpack(result.astype(_bfloat16(), copy=False).view(np.int16)).view(torch.bfloat16)
    if small:
        return torch.from_dlpack(result).to(torch.bfloat16)
    return torch.from_dlpack(result.astype(dtype_name(like), copy=False))


def _bfloat16() -> np.dtype[Any]:
    try:
        found: np.dtype[Any] = np.dtype(import_module("ml_dtypes").bfloat16)
    except ImportError as reason:
        raise ImportError("bfloat16 on a GPU needs ml_dtypes: pip install ml_dtypes") from reason
    return found
