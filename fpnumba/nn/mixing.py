"""Channel mixing of :mod:`fpnumba.nn`: the doors of a room, and products of several mixers."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from fpnumba.arrays import host_room

Array = NDArray[Any]
# A mixer as a room takes it, or for "mixture" a list of (kind, params), the first of which is applied first.
Mixer = tuple[str, Any]


def apply(mixer: Mixer, x: Array) -> Array:
    """``Q x``, ``x (B, T, D)``."""
    kind, params = mixer
    if kind == "mixture":
        for one in params:
            x = apply(one, x)
        return x
    y: Array = host_room().mixers.apply(kind, params, x)
    return y


def apply_transpose(mixer: Mixer, y: Array) -> Array:
    """``Q^T y``, ``y (B, T, D)``."""
    kind, params = mixer
    if kind == "mixture":
        for one in reversed(params):
            y = apply_transpose(one, y)
        return y
    x: Array = host_room().mixers.apply_transpose(kind, params, y)
    return x


def cotangent(mixer: Mixer, x: Array, ybar: Array) -> Any:
    """Cotangents of the parameters for ``y = Q x``; for "mixture" a list of such tuples."""
    kind, params = mixer
    if kind != "mixture":
        return host_room().mixers.cotangent(kind, params, x, ybar)
    inputs = [x]
    for one in params[:-1]:
        inputs.append(apply(one, inputs[-1]))
    bars = []
    for one, seen in zip(reversed(params), reversed(inputs), strict=True):
        bars.append(cotangent(one, seen, ybar))
        ybar = apply_transpose(one, ybar)
    return bars[::-1]
