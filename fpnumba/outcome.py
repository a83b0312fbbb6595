"""How a solve ended, and what is said about it.

Non-convergence is a status first, one for each sequence; a warning or an error second, by choice.
"""

import sys
import warnings
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpnumba.arrays import Array, Float, Later


class Status(IntEnum):
    """How the solve of one sequence ended.

    Examples
    --------
    >>> import fpnumba as fp
    >>> fp.Status.CONVERGED == 0
    True
    >>> print(fp.Status.NONFINITE_INPUT.message)
    the inputs of the sequence are not finite: look for NaN or inf in them
    """

    CONVERGED = 0
    MAX_ITER = 1
    DIVERGED = 2
    NONFINITE_INPUT = 3
    ILL_CONDITIONED = 4

    @property
    def message(self) -> str:
        """What happened and what to do about it."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "the tolerance was met",
    Status.MAX_ITER: (
        "the tolerance was not met when the iteration stopped: raise max_iter, loosen rtol, damp "
        "(damping=0.5), or solve directly (method='direct', for DPLR and Householder)"
    ),
    Status.DIVERGED: (
        "the iteration left the finite numbers: see where the mixer's contraction_bound() is above one, then "
        "damp (damping=0.5), shrink the mixer, or solve directly (method='direct', for DPLR and Householder)"
    ),
    Status.NONFINITE_INPUT: "the inputs of the sequence are not finite: look for NaN or inf in them",
    Status.ILL_CONDITIONED: (
        "the small system of some step is nearly singular, so digits are lost: keep alpha away from "
        "where gate * alpha is one"
    ),
}


class ConvergenceWarning(UserWarning):
    """Some sequences of a solve did not converge.

    Examples
    --------
    >>> import warnings
    >>> import fpnumba as fp
    >>> warnings.simplefilter("error", fp.ConvergenceWarning)
    """


class ConvergenceError(RuntimeError):
    """Some sequences of a solve did not converge, and the solver was asked to raise.

    Attributes
    ----------
    solution : Solution
        What was found all the same.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> lam, x = np.full((4, 1), 0.5), np.ones((4, 1))
    >>> few = fp.Solver(max_iter=2, on_failure="raise")
    >>> try:
    ...     fp.fixed_point_rnn(lam, fp.mixers.Fixed(np.array([[0.5]])), x, solver=few)
    ... except fp.ConvergenceError as error:
    ...     print(error.solution.iterations)
    2
    """

    def __init__(self, message: str, solution: "Solution") -> None:
        super().__init__(message)
        self.solution = solution


class Solved(NamedTuple):
    """A room's result, or that of `relax`: arrays with the axis of sequences first, on a GPU those of CuPy."""

    value: Float
    iterations: NDArray[np.int64]
    residual: NDArray[np.float64]
    status: NDArray[np.int8]
    chunk_iterations: NDArray[np.int64]


# What a solve has to say of itself
_REPORTED = ("status", "iterations", "residual", "chunk_iterations", "history")


