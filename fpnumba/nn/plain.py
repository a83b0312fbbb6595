"""What the layers without a fixed point share: Mamba and the LSTM, to compare with."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fpnumba.nn import backend
from fpnumba.nn.backend import contiguous
from fpnumba.nn.basic import Params, Pullback, Record

Array = NDArray[Any]
State = dict[str, Array]


class PlainLayer(ABC):
    """A recurrent layer that does not iterate, so that it adds nothing to a ``record``."""

    d_model: int

    @abstractmethod
    def init(self, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Params:
        """Fresh parameters."""

    @abstractmethod
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the state of one sequence."""

    @abstractmethod
    def _whole(self, params: Params, x: Array, state: State) -> tuple[Array, Pullback, State]:
        """Value, pullback and last state of ``x (B, T, d_model)``; the state has the axis of sequences, too."""

    def __call__(self, params: Params, x: Array, *, record: Record = None) -> Array:
        """Evaluate the layer.

        Parameters
        ----------
        params : dict of arrays
            From :meth:`init`.
        x : ndarray (..., T, d_model) of float32 or float64
        record : list, optional
            Left as it is.

        Returns
        -------
        ndarray (..., T, d_model)

        Raises
        ------
        ValueError
            If ``x`` has another width.
        """
        return self.vjp(params, x)[0]

    def vjp(self, params: Params, x: Array, *, record: Record = None) -> tuple[Array, Pullback]:
        """Value, and ``pullback(ybar) -> (params_bar, x_bar)``."""
        y, pullback, _ = self._from(
            params, x, self._zeros(x.shape[:-2], lambda shape: backend.zeros(shape, x))
        )
        return y, pullback

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
            Left as it is.

        Returns
        -------
        y : ndarray (..., T, d_model)
        state : dict of arrays
        """
        if state is None:
            state = self._zeros(x.shape[:-2], lambda shape: backend.zeros(shape, x))
        y, _, after = self._from(params, x, state)
        return y, after

    def initial_state(self, batch: tuple[int, ...] = (), dtype: DTypeLike = np.float32) -> State:
        """The state before the first step: zeros, with `batch` as leading axes."""
        return self._zeros(batch, lambda shape: np.zeros(shape, dtype))

    def step(self, params: Params, x: Array, state: State) -> tuple[Array, State]:
        """One step of decoding.

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
        y, state = self.prefill(params, x[..., None, :], state)
        return y[..., 0, :], state

    def _zeros(self, batch: tuple[int, ...], zeros: Callable[[tuple[int, ...]], Array]) -> State:
        return {name: zeros((*batch, *shape)) for name, shape in self._shapes().items()}

    def _from(self, params: Params, x: Array, state: State) -> tuple[Array, Pullback, State]:
        """:meth:`_whole` for any leading axes."""
        if x.ndim < 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must have shape (..., T, {self.d_model}), not {x.shape}")
        lead, steps, shapes = x.shape[:-2], x.shape[-2], self._shapes()
        count = math.prod(lead)
        state = {name: contiguous(a).reshape(count, *shapes[name]) for name, a in state.items()}
        y, pull, after = self._whole(params, contiguous(x).reshape(count, steps, self.d_model), state)

        def pullback(y_bar: Array) -> tuple[Params, Array]:
            grads, x_bar = pull(contiguous(y_bar).reshape(y.shape))
            return {name: grads[name] for name in params}, x_bar.reshape(x.shape)

        after = {name: a.reshape(*lead, *shapes[name]) for name, a in after.items()}
        return y.reshape(x.shape), pullback, after
