"""A whole model: tokens in, logits out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fpnumba.nn.basic import Array, Embedding, Linear, Params, Pullback, Record, RMSNorm, SwiGLU, part, under
from fpnumba.nn.fpmamba import FPMamba, FPMamba2
from fpnumba.nn.fprnn import FPRNN
from fpnumba.nn.layer import FixedPointLayer
from fpnumba.nn.lstm import LSTM
from fpnumba.nn.mamba import Mamba
from fpnumba.nn.plain import PlainLayer
from fpnumba.solve import Adjoint, Solver

LAYERS: dict[str, Any] = {
    "FPRNN": FPRNN,
    "FPMamba": FPMamba,
    "FPMamba2": FPMamba2,
    "Mamba": Mamba,
    "LSTM": LSTM,
}
# Those that do not iterate: they have no solver and add nothing to a record.
PLAIN = ("Mamba", "LSTM")
ModelPullback = Callable[[Array], tuple[Params, None]]


class Model:
    """Embedding, blocks of normalised fixed-point RNNs with residuals, norm, readout.

    Each block is ``x + FPRNN(RMSNorm(x))``, or another recurrent layer, and with ``mlp``
    also ``x + SwiGLU(RMSNorm(x))``.

    Parameters
    ----------
    vocab : int
        Tokens.
    vocab_out : int, optional
        Classes of the readout; ``vocab`` unless given.
    d_model : int
    n_layers : int, default 1
    layer : mapping, optional
        Options of the layer, and its ``kind``: "FPRNN" (the default), "FPMamba" or "FPMamba2", or, to compare with,
        "Mamba" or "LSTM"; ``solver`` and ``adjoint`` of a fixed-point layer may be mappings of their options.
    mlp : int, optional
        Hidden width of the gated units; None for blocks without one.
    norm_eps : float

    Notes
    -----
    Parameters: ``embedding.weight``, ``layers.I.norm.weight``, ``layers.I.rnn.*``,
    ``layers.I.mlp_norm.weight``, ``layers.I.mlp.*``, ``norm.weight``, ``readout.weight``, ``readout.bias``.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> model = nn.Model(6, d_model=16, layer={"mixer": "householder", "rank": 2})
    >>> params = model.init(np.random.default_rng(0))
    >>> logits, pullback = model.vjp(params, np.zeros((4, 7), int))
    >>> loss, logits_bar = nn.cross_entropy_vjp(logits, np.ones((4, 7), int))
    >>> params_bar, _ = pullback(logits_bar)
    >>> sorted(params_bar) == sorted(params)
    True
    """

    def __init__(
        self,
        vocab: int,
        vocab_out: int | None = None,
        *,
        d_model: int,
        n_layers: int = 1,
        layer: Mapping[str, Any] | None = None,
        mlp: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        for name, value in (("vocab", vocab), ("d_model", d_model), ("n_layers", n_layers)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.vocab, self.vocab_out = vocab, vocab if vocab_out is None else vocab_out
        self.d_model, self.n_layers, self.mlp, self.norm_eps = d_model, n_layers, mlp, norm_eps
        options = dict(layer or {})
        for name, cls in (("solver", Solver), ("adjoint", Adjoint)):
            if isinstance(options.get(name), Mapping):
                options[name] = cls(**options[name])
        self.layer_options = options
        kind = options.get("kind", "FPRNN")
        if kind not in LAYERS:
            raise ValueError(f"kind of the layer must be one of {', '.join(map(repr, LAYERS))}, not {kind!r}")
        self.embedding = Embedding(vocab, d_model)
        self.rnn: FixedPointLayer | PlainLayer = LAYERS[kind](
            d_model, **{name: value for name, value in options.items() if name != "kind"}
        )
        self.norm = RMSNorm(d_model, eps=norm_eps)
        self.unit = None if mlp is None else SwiGLU(d_model, mlp)
        self.readout = Linear(d_model, self.vocab_out)

    @property
    def iterates(self) -> bool:
        """Whether its layers solve a fixed point."""
        return isinstance(self.rnn, FixedPointLayer)

    def config(self) -> dict[str, Any]:
        """The options as plain numbers, strings, lists and dicts, fit for JSON; see :meth:`from_config`."""
        options = dict(self.layer_options)
        for name in ("solver", "adjoint"):
            if options.get(name) is not None:
                options[name] = {k: v for k, v in asdict(options[name]).items() if k != "_"}
        if "hidden" in options:
            options["hidden"] = list(options["hidden"])
        return {
            "vocab": self.vocab,
            "vocab_out": self.vocab_out,
            "d_model": self.d_model,
            "n_layers": self.n_layers,
            "layer": options,
            "mlp": self.mlp,
            "norm_eps": self.norm_eps,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Model:
        """The model of a :meth:`config`."""
        return cls(**config)

    def init(self, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Params:
        """Fresh parameters."""
        params = under(self.embedding.init(rng, dtype), "embedding")
        for i in range(self.n_layers):
            params |= under(self.norm.init(rng, dtype), f"layers.{i}.norm")
            params |= under(self.rnn.init(rng, dtype), f"layers.{i}.rnn")
            if self.unit is not None:
                params |= under(self.norm.init(rng, dtype), f"layers.{i}.mlp_norm")
                params |= under(self.unit.init(rng, dtype), f"layers.{i}.mlp")
        params |= under(self.norm.init(rng, dtype), "norm")
        return params | under(self.readout.init(rng, dtype), "readout")

    def _branches(self) -> list[tuple[str, str, FixedPointLayer | PlainLayer | SwiGLU]]:
        """Names of norm and layer, and the layer, of every residual branch in order."""
        branches: list[tuple[str, str, FixedPointLayer | PlainLayer | SwiGLU]] = []
        for i in range(self.n_layers):
            branches.append((f"layers.{i}.norm", f"layers.{i}.rnn", self.rnn))
            if self.unit is not None:
                branches.append((f"layers.{i}.mlp_norm", f"layers.{i}.mlp", self.unit))
        return branches

    def __call__(self, params: Params, tokens: Array, *, record: Record = None) -> Array:
        """Logits.

        Parameters
        ----------
        params : dict of arrays
        tokens : ndarray of integers (..., T)
        record : list, optional
            Receives the :class:`fpnumba.Solution` of every fixed-point layer.

        Returns
        -------
        ndarray (..., T, vocab_out)
        """
        x = self.embedding(part(params, "embedding"), tokens)
        for norm, name, layer in self._branches():
            x = x + layer(part(params, name), self.norm(part(params, norm), x), record=record)
        return self.readout(part(params, "readout"), self.norm(part(params, "norm"), x))

    def vjp(self, params: Params, tokens: Array, *, record: Record = None) -> tuple[Array, ModelPullback]:
        """Logits, and ``pullback(logits_bar) -> (params_bar, None)``: tokens have no cotangent."""
        x, pull_embedding = self.embedding.vjp(part(params, "embedding"), tokens)
        pulls: list[tuple[str, Pullback, str, Pullback]] = []
        for norm, name, layer in self._branches():
            normed, pull_norm = self.norm.vjp(part(params, norm), x)
            y, pull_layer = layer.vjp(part(params, name), normed, record=record)
            pulls.append((norm, pull_norm, name, pull_layer))
            x = x + y
        normed, pull_norm = self.norm.vjp(part(params, "norm"), x)
        logits, pull_readout = self.readout.vjp(part(params, "readout"), normed)
        pulls.append(("norm", pull_norm, "readout", pull_readout))

        def pullback(logits_bar: Array) -> tuple[Params, None]:
            grads: Params = {}
            bar, residual = logits_bar, None
            for norm, pull_norm, name, pull_layer in reversed(pulls):
                found, inner = pull_layer(bar)
                grads |= under(found, name)
                found, inner = pull_norm(inner)
                grads |= under(found, norm)
                bar = inner if residual is None else residual + inner
                residual = bar
            grads |= under(pull_embedding(bar)[0], "embedding")
            return {name: grads[name] for name in params}, None

        return logits, pullback

    def initial_state(
        self, batch: tuple[int, ...] = (), dtype: DTypeLike = np.float32
    ) -> list[dict[str, Array]]:
        """The state before the first token: one entry for each layer."""
        return [self.rnn.initial_state(batch, dtype) for _ in range(self.n_layers)]

    def step(
        self, params: Params, tokens: Array, state: list[dict[str, Array]]
    ) -> tuple[Array, list[dict[str, Array]]]:
        """One token of each sequence.

        Parameters
        ----------
        params : dict of arrays
        tokens : ndarray of integers (...)
        state : list
            From :meth:`initial_state` or the step before.

        Returns
        -------
        logits : ndarray (..., vocab_out)
        state : list
        """
        x = self.embedding(part(params, "embedding"), np.asarray(tokens))
        states = iter(state)
        after = []
        for norm, name, layer in self._branches():
            normed = self.norm(part(params, norm), x)
            if isinstance(layer, SwiGLU):
                y = layer(part(params, name), normed)
            else:
                y, now = layer.step(part(params, name), normed, next(states))
                after.append(now)
            x = x + y
        return self.readout(part(params, "readout"), self.norm(part(params, "norm"), x)), after
