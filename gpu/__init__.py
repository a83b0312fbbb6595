"""The GPU room: CUDA kernels on CuPy arrays, behind the doors of `fpnumba.reference` and `fpnumba.cpu`.

The doors (``scan``, ``mixers``, ``solve``, ``mamba``, ``maps``) are opened when they are first asked for; CuPy, a
driver and a device are looked for at the first call, and what is missing is said then. `engine` tells which kind of
kernel was asked for by name, `precision` in which precision layers multiply matrices. `capture` records what a function
does on the device, to be launched as one.
"""

import importlib
from typing import Any

from fpnumba.gpu._engine import ENGINES, PRECISIONS, engine, precision, use_engine, use_precision
from fpnumba.gpu._recording import recording

__all__ = [
    "ENGINES",
    "PRECISIONS",
    "Captured",
    "NotRecorded",
    "absent",
    "capture",
    "engine",
    "mamba",
    "maps",
    "mixers",
    "precision",
    "recording",
    "scan",
    "solve",
    "use_engine",
    "use_precision",
    "xp",
]

_DOORS = ("mamba", "maps", "mixers", "scan", "solve", "training")


def absent() -> str | None:
    """Why this machine has no GPU room, in one sentence; None if it has one.

    Examples
    --------
    >>> import fpnumba.gpu
    >>> fpnumba.gpu.absent() is None or isinstance(fpnumba.gpu.absent(), str)
    True
    """
    from fpnumba.gpu import _host

    return _host.absent()


def xp() -> Any:
    """The array module of the room, CuPy; raises `ImportError` where it is missing."""
    from fpnumba.gpu import _device

    return _device.xp()


def __getattr__(name: str) -> Any:
    if name in ("Captured", "NotRecorded", "capture"):
        from fpnumba.gpu import _capture

        return getattr(_capture, name)
    if name in _DOORS:
        return importlib.import_module(f"fpnumba.gpu.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
