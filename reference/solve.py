"""The fixed point of (F) and its adjoint: one iteration, the solve in four ways, the cotangents.

Sections 3, 6 and 7 of docs/mathematics.md:

    h_t = lam_t * h_{t-1} + g_t * (Q_t x_t + (I - Q_t) h_t)                                             (F)

with ``g = 1 - lam`` where no gate is given. Sequences are solved one by one, so that none can touch another.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpnumba.reference import direct, mixers
from fpnumba.reference.direct import dense_transition, solve_dense
from fpnumba.reference.kinds import Array, Params
from fpnumba.reference.mixers import Kind
from fpnumba.reference.scan import following, linear_scan, preceding, preceding_cotangent, sum_to

__all__ = [
    "CONVERGED",
    "DIVERGED",
    "ILL_CONDITIONED",
    "MAX_ITER",
    "NONFINITE_INPUT",
    "Solved",
    "dense_transition",
    "iterate",
    "iterate_adjoint",
    "rnn_cotangents",
    "rnn_pullback",
    "solve",
    "solve_adjoint",
    "solve_dense",
]

CONVERGED, MAX_ITER, DIVERGED, NONFINITE_INPUT, ILL_CONDITIONED = range(5)


class Solved(NamedTuple):
    """What a solve returns; ``...`` are the inputs' leading axes.

    Attributes
    ----------
    value : (..., T, D) array
        ``h``; in the adjoint, ``s``.
    iterations : (...) int64 array
        Applications of the iteration, the most that any chunk took. One by the direct way.
    residual : (...) float64 array
        ``max|f(h) - h| / max|h|`` of the last iteration. By the direct way, ``eps`` over the smallest
        reciprocal condition of the steps' systems.
    status : (...) int8 array
        CONVERGED 0, MAX_ITER 1, DIVERGED 2, NONFINITE_INPUT 3, ILL_CONDITIONED 4.
    chunk_iterations : (..., n_chunks) int64 array
        In the order of time, in the adjoint as well.
    """

    value: Array
    iterations: NDArray[np.int64]
    residual: NDArray[np.float64]
    status: NDArray[np.int8]
    chunk_iterations: NDArray[np.int64]


# One iteration


def _gate(lam: Array, gate: Array | None) -> Array:
    return 1 - lam if gate is None else gate


def channel_mix(kind: Kind, params: Params, x: Array, h: Array) -> Array:
    """``m_t = Q_t x_t + P_t h_t = Q_t (x_t - h_t) + h_t``; section 2."""
    return mixers.apply(kind, params, x - h) + h


def iterate(
    kind: Kind, params: Params, lam: Array, gate: Array | None, x: Array, initial: Array | None, h: Array
) -> Array:
    """One parallel iteration of (F): mix all steps of ``h``, then scan over time.

    (F) of section 3 of docs/mathematics.md. From ``h = 0`` this is the diagonal RNN, ``scan(g * Q x)``.

    Parameters
    ----------
    kind, params
        The mixer, see `fpnumba.reference.mixers`.
    lam : (..., T, D) array
    gate : (..., T, D) array or None
        None is ``1 - lam``.
    x : (..., T, D) array
    initial : (..., D) array or None
        ``h_0``; None is zero.
    h : (..., T, D) array
        The previous iterate.

    Returns
    -------
    (..., T, D) array

    Examples
    --------
    >>> half = np.full((2, 1), 0.5)
    >>> iterate("fixed", (np.array([[0.5]]),), half, None, np.ones((2, 1)), None, np.zeros((2, 1))).ravel()
    array([0.25 , 0.375])
    """
    return linear_scan(lam, _gate(lam, gate) * channel_mix(kind, params, x, h), initial)


def adjoint_mix(kind: Kind, params: Params, gate: Array, hbar: Array, s: Array) -> Array:
    """``z = hbar + P^T e = hbar + (e - Q^T e)`` with ``e = g * s``; section 6."""
    e = gate * s
    return hbar + (e - mixers.apply_transpose(kind, params, e))


def iterate_adjoint(
    kind: Kind, params: Params, lam: Array, gate: Array | None, hbar: Array, s: Array
) -> Array:
    """One iteration of the adjoint, ``S^T (hbar + P^T (g * s))``.

    Section 6 of docs/mathematics.md. From ``s = 0``, one iteration is the one-step gradient and ``k + 1`` are
    Neumann-k.

    Parameters
    ----------
    kind, params, lam, gate
        As for `iterate`.
    hbar : (..., T, D) array
        Cotangent of ``h``.
    s : (..., T, D) array
        The previous iterate.

    Returns
    -------
    (..., T, D) array

    Examples
    --------
    >>> half = np.full((2, 1), 0.5)
    >>> iterate_adjoint("fixed", (np.array([[0.5]]),), half, None, np.ones((2, 1)), np.zeros((2, 1))).ravel()
    array([1.5, 1. ])
    """
    z = adjoint_mix(kind, params, _gate(lam, gate), hbar, s)
    return linear_scan(following(np.broadcast_to(lam, z.shape)), z, reverse=True)


# One sequence, chunk by chunk


class _How(NamedTuple):
    method: str
    chunk: int | None
    rtol: float
    atol: float
    max_iter: int
    damping: float

    def check(self) -> None:
        if self.method not in ("parallel", "chunked", "sequential", "direct"):
            expected = "'parallel', 'chunked', 'sequential' or 'direct'"
            raise ValueError(f"method: {self.method!r}; expected {expected}")
        for name, count in (("chunk", self.chunk), ("max_iter", self.max_iter)):
            if count is not None and count < 1:
                raise ValueError(f"{name}: {count}; expected one at the least")

    def chunks(self, length: int) -> list[slice]:
        """The steps that are solved together."""
        size = {"chunked": self.chunk or 64, "sequential": 1}.get(self.method, max(length, 1))
        return [slice(at, min(at + size, length)) for at in range(0, length, size)]


class _Sequence(NamedTuple):
    """One sequence's inputs, ``(T, ...)`` each; ``source`` is ``x``, in the adjoint ``hbar``."""

    kind: Kind
    params: Params
    lam: Array
    gate: Array
    source: Array
    initial: Array
    guess: Array

    def at(self, steps: slice) -> Params:
        return tuple(p[steps] for p in self.params)

    def finite(self) -> bool:
        return all(np.isfinite(a).all() for a in (*self[2:], *self.params))


