"""The iterative ways on the device: chunked solves, one parallel iteration, cotangents.

Sections 3, 6 and 7 of docs/mathematics.md. One block of threads per sequence; semantics and stopping rules are those of
`fpnumba.cpu._relax`. Kernels: `kernels/relax.cu` and `kernels/relax_pull.cu` for any shape.
"""

from typing import Any, NamedTuple

import numpy as np

from fpnumba.gpu import _device, _report, _shapes
from fpnumba.gpu._device import Kernel

Array = Any
Params = tuple[Array, ...]

KINDS = {"kronecker": 0, "monarch": 1, "dplr": 2, "householder": 3}
# Shared memory of each of two blocks of a multiprocessor
HALF_SHARED = 112 * 1024
# Devices whose blocks may have so much of it work in clusters of up to eight blocks.
CLUSTER_SHARED, MOST_CLUSTER = 227 * 1024, 8
# Steps of a chunk, where they fit.
LONGEST_CHUNK = 32
# A segment of time has this many chunks at least, and a sequence so many segments at most.
SHORTEST_SEGMENT, MOST_SEGMENTS = 8, 32
# More channels than this are mixed by a whole block, not by a warp.
WIDE_DIM = 1024
ROOM = 1024
# Vectors of a low-rank mixer whose inner products are taken together.
MOST_TOGETHER = 8
# Kronecker factors up to this size are mixed on tensor cores.
MOST_FACTOR = 32
# Steps of a chunk that a block mixes at once, a warp each.
MOST_STEPS = 8
# Warps of a block where each has steps of its own.
WARPS = 4


class _Mixer(NamedTuple):
    """The parameters as the kernels take them."""

    kind: str
    first: Array
    second: Array
    dim: int
    d1: int
    d2: int
    rank: int

    @classmethod
    def of(cls, kind: str, params: Params, dim: int) -> "_Mixer":
        if kind not in KINDS:
            raise ValueError(f"kind: {kind!r}; expected one of {', '.join(KINDS)}")
        first, second = params
        if kind == "kronecker":
            return cls(kind, first, second, dim, first.shape[-1], second.shape[-1], 0)
        if kind == "monarch":
            return cls(kind, first, second, dim, first.shape[-3], first.shape[-1], 0)
        return cls(kind, first, second, dim, 1, dim, second.shape[-1])

    @property
    def low_rank(self) -> bool:
        return self.kind in ("dplr", "householder")

    @property
    def shape(self) -> tuple[np.int32, np.int32, np.int32]:
        return np.int32(self.dim), np.int32(self.d1), np.int32(self.d2)

    def macros(self, wide: bool, **more: object) -> dict[str, object]:
        """How a kernel for this mixer is compiled; False and 0 are left to the sources."""
        given: dict[str, object] = {"STORE": _report.store(self.first.dtype), "KIND": KINDS[self.kind]}
        given |= {"RANK": self.rank, "WIDE": int(wide)}
        return {k: v for k, v in (given | more).items() if v or k == "KIND"}


class _Groups(NamedTuple):
    """Threads of a block, and whether all of them mix one step together or each warp its own."""

    threads: int
    wide: bool

    @property
    def many(self) -> int:
        """Groups of a block."""
        return 1 if self.wide else self.threads // 32


