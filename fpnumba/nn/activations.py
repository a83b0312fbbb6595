"""Activations with their adjoints, by name."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.nn import kernels

Array = NDArray[Any]

KINDS = {
    "identity": kernels.IDENTITY,
    "relu": kernels.RELU,
    "silu": kernels.SILU,
    "sigmoid": kernels.SIGMOID,
}


def check(name: str) -> str:
    """Return ``name`` if it is an activation's, otherwise raise ``ValueError``."""
    if name not in KINDS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, KINDS))}, not {name!r}")
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
    x = np.ascontiguousarray(x)
    y = np.empty_like(x)
    kernels.activate(KINDS[name], x.reshape(-1), y.reshape(-1))
    return y


def activate_vjp(name: str, x: Array, ybar: Array) -> Array:
    """``activation'(x) * ybar``: the cotangent of ``x``, from the input of the activation."""
    x = np.ascontiguousarray(x)
    ybar = np.ascontiguousarray(ybar)
    xbar = np.empty_like(x)
    kernels.activate_vjp(KINDS[name], x.reshape(-1), ybar.reshape(-1), xbar.reshape(-1))
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
