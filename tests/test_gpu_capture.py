"""Work that is recorded and launched as one: on a device only, which the stand-in has no graphs of."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fpnumba import gpu, nn
from fpnumba.nn import ways
from fpnumba.solve import Adjoint, Solver

pytestmark = pytest.mark.gpu

QUIET: dict[str, Any] = {"rtol": 1e-5, "on_failure": "ignore"}


def at_work(layer: nn.FPMamba, rng: Any, record: list[Any] | None = None) -> tuple[Any, Callable[[], Any]]:
    """Its input, and what takes its value and gradients there, with the latest solve's record."""
    import cupy

    params = {name: cupy.asarray(value) for name, value in layer.init(rng).items()}
    x = cupy.asarray(rng.standard_normal((5, 7, 12)).astype(np.float32))

    def both() -> Any:
        if record is not None:
            record.clear()
        y, pullback = layer.vjp(params, x, record=record)
        return y, *pullback(y)

    return x, both


def agree(found: Any, wanted: Any, atol: float) -> None:
    """Values, gradients of the input and those of the parameters, each with what may add up."""
    (y, grads, x_bar), (mine, own, back) = wanted, found
    np.testing.assert_allclose(mine.get(), y.get(), rtol=0, atol=atol)
    np.testing.assert_allclose(back.get(), x_bar.get(), rtol=0, atol=10 * atol)
    for name, value in grads.items():
        np.testing.assert_allclose(own[name].get(), value.get(), rtol=0, atol=100 * atol, err_msg=name)


def test_again_with_other_numbers() -> None:
    import cupy

    x = cupy.zeros(3)
    again = gpu.capture(lambda: 2 * x + 1)
    x[...] = 5
    np.testing.assert_array_equal(again().get(), 11.0)


@pytest.mark.parametrize("gradient", ["implicit", "one-step"])
@pytest.mark.parametrize("precision", gpu.PRECISIONS)
def test_a_layer(gradient: str, precision: str, rng: Any) -> None:
    import cupy

    adjoint = Adjoint("one-step") if gradient == "one-step" else Adjoint(**QUIET)
    layer = nn.FPMamba(12, d_state=8, short_conv=3, solver=Solver(**QUIET), adjoint=adjoint)
    record: list[Any] = []
    x, both = at_work(layer, rng, record)

    with gpu.use_precision(precision):
        again = gpu.capture(both)
        x[...] = cupy.asarray(rng.standard_normal(x.shape).astype(np.float32))
        found, told = again(), record[0]
        assert told.converged.shape == (5,)
        wanted = both()
    agree(found, wanted, 1e-5)


@pytest.mark.parametrize("d_inner", [24, 256])
def test_a_layer_with_a_kronecker_mixer(d_inner: int, rng: Any) -> None:
    import cupy

    told = Solver(**QUIET), Adjoint(**QUIET)
    layer = nn.FPMamba(
        12, d_inner=d_inner, d_state=8, mixer="kronecker", alpha_max=0.8, solver=told[0], adjoint=told[1]
    )
    x, both = at_work(layer, rng)

    again = gpu.capture(both)
    x[...] = cupy.asarray(rng.standard_normal(x.shape).astype(np.float32))
    found = again()
    wanted = both()
    agree(found, wanted, 1e-5)


@pytest.mark.parametrize("mixer", ["householder", "kronecker"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("gradient", ["one-step", "all steps", "given up"])
def test_the_parallel_way(
    mixer: str, precision: str, gradient: str, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many iterations as the first run took, and a status of what they find; its decisions, too."""
    import cupy

    monkeypatch.setattr(ways, "affordable_back", lambda *sizes: 100)
    if gradient == "given up":  # and so made step after step
        monkeypatch.setattr(ways, "_needed", lambda history, rtol: 1e3)
    exact = Adjoint(rtol=1e-6, on_failure="ignore")

    rule: dict[str, Any] = {"criterion": "published", "rtol": 0.05, "quantile": 0.75, "on_failure": "ignore"}
    layer = nn.FPMamba(
        12,
        d_state=8,
        mixer=mixer,
        alpha_max=0.5,
        solver=Solver("parallel", **rule, damping=0.9),
        adjoint=Adjoint("one-step") if gradient == "one-step" else exact,
        train_mode=True,
    )
    record: list[Any] = []
    x, both = at_work(layer, rng, record)

    with gpu.use_precision(precision):
        with pytest.raises(gpu.NotRecorded, match="same_iterations"):
            gpu.capture(both)
        again = gpu.capture(both, same_iterations=True)
        (told,) = record
        found = again()
        nothing = gpu.capture(both, same_iterations=True)
        (lost,) = record
        wanted = both()
    assert list(told.iterations) == list(record[0].iterations)
    assert list(told.status) == list(record[0].status)
    np.testing.assert_allclose(told.residual, record[0].residual, rtol=1e-4)
    # the products of a recording may add up in another order, and eight bits be rounded to others then
    eps = 1e-6 if precision == "float32" else 1e-4
    agree(found, wanted, eps)
    x[...] = cupy.nan
    nothing()
    assert not lost.converged.any()


def test_what_waits_is_refused() -> None:
    import cupy

    x = cupy.ones(3)
    with pytest.raises(gpu.NotRecorded, match="waits for the device"):
        gpu.capture(lambda: float(x.sum()))
    assert float(x.sum()) == 3.0


def test_what_copies_from_the_host_is_refused() -> None:
    import cupy

    with pytest.raises(gpu.NotRecorded):
        gpu.capture(lambda: cupy.asarray(np.ones(3)))


def test_an_error_of_ones_own_passes() -> None:
    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        gpu.capture(fail)
