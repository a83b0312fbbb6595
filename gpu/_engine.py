"""Which kernels serve a call: the tuned ones, or the readable ones that also take a user's own mixer."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

ENGINES = ("raw", "numba")

_engine: ContextVar[str | None] = ContextVar("fpnumba_engine", default=None)


@contextmanager
def use_engine(name: str) -> Iterator[None]:
    """Let the kernels of one engine serve the GPU calls inside a ``with`` block, in this thread and this context.

    Without it, ``"raw"`` serves what it has kernels for and ``"numba"`` the rest; by name there is no falling back.

    Parameters
    ----------
    name : {"raw", "numba"}
        CUDA C kernels, tuned; or numba.cuda kernels, readable, which also take a user's own mixer.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    _known(name)
    token = _engine.set(name)
    try:
        yield
    finally:
        _engine.reset(token)


def engine() -> str | None:
    """The engine that was asked for by name; None leaves the choice to the room."""
    return _engine.get()


def tuned(kind: Any, name: str | None = None) -> bool:
    """Whether the tuned kernels serve this kind of mixer.

    Raises
    ------
    ValueError
        For an unknown engine, and where ``"raw"`` is asked for by name and has no kernel.
    """
    name = engine() if name is None else _known(name)
    own = not isinstance(kind, str)
    if name == "raw" and own:
        raise ValueError(f"engine: 'raw' has no kernels for a user's own mixer ({kind.name}); use 'numba'")
    return name != "numba" and not own


def _known(name: str) -> str:
    if name not in ENGINES:
        raise ValueError(f"engine: got {name!r}, expected one of {', '.join(map(repr, ENGINES))}")
    return name


PRECISIONS = ("float32", "tf32", "bfloat16")

_precision: ContextVar[str] = ContextVar("fpnumba_gpu_precision", default="float32")


@contextmanager
def use_precision(name: str) -> Iterator[None]:
    """Multiply float32 matrices of layers in another precision inside a ``with`` block, in this thread and context.

    Sums are float32 always. ``tf32`` rounds the factors to eleven bits, ``bfloat16`` to eight, on tensor cores; float64
    stays what it is. With ``bfloat16``, products that only kernels read, arguments of mixers and gates, are stored so
    too. The products of the mixers ``fixed`` and ``dense`` are not concerned.

    Parameters
    ----------
    name : {"float32", "tf32", "bfloat16"}

    Raises
    ------
    ValueError
        For an unknown name.

    Examples
    --------
    >>> from fpnumba import gpu
    >>> with gpu.use_precision("tf32"):
    ...     gpu.precision()
    'tf32'
    """
    if name not in PRECISIONS:
        raise ValueError(f"argument `name`: got {name!r}, expected one of {', '.join(PRECISIONS)}")
    token = _precision.set(name)
    try:
        yield
    finally:
        _precision.reset(token)


def operand(dtype: Any) -> Any:
    """The dtype in which products take their factors."""
    if dtype != np.float32 or precision() != "bfloat16":
        return dtype
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def precision() -> str:
    """In which precision layers multiply float32 matrices now; see `use_precision`."""
    return _precision.get()
