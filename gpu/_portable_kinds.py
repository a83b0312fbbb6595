# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Channel mixing on the device, written once in Python: one step of each mixer, and how a block takes many steps.

Sections 2 and 6 of docs/mathematics.md. A mixer is three device functions for the steps ``begin`` to
``end`` of sequence ``b``, whose vectors are the rows of ``x``, ``out``, ...:

    apply(params, b, begin, end, x, out, work, parts)                  out = Q x
    transpose(params, b, begin, end, y, out, work, parts)              out = Q^T y
    pull(params, bars, b, begin, end, x, ybar, xbar, work, parts)      xbar = Q^T ybar, and cotangents of y = Q x

A step of the library's own mixers is taken by all threads of a block together (`by_block`); ``work`` is
their scratch and ``parts`` what `fpnumba.gpu._portable_block` needs. A step of a user's own mixer is serial
code, as the user wrote it: there each thread takes a step of its own (`by_thread`).

All inputs are complete, and no longer read by anybody as something else, when a mixer is called; its
outputs are complete after the next barrier.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from numba import cuda

from fpnumba.gpu._portable_block import THREADS, block_sum


class Mixer(NamedTuple):
    """Device functions of the form that the head of this module says."""

    apply: Any
    transpose: Any
    pull: Any


def by_block(apply: Any, transpose: Any, pull: Any) -> Mixer:
    """A mixer whose steps are taken one after the other, each by all threads."""
    return Mixer(_mix_by_block(apply), _mix_by_block(transpose), _pull_by_block(pull))


def _mix_by_block(step):
    @cuda.jit(device=True)
    def mix(params, b, begin, end, x, out, work, parts):
        for t in range(begin, end):
            step(params, b, t, x[t - begin], out[t - begin], work, parts)
            cuda.syncthreads()  # the next step needs `work`

    return mix


def _pull_by_block(step):
    @cuda.jit(device=True)
    def pull(params, bars, b, begin, end, x, ybar, xbar, work, parts):
        for t in range(begin, end):
            step(params, bars, b, t, x[t - begin], ybar[t - begin], xbar[t - begin], work, parts)
            cuda.syncthreads()

    return pull


def by_thread(apply: Any, transpose: Any, pull: Any) -> Mixer:
    """A mixer whose steps are taken side by side, one by each thread."""
    return Mixer(_mix_by_thread(apply), _mix_by_thread(transpose), _pull_by_thread(pull))


def _mix_by_thread(step):
    @cuda.jit(device=True)
    def mix(params, b, begin, end, x, out, work, parts):
        for t in range(begin + cuda.threadIdx.x, end, THREADS):
            step(params, b, t, x[t - begin], out[t - begin])

    return mix


def _pull_by_thread(step):
    @cuda.jit(device=True)
    def pull(params, bars, b, begin, end, x, ybar, xbar, work, parts):
        for t in range(begin + cuda.threadIdx.x, end, THREADS):
            step(params, bars, b, t, x[t - begin], ybar[t - begin], xbar[t - begin])

    return pull


@cuda.jit(device=True)
def copy(x, out):
    """``out = x``, each thread its channels."""
    for i in range(cuda.threadIdx.x, x.shape[0], THREADS):
        out[i] = x[i]


# Low rank: u (B, T, r, D), alpha (B, T, r). Every thread reads and writes its own channels only.


@cuda.jit(device=True)
def project(u, b, t, k, x, parts):
    """``u_k . x``"""
    mine = x.dtype.type(0)
    for i in range(cuda.threadIdx.x, x.shape[0], THREADS):
        mine += u[b, t, k, i] * x[i]
    return x.dtype.type(block_sum(mine, parts))


@cuda.jit(device=True)
def subtract(u, b, t, k, weight, out):
    """``out -= weight u_k``"""
    for i in range(cuda.threadIdx.x, out.shape[0], THREADS):
        out[i] -= weight * u[b, t, k, i]


@cuda.jit(device=True)
def reflection_bar(u, b, t, k, alpha, x, ybar, u_bar, alpha_bar, parts):
    """Cotangents of ``y = x - alpha u_k (u_k . x)``; returns ``alpha u_k . ybar``."""
    ux, uy = project(u, b, t, k, x, parts), project(u, b, t, k, ybar, parts)
    if cuda.threadIdx.x == 0:
        alpha_bar[b, t, k] = -ux * uy
    for i in range(cuda.threadIdx.x, x.shape[0], THREADS):
        u_bar[b, t, k, i] = -alpha * (ux * ybar[i] + uy * x[i])
    return alpha * uy


