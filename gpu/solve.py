"""The fixed point of (F) and its adjoint on the device: which kernels serve which call.

Sections 3, 6 and 7 of docs/mathematics.md. Low-rank mixers by the direct way or in chunks of one step go
through `fpnumba.gpu._steps`; their other ways, Kronecker and Monarch through `fpnumba.gpu._relax`; Dense and
Fixed through matrix products, `fpnumba.gpu._dense`; a user's own mixer, whatever has no tuned kernel, and
everything where the engine ``"numba"`` is asked for by name, through `fpnumba.gpu.portable`. The doors are those
of `fpnumba.cpu.solve`, on CuPy arrays in their storage dtype; nothing in them waits for the device.
"""

from typing import Any

from fpnumba.gpu import _steps
from fpnumba.gpu._engine import tuned
from fpnumba.gpu._report import CONVERGED, DIVERGED, ILL_CONDITIONED, MAX_ITER, NONFINITE_INPUT, Solved

__all__ = [
    "CONVERGED",
    "DIVERGED",
    "ILL_CONDITIONED",
    "MAX_ITER",
    "NONFINITE_INPUT",
    "Solved",
    "iterate",
    "iterate_adjoint",
    "rnn_cotangents",
    "rnn_pullback",
    "solve",
    "solve_adjoint",
]

Array = Any
Params = tuple[Array, ...]


def is_low_rank(kind: Any) -> bool:
    """Whether ``P`` has the form ``U^T S U``."""
    return isinstance(kind, str) and kind in ("dplr", "householder")


def _family(kind: Any, engine: str | None) -> Any:
    """The module whose general functions serve this kind."""
    if not tuned(kind, engine):
        from fpnumba.gpu import portable

        return portable
    if kind in ("dense", "fixed"):
        from fpnumba.gpu import _dense

        return _dense
    from fpnumba.gpu import _relax

    return _relax


def _chunk(
    kind: Any, params: Params, like: Array, method: str, chunk: int | None, max_iter: int, engine: str | None
) -> int:
    """Steps of a chunk."""
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
        if chunk is not None:
            return chunk
        if is_low_rank(kind):
            return 1
        return int(_family(kind, engine).default_chunk(kind, params, dim, like.dtype))
    if method == "sequential":
        return 1
    if method in ("parallel", "direct"):
        return max(int(steps), 1)
    raise ValueError(f"method: {method!r}; expected 'parallel', 'chunked', 'sequential' or 'direct'")


def _in_steps(
    kind: Any, params: Params, guess: Array | None, method: str, size: int, damping: float, engine: str | None
) -> bool:
    """Whether the kernels that walk step after step serve this solve."""
    if not is_low_rank(kind) or not tuned(kind, engine) or params[0].shape[2] > _steps.MOST_RANK:
        return False
    return method == "direct" or (size == 1 and guess is None and damping == 1)


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
    engine: str | None,
) -> Solved:
    size = _chunk(kind, params, source, method, chunk, max_iter, engine)
    direct = method == "direct"
    if _in_steps(kind, params, guess, method, size, damping, engine):
        return _steps.solve(
            *(kind, params, lam, gate, source, initial),
            adjoint=adjoint,
            direct=direct,
            chunks=-(-source.shape[1] // size),
            rtol=rtol,
            atol=atol,
            max_iter=max_iter,
        )
    if direct:
        from fpnumba.gpu import portable

        return portable.solve_direct(kind, params, lam, gate, source, initial, adjoint=adjoint)
    return _family(kind, engine).solve(  # type: ignore[no-any-return]
        *(kind, params, lam, gate, source, initial, guess),
        adjoint=adjoint,
        chunk=size,
        rtol=rtol,
        atol=atol,
        max_iter=max_iter,
        damping=damping,
    )


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
    engine: str | None = None,
) -> Solved:
    """The fixed point of (F), ``h_t = lam_t * h_{t-1} + g_t * (Q_t x_t + (I - Q_t) h_t)``.

    Section 3 of docs/mathematics.md; stopping by section 7.

    Parameters
    ----------
    kind, params
        The mixer, see `fpnumba.gpu.mixers`.
    lam, gate, x, initial, guess, method, chunk, rtol, atol, max_iter, damping
        As of `fpnumba.cpu.solve.solve`, with CuPy arrays.
    engine : {"raw", "numba"}, optional
        The kernels by name; by default those of `fpnumba.gpu.engine`.

    Returns
    -------
    Solved
        On the device.

    Raises
    ------
    ValueError
        As of `fpnumba.cpu.solve.solve`.
    """
    return _solve(
        *(kind, params, lam, gate, x, initial, guess, False),
        *(method, chunk, rtol, atol, max_iter, damping, engine),
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
    engine: str | None = None,
) -> Solved:
    """The adjoint fixed point, ``s = S^T (hbar + P^T (g * s))``: (F) with time reversed and ``P`` transposed.

    Section 6 of docs/mathematics.md.

    Parameters
    ----------
    kind, params, lam, gate, hbar, guess, method, chunk, rtol, atol, max_iter, damping
        As of `fpnumba.cpu.solve.solve_adjoint`.
    engine : {"raw", "numba"}, optional

    Returns
    -------
    Solved
    """
    return _solve(
        *(kind, params, lam, gate, hbar, None, guess, True),
        *(method, chunk, rtol, atol, max_iter, damping, engine),
    )


