"""The fixed point of (F) and its adjoint in Numba: four ways, one iteration, cotangents.

Sections 3, 6 and 7 of docs/mathematics.md. Low-rank mixers take a chunk of one step, and the direct way, in
``r`` unknowns per step (`fpnumba.cpu._lowrank`); everything else iterates all channels of a chunk
(`fpnumba.cpu._relax`).
"""

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fpnumba.cpu import _cotangents, _lowrank, _pull, _relax, _threads, memory
from fpnumba.cpu._jit import streams
from fpnumba.cpu._kinds import as_mixer, block_size, work_size
from fpnumba.cpu._relax import CONVERGED, DIVERGED, ILL_CONDITIONED, MAX_ITER, NONFINITE_INPUT
from fpnumba.cpu.mixers import Params, empty_bars, shared_cotangent, time_segments
from fpnumba.cpu.scan import zeros_if_none

__all__ = [
    "CONVERGED",
    "DIVERGED",
    "ILL_CONDITIONED",
    "MAX_ITER",
    "NONFINITE_INPUT",
    "Solved",
    "default_chunk",
    "iterate",
    "iterate_adjoint",
    "rnn_cotangents",
    "rnn_pullback",
    "solve",
    "solve_adjoint",
]

Array: TypeAlias = NDArray[np.floating[Any]]

# A segment of time shorter than this is not worth starting from a guess.
SHORTEST_SEGMENT = 256


class Solved(NamedTuple):
    """What a solve returns.

    Attributes
    ----------
    value : (B, T, D) array
        ``h``, or ``s`` of the adjoint.
    iterations : (B,) int64 array
        Applications of the iteration, the most that any chunk took; 1 by the direct way.
    residual : (B,) float64 array
        ``max|f(h) - h| / max|h|`` of the last iteration, for low-rank mixers and chunks of one step a bound of
        it; by the direct way, ``eps`` over an estimate of the reciprocal condition.
    status : (B,) int8 array
        CONVERGED 0, MAX_ITER 1, DIVERGED 2, NONFINITE_INPUT 3, ILL_CONDITIONED 4.
    chunk_iterations : (B, n_chunks) int64 array
        In the order of time, in the adjoint too.
    """

    value: Array
    iterations: NDArray[np.int64]
    residual: NDArray[np.float64]
    status: NDArray[np.int8]
    chunk_iterations: NDArray[np.int64]


def is_low_rank(kind: Any) -> bool:
    """Whether ``P`` has the form ``U^T S U``."""
    return isinstance(kind, str) and kind in ("dplr", "householder")


