"""Losses and scores of a model's logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.nn.backend import contiguous
from fpnumba.nn.basic import Array, rows

Targets = NDArray[np.integer[Any]]


def _check(logits: Array, targets: Targets, ignore: int) -> tuple[Array, Array, NDArray[np.bool_]]:
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must have shape {logits.shape[:-1]}, that of logits without classes: {targets.shape}"
        )
    if not np.issubdtype(targets.dtype, np.integer):
        raise TypeError(f"targets must be integers, not {targets.dtype}")
    flat, chosen = rows(logits), contiguous(targets).reshape(-1)
    counted = chosen != ignore
    inside = (chosen >= 0) & (chosen < logits.shape[-1])
    if not (inside | ~counted).all():
        raise ValueError(f"targets must lie in [0, {logits.shape[-1]}) or be ignore={ignore}")
    return flat, chosen, counted


def _log_softmax(flat: Array, chosen: Array, counted: NDArray[np.bool_]) -> tuple[Array, Array, Array]:
    """The exponentials, their sums, and the log-probability of every counted target."""
    shifted = flat - flat.max(1, keepdims=True)
    exponentials = np.exp(shifted)
    total = exponentials.sum(1)
    picked = np.take_along_axis(shifted, np.where(counted, chosen, 0)[:, None], 1)[:, 0]
    return exponentials, total, picked - np.log(total)


def cross_entropy(logits: Array, targets: Targets, *, ignore: int = -100) -> float:
    """Mean negative log-likelihood of the targets.

    Parameters
    ----------
    logits : ndarray (..., classes)
    targets : ndarray of integers (...)
    ignore : int
        Targets of this value do not count.

    Returns
    -------
    float
        Zero if nothing counts.

    Raises
    ------
    TypeError, ValueError
        For targets that are not integers, of another shape, or not classes.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> round(nn.cross_entropy(np.zeros((1, 2, 4)), np.array([[3, 1]])), 4)
    1.3863
    """
    flat, chosen, counted = _check(logits, targets, ignore)
    number = int(counted.sum())
    if not number:
        return 0.0
    return -float(_log_softmax(flat, chosen, counted)[2][counted].sum(dtype=np.float64)) / number


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
    number = int(counted.sum())
    if not number:
        return 0.0, np.zeros_like(logits)
    exponentials, total, log_likelihood = _log_softmax(flat, chosen, counted)
    bar = exponentials
    bar *= (counted / (total * number)).astype(flat.dtype)[:, None]
    where = counted.nonzero()[0]
    bar[where, chosen[where]] -= flat.dtype.type(1.0 / number)
    loss = -float(log_likelihood[counted].sum(dtype=np.float64)) / number
    return loss, bar.reshape(logits.shape)


def accuracy(logits: Array, targets: Targets, *, ignore: int = -100) -> float:
    """Share of the counted targets that have the largest logit; NaN if nothing counts.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> nn.accuracy(np.array([[0.0, 1.0], [2.0, 1.0]]), np.array([1, 1]))
    0.5
    """
    flat, chosen, counted = _check(logits, targets, ignore)
    if not counted.any():
        return float("nan")
    return float((flat.argmax(1) == chosen)[counted].mean())
