"""What kernels say of a solve, and how it becomes the room's result: without asking the host."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fpnumba.gpu import _device, _shapes

CONVERGED, MAX_ITER, DIVERGED, NONFINITE_INPUT, ILL_CONDITIONED = range(5)

Array = Any
# Most arrays whose inputs a report looks through.
FIELDS = 8


class Solved(NamedTuple):
    """What a solve returns; everything lies on the device, and may not have been computed yet.

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
    iterations: Array
    residual: Array
    status: Array
    chunk_iterations: Array


class Report(NamedTuple):
    """Kernels write here: iterations of each sequence and chunk; the rest for each sequence and part of it."""

    counts: Array  # (B, chunks) int32
    change: Array  # (B, parts) float64, the largest last change of any chunk
    scale: Array  # (B, parts) float64, the largest value
    rcond: Array  # (B, parts) float64
    state: Array  # (B, parts) int32, a status


def blank(batch: int, chunks: int, parts: int = 1, *, written: bool = False) -> Report:
    """A report to be filled in. `written` says that kernels write every entry that is looked at; otherwise it
    begins as that of a solve that had nothing to do.
    """
    xp = _device.xp()
    shape = (batch, parts)
    if written:
        wanted = ((batch, chunks), np.int32), *[(shape, np.float64)] * 3, (shape, np.int32)
        return Report(*_device.several(*wanted))
    return Report(
        xp.zeros((batch, chunks), np.int32),
        xp.zeros(shape, np.float64),
        xp.zeros(shape, np.float64),
        xp.ones(shape, np.float64),
        xp.zeros(shape, np.int32),
    )


def store(dtype: Any) -> str:
    """How the kernels call a storage dtype, or the name of one."""
    return _device.STORES[dtype if isinstance(dtype, str) else _shapes.name(dtype)]


@cache
def _kernel(name: str) -> _device.Kernel:
    return _device.Kernel.of("report.cu", "report", {"STORE": name})


@cache
def _limits(dtype: Any) -> tuple[np.float64, np.float64]:
    limits = np.finfo(dtype)
    return np.float64(limits.eps), np.float64(limits.tiny)


def summary(
    value: Array, report: Report, direct: bool, fields: tuple[Array, ...], shared: tuple[Array, ...] = ()
) -> Solved:
    """The room's result from a report. `fields` have one entry per sequence, `shared` are for all of them.

    A sequence that diverged, or has an ill-conditioned step, is looked through for inputs that are not finite.
    """
    batch, chunks = report.counts.shape
    eps, tiny = _limits(_shapes.real(value.dtype))
    each = (batch,)
    told = _device.several((each, np.int64), (each, np.float64), (each, np.int8), ((batch, chunks), np.int64))
    solved = Solved(value, *told)
    table: list[Any] = []
    for array, every in (*((a, False) for a in fields), *((a, True) for a in shared)):
        count = array.size if every else array.size // max(batch, 1)
        table += [array, np.int64(-count if every else count)]
    table += [None, np.int64(0)] * (FIELDS - len(table) // 2)
    arguments = (
        *(report.counts, np.int64(chunks), report.change, report.scale, report.rcond, report.state),
        *(
            np.int32(report.change.shape[1]),
            np.int32(direct),
            eps,
            tiny,
        ),
        *(solved.iterations, solved.residual, solved.status, solved.chunk_iterations),
        *table,
    )
    _device.launch(_kernel(store(value.dtype)), batch, 256, arguments, shared=16)
    return solved


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    return [_kernel(name) for name in _device.STORES.values()]
