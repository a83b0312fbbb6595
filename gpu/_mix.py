"""Kernels of channel mixing: which shape class serves a call, and its launch. The doors are in `fpnumba.gpu.mixers`."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fpnumba.gpu import _device, _shapes
from fpnumba.gpu._report import store

Array = Any
Params = tuple[Array, ...]

# Most rows of a low-rank mixer that a thread holds at once.
MOST_ROWS = 8
# Registers that a thread may take in groups of so many: such that several steps are on their way at once; and, before
# rows are read twice, such that nothing is spilled.
REGISTERS = ((32, 112), (64, 112), (128, 168), (256, 128), (512, 120))
AT_MOST = ((128, 230), (256, 230))

# Bytes of an element, and of one in the dtype that it is computed in.
SIZES = {"float64": (8, 8), "float32": (4, 4), "float16": (2, 4), "bfloat16": (2, 4)}


class Grid(NamedTuple):
    """A kernel and how it is laid out."""

    kernel: _device.Kernel
    blocks: int
    threads: int
    shared: int

    def run(self, *arguments: Any) -> None:
        """Launch."""
        _device.launch(self.kernel, self.blocks, self.threads, arguments, shared=self.shared)


def _power(n: int, least: int = 1) -> int:
    """The smallest power of two that is not below `n`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def _sizes(dtype: Any) -> tuple[int, int]:
    return SIZES[dtype if isinstance(dtype, str) else np.dtype(dtype).name]


# --- low rank -----------------------------------------------------------------------------------------------------


