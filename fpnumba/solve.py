"""How a fixed point is found: policy only; section 7 of docs/mathematics.md.

The iterations themselves are the rooms'. What is decided here: which of the four ways is taken, when to stop,
by how much to damp, whether to accelerate.
"""

import numbers
import sys
from dataclasses import KW_ONLY, dataclass

from fpnumba.outcome import ConvergenceError, ConvergenceWarning, Solution, Solved, Status, report

__all__ = [
    "Adjoint",
    "ConvergenceError",
    "ConvergenceWarning",
    "Solution",
    "Solved",
    "Solver",
    "Status",
    "report",
]

METHODS = ("auto", "parallel", "chunked", "sequential", "direct")
ADJOINTS = ("implicit", "one-step", "neumann")
FAILURES = ("warn", "raise", "ignore")

# Up to this rank a step of the direct way costs no more than the iterations it replaces. Measured on one core, 64 and
# 512 channels, to rtol 1e-6: at rank 1 to 4 it is the faster by up to 2.5, at rank 8 they are level, at rank 32 the
# iterations are the faster by 1.3 to 5.
DIRECT_RANK = 8
# With fewer iterations than this, their number is part of the model rather than a safety net.
FEW_ITERATIONS = 64


def _one_of(argument: str, value: object, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"argument `{argument}`: got {value!r}, expected one of {', '.join(map(repr, choices))}"
        )


def _real(
    argument: str, value: object, low: float, high: float, wanted: str, *, low_open: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"argument `{argument}`: got {value!r}, expected {wanted}")
    above = float(value) > low if low_open else float(value) >= low
    if not (above and float(value) <= high):
        raise ValueError(f"argument `{argument}`: got {value!r}, expected {wanted}")


def _count(argument: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"argument `{argument}`: got {value!r}, expected a whole number")
    if value < least:
        raise ValueError(f"argument `{argument}`: got {value!r}, expected at least {least}")


def _tolerances(rtol: object, atol: object, max_iter: object, on_failure: object) -> None:
    _real("rtol", rtol, 0.0, sys.float_info.max, "a number of at least 0")
    _real("atol", atol, 0.0, sys.float_info.max, "a number of at least 0")
    _count("max_iter", max_iter)
    _one_of("on_failure", on_failure, FAILURES)


