"""What a cheap gradient is worth: its direction against that of the exact one."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.nn.basic import Params
from fpnumba.nn.layer import FixedPointLayer
from fpnumba.solve import Adjoint

Array = NDArray[Any]


@dataclass(frozen=True)
class GradientDiagnostics:
    """What :func:`gradient_diagnostics` found.

    Attributes
    ----------
    cosine : float
        Between the one-step gradient and the exact one, of all parameters together; NaN if either is zero.
    cosines : dict of float
        The same for each parameter.
    input_cosine : float
        The same for the input of the layer.
    descends : bool
        Whether a small step against the one-step gradient lowers the loss to first order: their inner product is
        positive.
    rate : float
        By how much a term of the adjoint's series ``sum_k (J^T)^k`` is smaller than the one before, in the end.
    contracts : bool
        Whether ``rate`` is below one: as far as this cotangent sees it, the condition under which Theorem 3.2 of arXiv
        2503.10799 promises that the one-step gradient descends.
    converged : bool
        Whether the forward solve converged in every sequence; where not, none of this means much.
    """

    cosine: float
    cosines: dict[str, float]
    input_cosine: float
    descends: bool
    rate: float
    contracts: bool
    converged: bool


def gradient_diagnostics(
    layer: FixedPointLayer, params: Params, x: Array, y_bar: Array, *, terms: int = 24
) -> GradientDiagnostics:
    """Compare the one-step gradient of a layer with the exact one, and look at the condition of Theorem 3.2.

    Parameters
    ----------
    layer : FPRNN, FPMamba or FPMamba2
        Left as it is, with its solver.
    params : dict of arrays
    x : ndarray (..., T, d_model)
    y_bar : ndarray (..., T, d_model)
        Cotangent of the output: the gradient of a loss.
    terms : int, default 24
        Terms of the series after which ``rate`` is measured, over the second half of them.

    Returns
    -------
    GradientDiagnostics

    Raises
    ------
    ValueError
        For fewer than two terms, and as the layer itself.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba import nn
    >>> layer = nn.FPMamba(8, d_state=4, alpha_max=0.5)
    >>> params = layer.init(np.random.default_rng(0), np.float64)
    >>> x = np.random.default_rng(1).standard_normal((2, 5, 8))
    >>> found = nn.gradient_diagnostics(layer, params, x, np.ones_like(x))
    >>> found.converged, -1 <= found.cosine <= 1
    (True, True)
    """
    if terms < 2:
        raise ValueError(f"terms must be at least 2, not {terms}")
    probe = copy.copy(layer)
    # the exact gradient is that at the fixed point, so the one-step one is taken there too
    probe.n_backwards = 0
    record: list[Any] = []
    _, pullback = probe.vjp(params, x, record=record)

    def pulled(adjoint: Adjoint) -> tuple[Params, Array]:
        probe.adjoint = adjoint
        return pullback(y_bar)

    exact = layer.adjoint if layer.adjoint.method == "implicit" else Adjoint()
    exact_bars, exact_x = pulled(replace(exact, on_failure="ignore"))
    one_bars, one_x = pulled(Adjoint("one-step"))
    half, last = terms // 2, terms
    sizes = []
    for k in (half, last):
        more, less = (pulled(Adjoint("neumann", terms=n))[1] for n in (k, k - 1))
        sizes.append(float(np.linalg.norm(more.astype(np.float64) - less)))
    rate = (sizes[1] / sizes[0]) ** (1 / (last - half)) if sizes[0] > 0 else 0.0
    names = list(exact_bars)
    inner = sum(float(np.vdot(exact_bars[n], one_bars[n])) for n in names)
    return GradientDiagnostics(
        cosine=_cosine([exact_bars[n] for n in names], [one_bars[n] for n in names]),
        cosines={n: _cosine([exact_bars[n]], [one_bars[n]]) for n in names},
        input_cosine=_cosine([exact_x], [one_x]),
        descends=inner > 0,
        rate=rate,
        contracts=rate < 1,
        converged=bool(record[0].converged.all()),
    )


def _cosine(a: list[Array], b: list[Array]) -> float:
    inner, first, second = (
        sum(float(np.vdot(p.astype(np.float64), q)) for p, q in zip(left, right, strict=True))
        for left, right in ((a, b), (a, a), (b, b))
    )
    return inner / float(np.sqrt(first * second)) if first * second > 0 else float("nan")
