"""The FP-RNN layer: vector state, mixers that may see the hidden state, hand-derived gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fpnumba.arrays import host_room
from fpnumba.nn import backend, low_rank, ways
from fpnumba.nn.activations import gated, gated_vjp, sigmoid, silu
from fpnumba.nn.backend import column_sums, contiguous, product, zeros
from fpnumba.nn.basic import Params, Pullback, Record, RMSNorm, ShortConv, part, rows, under, uniform
from fpnumba.nn.layer import FixedPointLayer
from fpnumba.nn.mixer_maps import LowRankMap, sigmoid_vjp
from fpnumba.nn.recurrence import Bars, Cell, Solve
from fpnumba.solve import Adjoint, Solver, report

Array = NDArray[Any]
State = dict[str, Array]


class FPRNN(FixedPointLayer):
    """A fixed-point RNN with vector state, arXiv 2503.10799; (F) of section 3 of docs/mathematics.md inside
    a gated block.

    ``[x; z] = W_in input``, with short convolutions one for each use of ``x``; then

        b = silu(W_b x),  lam = sigmoid(W_lam x + bias),
        h_t = lam_t h_{t-1} + (1 - lam_t) (Q_t b_t x_t + (I - Q_t) h_t),        Q_t made from x_t and h_{t-1},
        c = silu(W_c [x_t; h_{t-1}]),  output = W_out RMSNorm(silu(z) c h).

    Parameters
    ----------
    d_model : int
        Width of input and output.
    expand : int, default 2
        The state has ``d_inner = expand * d_model`` channels.
    d_inner : int, optional
        Channels of the state, instead of ``expand``.
    mixer : {"householder", "dplr", "kronecker", "monarch", "dense", "fixed", "mixture"}
        The matrix ``Q_t``: section 2 of docs/mathematics.md. "mixture" is Householder and Kronecker in turn.
    rank : int, default 1
        Reflections of householder, rank of dplr, block size of monarch, number of mixers of mixture.
    hidden : sequence of str, default ("mixer",)
        What depends on the hidden state: ``("mixer",)`` or ``()``, section 4. A fixed mixer depends on
        nothing.
    symmetric : bool, default False
        The mixer sees ``x_t + h_{t-1}`` rather than both side by side.
    projection_rank : int, optional
        Factor the mixer's largest linear map through this many numbers.
    activation : str, default "silu"
        Of the mixer's parameters: "silu", "relu" or "identity".
    normalization : {"spectral", "rows"}
        Of a Kronecker mixer: by rows only, or by the largest eigenvalue too.
    short_conv : int, optional
        Width of the short causal convolutions; None for none.
    alpha_max : float, default 2.0
        ``alpha = alpha_max * sigmoid(.)``: two reaches reflections (and negative eigenvalues, and divergent
        iterations); one keeps the iteration a contraction. Scales the Kronecker product likewise.
    norm_eps : float, default 1e-5
        Of the norms, of the mixer's parameters as well.
    weight_norm : bool, default True
        Weight normalisation of the mixer's linear maps.
    solver : Solver, optional
        How the fixed point is found. By default a mixer that sees the hidden state is solved step after
        step, which is exact and best for short sequences, and any other one by ``Solver()``.
    adjoint : Adjoint, optional
        How the gradient is found; exact by default.
    n_backwards : int, default 0
        Further applications of the map after the solve, through which the one-step gradient goes; the
        published code has one. Parallel solves only. At 0 the one-step gradient goes through the last
        application of the solve, so that with ``Solver("parallel", max_iter=1)`` the layer is a diagonal RNN
        with its exact gradient.
    train_mode : bool, default False
        Only for ``Solver(criterion="published")``, whose training stops at ``quantile`` and ``max_iter``,
        and whose evaluation waits for every sequence and up to 1000 iterations.

    Notes
    -----
    Parameters carry the names of the published state dict, so that weights go both ways:
    ``input_trans.weight``, ``mixer.u_proj.parametrizations.weight.original0`` (the magnitude of a normalised
    weight; ``original1`` is its direction), ``conv1d_x.weight`` and so on.

    Calls take ``record``, a list to which the layer appends the :class:`fpnumba.Solution` of its solve.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> layer = nn.FPRNN(8, mixer="householder")
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
        expand: int = 2,
        d_inner: int | None = None,
        mixer: str = "householder",
        rank: int = 1,
        hidden: Sequence[str] = ("mixer",),
        symmetric: bool = False,
        projection_rank: int | None = None,
        activation: str = "silu",
        normalization: str = "spectral",
        short_conv: int | None = None,
        alpha_max: float = 2.0,
        norm_eps: float = 1e-5,
        weight_norm: bool = True,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        n_backwards: int = 0,
        train_mode: bool = False,
    ) -> None:
        if tuple(hidden) not in ((), ("mixer",)):
            raise ValueError(f"hidden must be () or ('mixer',), not {hidden!r}")
        super().__init__(
            d_model,
            expand=expand,
            d_inner=d_inner,
            mixer=mixer,
            rank=rank,
            hidden=hidden,
            symmetric=symmetric,
            projection_rank=projection_rank,
            activation=activation,
            normalization=normalization,
            short_conv=short_conv,
            alpha_max=alpha_max,
            norm_eps=norm_eps,
            weight_norm=weight_norm,
            solver=solver,
            adjoint=adjoint,
            n_backwards=n_backwards,
            train_mode=train_mode,
        )
        if self.hidden:
            ways.way(self.solver, self.map)
        self.norm = RMSNorm(self.d_inner, eps=self.norm_eps)

    # --- parameters ----------------------------------------------------------------------------------------

    def init(self, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Params:
        """Fresh parameters.

        Linear maps are uniform; the biases of ``lam`` spread its half-lives between one step and a hundred.
        """
        d, inner = self.d_model, self.d_inner
        params = {"input_trans.weight": uniform(rng, (2 * inner, d), d, dtype)}
        params["lambda_proj.weight"] = uniform(rng, (inner, inner), inner, dtype)
        rates = np.exp(rng.uniform(math.log(0.01), math.log(0.5), inner))
        params["lambda_proj.bias"] = np.log((1 - rates) / rates).astype(dtype)
        params["b_proj.weight"] = uniform(rng, (inner, inner), inner, dtype)
        params["c_proj.weight"] = uniform(rng, (inner, 2 * inner), 2 * inner, dtype)
        params |= under(self.map.init(rng, dtype), "mixer")
        if self.short_conv is not None:
            for name in ("x", "b", "mixer", "lambda"):
                params |= under(ShortConv(inner, self.short_conv).init(rng, dtype), f"conv1d_{name}")
            params |= under(ShortConv(2 * inner, self.short_conv).init(rng, dtype), "conv1d_c")
        params["output_norm.weight"] = np.ones(inner, dtype)
        params["output_trans.weight"] = uniform(rng, (d, inner), inner, dtype)
        return params

    # --- the call ------------------------------------------------------------------------------------------

    def _forward(self, params: Params, x: Array, record: Record, *, keep: bool) -> tuple[Array, Pullback]:
        if x.ndim < 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must have shape (..., T, {self.d_model}), not {x.shape}")
        lead, steps, inner = x.shape[:-2], x.shape[-2], self.d_inner
        shape = (math.prod(lead), steps, inner)
        flat = rows(x)
        xz = product(flat, params["input_trans.weight"], transposed=(False, True))
        raw, z = contiguous(xz[:, :inner]).reshape(shape), contiguous(xz[:, inner:])

        branches: dict[str, Array] = {}
        pullbacks: dict[str, Pullback] = {}
        for name in ("x", "b", "mixer", "lambda"):
            branches[name] = raw
            if self.short_conv is not None:
                conv = ShortConv(inner, self.short_conv)
                branches[name], pullbacks[name] = conv.vjp(part(params, f"conv1d_{name}"), raw)
        x_in = branches["x"]
        b_inner = product(rows(branches["b"]), params["b_proj.weight"], transposed=(False, True)).reshape(
            shape
        )
        lam_inner = product(
            rows(branches["lambda"]), params["lambda_proj.weight"], transposed=(False, True)
        ).reshape(shape)
        lam = sigmoid(lam_inner + params["lambda_proj.bias"])

        cell = self._cell(params, branches["mixer"], lam, gated(b_inner, x_in), zeros((shape[0], inner), x))
        found = self._solve(cell, record, lead, keep=keep)
        h = found.h

        w_c = params["c_proj.weight"]
        if self.short_conv is not None:
            conv_c = part(params, "conv1d_c")
            both = {"weight": conv_c["weight"], "bias": conv_c["bias"]}
            first, second = (
                {n: a[s] for n, a in both.items()} for s in (slice(0, inner), slice(inner, None))
            )
            conv = ShortConv(inner, self.short_conv)
            seen_x, pull_cx = conv.vjp(first, x_in)
            seen_h, pull_ch = conv.vjp(second, h)
        else:
            seen_x, seen_h = x_in, cell.before(h)
        c_inner = product(rows(seen_x), w_c[:, :inner], transposed=(False, True))
        c_inner = (c_inner + product(rows(seen_h), w_c[:, inner:], transposed=(False, True))).reshape(shape)
        y = rows(gated(c_inner, h))
        normed, pull_norm = self.norm.vjp({"weight": params["output_norm.weight"]}, gated(z, y))
        out = product(normed, params["output_trans.weight"], transposed=(False, True)).reshape(
            *lead, steps, self.d_model
        )

        def pullback(out_bar: Array) -> tuple[Params, Array]:
            grads: Params = {}
            out_flat = rows(out_bar)
            grads["output_trans.weight"] = product(out_flat, normed, transposed=(True, False))
            norm_grads, gated_bar = pull_norm(product(out_flat, params["output_trans.weight"]))
            grads["output_norm.weight"] = norm_grads["weight"]
            z_bar, y_bar = gated_vjp(z, y, gated_bar)
            c_bar, h_bar = gated_vjp(c_inner, h, y_bar.reshape(shape))
            c_bar = rows(c_bar)
            grads["c_proj.weight"] = backend.joined(
                [
                    product(c_bar, rows(seen_x), transposed=(True, False)),
                    product(c_bar, rows(seen_h), transposed=(True, False)),
                ],
                axis=1,
            )
            seen_x_bar = product(c_bar, w_c[:, :inner]).reshape(shape)
            seen_h_bar = product(c_bar, w_c[:, inner:]).reshape(shape)
            if self.short_conv is not None:
                grads_x, x_in_bar = pull_cx(seen_x_bar)
                grads_h, more = pull_ch(seen_h_bar)
                h_bar += more
                grads |= {f"conv1d_c.{n}": backend.joined([grads_x[n], grads_h[n]]) for n in grads_x}
            else:
                x_in_bar = seen_x_bar
                h_bar[:, :-1] += seen_h_bar[:, 1:]

            bars = self._pull(cell, found, h_bar)
            b_bar, more = gated_vjp(b_inner, x_in, bars.v)
            x_in_bar, b_bar = x_in_bar + more, rows(b_bar)
            lam_bar = rows(sigmoid_vjp(lam, bars.lam))
            grads["b_proj.weight"] = product(b_bar, rows(branches["b"]), transposed=(True, False))
            grads["lambda_proj.weight"] = product(lam_bar, rows(branches["lambda"]), transposed=(True, False))
            grads["lambda_proj.bias"] = column_sums(lam_bar)
            branch_bars = {
                "x": x_in_bar,
                "b": product(b_bar, params["b_proj.weight"]).reshape(shape),
                "lambda": product(lam_bar, params["lambda_proj.weight"]).reshape(shape),
            }
            mixer_grads, branch_bars["mixer"] = self._cell_vjp(params, branches["mixer"], cell, bars)
            grads |= under(mixer_grads, "mixer")
            raw_bar = zeros(shape, x)
            for name, bar in branch_bars.items():
                if self.short_conv is not None:
                    conv_grads, bar = pullbacks[name](bar)
                    grads |= under(conv_grads, f"conv1d_{name}")
                raw_bar += bar
            xz_bar = backend.joined([rows(raw_bar), z_bar], axis=1)
            grads["input_trans.weight"] = product(xz_bar, flat, transposed=(True, False))
            return grads, product(xz_bar, params["input_trans.weight"]).reshape(x.shape)

        return out, pullback

    # --- the recurrence ------------------------------------------------------------------------------------

    def _cell(self, params: Params, x_mixer: Array, lam: Array, v: Array, initial: Array) -> Cell:
        weights, feedback, fixed = self._mixer_weights(params, v.dtype)
        return Cell(self.map, weights, self._mixer_base(weights, x_mixer), feedback, lam, v, initial, fixed)

    def _cell_vjp(self, params: Params, x_mixer: Array, cell: Cell, bars: Bars) -> tuple[Params, Array]:
        return self._mixer_arguments_vjp(
            params, x_mixer, cell.weights, bars.base, bars.feedback, bars.seconds, bars.fixed
        )

    def _way(self) -> str:
        if self.hidden:
            return ways.way(self.solver, self.map)
        low_rank = self.rank if self.mixer in ("householder", "dplr") else None
        return self.solver.way(low_rank)

    def _solve(self, cell: Cell, record: Record, lead: tuple[int, ...], *, keep: bool) -> Solve:
        solver, way = self._solver(), self._way()
        if way == "parallel":
            found = ways.solve_parallel(cell, solver, further=self.n_backwards)
        elif not self.hidden:
            found = ways.solve_given(cell, solver, way)
        elif way == "chunked":
            found = ways.solve_chunked(cell, solver)
        else:
            found = self._sequential(cell, keep=keep)
        self._tell(found.solution, record, lead)
        return found

    def _sequential(self, cell: Cell, *, keep: bool) -> Solve:
        if isinstance(self.map, LowRankMap) and backend.on_host(cell.v) and host_room().name == "cpu":
            return low_rank.solve(cell, self.map, keep=keep)
        return ways.solve_sequential(cell, self._solver(), keep=keep)

    def _pull(self, cell: Cell, found: Solve, h_bar: Array) -> Bars:
        adjoint = self.adjoint
        if adjoint.method == "one-step":
            return ways.pull_chain(cell, found, h_bar)
        if adjoint.method == "neumann":
            return ways.pull_neumann(cell, found.h, h_bar, adjoint.terms or 0)
        if found.steps and isinstance(found.steps[0], low_rank.Kept) and isinstance(self.map, LowRankMap):
            bars, solution = low_rank.pull(cell, self.map, found, h_bar)
        elif self.hidden:
            bars, solution = ways.pull_sequential(cell, found, h_bar, adjoint, self.solver)
        else:
            bars, solution = ways.pull_given(cell, found, h_bar, adjoint, self.solver)
        report("adjoint of FPRNN", solution, adjoint.on_failure)
        return bars

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
            ``h (*batch, d_inner)``, and the windows of the short convolutions.
        """
        state = {"h": np.zeros((*batch, self.d_inner), dtype)}
        if self.short_conv is not None:
            conv = ShortConv(self.d_inner, self.short_conv)
            state |= {name: conv.initial_state(batch, dtype) for name in ("raw", "seen_x", "seen_h")}
        return state

    def step(self, params: Params, x: Array, state: State) -> tuple[Array, State]:
        """One step of decoding, at a cost that does not grow.

        Equal to the call over a whole sequence to the tolerance of the solver.

        Parameters
        ----------
        params : dict of arrays
        x : ndarray (..., d_model)
        state : dict of arrays
            From :meth:`initial_state` or the step before.

        Returns
        -------
        y : ndarray (..., d_model)
        state : dict of arrays
        """
        lead, inner = x.shape[:-1], self.d_inner
        xz = x @ params["input_trans.weight"].T
        raw, z = xz[..., :inner], xz[..., inner:]
        branches, after = dict.fromkeys(("x", "b", "mixer", "lambda"), raw), {}
        if self.short_conv is not None:
            conv = ShortConv(inner, self.short_conv)
            for name in branches:
                branches[name], after["raw"] = conv.step(part(params, f"conv1d_{name}"), raw, state["raw"])
        b = silu(branches["b"] @ params["b_proj.weight"].T)
        lam = sigmoid(branches["lambda"] @ params["lambda_proj.weight"].T + params["lambda_proj.bias"])

        def one(array: Array) -> Array:
            return contiguous(array).reshape(-1, 1, inner)

        before = contiguous(state["h"]).reshape(-1, inner)
        cell = self._cell(params, one(branches["mixer"]), one(lam), one(b * branches["x"]), before)
        found = self._sequential(cell, keep=False)
        report("FPRNN.step", found.solution.reshaped(lead), self.solver.on_failure)
        h = found.h.reshape(*lead, inner)

        if self.short_conv is not None:
            conv_c = part(params, "conv1d_c")
            first, second = (
                {n: a[s] for n, a in conv_c.items()} for s in (slice(0, inner), slice(inner, None))
            )
            seen_x, after["seen_x"] = conv.step(first, branches["x"], state["seen_x"])
            seen_h, after["seen_h"] = conv.step(second, h, state["seen_h"])
        else:
            seen_x, seen_h = branches["x"], state["h"]
        c = silu(backend.joined([seen_x, seen_h], axis=-1) @ params["c_proj.weight"].T)
        normed = self.norm({"weight": params["output_norm.weight"]}, silu(z) * (c * h))
        return normed @ params["output_trans.weight"].T, {"h": h, **after}
