"""What the FP-Mamba layers share: the fixed point with a matrix state, and all that stands behind it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fpnumba.nn import backend, matrix_kronecker, matrix_low_rank, matrix_ways, ways
from fpnumba.nn.activations import gated, gated_vjp, silu, silu_vjp
from fpnumba.nn.backend import column_sums, contiguous, product
from fpnumba.nn.basic import Params, Pullback, Record, ShortConv, rows, under, uniform
from fpnumba.nn.layer import FixedPointLayer, State
from fpnumba.nn.matrix_state import SEGMENTS, MatrixBars, MatrixCell, Steps
from fpnumba.nn.mixer_maps import KroneckerMap, LowRankMap
from fpnumba.nn.mixing import Mixer
from fpnumba.nn.projections import Weights, init_weight, weight_of, weight_vjp
from fpnumba.nn.recurrence import Solve
from fpnumba.reference.mamba import Norm
from fpnumba.solve import Solution, Solver, report

Array = NDArray[Any]

HIDDEN = ("lambda", "mixer", "b", "c")
GATES = ("outside", "inside", "both")


@dataclass
class Front:
    """What stands before the recurrence, made from the input of a layer: all that no iteration changes.

    ``x (B, T, D)`` drives it, and ``seen`` is that as products take it; ``z (B, T, D)`` is the gate before its
    activation, ``arguments`` are the input's parts of "b", "c" and "lambda"; ``window`` is what the convolution has to
    remember. ``pull`` takes cotangents of ``x``, which it may change, ``z`` and the arguments to those of the
    parameters and of the input.
    """

    x: Array
    seen: Array
    z: Array
    arguments: dict[str, Array]
    window: Array | None
    pull: Any


@dataclass
class Folded:
    """The matrices behind the parameters that see the hidden state, normalised and stacked."""

    weights: Weights
    feedback: dict[str, Array]
    stacked: Array | None
    fixed: Mixer | None
    w_z: Array | None
    rates: tuple[Array, Array, Steps, Norm, float | None]


class MatrixStateLayer(FixedPointLayer):
    """What :class:`FPMamba` and :class:`FPMamba2` share: everything but what stands before the recurrence."""

    def __init__(
        self, d_model: int, *, d_state: int, hidden: Sequence[str], gate: str, bias: bool, **options: Any
    ) -> None:
        unknown = [name for name in hidden if name not in HIDDEN]
        if unknown or len(set(hidden)) != len(hidden):
            raise ValueError(f"hidden must be some of {', '.join(map(repr, HIDDEN))}, not {hidden!r}")
        if gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(map(repr, GATES))}, not {gate!r}")
        if d_state < 1:
            raise ValueError(f"d_state must be at least 1, not {d_state}")
        super().__init__(d_model, hidden=hidden, **options)
        self.d_state, self.gate, self.bias = d_state, gate, bias
        self._kept: tuple[list[Array], Array, Folded] | None = None
        ways.way(self.solver, self.map)

    # --- what the two forms do differently -----------------------------------------------------------------

    @abstractmethod
    def _front(self, params: Params, x: Array, window: Array | None) -> Front:
        """``x (B, T, d_model)`` to what drives the recurrence."""

    @abstractmethod
    def _rates(self, params: Params) -> tuple[Array, Array, Steps, Norm, float | None]:
        """``A``, ``D`` for each channel, the step sizes, the norm and the eps of ``b`` and ``c``."""

    @abstractmethod
    def _rates_vjp(self, params: Params, bars: MatrixBars) -> Params:
        """Cotangents of the parameters behind :meth:`_rates`."""

    @abstractmethod
    def _step_rows(self) -> int:
        """Width of the argument of "lambda"."""

    @abstractmethod
    def _conv(self) -> ShortConv | None:
        """The short convolution."""

    # --- parameters ----------------------------------------------------------------------------------------

    @property
    def _seen(self) -> tuple[str, ...]:
        """Those of ``b`` and ``c`` that see the hidden state, in the order of their rows."""
        return tuple(name for name in ("b", "c") if name in self.hidden)

    def _init_shared(self, rng: np.random.Generator, dtype: DTypeLike) -> Params:
        inner = self.d_inner
        params: Params = {}
        if self._seen:
            count = len(self._seen) * self.d_state
            params |= init_weight("bc_y_proj", count, inner, self.weight_norm, rng, dtype)
        if "lambda" in self.hidden:
            params |= init_weight("dt_y_proj", self._step_rows(), inner, self.weight_norm, rng, dtype)
        if self.gate != "inside":
            params |= init_weight("z_y_proj", inner, inner, self.weight_norm, rng, dtype)
        params |= under(self.map.init(rng, dtype), "mixer")
        conv = self._conv()
        if conv is not None:
            params |= under(conv.init(rng, dtype), "conv1d")
        params["out_proj.weight"] = uniform(rng, (self.d_model, inner), inner, dtype)
        if self.bias:
            params["out_proj.bias"] = np.zeros(self.d_model, dtype)
        return params

    def _in_proj(
        self, params: Params, weight: Array, parts: Sequence[slice], flat: Array, z: int
    ) -> list[Array]:
        """What the projection of the input gives, part by part, for kernels want each in one piece; number `z` is the
        gate's, which outside the loop they take as products do."""
        pieces = []
        for i, own in enumerate(parts):
            said = None
            if i == z and self.gate == "outside" and not self.bias:
                said = backend.empty((len(flat), own.stop - own.start), flat)
            pieces.append(product(flat, weight[own], transposed=(False, True), out=said))
        if self.bias:
            pieces = [a + params["in_proj.bias"][own] for a, own in zip(pieces, parts, strict=True)]
        return pieces

    def _in_proj_vjp(
        self, params: Params, weight: Array, parts: Sequence[slice], flat: Array, bars: Sequence[Array]
    ) -> tuple[Params, Array]:
        """Cotangents of its parameters and of the input."""
        grads = {"in_proj.weight": np.empty_like(params["in_proj.weight"])}
        input_bar = None
        for own, bar in zip(parts, bars, strict=True):
            piece_bar = rows(backend.operand(bar))
            product(piece_bar, flat, transposed=(True, False), out=grads["in_proj.weight"][own])
            input_bar = product(piece_bar, weight[own], out=input_bar, add=input_bar is not None)
        if self.bias:
            grads["in_proj.bias"] = backend.joined([column_sums(rows(bar)) for bar in bars])
        assert input_bar is not None
        return grads, input_bar

    # --- the call ------------------------------------------------------------------------------------------

    def _fold(self, params: Params, dtype: DTypeLike) -> Folded:
        """What is made of the parameters once for a call."""
        weights, mixer, fixed = self._mixer_weights(params, dtype)
        feedback: dict[str, Array] = {} if mixer is None else {"mixer": mixer}
        if self._seen:
            both = weight_of("bc_y_proj", self.weight_norm, params)
            for i, name in enumerate(self._seen):
                feedback[name] = both[i * self.d_state : (i + 1) * self.d_state]
        if "lambda" in self.hidden:
            feedback["lambda"] = weight_of("dt_y_proj", self.weight_norm, params)
        parts = [feedback[name] for name in SEGMENTS if name in feedback]
        stacked = contiguous(backend.joined(parts)) if parts else None
        w_z = weight_of("z_y_proj", self.weight_norm, params) if self.gate != "inside" else None
        return Folded(weights, feedback, stacked, fixed, w_z, self._rates(params))

    def _folded(self, params: Params, dtype: DTypeLike) -> Folded:
        """:meth:`_fold`, kept from one step of decoding to the next.

        As long as the arrays are the same, and a sample of the numbers in them.
        """
        # all but the projections of input and output, which are used as they are
        arrays = [
            array for name, array in params.items() if not name.startswith(("in_proj", "out_proj", "x_proj"))
        ]
        sample = np.concatenate([a.reshape(-1)[:: max(a.size // 16, 1)] for a in arrays] or [np.zeros(0)])
        if self._kept is not None:
            before, then, folded = self._kept
            same = len(before) == len(arrays) and all(a is b for a, b in zip(before, arrays, strict=True))
            if same and np.array_equal(then, sample):
                return folded
        folded = self._fold(params, dtype)
        self._kept = arrays, sample, folded
        return folded

    def _cell(
        self, params: Params, folded: Folded, front: Front, state: State, way: str, *, still: bool = False
    ) -> MatrixCell:
        A, skip, steps, norm, bc_eps = folded.rates
        inner = self.d_inner
        initial = (
            contiguous(state["y"]).reshape(-1, inner),
            contiguous(state["H"]).reshape(-1, inner, self.d_state),
        )
        # what all steps are made from at once, kernels read as products take it
        base = self._mixer_base(folded.weights, front.x, front.seen, said=way != "sequential")
        return MatrixCell(
            self.map,
            folded.weights,
            {"mixer": base, **front.arguments},
            folded.feedback,
            front.x,
            A,
            skip,
            None if self.gate == "outside" else silu(front.z),
            norm,
            steps,
            bc_eps,
            initial,
            folded.fixed,
            still,
            stacked=folded.stacked,
        )

    def _cell_vjp(
        self, params: Params, front: Front, cell: MatrixCell, bars: MatrixBars
    ) -> tuple[Params, Array]:
        """Cotangents of all parameters behind the cell, and of ``x``."""
        stacked, at, fed = bars.stacked, 0, {}
        for name in SEGMENTS:
            if name in cell.feedback and stacked is not None:
                fed[name] = stacked[at : at + len(cell.feedback[name])]
                at += len(cell.feedback[name])
        arguments = cell.weights, bars.base["mixer"], fed.get("mixer"), bars.seconds, bars.fixed
        grads, x_bar = self._mixer_arguments_vjp(params, front.x, *arguments, bars.v, front.seen)
        grads = under(grads, "mixer")
        if self._seen:
            both = backend.joined([fed[name] for name in self._seen])
            grads |= weight_vjp("bc_y_proj", self.weight_norm, params, both)
        if "lambda" in self.hidden:
            grads |= weight_vjp("dt_y_proj", self.weight_norm, params, fed["lambda"])
        return grads | self._rates_vjp(params, bars), x_bar

    def _forward(self, params: Params, x: Array, record: Record, *, keep: bool) -> tuple[Array, Pullback]:
        lead = x.shape[:-2]
        out, pullback, _ = self._whole(params, x, self._initial(lead, x), record, keep=keep, still=True)
        return out, pullback

    def prefill(
        self, params: Params, x: Array, state: State | None = None, *, record: Record = None
    ) -> tuple[Array, State]:
        """Evaluate the layer, from a state if one is given, and return the state to go on from.

        Parameters
        ----------
        params : dict of arrays
        x : ndarray (..., T, d_model)
        state : dict of arrays, optional
            From :meth:`initial_state`, :meth:`step` or this method.
        record : list, optional
            Receives the :class:`fpnumba.Solution`.

        Returns
        -------
        y : ndarray (..., T, d_model)
        state : dict of arrays
        """
        state = self._initial(x.shape[:-2], x) if state is None else state
        out, _, ended = self._whole(params, x, state, record, keep=False)
        return out, ended()

    def _whole(
        self, params: Params, x: Array, state: State, record: Record, *, keep: bool, still: bool = False
    ) -> tuple[Array, Pullback, Callable[[], State]]:
        self._check_input(x)
        lead, steps = x.shape[:-2], x.shape[-2]
        count = math.prod(lead)
        window = state["conv"].reshape(count, *state["conv"].shape[-2:]) if "conv" in state else None
        front = self._front(params, contiguous(x).reshape(count, steps, self.d_model), window)
        folded = self._fold(params, x.dtype)
        way = ways.way(self.solver, self.map)
        cell = self._cell(params, folded, front, state, way, still=still)
        found, after = self._solve(cell, way, keep=keep and self.adjoint.method == "implicit")
        self._tell(found.solution, record, lead)
        y, z, w_z, fed_z = found.h, front.z, folded.w_z, None
        flat = rows(y)
        if w_z is not None:
            w_z = backend.operand(w_z)
            before = rows(cell.before(y))
            fed_z = product(
                before, w_z, transposed=(False, True), out=backend.empty((len(before), len(w_z)), z)
            )
            fed_z = fed_z.reshape(z.shape)
            flat = rows(gated(z, y, fed_z, operand=True))
        w_out = backend.operand(params["out_proj.weight"])
        out = product(flat, w_out, transposed=(False, True))
        if self.bias:
            out = out + params["out_proj.bias"]

        def pullback(out_bar: Array) -> tuple[Params, Array]:
            out_flat = rows(backend.operand(out_bar))
            grads: Params = {"out_proj.weight": product(out_flat, flat, transposed=(True, False))}
            if self.bias:
                grads["out_proj.bias"] = column_sums(rows(out_bar))
            y_bar = product(out_flat, w_out).reshape(y.shape)
            z_bar = None
            if w_z is not None:
                z_bar, y_bar = gated_vjp(z, y, y_bar, fed_z, operand=self.gate == "outside")
                fed_bar = backend.operand(z_bar)
                w_z_bar = product(rows(fed_bar), rows(cell.before(y)), transposed=(True, False))
                grads |= weight_vjp("z_y_proj", self.weight_norm, params, w_z_bar)
                if steps:
                    backend.add_to_past(y_bar, rows(fed_bar), w_z)
            bars, _ = self._pull(cell, found, y_bar)
            if bars.gate is not None:
                inside = silu_vjp(front.z, bars.gate)
                z_bar = inside if z_bar is None else z_bar + inside
            inner_grads, x_bar = self._cell_vjp(params, front, cell, bars)
            front_grads, input_bar = front.pull(x_bar, z_bar, bars.base)
            grads |= inner_grads | front_grads
            return {name: grads[name] for name in params}, input_bar.reshape(x.shape)

        def ended() -> State:
            last = after if after is not None else cell.carry(y) if steps else cell.initial
            return self._state(lead, last, front)

        return out.reshape(*lead, steps, self.d_model), pullback, ended

    def _state(self, lead: tuple[int, ...], last: tuple[Array, Array], front: Front) -> State:
        y, H = last
        state = {"y": y.reshape(*lead, self.d_inner), "H": H.reshape(*lead, self.d_inner, self.d_state)}
        if front.window is not None:
            state["conv"] = front.window.reshape(*lead, *front.window.shape[-2:])
        return state

    # --- the recurrence ------------------------------------------------------------------------------------

    def _solve(self, cell: MatrixCell, way: str, *, keep: bool) -> tuple[Solve, tuple[Array, Array] | None]:
        """What was found, and what to go on from where that is known."""
        solver = self._solver()
        if way == "sequential":
            # the exact gradient goes back over what is left by going step after step
            if solver.method == "auto" and not keep and not backend.on_host(cell.v):
                tried = ways.tried(cell, solver, further=self.n_backwards)
                if tried is not None:
                    return tried, None
            return self._sequential(cell, solver, keep=keep)
        if way == "parallel":
            found = ways.solve_parallel(cell, solver, further=self.n_backwards)
        else:
            found = ways.solve_chunked(cell, solver)
        return found, None

    def _sequential(
        self, cell: MatrixCell, solver: Solver, *, keep: bool
    ) -> tuple[Solve, tuple[Array, Array]]:
        if backend.on_host(cell.v) and matrix_low_rank.serves(self.map):
            return matrix_low_rank.solve(cell, self.map, solver, keep=keep)
        if backend.on_host(cell.v) and matrix_kronecker.serves(self.map):
            return matrix_kronecker.solve(cell, self.map, solver, keep=keep)
        return matrix_ways.solve_sequential(cell, solver, keep=keep)

    def _pull(self, cell: MatrixCell, found: Solve, y_bar: Array) -> tuple[MatrixBars, Solution | None]:
        adjoint = self.adjoint
        if adjoint.method == "one-step":
            return ways.pull_chain(cell, found, y_bar), None
        if adjoint.method == "neumann":
            return ways.pull_neumann(cell, found.h, y_bar, adjoint.terms or 0), None
        kept = found.steps[0] if found.steps else None
        if isinstance(kept, matrix_low_rank.Kept) and isinstance(self.map, LowRankMap):
            bars, solution = matrix_low_rank.pull(cell, self.map, found, y_bar)
        elif isinstance(kept, matrix_kronecker.Kept) and isinstance(self.map, KroneckerMap):
            bars, solution = matrix_kronecker.pull(cell, self.map, found, y_bar, adjoint)
        else:
            bars, solution = matrix_ways.pull_sequential(cell, found, y_bar, adjoint)
        report(f"adjoint of {type(self).__name__}", solution, adjoint.on_failure)
        return bars, solution

    # --- one step at a time --------------------------------------------------------------------------------

    def _initial(self, lead: tuple[int, ...], x: Array) -> State:
        """:meth:`initial_state`, where `x` lies."""
        return self._zero_state(lead, lambda shape: backend.zeros(shape, x))

    def initial_state(self, batch: tuple[int, ...] = (), dtype: DTypeLike = np.float32) -> State:
        """The state before the first step.

        Parameters
        ----------
        batch : tuple of int
            Leading axes.
        dtype : dtype

        Returns
        -------
        dict of arrays
            ``y (*batch, d_inner)``, ``H (*batch, d_inner, d_state)``, and the window ``conv`` of the convolution.
        """
        return self._zero_state(batch, lambda shape: np.zeros(shape, dtype))

    def _zero_state(self, batch: tuple[int, ...], zeros: Callable[[tuple[int, ...]], Array]) -> State:
        state = {
            "y": zeros((*batch, self.d_inner)),
            "H": zeros((*batch, self.d_inner, self.d_state)),
        }
        conv = self._conv()
        if conv is not None:
            state["conv"] = zeros((*batch, conv.width - 1, conv.channels))
        return state

    def step(self, params: Params, x: Array, state: State) -> tuple[Array, State]:
        """One step of decoding, at a cost that does not grow.

        Solves the step's own fixed point; equal to the call over a whole sequence to the tolerance of the solver.

        Parameters
        ----------
        params : dict of arrays
        x : ndarray (..., d_model)
        state : dict of arrays
            From :meth:`initial_state`, :meth:`prefill` or the step before.

        Returns
        -------
        y : ndarray (..., d_model)
        state : dict of arrays
        """
        lead = x.shape[:-1]
        count = math.prod(lead)
        window = state["conv"].reshape(count, *state["conv"].shape[-2:]) if "conv" in state else None
        front = self._front(params, contiguous(x).reshape(count, 1, self.d_model), window)
        folded = self._folded(params, x.dtype)
        cell = self._cell(params, folded, front, state, "sequential")
        found, (y, last) = self._sequential(cell, self.solver, keep=False)
        report(f"{type(self).__name__}.step", found.solution, self.solver.on_failure)
        opened = y
        if folded.w_z is not None:
            fed = product(cell.initial[0], folded.w_z, transposed=(False, True))
            opened = gated(front.z[:, 0], y, fed)
        out = product(opened, params["out_proj.weight"], transposed=(False, True))
        if self.bias:
            out = out + params["out_proj.bias"]
        return out.reshape(*lead, self.d_model), self._state(lead, (y, last), front)


def step_bias(rng: np.random.Generator, count: int, dtype: DTypeLike) -> Array:
    """The inverse of softplus at step sizes spread evenly, in the logarithm, between 0.001 and 0.1."""
    step = np.maximum(np.exp(rng.uniform(math.log(0.001), math.log(0.1), count)), 1e-4)
    bias: Array = (step + np.log(-np.expm1(-step))).astype(dtype)
    return bias


def convolved(
    conv: ShortConv | None, params: Params, x: Array, window: Array | None
) -> tuple[Array, Array | None, Pullback | None]:
    """The short convolution after a window of earlier inputs, the next window, and the adjoint."""
    if conv is None or window is None:
        return x, None, None
    y, pull = conv.vjp(params, x, past=window)
    steps, width = x.shape[1], window.shape[1]
    if steps < width:
        return y, backend.joined([window[:, steps:], x], axis=1), pull
    return y, contiguous(x[:, steps - width :]), pull
