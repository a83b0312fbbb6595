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


def jax_mamba(params: dict[str, NDArray[Any]], *, mixer: str, rtol: float, iterations: int | None) -> Any:
    """The parallel iteration of :class:`fpnumba.nn.FPMamba` with its default options, and its exact gradient, jitted.

    Every iteration makes the parameters of all steps from the previous iterate and scans over time, with the states of
    one step after the other. The gradient is implicit: as many
    iterations of the adjoint of one application, linearised once.

    Parameters
    ----------
    params : dict of arrays
        Of the layer.
    mixer : {"householder", "kronecker"}
    rtol : float
        Every sequence must meet ``max|dy| <= rtol * max|y|``, where `iterations` is None.
    iterations : int or None
        Make so many instead.

    Returns
    -------
    value : function
        ``value(params, x) -> (output, iterations made)``.
    value_and_gradient : function
        ``value_and_gradient(params, x, cotangent) -> (output, (params_bar, x_bar))``.
    """
    import jax
    import jax.numpy as jnp

    eps, size, width = 1e-5, params["A_log"].shape[1], params["D"].size
    dt_rank = params["dt_proj.weight"].shape[1]

    def weight(p: Any, name: str) -> Any:
        v = p[f"{name}.parametrizations.weight.original1"]
        g = p[f"{name}.parametrizations.weight.original0"]
        return v * (g / jnp.linalg.norm(v, axis=1, keepdims=True))

    def unit(v: Any, least: float) -> Any:
        return v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), least)

    def front(p: Any, x: Any) -> Any:
        drive, z = jnp.split(x @ p["in_proj.weight"].T, 2, axis=-1)
        dt, b, c = jnp.split(drive @ p["x_proj.weight"].T, [dt_rank, dt_rank + size], axis=-1)
        delta = jax.nn.softplus(dt @ p["dt_proj.weight"].T + p["dt_proj.bias"])
        return drive, z, delta, b, c

    def householder(p: Any, drive: Any, before: Any) -> Any:
        both = jnp.concatenate([drive, before], axis=-1)
        u = unit(jax.nn.silu(both @ weight(p, "mixer.u_proj").T), eps)
        alpha = 2 * jax.nn.sigmoid(both @ weight(p, "mixer.alpha_proj").T + p["mixer.alpha_proj.bias"])
        return lambda v: v - alpha * u * jnp.sum(u * v, axis=-1, keepdims=True)

    d1 = max(d for d in range(1, width + 1) if width % d == 0 and d * d <= width)
    d2 = width // d1

    def factor(entries: Any, diag: Any, d: int) -> Any:
        rows, columns = np.triu_indices(d)
        upper = jnp.zeros((*entries.shape[:-1], d, d), entries.dtype).at[..., rows, columns].set(entries)
        r = unit(upper @ jnp.swapaxes(upper, -1, -2), eps)
        v = jnp.full((*entries.shape[:-1], d, 1), 1 / np.sqrt(width), entries.dtype)
        before = v
        for _ in range(16):
            before, w = v, r @ v
            v = w / jnp.maximum(jnp.linalg.norm(w, axis=-2, keepdims=True), 1e-12)
        largest = jnp.sum(before * (r @ v), axis=(-2, -1), keepdims=True)
        return diag[..., None] * r / (largest + eps)

    def kronecker(p: Any, drive: Any, before: Any) -> Any:
        both, n1 = jnp.concatenate([drive, before], axis=-1), d1 * (d1 + 1) // 2
        entries = jax.nn.silu(both @ weight(p, "mixer.uv_project").T)
        diag = jax.nn.sigmoid(both @ weight(p, "mixer.diag").T + p["mixer.diag.bias"])
        k1 = jnp.swapaxes(2 * factor(entries[..., :n1], diag[..., :d1], d1), -1, -2)
        k2 = factor(entries[..., n1:], diag[..., d1:], d2)

        def apply(v: Any) -> Any:
            V = v.reshape(*v.shape[:-1], d1, d2)
            return v - (k1 @ V @ jnp.swapaxes(k2, -1, -2)).reshape(v.shape)

        return apply

    mix = {"householder": householder, "kronecker": kronecker}[mixer]

    def shifted(y: Any) -> Any:
        return jnp.concatenate([jnp.zeros_like(y[:, :1]), y[:, :-1]], axis=1)

    def application(p: Any, fixed: Any, y: Any) -> Any:
        drive, _, delta, b, c = fixed
        before = shifted(y)
        bc = before @ weight(p, "bc_y_proj").T
        b, c = unit(b + bc[..., :size], eps), unit(c + bc[..., size:], eps)
        u = mix(p, drive, before)(drive - y) + y
        A = -jnp.exp(p["A_log"])

        def step(state: Any, now: Any) -> Any:
            delta, u, b, c = now
            state = jnp.exp(delta[..., None] * A) * state + (delta * u)[..., None] * b[:, None]
            return state, jnp.sum(state * c[:, None], axis=-1)

        swapped = [jnp.swapaxes(a, 0, 1) for a in (delta, u, b, c)]
        start = jnp.zeros((y.shape[0], width, size), y.dtype)
        _, o = jax.lax.scan(step, start, swapped)
        o = jnp.swapaxes(o, 0, 1) + p["D"] * u
        centred = o - o.mean(-1, keepdims=True)
        scaled = centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + eps)
        return p["out_norm.weight"] * scaled + p["out_norm.bias"]

    def repeat(map: Any, start: Any) -> Any:
        if iterations is not None:
            return jax.lax.fori_loop(0, iterations, lambda _, y: map(y), start), iterations

        def wanted(state: Any) -> Any:
            y, change, count = state
            return (count < 1000) & jnp.any(change > rtol * jnp.max(jnp.abs(y), axis=(1, 2)))

        def body(state: Any) -> Any:
            y, _, count = state
            new = map(y)
            return new, jnp.max(jnp.abs(new - y), axis=(1, 2)), count + 1

        first = start, jnp.full(start.shape[0], jnp.inf, start.dtype), 0
        y, _, count = jax.lax.while_loop(wanted, body, first)
        return y, count

    def outside(p: Any, z: Any, y: Any) -> Any:
        gate = jax.nn.silu(z + shifted(y) @ weight(p, "z_y_proj").T)
        return (gate * y) @ p["out_proj.weight"].T

    def value(p: Any, x: Any) -> Any:
        fixed = front(p, x)
        y, count = repeat(lambda y: application(p, fixed, y), jnp.zeros_like(fixed[0]))
        return outside(p, fixed[1], y), count

    def value_and_gradient(p: Any, x: Any, cotangent: Any) -> Any:
        fixed, pull_front = jax.vjp(front, p, x)
        y, _ = repeat(lambda y: application(p, fixed, y), jnp.zeros_like(fixed[0]))
        out, pull_out = jax.vjp(outside, p, fixed[1], y)
        p_bar, z_bar, y_bar = pull_out(cotangent)
        _, pull = jax.vjp(application, p, fixed, y)
        s, _ = repeat(lambda s: y_bar + pull(s)[2], y_bar)
        more, fixed_bar, _ = pull(s)
        fixed_bar = (fixed_bar[0], fixed_bar[1] + z_bar, *fixed_bar[2:])
        last, x_bar = pull_front(fixed_bar)
        return out, (jax.tree.map(lambda *a: sum(a), p_bar, more, last), x_bar)

    return jax.jit(value), jax.jit(value_and_gradient)
