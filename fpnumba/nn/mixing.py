"""Channel mixing of :mod:`fpnumba.nn`: the doors of a room, and products of several mixers."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from fpnumba.nn import backend
from fpnumba.reference import products

Array = NDArray[Any]
# A mixer as a room takes it, or for "mixture" a list of (kind, params), the first of which is applied first.
Mixer = tuple[str, Any]


def apply(mixer: Mixer, x: Array) -> Array:
    """``Q x``, ``x (B, T, D)``."""
    return products.apply(backend.room(x).mixers, *mixer, x)


def apply_transpose(mixer: Mixer, y: Array) -> Array:
    """``Q^T y``, ``y (B, T, D)``."""
    return products.apply_transpose(backend.room(y).mixers, *mixer, y)


def cotangent(mixer: Mixer, x: Array, ybar: Array) -> Any:
    """Cotangents of the parameters for ``y = Q x``; for "mixture" a list of such tuples."""
    return products.cotangent(backend.room(x).mixers, *mixer, x, ybar)