@dataclass(frozen=True, eq=False)
class Solution:
    """A fixed point and how it was found. All but `value` are NumPy arrays with one entry for each sequence,
    in the shape of the leading axes.

    From a GPU each of them is fetched when it is first looked at, and that look waits for the device. A solver that
    is to warn or to raise looks at `status` before the call returns; with ``on_failure="ignore"`` the call waits for
    nothing.

    Attributes
    ----------
    value : array (..., T, D)
        ``h``, in the caller's kind; ``value[..., -1, :]`` is the final state, the ``initial`` of a call that
        goes on.
    status : int8 array (...)
        Codes of `Status`.
    iterations : int64 array (...)
        Applications of the iteration; the most of any chunk.
    residual : float64 array (...)
        ``max|f(h) - h| / max|h|`` at the last iteration (or that of the published criterion); for ``direct``,
        an estimate of the relative rounding error.
    method : str
        The way that was taken.
    chunk_iterations : int64 array (..., n_chunks)
        Iterations of each chunk, in the order of time.
    history : float64 array (iterations, ...) or None
        Residual after each iteration, where the policy of the whole iteration was in hand.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> lam, x = np.full((2, 4, 1), 0.5), np.ones((2, 4, 1))
    >>> solution = fp.fixed_point_rnn(lam, fp.mixers.Fixed(np.array([[0.5]])), x)
    >>> solution.converged
    array([ True,  True])
    >>> solution
    Solution(value: (2, 4, 1) float64, chunked, 2 of 2 converged, iterations <= 14, residual <= 4.8e-07)
    """

    value: Array
    status: NDArray[np.int8]
    iterations: NDArray[np.int64]
    residual: NDArray[np.float64]
    method: str
    chunk_iterations: NDArray[np.int64]
    history: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        waiting = {name: self.__dict__[name] for name in _REPORTED if isinstance(self.__dict__[name], Later)}
        if waiting:
            for name in waiting:
                object.__delattr__(self, name)
            object.__setattr__(self, "_waiting", waiting)

    def __getattr__(self, name: str) -> Any:
        # Asked only for what is not there: not yet, or not at all
        waiting = self.__dict__.get("_waiting", {})
        if name in waiting:
            object.__setattr__(self, name, waiting[name].fetch())
            waiting.pop(name)
        if name not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self.__dict__[name]

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("value", "method", *_REPORTED)}

    def unfetched(self, name: str) -> Any:
        """A field as it lies on a device, or on the host if it is there; nothing waits."""
        waiting = self.__dict__.get("_waiting", {})
        return waiting[name].array if name in waiting else getattr(self, name)

    def reshaped(self, lead: tuple[int, ...]) -> "Solution":
        """The same in the shape of other leading axes; what has not been fetched stays so."""

        def told(name: str, *tail: int) -> Any:
            waiting = self.__dict__.get("_waiting", {})
            if name in waiting:
                return replace(waiting[name], shape=(*lead, *tail))
            return getattr(self, name).reshape((*lead, *tail))

        value, history = self.value, self.history
        chunks = self.__dict__.get("_waiting", {}).get("chunk_iterations", None)
        shape = self.chunk_iterations.shape if chunks is None else chunks.shape
        return Solution(
            value=value.reshape((*lead, *value.shape[1:])),
            status=told("status"),
            iterations=told("iterations"),
            residual=told("residual"),
            method=self.method,
            chunk_iterations=told("chunk_iterations", shape[-1]),
            history=None if history is None else history.reshape((len(history), *lead)),
        )

    @property
    def converged(self) -> NDArray[np.bool_]:
        """Whether each sequence met the tolerance."""
        return np.asarray(self.status == Status.CONVERGED)

    def __repr__(self) -> str:
        said = f"{int(self.converged.sum())} of {self.status.size} converged"
        if self.status.size:
            said += (
                f", iterations <= {int(self.iterations.max())}, residual <= {float(self.residual.max()):.2g}"
            )
        return f"Solution(value: {tuple(self.value.shape)} {self.value.dtype}, {self.method}, {said})"


def report(what: str, solution: Solution, on_failure: str, *, quantile: float | None = None) -> None:
    """Warn or raise about the sequences that did not converge.

    A batch that met the `quantile` it was asked for has not failed, whatever the rest of it did, short of
    turning non-finite.

    Raises
    ------
    ConvergenceError

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba.outcome import ConvergenceError, Solution, report
    >>> one = np.ones(1)
    >>> found = Solution(one, np.array([2], np.int8), one.astype(int), one, "parallel", one.astype(int))
    >>> report("fixed_point_rnn", found, "ignore")
    >>> try:
    ...     report("fixed_point_rnn", found, "raise")
    ... except ConvergenceError as error:
    ...     print(str(error).partition(". ")[0])
    fixed_point_rnn: 1 of 1 sequences did not converge
    """
    if on_failure == "ignore":
        return
    failed = ~solution.converged
    if quantile is not None:
        late = solution.status == Status.MAX_ITER
        if int((failed & late).sum()) <= (1 - quantile) * solution.status.size + 1e-9:
            failed &= ~late
    if not failed.any():
        return
    said = [f"{what}: {int(failed.sum())} of {failed.size} sequences did not converge."]
    for status in Status:
        mine = failed & (solution.status == status)
        if mine.any():
            n, first = int(mine.sum()), [int(i) for i in np.argwhere(mine)[0]]
            where = f", the first at {first[0] if len(first) == 1 else tuple(first)}" if first else ""
            worst = float(np.max(solution.residual[mine]))
            count = int(np.max(solution.iterations[mine]))
            said.append(
                f"{n} {status.name} after {count} iterations (residual {worst:.2g}{where}): {status.message}."
            )
    message = " ".join(said)
    if on_failure == "raise":
        raise ConvergenceError(message, solution)
    warnings.warn(message, ConvergenceWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """The stack level of the first frame outside the package: the warning points at the caller's line."""
    package = str(Path(__file__).parent)
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        level, frame = level + 1, frame.f_back
    return level