@cuda.jit(device=True)
def dplr_apply(params, b, t, x, out, work, parts):
    """``out = x - sum_k alpha_k u_k (u_k . x)``, which is its own transpose."""
    u, alpha = params
    copy(x, out)
    for k in range(u.shape[2]):
        subtract(u, b, t, k, alpha[b, t, k] * project(u, b, t, k, x, parts), out)


@cuda.jit(device=True)
def dplr_pull(params, bars, b, t, x, ybar, xbar, work, parts):
    """Every term of the sum sees ``x`` and ``ybar`` themselves."""
    (u, alpha), (u_bar, alpha_bar) = params, bars
    copy(ybar, xbar)
    for k in range(u.shape[2]):
        weight = reflection_bar(u, b, t, k, alpha[b, t, k], x, ybar, u_bar, alpha_bar, parts)
        subtract(u, b, t, k, weight, xbar)


@cuda.jit(device=True)
def householder_apply(params, b, t, x, out, work, parts):
    """One reflection after the other, reflection 1 first."""
    u, alpha = params
    copy(x, out)
    for k in range(u.shape[2]):
        subtract(u, b, t, k, alpha[b, t, k] * project(u, b, t, k, out, parts), out)


@cuda.jit(device=True)
def householder_transpose(params, b, t, y, out, work, parts):
    """The same reflections, the last one first."""
    u, alpha = params
    copy(y, out)
    for back in range(u.shape[2]):
        k = u.shape[2] - 1 - back
        subtract(u, b, t, k, alpha[b, t, k] * project(u, b, t, k, out, parts), out)


@cuda.jit(device=True)
def householder_pull(params, bars, b, t, x, ybar, xbar, work, parts):
    """The chain rule through the single reflections; row ``k`` of ``work`` is what reflection ``k`` sees."""
    (u, alpha), (u_bar, alpha_bar) = params, bars
    rank, dim = u.shape[2], u.shape[3]
    copy(x, work[:dim])
    for k in range(rank - 1):
        seen, after = work[k * dim : (k + 1) * dim], work[(k + 1) * dim : (k + 2) * dim]
        copy(seen, after)
        subtract(u, b, t, k, alpha[b, t, k] * project(u, b, t, k, seen, parts), after)
    copy(ybar, xbar)
    for back in range(rank):
        k = rank - 1 - back
        seen = work[k * dim : (k + 1) * dim]
        weight = reflection_bar(u, b, t, k, alpha[b, t, k], seen, xbar, u_bar, alpha_bar, parts)
        subtract(u, b, t, k, weight, xbar)


# Kronecker: k1 (B, T, d1, d1), k2 (B, T, d2, d2); a vector is a d1 x d2 matrix, and e = (i, j) one of its elements.


@cuda.jit(device=True)
def kronecker_apply(params, b, t, x, out, work, parts):
    """``out = X - K1 X K2^T``"""
    k1, k2 = params
    d1, d2 = k1.shape[2], k2.shape[2]
    for e in range(cuda.threadIdx.x, d1 * d2, THREADS):
        i, j = e // d2, e % d2
        dot = x.dtype.type(0)
        for l in range(d1):
            dot += k1[b, t, i, l] * x[l * d2 + j]
        work[e] = dot  # K1 X
    cuda.syncthreads()
    for e in range(cuda.threadIdx.x, d1 * d2, THREADS):
        i, j = e // d2, e % d2
        dot = x.dtype.type(0)
        for l in range(d2):
            dot += work[i * d2 + l] * k2[b, t, j, l]
        out[e] = x[e] - dot


@cuda.jit(device=True)
def kronecker_transpose(params, b, t, y, out, work, parts):
    """``out = Y - K1^T Y K2``; leaves ``Y K2`` in ``work``."""
    k1, k2 = params
    d1, d2 = k1.shape[2], k2.shape[2]
    for e in range(cuda.threadIdx.x, d1 * d2, THREADS):
        i, j = e // d2, e % d2
        dot = y.dtype.type(0)
        for l in range(d2):
            dot += y[i * d2 + l] * k2[b, t, l, j]
        work[e] = dot
    cuda.syncthreads()
    for e in range(cuda.threadIdx.x, d1 * d2, THREADS):
        i, j = e // d2, e % d2
        dot = y.dtype.type(0)
        for l in range(d1):
            dot += k1[b, t, l, i] * work[l * d2 + j]
        out[e] = y[e] - dot


