"""Derivatives that owe nothing to the code under test, for comparison with its cotangents."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def dot(a: Any, b: Any) -> float:
    """Sum of the inner products of two arrays, or of two sequences of arrays; None counts as zero."""
    if a is None or b is None:
        return 0.0
    if isinstance(a, np.ndarray):
        assert a.shape == np.shape(b)
        return float(np.vdot(a, b))
    assert len(a) == len(b)
    return sum(dot(p, q) for p, q in zip(a, b, strict=True))


def size_of(a: Any, b: Any) -> float:
    """What rounding errors of `dot` are relative to: the product of the two norms."""
    return float(np.sqrt(abs(dot(a, a)) * abs(dot(b, b))))


def like(rng: np.random.Generator, arrays: Sequence[Array | None]) -> list[Any]:
    """Random directions of the shapes of these arrays."""
    return [None if a is None else rng.standard_normal(a.shape) for a in arrays]


def complex_step(
    f: Callable[..., Array], primals: Sequence[Array | None], tangents: Sequence[Array | None]
) -> Array:
    """The directional derivative of an analytic ``f``, to the last digit: ``imag f(p + i e t) / e``."""
    e = 1e-30
    moved = [p if p is None or t is None else p + 1j * e * t for p, t in zip(primals, tangents, strict=True)]
    return np.asarray(f(*moved).imag) / e


def assert_transposed(forward: tuple[Any, Any], backward: tuple[Any, Any], rtol: float = 1e-12) -> None:
    """The dot-product identity ``<ybar, J t> = <J^T ybar, t>``, given both pairs."""
    scale = max(size_of(*forward), size_of(*backward))
    assert abs(dot(*forward) - dot(*backward)) <= rtol * scale + 1e-300


def slopes_and_gradients(layer, params, x, rng):
    """For every parameter and the input: derivative in a direction by differences, and by the adjoint.

    Row-normalised matrices bend sharply, so the steps are shorter than those of ``check_adjoint``.
    """
    y, pullback = layer.vjp(params, x)
    y_bar = rng.standard_normal(y.shape)
    bars, x_bar = pullback(y_bar)
    for name in [*params, "x"]:
        point, bar = (x, x_bar) if name == "x" else (params[name], bars[name])
        direction = rng.standard_normal(point.shape)

        def along(e, name=name, point=point, direction=direction):
            moved = point + e * direction
            out = layer(params, moved) if name == "x" else layer({**params, name: moved}, x)
            return float(np.vdot(out, y_bar))

        coarse, fine = ((along(e) - along(-e)) / (2 * e) for e in (4e-5, 2e-5))
        yield name, (4 * fine - coarse) / 3, float(np.vdot(bar, direction))
