"""The LSTM, without a fixed point: what a dense recurrence that runs step by step is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from fpnumba.nn import backend
from fpnumba.nn.backend import column_sums, contiguous, empty, product, zeros
from fpnumba.nn.basic import Params, Pullback, rows, uniform
from fpnumba.nn.plain import Array, PlainLayer, State


class LSTM(PlainLayer):
    """Long short-term memory with a forget gate (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

        [i; f; g; o]_t = W_ih x_t + W_hh h_{t-1} + bias,
        c_t = sigmoid(f_t) * c_{t-1} + sigmoid(i_t) * tanh(g_t),
        h_t = sigmoid(o_t) * tanh(c_t),

    and ``output = h``, or ``W_out h`` where the state has a width of its own.

    Parameters
    ----------
    d_model : int
        Width of input and output.
    d_inner : int, optional
        Width of the state; `d_model`, and no ``W_out``, unless given.

    Notes
    -----
    Parameters: ``weight_ih (4 d_inner, d_model)``, ``weight_hh (4 d_inner, d_inner)``, ``bias (4 d_inner,)``, the gates
    in the order i, f, g, o, and ``out_proj.weight (d_model, d_inner)`` if `d_inner` is given; all of them float32 or
    all float64, like the input. Each step is a product of matrices and one pass over its gates.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> layer = nn.LSTM(8)
    >>> params = layer.init(np.random.default_rng(0))
    >>> y, pullback = layer.vjp(params, np.ones((2, 5, 8), np.float32))
    >>> params_bar, x_bar = pullback(np.ones_like(y))
    >>> y.shape, y.dtype, x_bar.shape
    ((2, 5, 8), dtype('float32'), (2, 5, 8))
    """

    def __init__(self, d_model: int, *, d_inner: int | None = None) -> None:
        self.d_model, self.projected = d_model, d_inner is not None
        self.d_inner = d_model if d_inner is None else d_inner
        for name in ("d_model", "d_inner"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def init(self, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Params:
        """Uniform weights; biases zero, those of the forget gates one, so that a fresh layer remembers."""
        inner = self.d_inner
        params = {
            "weight_ih": uniform(rng, (4 * inner, self.d_model), inner, dtype),
            "weight_hh": uniform(rng, (4 * inner, inner), inner, dtype),
            "bias": np.repeat(np.array([0, 1, 0, 0], dtype), inner),
        }
        if self.projected:
            params["out_proj.weight"] = uniform(rng, (self.d_model, inner), inner, dtype)
        return params

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {"h": (self.d_inner,), "c": (self.d_inner,)}

    def _whole(self, params: Params, x: Array, state: State) -> tuple[Array, Pullback, State]:
        batch, steps, _ = x.shape
        inner, loops = self.d_inner, backend.kernels(x)
        w_in, w_state = params["weight_ih"], params["weight_hh"]
        # time first: what a step reads and writes lies together
        flat = rows(x.swapaxes(0, 1))
        gates = product(flat, w_in, transposed=(False, True)) + params["bias"]
        gates = gates.reshape(steps, batch, 4 * inner)
        h, c = (empty((steps + 1, batch, inner), x) for _ in range(2))
        h[0], c[0] = state["h"], state["c"]
        for t in range(steps):
            fed = product(h[t], w_state, transposed=(False, True))
            loops.lstm_step(gates[t], fed, c[t], c[t + 1], h[t + 1])
        out = contiguous(h[1:].swapaxes(0, 1))
        if self.projected:
            out = product(rows(out), params["out_proj.weight"], transposed=(False, True))

        def pullback(out_bar: Array) -> tuple[Params, Array]:
            grads: Params = {}
            h_bar = rows(out_bar.reshape(batch, steps, self.d_model).swapaxes(0, 1))
            if self.projected:
                seen = h[1:].reshape(-1, inner)
                grads["out_proj.weight"] = product(h_bar, seen, transposed=(True, False))
                h_bar = product(h_bar, params["out_proj.weight"])
            h_bar = h_bar.reshape(steps, batch, inner)
            raw_bar, c_bar, fed_bar = (
                empty(gates.shape, x),
                zeros((batch, inner), x),
                zeros((batch, inner), x),
            )
            for t in reversed(range(steps)):
                loops.lstm_step_vjp(gates[t], c[t], c[t + 1], h_bar[t], fed_bar, c_bar, raw_bar[t])
                fed_bar = product(raw_bar[t], w_state)
            flat_bar = raw_bar.reshape(-1, 4 * inner)
            grads["bias"] = column_sums(flat_bar)
            grads["weight_ih"] = product(flat_bar, flat, transposed=(True, False))
            grads["weight_hh"] = product(flat_bar, h[:-1].reshape(-1, inner), transposed=(True, False))
            x_bar = product(flat_bar, w_in).reshape(steps, batch, self.d_model)
            return grads, contiguous(x_bar.swapaxes(0, 1))

        return out.reshape(x.shape), pullback, {"h": h[-1], "c": c[-1]}
