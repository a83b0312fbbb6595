"""What layers of `fpnumba.nn` need of a device beside solves: the doors of `fpnumba.nn.loops`, for CuPy arrays, float32
or float64.
"""

from functools import cache
from typing import Any

import numpy as np

from fpnumba.gpu import _device, _shapes
from fpnumba.gpu._advance import advance
from fpnumba.gpu._columns import column_sums
from fpnumba.gpu._conv import conv, conv_vjp
from fpnumba.gpu._engine import operand as taken
from fpnumba.gpu._engine import precision
from fpnumba.gpu._norm import rms_norm, rms_norm_vjp
from fpnumba.gpu._recording import rehearsed, took
from fpnumba.gpu._report import store

__all__ = [
    "activate",
    "activate_vjp",
    "adamw",
    "advance",
    "column_sums",
    "conv",
    "conv_vjp",
    "gated",
    "gated_vjp",
    "joined",
    "kronecker_factor",
    "kronecker_factor_vjp",
    "lstm_step",
    "lstm_step_vjp",
    "monarch_block",
    "monarch_block_vjp",
    "normalize",
    "normalize_vjp",
    "operand",
    "product",
    "rehearsed",
    "rms_norm",
    "rms_norm_vjp",
    "scatter_rows",
    "softplus",
    "softplus_vjp",
    "took",
    "weight",
    "weight_vjp",
]

Array = Any

# Rows at least so wide have a block each; narrower ones a warp, and this many share a block.
WIDE, BLOCK, ROWS = 512, 256, 4
# Threads of a matrix, and of a block where every thread has a few numbers; rows of such a block where there are any.
THREADS, WIDTH, ROWS_EACH = 256, 256, 8


# Elements of a table of indices against rows at most.
ONE_HOT = 2**26


# --- elementwise --------------------------------------------------------------------------------------------------

VALUES = {
    "identity": "y = x",
    "relu": "y = x < 0 ? T(0) : x",
    "silu": "y = x / (1 + exp(-x))",
    "sigmoid": "y = 1 / (1 + exp(-x))",
}
SLOPES = {
    "identity": "xbar = ybar",
    "relu": "xbar = x > 0 ? ybar : T(0)",
    "silu": "T s = 1 / (1 + exp(-x)); xbar = ybar * s * (1 + x * (1 - s))",
    "sigmoid": "T s = 1 / (1 + exp(-x)); xbar = ybar * s * (1 - s)",
}


@cache
def _elementwise(into: str, out: str, operation: str) -> Any:
    return _device.xp().ElementwiseKernel(into, out, operation, "fpnumba_elementwise")


def activate(name: str, x: Array) -> Array:
    """``activation(x)``, elementwise."""
    xp = _device.xp()
    if hasattr(xp, "cuda"):
        return _elementwise("T x", "T y", VALUES[name])(x)
    with np.errstate(over="ignore"):
        if name in ("silu", "sigmoid"):
            open_ = 1 / (1 + xp.exp(-x))
            return x * open_ if name == "silu" else open_
    return xp.maximum(x, 0) if name == "relu" else x


def activate_vjp(name: str, x: Array, ybar: Array) -> Array:
    """``activation'(x) * ybar``."""
    xp = _device.xp()
    if hasattr(xp, "cuda"):
        return _elementwise("T x, T ybar", "T xbar", SLOPES[name])(x, ybar)
    with np.errstate(over="ignore"):
        if name in ("silu", "sigmoid"):
            open_ = 1 / (1 + xp.exp(-x))
            return ybar * open_ * (1 + x * (1 - open_) if name == "silu" else 1 - open_)
    return xp.where(x > 0, ybar, 0) if name == "relu" else ybar


@cache
def _gate(name: str, dtype: str, said: str, out: str, each: int) -> _device.Kernel:
    macros = {"STORE": store(dtype), "SAID": store(said), "OUT": store(out), "EACH": each, "ACT": 2}
    return _device.Kernel.of("map_gate.cu", name, macros)