@dataclass(frozen=True)
class Solver:
    """How to find the fixed point.

    Parameters
    ----------
    method : {"auto", "parallel", "chunked", "sequential", "direct"}
        The four ways of section 3 of docs/mathematics.md. ``auto`` takes the first line that applies:

        1. ``chunked`` where `chunk` is given;
        2. ``parallel`` where a policy of the whole iteration is asked for (`quantile`, `acceleration`,
        `damping_decay`,
           the published `criterion`), and where `max_iter` is below 64: so few iterations are part of the
           model;
        3. ``direct`` for `DPLR` and `Householder` up to rank 8;
        4. ``chunked``, with the room's own choice of chunk.

        A layer of `fpnumba.nn` whose parameters see the hidden state goes ``sequential`` in the place of 3 and 4. On a
        GPU `FPMamba` makes a few iterations of all steps first, where by a measured rule for batch and length those
        could be cheaper, and goes on with them if their residuals say so; not where the exact gradient follows.
    rtol, atol : float
        A sequence has converged when ``max|f(h) - h| <= atol + rtol * max|h|``, the maxima over its time and
        channels (and where the change is a few units of rounding). ``direct`` has no tolerance.
        Rounding limits what can be asked: where ``h`` is the small rest of larger numbers, the change ends in
        a cycle of more than these few units, and the sequence is reported as not converged. In float64 5e-14
        is met nearly always, 1e-15 is not.
    max_iter : int
        Most iterations, of each chunk where there are chunks.
    chunk : int, optional
        Steps of a chunk.
    damping : float
        Step size, in (0, 1]: ``h <- (1 - damping) h + damping f(h)``.
    damping_decay : float
        Factor on a sequence's step size after `damping_patience` iterations without a new lowest residual.
    damping_patience : int
    quantile : float, optional
        Stop the whole batch as soon as this share of its sequences has converged; sequences that turn
        non-finite do not count. How long a sequence is iterated then depends on its batch. The published
        training uses 0.75.
    acceleration : {None, "anderson"}
        Anderson acceleration, for each sequence on its own, restarted where it does harm. It mixes iterates
        of the whole sequence, so the iterates are not causal, and the fixed point is so only to the
        tolerance.
    memory : int
        Iterates that the acceleration looks back on; it stores twice as many arrays of the size of ``h``.
    criterion : {"max", "published"}
        ``published`` is the stopping rule of the published implementation: the residual is the largest over
        time of ``max|f(h_t) - h_t| / (max|f(h_t)| + 1e-8)``, the lowest so far counts, the batch is iterated
        together until the `quantile` (default: the maximum) of it is below `rtol`, or every step size is
        below 1e-3.
    on_failure : {"warn", "raise", "ignore"}
        What to do about sequences that did not converge; their status says so in any case. On a GPU, ``warn`` and
        ``raise`` wait for the solve, once, at its end; ``ignore`` waits for nothing.

    Raises
    ------
    ValueError, TypeError
        For options out of range, and for options that the chosen method cannot honour.

    Notes
    -----
    Policies of the whole iteration (those of rule 2) are decided on the host: on a GPU, each of their iterations
    waits for the residuals. What is stored in float16 or bfloat16 is iterated in float32 there as everywhere.

    Examples
    --------
    >>> import fpnumba as fp
    >>> fp.Solver("parallel", max_iter=8, quantile=0.75).damping
    1.0
    >>> fp.Solver("direct", quantile=0.75)
    Traceback (most recent call last):
        ...
    ValueError: argument `quantile`: needs method 'parallel' (or 'auto'), got method='direct'
    """

    method: str = "auto"
    _: KW_ONLY
    rtol: float = 1e-6
    atol: float = 0.0
    max_iter: int = 1000
    chunk: int | None = None
    damping: float = 1.0
    damping_decay: float = 1.0
    damping_patience: int = 15
    quantile: float | None = None
    acceleration: str | None = None
    memory: int = 5
    criterion: str = "max"
    on_failure: str = "warn"

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _tolerances(self.rtol, self.atol, self.max_iter, self.on_failure)
        _real("damping", self.damping, 0.0, 1.0, "a number in (0, 1]", low_open=True)
        _real("damping_decay", self.damping_decay, 0.0, 1.0, "a number in (0, 1]", low_open=True)
        _count("damping_patience", self.damping_patience)
        _count("memory", self.memory)
        _one_of("acceleration", self.acceleration, (None, "anderson"))
        _one_of("criterion", self.criterion, ("max", "published"))
        if self.quantile is not None:
            _real("quantile", self.quantile, 0.0, 1.0, "a number in (0, 1]", low_open=True)
        if self.chunk is not None:
            _count("chunk", self.chunk)
            if self.method not in ("auto", "chunked"):
                raise ValueError(
                    f"argument `chunk`: needs method 'chunked' (or 'auto'), got method={self.method!r}"
                )
        for option in self.policies():
            if self.method not in ("auto", "parallel") or self.chunk is not None:
                method = self.method if self.chunk is None else "chunked"
                raise ValueError(
                    f"argument `{option}`: needs method 'parallel' (or 'auto'), got method={method!r}"
                )

    def policies(self) -> tuple[str, ...]:
        """The options in use that need the whole iteration in hand.

        Examples
        --------
        >>> import fpnumba as fp
        >>> fp.Solver(acceleration="anderson").policies()
        ('acceleration',)
        """
        used = {
            "quantile": self.quantile is not None,
            "acceleration": self.acceleration is not None,
            "damping_decay": self.damping_decay != 1.0,
            "criterion": self.criterion != "max",
        }
        return tuple(option for option, on in used.items() if on)

    def way(self, rank: int | None) -> str:
        """The method that a solve takes, by the rules above.

        Parameters
        ----------
        rank : int or None
            Rank of a low-rank mixer; None for the others.

        Examples
        --------
        >>> import fpnumba as fp
        >>> fp.Solver().way(rank=1), fp.Solver().way(rank=None), fp.Solver(max_iter=4).way(rank=1)
        ('direct', 'chunked', 'parallel')
        """
        if self.method != "auto":
            return self.method
        if self.chunk is not None:
            return "chunked"
        if self.policies() or self.max_iter < FEW_ITERATIONS:
            return "parallel"
        return _exact_way(rank)

    def adjoint_way(self, rank: int | None) -> str:
        """The method that the adjoint solve takes: the one of the forward solve, or, where ``auto`` was asked
        to iterate in parallel, the one it would have taken otherwise.

        Examples
        --------
        >>> import fpnumba as fp
        >>> fp.Solver(max_iter=4).adjoint_way(rank=1), fp.Solver("sequential").adjoint_way(rank=1)
        ('direct', 'sequential')
        """
        if self.method != "auto":
            return self.method
        return "chunked" if self.chunk is not None else _exact_way(rank)


def _exact_way(rank: int | None) -> str:
    return "direct" if rank is not None and rank <= DIRECT_RANK else "chunked"


@dataclass(frozen=True)
class Adjoint:
    """How to find the gradient; section 6 of docs/mathematics.md.

    Parameters
    ----------
    method : {"implicit", "one-step", "neumann"}
        ``implicit`` solves the adjoint fixed point, by the way of the forward solve and with its damping and
        chunk: the exact gradient at a fixed point. ``one-step`` is the gradient through one more iteration
        (Theorem 3.2 of arXiv 2503.10799 says when that is a descent direction). ``neumann`` adds `terms` more
        terms of the series.
    terms : int, optional
        For ``neumann``, where it is needed.
    rtol, atol, max_iter
        As in `Solver`, for the adjoint solve.
    on_failure : {"warn", "raise", "ignore"}
        What to do about sequences whose adjoint solve did not converge.

    Raises
    ------
    ValueError, TypeError
        For options out of range.

    Examples
    --------
    >>> import fpnumba as fp
    >>> fp.Adjoint("neumann", terms=3).terms
    3
    >>> fp.Adjoint("neumann")
    Traceback (most recent call last):
        ...
    ValueError: argument `terms`: method 'neumann' needs a number of terms
    """

    method: str = "implicit"
    _: KW_ONLY
    terms: int | None = None
    rtol: float = 1e-6
    atol: float = 0.0
    max_iter: int = 1000
    on_failure: str = "warn"

    def __post_init__(self) -> None:
        _one_of("method", self.method, ADJOINTS)
        _tolerances(self.rtol, self.atol, self.max_iter, self.on_failure)
        if self.terms is not None:
            _count("terms", self.terms)
            if self.method != "neumann":
                raise ValueError(f"argument `terms`: is for method 'neumann', got method={self.method!r}")
        elif self.method == "neumann":
            raise ValueError("argument `terms`: method 'neumann' needs a number of terms")
