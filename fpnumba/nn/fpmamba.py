"""The FP-Mamba layers: matrix state, parameters that may see the hidden state, hand-derived gradients."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fpnumba.nn import matrix_ways, ways
from fpnumba.nn.activations import silu, silu_vjp
from fpnumba.nn.basic import Params, Pullback, Record, ShortConv, part, rows, under, uniform
from fpnumba.nn.layer import FixedPointLayer, State
from fpnumba.nn.matrix_state import SEGMENTS, MatrixBars, MatrixCell, Steps
from fpnumba.nn.projections import init_weight, weight_of, weight_vjp
from fpnumba.nn.recurrence import Solve
from fpnumba.reference.mamba import Norm
from fpnumba.solve import Adjoint, Solution, Solver, report

Array = NDArray[Any]

HIDDEN = ("lambda", "mixer", "b", "c")
GATES = ("outside", "inside", "both")


@dataclass
class Front:
    """What stands before the recurrence, made from the input of a layer: all that no iteration changes.

    ``x (B, T, D)`` drives it, ``z (B, T, D)`` is the gate before its activation, ``arguments`` are the input's parts of
    "b", "c" and "lambda"; ``window`` is what the convolution has to remember. ``pull`` takes cotangents of ``x``,
    ``z`` and the arguments to those of the parameters and of the input.
    """

    x: Array
    z: Array
    arguments: dict[str, Array]
    window: Array | None
    pull: Any


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

    def _step_bias(self, rng: np.random.Generator, count: int, dtype: DTypeLike) -> Array:
        """The inverse of softplus at step sizes spread evenly, in the logarithm, between 0.001 and 0.1."""
        step = np.maximum(np.exp(rng.uniform(math.log(0.001), math.log(0.1), count)), 1e-4)
        bias: Array = (step + np.log(-np.expm1(-step))).astype(dtype)
        return bias

    # --- the call ------------------------------------------------------------------------------------------

    def _feedback(self, params: Params, mixer: Array | None) -> dict[str, Array]:
        """``V`` of every segment that sees the hidden state."""
        feedback: dict[str, Array] = {} if mixer is None else {"mixer": mixer}
        if self._seen:
            both = weight_of("bc_y_proj", self.weight_norm, params)
            for i, name in enumerate(self._seen):
                feedback[name] = both[i * self.d_state : (i + 1) * self.d_state]
        if "lambda" in self.hidden:
            feedback["lambda"] = weight_of("dt_y_proj", self.weight_norm, params)
        return feedback

    def _cell(self, params: Params, front: Front, state: State) -> MatrixCell:
        base, feedback, weights, fixed = self._mixer_arguments(params, front.x)
        A, skip, steps, norm, bc_eps = self._rates(params)
        inner = self.d_inner
        initial = (
            np.ascontiguousarray(state["y"]).reshape(-1, inner),
            np.ascontiguousarray(state["H"]).reshape(-1, inner, self.d_state),
        )
        return MatrixCell(
            self.map,
            weights,
            {"mixer": base, **front.arguments},
            self._feedback(params, feedback),
            front.x,
            A,
            skip,
            None if self.gate == "outside" else silu(front.z),
            norm,
            steps,
            bc_eps,
            initial,
            fixed,
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
        grads, x_bar = self._mixer_arguments_vjp(
            params, front.x, cell.weights, bars.base["mixer"], fed.get("mixer"), bars.seconds, bars.fixed
        )
        grads = under(grads, "mixer")
        if self._seen:
            both = np.concatenate([fed[name] for name in self._seen])
            grads |= weight_vjp("bc_y_proj", self.weight_norm, params, both)
        if "lambda" in self.hidden:
            grads |= weight_vjp("dt_y_proj", self.weight_norm, params, fed["lambda"])
        return grads | self._rates_vjp(params, bars), x_bar + bars.v

    def _forward(self, params: Params, x: Array, record: Record, *, keep: bool) -> tuple[Array, Pullback]:
        lead = x.shape[:-2]
        out, pullback, _ = self._whole(params, x, self.initial_state(lead, x.dtype), record, keep=keep)
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
        state = self.initial_state(x.shape[:-2], x.dtype) if state is None else state
        out, _, ended = self._whole(params, x, state, record, keep=False)
        return out, ended()

    def _whole(
        self, params: Params, x: Array, state: State, record: Record, *, keep: bool
    ) -> tuple[Array, Pullback, Callable[[], State]]:
        self._check_input(x)
        lead, steps = x.shape[:-2], x.shape[-2]
        count = math.prod(lead)
        window = state["conv"].reshape(count, *state["conv"].shape[-2:]) if "conv" in state else None
        front = self._front(params, np.ascontiguousarray(x).reshape(count, steps, self.d_model), window)
        cell = self._cell(params, front, state)
        found, after = self._solve(cell, keep=keep)
        self._tell(found.solution, record, lead)
        y, gated, opened, z = found.h, found.h, None, front.z
        w_z = None
        if self.gate != "inside":
            w_z = weight_of("z_y_proj", self.weight_norm, params)
            z = z + (rows(cell.before(y)) @ w_z.T).reshape(z.shape)
            opened = silu(z)
            gated = opened * y
        flat = rows(gated)
        out = flat @ params["out_proj.weight"].T
        if self.bias:
            out = out + params["out_proj.bias"]

        def pullback(out_bar: Array) -> tuple[Params, Array]:
            out_flat = rows(out_bar)
            grads: Params = {"out_proj.weight": out_flat.T @ flat}
            if self.bias:
                grads["out_proj.bias"] = out_flat.sum(0)
            y_bar = (out_flat @ params["out_proj.weight"]).reshape(y.shape)
            z_bar = np.zeros_like(front.z)
            if opened is not None and w_z is not None:
                z_bar = silu_vjp(z, y_bar * y)
                y_bar = y_bar * opened
                w_z_bar = rows(z_bar).T @ rows(cell.before(y))
                grads |= weight_vjp("z_y_proj", self.weight_norm, params, w_z_bar)
                y_bar[:, :-1] += (rows(z_bar) @ w_z).reshape(y.shape)[:, 1:]
            bars, _ = self._pull(cell, found, y_bar)
            if bars.gate is not None:
                z_bar = z_bar + silu_vjp(front.z, bars.gate)
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

    def _solve(self, cell: MatrixCell, *, keep: bool) -> tuple[Solve, tuple[Array, Array] | None]:
        """What was found, and what to go on from where that is known."""
        solver, way = self._solver(), ways.way(self.solver, self.map)
        if way == "sequential":
            return matrix_ways.solve_sequential(cell, solver, keep=keep)
        if way == "parallel":
            found = ways.solve_parallel(cell, solver, further=self.n_backwards)
        else:
            found = ways.solve_chunked(cell, solver)
        return found, None

    def _pull(self, cell: MatrixCell, found: Solve, y_bar: Array) -> tuple[MatrixBars, Solution | None]:
        adjoint = self.adjoint
        if adjoint.method == "one-step":
            return ways.pull_chain(cell, found, y_bar), None
        if adjoint.method == "neumann":
            return ways.pull_neumann(cell, found.h, y_bar, adjoint.terms or 0), None
        bars, solution = matrix_ways.pull_sequential(cell, found, y_bar, adjoint)
        report(f"adjoint of {type(self).__name__}", solution, adjoint.on_failure)
        return bars, solution

    # --- one step at a time --------------------------------------------------------------------------------

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
        state = {
            "y": np.zeros((*batch, self.d_inner), dtype),
            "H": np.zeros((*batch, self.d_inner, self.d_state), dtype),
        }
        conv = self._conv()
        if conv is not None:
            state["conv"] = conv.initial_state(batch, dtype)
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
        front = self._front(params, np.ascontiguousarray(x).reshape(count, 1, self.d_model), window)
        cell = self._cell(params, front, state)
        found, (y, last) = matrix_ways.solve_sequential(cell, self.solver, keep=False)
        report(f"{type(self).__name__}.step", found.solution, self.solver.on_failure)
        gated = y
        if self.gate != "inside":
            w_z = weight_of("z_y_proj", self.weight_norm, params)
            gated = silu(front.z[:, 0] + cell.initial[0] @ w_z.T) * y
        out = gated @ params["out_proj.weight"].T
        if self.bias:
            out = out + params["out_proj.bias"]
        return out.reshape(*lead, self.d_model), self._state(lead, (y, last), front)


def convolved(
    conv: ShortConv | None, params: Params, x: Array, window: Array | None
) -> tuple[Array, Array | None, Pullback | None]:
    """The short convolution after a window of earlier inputs, the next window, and the adjoint."""
    if conv is None or window is None:
        return x, None, None
    past = np.concatenate([window, x], axis=1)
    y, pull = conv.vjp(params, past)
    width = window.shape[1]

    def pullback(y_bar: Array) -> tuple[Params, Array]:
        whole = np.concatenate([np.zeros_like(window), y_bar], axis=1)
        grads, past_bar = pull(whole)
        return grads, past_bar[:, width:]

    after = past[:, past.shape[1] - width :]
    return np.ascontiguousarray(y[:, width:]), np.ascontiguousarray(after), pullback


class FPMamba(MatrixStateLayer):
    """A fixed-point RNN with the matrix state of Mamba, arXiv 2503.10799; section 5 of docs/mathematics.md.

    ``[x; z] = W_in input``, ``x`` through a short convolution if there is one, ``[p; B; C] = W_x x``, then the fixed
    point

        b_t = normalize(B_t + V_b y_{t-1}),  c_t = normalize(C_t + V_c y_{t-1}),
        delta_t = softplus(W_dt (p_t + V_dt y_{t-1}) + bias),
        u_t = Q_t (x_t - y_t) + y_t,                                      Q_t made from x_t and y_{t-1},
        H_t = exp(delta_t A) * H_{t-1} + (delta_t u_t) b_t^T,
        y_t = LayerNorm(H_t c_t + D * u_t),

    and ``output = W_out (silu(z_t + V_z y_{t-1}) * y_t)``.

    Parameters
    ----------
    d_model : int
        Width of input and output.
    d_state : int, default 16
        Numbers of state for each channel.
    expand, d_inner, mixer, rank, symmetric, projection_rank, activation, normalization, alpha_max, norm_eps,
    weight_norm
        As for :class:`FPRNN`; ``norm_eps`` is that of ``b`` and ``c``, too.
    dt_rank : int, optional
        Numbers from which ``delta`` is made; a sixteenth of ``d_model`` unless given.
    hidden : sequence of str, default ("mixer", "b", "c")
        What depends on the hidden state: some of "lambda", "mixer", "b" and "c". A fixed mixer depends on nothing.
    gate : {"outside", "inside", "both"}
        Where ``silu(z)`` multiplies: the output, as above; or ``H c + D * u`` before the norm, where it sees the input
        alone.
    short_conv : int, optional
        Width of the short causal convolution; None for none.
    bc_norm : bool, default True
        Whether ``b`` and ``c`` are normalised.
    bias : bool, default False
        Of the projections of input and output.
    single_rates : bool, default False
        Round ``A``, ``D`` and the bias of ``delta`` to single precision whatever the dtype, as the published code does.
    solver : Solver, optional
        How the fixed point is found; by default step after step.
    adjoint : Adjoint, optional
        How the gradient is found; exact by default.
    n_backwards, train_mode
        As for :class:`FPRNN`.

    Notes
    -----
    Parameters carry the names of the published state dict, so that weights go both ways. What the published code does
    not have is called alike: ``dt_y_proj`` is ``V_dt``, and ``bc_y_proj`` has the rows of ``V_b`` and ``V_c`` that
    there are.

    Calls take ``record``, a list to which the layer appends the :class:`fpnumba.Solution` of its solve.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> layer = nn.FPMamba(8, d_state=4, mixer="householder")
    >>> params = layer.init(np.random.default_rng(0))
    >>> x, record = np.ones((2, 5, 8), np.float32), []
    >>> y, pullback = layer.vjp(params, x, record=record)
    >>> y.shape, record[0].converged.all()
    ((2, 5, 8), np.True_)
    >>> params_bar, x_bar = pullback(np.ones_like(y))
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        expand: int = 2,
        d_inner: int | None = None,
        dt_rank: int | None = None,
        mixer: str = "householder",
        rank: int = 1,
        hidden: Sequence[str] = ("mixer", "b", "c"),
        symmetric: bool = False,
        projection_rank: int | None = None,
        activation: str = "silu",
        normalization: str = "spectral",
        gate: str = "outside",
        short_conv: int | None = None,
        bc_norm: bool = True,
        bias: bool = False,
        single_rates: bool = False,
        alpha_max: float = 2.0,
        norm_eps: float = 1e-5,
        weight_norm: bool = True,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        n_backwards: int = 0,
        train_mode: bool = False,
    ) -> None:
        if dt_rank is not None and dt_rank < 1:
            raise ValueError(f"dt_rank must be at least 1, or None, not {dt_rank}")
        super().__init__(
            d_model,
            d_state=d_state,
            expand=expand,
            d_inner=d_inner,
            mixer=mixer,
            rank=rank,
            hidden=hidden,
            symmetric=symmetric,
            projection_rank=projection_rank,
            activation=activation,
            normalization=normalization,
            gate=gate,
            short_conv=short_conv,
            bias=bias,
            alpha_max=alpha_max,
            norm_eps=norm_eps,
            weight_norm=weight_norm,
            solver=solver,
            adjoint=adjoint,
            n_backwards=n_backwards,
            train_mode=train_mode,
        )
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.bc_norm, self.single_rates = bc_norm, single_rates

    def init(self, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Params:
        """Fresh parameters.

        Linear maps are uniform; step sizes, decay rates and the skip connection as in Mamba.
        """
        inner, size = self.d_inner, self.d_state
        params = {"in_proj.weight": uniform(rng, (2 * inner, self.d_model), self.d_model, dtype)}
        if self.bias:
            params["in_proj.bias"] = np.zeros(2 * inner, dtype)
        params["x_proj.weight"] = uniform(rng, (self.dt_rank + 2 * size, inner), inner, dtype)
        params["dt_proj.weight"] = uniform(rng, (inner, self.dt_rank), self.dt_rank, dtype)
        params["dt_proj.bias"] = self._step_bias(rng, inner, dtype)
        params["A_log"] = np.log(np.broadcast_to(np.arange(1.0, size + 1), (inner, size))).astype(dtype)
        params["D"] = np.ones(inner, dtype)
        params["out_norm.weight"], params["out_norm.bias"] = np.ones(inner, dtype), np.zeros(inner, dtype)
        return params | self._init_shared(rng, dtype)

    def _step_rows(self) -> int:
        return self.dt_rank

    def _conv(self) -> ShortConv | None:
        return None if self.short_conv is None else ShortConv(self.d_inner, self.short_conv)

    def _rates(self, params: Params) -> tuple[Array, Array, Steps, Norm, float | None]:
        norm = Norm(params["out_norm.weight"], params["out_norm.bias"], self.norm_eps, True)
        A_log, skip, step_bias = params["A_log"], params["D"], params["dt_proj.bias"]
        dtype = skip.dtype
        if self.single_rates:
            A_log, skip, step_bias = (array.astype(np.float32) for array in (A_log, skip, step_bias))
        A = -np.exp(A_log).astype(dtype)
        steps = Steps(params["dt_proj.weight"], step_bias.astype(dtype))
        return A, skip.astype(dtype), steps, norm, self.norm_eps if self.bc_norm else None

    def _rates_vjp(self, params: Params, bars: MatrixBars) -> Params:
        assert bars.step_weight is not None
        assert bars.norm_bias is not None
        return {
            "A_log": -np.exp(params["A_log"]) * bars.A,
            "D": bars.skip,
            "dt_proj.weight": bars.step_weight,
            "dt_proj.bias": bars.step_bias,
            "out_norm.weight": bars.norm_weight,
            "out_norm.bias": bars.norm_bias,
        }

    def _front(self, params: Params, x: Array, window: Array | None) -> Front:
        inner, size, flat = self.d_inner, self.d_state, rows(x)
        shape = (*x.shape[:2], inner)
        xz = flat @ params["in_proj.weight"].T
        if self.bias:
            xz = xz + params["in_proj.bias"]
        raw, z = np.ascontiguousarray(xz[:, :inner]).reshape(shape), xz[:, inner:].reshape(shape)
        seen, after, pull_conv = convolved(self._conv(), part(params, "conv1d"), raw, window)
        projected = (rows(seen) @ params["x_proj.weight"].T).reshape(*x.shape[:2], -1)
        cuts = np.cumsum([self.dt_rank, size])
        dt, b, c = (np.ascontiguousarray(piece) for piece in np.split(projected, cuts, axis=-1))

        def pull(seen_bar: Array, z_bar: Array, bars: dict[str, Array]) -> tuple[Params, Array]:
            projected_bar = rows(np.concatenate([bars["lambda"], bars["b"], bars["c"]], axis=-1))
            grads: Params = {"x_proj.weight": projected_bar.T @ rows(seen)}
            seen_bar = seen_bar + (projected_bar @ params["x_proj.weight"]).reshape(shape)
            if pull_conv is not None:
                found, seen_bar = pull_conv(seen_bar)
                grads |= under(found, "conv1d")
            xz_bar = np.concatenate([rows(seen_bar), rows(z_bar)], axis=1)
            grads["in_proj.weight"] = xz_bar.T @ flat
            if self.bias:
                grads["in_proj.bias"] = xz_bar.sum(0)
            return grads, xz_bar @ params["in_proj.weight"]

        return Front(seen, np.ascontiguousarray(z), {"b": b, "c": c, "lambda": dt}, after, pull)
