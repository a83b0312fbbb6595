"""Channel mixing inside a kernel: what one step of each mixer does, inlined by Numba into every loop that calls it.

A mixer is a named tuple of arrays, and its class decides at compile time what `mix`, `mix_transpose` and `pull` are:

    mix(p, b, t, n, d, out, work)                       out[k] = Q d[k]     for the n steps t + k of sequence b
    mix_transpose(p, b, t, n, e, out, work)             out[k] = Q^T e[k]
    pull(p, bar, b, t, n, d, e, out, work)              the same, and the parameters' cotangents of y = Q d, into bar

``d``, ``e`` and ``out`` are scratch of `BLOCK` rows of ``D`` numbers, ``work`` is scratch of `work_size` numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from fpnumba.cpu._jit import OPTIONS, kernel
from fpnumba.cpu._tiles import add_product

# Most rows that are mixed together.
BLOCK = 8

STEP_OPTIONS = OPTIONS | {"forceinline": True}


class DPLR(NamedTuple):
    """``Q = I - sum_i alpha_i u_i u_i^T``"""

    u: Any
    alpha: Any


class Householder(NamedTuple):
    """``Q = (I - alpha_r u_r u_r^T) ... (I - alpha_1 u_1 u_1^T)``"""

    u: Any
    alpha: Any


class Kronecker(NamedTuple):
    """``Q v = v - vec(K1 V K2^T)``"""

    k1: Any
    k2: Any


class Monarch(NamedTuple):
    """``Q = I - blockdiag(alpha_j M_j)``"""

    blocks: Any
    alpha: Any


class Dense(NamedTuple):
    """Any matrix per step."""

    q: Any


class Fixed(NamedTuple):
    """One matrix for all steps, and its transpose."""

    q: Any
    qt: Any


class Custom(NamedTuple):
    """A user's own functions, compiled, and their arrays; see `fpnumba.cpu._custom`."""

    apply: Any
    transpose: Any
    cotangent: Any
    arrays: tuple[Any, ...]
    spare: tuple[Any, ...]


def mix(p, b, t, n, d, out, work):
    """Declared here, defined by the overloads below."""
    raise NotImplementedError


def mix_again(p, b, t, n, d, out, work):
    """`mix` of one step right after another `mix` of the same step, whose ``work`` is as that left it."""
    raise NotImplementedError


def mix_transpose(p, b, t, n, d, out, work):
    """Declared here, defined by the overloads below."""
    raise NotImplementedError


def pull(p, bar, b, t, n, d, e, out, work):
    """Declared here, defined by the overloads below."""
    raise NotImplementedError


def is_kind(p: Any, kind: type) -> bool:
    return isinstance(p, types.BaseNamedTuple) and p.instance_class is kind