class _Trace(NamedTuple):
    """One sequence solved."""

    value: Array
    counts: list[int]
    residual: float
    status: int


def _largest(values: Array) -> float:
    return float(np.max(np.abs(values), initial=0))


def _relax(
    f: Callable[[slice, Array, Array], Array], of: _Sequence, decay: Array, how: _How, backwards: bool
) -> _Trace:
    """Iterate each chunk to convergence before the next begins; section 7.

    ``f(steps, h, carry)`` is one iteration over the steps of a chunk that ``carry`` comes into, and
    ``decay (T, D)`` what each step multiplies the carry with.
    """
    chunks, carry = how.chunks(len(of.source)), of.initial
    eps, tiny = (float(getattr(np.finfo(of.guess.dtype), name)) for name in ("eps", "tiny"))
    value, counts = of.guess.copy(), [0] * len(chunks)
    scale, residual, status = 0.0, 0.0, CONVERGED
    for k in reversed(range(len(chunks))) if backwards else range(len(chunks)):
        steps = chunks[k]
        h = value[steps]
        if not of.source[steps].any() and not carry.any():
            h = np.zeros_like(
                h
            )  # the exact answer, which no relative tolerance would find from another guess
        share = _tolerance_share(decay[steps], len(chunks))
        before, dh, converged = scale, 0.0, False
        while not converged and np.isfinite(dh) and counts[k] < how.max_iter:
            new = f(steps, h, carry)
            counts[k] += 1
            dh = _largest(new - h)
            h = (1 - how.damping) * h + how.damping * new
            scale = max(before, _largest(h))
            tolerance = max(share * (how.atol + how.rtol * scale), 4 * eps * scale)
            converged = bool(np.isfinite(dh)) and dh <= tolerance  # an overflow lifts both of them to inf
        if not converged:
            status = DIVERGED if status == DIVERGED or not np.isfinite(dh) else MAX_ITER
        residual = float(np.maximum(residual, dh))  # keeps a NaN, which max() would lose
        value[steps], carry = h, h[0] if backwards else h[-1]
    return _Trace(value, counts, residual / max(scale, tiny), status)


