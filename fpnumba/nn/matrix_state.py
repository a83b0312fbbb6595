"""The recurrence inside :class:`fpnumba.nn.FPMamba`: (M) of section 5 of docs/mathematics.md with parameters that
may see the hidden state.

For each of "mixer", "b", "c" and "lambda", an argument that is linear in the step before,

    p_t = F x_t + V y_{t-1}                             (the second term where it may see y)

and from it the mixer ``Q_t``, ``b_t`` and ``c_t`` (normalised), and ``delta_t = softplus(W p_t + bias)``. Given
those, (M) is what :mod:`fpnumba.reference.mamba` solves. :class:`MatrixCell` has what
:class:`fpnumba.nn.recurrence.Cell` has, so that :mod:`fpnumba.nn.ways` serves both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.arrays import namespace, to_numpy
from fpnumba.nn import backend, matrix_device, mixing
from fpnumba.nn.backend import column_sums, contiguous, product
from fpnumba.nn.basic import rows
from fpnumba.nn.mixer_maps import MixerMap
from fpnumba.nn.mixing import Mixer
from fpnumba.nn.projections import Weights
from fpnumba.reference import mamba as plain
from fpnumba.reference import products
from fpnumba.reference.mamba import Bars as SystemBars
from fpnumba.reference.mamba import Norm, System
from fpnumba.solve import Solver, Status

Array = NDArray[Any]

# In the order in which the rows of all V stand in one matrix.
SEGMENTS = ("mixer", "b", "c", "lambda")

# Steps that are made at once where the states between them are needed.
SPAN = 16
# Bytes of them on a device, where many steps are looked at together.
STATE_BYTES = 2**28


@dataclass
class Steps:
    """From arguments to ``delta``: ``softplus(W p + bias)``, ``weight`` None for the identity."""

    weight: Array | None
    bias: Array

    def delta(self, argument: Array, out: Array | None = None) -> Array:
        """``delta (..., D)`` or ``(..., H)``, into `out` if there is one."""
        raw = argument
        if self.weight is not None:
            raw = product(rows(argument), self.weight, transposed=(False, True))
            raw = raw.reshape(*argument.shape[:-1], raw.shape[1])
        delta: Array = backend.kernels(raw).softplus(raw, self.bias, out)
        return delta

    def pull(self, delta: Array, delta_bar: Array) -> tuple[Array, Array]:
        """Cotangents of what softplus sees, as products take it, and of the argument."""
        further = self.weight is not None
        raw_bar: Array = backend.kernels(delta).softplus_vjp(delta, delta_bar, operand=further)
        if self.weight is None:
            return raw_bar, raw_bar
        bar = product(rows(raw_bar), self.weight)
        return raw_bar, bar.reshape(*delta.shape[:-1], bar.shape[1])


@dataclass
class MatrixCell:
    """Everything that a solve of one call needs.

    Attributes
    ----------
    map : MixerMap
    weights : Weights
        The stack of linear maps behind the mixer.
    base : dict of ndarray (B, T, n)
        ``F x`` (and a bias) for every segment, which no iteration changes.
    feedback : dict of ndarray (n, D)
        ``V`` of the segments that see the hidden state.
    v : ndarray (B, T, D)
        ``x`` of (M).
    A, skip, gate, norm
        As in :class:`fpnumba.reference.mamba.System`.
    steps : Steps
    bc_eps : float or None
        Of the normalisation of ``b`` and ``c``; None for none.
    initial : tuple of ndarray
        ``y_0 (B, D)`` and ``H_0 (B, D, N)``.
    fixed : Mixer or None
        A mixer that is given, instead of ``map``.
    still : bool
        Whether `initial` is zero, and known to be.
    """

    map: MixerMap
    weights: Weights
    base: dict[str, Array]
    feedback: dict[str, Array]
    v: Array
    A: Array
    skip: Array
    gate: Array | None
    norm: Norm
    steps: Steps
    bc_eps: float | None
    initial: tuple[Array, Array]
    fixed: Mixer | None = None
    still: bool = False
    # what does not see the hidden state, once it is made
    ready: dict[str, Any] = field(default_factory=dict)
    stacked: Array | None = None

    def __post_init__(self) -> None:
        if self.stacked is None and self.feedback:
            parts = [self.feedback[name] for name in SEGMENTS if name in self.feedback]
            self.stacked = contiguous(backend.joined(parts))

    def part(self, steps: slice, initial: tuple[Array, Array]) -> MatrixCell:
        """The same recurrence over some of the steps."""

        def cut(array: Array) -> Array:
            return contiguous(array[:, steps])

        gate = None if self.gate is None else cut(self.gate)
        base = {name: cut(array) for name, array in self.base.items()}
        ready = {}
        if "lambda" not in self.feedback:
            # of all steps at once
            ready["lambda"] = cut(self._once("lambda", lambda: self.steps.delta(self.base["lambda"])))
        still = self.still and initial is self.initial
        return replace(self, base=base, v=cut(self.v), gate=gate, initial=initial, ready=ready, still=still)

    def before(self, y: Array) -> Array:
        """``y_{t-1}`` for every ``t``, as products take it."""
        if backend.on_host(y):
            return backend.joined([self.initial[0][:, None], y[:, :-1]], axis=1)[:, : y.shape[1]]
        return matrix_device.before(self, y)

    def finite(self, b: int) -> bool:
        """Whether the inputs of one sequence are finite."""
        seen = [*self.base.values(), self.v, *self.initial, *([] if self.gate is None else [self.gate])]
        return all(bool(np.isfinite(array[b].astype(self.v.dtype)).all()) for array in seen)

    def share(self) -> float:
        """The part of the tolerance that one of ``T`` steps may use up.

        A bound of what one step leaves to the next is not at hand, so all steps share.
        """
        return 0.5 / float(max(self.v.shape[1], 1))

    def carry(self, y: Array) -> tuple[Array, Array]:
        """What the steps after these start from."""
        if matrix_device.serves(self):
            last: Array = matrix_device.application(self, y).last_state
        else:
            last = self.states(self.mix(y), y, self.initial[1])
        return contiguous(y[:, -1]), last

    @staticmethod
    def states(made: MatrixMade, y: Array, state: Array) -> Array:
        """The state after the steps of `made`."""
        s = made.system
        u = mixing.apply(made.mixer, s.x - y) + y
        last: Array = backend.room(u).scan.selective_scan(u, s.delta, s.A, s.B, s.C, None, state)[1]
        return last

    def alone(self, y: Array, solver: Solver) -> Iterator[tuple[slice, Array, Array]]:
        """Solve every step from zero, its past being that of ``y``: outputs and status of some steps after others."""
        options = {"rtol": solver.rtol, "atol": solver.atol, "max_iter": solver.max_iter}
        options["damping"] = solver.damping
        if matrix_device.serves(self):
            yield from matrix_device.alone(self, y, options)
            return
        (_, steps, dim), state = y.shape, self.initial
        span = SPAN if backend.on_host(y) else max(SPAN, STATE_BYTES // max(1, self.initial[1].nbytes))
        for begin in range(0, steps, span):
            where = slice(begin, begin + span)
            here, now = self.part(where, state), contiguous(y[:, where])
            made = here.mix(now)
            each, last = self._every_state(made, now, state[1])
            state, each = (now[:, -1], last), each.reshape(-1, dim, last.shape[-1])
            found = doors(made.mixer[0], y).solve(made.alone(), each, **options)
            yield where, found.value.reshape(now.shape), found.status.reshape(now.shape[:2])

    def _every_state(self, made: MatrixMade, y: Array, state: Array) -> tuple[Array, Array]:
        """The state before every step of `made`, (B, T, D, N), and that after the last."""
        if not backend.on_host(y):
            found: tuple[Array, Array] = backend.room(y).mamba.every_state(made.system, y, state)
            return found
        states = [state]
        for t in range(y.shape[1]):
            states.append(self.states(made.at(t), contiguous(y[:, t : t + 1]), states[-1]))
        return np.stack(states[:-1], axis=1), states[-1]

    def settle(self, y: Array, converged: NDArray[np.bool_], solver: Solver) -> Array | None:
        """Solve every step from zero, its past being that of ``y``, and compare.

        From the first step on that ends elsewhere, a sequence goes on from what was found.
        """
        start, left = y.copy(), np.zeros(len(y), bool)
        for where, own, status in self.alone(y, solver):
            now = y[:, where]
            size, gap = np.abs(now).max(-1), np.abs(own - now).max(-1)
            # two fixed points are much further apart than two approximations of one
            other = (gap > (1e-3 + 1e2 * solver.rtol) * size) & (status == int(Status.CONVERGED))
            gone = left[:, None] | np.logical_or.accumulate(to_numpy(other) & converged[:, None], axis=1)
            if gone.any():
                at = namespace(y).asarray(gone)
                start[:, where][at] = own[at]
            left = gone[:, -1]
        return start if left.any() else None

    def arguments(self, y: Array) -> dict[str, Array]:
        """``p`` of every segment from a previous iterate."""
        arguments = {
            name: a if a.dtype == self.v.dtype else a.astype(self.v.dtype) for name, a in self.base.items()
        }
        if self.stacked is None:
            return arguments
        more, at = product(rows(self.before(y)), self.stacked, transposed=(False, True)), 0
        for name in SEGMENTS:
            if name in self.feedback:
                size = len(self.feedback[name])
                shape = self.base[name].shape
                arguments[name] = arguments[name] + more[:, at : at + size].reshape(shape)
                at += size
        return arguments

    def mix(self, y: Array) -> MatrixMade:
        """The parameters of all steps from a previous iterate."""
        arguments = self.arguments(y)
        mixer, a, kept = self._once("mixer", lambda: self._mixer(arguments["mixer"]))
        b, b_norm = self._once("b", lambda: self._direction(arguments["b"]))
        c, c_norm = self._once("c", lambda: self._direction(arguments["c"]))
        delta = self._once("lambda", lambda: self.steps.delta(arguments["lambda"]))
        system = System(mixer[0], mixer[1], self.v, delta, self.A, b, c, self.skip, self.gate, self.norm)
        return MatrixMade(mixer, system, arguments, a, kept, b_norm, c_norm)

    def _once(self, name: str, make: Any) -> Any:
        if name in self.feedback:
            return make()
        if name not in self.ready:
            self.ready[name] = make()
        return self.ready[name]

    def _mixer(self, argument: Array) -> tuple[Mixer, Array | None, Any]:
        if self.fixed is not None:
            return self.fixed, None, None
        a = self.weights.expand(argument)
        mixer, kept = self.map.build(a)
        return mixer, a, kept

    def _direction(self, argument: Array) -> tuple[Array, Array]:
        flat = rows(argument)
        if self.bc_eps is None:
            return argument, backend.ones((len(flat),), flat)
        out, norm = backend.kernels(flat).normalize(flat, self.bc_eps)
        return out.reshape(argument.shape), norm

    def iterate(self, y: Array) -> Array:
        """One application of the whole map."""
        if matrix_device.serves(self):
            applied: Array = matrix_device.application(self, y).value()
            return applied
        new: Array = backend.room(y).mamba.iterate(self.mix(y).system, self.initial[1], y)
        return new

    def advance(self, y: Array, pace: Array, published: bool, *, first: bool) -> tuple[Array, Array] | None:
        """A damped step of the iteration and how far it went, in one, on a device that can; `first` says that `y` is
        zero."""
        if not matrix_device.serves(self):
            return None
        return matrix_device.advance(self, y, pace, published, first=first)

    def transposed(self, made: MatrixMade | None, h: Array, bar: Array) -> Array | None:
        """The cotangent of ``h`` of one application at ``h``."""
        if matrix_device.serves(self):
            return matrix_device.transposed(self, h, bar)
        return self.bars().application(made, h, h, bar, through=True)

    def bars(self) -> MatrixBars:
        """Cotangents of all of this, none of anything yet."""
        return MatrixBars.nothing(self) if matrix_device.serves(self) else MatrixBars.zeros(self)


@dataclass
class MatrixMade:
    """The parameters of some steps, and from what they were made."""

    mixer: Mixer
    system: System
    arguments: dict[str, Array]
    a: Array | None
    kept: Any
    b_norm: Array
    c_norm: Array

    def at(self, t: int) -> MatrixMade:
        """One of the steps, for a solve."""

        def cut(array: Array) -> Array:
            return contiguous(array[:, t : t + 1])

        s, (kind, params) = self.system, self.mixer
        here = products.at_steps(kind, params, slice(t, t + 1), 1)
        mixer = (kind, products.each(kind, here, contiguous))
        gate = None if s.gate is None else cut(s.gate)
        system = System(
            mixer[0], mixer[1], cut(s.x), cut(s.delta), s.A, cut(s.B), cut(s.C), s.skip, gate, s.norm
        )
        return replace(self, mixer=mixer, system=system)

    def alone(self) -> System:
        """Every step as a sequence of its own."""

        def alone(array: Array) -> Array:
            return array.reshape(-1, 1, *array.shape[2:])

        def params(kind: Any, given: Any) -> Any:
            if kind == "mixture":
                return [(one, params(one, theirs)) for one, theirs in given]
            return given if kind == "fixed" else tuple(alone(p) for p in given)

        s, (kind, given) = self.system, self.mixer
        gate = None if s.gate is None else alone(s.gate)
        return System(
            kind,
            params(kind, given),
            alone(s.x),
            alone(s.delta),
            s.A,
            alone(s.B),
            alone(s.C),
            s.skip,
            gate,
            s.norm,
        )


def doors(kind: Any, like: Array) -> Any:
    """The doors that solve a step with this mixer, for arrays that lie where `like` does."""
    return plain if kind == "mixture" and backend.on_host(like) else backend.room(like).mamba


@dataclass
class MatrixBars:
    """Cotangents, added up over the applications or the steps that are differentiated; by the names of
    :class:`MatrixCell`, with ``stacked`` that of all ``V``."""

    cell: MatrixCell
    base: dict[str, Array]
    v: Array
    A: Array
    skip: Array
    gate: Array | None
    norm_weight: Array
    norm_bias: Array | None
    step_weight: Array | None
    step_bias: Array
    stacked: Array | None
    seconds: Weights
    fixed: Array | None = None

    @classmethod
    def zeros(cls, cell: MatrixCell) -> MatrixBars:
        """None of anything yet."""

        def zero(array: Array | None) -> Any:
            return None if array is None else np.zeros_like(array)

        base = {name: zero(array) for name, array in cell.base.items()}
        return cls(
            cell,
            base,
            v=zero(cell.v),
            A=zero(cell.A),
            skip=zero(cell.skip),
            gate=zero(cell.gate),
            norm_weight=zero(cell.norm.weight),
            norm_bias=zero(cell.norm.bias),
            step_weight=zero(cell.steps.weight),
            step_bias=zero(cell.steps.bias),
            stacked=zero(cell.stacked),
            seconds=cell.weights.zeros(),
        )

    @classmethod
    def nothing(cls, cell: MatrixCell) -> MatrixBars:
        """The same without arrays of zeros: None, to which :func:`fpnumba.nn.backend.plus` adds."""
        none: Any = None
        return cls(cell, {}, *(none,) * 9, seconds=cell.weights.zeros())

    def absorb(self, made: MatrixMade, bars: SystemBars, at: slice) -> Array | None:
        """Add the cotangents of a system over the steps `at`; return those of what ``V`` gave, ``(B, ., n)``."""
        cell = self.cell
        self.v[:, at] += bars.x
        self.A += bars.A
        self.skip += bars.skip
        if self.gate is not None:
            self.gate[:, at] += bars.gate
        self.norm_weight += bars.weight
        if self.norm_bias is not None:
            self.norm_bias += bars.bias
        found: dict[str, Array] = {}
        if made.a is None:
            (q_bar,) = bars.params
            self.fixed = q_bar if self.fixed is None else self.fixed + q_bar
        else:
            abar = cell.map.build_vjp(made.a, made.kept, bars.params)
            found["mixer"] = cell.weights.expand_vjp(made.arguments["mixer"], abar, self.seconds)
        found["b"] = self._direction(made.system.B, made.b_norm, bars.B)
        found["c"] = self._direction(made.system.C, made.c_norm, bars.C)
        found["lambda"] = self.pull_steps(bars.delta, made.system.delta, made.arguments["lambda"])
        for name, bar in found.items():
            self.base[name][:, at] += bar
        seen = [found[name] for name in SEGMENTS if name in cell.feedback]
        return backend.joined(seen, axis=-1) if seen else None

    def pull_steps(self, delta_bar: Array, delta: Array, argument: Array) -> Array:
        """Add what a cotangent of ``delta`` means for its weight and bias; return that of its argument."""
        raw_bar, bar = self.cell.steps.pull(delta, delta_bar)
        self.step_bias = backend.plus(self.step_bias, column_sums(rows(raw_bar)))
        if self.cell.steps.weight is not None:
            own = product(rows(raw_bar), rows(argument), transposed=(True, False))
            self.step_weight = backend.plus(self.step_weight, own)
        return bar

    def _direction(self, out: Array, norm: Array, out_bar: Array) -> Array:
        eps = self.cell.bc_eps
        if eps is None:
            return out_bar
        bar: Array = backend.kernels(out).normalize_vjp(rows(out), norm, eps, rows(out_bar))
        return bar.reshape(out.shape)

    def application(
        self, made: MatrixMade | None, h: Array, new: Array, new_bar: Array, *, through: bool
    ) -> Array | None:
        """Differentiate one application, ``new = f(h)``; return the cotangent of ``h`` if it is wanted."""
        cell = self.cell
        if matrix_device.serves(cell):
            return matrix_device.absorb(self, h, new_bar, through=through)
        made = cell.mix(h) if made is None else made
        doors = backend.room(h).mamba
        bars = doors.application_vjp(made.system, cell.initial[1], h, contiguous(new_bar))
        fed_bar = self.absorb(made, bars, slice(None))
        if fed_bar is not None and self.stacked is not None:
            self.stacked += product(rows(fed_bar), rows(cell.before(h)), transposed=(True, False))
        if not through:
            return None
        h_bar: Array = bars.y
        if fed_bar is not None and cell.stacked is not None:
            backend.add_to_past(h_bar, rows(fed_bar), cell.stacked)
        return h_bar
