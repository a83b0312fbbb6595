"""Gradients: one registry of hand-derived adjoints.

`vjp` follows JAX's convention. Nothing is traced: each function has its adjoint written down, in the rooms,
from section 6 of docs/mathematics.md.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, TypeAlias

from fpnumba.arrays import Array, Checked, Float
from fpnumba.mamba import MatrixProblem, MatrixSolution, fixed_point_mamba
from fpnumba.mixers import Mixer
from fpnumba.rnn import Problem, fixed_point_rnn
from fpnumba.scan import (
    check_linear_scan,
    check_selective_scan,
    linear_scan,
    selective_arguments,
    selective_scan,
)
from fpnumba.solve import Adjoint, Solution, Solver

Pullback: TypeAlias = Callable[[Any], Any]
Rule: TypeAlias = Callable[..., tuple[Any, Pullback]]


class Cotangents(tuple[Any, ...]):
    """One cotangent for each positional primal, as a tuple; beside it those of options, and the adjoint's
    solution.

    Attributes
    ----------
    options : dict
        Cotangents of the options that are arrays and were given (``initial``, ``gate``, ``D``).
    solution : Solution or None
        How the adjoint fixed point was found, where one was solved.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> lam, x = np.full((2, 1), 0.5), np.ones((2, 1))
    >>> h, pullback = fp.vjp(fp.linear_scan, lam, x, initial=np.array([2.0]))
    >>> bars = pullback(np.ones((2, 1)))
    >>> lam_bar, x_bar = bars
    >>> bars.options["initial"]
    array([0.75])
    """

    options: dict[str, Any]
    solution: Solution | None

    def __new__(
        cls,
        primals: Iterable[Any],
        options: Mapping[str, Any] | None = None,
        solution: Solution | None = None,
    ) -> "Cotangents":
        """Hold the cotangents of `primals`, those of `options`, and the adjoint's `solution`."""
        made = super().__new__(cls, primals)
        made.options = dict(options or {})
        made.solution = solution
        return made


_rules: dict[Any, tuple[str, Rule]] = {}


