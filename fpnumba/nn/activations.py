"""Activations with their adjoints, by name."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from fpnumba.nn import backend
from fpnumba.nn.loops import ACTIVATIONS

Array = NDArray[Any]


def check(name: str) -> str:
    """Return ``name`` if it is an activation's, otherwise raise ``ValueError``."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, not {name!r}")
    return name


def activate(name: str, x: Array) -> Array:
    """``activation(x)``, elementwise.

    Parameters
    ----------
    name : str
        ``"identity"``, ``"relu"``, ``"silu"`` (``x * sigmoid(x)``) or ``"sigmoid"``.
    x : ndarray of float32 or float64

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba.nn.activations import activate
    >>> activate("sigmoid", np.zeros(2))
    array([0.5, 0.5])
    """
    x = backend.contiguous(x)
    y: Array = backend.kernels(x).activate(name, x)
    return y


def activate_vjp(name: str, x: Array, ybar: Array) -> Array:
    """``activation'(x) * ybar``: the cotangent of ``x``, from the input of the activation."""
    x = backend.contiguous(x)
    xbar: Array = backend.kernels(x).activate_vjp(name, x, backend.contiguous(ybar))
    return xbar


def sigmoid(x: Array) -> Array:
    """``1 / (1 + exp(-x))``."""
    return activate("sigmoid", x)


def silu(x: Array) -> Array:
    """``x * sigmoid(x)``."""
    return activate("silu", x)


def silu_vjp(x: Array, ybar: Array) -> Array:
    """Cotangent of :func:`silu`."""
    return activate_vjp("silu", x, ybar)


def gated(z: Array, y: Array, fed: Array | None = None, *, operand: bool = False) -> Array:
    """``silu(z + fed) * y``; with `operand` as products take it.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba.nn.activations import gated
    >>> gated(np.zeros(2), np.ones(2))
    array([0., 0.])
    """
    z, y = backend.contiguous(z), backend.contiguous(y)
    out: Array = backend.kernels(z).gated(z, y, fed, operand=operand)
    return out


def gated_vjp(
    z: Array, y: Array, bar: Array, fed: Array | None = None, *, operand: bool = False
) -> tuple[Array, Array]:
    """Cotangents of ``z``, with `operand` as products take it, and ``y`` of :func:`gated`."""
    z, y, bar = (backend.contiguous(a) for a in (z, y, bar))
    found: tuple[Array, Array] = backend.kernels(z).gated_vjp(z, y, bar, fed, operand=operand)
    return found