def _rows(dim: int, rank: int, width: int, real: int, vectors: int, product: bool) -> tuple[int, int, int]:
    """Rows of `u` that are held at once, threads of a step, and accesses of a thread to a row.

    As few tiles of rows as there can be, and then as few threads, so that sums cross few warps, as leave a thread's
    rows, `vectors` more, and the sums in registers; `real` are the bytes of a number there.
    """
    for tiles in range(1, rank + 1):
        rows = -(-rank // tiles)
        held = rows + vectors + (tiles > 1 and not product)
        sums = vectors * rows + (rows * (rows - 1) // 2 if product else 0)
        for group, registers in (*REGISTERS, *AT_MOST) if rows <= MOST_ROWS else ():
            accesses = -(-dim // (group * width))
            if (accesses * width * held + sums) * real // 4 + 32 <= registers:
                return rows, group, accesses
    return 1, 512, -(-dim // (512 * width))


def _low_rank(
    function: str, dtype: Any, dim: int, rank: int, width: int, product: bool, reverse: bool, steps: int
) -> Grid:
    vectors = 1 if function == "low_rank_apply" else 2
    _, real = _sizes(dtype)
    rows, group, accesses = _rows(dim, rank, width, real, vectors, product)
    threads = 128 if group == 32 else group
    macros = {
        "STORE": store(dtype),
        "RANK": rows,
        "PRODUCT": int(product),
        "REVERSED": int(reverse and product),
        "EACH": width,
        "ACCESSES": accesses,
        "GROUP": group,
        "THREADS": threads,
        "MANY": int(rank > rows),
    }
    sums = vectors * rows + (rows * (rows - 1) // 2 if product else 0)
    numbers = sums if group == 32 else 2 * sums * (group // 32)
    if vectors == 2 and rank > rows:
        numbers += -(-rank // rows) * rows
    at_once = threads // group
    shared = at_once * numbers * real
    return Grid(_device.Kernel.of("mix_low_rank.cu", function, macros), -(-steps // at_once), threads, shared)


def low_rank_apply(product: bool, params: Params, x: Array, transposed: bool) -> Array:
    """``Q x`` or ``Q^T x`` of a sum of terms or a product of reflections."""
    u, alpha = params
    dim, rank = x.shape[-1], u.shape[-2]
    if rank == 0 or x.size == 0:
        return x.copy()
    y = _shapes.empty_like(x)
    steps = x.size // dim
    width = _shapes.each(dim, x, u, y)
    grid = _low_rank("low_rank_apply", x.dtype, dim, rank, width, product, transposed, steps)
    grid.run(u, alpha, x, y, np.int64(steps), np.int32(rank), np.int32(dim))
    return y


def low_rank_cotangent(product: bool, params: Params, x: Array, ybar: Array) -> Params:
    """Cotangents of ``u`` and ``alpha``."""
    u, alpha = params
    bars = _shapes.empty_like(u), _shapes.empty_like(alpha)
    dim, rank = x.shape[-1], u.shape[-2]
    if u.size:
        steps = x.size // dim
        width = _shapes.each(dim, x, u, ybar, bars[0])
        grid = _low_rank("low_rank_cotangent", x.dtype, dim, rank, width, product, False, steps)
        grid.run(u, alpha, x, ybar, *bars, np.int64(steps), np.int32(rank), np.int32(dim))
    return bars


# --- blocks: Monarch, and Dense as one block ----------------------------------------------------------------------


class Chunked(NamedTuple):
    """Where every sequence of a solve is, see ``kernels/mix_blocks.cu``."""

    done: Array  # (B,) int32
    chunk: int
    chunks: int
    steps: int
    backward: bool


def _blocks(
    function: str,
    dtype: Any,
    size: int,
    width: int,
    total: int,
    *,
    plain: bool,
    inputs: str = "store",
    outputs: str = "store",
    at: Chunked | None = None,
    pieces: int = 1,
) -> Grid:
    lanes = min(32, _power(-(-size // width)))
    threads = 128
    macros: dict[str, object] = {
        "STORE": store(dtype),
        "IN": inputs,
        "OUT": outputs,
        "EDGE": size,
        "ROW_LANES": lanes,
        "EACH": width,
        "PLAIN": int(plain),
        "CHUNKED": int(at is not None),
        "BACKWARD": int(at is not None and at.backward),
    }
    spans = -(-size // (lanes * width))
    shared = 0
    if function == "block_rows":
        rows = 8 if spans == 1 else 4
        macros["ROWS_EACH"] = rows
        threads = 256 if spans > 1 else 128
        blocks = -(-(total * size) // (threads // lanes * rows))
    else:
        groups = min(32 // lanes, _power(size + 1) // 2)  # a power of two that is not above the rows
        if lanes == 32 and size > 256:
            threads, groups = 256, 8
            numbers = width if function == "block_columns" else 1
            shared = 7 * 32 * numbers * _sizes(dtype)[1]
        macros["ROW_GROUPS"] = groups
        units = total * (spans if function == "block_columns" else pieces)
        blocks = -(-units * lanes * groups // threads)
    macros["THREADS"] = threads
    return Grid(_device.Kernel.of("mix_blocks.cu", function, macros), blocks, threads, shared)


def blocks_apply(
    m: Array, alpha: Array | None, x: Array, transposed: bool, out: Array | None = None
) -> Array:
    """``x - alpha M x`` block by block, or with the transpose; without `alpha`, ``M x``.

    `x` and `out` may lie in the storage dtype of `m` or in the dtype that it is computed in.
    """
    out = _shapes.empty_like(x) if out is None else out
    if m.size and x.size:
        blocks_product(m, alpha, x, out, transposed)()
    return out


def blocks_product(
    m: Array, alpha: Array | None, x: Array, out: Array, transposed: bool, at: Chunked | None = None
) -> Callable[[], None]:
    """What `blocks_apply` does, to be called as often as it is wanted; none of the arrays may be empty."""
    size = m.shape[-1]
    total = x.size // size
    width = _shapes.each(size, m, *(a for a in (x, out) if a.dtype == m.dtype))
    inputs, outputs = ("store" if a.dtype == m.dtype else "real" for a in (x, out))
    function = "block_columns" if transposed else "block_rows"
    grid = _blocks(
        function, m.dtype, size, width, total, plain=alpha is None, inputs=inputs, outputs=outputs, at=at
    )
    done, *sizes = (None, 1, 1, 1) if at is None else at[:4]
    count = x.shape[-1] // size
    arguments = (m, alpha, x, out, np.int64(total), np.int64(count), done, *map(np.int64, sizes))
    return lambda: grid.run(*arguments)


def blocks_cotangent(m: Array, alpha: Array | None, x: Array, ybar: Array) -> tuple[Array, Array | None]:
    """Cotangents of the blocks and of `alpha`; without it, ``ybar x^T``."""
    bar = _shapes.empty_like(m)
    alpha_bar = None if alpha is None else _shapes.empty_like(alpha)
    if m.size == 0:
        return bar, alpha_bar
    size = m.shape[-1]
    total = x.size // size
    pieces = 1
    if alpha is None:  # rows of one matrix may go to several blocks
        pieces = max(1, min(size // 8, -(-8 * _device.multiprocessors() // total)))
    width = _shapes.each(size, m, bar, *(a for a in (x, ybar) if a.dtype == m.dtype))
    inputs = "store" if x.dtype == m.dtype else "real"
    grid = _blocks(
        "block_cotangent", m.dtype, size, width, total, plain=alpha is None, inputs=inputs, pieces=pieces
    )
    grid.run(m, alpha, x, ybar, bar, alpha_bar, np.int64(total), np.int32(pieces))
    return bar, alpha_bar


# --- Kronecker ----------------------------------------------------------------------------------------------------


def kronecker_tile(d1: int, d2: int) -> tuple[int, int]:
    """Rows of a thread's tile, and threads of a step."""
    tall = 8 if d1 >= 32 and d2 >= 32 else 4
    tiles = -(-d1 // tall) * -(-d2 // tall) * tall // 4
    return tall, min(256, -(-tiles // 32) * 32)


def _kronecker(function: str, dtype: Any, d1: int, d2: int, width: int, transposed: bool, steps: int) -> Grid:
    tall, group = kronecker_tile(d1, d2)
    itemsize = _sizes(dtype)[1]
    vec = 16 // itemsize

    def padded(n: int) -> int:
        return -(-n // tall) * tall

    def stride(n: int) -> int:
        return padded(n) + (0 if padded(n) // vec % 2 else vec)

    vectors = 2 if function == "kronecker_apply" else 4
    numbers = padded(d1) * stride(d1) + padded(d2) * stride(d2) + vectors * padded(d1) * stride(d2)
    at_once = 4 if group == 32 and numbers * itemsize <= 8192 else 1
    shared = at_once * numbers * itemsize
    macros = {
        "STORE": store(dtype),
        "D1": d1,
        "D2": d2,
        "TALL": tall,
        "EACH": width,
        "GROUP": group,
        "THREADS": group * at_once,
        "TRANSPOSED": int(transposed),
    }
    kernel = _device.Kernel.of("mix_kronecker.cu", function, macros)
    return Grid(kernel, -(-steps // at_once), group * at_once, shared)


def _both(d1: int, d2: int, *arrays: Array) -> int:
    """Neighbouring elements of one access to rows of `d1` and of `d2`."""
    return int(_shapes.each(math.gcd(d1, d2), *arrays))


def kronecker_apply(params: Params, x: Array, transposed: bool) -> Array:
    """``x - vec(K1 X K2^T)`` or with the transposes."""
    k1, k2 = params
    y = _shapes.empty_like(x)
    if x.size == 0:
        return y
    d1, d2 = k1.shape[-1], k2.shape[-1]
    steps = x.size // (d1 * d2)
    grid = _kronecker("kronecker_apply", x.dtype, d1, d2, _both(d1, d2, x, k1, k2, y), transposed, steps)
    if grid.shared <= _device.shared_limit():
        grid.run(k1, k2, x, y, np.int64(steps))
        return y
    left, right, seen = _real(k1, k2, x.reshape(*x.shape[:-1], d1, d2))
    if transposed:
        left = left.swapaxes(-1, -2)
    else:
        right = right.swapaxes(-1, -2)
    mixed = _device.matmul(_device.matmul(left, seen), right)
    y[...] = (seen - mixed).reshape(x.shape).astype(x.dtype)
    return y


def kronecker_cotangent(params: Params, x: Array, ybar: Array) -> Params:
    """Cotangents of ``K1`` and ``K2``."""
    k1, k2 = params
    bars = _shapes.empty_like(k1), _shapes.empty_like(k2)
    if x.size == 0:
        return bars
    d1, d2 = k1.shape[-1], k2.shape[-1]
    steps = x.size // (d1 * d2)
    width = _both(d1, d2, x, ybar, k1, k2, *bars)
    grid = _kronecker("kronecker_cotangent", x.dtype, d1, d2, width, False, steps)
    if grid.shared <= _device.shared_limit():
        grid.run(k1, k2, x, ybar, *bars, np.int64(steps))
        return bars
    shape = (*x.shape[:-1], d1, d2)
    left, right, seen, bar = _real(k1, k2, x.reshape(shape), ybar.reshape(shape))
    back, forth = _device.matmul(bar, right), _device.matmul(left, seen)
    bars[0][...] = -_device.matmul(back, seen.swapaxes(-1, -2)).astype(k1.dtype)
    bars[1][...] = -_device.matmul(bar.swapaxes(-1, -2), forth).astype(k2.dtype)
    return bars


def _real(*arrays: Array) -> list[Array]:
    """In the dtype that is computed in; the arrays themselves where that is theirs."""
    return [a.astype(_shapes.real(a.dtype), copy=False) for a in arrays]


# --- Fixed --------------------------------------------------------------------------------------------------------


def fixed_apply(q: Array, x: Array, transposed: bool) -> Array:
    """``Q x`` or ``Q^T x`` with one matrix for all steps: a single product of matrices."""
    if x.size == 0:
        return _shapes.empty_like(x)
    wide, rows = _real(q, x)
    y = _device.matmul(rows.reshape(-1, x.shape[-1]), wide if transposed else wide.T)
    return y.reshape(x.shape).astype(x.dtype, copy=False)


def fixed_cotangent(q: Array, x: Array, ybar: Array) -> Array:
    """``sum_bt ybar x^T``; `x` and `ybar` in the storage dtype or the one that is computed in."""
    if x.size == 0:
        return _device.xp().zeros_like(q)
    seen, bar = _real(x, ybar)
    dim = q.shape[-1]
    return _device.matmul(bar.reshape(-1, dim).T, seen.reshape(-1, dim)).astype(q.dtype, copy=False)


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    found: list[Grid] = []
    for dtype, width in (("float32", 4), ("float64", 2), ("bfloat16", 8)):
        found += [
            _low_rank("low_rank_apply", dtype, 1024, 2, width, False, False, 1),
            _low_rank("low_rank_cotangent", dtype, 1024, 8, width, True, False, 1),
            _blocks("block_rows", dtype, 32, width, 1, plain=False),
            _blocks("block_columns", dtype, 1024, width, 1, plain=True, inputs="real", outputs="real"),
            _blocks("block_cotangent", dtype, 32, width, 1, plain=False),
            _kronecker("kronecker_apply", dtype, 32, 32, width, False, 1),
            _kronecker("kronecker_cotangent", dtype, 32, 32, width, False, 1),
        ]
    found += [
        _low_rank("low_rank_apply", "float16", 1023, 11, 1, True, True, 1),
        _blocks("block_rows", "float16", 3, 1, 1, plain=False),
        _kronecker("kronecker_apply", "float16", 3, 5, 1, True, 1),
    ]
    return [grid.kernel for grid in found]