def iterate(
    kind: Any,
    params: Params,
    lam: Array,
    gate: Array | None,
    x: Array,
    initial: Array | None,
    h: Array,
    *,
    engine: str | None = None,
) -> Array:
    """One parallel iteration of (F): mix all steps from `h` and scan over time.

    (F) of section 3 of docs/mathematics.md.

    Parameters
    ----------
    kind, params, lam, gate, x, initial, h
        As of `fpnumba.cpu.solve.iterate`.
    engine : {"raw", "numba"}, optional

    Returns
    -------
    (B, T, D) array
    """
    return _family(kind, engine).iterate(kind, params, lam, gate, x, initial, h, adjoint=False)


def iterate_adjoint(
    kind: Any,
    params: Params,
    lam: Array,
    gate: Array | None,
    hbar: Array,
    s: Array,
    *,
    engine: str | None = None,
) -> Array:
    """One iteration of the adjoint, ``S^T (hbar + P^T (g * s))``.

    Section 6 of docs/mathematics.md.

    Parameters
    ----------
    kind, params, lam, gate, hbar, s
        As of `fpnumba.cpu.solve.iterate_adjoint`.
    engine : {"raw", "numba"}, optional

    Returns
    -------
    (B, T, D) array
    """
    return _family(kind, engine).iterate(kind, params, lam, gate, hbar, None, s, adjoint=True)


def rnn_cotangents(
    kind: Any,
    params: Params,
    lam: Array,
    gate: Array | None,
    x: Array,
    initial: Array | None,
    h: Array,
    s: Array,
    *,
    engine: str | None = None,
) -> tuple[Array, Array | None, Array, Array, Params]:
    """Cotangents of all inputs of (F) from the solution `h` and its adjoint `s`, in one pass over memory.

    Section 6 of docs/mathematics.md.

    Parameters
    ----------
    kind, params, lam, gate, x, initial, h, s
        As of `fpnumba.cpu.solve.rnn_cotangents`.
    engine : {"raw", "numba"}, optional

    Returns
    -------
    lam_bar, gate_bar, x_bar, initial_bar, params_bar
        As of `fpnumba.cpu.solve.rnn_cotangents`.
    """
    if is_low_rank(kind) and tuned(kind, engine) and params[0].shape[2] <= _steps.MOST_RANK:
        return _steps.pull(kind, params, lam, gate, x, initial, h, s, given=True)[1]
    return _family(kind, engine).pull(kind, params, lam, gate, x, initial, h, s)  # type: ignore[no-any-return]


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
    engine: str | None = None,
) -> tuple[Solved, tuple[Array, Array | None, Array, Array, Params]]:
    """`solve_adjoint` and `rnn_cotangents` in one: the exact gradient of `solve`.

    Section 6 of docs/mathematics.md. For low-rank mixers, by the direct way or in chunks of one step, both happen
    in one pass over memory.

    Parameters
    ----------
    kind, params, lam, gate, x, initial, h, hbar, guess, method, chunk, rtol, atol, max_iter, damping
        As of `fpnumba.cpu.solve.rnn_pullback`.
    engine : {"raw", "numba"}, optional

    Returns
    -------
    solved : Solved
    cotangents : tuple
    """
    size = _chunk(kind, params, x, method, chunk, max_iter, engine)
    if _in_steps(kind, params, guess, method, size, damping, engine):
        solved, cotangents = _steps.pull(
            *(kind, params, lam, gate, x, initial, h, hbar),
            given=False,
            direct=method == "direct",
            chunks=-(-x.shape[1] // size),
            rtol=rtol,
            atol=atol,
            max_iter=max_iter,
        )
        assert solved is not None
        return solved, cotangents
    solved = _solve(
        *(kind, params, lam, gate, hbar, None, guess, True),
        *(method, chunk, rtol, atol, max_iter, damping, engine),
    )
    return solved, rnn_cotangents(kind, params, lam, gate, x, initial, h, solved.value, engine=engine)
