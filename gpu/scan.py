"""Diagonal linear recurrences on the device; section 1 of docs/mathematics.md.

One pass over memory where there are channels enough for the device; otherwise time is cut into segments, see
``kernels/scan.cu``.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fpnumba.gpu import _device, _shapes
from fpnumba.gpu._report import store
from fpnumba.gpu.selective import selective_scan, selective_scan_vjp

__all__ = ["linear_scan", "linear_scan_vjp", "representative", "selective_scan", "selective_scan_vjp"]

Array = Any

# Threads that keep the memory of a multiprocessor busy, and the most of a block.
BUSY, BLOCK = 256, 256
# Steps that a thread asks for ahead of time.
STAGES = 8
# Segments of time are made longer than this, by narrower accesses if need be: each costs the correction of its first
# steps. Below the shortest, time is not split at all.
LONG_SEGMENT, SHORTEST_SEGMENT = 768, 128


class _Walk(NamedTuple):
    """How a scan is laid out over the device."""

    kernel: _device.Kernel
    threads: int
    groups: int  # blocks that share the channels of a sequence
    segments: int
    shared: int


def _kernel(
    function: str, dtype: Any, width: int, threads: int, stages: int, reverse: bool, split: bool
) -> _device.Kernel:
    macros = {
        "STORE": store(dtype),
        "EACH": width,
        "THREADS": threads,
        "STAGES": stages,
        "REVERSE": int(reverse),
        "SPLIT": int(split),
        "MINBLOCKS": 4,
    }
    return _device.Kernel.of("scan.cu", function, macros, cooperative=split)


def _pick(function: str, like: Array, arrays: tuple[Array, ...], reverse: bool, rows: int) -> _Walk:
    width = _shapes.each(like.shape[2], like, *arrays)
    return _plan(function, _shapes.name(like.dtype), like.shape, width, reverse, rows, _device.current())


@lru_cache(1024)
def _plan(
    function: str, dtype: str, shape: tuple[int, int, int], width: int, reverse: bool, rows: int, device: int
) -> _Walk:
    batch, steps, dim = shape
    size = 2 if dtype in ("float16", "bfloat16") else np.dtype(dtype).itemsize
    wanted = BUSY * _device.multiprocessors()

    def parts() -> int:
        return max(1, wanted // max(batch * -(-dim // width), 1))

    if parts() > 1 and width * size > 8 and steps // parts() < LONG_SEGMENT:
        width //= 2
    threads = _shapes.threads(dim, width, BLOCK)
    groups = -(-dim // (threads * width))
    shared = STAGES * rows * threads * width * size
    segments = min(parts(), steps // SHORTEST_SEGMENT)
    if segments > 1:
        kernel = _kernel(function, dtype, width, threads, STAGES, reverse, True)
        segments = min(segments, _device.resident(kernel, threads, shared=shared) // (batch * groups))
        if segments > 1:
            return _Walk(kernel, threads, groups, segments, shared)
    kernel = _kernel(function, dtype, width, threads, STAGES, reverse, False)
    return _Walk(kernel, threads, groups, 1, shared)


def _between(walk: _Walk, batch: int, dim: int, dtype: Any) -> tuple[Any, ...]:
    """What the segments of a walk tell each other: products, ends, a mark for each sequence, the barrier."""
    if walk.segments == 1:
        return None, None, None, None
    xp = _device.xp()
    handed = xp.empty((2, batch, walk.segments, dim), _shapes.real(dtype))
    marks = xp.zeros(batch + 1, np.uint32)
    return handed[0], handed[1], marks[1:], marks


def linear_scan(lam: Array, x: Array, initial: Array | None = None, reverse: bool = False) -> Array:
    """Diagonal linear recurrence ``h_t = lam_t * h_{t-1} + x_t`` with ``h_0 = initial``.

    Section 1 of docs/mathematics.md. With `reverse` time runs backwards, ``h_t = lam_t * h_{t+1} + x_t``, and
    `initial` enters after the last step.

    Parameters
    ----------
    lam, x : (B, T, D) C-contiguous arrays of one dtype
    initial : (B, D) array, optional
        Zeros if left out.
    reverse : bool

    Returns
    -------
    h : (B, T, D) array
    """
    batch, steps, dim = x.shape
    h = _shapes.empty_like(x)
    walk = _pick("scan", x, (lam, initial, h), reverse, 2)
    sizes = (np.int64(steps), np.int32(dim), np.int32(walk.segments), np.int32(walk.groups))
    arguments = (lam, x, initial, h, *sizes, *_between(walk, batch, dim, x.dtype))
    if x.size:
        _device.launch(
            walk.kernel, batch * walk.segments * walk.groups, walk.threads, arguments, shared=walk.shared
        )
    return h


def linear_scan_vjp(
    lam: Array, h: Array, initial: Array | None, reverse: bool, hbar: Array
) -> tuple[Array, Array, Array]:
    """Cotangents of `linear_scan` at its output `h`.

    Section 1 of docs/mathematics.md: ``s_t = hbar_t + lam_{t+1} * s_{t+1}``, then ``x_bar_t = s_t``,
    ``lam_bar_t = s_t * h_{t-1}`` and ``initial_bar = lam_1 * s_1``. With `reverse` all of time is turned round.

    Parameters
    ----------
    lam : (B, T, D) array
    h : (B, T, D) array
        What `linear_scan` returned.
    initial : (B, D) array or None
    reverse : bool
        As given to `linear_scan`.
    hbar : (B, T, D) array
        Cotangent of `h`.

    Returns
    -------
    lam_bar, x_bar : (B, T, D) arrays
    initial_bar : (B, D) array
    """
    batch, steps, dim = h.shape
    lam_bar, x_bar = _shapes.empty_like(h), _shapes.empty_like(h)
    initial_bar = _device.xp().zeros((batch, dim), h.dtype)
    walk = _pick("scan_vjp", h, (lam, initial, hbar, lam_bar, x_bar), reverse, 3)
    sizes = (np.int64(steps), np.int32(dim), np.int32(walk.segments), np.int32(walk.groups))
    outputs = (lam_bar, x_bar, initial_bar)
    arguments = (lam, h, initial, hbar, *outputs, *sizes, *_between(walk, batch, dim, h.dtype))
    if h.size:
        _device.launch(
            walk.kernel, batch * walk.segments * walk.groups, walk.threads, arguments, shared=walk.shared
        )
    return lam_bar, x_bar, initial_bar


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    found = []
    for function in ("scan", "scan_vjp"):
        for dtype, width in (("float32", 4), ("float32", 1), ("float64", 2), ("bfloat16", 8), ("float16", 1)):
            for split in (False, True):
                found.append(_kernel(function, dtype, width, BLOCK, STAGES, False, split))
        found.append(_kernel(function, "float32", 4, BLOCK, STAGES, True, False))
    return found
