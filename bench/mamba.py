"""FP-Mamba layers in the CPU room: a training step against JAX, and one step of decoding against its weights."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.timing import median_seconds
from fpnumba import Adjoint, Solver, nn
from fpnumba.train.threads import one_blas_thread

SHAPE = (8, 64, 128)
WIDTH = 512
RTOL = 1e-6
ITERATIONS = 16


def run(add: Callable[..., float], *, peers: bool) -> dict[str, Any]:
    """Every case for the two mixers of the paper."""
    record: dict[str, Any] = {}
    for mixer in ("householder", "kronecker"):
        layer, params, x, cotangent = _problem(mixer)

        def both(layer: Any = layer, params: Any = params, x: Any = x, bar: Any = cotangent) -> object:
            _, pullback = layer.vjp(params, x)
            return pullback(bar)

        told: list[Any] = []
        layer(params, x, record=told)
        title = f"nn.FPMamba, {mixer}"
        # as in fpnumba's training loop: a second BLAS thread waits by spinning, which the kernels' threads pay for
        with one_blas_thread():
            value = add(title, SHAPE, median_seconds(lambda f=layer, p=params, x=x: f(p, x)), None)
            note = f"most iterations of a step {int(told[0].iterations.max())}"
            seconds = add("  value and exact gradient", SHAPE, median_seconds(both), None, note)
        record[mixer] = {"value": value, "value and gradient": seconds}
        if peers:
            record[mixer]["peer"] = _against_jax(mixer, layer, params, x, cotangent, seconds, add)
        record[mixer]["decode"] = _decoding(mixer, add)
    return record


def _problem(mixer: str) -> tuple[Any, Any, Any, Any]:
    """A layer whose steps have one fixed point each, so that every way to it ends at the same answer.

    With fresh parameters some have several, and what the parallel iteration ends at depends on the path.
    """
    rng = np.random.default_rng(0)
    layer = nn.FPMamba(SHAPE[2], mixer=mixer, solver=Solver(rtol=RTOL), adjoint=Adjoint(rtol=RTOL))
    params = layer.init(rng)
    for name in ("mixer.alpha_proj.bias", "mixer.diag.bias"):
        if name in params:
            params[name] = np.full_like(params[name], -1.5 if mixer == "kronecker" else -3.0)
    x, cotangent = rng.standard_normal((2, *SHAPE), dtype=np.float32)
    return layer, params, x, cotangent


def _against_jax(
    mixer: str, layer: Any, params: Any, x: Any, cotangent: Any, ours: float, add: Callable[..., float]
) -> dict[str, Any]:
    import jax

    from bench.peers import jax_mamba

    y, pullback = layer.vjp(params, x)
    params_bar, x_bar = pullback(cotangent)
    value, both = jax_mamba(params, mixer=mixer, rtol=RTOL, iterations=None)
    theirs, count = value(params, x)
    _, (their_bars, their_x_bar) = both(params, x, cotangent)
    pairs = [(y, theirs), (x_bar, their_x_bar), *((params_bar[n], their_bars[n]) for n in params_bar)]
    # A ratio between two answers means something only if they are the same answer.
    errors = [float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs]
    assert max(errors) < 1e-3, f"the peer's answers differ by up to {max(errors):.1e}"
    _, both = jax_mamba(params, mixer=mixer, rtol=RTOL, iterations=ITERATIONS)
    wait: Any = jax.block_until_ready
    seconds = median_seconds(lambda: wait(both(params, x, cotangent)), repeats=3)
    note = f"{ITERATIONS} iterations: ours {seconds / ours:.1f}x faster; it would stop after {int(count)}"
    add("  the same in JAX jit, parallel iteration", SHAPE, seconds, None, note)
    return {"seconds": seconds, "ratio": seconds / ours, "difference": max(errors), "stops": int(count)}


def _decoding(mixer: str, add: Callable[..., float]) -> float:
    """One token, one sequence; the floor is to read every weight once."""
    rng = np.random.default_rng(1)
    layer = nn.FPMamba(WIDTH, mixer=mixer)
    params = layer.init(rng)
    x, state = rng.standard_normal((1, WIDTH), dtype=np.float32), layer.initial_state((1,))
    for _ in range(8):
        _, state = layer.step(params, x, state)
    nbytes = sum(array.nbytes for array in params.values())

    def timed(note: str) -> float:
        seconds = median_seconds(lambda: layer.step(params, x, state), repeats=301, warmup=20)
        return add("  one step of decoding", (1, WIDTH), seconds, nbytes, note)

    with one_blas_thread():
        timed("one BLAS thread")
    return timed("")
