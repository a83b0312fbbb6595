"""Products of several mixers, over the doors of any room.

Beside the kinds of `fpnumba.reference.mixers` there is "mixture", whose ``params`` are a list of ``(kind, params)``,
the first of which is applied first. `doors` is the module ``mixers`` of a room.
"""

from collections.abc import Callable
from typing import Any

from fpnumba.reference.kinds import Array

__all__ = ["apply", "apply_transpose", "at_steps", "cotangent", "each"]


def apply(doors: Any, kind: Any, params: Any, x: Array) -> Array:
    """``Q x``.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba.reference import mixers, products
    >>> half = ("fixed", (np.array([[0.5]]),))
    >>> products.apply(mixers, "mixture", [half, half], np.ones((1, 1)))
    array([[0.25]])
    """
    if kind == "mixture":
        for one in params:
            x = apply(doors, one[0], one[1], x)
        return x
    y: Array = doors.apply(kind, params, x)
    return y


def apply_transpose(doors: Any, kind: Any, params: Any, y: Array) -> Array:
    """``Q^T y``."""
    if kind == "mixture":
        for one in reversed(params):
            y = apply_transpose(doors, one[0], one[1], y)
        return y
    x: Array = doors.apply_transpose(kind, params, y)
    return x


def cotangent(doors: Any, kind: Any, params: Any, x: Array, ybar: Array) -> Any:
    """Cotangents of the parameters for ``y = Q x``; for "mixture" a list of such tuples."""
    if kind != "mixture":
        return doors.cotangent(kind, params, x, ybar)
    inputs = [x]
    for one in params[:-1]:
        inputs.append(apply(doors, one[0], one[1], inputs[-1]))
    bars = []
    for one, seen in zip(reversed(params), reversed(inputs), strict=True):
        bars.append(cotangent(doors, one[0], one[1], seen, ybar))
        ybar = apply_transpose(doors, one[0], one[1], ybar)
    return bars[::-1]


def at_steps(kind: Any, params: Any, steps: slice, axis: int) -> Any:
    """The parameters of some of the steps; time is their axis `axis`."""
    if kind == "mixture":
        return [(one, at_steps(one, theirs, steps, axis)) for one, theirs in params]
    if kind == "fixed":
        return params
    return tuple(p[(slice(None),) * axis + (steps,)] for p in params)


def each(kind: Any, params: Any, change: Callable[[Array], Array]) -> Any:
    """The parameters with every array changed.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba.reference import products
    >>> products.each("mixture", [("fixed", (np.array([[0.5]]),))], np.negative)
    [('fixed', (array([[-0.5]]),))]
    """
    if kind == "mixture":
        return [(one, each(one, theirs, change)) for one, theirs in params]
    return tuple(change(p) for p in params)
