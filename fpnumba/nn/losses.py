"""Losses and scores of a model's logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.arrays import namespace
from fpnumba.nn import backend
from fpnumba.nn.backend import contiguous
from fpnumba.nn.basic import Array, rows

Targets = NDArray[np.integer[Any]]

# The target of a position that is not scored.
UNSCORED = -1


def _check(logits: Array, targets: Targets, ignore: int) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Rows of logits, a class for each, and which of them count.

    On a device nothing is waited for: there a target that is no class makes its logits NaN instead of raising.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must have shape {logits.shape[:-1]}, that of logits without classes: {targets.shape}"
        )
    if not np.issubdtype(targets.dtype, np.integer):
        raise TypeError(f"targets must be integers, not {targets.dtype}")
    flat, chosen = rows(logits), contiguous(targets).reshape(-1)
    counted = (chosen != UNSCORED) & (chosen != ignore)
    inside = (chosen >= 0) & (chosen < logits.shape[-1])
    if not backend.on_host(chosen):
        flat = np.where((inside | ~counted)[:, None], flat, flat.dtype.type(np.nan))
    elif not (inside | ~counted).all():
        raise ValueError(f"targets must lie in [0, {logits.shape[-1]}), or be {UNSCORED} or ignore={ignore}")
    return flat, np.where(counted & inside, chosen, 0), counted


def _number(like: Array, value: Any) -> Any:
    """A result: a float on the host, an array of no axes on a device, which is not waited for."""
    return float(value) if backend.on_host(like) else value


def _log_softmax(flat: Array, chosen: Array) -> tuple[Array, Array, Array]:
    """The exponentials, their sums, and the log-probability of every target."""
    shifted = flat - flat.max(1, keepdims=True)
    exponentials = np.exp(shifted)
    total = exponentials.sum(1)
    picked = np.take_along_axis(shifted, chosen[:, None], 1)[:, 0]
    return exponentials, total, picked - np.log(total)


def _mean_loss(log_likelihood: Array, counted: NDArray[np.bool_]) -> tuple[Any, Any]:
    """The mean over what counts, zero if nothing does, and how many that are, at least one."""
    number = np.maximum(counted.sum(), 1)
    return -np.where(counted, log_likelihood, 0).sum(dtype=np.float64) / number, number


def cross_entropy(logits: Array, targets: Targets, *, ignore: int = -100) -> float:
    """Mean negative log-likelihood of the targets.

    Parameters
    ----------
    logits : ndarray (..., classes)
    targets : ndarray of integers (...)
        Classes, or -1 where nothing is scored.
    ignore : int
        Targets of this value do not count, either.

    Returns
    -------
    float
        Zero if nothing counts. Of CuPy arrays an array without axes, which is not waited for.

    Raises
    ------
    TypeError, ValueError
        For targets that are not integers, of another shape, or not classes. A device is not asked whether they are
        classes: there one that is none makes the result NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> round(nn.cross_entropy(np.zeros((1, 2, 4)), np.array([[3, 1]])), 4)
    1.3863
    """
    flat, chosen, counted = _check(logits, targets, ignore)
    loss: float = _number(flat, _mean_loss(_log_softmax(flat, chosen)[2], counted)[0])
    return loss


def cross_entropy_vjp(logits: Array, targets: Targets, *, ignore: int = -100) -> tuple[float, Array]:
    """The loss, and its gradient with respect to the logits.

    Parameters
    ----------
    logits, targets, ignore
        As for :func:`cross_entropy`.

    Returns
    -------
    loss : float
    logits_bar : ndarray (..., classes)

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> nn.cross_entropy_vjp(np.zeros((1, 2)), np.array([1]))[1]
    array([[ 0.5, -0.5]])
    """
    flat, chosen, counted = _check(logits, targets, ignore)
    bar, total, log_likelihood = _log_softmax(flat, chosen)
    loss, number = _mean_loss(log_likelihood, counted)
    bar *= (counted / (total * number.astype(flat.dtype)))[:, None]
    bar[namespace(bar).arange(len(bar)), chosen] -= np.where(counted, (1.0 / number).astype(flat.dtype), 0)
    return _number(flat, loss), bar.reshape(logits.shape)


def accuracy(logits: Array, targets: Targets, *, ignore: int = -100) -> float:
    """Share of the counted targets that have the largest logit; NaN if nothing counts.

    Parameters
    ----------
    logits, targets, ignore
        As for :func:`cross_entropy`.

    Returns
    -------
    float
        Of CuPy arrays an array without axes, which is not waited for.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> nn.accuracy(np.array([[0.0, 1.0], [2.0, 1.0]]), np.array([1, 1]))
    0.5
    """
    flat, chosen, counted = _check(logits, targets, ignore)
    right = ((flat.argmax(1) == chosen) & counted).sum()
    with np.errstate(invalid="ignore"):
        share: float = _number(flat, right / counted.sum())
    return share
