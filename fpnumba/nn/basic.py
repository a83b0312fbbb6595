"""The plain layers: linear maps, embeddings, norms, a gated unit, a short convolution.

Every layer is a small object without arrays in it. ``init(rng)`` makes the parameters, a flat dict of arrays
with dotted names; calling the layer with them evaluates it; ``vjp`` also returns the hand-derived adjoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fpnumba.nn import activations, backend
from fpnumba.nn.backend import column_sums, contiguous, product

Array = NDArray[Any]
Params = dict[str, Array]
Record = list[Any] | None
Pullback = Callable[[Array], tuple[Params, Array]]


def part(params: Params, prefix: str) -> Params:
    """The parameters below ``prefix.``, without it."""
    start = len(prefix) + 1
    return {name[start:]: value for name, value in params.items() if name.startswith(prefix + ".")}


def under(params: Params, prefix: str) -> Params:
    """The same parameters with ``prefix.`` before every name."""
    return {f"{prefix}.{name}": value for name, value in params.items()}


def uniform(rng: np.random.Generator, shape: tuple[int, ...], fan_in: int, dtype: DTypeLike) -> Array:
    """Uniform in ``(-1/sqrt(fan_in), 1/sqrt(fan_in))``; drawn in float64, so every dtype sees the same
    numbers."""
    bound = 1.0 / math.sqrt(max(fan_in, 1))
    return rng.uniform(-bound, bound, shape).astype(dtype)


def rows(x: Array) -> Array:
    """``x`` with all leading axes made one."""
    return contiguous(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def flat(x: Array) -> Array:
    """The same of an array whose rows may lie apart, as :func:`fpnumba.nn.backend.product` takes them."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


