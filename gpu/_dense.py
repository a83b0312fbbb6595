"""Dense and Fixed mixers on the device: their solves by products of matrices, for all sequences at once.

One matrix for all steps makes an iteration one product of matrices, a matrix for each step makes it a product with a
vector for each; the rest of an iteration is a scan (``kernels/dense_solve.cu``), which also decides, sequence by
sequence, when to go on. The host queues iterations and learns that all sequences are at rest two iterations later, so
that the device never waits; what it does meanwhile changes nothing. Half types are iterated in float32 and rounded
once, at the end. Sections 3, 6 and 7 of docs/mathematics.md.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fpnumba.gpu import _device, _mix, _report, _shapes
from fpnumba.gpu._report import Solved, store

__all__ = ["default_chunk", "iterate", "pull", "representative", "solve"]

Array = Any
Params = tuple[Array, ...]

THREADS = 128


def default_chunk(kind: Any, params: Params, dim: int, dtype: Any) -> int:
    """Steps of a chunk where the caller does not say.

    Enough for a product of matrices that fills the device with a few dozen sequences, and for an iteration that is
    longer than its launches.

    Parameters
    ----------
    kind, params
        The mixer.
    dim : int
    dtype : a NumPy dtype

    Returns
    -------
    int
    """
    return 64


class _System(NamedTuple):
    """The inputs of (F), or of its adjoint."""

    lam: Array
    gate: Array | None
    source: Array
    initial: Array | None
    adjoint: bool

    def kernel(self, function: str, *, cold: bool = False, once: bool = False) -> _device.Kernel:
        return _kernel(function, self.source.dtype, self.gate is not None, self.adjoint, cold, once)

    @property
    def arrays(self) -> tuple[Array | None, ...]:
        return self.lam, self.gate, self.source, self.initial


def _kernel(
    function: str, dtype: Any, gated: bool, adjoint: bool, cold: bool = False, once: bool = False
) -> _device.Kernel:
    macros: dict[str, object] = {
        "STORE": store(dtype),
        "GATED": int(gated),
        "ADJOINT": int(adjoint),
        "COLD": int(cold),
        "ONCE": int(once),
        "THREADS": THREADS,
    }
    if function == "dense_occupied":
        macros["OCCUPIED"] = 1
    return _device.Kernel.of("dense_solve.cu", function, macros)


def _product(
    kind: str, q: Array, vectors: Array, mixed: Array, transposed: bool, at: _mix.Chunked | None = None
) -> Callable[[], None]:
    """``Q d``, or ``Q^T e``, from `vectors` to `mixed`, to be called once for each iteration."""
    if kind == "dense":
        return _mix.blocks_product(q, None, vectors, mixed, transposed, at)
    matrix = q.astype(vectors.dtype, copy=False)
    matrix = matrix if transposed else matrix.T
    rows, results = vectors.reshape(-1, q.shape[-1]), mixed.reshape(-1, q.shape[-1])

    def multiply() -> None:
        _device.matmul(rows, matrix, results)

    return multiply


def _run(
    kind: str,
    q: Array,
    system: _System,
    value: Array,
    guessed: bool,
    chunk: int,
    report: _report.Report,
    options: tuple[Any, ...],
) -> None:
    """Iterate until every sequence is at rest. `value` is the guess, or nothing yet; `options` are the rule's."""
    xp = _device.xp()
    batch, steps, dim = value.shape
    chunks, groups, adjoint = -(-steps // chunk), -(-dim // THREADS), system.adjoint
    vectors, mixed = xp.zeros((batch, chunk, dim), value.dtype), xp.empty((batch, chunk, dim), value.dtype)
    control = xp.zeros(3 * batch + 1, np.int32)
    control[3 * batch :] = batch
    done, count, arrived = (control[n * batch : (n + 1) * batch] for n in range(3))
    remaining = control[3 * batch :]
    sizes = xp.zeros((batch, 3), np.uint64)
    layout = (np.int64(steps), np.int32(dim), np.int64(chunk), np.int64(chunks), np.int32(groups))
    product = _product(kind, q, vectors, mixed, adjoint, _mix.Chunked(done, chunk, chunks, steps, adjoint))
    occupied = None
    if guessed:
        occupied = xp.empty((batch, chunks), np.int32)
        sizes_of = (np.int64(steps), np.int32(dim), np.int64(chunk), np.int64(chunks))
        kernel = system.kernel("dense_occupied")
        _device.launch(kernel, batch * chunks, THREADS, (system.source, occupied, *sizes_of))
    begin, scan = system.kernel("dense_begin", cold=not guessed), system.kernel("dense_scan")
    to_begin = (*system.arrays, value, vectors, *layout, done, count, occupied)
    to_scan = (
        *(*system.arrays, value, value, vectors, mixed, *layout, *options),
        *(done, count, arrived, remaining, sizes),
        *(report.counts, report.change, report.scale, report.state),
    )
    watch = _device.Watch(remaining)
    max_iter = int(options[2])
    try:
        for n in range(chunks * max_iter):
            if n == 0 or chunks > 1:
                _device.launch(begin, batch * groups, THREADS, to_begin)
            product()
            _device.launch(scan, batch * groups, THREADS, to_scan)
            if watch.look() == 0:
                break
    finally:
        watch.close()


def solve(
    kind: Any,
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
) -> Solved:
    """The fixed point of (F), or of its adjoint, chunk after chunk; stopping by section 7 of docs/mathematics.md.

    Parameters
    ----------
    kind : "dense" or "fixed"
    params : tuple of one array
    lam, gate, source, initial, guess
        As of `fpnumba.cpu.solve.solve`; in the adjoint `source` is the cotangent of ``h``, and `initial` None.
    adjoint : bool
    chunk : int
        Steps of a chunk.
    rtol, atol, max_iter, damping
        As of `fpnumba.cpu.solve.solve`.

    Returns
    -------
    Solved
    """
    batch, steps, _ = source.shape
    chunk = max(1, min(chunk, steps))
    real = _shapes.real(source.dtype)
    value = _device.xp().empty(source.shape, real) if guess is None else guess.astype(real)
    report = _report.blank(batch, -(-steps // chunk))
    if source.size:
        options = (np.float64(rtol), np.float64(atol), np.int64(max_iter), np.float64(damping))
        system = _System(lam, gate, source, initial, adjoint)
        _run(kind, params[0], system, value, guess is not None, chunk, report, options)
    fields = tuple(a for a in (lam, source, initial, gate, guess) if a is not None)
    result = value.astype(source.dtype, copy=False)
    if kind == "fixed":
        return _report.summary(result, report, False, fields, params)
    return _report.summary(result, report, False, (*fields, *params))


def iterate(
    kind: Any,
    params: Params,
    lam: Array,
    gate: Array | None,
    source: Array,
    initial: Array | None,
    value: Array,
    *,
    adjoint: bool,
) -> Array:
    """One parallel iteration of (F), or of its adjoint, from `value`.

    Parameters
    ----------
    kind, params, lam, gate, source, initial, adjoint
        As for `solve`.
    value : (B, T, D) array
        The previous iterate.

    Returns
    -------
    (B, T, D) array
    """
    new = _shapes.empty_like(source)
    if source.size == 0:
        return new
    batch, steps, dim = source.shape
    groups = -(-dim // THREADS)
    xp, real = _device.xp(), _shapes.real(source.dtype)
    vectors, mixed = xp.empty(source.shape, real), xp.empty(source.shape, real)
    system = _System(lam, gate, source, initial, adjoint)
    layout = (np.int64(steps), np.int32(dim), np.int64(steps), np.int64(1), np.int32(groups))
    arguments = (*system.arrays, value, vectors, *layout, None, None, None)
    _device.launch(system.kernel("dense_begin", once=True), batch * groups, THREADS, arguments)
    _product(kind, params[0], vectors, mixed, adjoint)()
    options = (np.float64(0), np.float64(0), np.int64(1), np.float64(1))
    arguments = (*system.arrays, value, new, None, mixed, *layout, *options, *(None,) * 9)
    _device.launch(system.kernel("dense_scan", once=True), batch * groups, THREADS, arguments)
    return new


def pull(
    kind: Any,
    params: Params,
    lam: Array,
    gate: Array | None,
    x: Array,
    initial: Array | None,
    h: Array,
    s: Array,
) -> tuple[Array, Array | None, Array, Array, Params]:
    """Cotangents of all inputs of (F) from the solution `h` and its adjoint `s`.

    Section 6 of docs/mathematics.md; as `fpnumba.cpu.solve.rnn_cotangents`.

    Parameters
    ----------
    kind, params, lam, gate, x, initial
        As for `solve`.
    h, s : (B, T, D) arrays

    Returns
    -------
    lam_bar : (B, T, D) array
    gate_bar : (B, T, D) array, or None without a gate
    x_bar : (B, T, D) array
    initial_bar : (B, D) array
    params_bar : tuple of one array
    """
    (q,) = params
    xp, real = _device.xp(), _shapes.real(x.dtype)
    batch, steps, dim = x.shape
    lam_bar, x_bar = _shapes.empty_like(x), _shapes.empty_like(x)
    gate_bar = None if gate is None else _shapes.empty_like(x)
    initial_bar = xp.zeros((batch, dim), x.dtype)
    if x.size == 0:
        return lam_bar, gate_bar, x_bar, initial_bar, (xp.zeros_like(q),)
    d, e, mixed = (xp.empty(x.shape, real) for _ in range(3))
    width = _shapes.each(dim, x, lam, gate, h, s, initial, lam_bar, gate_bar)
    groups = -(-dim // (width * THREADS))
    split, join = (_pull_kernel(f, x.dtype, width, gate is not None) for f in ("dense_split", "dense_join"))
    size = (np.int32(dim), np.int32(groups))
    _device.launch(split, batch * steps * groups, THREADS, (lam, gate, x, h, s, d, e, *size))
    _product(kind, q, d, mixed, False)()
    outputs = (lam_bar, gate_bar, initial_bar)
    arguments = (lam, h, s, initial, mixed, *outputs, np.int64(steps), *size)
    _device.launch(join, batch * steps * groups, THREADS, arguments)
    if kind == "dense":
        _product(kind, q, e, x_bar, True)()
        q_bar, _ = _mix.blocks_cotangent(q, None, d, e)
    else:
        _product(kind, q, e, mixed, True)()
        x_bar = mixed.astype(x.dtype, copy=False)
        q_bar = _mix.fixed_cotangent(q, d, e)
    return lam_bar, gate_bar, x_bar, initial_bar, (q_bar,)


def _pull_kernel(function: str, dtype: Any, width: int, gated: bool) -> _device.Kernel:
    macros = {"STORE": store(dtype), "EACH": width, "GATED": int(gated), "THREADS": THREADS}
    return _device.Kernel.of("dense_pull.cu", function, macros)


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    found = []
    for dtype, width in (("float32", 4), ("float64", 2), ("bfloat16", 8)):
        for adjoint in (False, True):
            found.append(_kernel("dense_begin", dtype, adjoint, adjoint, cold=not adjoint))
            found.append(_kernel("dense_scan", dtype, adjoint, adjoint))
        found.append(_kernel("dense_scan", dtype, True, False, once=True))
        found.append(_pull_kernel("dense_join", dtype, width, True))
    found.append(_kernel("dense_occupied", "float32", False, False))
    found.append(_pull_kernel("dense_split", "float16", 1, False))
    return found
