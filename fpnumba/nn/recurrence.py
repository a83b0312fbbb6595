"""The recurrence inside :class:`fpnumba.nn.FPRNN`: (F) of section 3 with a mixer that may see the hidden
state, section 4.

    p_t = F_x x^mixer_t + F_h h_{t-1} + bias            (the second term where the mixer may see h)
    h_t = lam_t * h_{t-1} + (1 - lam_t) * (Q(p_t) v_t + (I - Q(p_t)) h_t)

``v`` drives the recurrence. With ``F_h`` the map is not linear any more, yet ``h_{t-1}`` is all that step
``t`` needs. Here are the map itself and the adjoint of one application; :mod:`fpnumba.nn.ways` solves.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from fpnumba.nn import backend, mixing
from fpnumba.nn.backend import contiguous, product
from fpnumba.nn.basic import rows
from fpnumba.nn.mixer_maps import MixerMap
from fpnumba.nn.mixing import Mixer
from fpnumba.nn.projections import Weights
from fpnumba.solve import Solution, Solver

Array = NDArray[Any]


@dataclass
class Cell:
    """Everything that a solve of one call needs.

    Attributes
    ----------
    map : MixerMap
    weights : Weights
        The stack of linear maps behind the mixer.
    base : ndarray (B, T, inner)
        ``F_x x^mixer + bias``, which no iteration changes.
    feedback : ndarray (inner, D) or None
        ``F_h``; None where the mixer does not see ``h``.
    lam, v : ndarray (B, T, D)
    initial : ndarray (B, D)
        ``h_0``.
    fixed : tuple or None
        A mixer that is given, instead of ``map``.
    made : Made or None
        Kept by :meth:`mix` where no iterate changes it.
    """

    map: MixerMap
    weights: Weights
    base: Array
    feedback: Array | None
    lam: Array
    v: Array
    initial: Array
    fixed: Mixer | None = None
    made: Made | None = None

    @property
    def gate(self) -> Array:
        """``1 - lam``."""
        gate: Array = 1 - self.lam
        return gate

    def part(self, steps: slice, initial: Array) -> Cell:
        """The same recurrence over some of the steps."""
        base, lam, v = (contiguous(array[:, steps]) for array in (self.base, self.lam, self.v))
        return replace(self, base=base, lam=lam, v=v, initial=initial, made=None)

    def before(self, h: Array) -> Array:
        """``h_{t-1}`` for every ``t``."""
        return backend.joined([self.initial[:, None], h[:, :-1]], axis=1)[:, : h.shape[1]]

    def carry(self, h: Array) -> Array:
        """What the steps after these start from."""
        last: Array = h[:, -1]
        return last

    def share(self) -> float:
        """The part of the tolerance that one of ``T`` steps may use up; section 7, as for chunks."""
        steps = max(self.lam.shape[1], 1)
        through = float(np.abs(self.lam).max()) if self.lam.size else 0.0
        return 0.5 * max(1.0 - through, 1.0 / steps) if np.isfinite(through) else 1.0

    def settle(self, h: Array, converged: NDArray[np.bool_], solver: Solver) -> Array | None:
        """A step is linear given its past, so its fixed point is the only one."""
        return None

    def transposed(self, made: Made | None, h: Array, bar: Array) -> Array | None:
        """The cotangent of ``h`` of one application at ``h``."""
        return self.bars().application(made, h, h, bar, through=True)

    def bars(self) -> Bars:
        """Cotangents of all of this, none of anything yet."""
        return Bars.zeros(self)

    def finite(self, b: int) -> bool:
        """Whether the inputs of one sequence are finite."""
        return all(bool(np.isfinite(array[b]).all()) for array in (self.base, self.lam, self.v, self.initial))

    def mix(self, h: Array) -> Made:
        """The mixers of all steps from a previous iterate."""
        if self.fixed is not None:
            return Made(self.fixed, None, None, None)
        if self.made is not None:
            return self.made
        arguments = self.base
        if self.feedback is not None:
            more = product(rows(self.before(h)), self.feedback, transposed=(False, True))
            arguments = arguments + more.reshape(arguments.shape)
        a = self.weights.expand(arguments)
        mixer, kept = self.map.build(a)
        made = Made(mixer, arguments, a, kept)
        if self.feedback is None:
            self.made = made
        return made

    def advance(self, h: Array, pace: Array, published: bool, *, first: bool) -> tuple[Array, Array] | None:
        """Nothing makes a damped step in one."""
        return None

    def iterate(self, h: Array) -> Array:
        """One application of the whole map."""
        mixed = mixing.apply(self.mix(h).mixer, self.v - h) + h
        new: Array = backend.room(h).scan.linear_scan(self.lam, self.gate * mixed, self.initial)
        return new


@dataclass
class Made:
    """A mixer, and from what it was made: ``arguments (B, T, inner)``, ``a (B, T, outputs)``."""

    mixer: Mixer
    arguments: Array | None
    a: Array | None
    kept: Any


@dataclass
class Bars:
    """Cotangents, added up over the applications that are differentiated.

    ``base`` is that of ``F_x x^mixer + bias``; ``feedback`` that of ``F_h``; ``seconds`` holds those of
    second factors; ``fixed`` that of the matrix shared by all steps.
    """

    cell: Cell
    lam: Array
    v: Array
    base: Array
    feedback: Array | None
    seconds: Weights
    fixed: Array | None = None

    @classmethod
    def zeros(cls, cell: Cell) -> Bars:
        """None of anything yet."""
        feedback = None if cell.feedback is None else np.zeros_like(cell.feedback)
        zero = [np.zeros_like(array) for array in (cell.lam, cell.v, cell.base)]
        return cls(cell, zero[0], zero[1], zero[2], feedback, cell.weights.zeros())

    def mixer(self, made: Made, d: Array, e: Array) -> Array | None:
        """Add the cotangents of the mixer for ``y = Q d`` with cotangent ``e``; return those of its
        arguments."""
        params_bar = mixing.cotangent(made.mixer, d, e)
        if made.arguments is None or made.a is None:
            self.fixed = params_bar[0] if self.fixed is None else self.fixed + params_bar[0]
            return None
        abar = self.cell.map.build_vjp(made.a, made.kept, params_bar)
        return self.cell.weights.expand_vjp(made.arguments, abar, self.seconds)

    def application(
        self, made: Made | None, h: Array, new: Array, new_bar: Array, *, through: bool
    ) -> Array | None:
        """Differentiate one application, ``new = f(h)``; return the cotangent of ``h`` if it is wanted."""
        cell, gate = self.cell, self.cell.gate
        made = cell.mix(h) if made is None else made
        mixed = mixing.apply(made.mixer, cell.v - h) + h
        scan = backend.room(h).scan
        lam_bar, s, _ = scan.linear_scan_vjp(cell.lam, new, cell.initial, False, contiguous(new_bar))
        e = gate * s
        back = mixing.apply_transpose(made.mixer, e)
        self.lam += lam_bar - s * mixed
        self.v += back
        arguments_bar = self.mixer(made, cell.v - h, e)
        if arguments_bar is not None:
            self.base += arguments_bar
            if self.feedback is not None:
                self.feedback += product(rows(arguments_bar), rows(cell.before(h)), transposed=(True, False))
        if not through:
            return None
        h_bar: Array = e - back
        if arguments_bar is not None and cell.feedback is not None:
            h_bar[:, :-1] += product(rows(arguments_bar), cell.feedback).reshape(h_bar.shape)[:, 1:]
        return h_bar


class Differentiable(Protocol):
    """Where cotangents are added up, application after application."""

    def application(self, made: Any, h: Array, new: Array, new_bar: Array, *, through: bool) -> Array | None:
        """Differentiate ``new = f(h)``; return the cotangent of ``h`` if it is wanted. `made` is None or ``mix(h)``."""
        ...


B = TypeVar("B", bound=Differentiable, covariant=True)


class Recurrence(Protocol[B]):
    """What :mod:`fpnumba.nn.ways` asks of a recurrence: :class:`Cell`, or one with a matrix state.

    ``v`` has the shape of the iterate, and ``initial`` is whatever :meth:`part` takes for its second argument.
    """

    v: Array
    initial: Any

    def part(self, steps: slice, initial: Any) -> Self:
        """The same over some of the steps."""
        ...

    def carry(self, h: Array) -> Any:
        """What the steps after these start from."""
        ...

    def share(self) -> float:
        """The part of the tolerance that one step may use up."""
        ...

    def finite(self, b: int) -> bool:
        """Whether the inputs of one sequence are finite."""
        ...

    def settle(self, h: Array, converged: NDArray[np.bool_], solver: Solver) -> Array | None:
        """From where to go on if some step is at another fixed point than its own; None if all are at theirs."""
        ...

    def mix(self, h: Array) -> Any:
        """What is made from a previous iterate."""
        ...

    def iterate(self, h: Array) -> Array:
        """One application of the whole map."""
        ...

    def advance(self, h: Array, pace: Array, published: bool, *, first: bool) -> tuple[Array, Array] | None:
        """A damped step of the iteration and how far it went, as `fpnumba.gpu.maps.advance`; None if there is none in
        one. `first` says that `h` is zero."""
        ...

    def transposed(self, made: Any, h: Array, bar: Array) -> Array | None:
        """The cotangent of ``h`` of one application at ``h``, and of nothing else; `made` as of
        :meth:`Differentiable.application`."""
        ...

    def bars(self) -> B:
        """Where cotangents are added up."""
        ...


@dataclass
class Solve:
    """The forward pass of one call: what it found, and what the gradient needs.

    Attributes
    ----------
    h : ndarray (B, T, D)
    solution : Solution
    chain : list of ndarray
        The iterates from which the differentiated applications start, the last of which gave ``h``; empty
        where ``h`` was found without applying the whole map.
    steps : list of Made
        The mixer of every step (:class:`Made`), where the way forward was step by step; or what
        :mod:`fpnumba.nn.low_rank` kept.
    """

    h: Array
    solution: Solution
    chain: list[Array] = field(default_factory=list)
    steps: list[Any] = field(default_factory=list)
