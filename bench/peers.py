"""What a user would write instead: the same fixed point in JAX, jitted, run to the same tolerance."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def jax_iterated_solve(
    lam: NDArray[Any], u: NDArray[Any], alpha: NDArray[Any], x: NDArray[Any], rtol: float
) -> Callable[[], NDArray[Any]]:
    """`jax_iteration` on NumPy arrays."""
    import jax.numpy as jnp

    solve = jax_iteration(rtol)
    arrays = [jnp.asarray(a) for a in (lam, u, alpha, x)]
    return lambda: np.asarray(solve(*arrays).block_until_ready())


def jax_iteration(rtol: float) -> Callable[..., Any]:
    """The parallel iteration of (F), one Householder reflection, as a jitted loop of ``associative_scan``.

    It stops when every sequence meets ``max|dh| <= rtol * max|h|``, the rule that fpnumba uses. Takes ``lam``,
    ``u`` (..., T, D), ``alpha`` (..., T, 1) and ``x``.
    """
    import jax
    import jax.numpy as jnp

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    def solve(lam: Any, u: Any, alpha: Any, x: Any) -> Any:
        def step(h: Any) -> Any:
            projected = jnp.sum(u * (x - h), axis=-1, keepdims=True)
            mixed = x - alpha * u * projected
            return jax.lax.associative_scan(combine, (lam, (1 - lam) * mixed), axis=-2)[1]

        def wanted(state: Any) -> Any:
            h, change = state
            scale = jnp.max(jnp.abs(h), axis=(-2, -1))
            return jnp.any(~(change <= rtol * scale))

        def body(state: Any) -> Any:
            h, _ = state
            new = step(h)
            return new, jnp.max(jnp.abs(new - h), axis=(-2, -1))

        start = jnp.zeros_like(x), jnp.full(x.shape[:-2], jnp.inf, x.dtype)
        return jax.lax.while_loop(wanted, body, start)[0]

    return jax.jit(solve)  # type: ignore[no-any-return]


def jax_direct() -> Callable[..., Any]:
    """The direct solve of (F), one Householder reflection, as a jitted ``lax.scan`` over time."""
    import jax
    import jax.numpy as jnp

    def solve(lam: Any, u: Any, alpha: Any, x: Any) -> Any:
        def step(h: Any, inputs: Any) -> Any:
            lam, u, alpha, x = inputs
            gate = 1 - lam
            w = lam * h + gate * x
            rho = jnp.sum(u * (x - w), axis=-1, keepdims=True)
            rho = rho / (1 - alpha * jnp.sum(gate * u * u, axis=-1, keepdims=True))
            h = w - gate * alpha * u * rho
            return h, h

        swapped = [jnp.swapaxes(a, 0, 1) for a in (lam, u, alpha, x)]
        _, h = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), swapped)
        return jnp.swapaxes(h, 0, 1)

    return jax.jit(solve)  # type: ignore[no-any-return]


def torch_iteration(iterations: int) -> Callable[..., Any]:
    """The same loop as `jax_iteration` under ``torch.compile``, for a number of iterations that is known."""
    import torch
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    def solve(lam: Any, u: Any, alpha: Any, x: Any) -> Any:
        h = torch.zeros_like(x)
        for _ in range(iterations):
            mixed = x - alpha * u * (u * (x - h)).sum(-1, keepdim=True)
            h = associative_scan(combine, (lam, (1 - lam) * mixed), dim=1, combine_mode="pointwise")[1]
        return h

    return torch.compile(solve)  # type: ignore[no-any-return]