def _adjoint_of(name: str, *functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    def keep(rule: Rule) -> Rule:
        for function in functions:
            _rules[function] = (name, rule)
        return rule

    return keep


def vjp(fun: Any, /, *primals: Any, **options: Any) -> tuple[Any, Pullback]:
    """Evaluate a function and return its pullback, the map from an output's cotangent to those of its inputs.

    Parameters
    ----------
    fun : callable
        A public function of fpnumba (`linear_scan`, `selective_scan`, `fixed_point_rnn`); a mixer's method,
        bound (``mixer.apply``, constant mixer) or not (``fp.mixers.DPLR.apply``, with the mixer as first
        primal); or any object with a method ``vjp(*primals, **options)``, such as a layer.
    *primals
        Its positional arguments.
    **options
        Its keyword arguments.

    Returns
    -------
    out
        What ``fun(*primals, **options)`` returns.
    pullback : callable
        ``pullback(out_bar)`` returns `Cotangents`: a tuple with one entry for each primal, in its own shape,
        kind and dtype. A mixer's cotangent is a mixer of the same class. For `fixed_point_rnn`, `out_bar` is
        the cotangent of ``solution.value``; for `selective_scan` it is a pair, of which either may be None
        for zero.

    Raises
    ------
    TypeError
        For a function that has no adjoint here; and as the function itself.
    ValueError
        As the function itself; in the pullback, for a cotangent whose shape is not that of the output.

    Notes
    -----
    The pullback holds on to the arrays that it was made from, and to the output, and reads them again: do not
    change them in place in between. It stays in the room of the forward pass and may be called many times.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> h, pullback = fp.vjp(fp.linear_scan, np.full((3, 1), 0.5), np.ones((3, 1)))
    >>> lam_bar, x_bar = pullback(np.ones((3, 1)))
    >>> x_bar[:, 0]
    array([1.75, 1.5 , 1.  ])
    """
    owner = getattr(fun, "__self__", None)
    if isinstance(owner, Mixer) and getattr(fun, "__func__", None) in _rules:
        out, whole = _rules[fun.__func__][1](owner, *primals, **options)

        @wraps(whole)
        def pullback(out_bar: Any) -> Cotangents:
            bars = whole(out_bar)
            return Cotangents(bars[1:], bars.options, bars.solution)

        return out, pullback
    try:
        rule = _rules.get(fun)
    except TypeError:  # not hashable
        rule = None
    if rule is not None:
        return rule[1](*primals, **options)
    own = getattr(fun, "vjp", None)
    if callable(own):
        return own(*primals, **options)  # type: ignore[no-any-return]
    known = ", ".join(dict.fromkeys(name for name, _ in _rules.values()))
    name = getattr(fun, "__qualname__", None) or repr(fun)
    raise TypeError(
        f"argument `fun`: {name} has no adjoint here; "
        f"known are {known}, and any object with a method vjp(*primals, **options)"
    )


# --- the registry -------------------------------------------------------------------------------------------


@_adjoint_of("linear_scan", linear_scan)
def _linear_scan(
    lam: Array, x: Array, /, *, initial: Array | None = None, reverse: bool = False
) -> tuple[Array, Pullback]:
    """Section 1: the same scan, the other way."""
    call = check_linear_scan(lam, x, initial)
    scan = call.room.scan
    lam_, initial_ = call["lam"], call.get("initial")
    h = scan.linear_scan(lam_, call["x"], initial_, reverse=bool(reverse))
    out = call.back(h)

    def pullback(out_bar: Array) -> Cotangents:
        hbar = call.take("out_bar", out_bar, out.shape)
        lam_bar, x_bar, initial_bar = scan.linear_scan_vjp(lam_, h, initial_, bool(reverse), hbar)
        return Cotangents(
            (call.back_to("lam", lam_bar), call.back_to("x", x_bar)), _given(call, initial=initial_bar)
        )

    return out, pullback


@_adjoint_of("selective_scan", selective_scan)
def _selective_scan(
    x: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    /,
    *,
    D: Array | None = None,
    initial: Array | None = None,
) -> tuple[tuple[Array, Array], Pullback]:
    """Section 1; the states are computed again on the way back."""
    call = check_selective_scan(x, delta, A, B, C, D, initial)
    scan = call.room.scan
    arguments = (*selective_arguments(call), call.get("D"), call.get("initial"))
    out = tuple(call.back(part) for part in scan.selective_scan(*arguments))

    def pullback(out_bar: tuple[Array | None, Array | None]) -> Cotangents:
        if not isinstance(out_bar, tuple | list) or len(out_bar) != 2:
            raise TypeError("argument `out_bar`: expected a pair, the cotangents of (y, last_state)")
        bars = (
            call.zeros((call.batch, *part.shape[len(call.lead) :]))
            if bar is None
            else call.take(f"out_bar[{i}]", bar, part.shape)
            for i, (bar, part) in enumerate(zip(out_bar, out, strict=True))
        )
        *found, D_bar, initial_bar = scan.selective_scan_vjp(*arguments, *bars)
        names = ("x", "delta", "A", "B", "C")
        return Cotangents(
            (call.back_to(name, bar) for name, bar in zip(names, found, strict=True)),
            _given(call, D=D_bar, initial=initial_bar),
        )

    return (out[0], out[1]), pullback


@_adjoint_of("fixed_point_rnn", fixed_point_rnn)
def _fixed_point_rnn(
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
) -> tuple[Solution, Pullback]:
    """Section 6: one adjoint solve, then products at the solution. Nothing of the iteration is kept."""
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
    solution, h = problem.solve(solver)
    call = problem.call

    def pullback(out_bar: Array) -> Cotangents:
        hbar = call.take("out_bar", out_bar, solution.value.shape)
        bars, how = problem.pull_back(h, hbar, solver, adjoint)
        lam_bar, gate_bar, x_bar, initial_bar, params_bar = bars
        return Cotangents(
            (
                call.back_to("lam", lam_bar),
                _mixer_bar(call, mixer, params_bar, "mixer."),
                call.back_to("x", x_bar),
            ),
            _given(call, gate=gate_bar, initial=initial_bar),
            how,
        )

    return solution, pullback


@_adjoint_of("fixed_point_mamba", fixed_point_mamba)
def _fixed_point_mamba(
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
) -> tuple[MatrixSolution, Pullback]:
    """Section 6, step by step backward in time; the last state has no cotangent here."""
    given = {"D": D, "gate": gate, "weight": weight, "bias": bias, "initial": initial}
    problem = MatrixProblem.of(
        mixer, x, delta, A, B, C, norm=norm, eps=eps, solver=solver, adjoint=adjoint, **given
    )
    solution, y = problem.solve(solver)
    call = problem.call

    def pullback(out_bar: Array) -> Cotangents:
        bars, how = problem.pull_back(y, call.take("out_bar", out_bar, solution.value.shape), adjoint)
        named = {"x": bars.x, "delta": bars.delta, "A": bars.A, "B": bars.B, "C": bars.C}
        return Cotangents(
            (
                _mixer_bar(call, mixer, bars.params, "mixer."),
                *(call.back_to(name, bar) for name, bar in named.items()),
            ),
            _given(
                call, D=bars.skip, gate=bars.gate, weight=bars.weight, bias=bars.bias, initial=bars.initial
            ),
            how,
        )

    return solution, pullback


@_adjoint_of("Mixer.apply", Mixer.apply)
def _apply(mixer: Mixer, x: Array, /) -> tuple[Array, Pullback]:
    """``x_bar = Q^T y_bar``."""
    call, params = mixer._call("x", x)
    doors, x_ = call.room.mixers, call["x"]
    out = call.back(doors.apply(mixer.kind, params, x_))

    def pullback(out_bar: Array) -> Cotangents:
        ybar = call.take("out_bar", out_bar, out.shape)
        params_bar = doors.cotangent(mixer.kind, params, x_, ybar)
        x_bar = doors.apply_transpose(mixer.kind, params, ybar)
        return Cotangents((_mixer_bar(call, mixer, params_bar), call.back_to("x", x_bar)))

    return out, pullback


@_adjoint_of("Mixer.apply_transpose", Mixer.apply_transpose)
def _apply_transpose(mixer: Mixer, y: Array, /) -> tuple[Array, Pullback]:
    """``<x_bar, Q^T y> = <Q x_bar, y>``: the cotangents of ``apply`` with the two vectors exchanged."""
    call, params = mixer._call("y", y)
    doors, y_ = call.room.mixers, call["y"]
    out = call.back(doors.apply_transpose(mixer.kind, params, y_))

    def pullback(out_bar: Array) -> Cotangents:
        xbar = call.take("out_bar", out_bar, out.shape)
        params_bar = doors.cotangent(mixer.kind, params, xbar, y_)
        y_bar = doors.apply(mixer.kind, params, xbar)
        return Cotangents((_mixer_bar(call, mixer, params_bar), call.back_to("y", y_bar)))

    return out, pullback


@_adjoint_of("Mixer.to_dense", Mixer.to_dense)
def _to_dense(mixer: Mixer, /) -> tuple[Array, Pullback]:
    """Column ``j`` of ``Q`` is ``Q e_j``: the sum of the cotangents of these products."""
    call, dense = mixer._dense()
    params = tuple(call[name] for name in mixer.shapes)
    doors, out = call.room.mixers, mixer._back(call, dense)
    # One matrix that serves all steps is applied to one step of one sequence.
    steps = (call.batch, mixer.steps) if mixer.steps is not None else (1, 1)

    def pullback(out_bar: Array) -> Cotangents:
        bar = call.take("out_bar", out_bar, out.shape).reshape(*steps, *dense.shape[-2:])
        xp = call.room.xp
        with call.room.current():
            params_bar = [xp.zeros(p.shape, call.compute) for p in params]
            for j, unit in enumerate(xp.eye(dense.shape[-1], dtype=call.compute).astype(dense.dtype)):
                x = xp.ascontiguousarray(xp.broadcast_to(unit, (*steps, len(unit))))
                column = xp.ascontiguousarray(bar[..., j])
                for total, part in zip(
                    params_bar, doors.cotangent(mixer.kind, params, x, column), strict=True
                ):
                    total += part
        return Cotangents((_mixer_bar(call, mixer, params_bar),))

    return out, pullback


def _mixer_bar(call: Checked, mixer: Mixer, params_bar: Iterable[Float], prefix: str = "") -> Mixer:
    names = mixer.arguments(prefix)
    return mixer.like(*(call.back_to(name, bar) for name, bar in zip(names, params_bar, strict=True)))


def _given(call: Checked, **cotangents: Float | None) -> dict[str, Array]:
    """The cotangents of those options that were given."""
    return {
        name: call.back_to(name, bar) for name, bar in cotangents.items() if name in call and bar is not None
    }