def _tolerance_share(decay: Array, n_chunks: int) -> float:
    """The part of the tolerance that one chunk may use up, so that the whole still meets it; section 7.

    What is carried into a chunk leaves it multiplied by ``L = max_d prod_t |lam|`` at most, so that residuals
    of ``1 - L``, or of ``1 / n_chunks``, add up to one. Half of that is kept in reserve.
    """
    if n_chunks == 1:
        return 1.0
    return 0.5 * max(1 / n_chunks, 1 - _largest(np.prod(decay, axis=0)))


def _substitute(
    step: Callable[[int, Array], tuple[Array, float]], order: Iterable[int], of: _Sequence
) -> _Trace:
    """Each step exactly, from the one before."""
    value, carry, rcond = np.zeros_like(of.guess), of.initial, 1.0
    for t in order:
        carry, of_step = step(t, carry)
        value[t] = carry
        rcond = float(np.minimum(rcond, of_step))  # keeps a NaN
    eps = float(np.finfo(value.dtype).eps)
    finite = bool(np.isfinite(value).all())
    status = ILL_CONDITIONED if rcond < 1e3 * eps else CONVERGED if finite else DIVERGED
    if len(value) == 0:
        return _Trace(value, [], 0.0, status)
    return _Trace(value, [1], float(np.divide(eps, rcond)) if finite else np.nan, status)


def _dense(of: _Sequence) -> Array:
    """``Q`` of every step, ``(T, D, D)``."""
    length, dim = of.source.shape
    return np.broadcast_to(mixers.to_dense(of.kind, of.params, dim, axes=1), (length, dim, dim))


def _forward(of: _Sequence, how: _How) -> _Trace:
    """(F) for one sequence."""
    lam, gate, x = of.lam, of.gate, of.source

    def f(steps: slice, h: Array, carry: Array) -> Array:
        return iterate(of.kind, of.at(steps), lam[steps], gate[steps], x[steps], carry, h)

    if how.method != "direct":
        return _relax(f, of, lam, how, backwards=False)

    factors = mixers.low_rank(of.kind, of.params)
    if factors is None:
        q = _dense(of)
        return _substitute(
            lambda t, h: direct.dense_step(q[t], gate[t], lam[t] * h + gate[t] * x[t], x[t]),
            range(len(x)),
            of,
        )
    u, S = factors
    return _substitute(
        lambda t, h: direct.low_rank_step(u[t], S[t], gate[t], lam[t] * h + gate[t] * x[t], x[t]),
        range(len(x)),
        of,
    )


def _backward(of: _Sequence, how: _How) -> _Trace:
    """The adjoint of (F) for one sequence, from the last step to the first."""
    after, gate, hbar = following(of.lam), of.gate, of.source

    def f(steps: slice, s: Array, carry: Array) -> Array:
        z = adjoint_mix(of.kind, of.at(steps), gate[steps], hbar[steps], s)
        return linear_scan(after[steps], z, carry, reverse=True)

    if how.method != "direct":
        return _relax(f, of, after, how, backwards=True)

    factors = mixers.low_rank(of.kind, of.params)
    if factors is None:
        q = _dense(of)
        return _substitute(
            lambda t, s: direct.dense_adjoint_step(q[t], gate[t], hbar[t] + after[t] * s),
            reversed(range(len(hbar))),
            of,
        )
    u, S = factors
    return _substitute(
        lambda t, s: direct.low_rank_adjoint_step(u[t], S[t], gate[t], hbar[t] + after[t] * s),
        reversed(range(len(hbar))),
        of,
    )


# All sequences