def _launch_gate(name: str, z: Array, fed: Array | None, y: Array, bars: tuple[Array, ...], out: Any) -> None:
    first = out[0]
    if fed is not None and fed.dtype != z.dtype:
        fed = fed.astype(z.dtype)
    each = _shapes.each(z.size, y, *bars, *out[1:])
    while any(a is not None and _device.address(a) % (each * a.itemsize) for a in (z, fed, first)):
        each //= 2
    kernel = _gate(name, *(_shapes.name(d) for d in (y.dtype, z.dtype, first.dtype)), each)
    arguments = (z, fed, y, *bars, *out, np.int64(z.size))
    _device.launch(kernel, -(-z.size // (WIDTH * each)), WIDTH, arguments)


def gated(z: Array, y: Array, fed: Array | None = None, *, operand: bool = False) -> Array:
    """``silu(z + fed) * y``, in one pass; with `operand` as products take it."""
    out = _device.xp().empty(z.shape, taken(y.dtype) if operand else y.dtype)
    _launch_gate("gate", z, fed, y, (), (out,))
    return out


def gated_vjp(
    z: Array, y: Array, bar: Array, fed: Array | None = None, *, operand: bool = False
) -> tuple[Array, Array]:
    """Cotangents of `z`, with `operand` as products take it, and `y` of :func:`gated`, in one pass."""
    zbar = _device.xp().empty(z.shape, taken(y.dtype) if operand else y.dtype)
    ybar = _shapes.empty_like(y)
    _launch_gate("gate_vjp", z, fed, y, (bar,), (zbar, ybar))
    return zbar, ybar


def softplus(raw: Array, bias: Array, out: Array | None = None) -> Array:
    """``log(1 + exp(raw + bias))``, into `out` if there is one."""
    if out is not None and not out.flags.c_contiguous:
        out[...] = softplus(_device.xp().ascontiguousarray(raw), bias)
        return out
    raw, dim = _device.xp().ascontiguousarray(raw), raw.shape[-1]
    y, rows = _shapes.empty_like(raw) if out is None else out, raw.size // max(dim, 1)
    each = _shapes.each(dim, raw, bias, y)
    kernel, across = _gate("softplus", *(_shapes.name(raw.dtype),) * 3, each), -(-dim // (WIDTH * each))
    sizes = np.int64(rows), np.int32(dim), np.int32(across)
    _device.launch(kernel, across * -(-rows // ROWS_EACH), WIDTH, (raw, bias, y, *sizes))
    return y


def softplus_vjp(y: Array, ybar: Array, *, operand: bool = False) -> Array:
    """Cotangent of what :func:`softplus` sees, from its value; with `operand` as products take it."""
    y, ybar = (_device.xp().ascontiguousarray(a) for a in (y, ybar))
    xbar = _device.xp().empty(y.shape, taken(y.dtype) if operand else y.dtype)
    each, store_ = _shapes.each(y.size, y, ybar), _shapes.name(y.dtype)
    kernel = _gate("softplus_vjp", store_, store_, _shapes.name(xbar.dtype), each)
    _device.launch(kernel, -(-y.size // (WIDTH * each)), WIDTH, (y, ybar, xbar, np.int64(y.size)))
    return xbar


_ADAMW = """
    const T grad = scale * g;
    m_out = b1 * m + (1 - b1) * grad;
    v_out = b2 * v + (1 - b2) * grad * grad;
    out = (1 - decay) * p - rate * m_out / (sqrt(v_out) + eps)
"""


def adamw(
    p: Array, g: Array, m: Array, v: Array, scale: float, rate: float, decay: float, betas: Any, eps: float
) -> tuple[Array, Array, Array]:
    """One AdamW step: the new parameters and moments; see `fpnumba.nn.loops`."""
    xp, numbers = _device.xp(), [p.dtype.type(n) for n in (scale, rate, decay, *betas, eps)]
    if hasattr(xp, "cuda"):
        into = "T p, T g, T m, T v, T scale, T rate, T decay, T b1, T b2, T eps"
        return tuple(_elementwise(into, "T out, T m_out, T v_out", _ADAMW)(p, g, m, v, *numbers))
    scale, rate, decay, b1, b2, eps = numbers
    grad = scale * g
    m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad * grad
    return (1 - decay) * p - rate * m / (xp.sqrt(v) + eps), m, v


def product(
    a: Array, b: Array, transposed: tuple[bool, bool], out: Array | None = None, *, add: bool = False
) -> Array:
    """The product of two matrices in the precision of `fpnumba.gpu.use_precision`, into `out` or added to it."""
    xp = _device.xp()
    a, b = (m if m.shape[1] < 2 or m.strides[1] == m.itemsize else xp.ascontiguousarray(m) for m in (a, b))
    if a.dtype != b.dtype:
        a, b = operand(a), operand(b)
    return _device.product(a, b, out, transposed=transposed, precision=precision(), add=add)


def operand(array: Array) -> Array:
    """The array as products take it, C-contiguous."""
    dtype, array = taken(array.dtype), _device.xp().ascontiguousarray(array)
    if array.dtype == dtype:
        return array
    out, each = _device.xp().empty(array.shape, dtype), _shapes.each(array.size, array)
    kernel = _gate("rounded", *(_shapes.name(d) for d in (array.dtype, array.dtype, dtype)), each)
    sizes = (np.int64(array.size),)
    _device.launch(kernel, -(-array.size // (WIDTH * each)), WIDTH, (array, out, *sizes))
    return out


# --- rows ---------------------------------------------------------------------------------------------------------


@cache
def _rows(name: str, dtype: str, dim: int) -> tuple[_device.Kernel, int, int]:
    """The kernel, the rows of a block, and the threads of a row."""
    threads = BLOCK if dim >= WIDE else 32
    macros = {"STORE": store(dtype), "THREADS": threads, "ROWS": ROWS}
    return _device.Kernel.of("map_rows.cu", name, macros), ROWS if threads == 32 else 1, threads


def _launch_rows(name: str, like: Array, *arrays: Array, eps: float) -> None:
    count, dim = like.shape
    kernel, rows, threads = _rows(name, _shapes.name(like.dtype), dim)
    shared = 8 * rows * max(1, 2 * threads // 32)
    sizes = np.int64(count), np.int32(dim), np.float64(eps)
    _device.launch(kernel, -(-count // rows), rows * threads, (*arrays, *sizes), shared=shared)


def normalize(y: Array, eps: float) -> tuple[Array, Array]:
    """``u = y / max(||y||, eps)`` row by row, ``(N, D)``, and the norms ``(N,)`` before the maximum."""
    u, norm = _shapes.empty_like(y), _shapes.empty_like(y, len(y))
    _launch_rows("unit_rows", y, y, u, norm, eps=eps)
    return u, norm


def normalize_vjp(u: Array, norm: Array, eps: float, u_bar: Array) -> Array:
    """Cotangent of :func:`normalize`."""
    y_bar = _shapes.empty_like(u)
    _launch_rows("unit_rows_vjp", u, u, norm, u_bar, y_bar, eps=eps)
    return y_bar


def weight(direction: Array, magnitude: Array, out: Array | None = None) -> Array:
    """``magnitude * direction / ||direction||`` row by row, ``(N, D)`` by ``(N, 1)``, into `out` if there is one."""
    if out is not None and out.dtype != direction.dtype:
        out[...] = weight(direction, magnitude)
        return out
    found = _shapes.empty_like(direction) if out is None else out
    _launch_lengths("long_rows", direction, magnitude, found)
    return found


def weight_vjp(direction: Array, magnitude: Array, weight_bar: Array) -> tuple[Array, Array]:
    """Cotangents of `direction` and `magnitude` of :func:`weight`."""
    direction_bar, magnitude_bar = _shapes.empty_like(direction), _shapes.empty_like(magnitude)
    given = direction, magnitude, _device.xp().ascontiguousarray(weight_bar), direction_bar, magnitude_bar
    _launch_lengths("long_rows_vjp", *given)
    return direction_bar, magnitude_bar


def _launch_lengths(name: str, like: Array, *arrays: Array) -> None:
    count, dim = like.shape
    kernel, rows, threads = _rows(name, _shapes.name(like.dtype), dim)
    shared = 16 * rows * max(1, 2 * threads // 32)
    sizes = np.int64(count), np.int32(dim)
    _device.launch(kernel, -(-count // rows), rows * threads, (like, *arrays, *sizes), shared=shared)


@cache
def _factor(name: str, dtype: str, size: int, spectral: bool, flip: bool) -> _device.Kernel:
    macros = {
        "STORE": store(dtype),
        "EDGE": size,
        "FLIP": int(flip),
        "SPECTRAL": int(spectral),
        "THREADS": THREADS,
    }
    return _device.Kernel.of("map_kronecker.cu", name, macros)


def _numbers(size: int, matrices: int, vectors: int) -> int:
    """Numbers of shared memory."""
    return 2 * THREADS // 32 + matrices * size * (size + 1) + vectors * size + 16


def kronecker_factor(
    p: Array, diag: Array, start: float, eps: float, spectral: bool, scale: float, flip: bool
) -> Array:
    """``K = scale * diag(diag) r / divisor``, transposed if `flip`; see `fpnumba.nn.mixer_kernels`.

    Parameters
    ----------
    p : (N, d (d + 1) / 2) array
    diag : (N, d) array

    Returns
    -------
    (N, d, d) array
    """
    count, size = diag.shape
    k = _shapes.empty_like(diag, count, size, size)
    kernel = _factor("factor", _shapes.name(p.dtype), size, spectral, flip)
    arguments = (p, diag, np.float64(start), np.float64(eps), np.float64(scale), k)
    _device.launch(kernel, count, THREADS, arguments, shared=p.dtype.itemsize * _numbers(size, 2, 18))
    return k


def kronecker_factor_vjp(
    p: Array, diag: Array, start: float, eps: float, spectral: bool, scale: float, flip: bool, k_bar: Array
) -> tuple[Array, Array]:
    """Cotangents of `p` and `diag` of :func:`kronecker_factor`."""
    count, size = diag.shape
    p_bar, diag_bar = _shapes.empty_like(p), _shapes.empty_like(diag)
    kernel = _factor("factor_vjp", _shapes.name(p.dtype), size, spectral, flip)
    numbers = np.float64(start), np.float64(eps), np.float64(scale)
    arguments = (p, diag, *numbers, k_bar, p_bar, diag_bar)
    _device.launch(kernel, count, THREADS, arguments, shared=p.dtype.itemsize * _numbers(size, 3, 20))
    return p_bar, diag_bar


def _grams(p: Array, size: int) -> tuple[Array, Array]:
    """``U`` and ``U U^T`` of upper triangles."""
    xp = _device.xp()
    upper = xp.zeros((len(p), size, size), p.dtype)
    upper[:, *np.triu_indices(size)] = p
    return upper, _device.matmul(upper, xp.ascontiguousarray(upper.swapaxes(1, 2)))


def monarch_block(p: Array, eps: float, size: int) -> Array:
    """``M = U U^T / (largest column norm + eps)``; ``p (N, b (b + 1) / 2)`` to ``(N, b, b)``."""
    xp = _device.xp()
    _, gram = _grams(p, size)
    largest = xp.sqrt((gram * gram).sum(2).max(1))
    return gram / (largest + p.dtype.type(eps))[:, None, None]


def monarch_block_vjp(p: Array, eps: float, blocks_bar: Array) -> Array:
    """Cotangent of :func:`monarch_block`; of equal columns the first one counts as the largest."""
    xp, size, rows = _device.xp(), blocks_bar.shape[1], _device.xp().arange(len(p))
    upper, gram = _grams(p, size)
    squares = (gram * gram).sum(2)
    where = squares.argmax(1)
    norm = xp.sqrt(squares[rows, where])
    inverse = 1 / (norm + p.dtype.type(eps))
    gram_bar = blocks_bar * inverse[:, None, None]
    inner = (blocks_bar * gram).sum((1, 2)) * inverse * inverse
    inner = xp.where(norm > 0, inner / xp.where(norm > 0, norm, 1), 0)
    gram_bar[rows, :, where] -= inner[:, None] * gram[rows, where]
    both = xp.ascontiguousarray(gram_bar + gram_bar.swapaxes(1, 2))
    upper_bar = _device.matmul(both, upper)
    return xp.ascontiguousarray(upper_bar[:, *np.triu_indices(size)])


joined = _device.joined


# --- the rest -----------------------------------------------------------------------------------------------------


def lstm_step(gates: Array, fed: Array, before: Array, c: Array, h: Array) -> None:
    """One step of an LSTM; see `fpnumba.nn.loops`."""
    xp, width = _device.xp(), c.shape[1]
    gates += fed
    i, f, g, o = (gates[:, k * width : (k + 1) * width] for k in range(4))
    for gate in (i, f, o):
        gate[:] = (xp.tanh(gate / 2) + 1) / 2
    g[:] = xp.tanh(g)
    c[:] = f * before + i * g
    h[:] = o * xp.tanh(c)


def lstm_step_vjp(
    gates: Array, before: Array, c: Array, h_bar: Array, fed_bar: Array, c_bar: Array, raw_bar: Array
) -> None:
    """Cotangents of :func:`lstm_step`; see `fpnumba.nn.loops`."""
    xp, width = _device.xp(), c.shape[1]
    i, f, g, o = (gates[:, k * width : (k + 1) * width] for k in range(4))
    squashed, out = xp.tanh(c), h_bar + fed_bar
    cell = c_bar + out * o * (1 - squashed * squashed)
    raw_bar[:, :width] = cell * g * i * (1 - i)
    raw_bar[:, width : 2 * width] = cell * before * f * (1 - f)
    raw_bar[:, 2 * width : 3 * width] = cell * i * (1 - g * g)
    raw_bar[:, 3 * width :] = out * squashed * o * (1 - o)
    c_bar[:] = cell * f


def scatter_rows(indices: Array, rows: Array, count: int) -> Array:
    """A table ``(count, D)`` of the sums of the rows of each index, the same every time: a product of matrices."""
    xp = _device.xp()
    table = xp.zeros((count, rows.shape[1]), rows.dtype)
    each = max(1, ONE_HOT // max(count, 1))
    for first in range(0, len(indices), each):
        part = slice(first, first + each)
        which = (indices[part, None] == xp.arange(count)).astype(rows.dtype)
        table += _device.product(which, rows[part], transposed=(True, False))
    return table


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    found = [
        _rows(name, dtype, dim)[0]
        for name in ("unit_rows", "unit_rows_vjp", "long_rows", "long_rows_vjp")
        for dtype, dim in (("float32", 1024), ("float32", 16), ("float64", 64))
    ]
    for name in ("gate", "gate_vjp", "softplus", "softplus_vjp", "rounded"):
        found.append(_gate(name, "float32", "float32", "float32", 4))
        found.append(_gate(name, "float32", "bfloat16", "bfloat16", 4))
        found.append(_gate(name, "float64", "float64", "float64", 1))
    for name in ("factor", "factor_vjp"):
        found.append(_factor(name, "float32", 32, True, True))
        found.append(_factor(name, "float64", 5, False, False))
    return found
