"""Whether this machine has a GPU to test on."""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

# How the reports of tests begin that were left out because there is none.
REASON = "no GPU"


@functools.cache
def _found() -> tuple[str, str]:
    """The name of the device and "", or "" and why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import cupy

            if cupy.cuda.runtime.getDeviceCount() == 0:
                return "", "no device"
            name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"]
    except ImportError:
        return "", "CuPy is not installed"
    except Exception as reason:  # the driver's own errors
        return "", f"{type(reason).__name__}: {reason}"
    return name.decode() if isinstance(name, bytes) else str(name), ""


def has_device() -> bool:
    """Whether CuPy is installed and finds a device."""
    return _found()[0] != ""


def device_name() -> str:
    """Of the device, or "" where there is none."""
    return _found()[0]


def reason() -> str:
    """What is said of a test that is left out."""
    return f"{REASON}: {_found()[1]}"


def required() -> bool:
    """Whether tests that find no device are to fail: FPNUMBA_REQUIRE_GPU=1, where there ought to be one."""
    return os.environ.get("FPNUMBA_REQUIRE_GPU") == "1"


class GpuRoom(NamedTuple):
    """Where the arrays of a test of the GPU room lie, and how they get there and back."""

    name: str
    give: Callable[[Any], Any]
    get: Callable[[Any], Any]
