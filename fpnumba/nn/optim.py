"""AdamW over flat dicts of arrays."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fpnumba.nn import backend
from fpnumba.nn.backend import contiguous
from fpnumba.nn.basic import Params


def global_norm(grads: Params) -> float:
    """Euclidean norm of all gradients together, summed in float64.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> nn.global_norm({"a": np.array([3.0]), "b": np.array([4.0])})
    5.0
    """
    return math.sqrt(sum(float(np.vdot(g, g).real) for _, g in sorted(grads.items())))


def decays(name: str, value: np.ndarray) -> bool:
    """Whether weight decay reaches a parameter: matrices, not biases, norms or the magnitudes of weight
    norm."""
    return value.ndim > 1 and 1 not in value.shape[1:2] and not name.endswith(".bias")


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101) and clipping by the global norm.

    Parameters
    ----------
    learning_rate : float or function of the step
        See :mod:`fpnumba.nn.schedules`.
    betas : pair of float
    eps : float
    weight_decay : float
        Multiplied by the learning rate; reaches what :func:`decays` says.
    clip : float, optional
        Largest global norm of the gradients; larger ones are scaled down to it.

    Notes
    -----
    Deterministic: the same parameters, gradients and state give the same bits. A parameter without a
    gradient stays as it is.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> optimizer = nn.AdamW(0.1)
    >>> params = {"w": np.ones((2, 2), np.float32)}
    >>> state = optimizer.init(params)
    >>> params, state = optimizer.update(params, {"w": np.ones((2, 2), np.float32)}, state)
    >>> params["w"][0].round(3)
    array([0.899, 0.899], dtype=float32)
    """

    def __init__(
        self,
        learning_rate: float | Callable[[int], float],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        clip: float | None = None,
    ) -> None:
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"betas must lie in [0, 1), not {betas}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, not {eps}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, not {weight_decay}")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive, not {clip}")
        self.learning_rate, self.betas, self.eps = learning_rate, betas, eps
        self.weight_decay, self.clip = weight_decay, clip

    def init(self, params: Params) -> Params:
        """The state before the first step: ``step``, and moments ``m.NAME`` and ``v.NAME``."""
        state: Params = {"step": np.zeros((), np.int64)}
        for name, value in params.items():
            state[f"m.{name}"], state[f"v.{name}"] = np.zeros_like(value), np.zeros_like(value)
        return state

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.learning_rate(step) if callable(self.learning_rate) else self.learning_rate

    def update(self, params: Params, grads: Params, state: Params) -> tuple[Params, Params]:
        """One step; new dicts of new arrays, the old ones stay as they are.

        Parameters
        ----------
        params, grads : dict of arrays
        state : dict of arrays
            From :meth:`init` or the step before.

        Returns
        -------
        params, state : dict of arrays

        Raises
        ------
        ValueError
            For a gradient of a parameter that does not exist, or of another shape.
        """
        for name, grad in grads.items():
            if name not in params:
                raise ValueError(f"grads has {name!r}, which params lacks")
            if grad.shape != params[name].shape:
                raise ValueError(
                    f"gradient of {name!r} has shape {grad.shape}, its parameter {params[name].shape}"
                )
        step = int(state["step"])
        scale = 1.0
        if self.clip is not None:
            norm = global_norm(grads)
            scale = min(1.0, self.clip / norm) if norm > 0 else 1.0
        rate = self.rate(step)
        # m_hat / (sqrt(v_hat) + eps), the corrections taken out of the loop
        correction1, correction2 = (
            1.0 - self.betas[0] ** (step + 1),
            math.sqrt(1.0 - self.betas[1] ** (step + 1)),
        )
        updated, moments = dict(params), dict(state)
        moments["step"] = np.asarray(step + 1, np.int64)
        for name, grad in grads.items():
            value = contiguous(params[name])
            decay = rate * self.weight_decay if decays(name, value) else 0.0
            flat = (value, contiguous(grad), state[f"m.{name}"], state[f"v.{name}"])
            found = backend.kernels(value).adamw(
                *(a.reshape(-1) for a in flat),
                scale,
                rate * correction2 / correction1,
                decay,
                self.betas,
                self.eps * correction2,
            )
            out, m, v = (a.reshape(value.shape) for a in found)
            updated[name], moments[f"m.{name}"], moments[f"v.{name}"] = out, m, v
        return updated, moments