@cuda.jit(device=True)
def kronecker_pull(params, bars, b, t, x, ybar, xbar, work, parts):
    """``K1_bar = -(Y K2) X^T`` and ``K2_bar = -Y^T (K1 X)``, with ``Y`` for ``ybar``."""
    (k1, k2), (k1_bar, k2_bar) = params, bars
    d1, d2 = k1.shape[2], k2.shape[2]
    kronecker_transpose(params, b, t, ybar, xbar, work, parts)
    for e in range(cuda.threadIdx.x, d1 * d1, THREADS):
        i, l = e // d1, e % d1
        dot = x.dtype.type(0)
        for j in range(d2):
            dot += work[i * d2 + j] * x[l * d2 + j]
        k1_bar[b, t, i, l] = -dot
    cuda.syncthreads()
    for e in range(cuda.threadIdx.x, d1 * d2, THREADS):
        i, j = e // d2, e % d2
        dot = x.dtype.type(0)
        for l in range(d1):
            dot += k1[b, t, i, l] * x[l * d2 + j]
        work[e] = dot  # K1 X
    cuda.syncthreads()
    for e in range(cuda.threadIdx.x, d2 * d2, THREADS):
        m, j = e // d2, e % d2
        dot = x.dtype.type(0)
        for i in range(d1):
            dot += ybar[i * d2 + m] * work[i * d2 + j]
        k2_bar[b, t, m, j] = -dot


# Monarch: blocks (B, T, J, s, s), alpha (B, T, J); element i of block j is channel e = (j, i).


@cuda.jit(device=True)
def monarch_apply(params, b, t, x, out, work, parts):
    """``out_j = x_j - alpha_j M_j x_j``; leaves ``M_j x_j`` in ``work``."""
    blocks, alpha = params
    size = blocks.shape[3]
    for e in range(cuda.threadIdx.x, x.shape[0], THREADS):
        j, i = e // size, e % size
        dot = x.dtype.type(0)
        for l in range(size):
            dot += blocks[b, t, j, i, l] * x[j * size + l]
        work[e] = dot
        out[e] = x[e] - alpha[b, t, j] * dot


@cuda.jit(device=True)
def monarch_transpose(params, b, t, y, out, work, parts):
    """``out_j = y_j - alpha_j M_j^T y_j``"""
    blocks, alpha = params
    size = blocks.shape[3]
    for e in range(cuda.threadIdx.x, y.shape[0], THREADS):
        j, i = e // size, e % size
        dot = y.dtype.type(0)
        for l in range(size):
            dot += blocks[b, t, j, l, i] * y[j * size + l]
        out[e] = y[e] - alpha[b, t, j] * dot


@cuda.jit(device=True)
def monarch_pull(params, bars, b, t, x, ybar, xbar, work, parts):
    """``M_bar_j = -alpha_j ybar_j x_j^T`` and ``alpha_bar_j = -ybar_j . (M_j x_j)``"""
    (blocks, alpha), (blocks_bar, alpha_bar) = params, bars
    size = blocks.shape[3]
    monarch_apply(params, b, t, x, xbar, work, parts)  # for what it leaves in `work`
    cuda.syncthreads()
    monarch_transpose(params, b, t, ybar, xbar, work, parts)
    for e in range(cuda.threadIdx.x, x.shape[0], THREADS):
        j, i = e // size, e % size
        for l in range(size):
            blocks_bar[b, t, j, i, l] = -(alpha[b, t, j] * ybar[e]) * x[j * size + l]
    for j in range(cuda.threadIdx.x, blocks.shape[2], THREADS):
        dot = x.dtype.type(0)
        for i in range(size):
            dot += ybar[j * size + i] * work[j * size + i]
        alpha_bar[b, t, j] = -dot


# Any matrix, one for each step or one for all: q (B, T, D, D) or (D, D)


@cuda.jit(device=True)
def product(q, x, out):
    """``out = q x``"""
    for i in range(cuda.threadIdx.x, x.shape[0], THREADS):
        dot = x.dtype.type(0)
        for j in range(x.shape[0]):
            dot += q[i, j] * x[j]
        out[i] = dot


