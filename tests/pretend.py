"""A device that is not there: NumPy in the place of CuPy, and a GPU room whose doors are those of the reference.

The doors hold the hall to what the GPU room asks of it: arrays that are C-contiguous and of one dtype, the one they are
stored in, and their device the current one. They give results in that dtype, computed in a larger one where it is
small.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

import fpnumba as fp

DOORS = ("scan", "mixers", "solve")


def _changed(thing: Any, change: Callable[[Any], Any]) -> Any:
    """The same structure with every array changed."""
    if isinstance(thing, np.ndarray):
        return change(thing)
    if isinstance(thing, tuple):
        parts = [_changed(part, change) for part in thing]
        return type(thing)(*parts) if hasattr(thing, "_fields") else tuple(parts)
    return thing


def _door(true: Callable[..., Any], host: "Host") -> Callable[..., Any]:
    def door(*arguments: Any, **options: Any) -> Any:
        assert host.current == [0]
        stored: set[np.dtype[Any]] = set()

        def taken(array: Any) -> Any:
            assert array.flags.c_contiguous
            stored.add(array.dtype)
            return array.astype(np.float32) if array.dtype.itemsize == 2 else array

        wide = _changed(arguments, taken)
        (dtype,) = stored
        host.dtypes.add(dtype.name)
        found = true(*wide, **options)
        return _changed(found, lambda a: a.astype(dtype) if a.dtype == np.float32 else a)

    return door


def doors(name: str, host: "Host") -> Any:
    """A door's file: the reference's functions, held to what the GPU room asks."""
    true = importlib.import_module(f"fpnumba.reference.{name}")
    public = {n: f for n, f in vars(true).items() if callable(f) and not n.startswith("_")}
    return SimpleNamespace(**{name: _door(function, host) for name, function in public.items()})


class Host:
    """What the hall asks of a device, and what it did with one."""

    def __init__(self) -> None:
        self.fetched: list[Any] = []  # arrays that were waited for
        self.dtypes: set[str] = set()  # of what went through the doors
        self.current: list[int] = []

    def xp(self) -> Any:
        return np

    def require(self) -> None:
        pass

    @contextmanager
    def _at(self, device: int) -> Iterator[None]:
        self.current.append(device)
        try:
            yield
        finally:
            self.current.pop()

    def at(self, device: int) -> AbstractContextManager[Any]:
        return self._at(device) if self.current[-1:] != [device] else nullcontext()

    def later(self, *arrays: Any) -> list[Callable[[], Any]]:
        def fetch(array: Any) -> Any:
            self.fetched.append(array)
            return array

        return [partial(fetch, array) for array in arrays]


@contextmanager
def device(*, kernels: bool = False) -> Iterator[Host]:
    """Let the hall find this device, wherever it looks for one inside a ``with`` block.

    With `kernels` the doors are those of the GPU room, and its CUDA C runs on the CPU (`simt`).
    """
    host, module, files = Host(), fp.arrays._module, {}
    if kernels:
        import simt

        with simt.device(), patch.object(fp.arrays, "_gpu", lambda: host):
            yield host
        return

    def found(name: str) -> Any:
        room, _, file = name.rpartition(".")
        if room != "fpnumba.gpu" or file not in DOORS:
            return module(name)
        if file not in files:
            files[file] = doors(file, host)
        return files[file]

    with patch.multiple(fp.arrays, _gpu=lambda: host, _module=found):
        yield host