def defines(
    stub: Callable[..., Any], kind: type, *, by_type: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the decorated function what `stub` is for the mixer class `kind`.

    With `by_type` it is called with the Numba type of the mixer, and returns that function.
    """

    def register(step: Callable[..., Any]) -> Callable[..., Any]:
        def chosen(p: Any) -> Any:
            if not is_kind(p, kind):
                return None
            return step(p) if by_type else step

        if stub is pull:

            @overload(pull, jit_options=STEP_OPTIONS)
            def choose_pull(p, bar, b, t, n, d, e, out, work):
                return chosen(p)
        else:

            @overload(stub, jit_options=STEP_OPTIONS)
            def choose(p, b, t, n, d, out, work):
                return chosen(p)

        return step

    return register


def block_size(p: Any) -> int:
    """Rows to mix together: only a matrix that all steps share gains from more than one."""
    return BLOCK if isinstance(p, Fixed) else 1


def work_size(p: Any) -> int:
    """Scratch that the steps of a mixer need, in numbers."""
    if isinstance(p, DPLR | Householder):
        rank, dim = p.u.shape[-2:]
        return int(max(rank, 1) * (dim + 1))
    if isinstance(p, Kronecker):
        d1, d2 = p.k1.shape[-1], p.k2.shape[-1]
        return int(2 * d1 * d2 + d2 * d2)
    return 1


@overload(mix_again, jit_options=STEP_OPTIONS)
def mix_again_anyhow(p, b, t, n, d, out, work):
    if is_kind(p, Kronecker):
        return None

    def again(p, b, t, n, d, out, work):
        mix(p, b, t, n, d, out, work)

    return again


# Products that several steps need


@kernel
def _shared(q, d, out):
    """``out[k] = q d[k]`` for all `BLOCK` rows: each row of ``q`` is read once for them together."""
    dim = q.shape[0]
    zero = q.dtype.type(0)
    for i in range(dim):
        s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
        for j in range(dim):
            value = q[i, j]
            s0 += value * d[0, j]
            s1 += value * d[1, j]
            s2 += value * d[2, j]
            s3 += value * d[3, j]
            s4 += value * d[4, j]
            s5 += value * d[5, j]
            s6 += value * d[6, j]
            s7 += value * d[7, j]
        out[0, i] = s0
        out[1, i] = s1
        out[2, i] = s2
        out[3, i] = s3
        out[4, i] = s4
        out[5, i] = s5
        out[6, i] = s6
        out[7, i] = s7


# Low rank


@defines(mix, DPLR)
@defines(mix_transpose, DPLR)
def dplr_mix(p, b, t, n, d, out, work):
    rank, dim = p.u.shape[2], p.u.shape[3]
    for k in range(n):
        for i in range(rank):
            dot = d.dtype.type(0)
            for j in range(dim):
                dot += p.u[b, t + k, i, j] * d[k, j]
            work[i] = p.alpha[b, t + k, i] * dot
        for j in range(dim):
            out[k, j] = d[k, j]
        for i in range(rank):
            weight = work[i]
            for j in range(dim):
                out[k, j] -= weight * p.u[b, t + k, i, j]


@defines(pull, DPLR)
def dplr_pull(p, bar, b, t, n, d, e, out, work):
    rank, dim = p.u.shape[2], p.u.shape[3]
    for k in range(n):
        for j in range(dim):
            out[k, j] = e[k, j]
        for i in range(rank):
            ud = d.dtype.type(0)
            ue = d.dtype.type(0)
            for j in range(dim):
                ud += p.u[b, t + k, i, j] * d[k, j]
                ue += p.u[b, t + k, i, j] * e[k, j]
            alpha = p.alpha[b, t + k, i]
            bar.alpha[b, t + k, i] = -ud * ue
            ud *= alpha
            ue *= alpha
            for j in range(dim):
                bar.u[b, t + k, i, j] = -(ud * e[k, j]) - ue * d[k, j]
                out[k, j] -= ue * p.u[b, t + k, i, j]


@defines(mix, Householder)
def householder_mix(p, b, t, n, d, out, work):
    rank, dim = p.u.shape[2], p.u.shape[3]
    for k in range(n):
        for j in range(dim):
            out[k, j] = d[k, j]
        for i in range(rank):
            dot = d.dtype.type(0)
            for j in range(dim):
                dot += p.u[b, t + k, i, j] * out[k, j]
            dot *= p.alpha[b, t + k, i]
            for j in range(dim):
                out[k, j] -= dot * p.u[b, t + k, i, j]


@defines(mix_transpose, Householder)
def householder_transpose(p, b, t, n, d, out, work):
    rank, dim = p.u.shape[2], p.u.shape[3]
    for k in range(n):
        for j in range(dim):
            out[k, j] = d[k, j]
        for step in range(rank):
            i = rank - 1 - step
            dot = d.dtype.type(0)
            for j in range(dim):
                dot += p.u[b, t + k, i, j] * out[k, j]
            dot *= p.alpha[b, t + k, i]
            for j in range(dim):
                out[k, j] -= dot * p.u[b, t + k, i, j]


@defines(pull, Householder)
def householder_pull(p, bar, b, t, n, d, e, out, work):
    """Chain rule through the single reflections: their inputs are kept in ``work``, ``rank`` rows."""
    rank, dim = p.u.shape[2], p.u.shape[3]
    for k in range(n):
        for j in range(dim):
            work[j] = d[k, j]
        for i in range(rank - 1):
            at = i * dim
            dot = d.dtype.type(0)
            for j in range(dim):
                dot += p.u[b, t + k, i, j] * work[at + j]
            dot *= p.alpha[b, t + k, i]
            for j in range(dim):
                work[at + dim + j] = work[at + j] - dot * p.u[b, t + k, i, j]
        for j in range(dim):
            out[k, j] = e[k, j]
        for step in range(rank):
            i = rank - 1 - step
            at = i * dim
            ud = d.dtype.type(0)
            ue = d.dtype.type(0)
            for j in range(dim):
                ud += p.u[b, t + k, i, j] * work[at + j]
                ue += p.u[b, t + k, i, j] * out[k, j]
            alpha = p.alpha[b, t + k, i]
            bar.alpha[b, t + k, i] = -ud * ue
            ud *= alpha
            ue *= alpha
            for j in range(dim):
                bar.u[b, t + k, i, j] = -(ud * out[k, j]) - ue * work[at + j]
                out[k, j] -= ue * p.u[b, t + k, i, j]


# Kronecker


@kernel
def _minus_left(d, k, work, transposed, k1, at1, d1, right, at2, d2, out):
    """``out[k] = d[k] - K1 V R`` (or ``K1^T V R``): V row ``k`` of ``d``, R at ``at2`` of ``right``."""
    one, zero, size = d.dtype.type(1), d.dtype.type(0), d1 * d2
    for i in range(size):
        work[i] = zero
        out[k, i] = d[k, i]
    down, along = (1, d1) if transposed else (d1, 1)
    row = k * d.shape[1]
    add_product(k1, at1, down, along, d1, d1, d, row, d2, one, work, 0)
    add_product(work, 0, d2, 1, d1, d2, right, at2, d2, -one, out, row)


@defines(mix, Kronecker)
def kronecker_mix(p, b, t, n, d, out, work):
    d1, d2 = p.k1.shape[2], p.k2.shape[2]
    for k in range(n):
        # The second factor transposed, so that products run along its rows.
        at = d1 * d2
        for i in range(d2):
            for j in range(d2):
                work[at + j * d2 + i] = p.k2[b, t + k, i, j]
        here = (b * p.k1.shape[1] + t + k) * d1 * d1
        _minus_left(d, k, work, False, p.k1, here, d1, work, at, d2, out)


@defines(mix_again, Kronecker)
def kronecker_mix_again(p, b, t, n, d, out, work):
    d1, d2 = p.k1.shape[2], p.k2.shape[2]
    here = (b * p.k1.shape[1] + t) * d1 * d1
    _minus_left(d, 0, work, False, p.k1, here, d1, work, d1 * d2, d2, out)


@defines(mix_transpose, Kronecker)
def kronecker_transpose(p, b, t, n, d, out, work):
    d1, d2 = p.k1.shape[2], p.k2.shape[2]
    for k in range(n):
        step = b * p.k1.shape[1] + t + k
        _minus_left(d, k, work, True, p.k1, step * d1 * d1, d1, p.k2, step * d2 * d2, d2, out)


@defines(pull, Kronecker)
def kronecker_pull(p, bar, b, t, n, d, e, out, work):
    d1, d2 = p.k1.shape[2], p.k2.shape[2]
    at, one, zero = d1 * d2, d.dtype.type(1), d.dtype.type(0)
    for k in range(n):
        step, row = b * p.k1.shape[1] + t + k, k * d.shape[1]
        at1, at2 = step * d1 * d1, step * d2 * d2
        # K1 X, then K2_bar = -Y^T (K1 X)
        for i in range(d1 * d2):
            work[i] = zero
            work[at + i] = zero
            out[k, i] = e[k, i]
        for m in range(d2):
            for j in range(d2):
                bar.k2[b, t + k, m, j] = zero
        add_product(p.k1, at1, d1, 1, d1, d1, d, row, d2, one, work, 0)
        add_product(e, row, 1, d2, d2, d1, work, 0, d2, -one, bar.k2, at2)
        # Y K2, then K1_bar = -(Y K2) X^T and Q^T Y = Y - K1^T (Y K2)
        add_product(e, row, d2, 1, d1, d2, p.k2, at2, d2, one, work, at)
        for i in range(d1):
            for l in range(d1):
                dot = zero
                for j in range(d2):
                    dot += work[at + i * d2 + j] * d[k, l * d2 + j]
                bar.k1[b, t + k, i, l] = -dot
        add_product(p.k1, at1, 1, d1, d1, d1, work, at, d2, -one, out, row)


# Monarch


@defines(mix, Monarch)
def monarch_mix(p, b, t, n, d, out, work):
    count, size = p.blocks.shape[2], p.blocks.shape[3]
    for k in range(n):
        for block in range(count):
            at = block * size
            alpha = p.alpha[b, t + k, block]
            for i in range(size):
                dot = d.dtype.type(0)
                for j in range(size):
                    dot += p.blocks[b, t + k, block, i, j] * d[k, at + j]
                out[k, at + i] = d[k, at + i] - alpha * dot


@defines(mix_transpose, Monarch)
def monarch_transpose(p, b, t, n, d, out, work):
    count, size = p.blocks.shape[2], p.blocks.shape[3]
    for k in range(n):
        for block in range(count):
            at = block * size
            alpha = p.alpha[b, t + k, block]
            for j in range(size):
                out[k, at + j] = d[k, at + j]
            for i in range(size):
                weight = alpha * d[k, at + i]
                for j in range(size):
                    out[k, at + j] -= weight * p.blocks[b, t + k, block, i, j]


@defines(pull, Monarch)
def monarch_pull(p, bar, b, t, n, d, e, out, work):
    count, size = p.blocks.shape[2], p.blocks.shape[3]
    for k in range(n):
        for block in range(count):
            at = block * size
            alpha = p.alpha[b, t + k, block]
            alpha_bar = d.dtype.type(0)
            for j in range(size):
                out[k, at + j] = e[k, at + j]
            for i in range(size):
                y = e[k, at + i]
                dot = d.dtype.type(0)
                for j in range(size):
                    m = p.blocks[b, t + k, block, i, j]
                    dot += m * d[k, at + j]
                    out[k, at + j] -= (alpha * y) * m
                    bar.blocks[b, t + k, block, i, j] = -(alpha * y) * d[k, at + j]
                alpha_bar -= y * dot
            bar.alpha[b, t + k, block] = alpha_bar


# Any matrix


@defines(mix, Dense)
def dense_mix(p, b, t, n, d, out, work):
    dim = p.q.shape[2]
    for k in range(n):
        for i in range(dim):
            dot = d.dtype.type(0)
            for j in range(dim):
                dot += p.q[b, t + k, i, j] * d[k, j]
            out[k, i] = dot


@defines(mix_transpose, Dense)
def dense_transpose(p, b, t, n, d, out, work):
    dim = p.q.shape[2]
    for k in range(n):
        for j in range(dim):
            out[k, j] = 0
        for i in range(dim):
            weight = d[k, i]
            for j in range(dim):
                out[k, j] += weight * p.q[b, t + k, i, j]


@defines(pull, Dense)
def dense_pull(p, bar, b, t, n, d, e, out, work):
    dim = p.q.shape[2]
    for k in range(n):
        for j in range(dim):
            out[k, j] = 0
        for i in range(dim):
            weight = e[k, i]
            for j in range(dim):
                out[k, j] += weight * p.q[b, t + k, i, j]
                bar.q[b, t + k, i, j] = weight * d[k, j]


@defines(mix, Fixed)
def fixed_mix(p, b, t, n, d, out, work):
    _shared(p.q, d, out)


@defines(mix_transpose, Fixed)
def fixed_transpose(p, b, t, n, d, out, work):
    _shared(p.qt, d, out)


@defines(pull, Fixed)
def fixed_pull(p, bar, b, t, n, d, e, out, work):
    """The cotangent of the matrix is one product over all steps, which the doors leave to BLAS."""
    _shared(p.qt, e, out)


def as_mixer(kind: Any, params: tuple[Any, ...]) -> Any:
    """The named tuple that kernels take."""
    if not isinstance(kind, str):
        from fpnumba.cpu import _custom

        return _custom.as_mixer(kind, params)
    if kind == "fixed":
        return Fixed(params[0], np.ascontiguousarray(params[0].T))
    classes = {
        "dplr": DPLR,
        "householder": Householder,
        "kronecker": Kronecker,
        "monarch": Monarch,
        "dense": Dense,
    }
    if kind not in classes:
        raise ValueError(
            f"kind: {kind!r} is not a mixer; expected one of {', '.join(classes)}, fixed or a custom kind"
        )
    return classes[kind](*params)