def _groups(dim: int, together: int, most: int) -> _Groups:
    """For `together` steps that may be mixed at the same time."""
    if dim > WIDE_DIM or (together < 4 and dim > 128):
        return _Groups(min(most, -(-dim // 32) * 32), True)
    return _Groups(32 * max(1, min(most // 32, max(together, -(-dim // 128)))), False)


def _spare(mixer: _Mixer, groups: _Groups, vectors: int = 1) -> int:
    """Scratch numbers of a group: so many vectors; for low rank so many sums of its warps, see relax_mix.cuh."""
    if not mixer.low_rank:
        return vectors * mixer.dim
    warps = groups.threads // 32 if groups.wide else 0
    if mixer.rank > MOST_TOGETHER:
        return vectors * mixer.dim + (2 * mixer.rank if vectors > 1 else 0) + warps
    pairs = mixer.rank * (mixer.rank - 1) // 2 if mixer.kind == "householder" else 0
    return (vectors * max(mixer.rank, 1) + pairs) * warps


def default_chunk(kind: str, params: Params, dim: int, dtype: Any) -> int:
    """Steps of a chunk where the caller does not say.

    Where the parameters of a step are kept in registers while it is iterated: as many steps as a block can hold.
    Others: as many as fit into shared memory, two blocks side by side. Low-rank mixers: one, because a step's
    iterations run over ``r`` numbers and no chunk makes them cheaper.
    """
    mixer = _Mixer.of(kind, params, dim)
    if mixer.low_rank or _in_registers(mixer, dtype):
        return 1
    if _on_tensor_cores(mixer, dtype):
        # two blocks of half the steps, where one fills a multiprocessor: one of them mixes while the other scans
        return MOST_STEPS // (1 if _kronecker_blocks(mixer.d1, mixer.d2, MOST_STEPS) > 1 else 2)
    each = 2 * dim * _real(dtype).itemsize
    return int(max(1, min(LONGEST_CHUNK, HALF_SHARED // 2 // max(each, 1))))


def solve(
    kind: str,
    params: Params,
    lam: Array,
    gate: Array | None,
    source: Array,
    initial: Array | None,
    guess: Array | None,
    *,
    adjoint: bool,
    chunk: int,
    rtol: float,
    atol: float,
    max_iter: int,
    damping: float,
) -> _report.Solved:
    """The fixed point of (F), or with `adjoint` that of its adjoint for ``hbar = source``, chunk after chunk.

    Parameters
    ----------
    kind, params, lam, gate, source, initial, guess
        As for `fpnumba.cpu.solve.solve`.
    adjoint : bool
    chunk : int
        Steps of a chunk; all of them for the parallel way.
    rtol, atol, max_iter, damping
        As for `fpnumba.cpu.solve.solve`.

    Returns
    -------
    Solved
    """
    xp = _device.xp()
    params, (lam, gate, source, guess) = _aligned(params, lam, gate, source, guess)
    batch, steps, dim = source.shape
    chunk = max(1, min(chunk, steps))
    chunks = -(-steps // chunk)
    mixer = _Mixer.of(kind, params, dim)
    value = xp.empty(source.shape, source.dtype)
    tensors = damping == 1 and _on_tensor_cores(mixer, source.dtype) and chunk <= MOST_STEPS
    segments = (
        _segments(batch, chunks, _kronecker_blocks(mixer.d1, mixer.d2, _warps(chunk))) if tensors else 1
    )
    report = _report.blank(batch, chunks, segments)
    options = (adjoint, chunk, rtol, atol, max_iter, damping)
    if steps > 0:
        serves = _kronecker if tensors else _any_shape
        if damping == 1 and chunk == 1 and guess is None and _in_registers(mixer, source.dtype):
            serves = _monarch
        serves(mixer, lam, gate, source, initial, guess, value, report, *options)
    inputs = (lam, source, gate, initial, guess, *params)
    return _report.summary(value, report, False, tuple(a for a in inputs if a is not None))


def _any_shape(
    mixer: _Mixer,
    lam: Array,
    gate: Array | None,
    source: Array,
    initial: Array | None,
    guess: Array | None,
    value: Array,
    report: _report.Report,
    adjoint: bool,
    chunk: int,
    rtol: float,
    atol: float,
    max_iter: int,
    damping: float,
) -> None:
    """The kernel `relax`, with the chunk in shared memory if it fits there."""
    xp = _device.xp()
    batch, steps, dim = source.shape
    real = _real(source.dtype)
    groups = _groups(dim, chunk, 512)
    spare = _spare(mixer, groups)
    shared = ROOM + spare * groups.many * real.itemsize
    iterate = mixed = None
    if shared + 2 * chunk * dim * real.itemsize <= _device.shared_limit():
        shared += 2 * chunk * dim * real.itemsize
    else:
        mixed = xp.empty((batch, chunk, dim), real)
        iterate = value if chunk == steps and value.dtype == real else xp.empty((batch, chunk, dim), real)
    macros = mixer.macros(groups.wide, ADJOINT=int(adjoint), GATED=int(gate is not None))
    arguments = (
        *(mixer.first, mixer.second, lam, gate, source, initial, guess, value, iterate, mixed),
        *(xp.empty((batch, dim), real), *mixer.shape, np.int64(steps), np.int64(chunk), np.int32(spare)),
        *(_eps(source.dtype), np.float64(rtol), np.float64(atol), np.int64(max_iter), np.float64(damping)),
        *(report.counts, report.change, report.scale, report.state),
    )
    kernel = Kernel.of("relax.cu", "relax", macros)
    _device.launch(kernel, batch, groups.threads, arguments, shared=shared)


def _on_tensor_cores(mixer: _Mixer, dtype: Any) -> bool:
    """Whether there are kernels that mix by `relax_tensor.cuh`."""
    small = max(mixer.d1, mixer.d2) <= MOST_FACTOR and mixer.dim > 0
    return mixer.kind == "kronecker" and small and bool(_real(dtype) == np.float32)


def _segments(batch: int, chunks: int, blocks: int) -> int:
    """Into how many segments of time a sequence is cut, where there are too few sequences for so many blocks on each
    multiprocessor."""
    wanted = blocks * _device.multiprocessors() // max(batch, 1)
    return max(1, min(wanted, chunks // SHORTEST_SEGMENT, MOST_SEGMENTS))


def _warps(chunk: int) -> int:
    """Warps of a block of `relax_kronecker`."""
    return 1 << (chunk - 1).bit_length()


def _kronecker_blocks(d1: int, d2: int, warps: int) -> int:
    """Blocks of so many warps of `relax_kronecker` on a multiprocessor."""
    rows, columns, inner = -(-d1 // 16), -(-d2 // 8), -(-d1 // 8)
    # numbers that a thread holds: the factors, two products, three of all steps, and whatever else there is
    held = 4 * rows * inner + 2 * columns**2 + 8 * rows * columns + 3 * max(warps, d1 * d2 // 32) + 80
    return max(1, min(16, 65536 // (min(held, 255) * 32 * warps)))


def _kronecker_kernel(
    store: str, d1: int, d2: int, warps: int, adjoint: bool, gated: bool, segmented: bool
) -> tuple[Kernel, int]:
    """The kernel `relax_kronecker` for chunks of `warps` steps, and its bytes of shared memory."""
    columns, inner = -(-d2 // 8), -(-d1 // 8)
    macros = {"STORE": store, "D1": d1, "D2": d2, "WARPS": warps, "BLOCKS": _kronecker_blocks(d1, d2, warps)}
    macros |= {k: 1 for k, v in (("ADJOINT", adjoint), ("GATED", gated), ("SEGMENTED", segmented)) if v}
    width = next(w for w in (4, 2, 1) if w == 1 or (d2 % w == 0 and d1 * d2 // w >= 32 * warps))
    constants = -(-d1 * d2 // (32 * warps * width)) * 32 * warps * width
    step = 8 * inner * (8 * columns + 4)
    return Kernel.of("relax_kronecker.cu", "relax_kronecker", macros), 4 * warps * (8 + step + constants)


def _kronecker(
    mixer: _Mixer,
    lam: Array,
    gate: Array | None,
    source: Array,
    initial: Array | None,
    guess: Array | None,
    value: Array,
    report: _report.Report,
    adjoint: bool,
    chunk: int,
    rtol: float,
    atol: float,
    max_iter: int,
    damping: float,
) -> None:
    """The kernel `relax_kronecker`: one warp for each step of a chunk, one block for each segment of time."""
    batch, steps, _ = source.shape
    xp, segments = _device.xp(), report.state.shape[1]
    warps = _warps(chunk)
    kernel, shared = _kronecker_kernel(
        *(_report.store(source.dtype), mixer.d1, mixer.d2, warps),
        *(adjoint, gate is not None, segments > 1),
    )
    left = moved = None
    if segments > 1:
        left = xp.empty((2, batch * segments, mixer.dim), np.float32)
        moved = xp.zeros((2, batch * segments), np.int32)
    # The first round starts every segment from zero; each of the others from what the one before has left by then. At
    # once for all of them, and most have nothing to do: a correction decays, and who has no news leaves at once.
    for turn in range(segments):
        arguments = (
            *(mixer.first, mixer.second, lam, gate, source, initial, value if turn else guess, value),
            *(np.int64(steps), np.int32(chunk)),
            *(_eps(source.dtype), np.float64(rtol), np.float64(atol), np.int64(max_iter)),
            *(report.counts, report.change, report.scale, report.state),
            *(np.int32(segments), np.int32(turn), left, moved),
        )
        _device.launch(kernel, batch * segments, 32 * warps, arguments, shared=shared)


def _in_registers(mixer: _Mixer, dtype: Any) -> bool:
    """Whether `relax_monarch` serves solves of this mixer in chunks of one step."""
    size, words = mixer.d2, _real(dtype).itemsize // 4
    power = size >= 4 and size & (size - 1) == 0 and size * words <= 64
    return mixer.kind == "monarch" and power and _channels(mixer, 1) is not None


def _channels(mixer: _Mixer, batch: int) -> int | None:
    """Channels, and threads, of a block of `relax_monarch`; None where a cluster is too small for all of them."""
    most = MOST_CLUSTER if _device.shared_limit() >= CLUSTER_SHARED else 1
    # Few sequences spread over more multiprocessors; the result is the same.
    spread = batch * -(-mixer.dim // 128) <= _device.multiprocessors()
    threads = next((t for t in (128 if spread else 256, 256, 512) if -(-mixer.dim // t) <= most), None)
    least = max(32, mixer.d2)
    return threads and min(threads, -(-mixer.dim // least) * least)


def _monarch_kernel(
    store: str, size: int, dim: int, threads: int, adjoint: bool, gated: bool
) -> tuple[Kernel, int]:
    """The kernel `relax_monarch` in blocks of `threads` channels, and its bytes of shared memory."""
    cluster, bytes_, words = (
        -(-dim // threads),
        {"double": 8, "float": 4}.get(store, 2),
        1 + (store == "double"),
    )
    shared = bytes_ * threads * size + 8 * words * threads + 24 * words * threads // 32 * cluster
    # numbers that a thread holds: its part of M, and whatever else there is
    held = min(255, words * (size + 16) + 48)
    blocks = max(1, min(8, 65536 // (held * threads), CLUSTER_SHARED // (shared + 1024)))
    macros = {"STORE": store, "EDGE": size, "THREADS": threads, "BLOCKS": blocks}
    macros |= {"CLUSTER": cluster} if cluster > 1 else {}
    macros |= {k: 1 for k, v in (("ADJOINT", adjoint), ("GATED", gated)) if v}
    return Kernel.of("relax_monarch.cu", "relax_monarch", macros), shared


def _monarch(
    mixer: _Mixer,
    lam: Array,
    gate: Array | None,
    source: Array,
    initial: Array | None,
    guess: Array | None,
    value: Array,
    report: _report.Report,
    adjoint: bool,
    chunk: int,
    rtol: float,
    atol: float,
    max_iter: int,
    damping: float,
) -> None:
    """The kernel `relax_monarch`: one thread for each channel of a step."""
    batch, steps, dim = source.shape
    threads = _channels(mixer, batch)
    assert threads is not None
    kernel, shared = _monarch_kernel(
        _report.store(source.dtype), mixer.d2, dim, threads, adjoint, gate is not None
    )
    arguments = (
        *(mixer.first, mixer.second, lam, gate, source, initial, value, np.int32(dim), np.int64(steps)),
        *(_eps(source.dtype), np.float64(rtol), np.float64(atol), np.int64(max_iter)),
        *(report.counts, report.change, report.scale, report.state),
    )
    _device.launch(kernel, batch * -(-dim // threads), threads, arguments, shared=shared)


def _real(dtype: Any) -> np.dtype[Any]:
    """The dtype that a storage dtype is computed in."""
    found: np.dtype[Any] = np.dtype(_shapes.real(dtype))
    return found


def _eps(dtype: Any) -> np.float64:
    return np.float64(np.finfo(_real(dtype)).eps)


def _aligned(params: Params, *arrays: Array | None) -> tuple[Params, tuple[Any, ...]]:
    return _shapes.aligned(*params), _shapes.aligned(*arrays)


def iterate(
    kind: str,
    params: Params,
    lam: Array,
    gate: Array | None,
    source: Array,
    initial: Array | None,
    value: Array,
    *,
    adjoint: bool,
) -> Array:
    """One parallel iteration from `value`: all steps are mixed, then scanned.

    Parameters
    ----------
    kind, params, lam, gate, source, initial
        As for `solve`.
    value : (B, T, D) array
        The previous iterate.
    adjoint : bool

    Returns
    -------
    (B, T, D) array
    """
    xp = _device.xp()
    params, (lam, gate, source, value) = _aligned(params, lam, gate, source, value)
    batch, steps, dim = source.shape
    new = xp.empty(source.shape, source.dtype)
    if new.size == 0:
        return new
    mixer = _Mixer.of(kind, params, dim)
    real = _real(source.dtype)
    rows = batch * steps
    z = xp.empty(source.shape, real)
    macros = mixer.macros(False, ADJOINT=int(adjoint), GATED=int(gate is not None))
    arrays = (mixer.first, mixer.second, lam, gate, source, value, z)
    if _on_tensor_cores(mixer, source.dtype):
        mix = _kronecker_steps("mix_kronecker", macros, mixer)
        shared = WARPS * _rows_of_tiles(mixer) * (8 * -(-mixer.d2 // 8) + 4) * real.itemsize
        _device.launch(mix, -(-rows // WARPS), 32 * WARPS, (*arrays, np.int64(rows)), shared=shared)
    elif _by_blocks(mixer):
        mix, blocks = _monarch_steps("mix_monarch", macros, mixer, rows)
        _device.launch(mix, blocks, 32 * WARPS, (*arrays, np.int32(mixer.d1), np.int64(rows)))
    else:
        groups = _groups(dim, 8, 256)
        spare = _spare(mixer, groups)
        mix = Kernel.of("relax.cu", "mix_steps", macros | ({"WIDE": 1} if groups.wide else {}))
        shared = groups.many * (dim + spare) * real.itemsize
        sizes = (*mixer.shape, np.int64(rows), np.int32(spare))
        _device.launch(mix, -(-rows // groups.many), groups.threads, (*arrays, *sizes), shared=shared)
    scan = Kernel.of("relax.cu", "scan_steps", {k: macros[k] for k in ("STORE", "ADJOINT") if k in macros})
    scanned = lam, z, initial, new, np.int64(batch * dim), np.int32(dim), np.int64(steps)
    _device.launch(scan, -(-batch * dim // 128), 128, scanned)
    return new


def pull(
    kind: str,
    params: Params,
    lam: Array,
    gate: Array | None,
    x: Array,
    initial: Array | None,
    h: Array,
    s: Array,
) -> tuple[Array, Array | None, Array, Array, Params]:
    """Cotangents of all inputs of (F) from the solution `h` and its adjoint `s`, in one pass over everything.

    Parameters
    ----------
    kind, params, lam, gate, x, initial
        As for `solve`.
    h, s : (B, T, D) arrays

    Returns
    -------
    lam_bar, gate_bar, x_bar, initial_bar, params_bar
        As of `fpnumba.cpu.solve.rnn_cotangents`.
    """
    xp = _device.xp()
    params, (lam, gate, x, initial, h, s) = _aligned(params, lam, gate, x, initial, h, s)
    batch, steps, dim = x.shape
    mixer = _Mixer.of(kind, params, dim)
    bars = tuple(xp.empty(p.shape, p.dtype) for p in params)
    lam_bar, x_bar = xp.empty(x.shape, x.dtype), xp.empty(x.shape, x.dtype)
    gate_bar = None if gate is None else xp.empty(x.shape, x.dtype)
    initial_bar = xp.empty((batch, dim), x.dtype) if steps else xp.zeros((batch, dim), x.dtype)
    rows = batch * steps
    if rows > 0:
        real = _real(x.dtype)
        macros = mixer.macros(False, GATED=int(gate is not None))
        arrays = (
            mixer.first,
            mixer.second,
            lam,
            gate,
            x,
            initial,
            h,
            s,
            lam_bar,
            gate_bar,
            x_bar,
            initial_bar,
            *bars,
        )
        if _on_tensor_cores(mixer, x.dtype):
            tall, broad = (16 * -(-d // 16) for d in (mixer.d1, mixer.d2))
            space = 2 * tall * (broad + 4) + tall * (tall + 4) + broad * (broad + 4)
            kernel = _kronecker_steps("pull_kronecker", macros, mixer)
            arguments = (*arrays, np.int64(rows), np.int64(steps))
            shared = WARPS * space * real.itemsize
            _device.launch(kernel, -(-rows // WARPS), 32 * WARPS, arguments, shared=shared)
        elif _by_blocks(mixer):
            kernel, blocks = _monarch_steps("pull_monarch", macros, mixer, rows)
            arguments = (*arrays, np.int32(mixer.d1), np.int64(rows), np.int64(steps))
            _device.launch(kernel, blocks, 32 * WARPS, arguments)
        else:
            _pull_any_shape(mixer, macros, arrays, rows, steps)
    return lam_bar, gate_bar, x_bar, initial_bar, bars


def _pull_any_shape(
    mixer: _Mixer, macros: dict[str, object], arrays: tuple[Array, ...], rows: int, steps: int
) -> None:
    """The kernel `pull`, with scratch in shared memory if it fits there."""
    real = _real(mixer.first.dtype)
    groups = _groups(mixer.dim, 8, 256)
    spare = _spare(mixer, groups, 2 if mixer.low_rank else 4)
    shared, blocks, scratch = groups.many * spare * real.itemsize, -(-rows // groups.many), None
    if shared > _device.shared_limit():
        blocks = min(blocks, 2 * _device.multiprocessors())
        shared, scratch = 0, _device.xp().empty((blocks, groups.many * spare), real)
    kernel = Kernel.of("relax_pull.cu", "pull", macros | ({"WIDE": 1} if groups.wide else {}))
    arguments = (*arrays, scratch, *mixer.shape, np.int64(rows), np.int64(steps), np.int32(spare))
    _device.launch(kernel, blocks, groups.threads, arguments, shared=shared)


def _rows_of_tiles(mixer: _Mixer) -> int:
    """Rows of a step in shared memory, see relax_tensor.cuh."""
    return 8 * -(-mixer.d1 // 8)


def _kronecker_steps(function: str, macros: dict[str, object], mixer: _Mixer) -> Kernel:
    """A kernel of `relax_pull_kronecker.cu`, where warps take steps that are independent of each other."""
    given = {k: macros[k] for k in ("STORE", "ADJOINT", "GATED") if k in macros}
    return Kernel.of("relax_pull_kronecker.cu", function, given | {"D1": mixer.d1, "D2": mixer.d2})


def _by_blocks(mixer: _Mixer) -> bool:
    """Whether there are kernels that take the blocks of a Monarch mixer one by one."""
    return mixer.kind == "monarch" and mixer.d1 > 0 and 0 < mixer.d2 <= 128


def _monarch_steps(function: str, macros: dict[str, object], mixer: _Mixer, rows: int) -> tuple[Kernel, int]:
    """A kernel of `relax_pull_monarch.cu`, and how many blocks of threads it wants."""
    given = {k: macros[k] for k in ("STORE", "ADJOINT", "GATED") if k in macros}
    lanes = min(32, 1 << (mixer.d2 - 1).bit_length())
    kernel = Kernel.of("relax_pull_monarch.cu", function, given | {"EDGE": mixer.d2})
    return kernel, -(-rows * mixer.d1 * lanes // (32 * WARPS))


def representative() -> list[Kernel]:
    """Shape classes that stand for all: each kernel in each dtype, the sizes of the benchmarks, the extremes."""
    any_shape: list[tuple[str, dict[str, object]]] = [
        ("relax", {"STORE": "float", "KIND": 0}),
        ("relax", {"STORE": "double", "KIND": 0, "WIDE": 1, "ADJOINT": 1, "GATED": 1}),
        ("relax", {"STORE": "bf16", "KIND": 1, "ADJOINT": 1}),
        ("relax", {"STORE": "f16", "KIND": 2, "RANK": 1}),
        ("relax", {"STORE": "float", "KIND": 3, "RANK": 8, "WIDE": 1, "ADJOINT": 1}),
        ("relax", {"STORE": "double", "KIND": 3, "RANK": 9, "GATED": 1}),
        ("mix_steps", {"STORE": "double", "KIND": 3, "RANK": 2, "ADJOINT": 1, "GATED": 1}),
        ("scan_steps", {"STORE": "float"}),
        ("scan_steps", {"STORE": "bf16", "ADJOINT": 1}),
    ]
    kernels = [Kernel.of("relax.cu", function, macros) for function, macros in any_shape]
    pulled: list[dict[str, object]] = [
        {"STORE": "double", "KIND": 0},
        {"STORE": "float", "KIND": 1, "GATED": 1, "WIDE": 1},
        {"STORE": "f16", "KIND": 3, "RANK": 8},
    ]
    kernels += [Kernel.of("relax_pull.cu", "pull", macros) for macros in pulled]
    for store, d1, d2, warps, adjoint, gated, segmented in (
        ("float", 32, 32, 8, False, False, False),
        ("float", 32, 32, 8, True, True, True),
        ("float", 32, 32, 4, True, False, False),
        ("float", 3, 5, 2, False, True, True),
        ("bf16", 32, 32, 8, True, True, False),
        ("f16", 16, 16, 8, False, False, False),
    ):
        kernels.append(_kronecker_kernel(store, d1, d2, warps, adjoint, gated, segmented)[0])
    for store, d in (("float", 32), ("bf16", 16)):
        sizes: dict[str, object] = {"STORE": store, "D1": d, "D2": d, "GATED": 1}
        kernels += [
            Kernel.of("relax_pull_kronecker.cu", f, sizes) for f in ("mix_kronecker", "pull_kronecker")
        ]
    for store, edge in (("float", 64), ("double", 12)):
        given: dict[str, object] = {"STORE": store, "EDGE": edge, "GATED": 1}
        kernels += [Kernel.of("relax_pull_monarch.cu", f, given) for f in ("mix_monarch", "pull_monarch")]
    for store, size, dim, threads, adjoint, gated in (
        ("float", 64, 1024, 256, False, False),
        ("f16", 64, 1024, 128, True, True),
        ("double", 32, 1024, 256, False, True),
        ("bf16", 4, 32, 32, True, False),
    ):
        kernels.append(_monarch_kernel(store, size, dim, threads, adjoint, gated)[0])
    return kernels