def _each(
    one: Callable[[_Sequence, _How], _Trace],
    how: _How,
    kind: Kind,
    params: Params,
    lam: Array,
    gate: Array | None,
    source: Array,
    initial: Array | None,
    guess: Array | None,
) -> Solved:
    """Broadcast the inputs, solve sequence by sequence, and say of each what became of it."""
    how.check()
    gate = _gate(lam, gate)
    dtype = np.result_type(*params, *(a for a in (lam, gate, source, initial, guess) if a is not None))
    initial = np.zeros(source.shape[-1], dtype) if initial is None else initial
    guess = np.zeros(source.shape[-2:], dtype) if guess is None else guess
    given = mixers.steps_shape(kind, params, max(a.ndim for a in (lam, gate, source, guess)) - 1)
    full = np.broadcast_shapes(
        *(a.shape for a in (lam, gate, source, guess, initial[..., None, :])), (*given, 1)
    )
    lead, (length, dim) = full[:-2], full[-2:]
    lam, gate, source, guess = (np.broadcast_to(a, full) for a in (lam, gate, source, guess))
    initial = np.broadcast_to(initial, (*lead, dim))
    kind, params = mixers.broadcast_params(kind, params, full[:-1])
    solved = Solved(
        value=np.zeros(full, dtype),
        iterations=np.zeros(lead, np.int64),
        residual=np.zeros(lead, np.float64),
        status=np.zeros(lead, np.int8),
        chunk_iterations=np.zeros((*lead, len(how.chunks(length))), np.int64),
    )
    for at in np.ndindex(lead):
        arrays = (a[at].astype(dtype) for a in (lam, gate, source, initial, guess))
        of = _Sequence(kind, tuple(p[at] for p in params), *arrays)
        with np.errstate(all="ignore"):  # what overflows is said by the status
            value, counts, residual, status = one(of, how)
        if status in (DIVERGED, ILL_CONDITIONED) and not of.finite():
            status = NONFINITE_INPUT
        solved.value[at] = value
        solved.iterations[at] = max(counts, default=0)
        solved.residual[at] = residual
        solved.status[at] = status
        solved.chunk_iterations[at] = counts
    return solved


# The doors


