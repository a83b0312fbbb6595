"""The FP-Mamba layers: matrix state, parameters that may see the hidden state, hand-derived gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fpnumba.nn import backend
from fpnumba.nn.backend import contiguous, product
from fpnumba.nn.basic import Params, ShortConv, part, rows, under, uniform
from fpnumba.nn.matrix_layer import Front, MatrixStateLayer, convolved, step_bias
from fpnumba.nn.matrix_state import MatrixBars, Steps
from fpnumba.reference.mamba import Norm
from fpnumba.solve import Adjoint, Solver

Array = NDArray[Any]


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
        params["dt_proj.bias"] = step_bias(rng, inner, dtype)
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
        # rounded once: exponentials in single precision differ in their last digit from library to library
        A = -np.exp(A_log.astype(np.float64)).astype(A_log.dtype).astype(dtype)
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
        inner, size, flat = self.d_inner, self.d_state, rows(backend.operand(x))
        shape = (*x.shape[:2], inner)
        weight, halves = backend.operand(params["in_proj.weight"]), (slice(0, inner), slice(inner, 2 * inner))
        raw, z = (piece.reshape(shape) for piece in self._in_proj(params, weight, halves, flat, 1))
        driven, after, pull_conv = convolved(self._conv(), part(params, "conv1d"), raw, window)
        seen, x_proj = backend.operand(driven), backend.operand(params["x_proj.weight"])
        projected = product(rows(seen), x_proj, transposed=(False, True)).reshape(
            *x.shape[:2], self.dt_rank + 2 * size
        )
        cuts = np.cumsum([self.dt_rank, size])
        dt, b, c = (contiguous(piece) for piece in np.split(projected, cuts, axis=-1))

        def pull(driven_bar: Array, z_bar: Array, bars: dict[str, Array]) -> tuple[Params, Array]:
            told = [bars["lambda"], bars["b"], bars["c"]]
            projected_bar = rows(backend.operand(backend.joined(told, axis=-1)))
            grads: Params = {"x_proj.weight": product(projected_bar, rows(seen), transposed=(True, False))}
            product(projected_bar, x_proj, out=rows(driven_bar), add=True)
            if pull_conv is not None:
                found, driven_bar = pull_conv(driven_bar)
                grads |= under(found, "conv1d")
            more, input_bar = self._in_proj_vjp(params, weight, halves, flat, (driven_bar, z_bar))
            return grads | more, input_bar

        return Front(driven, seen, z, {"b": b, "c": c, "lambda": dt}, after, pull)


class FPMamba2(MatrixStateLayer):
    """A fixed-point RNN with the matrix state of Mamba-2: :class:`FPMamba` with one decay for every head of channels.

    ``[z; x; B; C; p] = W_in input``, ``x``, ``B`` and ``C`` through a short convolution if there is one, ``delta_t =
    softplus(p_t + V_dt y_{t-1} + bias)`` for each head, and an RMSNorm in place of the LayerNorm.

    Parameters
    ----------
    d_model : int
        Width of input and output.
    d_state : int, default 128
        Numbers of state for each channel.
    head_dim : int, default 64
        Channels of a head; must divide the channels of the state.
    gate : {"both", "outside", "inside"}
        As for :class:`FPMamba`. The published layer has ``silu(z)`` in both places.
    channel_skip : bool, default False
        Whether ``D`` has a number for each channel rather than for each head.
    expand, d_inner, mixer, rank, hidden, symmetric, projection_rank, activation, normalization, short_conv, bias
        As for :class:`FPMamba`.
    alpha_max, norm_eps, weight_norm, solver, adjoint, n_backwards, train_mode
        As for :class:`FPMamba`. ``b`` and ``c`` are always normalised.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> layer = nn.FPMamba2(8, d_state=4, head_dim=4, mixer="kronecker")
    >>> params = layer.init(np.random.default_rng(0))
    >>> layer(params, np.ones((2, 5, 8), np.float32)).shape
    (2, 5, 8)
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        expand: int = 2,
        d_inner: int | None = None,
        head_dim: int = 64,
        mixer: str = "householder",
        rank: int = 1,
        hidden: Sequence[str] = ("mixer", "b", "c"),
        symmetric: bool = False,
        projection_rank: int | None = None,
        activation: str = "silu",
        normalization: str = "spectral",
        gate: str = "both",
        short_conv: int | None = None,
        bias: bool = False,
        channel_skip: bool = False,
        alpha_max: float = 2.0,
        norm_eps: float = 1e-5,
        weight_norm: bool = True,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        n_backwards: int = 0,
        train_mode: bool = False,
    ) -> None:
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
        if head_dim < 1 or self.d_inner % head_dim:
            raise ValueError(
                f"head_dim must divide the {self.d_inner} channels of the state, but is {head_dim}"
            )
        self.head_dim, self.heads, self.channel_skip = head_dim, self.d_inner // head_dim, channel_skip

    @property
    def _mixed(self) -> int:
        """Channels that go through the convolution."""
        return self.d_inner + 2 * self.d_state

    def init(self, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Params:
        """Fresh parameters.

        Linear maps are uniform; step sizes and decay rates as in Mamba-2.
        """
        inner, width = self.d_inner, self.d_inner + self._mixed + self.heads
        params = {"in_proj.weight": uniform(rng, (width, self.d_model), self.d_model, dtype)}
        if self.bias:
            params["in_proj.bias"] = np.zeros(width, dtype)
        params["dt_bias"] = step_bias(rng, self.heads, dtype)
        params["A_log"] = np.log(rng.uniform(1.0, 16.0, self.heads)).astype(dtype)
        params["D"] = np.ones(inner if self.channel_skip else self.heads, dtype)
        params["norm.weight"] = np.ones(inner, dtype)
        return params | self._init_shared(rng, dtype)

    def _step_rows(self) -> int:
        return self.heads

    def _conv(self) -> ShortConv | None:
        return None if self.short_conv is None else ShortConv(self._mixed, self.short_conv)

    def _rates(self, params: Params) -> tuple[Array, Array, Steps, Norm, float | None]:
        norm = Norm(params["norm.weight"], None, self.norm_eps, False)
        skip = params["D"] if self.channel_skip else np.repeat(params["D"], self.head_dim)
        return -np.exp(params["A_log"]), skip, Steps(None, params["dt_bias"]), norm, self.norm_eps

    def _rates_vjp(self, params: Params, bars: MatrixBars) -> Params:
        return {
            "A_log": -np.exp(params["A_log"]) * bars.A,
            "D": bars.skip if self.channel_skip else bars.skip.reshape(self.heads, -1).sum(-1),
            "dt_bias": bars.step_bias,
            "norm.weight": bars.norm_weight,
        }

    def _front(self, params: Params, x: Array, window: Array | None) -> Front:
        inner, size, flat = self.d_inner, self.d_state, rows(backend.operand(x))
        edges = np.cumsum([0, inner, self._mixed, self.heads])
        weight = backend.operand(params["in_proj.weight"])
        parts = [slice(first, last) for first, last in pairwise(edges)]
        pieces = self._in_proj(params, weight, parts, flat, 0)
        z, raw, dt = (piece.reshape(*x.shape[:2], piece.shape[1]) for piece in pieces)
        seen, after, pull_conv = convolved(self._conv(), part(params, "conv1d"), raw, window)
        driven, b, c = (contiguous(piece) for piece in np.split(seen, np.cumsum([inner, size]), axis=-1))

        def pull(driven_bar: Array, z_bar: Array, bars: dict[str, Array]) -> tuple[Params, Array]:
            grads: Params = {}
            seen_bar = backend.joined([driven_bar, bars["b"], bars["c"]], axis=-1)
            if pull_conv is not None:
                found, seen_bar = pull_conv(seen_bar)
                grads |= under(found, "conv1d")
            more, input_bar = self._in_proj_vjp(
                params, weight, parts, flat, (z_bar, seen_bar, bars["lambda"])
            )
            return grads | more, input_bar

        return Front(driven, backend.operand(driven), z, {"b": b, "c": c, "lambda": dt}, after, pull)
