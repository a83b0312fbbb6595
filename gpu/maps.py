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
from fpnumba.gpu._engine import precision
from fpnumba.gpu._norm import rms_norm, rms_norm_vjp
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
    "product",
    "rms_norm",
    "rms_norm_vjp",
    "scatter_rows",
    "softplus",
    "softplus_vjp",
]

Array = Any

# Rows at least so wide have a block each; narrower ones a warp, and this many share a block.
WIDE, BLOCK, ROWS = 512, 256, 4
# Threads of a matrix.
THREADS = 256


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


def gated(z: Array, y: Array) -> Array:
    """``silu(z) * y``, in one pass."""
    if hasattr(_device.xp(), "cuda"):
        return _elementwise("T z, T y", "T out", "out = z / (1 + exp(-z)) * y")(z, y)
    return activate("silu", z) * y


_GATED_VJP = """
    const T s = 1 / (1 + exp(-z));
    zbar = bar * y * s * (1 + z * (1 - s));
    ybar = bar * (z * s)
"""


def gated_vjp(z: Array, y: Array, bar: Array) -> tuple[Array, Array]:
    """Cotangents of `z` and `y` of :func:`gated`, in one pass."""
    if hasattr(_device.xp(), "cuda"):
        found: tuple[Array, Array] = _elementwise("T z, T y, T bar", "T zbar, T ybar", _GATED_VJP)(z, y, bar)
        return found
    return activate_vjp("silu", z, bar * y), bar * activate("silu", z)


def softplus(raw: Array, bias: Array, out: Array | None = None) -> Array:
    """``log(1 + exp(raw + bias))``, into `out` if there is one."""
    if hasattr(_device.xp(), "cuda"):
        operation = "const T v = x + b; y = (v > 0 ? v : T(0)) + log1p(exp(-fabs(v)))"
        into = () if out is None else (out,)
        return _elementwise("T x, T b", "T y", operation)(raw, bias, *into)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.logaddexp(raw + bias, raw.dtype.type(0), out=out)


def softplus_vjp(y: Array, ybar: Array) -> Array:
    """Cotangent of what :func:`softplus` sees, from its value."""
    if hasattr(_device.xp(), "cuda"):
        return _elementwise("T y, T ybar", "T xbar", "xbar = -expm1(-y) * ybar")(y, ybar)
    return -np.expm1(-y) * ybar


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


def product(a: Array, b: Array, transposed: tuple[bool, bool]) -> Array:
    """The product of two matrices in the precision of `fpnumba.gpu.use_precision`."""
    xp = _device.xp()
    ready = [m if m.shape[1] < 2 or m.strides[1] == m.itemsize else xp.ascontiguousarray(m) for m in (a, b)]
    return _device.product(*ready, transposed=transposed, precision=precision())


# --- rows ---------------------------------------------------------------------------------------------------------


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
        for name in ("unit_rows", "unit_rows_vjp")
        for dtype, dim in (("float32", 1024), ("float32", 16), ("float64", 64))
    ]
    for name in ("factor", "factor_vjp"):
        found.append(_factor(name, "float32", 32, True, True))
        found.append(_factor(name, "float64", 5, False, False))
    return found
