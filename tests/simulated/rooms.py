"""Arrays of the room under test, NumPy's in the simulator and CuPy's on a device, and comparisons with other rooms."""

import os
from typing import Any

import numpy as np
from strategies import Problem

from fpnumba.cpu import solve as cpu
from fpnumba.reference import solve as reference

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


def has_device() -> bool:
    """Whether CuPy sees a GPU."""
    try:
        import cupy

        return bool(cupy.cuda.runtime.getDeviceCount())
    except Exception:  # no CuPy, no driver, no GPU: CuPy has an exception for each
        return False


def given(a: Any) -> Any:
    """Arrays, tuples of them and problems, as the room takes them."""
    if SIMULATED:
        return a
    import cupy

    if isinstance(a, Problem):
        return a._map(cupy.asarray)
    if type(a) is tuple:
        return tuple(given(one) for one in a)
    return cupy.asarray(a) if isinstance(a, np.ndarray) else a


def host(a: Any) -> Any:
    """Back again; `Solved` too."""
    if isinstance(a, tuple):
        parts = [host(one) for one in a]
        return type(a)(*parts) if hasattr(a, "_fields") else tuple(parts)
    return a.get() if hasattr(a, "get") else a


def close(ours: Any, theirs: Any, tolerance: float = 1e-12) -> None:
    """Equal relative to the largest element, in shape and dtype too; None is None."""
    if theirs is None:
        assert ours is None
    elif isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            close(one, other, tolerance)
    else:
        ours = host(ours)
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        scale = max(1.0, float(np.abs(theirs).max(initial=0)))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)


def ours(p: Problem, adjoint: bool, chunk: int, guess: Any = None, **options: Any) -> Any:
    """The readable room's solve, on the host."""
    from fpnumba.gpu import portable

    options = {"rtol": 1e-6, "atol": 0.0, "max_iter": 500, "damping": 1.0} | options
    q = given(p)
    source, initial = (q.hbar, None) if adjoint else (q.x, q.initial)
    return host(
        portable.solve(*q.system, source, initial, given(guess), adjoint=adjoint, chunk=chunk, **options)
    )


def ours_direct(p: Problem, adjoint: bool) -> Any:
    from fpnumba.gpu import portable

    q = given(p)
    source, initial = (q.hbar, None) if adjoint else (q.x, q.initial)
    return host(portable.solve_direct(*q.system, source, initial, adjoint=adjoint))


def theirs(p: Problem, adjoint: bool, chunk: int | None = None, guess: Any = None, **options: Any) -> Any:
    """The reference's: in chunks, or without a chunk the direct way."""
    options |= {"method": "direct"} if chunk is None else {"method": "chunked", "chunk": chunk}
    options = {"rtol": 1e-6, "max_iter": 500} | options
    if adjoint:
        return reference.solve_adjoint(*p.system, p.hbar, guess, **options)
    return reference.solve(*p.system, p.x, p.initial, guess, **options)


def of_cpu(p: Problem, adjoint: bool, **options: Any) -> Any:
    """The CPU room's, step after step."""
    options = {"rtol": 1e-6, "max_iter": 500, "method": "sequential"} | options
    if adjoint:
        return cpu.solve_adjoint(*p.system, p.hbar, None, **options)
    return cpu.solve(*p.system, p.x, p.initial, None, **options)