class Linear:
    """``y = x W^T + b``.

    Parameters
    ----------
    inputs, outputs : int
    bias : bool, default True

    Notes
    -----
    Parameters: ``weight (outputs, inputs)`` and ``bias (outputs,)``.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> layer = nn.Linear(3, 2)
    >>> params = layer.init(np.random.default_rng(0))
    >>> layer(params, np.ones((4, 3), np.float32)).shape
    (4, 2)
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        self.inputs, self.outputs, self.bias = inputs, outputs, bias

    def init(self, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Params:
        """Uniform weights, zero bias."""
        params = {"weight": uniform(rng, (self.outputs, self.inputs), self.inputs, dtype)}
        if self.bias:
            params["bias"] = np.zeros(self.outputs, dtype)
        return params

    def __call__(self, params: Params, x: Array, *, record: Record = None) -> Array:
        """``x (..., inputs)`` to ``(..., outputs)``."""
        y = product(rows(x), params["weight"], transposed=(False, True))
        if self.bias:
            y += params["bias"]
        return y.reshape(*x.shape[:-1], self.outputs)

    def vjp(self, params: Params, x: Array, *, record: Record = None) -> tuple[Array, Pullback]:
        """Value, and ``pullback(ybar) -> (params_bar, x_bar)``."""

        def pullback(ybar: Array) -> tuple[Params, Array]:
            flat = rows(ybar)
            grads = {"weight": product(flat, rows(x), transposed=(True, False))}
            if self.bias:
                grads["bias"] = column_sums(flat)
            return grads, product(flat, params["weight"]).reshape(x.shape)

        return self(params, x), pullback


class Embedding:
    """A row of a table for every token. Parameter: ``weight (vocab, dim)``.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> layer = nn.Embedding(5, 3)
    >>> layer(layer.init(np.random.default_rng(0)), np.array([[0, 4]])).shape
    (1, 2, 3)
    """

    def __init__(self, vocab: int, dim: int) -> None:
        self.vocab, self.dim = vocab, dim

    def init(self, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Params:
        """Standard normal rows."""
        return {"weight": rng.standard_normal((self.vocab, self.dim)).astype(dtype)}

    def check(self, tokens: Array) -> None:
        """Raise for tokens that are not integers, or not in the vocabulary."""
        if not np.issubdtype(tokens.dtype, np.integer):
            raise TypeError(f"tokens must be integers, not {tokens.dtype}")
        if backend.recorded(tokens):
            return
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.vocab):
            raise ValueError(
                f"tokens must lie in [0, {self.vocab}), but go from {tokens.min()} to {tokens.max()}"
            )

    def __call__(self, params: Params, tokens: Array, *, record: Record = None) -> Array:
        """``tokens (...)`` of integers to ``(..., dim)``."""
        self.check(tokens)
        out: Array = params["weight"][tokens]
        return out

    def vjp(
        self, params: Params, tokens: Array, *, record: Record = None
    ) -> tuple[Array, Callable[[Array], tuple[Params, None]]]:
        """Value and pullback; tokens have no cotangent."""

        def pullback(ybar: Array) -> tuple[Params, None]:
            flat = rows(ybar)
            found = backend.kernels(flat).scatter_rows(contiguous(tokens).reshape(-1), flat, self.vocab)
            return {"weight": found}, None

        return self(params, tokens), pullback


class RMSNorm:
    """``y = weight * x / sqrt(mean(x^2) + eps)`` over the last axis. Parameter: ``weight (dim,)``.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> layer = nn.RMSNorm(2)
    >>> layer(layer.init(np.random.default_rng(0), np.float64), np.array([[3.0, 3.0]])).round(3)
    array([[1., 1.]])
    """

    def __init__(self, dim: int, *, eps: float = 1e-5) -> None:
        self.dim, self.eps = dim, eps

    def init(self, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Params:
        """Ones."""
        return {"weight": np.ones(self.dim, dtype)}

    def __call__(self, params: Params, x: Array, *, record: Record = None) -> Array:
        """``x (..., dim)`` to the same shape."""
        return self.vjp(params, x)[0]

    def vjp(self, params: Params, x: Array, *, record: Record = None) -> tuple[Array, Pullback]:
        """Value and pullback."""
        flat, weight = rows(x), params["weight"]
        loops = backend.kernels(flat)
        y, scale = loops.rms_norm(flat, weight, self.eps)

        def pullback(ybar: Array) -> tuple[Params, Array]:
            xbar, weight_bar = loops.rms_norm_vjp(flat, weight, scale, rows(ybar))
            return {"weight": weight_bar}, xbar.reshape(x.shape)

        return y.reshape(x.shape), pullback


class LayerNorm:
    """``y = weight * (x - mean) / sqrt(var + eps) + bias`` over the last axis.

    Parameters of the layer: ``weight (dim,)``, ``bias (dim,)``.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> layer = nn.LayerNorm(2)
    >>> layer(layer.init(np.random.default_rng(0), np.float64), np.array([[1.0, 3.0]])).round(3)
    array([[-1.,  1.]])
    """

    def __init__(self, dim: int, *, eps: float = 1e-5) -> None:
        self.dim, self.eps = dim, eps

    def init(self, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Params:
        """Weight one, bias zero."""
        return {"weight": np.ones(self.dim, dtype), "bias": np.zeros(self.dim, dtype)}

    def __call__(self, params: Params, x: Array, *, record: Record = None) -> Array:
        """``x (..., dim)`` to the same shape."""
        return self.vjp(params, x)[0]

    def vjp(self, params: Params, x: Array, *, record: Record = None) -> tuple[Array, Pullback]:
        """Value and pullback."""
        centred = x - x.mean(-1, keepdims=True)
        scale = 1.0 / np.sqrt((centred * centred).mean(-1, keepdims=True) + x.dtype.type(self.eps))
        normal: Array = centred * scale
        weight = params["weight"]

        def pullback(ybar: Array) -> tuple[Params, Array]:
            inner = ybar * weight
            xbar = scale * (
                inner - inner.mean(-1, keepdims=True) - normal * (inner * normal).mean(-1, keepdims=True)
            )
            grads = {n: column_sums(rows(a)) for n, a in (("weight", ybar * normal), ("bias", ybar))}
            return grads, xbar

        return normal * weight + params["bias"], pullback


class SwiGLU:
    """The gated unit ``y = (silu(x W_gate^T) * (x W_up^T)) W_down^T``.

    Parameters
    ----------
    dim : int
    hidden : int, optional
        Width in between; ``2 * dim`` unless given.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> layer = nn.SwiGLU(4)
    >>> layer(layer.init(np.random.default_rng(0)), np.ones((2, 4), np.float32)).shape
    (2, 4)
    """

    def __init__(self, dim: int, hidden: int | None = None) -> None:
        self.dim, self.hidden = dim, 2 * dim if hidden is None else hidden

    def init(self, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Params:
        """``gate.weight``, ``up.weight (hidden, dim)`` and ``down.weight (dim, hidden)``."""
        return {
            "gate.weight": uniform(rng, (self.hidden, self.dim), self.dim, dtype),
            "up.weight": uniform(rng, (self.hidden, self.dim), self.dim, dtype),
            "down.weight": uniform(rng, (self.dim, self.hidden), self.hidden, dtype),
        }

    def __call__(self, params: Params, x: Array, *, record: Record = None) -> Array:
        """``x (..., dim)`` to the same shape."""
        return self.vjp(params, x)[0]

    def vjp(self, params: Params, x: Array, *, record: Record = None) -> tuple[Array, Pullback]:
        """Value and pullback."""
        flat = rows(x)
        w_gate, w_up, w_down = (params[f"{name}.weight"] for name in ("gate", "up", "down"))
        gate, up = (product(flat, w, transposed=(False, True)) for w in (w_gate, w_up))
        inner = activations.gated(gate, up)

        def pullback(ybar: Array) -> tuple[Params, Array]:
            ybar = rows(ybar)
            gate_bar, up_bar = activations.gated_vjp(gate, up, product(ybar, w_down))
            grads = {
                "gate.weight": product(gate_bar, flat, transposed=(True, False)),
                "up.weight": product(up_bar, flat, transposed=(True, False)),
                "down.weight": product(ybar, inner, transposed=(True, False)),
            }
            return grads, (product(gate_bar, w_gate) + product(up_bar, w_up)).reshape(x.shape)

        return product(inner, w_down, transposed=(False, True)).reshape(x.shape), pullback


class ShortConv:
    """Depthwise causal convolution over time, then an activation.

    ``y_t = activation(bias + sum_{k=0..W-1} w_k x_{t-(W-1)+k})``, zeros before the first step.

    Parameters
    ----------
    channels : int
    width : int, default 4
    activation : str, default "silu"

    Notes
    -----
    Parameters: ``weight (channels, 1, width)``, ``bias (channels,)``.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> layer = nn.ShortConv(3)
    >>> params = layer.init(np.random.default_rng(0))
    >>> layer(params, np.ones((1, 5, 3), np.float32)).shape
    (1, 5, 3)
    """

    def __init__(self, channels: int, width: int = 4, *, activation: str = "silu") -> None:
        if width < 1:
            raise ValueError(f"width must be at least 1, not {width}")
        self.channels, self.width, self.activation = channels, width, activations.check(activation)

    def init(self, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Params:
        """Uniform weights and biases."""
        return {
            "weight": uniform(rng, (self.channels, 1, self.width), self.width, dtype),
            "bias": uniform(rng, (self.channels,), self.width, dtype),
        }

    def __call__(self, params: Params, x: Array, *, record: Record = None) -> Array:
        """``x (..., T, channels)`` to the same shape."""
        return self.vjp(params, x)[0]

    def vjp(
        self, params: Params, x: Array, *, record: Record = None, past: Array | None = None
    ) -> tuple[Array, Pullback]:
        """Value and pullback.

        Parameters
        ----------
        params : dict of arrays
        x : ndarray (..., T, channels)
        record
            Not looked at.
        past : ndarray (..., width - 1, channels), optional
            What stands before the first step, a constant of the gradient; zeros if left out.
        """
        flat = contiguous(x).reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
        taps, loops = contiguous(params["weight"][:, 0].T), backend.kernels(flat)
        before = None if past is None else contiguous(past).reshape(len(flat), *past.shape[-2:])
        given = flat, taps, contiguous(params["bias"]), self.activation, before

        def pullback(ybar: Array) -> tuple[Params, Array]:
            xbar, taps_bar, bias_bar = loops.conv_vjp(*given, contiguous(ybar).reshape(flat.shape))
            grads = {"weight": contiguous(taps_bar.T)[:, None], "bias": bias_bar}
            return grads, xbar.reshape(x.shape)

        return loops.conv(*given).reshape(x.shape), pullback

    def initial_state(self, batch: tuple[int, ...], dtype: DTypeLike = np.float32) -> Array:
        """The zeros before the first step: ``(*batch, width - 1, channels)``."""
        return np.zeros((*batch, self.width - 1, self.channels), dtype)

    def step(self, params: Params, x: Array, state: Array) -> tuple[Array, Array]:
        """One step: ``x (..., channels)`` and the window of earlier inputs, to the output and the next
        window."""
        window = np.concatenate([state, x[..., None, :]], axis=-2)
        inner = (window * params["weight"][:, 0].T).sum(-2) + params["bias"]
        return activations.activate(self.activation, inner), window[..., 1:, :]
