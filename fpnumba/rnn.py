"""The fixed-point RNN with a vector state: sections 3 and 6 of docs/mathematics.md."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.arrays import Array, Checked, Float, Room, check, declared_range, namespace
from fpnumba.mixers import DPLR, Householder, Mixer
from fpnumba.outcome import Solution, Solved, Status, report
from fpnumba.relax import largest, relax
from fpnumba.solve import Adjoint, Solver


def fixed_point_rnn(
    lam: Array,
    mixer: Mixer,
    x: Array,
    /,
    *,
    gate: Array | None = None,
    initial: Array | None = None,
    guess: Array | None = None,
    lam_bound: float | None = None,
    solver: Solver = Solver(),  # noqa: B008 - frozen
    adjoint: Adjoint = Adjoint(),  # noqa: B008 - frozen
) -> Solution:
    """Find the states of a dense linear RNN as the fixed point of a diagonal one with channel mixing.

    ``h_t = lam_t * h_{t-1} + gate_t * (Q_t x_t + (I - Q_t) h_t)``, solved for all ``h_t``: at the fixed
    point, ``h_t = A_t h_{t-1} + ...`` with the dense ``A_t = (I - diag(gate_t) P_t)^{-1} diag(lam_t)`` and
    ``P_t = I - Q_t``.

    Parameters
    ----------
    lam : array (..., T, D)
        Decay of each step and channel.
    mixer : Mixer
        ``Q_t``, from `fpnumba.mixers`, for T steps and D channels.
    x : array (..., T, D)
        Input.
    gate : array (..., T, D), optional
        Input gate; ``1 - lam`` by default, which needs no memory of its own.
    initial : array (..., D), optional
        State before the first step. Zero by default. The state after the last is ``solution.value[..., -1,
        :]``.
    guess : array (..., T, D), optional
        Where the iteration starts; zero by default. From the solution itself it takes one iteration, the
        check. The direct way has no use for it.
    lam_bound : float, optional
        Declares `lam` to be in [-lam_bound, lam_bound] and holds it to that, for one more read of `lam` (which waits
        for a GPU).
    solver : Solver
        How to find the fixed point.
    adjoint : Adjoint
        How `vjp` finds the gradient; of no effect here.

    Returns
    -------
    Solution
        Its `value` is ``h``, an array (..., T, D) of the kind and dtype of the arguments.

    Raises
    ------
    TypeError
        For lists and numbers, for arrays of different kinds or dtypes or on different devices, and for dtypes that
        are not floating point.
    ValueError
        For shapes that do not match, `lam` outside its bound, or a direct solve of a mixer that has none.
    ConvergenceError
        If the solver was asked to raise.

    Warns
    -----
    ConvergenceWarning
        If some sequence did not converge, unless the solver was asked otherwise.

    Notes
    -----
    Equation (F) of section 3 of docs/mathematics.md; arXiv 2503.10799. Theorem 3.1 there: with the default
    gate, ``|lam| < 1`` and `Mixer.contraction_bound` below one, the iteration converges from anywhere.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> rng = np.random.default_rng(0)
    >>> lam, x = rng.uniform(0.5, 1.0, (2, 8, 4)), rng.normal(size=(2, 8, 4))
    >>> u = rng.normal(size=(2, 8, 1, 4))
    >>> mixer = fp.mixers.Householder(u / np.linalg.norm(u, axis=-1, keepdims=True), np.full((2, 8, 1), 0.9))
    >>> solution = fp.fixed_point_rnn(lam, mixer, x)
    >>> h = solution.value
    >>> before = np.concatenate([np.zeros((2, 1, 4)), h[:, :-1]], axis=1)
    >>> np.allclose(h, lam * before + (1 - lam) * (mixer.apply(x - h) + h))
    True
    """
    problem = Problem.of(
        lam,
        mixer,
        x,
        gate=gate,
        initial=initial,
        guess=guess,
        lam_bound=lam_bound,
        solver=solver,
        adjoint=adjoint,
    )
    solution, _ = problem.solve(solver)
    return solution


@dataclass(frozen=True)
class Problem:
    """(F) as a room takes it, from checked arguments."""

    call: Checked
    room: Room
    mixer: Mixer
    params: tuple[Float, ...]
    lam: Float
    gate: Float | None
    x: Float
    initial: Float | None
    guess: Float | None

    @classmethod
    def of(
        cls,
        lam: Array,
        mixer: Mixer,
        x: Array,
        *,
        gate: Array | None,
        initial: Array | None,
        guess: Array | None,
        lam_bound: float | None,
        solver: Solver,
        adjoint: Adjoint,
    ) -> "Problem":
        """Check the arguments of `fixed_point_rnn`."""
        for argument, value, wanted in (
            ("mixer", mixer, Mixer),
            ("solver", solver, Solver),
            ("adjoint", adjoint, Adjoint),
        ):
            if not isinstance(value, wanted):
                raise TypeError(
                    f"argument `{argument}`: got {type(value).__name__}, expected a {wanted.__name__}"
                )
        call = check(
            {
                "x": (x, "... T D"),
                "lam": (lam, "... T D"),
                "gate": (gate, "... T D"),
                "initial": (initial, "... D"),
                "guess": (guess, "... T D"),
            }
            | mixer.arguments()
        )
        mixer.suits(call.sizes)
        if lam_bound is not None:
            bound = float(lam_bound)
            with call.room.current():
                declared_range("lam", call.view("lam"), -bound, bound, f"lam_bound={bound}")
        params = tuple(call[name] for name in mixer.arguments())
        arrays = (call["lam"], call.get("gate"), call["x"], call.get("initial"), call.get("guess"))
        return cls(call, call.room, mixer, params, *arrays)

    @property
    def rank(self) -> int | None:
        """Rank of a low-rank mixer; None for the others."""
        return self.mixer.rank if isinstance(self.mixer, DPLR | Householder) else None

    def solve(self, solver: Solver) -> tuple[Solution, Float]:
        """Solve (F), say so if that failed, and return the solution and the room's own ``h``."""
        way = solver.way(self.rank)
        if solver.policies():
            solution, h = self.wide()._relaxed(solver, way)
        else:
            arguments = (*self._system, self.x, self.initial, self.guess)
            solved = self.room.solve.solve(*arguments, **_options(solver, solver, way))
            solution, h = self._solution(solved, way, None), solved.value
        report("fixed_point_rnn", solution, solver.on_failure, quantile=solver.quantile)
        return solution, h

    def _relaxed(self, solver: Solver, way: str) -> tuple[Solution, Float]:
        """Solve with the iteration in hand."""
        doors = self.room.solve
        with self.room.current():
            start = namespace(self.x).zeros_like(self.x) if self.guess is None else self.guess
            solved, history = relax(
                lambda h: doors.iterate(*self._system, self.x, self.initial, h),
                start,
                solver,
                self.finite_inputs,
            )
            h = solved.value.astype(self.call.carried, copy=False)
        return self._solution(solved, way, history), h

    @property
    def _system(self) -> tuple[Any, tuple[Float, ...], Float, Float | None]:
        return self.mixer.kind, self.params, self.lam, self.gate

    def wide(self) -> "Problem":
        """The same in the dtype of the computation: for what takes several rounds through the doors of a room, so that
        small storage does not round what is carried between them."""

        def widen(a: Any) -> Any:
            return None if a is None else a.astype(self.call.compute, copy=False)

        if self.call.carried == self.call.compute:
            return self
        with self.room.current():
            arrays = {name: widen(getattr(self, name)) for name in ("lam", "gate", "x", "initial", "guess")}
            return replace(self, params=tuple(widen(p) for p in self.params), **arrays)

    def pull_back(
        self, h: Float, hbar: Float, solver: Solver, adjoint: Adjoint
    ) -> tuple[Any, Solution | None]:
        """The cotangents that the room finds for `hbar` at the solution `h`, and how (None for one step)."""
        if adjoint.method != "implicit":
            return self.wide()._series(h, hbar, adjoint)
        way = solver.adjoint_way(self.rank)
        solved, bars = self.room.solve.rnn_pullback(
            *self._system, self.x, self.initial, h, hbar, None, **_options(solver, adjoint, way)
        )
        solution = self._solution(solved, way, None)
        report("the adjoint of fixed_point_rnn", solution, adjoint.on_failure)
        return bars, solution

    def _series(self, h: Float, hbar: Float, adjoint: Adjoint) -> tuple[Any, Solution | None]:
        """Some terms of the series of the adjoint, and its gradient."""
        doors = self.room.solve
        with self.room.current():
            h, hbar = (a.astype(self.call.compute, copy=False) for a in (h, hbar))
            s = namespace(hbar).zeros_like(hbar)
            for _ in range(1 if adjoint.terms is None else adjoint.terms + 1):
                before, s = s, doors.iterate_adjoint(*self._system, hbar, s)
            bars = doors.rnn_cotangents(*self._system, self.x, self.initial, h, s)
            if adjoint.terms is None:
                return bars, None
            solved = _truncated(before, s, adjoint)
        return bars, self._solution(solved, "neumann", None)

    def finite_inputs(self, b: int) -> bool:
        """Whether the inputs of sequence `b` are finite."""
        xp = namespace(self.x)
        batched = [a for a in (self.lam, self.gate, self.x, self.initial, self.guess) if a is not None]
        whole = self.mixer.steps is None  # one matrix for all sequences
        return all(bool(xp.isfinite(a[b]).all()) for a in batched) and all(
            bool(xp.isfinite(p if whole else p[b]).all()) for p in self.params
        )

    def _solution(self, solved: Any, way: str, history: NDArray[np.float64] | None) -> Solution:
        lead, chunks = self.call.lead, solved.chunk_iterations.shape[1:]
        with self.room.current():
            told: dict[str, Any] = self.room.for_the_host(
                status=(solved.status, lead),
                iterations=(solved.iterations, lead),
                residual=(solved.residual, lead),
                chunk_iterations=(solved.chunk_iterations, lead + chunks),
            )
            if history is not None:
                history = history.reshape((len(history), *lead))
            return Solution(value=self.call.back(solved.value), method=way, history=history, **told)


def _options(solver: Solver, tolerance: Solver | Adjoint, way: str) -> dict[str, Any]:
    return {
        "method": way,
        "chunk": solver.chunk,
        "rtol": tolerance.rtol,
        "atol": tolerance.atol,
        "max_iter": tolerance.max_iter,
        "damping": solver.damping,
    }


def _truncated(before: Float, s: Float, adjoint: Adjoint) -> Solved:
    """What a truncated series has to say of itself: the size of its last term against the tolerance."""
    xp = namespace(s)
    change = largest(s - before, (1, 2)).astype(np.float64)
    size = largest(s, (1, 2)).astype(np.float64)
    converged = change <= adjoint.atol + adjoint.rtol * size
    status = xp.where(converged, int(Status.CONVERGED), int(Status.MAX_ITER))
    status = xp.where(xp.isfinite(change), status, int(Status.DIVERGED)).astype(np.int8)
    assert adjoint.terms is not None
    counts = xp.full(len(s), adjoint.terms + 1, np.int64)
    residual = change / xp.maximum(size, float(np.finfo(s.dtype).tiny))
    return Solved(s, counts, residual, status, counts[:, None].copy())
