"""Low-rank mixers step after step: the direct and the sequential solve, their adjoint, and the whole gradient.

``kernels/solve_steps.cu`` and ``kernels/pull_steps.cu`` say what is computed; here is how it is laid out over the
device. Everything crosses memory once, however many iterations a step needs.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fpnumba.gpu import _device, _report, _shapes
from fpnumba.gpu._report import Solved

Array = Any
Params = tuple[Array, ...]
Cotangents = tuple[Array, Array | None, Array, Array, Params]

# The largest rank with a kernel of its own.
MOST_RANK = 8
# A segment of time shorter than this is not worth starting from a guess.
SHORTEST_SEGMENT = 64
# Blocks of one sequence that a multiprocessor should have; one is enough, and half the segments to correct, where it
# has so many threads and little to think between two steps.
BLOCKS_EACH, ENOUGH = 2, 256
# Shared memory that each of two blocks of a multiprocessor may have, and that one alone may have.
SHARED_EACH, SHARED_MOST = 112 * 1024, 224 * 1024


class Step(NamedTuple):
    """What decides how a step is laid out, besides its channels."""

    function: str
    dtype: str
    rank: int
    product: bool
    direction: tuple[tuple[str, int], ...]
    gated: bool
    direct: bool
    split: bool

    def rows(self) -> int:
        """Rows of channels that come through the ring."""
        return (2 if self.function == "solve_steps" else 4) + self.gated + self.rank + self.split

    def totals(self) -> int:
        """Sums and maxima over a block: the count of the ``.cu`` file."""
        rank, of = self.rank, dict(self.direction)
        given = bool(of.get("GIVEN"))
        plain = rank * (rank - 1) // 2 if self.product and rank > 1 else 0
        gram = 0 if given else rank * (rank + 1) // 2
        second = rank if self.function == "pull_steps" or not (self.direct or of["ADJOINT"]) else 0
        maxima = 0 if self.direct or given else rank + 2
        return rank + second + gram + plain + maxima + 2


class Layout(NamedTuple):
    """A kernel, and how it is launched."""

    kernel: _device.Kernel
    threads: int
    cluster: int
    shared: int


@lru_cache(1024)
def layout(step: Step, dim: int, width: int) -> Layout:
    """Lay out a step of `dim` channels, `width` of them to an access, over the fewest blocks that have room for it."""
    size = 2 if step.dtype in ("float16", "bfloat16") else np.dtype(step.dtype).itemsize
    real = 8 if step.dtype == "float64" else 4
    totals = step.totals()
    most = 1024 if step.rank == 1 else 512
    for cluster, limit in ((1, most), (2, most), (4, most), (8, most), (8, most // 2), (8, most // 4)):
        channels = -(-dim // cluster)
        accesses = 1
        while -(-channels // (width * accesses)) > limit:
            accesses *= 2
        threads = _shapes.threads(channels, width * accesses, limit)
        stage = step.rows() * accesses * threads * width * size + -(-step.rank // 2) * 16
        warps = threads // 32
        partial = -(-(warps * totals + (cluster * totals if cluster > 1 else 0)) // 4) * 4
        told = step.rank**2 + totals + 3 + 3 * step.rank
        fixed = (2 * partial + -(-told // 4) * 4) * real + -(-step.rank // 2) * 16
        if fixed + 2 * stage <= SHARED_MOST:
            break
    stages = max(2, min(4, (SHARED_EACH - fixed) // stage))
    macros = {
        "STORE": _report.store(step.dtype),
        "RANK": step.rank,
        "PRODUCT": int(step.product),
        "GATED": int(step.gated),
        "DIRECT": int(step.direct),
        "SPLIT": int(step.split),
        "EACH": width,
        "ACCESSES": accesses,
        "THREADS": threads,
        "CLUSTER": cluster,
        "STAGES": stages,
        "MINBLOCKS": max(1, min(8, (512 if step.rank <= 4 else 256) // threads)),
        **dict(step.direction),
    }
    kernel = _device.Kernel.of(f"{step.function}.cu", step.function, macros, cooperative=step.split)
    return Layout(kernel, threads, cluster, fixed + stages * stage)


def _pick(step: Step, like: Array, others: tuple[Array | None, ...]) -> tuple[Layout, int]:
    """The kernel for these arrays, and into how many segments of time it cuts a sequence."""
    width = _shapes.each(like.shape[2], like, *others)
    return _plan(step, like.shape, width, _device.current())


@lru_cache(1024)
def _plan(step: Step, shape: tuple[int, int, int], width: int, device: int) -> tuple[Layout, int]:
    """The same for a shape, on a device."""
    batch, steps, dim = shape
    whole = layout(step, dim, width)
    alone = step.direct and step.rank == 1 and whole.threads >= ENOUGH
    each = 1 if alone else BLOCKS_EACH
    wanted = each * _device.multiprocessors() // max(batch * whole.cluster, 1)
    segments = min(wanted, steps // SHORTEST_SEGMENT)
    if segments <= 1:
        return whole, 1
    if dict(step.direction).get("GIVEN"):  # every step stands for itself
        return whole, segments
    cut = layout(step._replace(split=True), dim, width)
    if cut.cluster == 1:
        segments = min(segments, _device.resident(cut.kernel, cut.threads, shared=cut.shared) // batch)
        if segments > 1:
            return cut, segments
    return whole, 1


def _between(segments: int, batch: int, dim: int, dtype: Any) -> tuple[Any, ...]:
    """What the segments of time tell each other."""
    if segments == 1:
        return None, None
    xp = _device.xp()
    return xp.empty((3, batch * segments, dim), _shapes.real(dtype)), xp.zeros(1 + segments, np.uint32)


def _with_a_rank(params: Params) -> Params:
    """No reflection at all is one that does nothing."""
    u = params[0]
    if u.shape[2] > 0:
        return params
    xp, (batch, steps, _, dim) = _device.xp(), u.shape
    return xp.zeros((batch, steps, 1, dim), u.dtype), xp.zeros((batch, steps, 1), u.dtype)


def solve(
    kind: str,
    params: Params,
    lam: Array,
    gate: Array | None,
    source: Array,
    initial: Array | None,
    *,
    adjoint: bool,
    direct: bool,
    chunks: int,
    rtol: float,
    atol: float,
    max_iter: int,
) -> Solved:
    """The fixed point, or its adjoint, one step after the other.

    Parameters
    ----------
    kind : "dplr" or "householder"
    params, lam, gate, source, initial
        As of the door; `source` is ``hbar`` in the adjoint.
    adjoint, direct : bool
    chunks : int
        Entries of ``chunk_iterations`` for each sequence: the steps, or by the direct way what the door says.
    rtol, atol, max_iter
    """
    u, alpha = _with_a_rank(params)
    batch, steps, dim = source.shape
    rank = u.shape[2]
    value = _shapes.empty_like(source)
    name = _shapes.name(source.dtype)
    step = Step(
        *("solve_steps", name, rank, kind == "householder", (("ADJOINT", int(adjoint)),)),
        *(gate is not None, direct, False),
    )
    picked, segments = _pick(step, source, (lam, gate, u, initial, value))
    report = _report.blank(batch, chunks, segments, written=lam.size > 0)
    stop = (np.float64(rtol), np.float64(atol), np.int64(max_iter))
    arguments = (
        *(lam, gate, source, u, alpha, initial, value, np.int64(steps), np.int32(dim), np.int32(segments)),
        *(*stop, report.counts, report.change, report.scale, report.rcond, report.state),
        *_between(segments, batch, dim, source.dtype),
    )
    if value.size:
        blocks = batch * segments * picked.cluster
        _device.launch(picked.kernel, blocks, picked.threads, arguments, shared=picked.shared)
    fields = [a for a in (lam, source, initial, gate, *params) if a is not None]
    return _report.summary(value, report, direct, tuple(fields))


def pull(
    kind: str,
    params: Params,
    lam: Array,
    gate: Array | None,
    x: Array,
    initial: Array | None,
    h: Array,
    top: Array,
    *,
    given: bool,
    direct: bool = False,
    chunks: int = 0,
    rtol: float = 0.0,
    atol: float = 0.0,
    max_iter: int = 1,
) -> tuple[Solved | None, Cotangents]:
    """Cotangents of all inputs of (F), the adjoint solved on the way unless `given`.

    Parameters
    ----------
    kind, params, lam, gate, x, initial, h
        As of the door.
    top : array
        ``hbar``; where `given`, the adjoint ``s`` itself.
    given, direct : bool
    chunks, rtol, atol, max_iter
        As of `solve`.
    """
    u, alpha = _with_a_rank(params)
    batch, steps, dim = x.shape
    rank, xp = u.shape[2], _device.xp()
    value = None if given else _shapes.empty_like(x)
    lam_bar, x_bar, u_bar, alpha_bar = (_shapes.empty_like(a) for a in (lam, x, u, alpha))
    gate_bar = None if gate is None else _shapes.empty_like(x)
    initial_bar = xp.zeros((batch, dim), x.dtype)
    arrays = (lam, gate, u, initial, h, top, value, lam_bar, gate_bar, x_bar, u_bar, initial_bar)
    name = _shapes.name(x.dtype)
    step = Step(
        *("pull_steps", name, rank, kind == "householder", (("GIVEN", int(given)),)),
        *(gate is not None, direct, False),
    )
    picked, segments = _pick(step, x, arrays)
    report = _report.blank(batch, chunks, segments, written=lam.size > 0)
    stop = (np.float64(rtol), np.float64(atol), np.int64(max_iter))
    arguments = (
        *(
            lam,
            gate,
            x,
            u,
            alpha,
            initial,
            h,
            top,
            value,
            lam_bar,
            gate_bar,
            x_bar,
            u_bar,
            alpha_bar,
            initial_bar,
        ),
        *(np.int64(steps), np.int32(dim), np.int32(segments), *stop),
        *(report.counts, report.change, report.scale, report.rcond, report.state),
        *((None, None) if given else _between(segments, batch, dim, x.dtype)),
    )
    if x.size:
        blocks = batch * segments * picked.cluster
        _device.launch(picked.kernel, blocks, picked.threads, arguments, shared=picked.shared)
    bars = (u_bar, alpha_bar) if params[0].shape[2] else tuple(xp.zeros(p.shape, p.dtype) for p in params)
    cotangents = (lam_bar, gate_bar, x_bar, initial_bar, bars)
    if given:
        return None, cotangents
    fields = [a for a in (lam, top, gate, *params) if a is not None]
    return _report.summary(value, report, direct, tuple(fields)), cotangents


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    shapes = [
        # dtype, dim, rank, product, gated, direct, split
        ("float32", 1024, 1, True, False, True, False),
        ("float32", 1024, 1, True, False, True, True),
        ("float32", 1024, 1, True, False, False, False),
        ("float32", 1024, 4, True, False, True, False),
        ("float32", 1024, 8, True, True, True, False),
        ("float32", 1024, 8, True, False, False, True),
        ("float32", 8192, 8, True, False, True, False),
        ("float32", 77, 3, False, True, False, True),
        ("float64", 1024, 2, True, False, True, True),
        ("bfloat16", 1024, 1, True, False, True, False),
        ("float16", 512, 2, True, False, False, False),
    ]
    found = []
    for dtype, dim, rank, product, gated, direct, split in shapes:
        width = _shapes.ACCESS // (2 if dtype.endswith("16") else np.dtype(dtype).itemsize)
        while dim % width:
            width //= 2
        rest = (gated, direct, split)
        found.append(layout(Step("solve_steps", dtype, rank, product, (("ADJOINT", 0),), *rest), dim, width))
        found.append(layout(Step("pull_steps", dtype, rank, product, (("GIVEN", 0),), *rest), dim, width))
    plain = (False, False, False)
    found.append(layout(Step("solve_steps", "float32", 1, True, (("ADJOINT", 1),), *plain), 1024, 4))
    found.append(layout(Step("pull_steps", "float32", 1, True, (("GIVEN", 1),), *plain), 1024, 4))
    return [one.kernel for one in found]