def solve(
    kind: Kind,
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
    """The fixed point of (F).

    Section 3 of docs/mathematics.md. Each sequence stops, chunk by chunk, by section 7: at
    ``max|f(h) - h| <= atol + rtol * max|h|``, and no later than at four rounding errors of ``max|h|``.

    Parameters
    ----------
    kind, params, lam, gate, x, initial
        As for `iterate`.
    guess : (..., T, D) array or None
        Where the iteration starts; None is zero. The direct way makes no use of it.
    method : "parallel", "chunked", "sequential" or "direct"
        All steps at once, chunk after chunk, step after step, or by one small linear system for each step.
    chunk : int or None
        How many steps "chunked" takes at a time; None is 64.
    rtol, atol : float
    max_iter : int
        The most applications of the iteration, for each chunk.
    damping : float
        ``h <- (1 - damping) h + damping f(h)``.

    Returns
    -------
    Solved

    Raises
    ------
    ValueError
        If there is no such ``method`` or ``kind``, or ``chunk`` or ``max_iter`` is less than one.

    Examples
    --------
    >>> half, q = np.full((2, 1), 0.5), (np.array([[0.5]]),)
    >>> solve("fixed", q, half, None, np.ones((2, 1)), None, None, method="direct").value.ravel()
    array([0.33333333, 0.55555556])
    """
    how = _How(method, chunk, rtol, atol, max_iter, damping)
    return _each(_forward, how, kind, params, lam, gate, x, initial, guess)


def solve_adjoint(
    kind: Kind,
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
    """The adjoint fixed point, ``s = S^T (hbar + P^T (g * s))``: (F) with time reversed and ``P`` transposed.

    Section 6 of docs/mathematics.md. Where ``hbar`` is zero, ``s`` is exactly zero.

    Parameters
    ----------
    kind, params, lam, gate
        As for `iterate`.
    hbar : (..., T, D) array
        Cotangent of ``h``.
    guess : (..., T, D) array or None
    method, chunk, rtol, atol, max_iter, damping
        As for `solve`.

    Returns
    -------
    Solved
        ``value`` is ``s``, which `rnn_cotangents` takes.

    Raises
    ------
    ValueError
        As for `solve`.

    Examples
    --------
    >>> half, q = np.full((2, 1), 0.5), (np.array([[0.5]]),)
    >>> solve_adjoint("fixed", q, half, None, np.ones((2, 1)), None, method="direct").value.ravel()
    array([2.22222222, 1.33333333])
    """
    how = _How(method, chunk, rtol, atol, max_iter, damping)
    return _each(_backward, how, kind, params, lam, gate, hbar, None, guess)


def rnn_cotangents(
    kind: Kind,
    params: Params,
    lam: Array,
    gate: Array | None,
    x: Array,
    initial: Array | None,
    h: Array,
    s: Array,
) -> tuple[Array, Array | None, Array, Array, Params]:
    """Cotangents of all inputs of (F), from the solution ``h`` and its adjoint ``s``.

    Section 6 of docs/mathematics.md. With ``m = Q x + P h``, ``e = g * s`` and ``d = x - h``:
    ``lam_bar_t = s_t * h_{t-1}``, or ``s_t * (h_{t-1} - m_t)`` where the gate is ``1 - lam``;
    ``gate_bar = s * m``; ``x_bar = Q^T e``; ``initial_bar = lam_1 * s_1``; and the mixer's is that of ``Q d``
    at the cotangent ``e``.

    Parameters
    ----------
    kind, params, lam, gate, x, initial
        As for `iterate`.
    h, s : (..., T, D) arrays
        What `solve` and `solve_adjoint` found.

    Returns
    -------
    lam_bar : array of the shape of ``lam``
    gate_bar : array of the shape of ``gate``, or None without one
    x_bar : array of the shape of ``x``
    initial_bar : array of the shape of ``initial``; (..., D) if there was none
    params_bar : tuple of arrays of the shapes of ``params``

    Examples
    --------
    >>> half, q, ones = np.full((2, 1), 0.5), (np.array([[0.5]]),), np.ones((2, 1))
    >>> h = solve("fixed", q, half, None, ones, None, None, method="direct").value
    >>> s = solve_adjoint("fixed", q, half, None, ones, None, method="direct").value
    >>> _, _, x_bar, _, _ = rnn_cotangents("fixed", q, half, None, ones, None, h, s)
    >>> x_bar.ravel()
    array([0.55555556, 0.33333333])
    """
    m, e = channel_mix(kind, params, x, h), _gate(lam, gate) * s
    before = preceding(h, initial)
    lam_bar = s * before if gate is not None else s * (before - m)
    gate_bar = sum_to(s * m, gate.shape) if gate is not None else None
    x_bar = mixers.apply_transpose(kind, params, e)
    initial_bar = preceding_cotangent(lam, s)
    if initial is not None:
        initial_bar = sum_to(initial_bar, initial.shape)
    params_bar = mixers.cotangent(kind, params, x - h, e)
    return sum_to(lam_bar, lam.shape), gate_bar, sum_to(x_bar, x.shape), initial_bar, params_bar


def rnn_pullback(
    kind: Kind,
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
    """The exact gradient of `solve`: `solve_adjoint`, and `rnn_cotangents` of what it found.

    Section 6 of docs/mathematics.md. A door of its own because other rooms do both in one pass over memory.

    Parameters
    ----------
    kind, params, lam, gate, x, initial
        As for `iterate`.
    h : (..., T, D) array
        What `solve` found.
    hbar : (..., T, D) array
        Cotangent of ``h``.
    guess : (..., T, D) array or None
    method, chunk, rtol, atol, max_iter, damping
        As for `solve_adjoint`.

    Returns
    -------
    solved : Solved
        As of `solve_adjoint`.
    cotangents : tuple
        As of `rnn_cotangents`.

    Examples
    --------
    >>> half, q, ones = np.full((2, 1), 0.5), (np.array([[0.5]]),), np.ones((2, 1))
    >>> h = solve("fixed", q, half, None, ones, None, None, method="direct").value
    >>> _, cotangents = rnn_pullback("fixed", q, half, None, ones, None, h, ones, None, method="direct")
    >>> cotangents[2].ravel()
    array([0.55555556, 0.33333333])
    """
    how = _How(method, chunk, rtol, atol, max_iter, damping)
    solved = _each(_backward, how, kind, params, lam, gate, hbar, None, guess)
    return solved, rnn_cotangents(kind, params, lam, gate, x, initial, h, solved.value)