def default_chunk(kind: Any, params: Params, dim: int, dtype: Any) -> int:
    """Steps of a chunk where the caller does not say.

    Low-rank mixers: one, because a step's iterations run over ``r`` numbers and no chunk makes them cheaper.
    Others: as many as keep the chunk's data in half of a second-level cache of 512 KiB.

    Parameters
    ----------
    kind, params
        The mixer.
    dim : int
    dtype : a NumPy dtype

    Returns
    -------
    int

    Examples
    --------
    >>> from fpnumba.cpu.solve import default_chunk
    >>> default_chunk("kronecker", (np.zeros((1, 9, 16, 16)), np.zeros((1, 9, 16, 16))), 256, "float64")
    21
    """
    if is_low_rank(kind):
        return 1
    per_step = 3 * dim
    if kind != "fixed":
        per_step += sum(int(np.prod(p.shape[2:])) for p in params)
    return max(1, min(64, (1 << 18) // (per_step * np.dtype(dtype).itemsize)))


def _chunk(kind: Any, params: Params, like: Array, method: str, chunk: int | None, max_iter: int) -> int:
    if max_iter < 1:
        raise ValueError(f"max_iter: {max_iter} iterations; expected one at the least")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: {chunk} steps; expected one at the least")
    if method == "direct" and not is_low_rank(kind):
        name = kind if isinstance(kind, str) else kind.name
        raise ValueError(
            f"method: 'direct' needs a mixer of low rank (dplr, householder), got {name!r}; "
            "use 'chunked', 'sequential' or 'parallel'"
        )
    steps, dim = like.shape[1:]
    if method == "chunked":
        return default_chunk(kind, params, dim, like.dtype) if chunk is None else chunk
    if method == "sequential":
        return 1
    if method in ("parallel", "direct"):
        return max(steps, 1)
    raise ValueError(f"method: {method!r}; expected 'parallel', 'chunked', 'sequential' or 'direct'")


def _split(batch: int, steps: int, chunk: int) -> int:
    """Segments of time per sequence, where there are fewer sequences than threads."""
    if batch == 0 or batch >= _threads.count():
        return 1
    return max(1, min(-(-_threads.count() // batch), steps // max(SHORTEST_SEGMENT, chunk)))


def _solve(
    kind: Any,
    params: Params,
    lam: Array,
    gate: Array | None,
    source: Array,
    initial: Array | None,
    guess: Array | None,
    adjoint: bool,
    method: str,
    chunk: int | None,
    rtol: float,
    atol: float,
    max_iter: int,
    damping: float,
) -> Solved:
    batch, steps, dim = source.shape
    size = _chunk(kind, params, source, method, chunk, max_iter)
    direct = method == "direct"
    small = direct or (is_low_rank(kind) and size == 1 and guess is None and damping == 1)
    segments = _split(batch, steps, 1 if direct else size)
    value = memory.empty(source.shape, source.dtype)
    start = _relax.COLD
    if guess is not None and not small:
        value[...] = guess
        start = _relax.GUESS
    report = _blank(batch, -(-steps // size), segments)
    start_state = zeros_if_none(initial, (batch, dim), source.dtype)
    gated = gate is not None
    eps = float(np.finfo(source.dtype).eps)
    fields = (lam, lam if gate is None else gate, gated, source, start_state, value, segments)
    if small:
        u, alpha = params
        if u.shape[2] == 0:  # Q = I; a reflection that does nothing has a rank
            u, alpha = np.zeros((batch, steps, 1, dim), u.dtype), np.zeros((batch, steps, 1), u.dtype)
        work = value.size + u.size
        matrices = (u, alpha, kind == "householder", adjoint)
        stopping = (direct, eps, rtol, atol, max_iter, *report)
        stream = segments == 1 and streams(3 * value.nbytes + u.nbytes, value)
        _threads.run(
            _lowrank.solve_steps, batch * segments, work, *matrices, *fields, False, *stopping, stream
        )
        if segments > 1:
            _threads.run(_lowrank.solve_steps, batch, work, *matrices, *fields, True, *stopping, False)
    else:
        p = as_mixer(kind, params)
        work = value.size + sum(a.size for a in params)
        rest = (size, block_size(p), work_size(p), eps, rtol, atol, max_iter, float(damping), *report[:-1])
        _threads.run(_relax.relax, batch * segments, work, p, adjoint, start, *fields, *rest)
        if segments > 1:
            _threads.run(_relax.settle, batch, work, p, adjoint, start, *fields, *rest)
    inputs = [a for a in (lam, source, start_state, gate, None if small else guess) if a is not None]
    if kind == "fixed":
        return _summary(value, report, direct, tuple(inputs), params)
    return _summary(value, report, direct, (*inputs, *params))


class _Report(NamedTuple):
    """What kernels say of a solve, one entry per sequence and chunk, or per sequence and segment of time."""

    counts: NDArray[np.int64]
    change: NDArray[np.float64]
    scale: NDArray[np.float64]
    status: NDArray[np.int8]
    rcond: NDArray[np.float64]


def _blank(batch: int, chunks: int, segments: int) -> _Report:
    shape = (batch, segments)
    status, rcond = np.full(shape, CONVERGED, np.int8), np.ones(shape)
    return _Report(np.zeros((batch, chunks), np.int64), np.zeros(shape), np.zeros(shape), status, rcond)


def _summary(
    value: Array, report: _Report, direct: bool, fields: tuple[Array, ...], shared: tuple[Array, ...] = ()
) -> Solved:
    """Put the parts of a report together, and see whether a sequence that went wrong had inputs that were finite.

    `fields` have one entry per sequence, `shared` are for all of them.
    """
    batch, steps, _ = value.shape
    limits = np.finfo(value.dtype)
    if direct:
        report.counts[...] = 1
        with np.errstate(divide="ignore"):  # a step that is singular
            residual = float(limits.eps) / report.rcond.min(axis=1) if steps else np.zeros(batch)
    else:
        with np.errstate(invalid="ignore", over="ignore"):
            residual = report.change.max(axis=1) / np.maximum(report.scale.max(axis=1), float(limits.tiny))
    status = report.status.max(axis=1)
    for b in np.flatnonzero((status == DIVERGED) | (status == ILL_CONDITIONED)):
        if not all(np.isfinite(a).all() for a in (*shared, *(own[b] for own in fields))):
            status[b] = NONFINITE_INPUT
    return Solved(value, report.counts.max(axis=1, initial=0), residual, status, report.counts)


def solve(
    kind: Any,
    params: Params,
    lam: Array,
    gate: Array | None,
    x: Array,
    initial: Array | None,
    guess: Array | None,
    *,
    method: str = "parallel",
    chunk: int | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int = 1000,
    damping: float = 1.0,
) -> Solved:
    """The fixed point of (F), ``h_t = lam_t * h_{t-1} + g_t * (Q_t x_t + (I - Q_t) h_t)``.

    Section 3 of docs/mathematics.md; stopping by section 7: ``max|f(h) - h| <= atol + rtol * max|h|`` for each
    sequence.

    Parameters
    ----------
    kind, params
        The mixer, see `fpnumba.cpu.mixers`.
    lam : (B, T, D) C-contiguous array, float32 or float64
    gate : (B, T, D) array or None
        None is ``1 - lam``, computed on the fly.
    x : (B, T, D) array
    initial : (B, D) array or None
        ``h_0``; None is zero.
    guess : (B, T, D) array or None
        Where the iteration starts; None is zero. The direct way needs none.
    method : "parallel", "chunked", "sequential" or "direct"
        All steps at once, chunk after chunk, step after step, or one ``r x r`` system per step.
    chunk : int or None
        Steps of a chunk, for "chunked"; None is `default_chunk`.
    rtol, atol : float
    max_iter : int
        Applications of the iteration, per chunk.
    damping : float
        ``h <- (1 - damping) h + damping f(h)``.

    Returns
    -------
    Solved

    Raises
    ------
    ValueError
        If `method` or `kind` is unknown, `chunk` or `max_iter` less than one, or the mixer has no direct way.

    Examples
    --------
    >>> from fpnumba.cpu.solve import solve
    >>> mixer = "dplr", (np.ones((1, 2, 1, 1)), np.full((1, 2, 1), 0.5))
    >>> half, ones = np.full((1, 2, 1), 0.5), np.ones((1, 2, 1))
    >>> solve(*mixer, half, None, ones, None, None, method="direct").value.ravel()
    array([0.33333333, 0.55555556])
    """
    return _solve(
        kind, params, lam, gate, x, initial, guess, False, method, chunk, rtol, atol, max_iter, damping
    )


def solve_adjoint(
    kind: Any,
    params: Params,
    lam: Array,
    gate: Array | None,
    hbar: Array,
    guess: Array | None,
    *,
    method: str = "parallel",
    chunk: int | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int = 1000,
    damping: float = 1.0,
) -> Solved:
    """The adjoint fixed point ``s = S^T (hbar + P^T (g * s))``: (F) with time reversed and ``P`` transposed.

    Section 6 of docs/mathematics.md. A zero `hbar` has exactly the answer zero.

    Parameters
    ----------
    kind, params, lam, gate
        As for `solve`.
    hbar : (B, T, D) array
        Cotangent of ``h``.
    guess : (B, T, D) array or None
    method, chunk, rtol, atol, max_iter, damping
        As for `solve`.

    Returns
    -------
    Solved
        ``value`` is ``s``; what `rnn_cotangents` takes.

    Raises
    ------
    ValueError
        As `solve`.

    Examples
    --------
    >>> from fpnumba.cpu.solve import solve_adjoint
    >>> mixer = "dplr", (np.ones((1, 2, 1, 1)), np.full((1, 2, 1), 0.5))
    >>> half, ones = np.full((1, 2, 1), 0.5), np.ones((1, 2, 1))
    >>> solve_adjoint(*mixer, half, None, ones, None, method="direct").value.ravel()
    array([2.22222222, 1.33333333])
    """
    return _solve(
        kind, params, lam, gate, hbar, None, guess, True, method, chunk, rtol, atol, max_iter, damping
    )


def _iterate_once(
    kind: Any,
    params: Params,
    lam: Array,
    gate: Array | None,
    source: Array,
    initial: Array | None,
    value: Array,
    adjoint: bool,
) -> Array:
    batch, steps, dim = source.shape
    p = as_mixer(kind, params)
    new = memory.empty(source.shape, source.dtype)
    new[...] = value
    fields = (lam, lam if gate is None else gate, gate is not None, source)
    start_state = zeros_if_none(initial, (batch, dim), source.dtype)
    report = (
        np.zeros((batch, 1 if steps else 0), np.int64),
        np.zeros((batch, 1)),
        np.zeros((batch, 1)),
        np.zeros((batch, 1), np.int8),
    )
    options = (1, max(steps, 1), block_size(p), work_size(p), 0.0, 0.0, 0.0, 1, 1.0)
    work = value.size + sum(a.size for a in params)
    arrays = (*fields, start_state, new)
    _threads.run(_relax.relax, batch, work, p, adjoint, _relax.ITERATE, *arrays, *options, *report)
    return new


def iterate(
    kind: Any,
    params: Params,
    lam: Array,
    gate: Array | None,
    x: Array,
    initial: Array | None,
    h: Array,
) -> Array:
    """One parallel iteration of (F): mix all steps from `h` and scan over time, in one pass.

    (F) of section 3 of docs/mathematics.md. From ``h = 0`` this is the diagonal RNN ``scan(g * Q x)``.

    Parameters
    ----------
    kind, params, lam, gate, x, initial
        As for `solve`.
    h : (B, T, D) array
        The previous iterate.

    Returns
    -------
    (B, T, D) array

    Examples
    --------
    >>> from fpnumba.cpu.solve import iterate
    >>> half = np.full((1, 2, 1), 0.5)
    >>> iterate("fixed", (np.array([[0.5]]),), half, None, np.ones((1, 2, 1)), None, np.zeros((1, 2, 1))).ravel()
    array([0.25 , 0.375])
    """
    return _iterate_once(kind, params, lam, gate, x, initial, h, False)


def iterate_adjoint(
    kind: Any, params: Params, lam: Array, gate: Array | None, hbar: Array, s: Array
) -> Array:
    """One iteration of the adjoint, ``S^T (hbar + P^T (g * s))``.

    Section 6 of docs/mathematics.md. From ``s = 0`` one iteration is the one-step gradient, and ``k + 1`` are
    Neumann-k.

    Parameters
    ----------
    kind, params, lam, gate
        As for `solve`.
    hbar : (B, T, D) array
        Cotangent of ``h``.
    s : (B, T, D) array
        The previous iterate.

    Returns
    -------
    (B, T, D) array

    Examples
    --------
    >>> from fpnumba.cpu.solve import iterate_adjoint
    >>> half, ones = np.full((1, 2, 1), 0.5), np.ones((1, 2, 1))
    >>> iterate_adjoint("fixed", (np.array([[0.5]]),), half, None, ones, np.zeros((1, 2, 1))).ravel()
    array([1.5, 1. ])
    """
    return _iterate_once(kind, params, lam, gate, hbar, None, s, True)


def rnn_cotangents(
    kind: Any,
    params: Params,
    lam: Array,
    gate: Array | None,
    x: Array,
    initial: Array | None,
    h: Array,
    s: Array,
) -> tuple[Array, Array | None, Array, Array, Params]:
    """Cotangents of all inputs of (F) from the solution `h` and its adjoint `s`, in one pass over everything.

    Section 6 of docs/mathematics.md. With ``m = Q x + P h``, ``e = g * s`` and ``d = x - h``: ``lam_bar_t =
    s_t * h_{t-1}``, or ``s_t * (h_{t-1} - m_t)`` where the gate is ``1 - lam``; ``gate_bar = s * m``, ``x_bar
    = Q^T e``, ``initial_bar = lam_1 * s_1``, and the mixer's cotangent is that of ``Q d`` with ``e`` coming
    in.

    Parameters
    ----------
    kind, params, lam, gate, x, initial
        As for `solve`.
    h, s : (B, T, D) arrays
        What `solve` and `solve_adjoint` found.

    Returns
    -------
    lam_bar : (B, T, D) array
    gate_bar : (B, T, D) array, or None without a gate
    x_bar : (B, T, D) array
    initial_bar : (B, D) array
    params_bar : tuple of arrays of the shapes of `params`

    Examples
    --------
    >>> from fpnumba.cpu.solve import rnn_cotangents, solve, solve_adjoint
    >>> mixer = "dplr", (np.ones((1, 2, 1, 1)), np.full((1, 2, 1), 0.5))
    >>> half, ones = np.full((1, 2, 1), 0.5), np.ones((1, 2, 1))
    >>> h = solve(*mixer, half, None, ones, None, None, method="direct").value
    >>> s = solve_adjoint(*mixer, half, None, ones, None, method="direct").value
    >>> lam_bar, gate_bar, x_bar, initial_bar, params_bar = rnn_cotangents(*mixer, half, None, ones, None, h, s)
    >>> x_bar.ravel()
    array([0.55555556, 0.33333333])
    """
    batch, steps, dim = x.shape
    bars, lam_bar, x_bar, gate_bar = _empty_cotangents(kind, params, gate, x)
    start_state = zeros_if_none(initial, (batch, dim), x.dtype)
    segments = time_segments(batch, steps)
    work = x.size + sum(a.size for a in params)
    inputs = (lam, lam if gate is None else gate, gate is not None, x, start_state)
    if is_low_rank(kind) and params[0].shape[2] > 0:
        outputs = (lam_bar, lam_bar if gate_bar is None else gate_bar, *bars, x_bar)
        stream = streams(6 * x.nbytes + 2 * params[0].nbytes, *bars[:1], lam_bar, x_bar)
        unsolved = (s, False, False, 0.0, 0.0, 0.0, 1, *_blank(batch, 1, 1))
        arrays = (*params, kind == "householder", *inputs, h, s, *outputs)
        _threads.run(_pull.pull_steps, batch * segments, work, *arrays, segments, stream, *unsolved)
    else:
        p, pulled = as_mixer(kind, params), as_mixer(kind, bars)
        outputs = (lam_bar, lam_bar if gate_bar is None else gate_bar, x_bar)
        arrays = (p, pulled, *inputs, h, s, *outputs, block_size(p), work_size(p))
        _threads.run(_cotangents.rnn_pull, batch * segments, work, *arrays, segments)
    if kind == "fixed":
        bars = (shared_cotangent(x - h, (1 - lam if gate is None else gate) * s),)
    return lam_bar, gate_bar, x_bar, _initial_cotangent(lam, s), bars


def rnn_pullback(
    kind: Any,
    params: Params,
    lam: Array,
    gate: Array | None,
    x: Array,
    initial: Array | None,
    h: Array,
    hbar: Array,
    guess: Array | None,
    *,
    method: str = "parallel",
    chunk: int | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int = 1000,
    damping: float = 1.0,
) -> tuple[Solved, tuple[Array, Array | None, Array, Array, Params]]:
    """`solve_adjoint` and `rnn_cotangents` in one: the exact gradient of `solve`.

    Section 6 of docs/mathematics.md. For low-rank mixers, by the direct way or in chunks of one step, both
    happen in one pass over memory, step after step: what the adjoint has read of a step is still in the
    first-level cache when the cotangents need it.

    Parameters
    ----------
    kind, params, lam, gate, x, initial
        As for `solve`.
    h : (B, T, D) array
        What `solve` found.
    hbar : (B, T, D) array
        Cotangent of `h`.
    guess : (B, T, D) array or None
    method, chunk, rtol, atol, max_iter, damping
        As for `solve_adjoint`.

    Returns
    -------
    solved : Solved
        As of `solve_adjoint`.
    cotangents : tuple
        As of `rnn_cotangents`.

    Raises
    ------
    ValueError
        As `solve`.

    Examples
    --------
    >>> from fpnumba.cpu.solve import rnn_pullback, solve
    >>> mixer = "dplr", (np.ones((1, 2, 1, 1)), np.full((1, 2, 1), 0.5))
    >>> half, ones = np.full((1, 2, 1), 0.5), np.ones((1, 2, 1))
    >>> h = solve(*mixer, half, None, ones, None, None, method="direct").value
    >>> solved, cotangents = rnn_pullback(*mixer, half, None, ones, None, h, ones, None, method="direct")
    >>> cotangents[2].ravel()
    array([0.55555556, 0.33333333])
    """
    batch, steps, dim = x.shape
    size = _chunk(kind, params, x, method, chunk, max_iter)
    direct = method == "direct"
    small = direct or (is_low_rank(kind) and size == 1 and guess is None and damping == 1)
    if not small or params[0].shape[2] == 0 or _split(batch, steps, 1) > 1:
        options: dict[str, Any] = {"method": method, "chunk": chunk, "rtol": rtol, "atol": atol}
        options |= {"max_iter": max_iter, "damping": damping}
        solved = solve_adjoint(kind, params, lam, gate, hbar, guess, **options)
        return solved, rnn_cotangents(kind, params, lam, gate, x, initial, h, solved.value)
    bars, lam_bar, x_bar, gate_bar = _empty_cotangents(kind, params, gate, x)
    value = memory.empty(x.shape, x.dtype)
    start_state = zeros_if_none(initial, (batch, dim), x.dtype)
    report = _blank(batch, -(-steps // size), 1)
    eps = float(np.finfo(x.dtype).eps)
    inputs = (lam, lam if gate is None else gate, gate is not None, x, start_state, h, value)
    outputs = (lam_bar, lam_bar if gate_bar is None else gate_bar, *bars, x_bar)
    stream = streams(7 * x.nbytes + 2 * params[0].nbytes, value, *bars[:1], lam_bar, x_bar)
    options_ = (1, stream, hbar, True, direct, eps, rtol, atol, max_iter)
    work = 2 * x.size + 2 * params[0].size
    arrays = (*params, kind == "householder", *inputs, *outputs)
    _threads.run(_pull.pull_steps, batch, work, *arrays, *options_, *report)
    fields = (lam, hbar, *(() if gate is None else (gate,)), *params)
    solved = _summary(value, report, direct, fields)
    return solved, (lam_bar, gate_bar, x_bar, _initial_cotangent(lam, value), bars)


def _empty_cotangents(
    kind: Any, params: Params, gate: Array | None, x: Array
) -> tuple[Params, Array, Array, Array | None]:
    gate_bar = None if gate is None else memory.empty(x.shape, x.dtype)
    return empty_bars(kind, params), memory.empty(x.shape, x.dtype), memory.empty(x.shape, x.dtype), gate_bar


def _initial_cotangent(lam: Array, s: Array) -> Array:
    """``lam_1 * s_1``; zero if there is no step."""
    batch, steps, dim = s.shape
    return lam[:, 0] * s[:, 0] if steps else np.zeros((batch, dim), s.dtype)
