"""What a user would write instead: the same fixed point in JAX, jitted, run to the same tolerance."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def jax_iterated_solve(
    lam: NDArray[Any], u: NDArray[Any], alpha: NDArray[Any], x: NDArray[Any], rtol: float
) -> Callable[[], NDArray[Any]]:
    """The parallel iteration of (F), one Householder reflection, as a jitted loop of ``associative_scan``.

    It stops when every sequence meets ``max|dh| <= rtol * max|h|``, the rule that fpnumba uses.
    """
    import jax
    import jax.numpy as jnp

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    @jax.jit
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

    arrays = [jnp.asarray(a) for a in (lam, u, alpha, x)]
    return lambda: np.asarray(solve(*arrays).block_until_ready())
