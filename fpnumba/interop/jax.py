"""JAX: arrays come in through DLPack without a copy, and go out so where JAX can take them.

On the CPU JAX adopts foreign memory only at addresses that are multiples of 64 and copies once otherwise. bfloat16
arrives as the `ml_dtypes` dtype, which JAX brings along.

On a GPU a call waits for its own kernels before it hands over the result: JAX works on streams of its own, and could
give the memory of an input that has been deleted to its next computation while a kernel here still reads it.
"""

from typing import Any

import numpy as np

from fpnumba.interop.dlpack import Taken, on_gpu


def dtype_name(array: Any) -> str:
    """Name of the stored dtype."""
    return str(array.dtype.name)


def take(array: Any) -> Taken:
    """View the memory of an array as a (read-only) NumPy array, or as a CuPy array if it lies on a GPU."""
    import jax

    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            "is a traced JAX array; fpnumba computes on values, so call it outside jit, grad and vmap"
        )
    if on_gpu(array):
        from fpnumba.gpu import _device

        return _device.xp().from_dlpack(array)  # type: ignore[no-any-return]
    array.block_until_ready()
    return np.asarray(array) if dtype_name(array) == "bfloat16" else np.from_dlpack(array)


def give(result: Taken, like: Any) -> Any:
    """Hand the memory of `result` to JAX, in the dtype of `like`."""
    import jax

    result = result.astype(like.dtype, copy=False)
    if on_gpu(like):
        from fpnumba.gpu import _host

        _host.wait()
        return jax.dlpack.from_dlpack(result)
    if dtype_name(like) == "bfloat16":
        return jax.numpy.asarray(result)
    return jax.dlpack.from_dlpack(result)
