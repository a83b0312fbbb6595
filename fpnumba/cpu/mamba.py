"""The fixed point with a matrix state, section 5 of docs/mathematics.md: the doors of `fpnumba.reference.mamba`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.cpu import mixers, scan
from fpnumba.reference import mamba as reference
from fpnumba.reference.mamba import Bars, Norm, Solved, System, normalize, normalize_vjp, pullback, solve

__all__ = [
    "Bars",
    "Norm",
    "Solved",
    "System",
    "application_vjp",
    "iterate",
    "normalize",
    "normalize_vjp",
    "pullback",
    "solve",
]

Array = NDArray[np.floating[Any]]


class _Doors:
    scan = scan
    mixers = mixers


def iterate(system: System, initial: Array | None, y: Array) -> Array:
    """One parallel iteration; see `fpnumba.reference.mamba.iterate`."""
    return reference.iterate(system, initial, y, _Doors)


def application_vjp(system: System, initial: Array | None, y: Array, new_bar: Array) -> Bars:
    """Cotangents of `iterate`; see `fpnumba.reference.mamba.application_vjp`."""
    return reference.application_vjp(system, initial, y, new_bar, _Doors)
