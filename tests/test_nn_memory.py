"""Peak memory of a training step of FP-Mamba: what is kept does not depend on how often is iterated."""

import tracemalloc

import numpy as np
import pytest

from fpnumba import Adjoint, Solver, nn
from fpnumba.cpu import memory


def peak(layer, params, x) -> int:
    """Bytes at the most, of value and gradient, over what was there before."""

    def train() -> None:
        y, pullback = layer.vjp(params, x)
        pullback(np.ones_like(y))

    train()
    memory.release()
    tracemalloc.start()
    try:
        train()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("mixer", ["householder", "kronecker"])
@pytest.mark.parametrize("method", ["sequential", "parallel"])
def test_it_does_not_grow_with_iterations(mixer, method, rng) -> None:
    x = rng.standard_normal((8, 40, 16)).astype(np.float32)
    peaks = []
    for count in (2, 40):
        solver = Solver(method, rtol=0.0, atol=0.0, max_iter=count, on_failure="ignore")
        adjoint = Adjoint("implicit" if method == "sequential" else "one-step", on_failure="ignore")
        layer = nn.FPMamba(16, d_state=8, mixer=mixer, solver=solver, adjoint=adjoint)
        peaks.append(peak(layer, layer.init(np.random.default_rng(0)), x))
    # what keeping an iterate of all steps for each iteration would take 38 times; residuals are told of, one by one
    iterate = 8 * 40 * layer.d_inner * x.itemsize
    assert peaks[1] - peaks[0] < iterate / 2