@cuda.jit(device=True)
def product_transpose(q, y, out):
    """``out = q^T y``"""
    for j in range(cuda.threadIdx.x, y.shape[0], THREADS):
        dot = y.dtype.type(0)
        for i in range(y.shape[0]):
            dot += q[i, j] * y[i]
        out[j] = dot


@cuda.jit(device=True)
def dense_apply(params, b, t, x, out, work, parts):
    product(params[0][b, t], x, out)


@cuda.jit(device=True)
def dense_transpose(params, b, t, y, out, work, parts):
    product_transpose(params[0][b, t], y, out)


@cuda.jit(device=True)
def dense_pull(params, bars, b, t, x, ybar, xbar, work, parts):
    """``Q_bar = ybar x^T``"""
    product_transpose(params[0][b, t], ybar, xbar)
    for i in range(cuda.threadIdx.x, x.shape[0], THREADS):
        for j in range(x.shape[0]):
            bars[0][b, t, i, j] = ybar[i] * x[j]


@cuda.jit(device=True)
def fixed_apply(params, b, t, x, out, work, parts):
    product(params[0], x, out)


@cuda.jit(device=True)
def fixed_transpose(params, b, t, y, out, work, parts):
    product_transpose(params[0], y, out)


@cuda.jit(device=True)
def fixed_pull(params, bars, b, t, x, ybar, xbar, work, parts):
    """The cotangent of the matrix is a sum over all steps of all sequences, which is left to one matrix product."""
    product_transpose(params[0], ybar, xbar)


BUILT_IN = {
    "dplr": by_block(dplr_apply, dplr_apply, dplr_pull),
    "householder": by_block(householder_apply, householder_transpose, householder_pull),
    "kronecker": by_block(kronecker_apply, kronecker_transpose, kronecker_pull),
    "monarch": by_block(monarch_apply, monarch_transpose, monarch_pull),
    "dense": by_block(dense_apply, dense_transpose, dense_pull),
    "fixed": by_block(fixed_apply, fixed_transpose, fixed_pull),
}


# A user's own


@cache
def device_function(function: Callable[..., Any]) -> Any:
    """A user's function as kernels can call it; the same for the same function, so that nothing compiles twice."""
    return cuda.jit(device=True)(getattr(function, "py_func", function))


@cache
def own(
    apply: Callable[..., Any],
    cotangent: Callable[..., Any],
    transpose: Callable[..., Any] | None,
    axes: tuple[int, ...],
) -> Mixer:
    """A user's own mixer; `axes` are the numbers of axes of its parameters.

    Without a `transpose`, ``params`` has room besides, for the cotangents that nobody wants: one array
    ``(blocks, THREADS, ...)`` for each parameter.
    """
    params, bars = _of_step("params", axes, "b", "t"), _of_step("bars", axes, "b", "t")
    apply_step = _written("params, b, t, x, out", apply, f"x, out, {params}")
    pull_step = _written("params, bars, b, t, x, ybar, xbar", cotangent, f"x, ybar, xbar, {params}, {bars}")
    if transpose is not None:
        transpose_step = _written("params, b, t, y, out", transpose, f"y, out, {params}")
    else:  # at what x the cotangents are taken does not matter to Q^T y
        unwanted = _of_step("params", axes, "cuda.blockIdx.x", "cuda.threadIdx.x", first=len(axes))
        transpose_step = _written("params, b, t, y, out", cotangent, f"y, y, out, {params}, {unwanted}")
    return by_thread(apply_step, transpose_step, pull_step)


def _of_step(arrays: str, axes: Sequence[int], b: str, t: str, first: int = 0) -> str:
    """The arrays of one step, as arguments. Numba makes a number of ``[b, t, ...]`` where a 0-d array is wanted."""
    views = []
    for n, ndim in enumerate(axes):
        array = f"{arrays}[{first + n}]"
        views.append(f"{array}[{b}, {t}, ...]" if ndim > 2 else f"{array}[{b}, {t} : {t} + 1].reshape(())")
    return ", ".join(views)


def _written(takes: str, function: Callable[..., Any], gives: str) -> Any:
    """A step that calls a user's function, written out for the number of parameters that the mixer has."""
    names = {"function": device_function(function), "cuda": cuda}
    exec(f"def step({takes}):\n    function({gives})\n", names)
    return cuda.jit(device=True)(names["step"])
