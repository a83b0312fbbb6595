"""Mamba's selective scan on the device, value and cotangents; `fpnumba.gpu.scan` has its doors.

``kernels/selective_scan.cu`` and ``kernels/selective_pull.cu`` say what is computed; here is how it is laid out over
the device. States live in registers; the cotangents keep those at the boundaries of chunks, and no array ``(T, D, N)``
ever exists. Few sequences are cut into segments of time.
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from fpnumba.gpu import _device, _shapes
from fpnumba.gpu._engine import engine
from fpnumba.gpu._report import store

Array = Any

# Threads of a block at most, and blocks of so many that keep a multiprocessor busy.
BLOCK, BUSY = 128, 4
# States that a thread has of one channel at most, half as many in float64, unless N is more than a warp of such threads
# takes; and the largest N.
STATES, MOST_STATES = 8, 512
# Steps of x and delta that are asked for ahead, and steps of B and C at most that lie in shared memory at a time.
AHEAD, TILE = 4, 32
# A segment of time is at least so long, and time is cut where there are segments enough to be worth walking twice.
SHORTEST_SEGMENT, WORTH = 64, 3
# Shared memory of each of two blocks of the gradient on a multiprocessor, and steps of a chunk at most.
SHARED_EACH, CHUNK = 112 * 1024, 16
# Bytes of states that the gradient keeps for sequences that go through it together: beyond that they go one group after
# the other, as long as each group fills the device.
KEPT_BYTES = 2**30

VALUE, ENDS, KEEP, BACK = range(4)


class Layout(NamedTuple):
    """How a selective scan is laid out over the device, and what both directions have to agree on."""

    dtype: str
    heads: bool
    lanes: int  # threads that share a channel
    states: int  # of each of them
    threads: int
    blocks: int  # that share the channels of a sequence
    chunk: int  # steps between states that the gradient keeps
    shared: int  # bytes of shared memory of the gradient

    @property
    def real(self) -> int:
        """Bytes of a number in registers."""
        return 8 if self.dtype == "float64" else 4

    @property
    def slots(self) -> int:
        """N, rounded up."""
        return self.lanes * self.states

    @property
    def held(self) -> int:
        """Numbers of state of a thread."""
        return min(self.lanes, 2) * self.states

    @property
    def macros(self) -> dict[str, object]:
        """What all kernels are compiled with."""
        return {
            "STORE": store(self.dtype),
            "HEADS": int(self.heads),
            "SPREAD": self.lanes,
            "STATES": self.states,
            "THREADS": self.threads,
        }

    @property
    def tile(self) -> int:
        """Steps of B and C in shared memory: as many as a thread has four numbers of each to bring."""
        return max(AHEAD, min(TILE, 4 * self.threads // self.slots) // AHEAD * AHEAD)

    def walk(self, mode: int) -> tuple[_device.Kernel, int]:
        """One of the walks of ``selective_scan.cu``, and its shared memory."""
        return _walk(self, mode)

    def join(self) -> _device.Kernel:
        """What puts segments of time together."""
        macros = {**self.macros, "MODE": VALUE, "TILE": self.tile, "AHEAD": AHEAD, "CHUNK": 1, "MINBLOCKS": 1}
        return _device.Kernel.of("selective_scan.cu", "join", macros)

    def pull(self) -> _device.Kernel:
        """The gradient."""
        return _pull(self)


@lru_cache(256)
def _walk(one: Layout, mode: int) -> tuple[_device.Kernel, int]:
    macros = {
        **one.macros,
        "MODE": mode,
        "TILE": one.tile,
        "AHEAD": AHEAD,
        "CHUNK": one.chunk if mode == KEEP else 1,
        "MINBLOCKS": (BUSY if one.real == 4 else BUSY - 1) if one.states <= STATES else 1,
    }
    rows = 2 if mode == VALUE else 1
    shared = 2 * rows * one.tile * one.slots * one.real
    return _device.Kernel.of("selective_scan.cu", "walk", macros), shared


@lru_cache(256)
def _pull(one: Layout) -> _device.Kernel:
    few = 2 if one.states <= STATES else 1
    macros = {**one.macros, "CHUNK": one.chunk, "MINBLOCKS": few}
    return _device.Kernel.of("selective_pull.cu", "pull", macros)


@cache
def _add_up(dtype: str) -> _device.Kernel:
    macros = {"STORE": store(dtype), "HEADS": 0, "SPREAD": 1, "STATES": 1, "THREADS": 32}
    return _device.Kernel.of("selective_pull.cu", "add_up", {**macros, "CHUNK": 1, "MINBLOCKS": 1})


@lru_cache(1024)
def layout(dtype: str, heads: bool, dim: int, size: int, limit: int) -> Layout:
    """Lay out `dim` channels of `size` states; a block may have `limit` bytes of shared memory."""
    lanes, most = 1, STATES // 2 if dtype == "float64" else STATES
    while lanes < 32 and -(-size // lanes) > most:
        lanes *= 2
    states = max(1, -(-size // lanes))
    if states > 2:  # whole accesses of shared memory
        states = -(-states // 4) * 4
    slots, channels = lanes * states, min(lanes, 2)
    threads = _shapes.threads(-(-dim // channels) * lanes, 1, BLOCK)
    threads = max(threads, min(BLOCK, slots // 32 * 32))
    each = 8 if dtype == "float64" else 4
    # of a step of a chunk: the states of all threads; delta, x and ybar; B and C; the sums of every warp
    step = each * (threads * (channels * states + 3) + 2 * slots + threads // 32 * 2 * slots)
    chunk = max(1, min(CHUNK, SHARED_EACH // step, limit // 2 // step))
    blocks = max(1, -(-dim * lanes // (channels * threads)))
    return Layout(dtype, heads, lanes, states, threads, blocks, chunk, chunk * step)


class _Call(NamedTuple):
    """The arguments that the kernels have in common."""

    layout: Layout
    segments: int
    batch: int
    steps: int
    dim: int
    size: int
    heads: int
    unit: int  # segments of time begin at multiples of so many steps

    @property
    def sizes(self) -> tuple[Any, ...]:
        return (
            np.int64(self.steps),
            *(np.int32(n) for n in (self.dim, self.size, self.heads, self.segments, self.layout.blocks)),
        )

    def scratch(self, rows: int) -> Array:
        """States of every thread, `rows` times."""
        one = self.layout
        shape = (rows, one.blocks, one.held, one.threads)
        return _device.xp().empty(shape, np.float64 if one.real == 8 else np.float32)

    def walk(self, mode: int, *arrays: Array | None) -> None:
        """Launch a walk: x, delta, A, B, C, D, initial, y, last_state; ends, totals, kept."""
        kernel, shared = self.layout.walk(mode)
        blocks = self.batch * self.segments * self.layout.blocks
        _device.launch(
            kernel,
            blocks,
            self.layout.threads,
            (*arrays[:9], *self.sizes, np.int32(self.unit), *arrays[9:]),
            shared=shared,
        )

    def enter(
        self, mode: int, x: Array, delta: Array, A: Array, rows: Array, initial: Array | None
    ) -> Array | None:
        """What comes into each segment of time, of the state or (BACK) of its adjoint; None for a single segment."""
        if self.segments == 1:
            return None
        one = self.layout
        ends = self.scratch(self.batch * self.segments)
        totals = _device.xp().empty((self.batch, self.segments, one.blocks, one.threads), ends.dtype)
        given = (None, rows) if mode == BACK else (rows, None)
        self.walk(mode, x, delta, A, *given, None, None, None, None, ends, totals, None)
        sizes = tuple(np.int32(n) for n in (self.dim, self.size, self.heads, self.segments, one.blocks))
        packs = one.held * one.real // min(16, one.real * (one.states & -one.states))
        arguments = (A, initial, ends, totals, *sizes, np.int32(mode == BACK))
        _device.launch(one.join(), self.batch * one.blocks * packs, one.threads, arguments)
        return ends


def _call(x: Array, A: Array, B: Array, *, gradient: bool) -> _Call:
    if engine() == "numba":
        raise ValueError("engine: 'numba' has no kernels for selective_scan; use 'raw'")
    batch, steps, dim = x.shape
    size, heads = B.shape[2], A.shape[0] if A.ndim == 1 else 0
    if size > MOST_STATES:
        raise ValueError(f"argument `B`: got N = {size}; the GPU room has kernels up to N = {MOST_STATES}")
    one = layout(_shapes.name(x.dtype), heads > 0, dim, size, _device.shared_limit())
    unit = one.chunk if gradient else 1
    segments = _segments(batch * one.blocks, one.threads, steps, unit, _device.current())
    return _Call(one, segments, batch, steps, dim, size, heads, unit)


@lru_cache(1024)
def _segments(blocks: int, threads: int, steps: int, unit: int, device: int) -> int:
    """Into how many segments time is cut."""
    room = BUSY * BLOCK // threads * _device.multiprocessors() // max(blocks, 1)
    segments = min(room, steps // max(SHORTEST_SEGMENT, unit))
    return segments if segments >= WORTH else 1


def selective_scan(
    x: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    initial: Array | None = None,
) -> tuple[Array, Array]:
    """Mamba's scan, ``H_t = exp(delta_t A) * H_{t-1} + (delta_t x_t) B_t^T``, ``y_t = H_t C_t + D * x_t``.

    Section 1 of docs/mathematics.md. A one-dimensional `A` selects the Mamba-2 form: one decay per head, channel ``d``
    belonging to head ``d // (D / H)``. Except in float64 the exponentials are the device's own, ``ex2.approx``, with
    relative errors up to ``2**-22``; a state that remembers many steps gathers them.

    Parameters
    ----------
    x : (B, T, D) C-contiguous array
    delta : (B, T, D) array, (B, T, H) in the Mamba-2 form
    A : (D, N) array, (H,) in the Mamba-2 form
    B, C : (B, T, N) arrays
    D : (D,) array, optional
        Skip connection.
    initial : (B, D, N) array, optional
        Zeros if left out.

    Returns
    -------
    y : (B, T, D) array
    last_state : (B, D, N) array

    Raises
    ------
    ValueError
        For N larger than 512, and where the engine ``"numba"`` is asked for by name.
    """
    call = _call(x, A, B, gradient=False)
    y, last_state = _shapes.empty_like(x), _shapes.empty_like(x, call.batch, call.dim, call.size)
    if call.batch * call.dim == 0:
        return y, last_state
    ends = call.enter(ENDS, x, delta, A, B, initial)
    call.walk(VALUE, x, delta, A, B, C, D, initial, y, last_state, ends, None, None)
    return y, last_state


def selective_scan_vjp(
    x: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    initial: Array | None,
    ybar: Array,
    last_bar: Array | None,
) -> tuple[Array, Array, Array, Array, Array, Array | None, Array]:
    """Cotangents of `selective_scan`: the state's cotangent is a scan backwards in time.

    Section 1 of docs/mathematics.md, transposed:
    ``H_bar_t = ybar_t C_t^T + exp(delta_{t+1} A) * H_bar_{t+1}``, and `last_bar` enters at the last step.

    Parameters
    ----------
    x, delta, A, B, C, D, initial
        As given to `selective_scan`.
    ybar : (B, T, D) array
        Cotangent of ``y``.
    last_bar : (B, D, N) array or None
        Cotangent of ``last_state``; None is zero.

    Returns
    -------
    x_bar, delta_bar, A_bar, B_bar, C_bar : arrays, each of the shape of its primal
    D_bar : (D,) array, or None without `D`
    initial_bar : (B, D, N) array

    Raises
    ------
    ValueError
        For N larger than 512, and where the engine ``"numba"`` is asked for by name.
    """
    xp, whole = _device.xp(), _call(x, A, B, gradient=True)
    one, batch = whole.layout, whole.batch
    steps, dim, size, heads, segments = whole.steps, whole.dim, whole.size, whole.heads, whole.segments
    x_bar, delta_bar, B_bar, C_bar = (_shapes.empty_like(a) for a in (x, delta, B, C))
    A_bar, D_bar = _shapes.empty_like(A), None if D is None else _shapes.empty_like(D)
    initial_bar = _shapes.empty_like(x, batch, dim, size)
    real = _shapes.real(x.dtype)
    rate_parts = xp.empty((batch, segments, dim) if heads else (batch, segments, dim, size), real)
    D_parts = xp.empty((batch, segments, dim), real)
    chunks = -(-steps // one.chunk)
    group = _together(whole, chunks)
    for first in range(0, batch if dim else 0, group):
        part = slice(first, min(first + group, batch))
        call = whole._replace(batch=part.stop - part.start)
        given = (x[part], delta[part], A, B[part], C[part], D)
        start, end = (None if a is None else a[part] for a in (initial, last_bar))
        kept = call.scratch(call.batch * chunks)
        ends = call.enter(ENDS, x[part], delta[part], A, B[part], start)
        call.walk(KEEP, *given, start, None, None, ends, None, kept)
        ends = call.enter(BACK, ybar[part], delta[part], A, C[part], end)
        B_parts, C_parts = (xp.empty((call.batch, one.blocks, steps, size), real) for _ in range(2))
        step_parts = xp.empty((call.batch, steps, dim), real) if heads else None
        outputs = (x_bar[part], delta_bar[part], step_parts, initial_bar[part])
        parts = (rate_parts[part], B_parts, C_parts, D_parts[part])
        arguments = (*given, ybar[part], end, *outputs, *parts, *call.sizes, ends, kept)
        blocks = call.batch * segments * one.blocks
        _device.launch(one.pull(), blocks, one.threads, arguments, shared=one.shared)
        _sum(B_parts, B_bar[part], call.batch, one.blocks, steps * size)
        _sum(C_parts, C_bar[part], call.batch, one.blocks, steps * size)
        if heads:
            _sum(step_parts, delta_bar[part], call.batch * steps * heads, dim // heads, 1)
    if dim == 0:
        for bar in (B_bar, C_bar):
            bar[...] = 0
    if heads:
        per_channel = xp.empty((dim,), real)
        _sum(rate_parts, per_channel, 1, batch * segments, dim)
        _sum(per_channel, A_bar, heads, dim // heads, 1)
    else:
        _sum(rate_parts, A_bar, 1, batch * segments, dim * size)
    if D_bar is not None:
        _sum(D_parts, D_bar, 1, batch * segments, dim)
    return x_bar, delta_bar, A_bar, B_bar, C_bar, D_bar, initial_bar


def _together(call: _Call, chunks: int) -> int:
    """How many sequences go through the gradient together."""
    one = call.layout
    bytes_each = max(1, chunks * one.blocks * one.held * one.threads * one.real)
    filling = -(-BUSY * _device.multiprocessors() // max(1, one.blocks))
    return max(1, KEPT_BYTES // bytes_each, filling)


def _sum(parts: Array, out: Array, outer: int, many: int, inner: int) -> None:
    """Sum parts (outer, many, inner) over the middle; what goes on being summed stays in the compute type."""
    kernel = _add_up(_shapes.name(out.dtype))
    sizes = (np.int64(outer), np.int64(many), np.int64(inner))
    _device.launch(kernel, -(-outer * inner // 256), 256, (parts, out, *sizes))


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    found = []
    for dtype, heads, dim, size in (
        ("float32", False, 1024, 16),
        ("bfloat16", False, 1024, 16),
        ("float64", False, 1024, 16),
        ("float16", False, 77, 5),
        ("float32", False, 1024, 256),
        ("float32", True, 2048, 128),
    ):
        one = layout(dtype, heads, dim, size, _device.SHARED_LIMIT)
        found += [one.walk(VALUE)[0], one.walk(KEEP)[0], one.pull()]
        if dtype != "float16":
            found += [one.walk(ENDS)[0], one.walk(BACK)[0]]
    one = layout("float32", False, 1024, 16, _device.SHARED_LIMIT)
    found += [one.join(), _add_up("float32"), _add_up("bfloat16")]
    return found
