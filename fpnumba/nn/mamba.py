"""The Mamba layer, without a fixed point: what FP-Mamba is compared with."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

from fpnumba.nn import backend
from fpnumba.nn.activations import gated, gated_vjp
from fpnumba.nn.backend import column_sums, contiguous, product
from fpnumba.nn.basic import Params, Pullback, ShortConv, part, rows, under, uniform
from fpnumba.nn.matrix_layer import convolved, step_bias
from fpnumba.nn.matrix_state import Steps
from fpnumba.nn.plain import Array, PlainLayer, State


class Mamba(PlainLayer):
    """Mamba: a diagonal recurrence whose parameters depend on the input (Gu and Dao, arXiv 2312.00752, section 3).

    ``[x; z] = W_in input``, ``x`` through a short convolution and SiLU, ``[p; B; C] = W_x x``, then

        delta_t = softplus(W_dt p_t + bias),                            A = -exp(A_log),
        H_t = exp(delta_t A) * H_{t-1} + (delta_t x_t) B_t^T,
        y_t = H_t C_t + D * x_t,

    and ``output = W_out (silu(z_t) * y_t)``. The scan is that of section 1 of docs/mathematics.md.

    Parameters
    ----------
    d_model : int
        Width of input and output.
    d_state : int, default 16
        Numbers of state for each channel.
    expand : int, default 2
        Channels of the state as a multiple of `d_model`.
    d_inner : int, optional
        Channels of the state, if it is no multiple.
    dt_rank : int, optional
        Numbers from which ``delta`` is made; a sixteenth of ``d_model`` unless given.
    short_conv : int or None, default 4
        Width of the short causal convolution; None for none.
    bias : bool, default False
        Of the projections of input and output.

    Notes
    -----
    Parameters have the names of the published implementation: ``in_proj.weight (2 d_inner, d_model)``,
    ``conv1d.weight (d_inner, 1, short_conv)``, ``conv1d.bias``, ``x_proj.weight (dt_rank + 2 d_state, d_inner)``,
    ``dt_proj.weight (d_inner, dt_rank)``, ``dt_proj.bias``, ``A_log (d_inner, d_state)``, ``D (d_inner,)`` and
    ``out_proj.weight (d_model, d_inner)``; all of them float32 or all float64, like the input.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> layer = nn.Mamba(8, d_state=4)
    >>> params = layer.init(np.random.default_rng(0))
    >>> y, pullback = layer.vjp(params, np.ones((2, 5, 8), np.float32))
    >>> params_bar, x_bar = pullback(np.ones_like(y))
    >>> y.shape, y.dtype, x_bar.shape
    ((2, 5, 8), dtype('float32'), (2, 5, 8))
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        expand: int = 2,
        d_inner: int | None = None,
        dt_rank: int | None = None,
        short_conv: int | None = 4,
        bias: bool = False,
    ) -> None:
        self.d_model, self.d_state, self.bias = d_model, d_state, bias
        self.d_inner = expand * d_model if d_inner is None else d_inner
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        for name in ("d_model", "d_state", "d_inner", "dt_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        self.conv = None if short_conv is None else ShortConv(self.d_inner, short_conv)

    def init(self, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Params:
        """Fresh parameters, as published: ``A`` from -1 to ``-d_state``, step sizes between 0.001 and 0.1."""
        inner, size, rank = self.d_inner, self.d_state, self.dt_rank
        params = {"in_proj.weight": uniform(rng, (2 * inner, self.d_model), self.d_model, dtype)}
        if self.conv is not None:
            params |= under(self.conv.init(rng, dtype), "conv1d")
        params["x_proj.weight"] = uniform(rng, (rank + 2 * size, inner), inner, dtype)
        params["dt_proj.weight"] = uniform(rng, (inner, rank), rank, dtype)
        params["dt_proj.bias"] = step_bias(rng, inner, dtype)
        params["A_log"] = np.log(np.broadcast_to(np.arange(1.0, size + 1), (inner, size))).astype(dtype)
        params["D"] = np.ones(inner, dtype)
        params["out_proj.weight"] = uniform(rng, (self.d_model, inner), inner, dtype)
        if self.bias:
            params["in_proj.bias"] = np.zeros(2 * inner, dtype)
            params["out_proj.bias"] = np.zeros(self.d_model, dtype)
        return params

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"H": (self.d_inner, self.d_state)}
        if self.conv is not None:
            shapes["conv"] = (self.conv.width - 1, self.d_inner)
        return shapes

    def _whole(self, params: Params, x: Array, state: State) -> tuple[Array, Pullback, State]:
        inner, flat, scan = self.d_inner, rows(x), backend.room(x).scan
        shape = (*x.shape[:2], inner)
        xz = product(flat, params["in_proj.weight"], transposed=(False, True))
        if self.bias:
            xz = xz + params["in_proj.bias"]
        raw, z = (contiguous(half).reshape(shape) for half in (xz[:, :inner], xz[:, inner:]))
        seen, window, pull_conv = convolved(self.conv, part(params, "conv1d"), raw, state.get("conv"))
        projected = product(rows(seen), params["x_proj.weight"], transposed=(False, True))
        cuts = np.cumsum([self.dt_rank, self.d_state])
        p, B, C = (contiguous(a).reshape(*x.shape[:2], a.shape[1]) for a in np.split(projected, cuts, axis=1))
        sizes = Steps(params["dt_proj.weight"], params["dt_proj.bias"])
        delta = sizes.delta(p)
        A = -np.exp(params["A_log"])
        given = (seen, delta, A, B, C, params["D"], state["H"])
        y, last = scan.selective_scan(*given)
        opened = rows(gated(z, y))
        out = product(opened, params["out_proj.weight"], transposed=(False, True))
        if self.bias:
            out = out + params["out_proj.bias"]

        def pullback(out_bar: Array) -> tuple[Params, Array]:
            out_bar = rows(out_bar)
            grads: Params = {"out_proj.weight": product(out_bar, opened, transposed=(True, False))}
            opened_bar = product(out_bar, params["out_proj.weight"]).reshape(shape)
            z_bar, y_bar = gated_vjp(z, y, opened_bar)
            seen_bar, delta_bar, A_bar, B_bar, C_bar, grads["D"], _ = scan.selective_scan_vjp(
                *given, y_bar, None
            )
            grads["A_log"] = A * A_bar
            step_bar, p_bar = sizes.pull(delta, delta_bar)
            grads["dt_proj.bias"] = column_sums(rows(step_bar))
            grads["dt_proj.weight"] = product(rows(step_bar), rows(p), transposed=(True, False))
            projected_bar = backend.joined([rows(a) for a in (p_bar, B_bar, C_bar)], axis=1)
            grads["x_proj.weight"] = product(projected_bar, rows(seen), transposed=(True, False))
            seen_bar = seen_bar + product(projected_bar, params["x_proj.weight"]).reshape(shape)
            if pull_conv is not None:
                found, seen_bar = pull_conv(seen_bar)
                grads |= under(found, "conv1d")
            xz_bar = backend.joined([rows(seen_bar), rows(z_bar)], axis=1)
            grads["in_proj.weight"] = product(xz_bar, flat, transposed=(True, False))
            if self.bias:
                grads["in_proj.bias"], grads["out_proj.bias"] = column_sums(xz_bar), column_sums(out_bar)
            return grads, product(xz_bar, params["in_proj.weight"])

        after = {"H": last} if window is None else {"H": last, "conv": window}
        return out, pullback, after
