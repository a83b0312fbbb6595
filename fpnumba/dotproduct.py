"""The dot-product test: whether a pullback is the transpose of its function's derivative."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.arrays import DTYPES, Float, is_cupy, kind_of, namespace, neighbour, to_numpy
from fpnumba.mixers import Mixer
from fpnumba.rnn import fixed_point_rnn
from fpnumba.solve import Adjoint, Solution, Solver
from fpnumba.vjp import vjp


class AdjointError(AssertionError):
    """A pullback is not the transpose of its function's derivative.

    Attributes
    ----------
    report : AdjointReport

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> class Wrong:
    ...     def __call__(self, x):
    ...         return x**2
    ...     def vjp(self, x):
    ...         return x**2, lambda bar: (x * bar,)
    >>> try:
    ...     fp.check_adjoint(Wrong(), np.ones(3))
    ... except fp.AdjointError as error:
    ...     print(error.report.worst)
    primal 0
    """

    def __init__(self, message: str, report: "AdjointReport") -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class AdjointReport:
    """What `check_adjoint` found: for each array that was varied, ``<ybar, J v>`` and ``<J^T ybar, v>``.

    Attributes
    ----------
    products : dict of str to (float, float)
    errors : dict of str to float
        Their difference, relative to the larger of them or, where both are small by cancellation, to ``|ybar|
        |J v|``.
    tolerance : float

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> report = fp.check_adjoint(fp.linear_scan, np.full((3, 2), 0.5), np.ones((3, 2)))
    >>> report.passed, sorted(report.errors)
    (True, ['primal 0', 'primal 1'])
    """

    products: dict[str, tuple[float, float]]
    errors: dict[str, float]
    tolerance: float

    @property
    def error(self) -> float:
        """The largest error; NaN if any is."""
        return float(np.max(list(self.errors.values()), initial=0.0))

    @property
    def worst(self) -> str | None:
        """The array with the largest error."""
        key = lambda name: np.nan_to_num(self.errors[name], nan=np.inf)  # noqa: E731
        return max(self.errors, key=key, default=None)

    @property
    def passed(self) -> bool:
        """Whether every error is within the tolerance."""
        return all(error <= self.tolerance for error in self.errors.values())


# A step is halved so often, at the most
HALVINGS = 12


def check_adjoint(
    fun: Any, /, *primals: Any, tolerance: float = 1e-7, seed: int = 0, step: float = 4e-3, **options: Any
) -> AdjointReport:
    """Test a pullback against its function: ``<ybar, J v> = <J^T ybar, v>`` for random ``ybar`` and ``v``.

    ``J v`` is a central difference, extrapolated twice by Richardson's rule, of the function in float64. Its
    step is halved until two estimates agree to a hundredth of the tolerance, or rounding is in the way. Each
    array is varied on its own, so that a miss names the culprit.

    Parameters
    ----------
    fun : callable
        As for `vjp`.
    *primals
        Arrays, mixers (their parameters are varied), dicts of these (a layer's parameters). Arrays of
        floating point are converted to NumPy float64, those on a GPU to CuPy float64; everything else is passed
        on as it is and not varied.
    tolerance : float
        Largest relative error that passes.
    seed : int
        For ``ybar`` and ``v``.
    step : float
        The longest step, in which each number of an array moves by about `step`. A function that may not be
        evaluated so far away, or is not smooth there, needs a shorter one.
    **options
        Passed on to `fun`; its arrays are varied where the pullback has a cotangent for them. A function that
        iterates must be told to iterate tightly: `fixed_point_rnn` is, unless it is given a `solver` and an
        `adjoint`.

    Returns
    -------
    AdjointReport

    Raises
    ------
    AdjointError
        If an error exceeds the tolerance, or is NaN.
    TypeError
        If there is nothing to vary, or as `vjp`.
    ValueError
        If `step` is not positive.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> mixer = fp.mixers.Dense(np.arange(8.0).reshape(2, 2, 2))
    >>> fp.check_adjoint(fp.mixers.Dense.apply, mixer, np.ones((2, 2))).passed
    True
    """
    if fun is fixed_point_rnn:
        options = {
            "solver": Solver(rtol=1e-13, max_iter=5000),
            "adjoint": Adjoint(rtol=1e-13, max_iter=5000),
        } | options
    rng = np.random.default_rng(seed)
    primals = tuple(_as_float64(p) for p in primals)
    options = {name: _as_float64(option) for name, option in options.items()}
    out, pullback = vjp(fun, *primals, **options)
    ybar = [rng.standard_normal(part.shape) for part in _outputs(out)]
    laid = [_beside(part, bar) for part, bar in zip(_parts(out), ybar, strict=True)]
    bars = pullback(tuple(laid) if isinstance(out, tuple | list) else laid[0])
    found = {f"primal {i}": bar for i, bar in enumerate(bars)} | getattr(bars, "options", {})
    given = {f"primal {i}": primal for i, primal in enumerate(primals)} | options

    def value(name: str, changed: Any) -> list[Float]:
        args = [changed if name == f"primal {i}" else p for i, p in enumerate(primals)]
        kwargs = {n: changed if n == name else o for n, o in options.items()}
        return _outputs(fun(*args, **kwargs))

    products: dict[str, tuple[float, float]] = {}
    errors: dict[str, float] = {}
    for name, argument in given.items():
        if found.get(name) is None:
            continue
        for path, array, rebuild in _leaves(argument, name):
            bar = {p: b for p, b, _ in _leaves(found[name], name)}.get(path)
            if bar is None:
                raise TypeError(f"the pullback of {fun!r} has no cotangent for {path}")
            v = rng.standard_normal(array.shape)
            along = lambda e: value(name, rebuild(array + e * v))  # noqa: B023, E731 - used at once
            jv = _derivative(along, step, 1e-2 * tolerance)
            left = sum(float(np.vdot(a, b)) for a, b in zip(ybar, jv, strict=True))
            right = float(np.vdot(bar, v))
            size = sum(np.linalg.norm(a) * np.linalg.norm(b) for a, b in zip(ybar, jv, strict=True))
            scale = max(abs(left), abs(right), 1e-2 * float(size))
            products[path] = (left, right)
            errors[path] = abs(left - right) / scale if scale != 0 else 0.0
    if not products:
        raise TypeError(
            f"{fun!r} was given nothing to vary: pass arrays of floating point, mixers, or dicts of them"
        )
    report = AdjointReport(products, errors, tolerance)
    if not report.passed:
        left, right = products[str(report.worst)]
        raise AdjointError(
            f"{getattr(fun, '__qualname__', fun)}: {report.worst}: <ybar, J v> = {left:.15g} but "
            f"<J^T ybar, v> = {right:.15g}, an error of {report.error:.2g} against a tolerance of {tolerance:.2g}",
            report,
        )
    return report


def _as_float64(thing: Any) -> Any:
    """The same structure, its arrays of floating point as NumPy float64, or CuPy float64 if they lie on a GPU."""
    if isinstance(thing, Mixer):
        return thing.like(*(_as_float64(p) for p in thing.params))
    if isinstance(thing, Mapping):
        return {key: _as_float64(value) for key, value in thing.items()}
    if not hasattr(thing, "__dlpack__") and not hasattr(thing, "__cuda_array_interface__"):
        return thing
    host = neighbour(kind_of("primal", thing))
    if host.dtype_name(thing) not in DTYPES:
        return thing
    view = host.take(thing)
    return namespace(view).array(view, np.float64)


def _is_array(thing: Any) -> bool:
    return isinstance(thing, np.ndarray) or is_cupy(thing)


def _beside(array: Any, numbers: NDArray[np.float64]) -> Any:
    """These numbers where the array is."""
    return namespace(array).asarray(numbers) if _is_array(array) else numbers


def _leaves(thing: Any, path: str) -> list[tuple[str, NDArray[np.float64], Callable[[Any], Any]]]:
    """Every float64 array of a structure, on the host: where it is, and how to put another in its place."""
    if _is_array(thing) and thing.dtype == np.float64:
        return [(path, to_numpy(thing), lambda new: _beside(thing, new))]
    if isinstance(thing, Mixer):
        parts: dict[Any, Any] = dict(zip(thing.shapes, thing.params, strict=True))
        return _branches(parts, path, ".{}", lambda new: thing.like(*new.values()))
    if isinstance(thing, Mapping):
        return _branches(dict(thing), path, "[{!r}]", lambda new: new)
    return []


def _branches(
    parts: dict[Any, Any], path: str, style: str, join: Callable[[dict[Any, Any]], Any]
) -> list[tuple[str, NDArray[np.float64], Callable[[Any], Any]]]:
    def put(key: Any, inner: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda new: join(parts | {key: inner(new)})

    return [
        (leaf, array, put(key, inner))
        for key, part in parts.items()
        for leaf, array, inner in _leaves(part, path + style.format(key))
    ]


def _parts(out: Any) -> list[Any]:
    parts = out if isinstance(out, tuple | list) else (out,)
    return [part.value if isinstance(part, Solution) else part for part in parts]


def _outputs(out: Any) -> list[Float]:
    return [np.asarray(to_numpy(p) if is_cupy(p) else p, dtype=np.float64) for p in _parts(out)]


@np.errstate(invalid="ignore", over="ignore")
def _derivative(along: Callable[[float], list[Float]], step: float, enough: float) -> list[Float]:
    """``d along(e) / de`` at zero: central differences at a step and its halves, extrapolated to sixth order.

    Of all estimates the one that is closest to the one before; a long step loses to curvature, a short one to
    rounding. It is good once the two agree to within `enough` of their size.
    """
    if not step > 0:
        raise ValueError(f"step: {step}; expected a positive number")
    best: list[Float] = []
    least, rows = np.inf, []
    for k in range(HALVINGS):
        e = step / 2**k
        plain = [(plus - minus) / (2 * e) for plus, minus in zip(along(e), along(-e), strict=True)]
        rows.append([plain])
        for order in range(min(k, 2)):
            finer, coarser, known = rows[k][order], rows[k - 1][order], 4.0 ** (order + 1)
            rows[k].append([(known * a - b) / (known - 1) for a, b in zip(finer, coarser, strict=True)])
        if k < 2:
            continue
        new, other = rows[k][2], rows[k][1]
        apart = sum(float(np.linalg.norm(a - b)) for a, b in zip(new, other, strict=True))
        size = sum(float(np.linalg.norm(a)) for a in new)
        if not best or np.isnan(least) or apart < least:  # a long step may have left the function's domain
            best, least = new, apart
        if least <= enough * size:
            break
    return best
