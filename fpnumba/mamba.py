"""The fixed point with the matrix state of Mamba: section 5 of docs/mathematics.md."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fpnumba.arrays import Array, Checked, Float, check
from fpnumba.mixers import DPLR, Householder, Mixer
from fpnumba.outcome import Solution, report
from fpnumba.reference.mamba import Bars, Norm, System
from fpnumba.solve import Adjoint, Solver

NORMS = ("layer", "rms", None)


@dataclass(frozen=True, eq=False, repr=False)
class MatrixSolution(Solution):
    """What `fixed_point_mamba` returns: a `Solution` whose value is ``y``, and the state after the last step.

    Attributes
    ----------
    last_state : array (..., D, N)
        The ``initial`` of a call that goes on.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> ones = np.ones((3, 2))
    >>> same = fp.mixers.Fixed(np.eye(2))
    >>> fp.fixed_point_mamba(same, ones, ones, -ones[:2], ones, ones, norm=None).last_state.shape
    (2, 2)
    """

    last_state: Array = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "last_state": self.last_state}


def fixed_point_mamba(
    mixer: Mixer,
    x: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    /,
    *,
    D: Array | None = None,
    gate: Array | None = None,
    norm: str | None = "layer",
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    initial: Array | None = None,
    solver: Solver = Solver(),  # noqa: B008 - frozen
    adjoint: Adjoint = Adjoint(),  # noqa: B008 - frozen
) -> MatrixSolution:
    """Find the outputs of FP-Mamba as a fixed point, for parameters that are given.

    ``u_t = Q_t (x_t - y_t) + y_t``, ``H_t = exp(delta_t A) * H_{t-1} + (delta_t u_t) B_t^T`` and
    ``y_t = norm(gate_t * (H_t C_t + D * u_t))``, solved for all ``y_t`` step by step. Parameters that depend on ``y``
    are the business of `fpnumba.nn.FPMamba`.

    Parameters
    ----------
    mixer : Mixer
        ``Q_t``, from `fpnumba.mixers`, for T steps and D channels.
    x : array (..., T, D)
        Input.
    delta : array (..., T, D) or (..., T, H)
        Step sizes, positive: one for each channel (Mamba), or for each of H heads (Mamba-2).
    A : array (D, N) or (H,)
        Decay rates, negative; one axis says that the form of Mamba-2 is meant.
    B, C : array (..., T, N)
        Input and output vectors.
    D : array (D,), optional
        Skip connection.
    gate : array (..., T, D), optional
        Multiplies what the norm sees.
    norm : {"layer", "rms", None}
        LayerNorm, RMSNorm, or none.
    weight, bias : array (D,), optional
        Of the norm; a bias belongs to "layer".
    eps : float
        Of the norm.
    initial : array (..., D, N), optional
        State before the first step. Zero by default.
    solver : Solver
        Tolerances, `max_iter` and `damping` of a step. Its method is "auto" or "sequential", or "direct" for `DPLR` and
        `Householder`, which is the same: a step of theirs is an iteration on as many numbers as the rank.
    adjoint : Adjoint
        How `vjp` finds the gradient; of no effect here.

    Returns
    -------
    MatrixSolution
        Its `value` is ``y``, an array (..., T, D) of the kind and dtype of the arguments.

    Raises
    ------
    TypeError
        For lists and numbers, for arrays of different kinds or dtypes or on different devices, and for dtypes that
        are not floating point.
    ValueError
        For shapes that do not match, and for options that this function does not have.
    ConvergenceError
        If the solver was asked to raise.

    Warns
    -----
    ConvergenceWarning
        If some sequence did not converge, unless the solver was asked otherwise.

    Notes
    -----
    (M) of section 5 of docs/mathematics.md; arXiv 2503.10799. A step may have several fixed points; what is
    found is the one that its iteration reaches from ``y = 0``.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> rng = np.random.default_rng(0)
    >>> x, (B, C) = rng.normal(size=(2, 8, 4)), rng.normal(size=(2, 2, 8, 3))
    >>> u = rng.normal(size=(2, 8, 1, 4))
    >>> mixer = fp.mixers.Householder(u / np.linalg.norm(u, axis=-1, keepdims=True), np.full((2, 8, 1), 0.4))
    >>> solution = fp.fixed_point_mamba(mixer, x, np.full((2, 8, 4), 0.1), -np.ones((4, 3)), B, C, D=np.ones(4))
    >>> solution.value.shape, solution.last_state.shape, solution.converged.all()
    ((2, 8, 4), (2, 4, 3), np.True_)
    """
    given = {"D": D, "gate": gate, "weight": weight, "bias": bias, "initial": initial}
    problem = MatrixProblem.of(
        mixer, x, delta, A, B, C, norm=norm, eps=eps, solver=solver, adjoint=adjoint, **given
    )
    return problem.solve(solver)[0]


@dataclass(frozen=True)
class MatrixProblem:
    """(M) as a room takes it, from checked arguments."""

    call: Checked
    doors: Any
    mixer: Mixer
    system: System
    initial: Float | None

    @classmethod
    def of(
        cls,
        mixer: Mixer,
        x: Array,
        delta: Array,
        A: Array,
        B: Array,
        C: Array,
        *,
        norm: str | None,
        eps: float,
        solver: Solver,
        adjoint: Adjoint,
        **given: Array | None,
    ) -> "MatrixProblem":
        """Check the arguments of `fixed_point_mamba`."""
        for argument, value, wanted in (
            ("mixer", mixer, Mixer),
            ("solver", solver, Solver),
            ("adjoint", adjoint, Adjoint),
        ):
            if not isinstance(value, wanted):
                raise TypeError(
                    f"argument `{argument}`: got {type(value).__name__}, expected a {wanted.__name__}"
                )
        if norm not in NORMS:
            raise ValueError(f"argument `norm`: got {norm!r}, expected 'layer', 'rms' or None")
        if (norm is None and given["weight"] is not None) or (norm != "layer" and given["bias"] is not None):
            raise ValueError(f"arguments `weight` and `bias`: norm={norm!r} does not have both")
        heads = getattr(A, "ndim", 2) == 1
        shapes = {"D": "D", "gate": "... T D", "weight": "D", "bias": "D", "initial": "... D N"}
        call = check(
            {
                "x": (x, "... T D"),
                "A": (A, "H" if heads else "D N"),
                "delta": (delta, "... T H" if heads else "... T D"),
                "B": (B, "... T N"),
                "C": (C, "... T N"),
            }
            | {name: (given[name], shape) for name, shape in shapes.items()}
            | mixer.arguments()
        )
        mixer.suits(call.sizes)
        if heads and (call.sizes["H"] == 0 or call.sizes["D"] % call.sizes["H"]):
            raise ValueError(
                f"argument `A`: got {call.sizes['H']} heads, which do not divide {call.sizes['D']} channels"
            )
        low_rank = isinstance(mixer, DPLR | Householder)
        if solver.policies() or solver.method not in (
            "auto",
            "sequential",
            *(("direct",) if low_rank else ()),
        ):
            raise ValueError(
                f"argument `solver`: got method {solver.method!r} (or a policy of the whole iteration), expected "
                "'auto' or 'sequential', or 'direct' with a DPLR or Householder mixer"
            )
        xp, dim, compute = call.room.xp, call.sizes["D"], call.compute
        with call.room.current():

            def wide(name: str) -> Any:
                """In the dtype of the computation: several kernels share the work on a device."""
                array = call.get(name)
                return None if array is None else array.astype(compute, copy=False)

            skip, norm_weight, norm_bias = wide("D"), wide("weight"), wide("bias")
            whole = None
            if norm is not None:
                norm_weight = xp.ones(dim, compute) if norm_weight is None else norm_weight
                whole = Norm(norm_weight, norm_bias, float(eps), norm == "layer")
            x, delta, A, B, C = (wide(name) for name in ("x", "delta", "A", "B", "C"))
            skip = xp.zeros(dim, compute) if skip is None else skip
            params = tuple(wide(name) for name in mixer.arguments())
            system = System(mixer.kind, params, x, delta, A, B, C, skip, wide("gate"), whole)
            initial = wide("initial")
        return cls(call, call.room.mamba, mixer, system, initial)

    def solve(self, solver: Solver) -> tuple[MatrixSolution, Float]:
        """Solve (M), say so if that failed, and return the solution and the room's own ``y``."""
        share = 0.5 / max(self.system.x.shape[1], 1)
        solved = self.doors.solve(
            self.system,
            self.initial,
            rtol=solver.rtol * share,
            atol=solver.atol * share,
            max_iter=solver.max_iter,
            damping=solver.damping,
        )
        told = self._told(solved.status, solved.iterations, solved.residual)
        last = self.call.back(solved.last_state)
        solution = MatrixSolution(
            value=self.call.back(solved.value), method="sequential", last_state=last, **told
        )
        report("fixed_point_mamba", solution, solver.on_failure)
        return solution, solved.value

    def _told(self, status: Any, iterations: Any, residual: Any) -> dict[str, Any]:
        """What is said of a solve; from a device when it is looked at."""
        lead = self.call.lead
        with self.call.room.current():
            told: dict[str, Any] = self.call.room.for_the_host(
                status=(status, lead),
                iterations=(iterations, lead),
                residual=(residual, lead),
                chunk_iterations=(iterations, (*lead, 1)),
            )
        return told

    def pull_back(self, y: Float, y_bar: Float, adjoint: Adjoint) -> tuple[Bars, Solution | None]:
        """The cotangents that the room finds for `y_bar` at the solution `y`, and how (None but for the exact ones)."""
        with self.call.room.current():
            y_bar = y_bar.astype(self.call.compute, copy=False)
            if adjoint.method != "implicit":
                z = term = y_bar
                for _ in range(adjoint.terms or 0):
                    term = self.doors.application_vjp(self.system, self.initial, y, term).y
                    z = z + term
                return self.doors.application_vjp(self.system, self.initial, y, z), None
        share = 0.5 / max(y.shape[1], 1)
        bars, status = self.doors.pullback(
            self.system, self.initial, y, y_bar, None, rtol=adjoint.rtol * share, max_iter=adjoint.max_iter
        )
        xp = self.call.room.xp
        with self.call.room.current():
            told = self._told(status, xp.ones(len(y), np.int64), xp.zeros(len(y)))
        solution = Solution(value=self.call.back(bars.y), method="sequential", **told)
        report("the adjoint of fixed_point_mamba", solution, adjoint.on_failure)
        return bars, solution
