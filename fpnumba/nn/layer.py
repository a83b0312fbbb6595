"""What the fixed-point layers have in common: their options, the mixer's arguments, and how a solve is told of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fpnumba.nn import backend
from fpnumba.nn.activations import check
from fpnumba.nn.backend import contiguous, product, zeros
from fpnumba.nn.basic import Params, Pullback, Record, flat, part, rows
from fpnumba.nn.mixer_maps import FixedMap, make_map
from fpnumba.nn.mixing import Mixer
from fpnumba.nn.projections import Weights
from fpnumba.solve import Adjoint, Solution, Solver, report

Array = NDArray[Any]
State = dict[str, Array]

MIXERS = ("householder", "dplr", "kronecker", "monarch", "dense", "fixed", "mixture")


class FixedPointLayer(ABC):
    """A layer around a fixed point. Its options are those of the same names of :class:`fpnumba.nn.FPRNN`."""

    def __init__(
        self,
        d_model: int,
        *,
        expand: int,
        d_inner: int | None,
        mixer: str,
        rank: int,
        hidden: Sequence[str],
        symmetric: bool,
        projection_rank: int | None,
        activation: str,
        normalization: str,
        short_conv: int | None,
        alpha_max: float,
        norm_eps: float,
        weight_norm: bool,
        solver: Solver | None,
        adjoint: Adjoint | None,
        n_backwards: int,
        train_mode: bool,
    ) -> None:
        if d_model < 1 or expand < 1:
            raise ValueError(f"d_model and expand must be at least 1, not {d_model} and {expand}")
        if mixer not in MIXERS:
            raise ValueError(f"mixer must be one of {', '.join(map(repr, MIXERS))}, not {mixer!r}")
        if rank < 1:
            raise ValueError(f"rank must be at least 1, not {rank}")
        if mixer == "mixture" and rank < 2:
            raise ValueError(f"rank of a mixture is its number of mixers and must be at least 2, not {rank}")
        if not 0 < alpha_max <= 2:
            raise ValueError(f"alpha_max must lie in (0, 2], not {alpha_max}")
        if n_backwards < 0:
            raise ValueError(f"n_backwards must not be negative, not {n_backwards}")
        if projection_rank is not None and projection_rank < 1:
            raise ValueError(f"projection_rank must be at least 1, or None, not {projection_rank}")
        self.d_model, self.d_inner = d_model, expand * d_model if d_inner is None else d_inner
        self.mixer, self.rank, self.symmetric = mixer, rank, symmetric
        # a fixed mixer sees nothing
        self.hidden = tuple(name for name in hidden if mixer != "fixed" or name != "mixer")
        self.projection_rank, self.activation = projection_rank, check(activation)
        self.normalization, self.weight_norm = normalization, weight_norm
        self.short_conv, self.alpha_max, self.norm_eps = short_conv, float(alpha_max), float(norm_eps)
        self.n_backwards, self.train_mode = n_backwards, train_mode
        self.solver = Solver() if solver is None else solver
        self.adjoint = Adjoint() if adjoint is None else adjoint
        self.map = make_map(
            mixer,
            self.d_inner,
            self.d_inner * (2 if "mixer" in self.hidden and not symmetric else 1),
            rank=rank,
            projection_rank=projection_rank,
            activation=activation,
            normalization=normalization,
            alpha_max=self.alpha_max,
            norm_eps=self.norm_eps,
            weight_norm=weight_norm,
        )

    # --- the call ------------------------------------------------------------------------------------------

    def __call__(self, params: Params, x: Array, *, record: Record = None) -> Array:
        """Evaluate the layer.

        Parameters
        ----------
        params : dict of arrays
            From :meth:`init`.
        x : ndarray (..., T, d_model) of float32 or float64
        record : list, optional
            Receives the :class:`fpnumba.Solution`.

        Returns
        -------
        ndarray (..., T, d_model)

        Raises
        ------
        ValueError
            If ``x`` has another width.
        """
        return self._forward(params, x, record, keep=False)[0]

    def vjp(self, params: Params, x: Array, *, record: Record = None) -> tuple[Array, Pullback]:
        """Evaluate the layer, and return the adjoint too.

        Parameters
        ----------
        params, x, record
            As for the call.

        Returns
        -------
        y : ndarray (..., T, d_model)
        pullback : function
            ``pullback(y_bar) -> (params_bar, x_bar)``.
        """
        return self._forward(params, x, record, keep=True)

    @abstractmethod
    def _forward(self, params: Params, x: Array, record: Record, *, keep: bool) -> tuple[Array, Pullback]:
        """Value and pullback."""

    @abstractmethod
    def init(self, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Params:
        """Fresh parameters."""

    @abstractmethod
    def initial_state(self, batch: tuple[int, ...] = (), dtype: DTypeLike = np.float32) -> State:
        """The state before the first step."""

    @abstractmethod
    def step(self, params: Params, x: Array, state: State) -> tuple[Array, State]:
        """One step of decoding."""

    def _check_input(self, x: Array) -> None:
        if x.ndim < 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must have shape (..., T, {self.d_model}), not {x.shape}")

    # --- the mixer's arguments -----------------------------------------------------------------------------

    def _mixer_weights(self, params: Params, dtype: DTypeLike) -> tuple[Weights, Array | None, Mixer | None]:
        """The mixer's linear maps, ``F_h`` of them, and the mixer itself if it is fixed."""
        mixer_params = part(params, "mixer")
        weights = self.map.stack.weights(mixer_params, dtype)
        if isinstance(self.map, FixedMap):
            return weights, None, ("fixed", (self.map.matrix(mixer_params),))
        if "mixer" not in self.hidden:
            return weights, None, None
        return weights, contiguous(weights.first[:, -self.d_inner :]), None

    def _mixer_base(
        self, weights: Weights, x: Array, seen: Array | None = None, *, said: bool = False
    ) -> Array:
        """``F_x x + bias``; `seen` is `x` as products take it, and with `said` the result is alike."""
        if isinstance(self.map, FixedMap):
            return zeros((*x.shape[:2], 0), x)
        flat_x, width = rows(x if seen is None else seen), self.d_inner
        first = backend.operand(weights.first)[:, :width]
        base = backend.empty((len(flat_x), len(first)), flat_x if said else x)
        product(flat_x, first, transposed=(False, True), out=base)
        weights.add_bias(base)
        return base.reshape(*x.shape[:2], base.shape[1])

    def _mixer_arguments_vjp(
        self,
        params: Params,
        x: Array,
        weights: Weights,
        base_bar: Array,
        feedback_bar: Array | None,
        total: Weights,
        fixed_bar: Array | None,
        x_bar: Array | None = None,
        seen: Array | None = None,
    ) -> tuple[Params, Array]:
        """Cotangents of the mixer's parameters and of ``x``, added to `x_bar`; those of second factors are in `total`
        already. `seen` is ``x`` as products take it."""
        mixer_params = part(params, "mixer")
        if isinstance(self.map, FixedMap):
            q_bar = zeros((self.d_inner, self.d_inner), x) if fixed_bar is None else fixed_bar
            return self.map.matrix_vjp(mixer_params, q_bar), np.zeros_like(x) if x_bar is None else x_bar
        width, flat_bar = self.d_inner, flat(base_bar)
        if flat_bar.dtype == x.dtype:
            flat_bar = backend.operand(flat_bar)
        flat_x, first = rows(x if seen is None else seen), backend.operand(weights.first)[:, :width]
        product(flat_bar, flat_x, transposed=(True, False), out=total.first[:, :width], add=True)
        if feedback_bar is not None:
            total.first[:, -width:] += feedback_bar
        weights.bias_vjp(flat_bar, total)
        into = None if x_bar is None else rows(x_bar)
        found = product(flat_bar, first, out=into, add=into is not None).reshape(x.shape)
        return self.map.stack.weights_vjp(mixer_params, total), found

    # --- solving -------------------------------------------------------------------------------------------

    def _solver(self) -> Solver:
        """The solver of this mode: the published evaluation waits for every sequence."""
        if self.solver.criterion == "published" and not self.train_mode:
            return replace(self.solver, quantile=1.0, max_iter=1000)
        return self.solver

    def _tell(self, solution: Solution, record: Record, lead: tuple[int, ...]) -> None:
        """Append to the record, and report what did not converge."""
        solver = self._solver()
        if record is not None or solver.on_failure != "ignore":
            solution = solution.reshaped(lead)
            if record is not None:
                record.append(solution)
            report(type(self).__name__, solution, solver.on_failure, quantile=solver.quantile)
