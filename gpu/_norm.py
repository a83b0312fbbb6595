"""RMSNorm of rows and its adjoint; see ``kernels/map_norm.cu``."""

from typing import Any, NamedTuple

import numpy as np

from fpnumba.gpu import _device, _shapes
from fpnumba.gpu._columns import column_sums
from fpnumba.gpu._report import store

Array = Any

# Channels of a thread while a row has threads enough, and rows of a block where a warp has one.
CHANNELS, ROWS = 4, 4
# Threads of a row at most, and of all the blocks that add up over rows, on a multiprocessor.
THREADS, BUSY = 1024, 1024


class _Layout(NamedTuple):
    dtype: str
    dim: int

    @property
    def threads(self) -> int:
        """Of a row."""
        return _shapes.threads(self.dim, CHANNELS, THREADS)

    @property
    def rows(self) -> int:
        """Of a block."""
        return ROWS if self.threads == 32 else 1

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        warps, real = self.threads // 32, 8 if self.dtype == "float64" else 4
        return real * self.rows * (1 if warps == 1 else 2 * warps)

    def kernel(self, name: str) -> _device.Kernel:
        """One of the kernels."""
        channels = max(1, -(-self.dim // self.threads))
        macros = {"STORE": store(self.dtype), "THREADS": self.threads, "ROWS": ROWS, "CHANNELS": channels}
        return _device.Kernel.of("map_norm.cu", name, macros)

    def launch(self, name: str, blocks: int, *arguments: Any) -> None:
        """Launch one of the kernels."""
        threads = self.rows * self.threads
        _device.launch(self.kernel(name), blocks, threads, arguments, shared=self.shared)


def rms_norm(x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """``y = weight * x * scale``, and ``scale = 1 / sqrt(mean(x^2) + eps)``; ``x (N, D)``."""
    count, dim = x.shape
    one, y, scale = _Layout(_shapes.name(x.dtype), dim), _shapes.empty_like(x), _shapes.empty_like(x, count)
    sizes = np.int64(count), np.int32(dim), np.float64(eps)
    one.launch("rms_rows", -(-count // one.rows), x, weight, y, scale, *sizes)
    return y, scale


def rms_norm_vjp(x: Array, weight: Array, scale: Array, ybar: Array) -> tuple[Array, Array]:
    """Cotangents of `x` and `weight` of :func:`rms_norm`."""
    count, dim = x.shape
    one, xbar = _Layout(_shapes.name(x.dtype), dim), _shapes.empty_like(x)
    busy = _device.multiprocessors() * max(1, BUSY // (one.rows * one.threads))
    blocks = min(-(-count // one.rows), busy)
    parts = _shapes.empty_like(x, blocks * one.rows, dim)
    sizes = np.int64(count), np.int32(dim)
    one.launch("rms_rows_vjp", blocks, x, weight, scale, ybar, xbar, parts, *sizes)
    return xbar, column_sums(parts)


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    shapes = (("float32", 1024), ("float32", 16), ("float64", 100))
    return [_Layout(*shape).kernel(name) for name in ("rms_rows", "rms_rows_vjp") for shape in shapes]
