"""What the hall asks of a device: whether there is one, to make it current, and what it has found out.

Nothing is asked at import. What is missing is said at first use, with what to do about it.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.gpu import _device
from fpnumba.gpu._recording import recording

NO_DRIVER = (
    "the GPU room needs an NVIDIA driver, and there is none on this machine (nvidia-smi would show it)"
)
OLD_DRIVER = (
    "the NVIDIA driver of this machine serves CUDA {driver} at most, and the installed CuPy is for CUDA {runtime}: "
    "update the driver, or pip install 'fpnumba[cuda12]' in the place of 'fpnumba[cuda13]'"
)
NO_DEVICE = "the NVIDIA driver shows no CUDA device to this process{hint}"
NO_NUMBA = (
    "the engine 'numba' needs numba-cuda: pip install 'fpnumba[cuda13]' for a driver of CUDA 13, or "
    "'fpnumba[cuda12]' for one of CUDA 12"
)


def xp() -> Any:
    """The array module of the room; raises `ImportError` where it is missing."""
    return _device.xp()


def version(number: int) -> str:
    """A version as CUDA counts them: 13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


_ready = False


def require() -> None:
    """Raise unless there are CuPy, a driver and a device.

    Raises
    ------
    ImportError
        If CuPy is missing.
    RuntimeError
        If a driver or a device is missing, or does not fit.
    """
    global _ready
    if _ready:
        return
    runtime = xp().cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as reason:
        driver = runtime.driverGetVersion()
        if driver == 0:
            raise RuntimeError(NO_DRIVER) from reason
        if "InsufficientDriver" in str(reason):
            versions = {"driver": version(driver), "runtime": version(runtime.runtimeGetVersion())}
            raise RuntimeError(OLD_DRIVER.format(**versions)) from reason
        if "NoDevice" not in str(reason):
            raise RuntimeError(f"the NVIDIA driver does not answer: {reason}") from reason
        count = 0
    if count == 0:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = "" if hidden is None else f": CUDA_VISIBLE_DEVICES is {hidden!r}"
        raise RuntimeError(NO_DEVICE.format(hint=hint))
    _ready = True


def absent() -> str | None:
    """Why there is no GPU room on this machine; None if there is one."""
    try:
        require()
    except (ImportError, RuntimeError) as reason:
        return str(reason)
    return None


def require_numba() -> None:
    """Raise `ImportError` unless numba-cuda is installed; Numba's simulator needs none."""
    if find_spec("numba_cuda") is None and os.environ.get("NUMBA_ENABLE_CUDASIM", "0") != "1":
        raise ImportError(NO_NUMBA)


def at(device: int) -> AbstractContextManager[Any]:
    """Make a device the current one inside a ``with`` block."""
    cuda = xp().cuda
    here = cuda.runtime.getDevice() == device
    return nullcontext() if here else cuda.Device(device)


def later(*arrays: Any) -> list[Callable[[], NDArray[Any]]]:
    """For each array what fetches it once everything launched so far on the current stream is done; nothing waits
    now. What is recorded is fetched behind what was launched last on the stream that is current then."""
    if isinstance(arrays[0], np.ndarray):
        return [lambda array=array: array for array in arrays]  # type: ignore[misc]
    stream = None if recording() is not None else xp().cuda.get_current_stream()

    def fetch(array: Any) -> NDArray[Any]:
        with at(array.device.id):
            return array.get(stream=stream)  # type: ignore[no-any-return]

    return [partial(fetch, array) for array in arrays]


def wait() -> None:
    """Wait for the current stream of the current device."""
    xp().cuda.get_current_stream().synchronize()
