"""The iteration in hand: what every policy of `fpnumba.solve.Solver` does; section 7 of docs/mathematics.md.

A room iterates fastest on its own. When the whole batch has a say in when to stop, when step sizes change, or
when iterates are extrapolated, the loop is this one, over any function that makes one iteration.

Iterates stay where they are, on the CPU or on a GPU. What is decided is decided on the host, from a few numbers for
each sequence: on a GPU, every iteration waits for them.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.arrays import Float, namespace, to_numpy
from fpnumba.outcome import Solved, Status
from fpnumba.solve import Solver

# The published optimiser gives up on a batch once every step size is below this.
SMALLEST_DAMPING = 1e-3


def relax(
    step: Callable[[Float], Float], start: Float, solver: Solver, finite_inputs: Callable[[int], bool]
) -> tuple[Solved, NDArray[np.float64]]:
    """Iterate ``h <- (1 - d) h + d step(h)`` over a whole batch, under every policy of `Solver`.

    Parameters
    ----------
    step : callable
        One iteration of all sequences, which must not depend on each other: (B, T, D) to (B, T, D). On a device it
        may have an ``advance(h, pace, published)``, which makes an iteration and what `fpnumba.gpu.maps.advance` does
        with it in one, or returns None.
    start : array (B, T, D)
        Of NumPy or of CuPy, in the dtype of the computation.
    solver : Solver
        Its method, chunk and `on_failure` are not looked at.
    finite_inputs : callable
        Whether the inputs of sequence ``b`` are finite; asked only about a sequence that turned non-finite.

    Returns
    -------
    Solved
        On the host, but for its value.
    history : ndarray (iterations, B)
        Residuals.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba.relax import relax
    >>> from fpnumba.solve import Solver
    >>> solved, history = relax(lambda h: 0.5 * h + 1, np.zeros((1, 1, 1)), Solver(rtol=1e-3), lambda b: True)
    >>> solved.iterations, history.shape
    (array([10]), (10, 1))
    """
    published = solver.criterion == "published"
    xp = namespace(start)
    h, count = start, start.shape[0]
    damping = np.full(count, float(solver.damping))
    patience = np.full(count, solver.damping_patience)
    lowest, residual = np.full(count, np.inf), np.zeros(count)
    met, alive = np.zeros(count, bool), np.ones(count, bool)
    iterations = np.zeros(count, np.int64)
    history: list[NDArray[np.float64]] = []
    accelerate = _Anderson(h, solver.memory) if solver.acceleration else None
    fused = _kernels(h) if accelerate is None else None
    again = None if fused is None else fused.rehearsed()
    if again is not None:
        return _repeated(fused, step, start, solver, again)
    paces = None
    # What has met the tolerance rests, so that no sequence is moved by the length of another's iteration. The
    # published rule moves the batch together.
    moving = alive.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        while moving.any() and len(history) < solver.max_iter:
            if fused is not None:
                wanted = np.where(moving, damping, -1.0).astype(h.dtype)
                if paces is None or not np.array_equal(wanted, paces):
                    paces, pace = wanted, xp.asarray(wanted)
                h, told = _advanced(fused, step, h, pace, published)
                current, now_met = _judged(to_numpy(told).T, h, solver)
            else:
                new = step(h)
                change = new - h
                proposal = h + _column(damping.astype(h.dtype), xp) * change
                current, now_met = _judged(_measured(proposal, new, change, solver), h, solver)
            iterations[moving] += 1
            residual = np.where(moving, current, residual)
            history.append(residual.copy())
            alive = alive & np.isfinite(residual)
            better = residual < lowest
            if accelerate is not None:
                harmful = ~(residual <= _Anderson.TOLERATED * lowest)
                proposal = accelerate(h, change, proposal, damping, forget=harmful | ~alive, rest=now_met)
            if fused is None:
                h = xp.where(_column(moving, xp), proposal, h)
            lowest = np.where(better, residual, lowest)
            patience = np.where(better, solver.damping_patience, patience - 1)
            tired = patience == 0
            patience = np.where(tired, solver.damping_patience, patience)
            damping = np.where(tired & moving, damping * solver.damping_decay, damping)
            if published:
                met = alive & (lowest < solver.rtol)
                moving = np.full(count, not _batch_done(lowest, damping, alive, solver))
            else:
                met = met | (now_met & moving)
                enough = math.ceil((solver.quantile or 1.0) * int(alive.sum()) - 1e-9)
                moving = alive & ~met & (int((met & alive).sum()) < enough)
    if fused is not None:
        fused.took(len(history))
    status = np.where(met, Status.CONVERGED, Status.MAX_ITER).astype(np.int8)
    for b in np.flatnonzero(~alive):
        status[b] = Status.DIVERGED if finite_inputs(int(b)) else Status.NONFINITE_INPUT
    trace = np.array(history).reshape(len(history), count)
    return Solved(h, iterations, residual, status, iterations[:, None].copy()), trace


def decided(like: Any, look: Callable[[], bool]) -> bool:
    """What a look at results says; in a recording, what it said when the same ran for real."""
    kernels = _kernels(like)
    again = None if kernels is None else kernels.rehearsed()
    if again is not None:
        return bool(again)
    found = look()
    if kernels is not None:
        kernels.took(int(found))
    return found


def _repeated(
    kernels: Any, step: Any, start: Any, solver: Solver, count: int
) -> tuple[Solved, NDArray[np.float64]]:
    """As many iterations as a run before took, with nothing looked at, and whether that was enough.

    That can be recorded, `fpnumba.gpu.capture`.
    """
    xp, h, published = namespace(start), start, solver.criterion == "published"
    pace, lowest, told = xp.full(len(h), solver.damping, h.dtype), None, xp.zeros((len(h), 2), h.dtype)
    for _ in range(count):
        h, told = _advanced(kernels, step, h, pace, published)
        lowest = told[:, 0] if lowest is None else xp.minimum(lowest, told[:, 0])
    residual, met = _judged(told.T, h, solver)
    if published and lowest is not None:
        met = lowest < solver.rtol
    status = xp.where(met, int(Status.CONVERGED), int(Status.MAX_ITER))
    status = xp.where(xp.isfinite(told[:, 0]), status, int(Status.DIVERGED)).astype(np.int8)
    iterations = xp.full(len(h), count, np.int64)
    solved = Solved(h, iterations, residual, status, iterations[:, None].copy())
    return solved, np.zeros((0, len(h)))


def _kernels(h: Any) -> Any:
    """What does an iteration's arithmetic in one pass: `fpnumba.gpu.maps` on a device, nothing elsewhere."""
    if isinstance(h, np.ndarray) or h.dtype not in (np.float32, np.float64):
        return None
    from fpnumba.gpu import maps

    return maps


def _advanced(kernels: Any, step: Any, h: Any, pace: Any, published: bool) -> tuple[Any, Any]:
    """A damped step of the iteration, and how far it went."""
    found = step.advance(h, pace, published) if hasattr(step, "advance") else None
    if found is None:
        found = kernels.advance(h, namespace(h).ascontiguousarray(step(h)), pace, published)
    return found  # type: ignore[no-any-return]


def _measured(h: Float, new: Float, change: Float, solver: Solver) -> NDArray[Any]:
    """How far each sequence went: by the published rule relative to its size, otherwise that, and its size."""
    if solver.criterion == "published":
        by_step = largest(change, -1) / (largest(new, -1) + 1e-8)
        return to_numpy(largest(by_step, -1))[None]
    # One look at the device for both
    return to_numpy(namespace(h).stack((largest(change, (-2, -1)), largest(h, (-2, -1)))))


def _judged(
    measures: NDArray[Any], h: Float, solver: Solver
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Residual of each sequence, and whether it meets the tolerance; section 7. Where the measures lie."""
    xp = namespace(measures)
    moved, size = measures[0].astype(np.float64), measures[-1].astype(np.float64)
    if solver.criterion == "published":
        return moved, moved < solver.rtol
    floor = 4 * float(np.finfo(h.dtype).eps) * size
    met = moved <= xp.maximum(solver.atol + solver.rtol * size, floor)
    return moved / xp.maximum(size, float(np.finfo(h.dtype).tiny)), met


def _batch_done(
    lowest: NDArray[np.float64], damping: NDArray[np.float64], alive: NDArray[np.bool_], solver: Solver
) -> bool:
    """The published rule for a batch; sequences that are not finite have no say."""
    if not alive.any():
        return True
    level = float(np.quantile(lowest[alive], solver.quantile if solver.quantile is not None else 1.0))
    return level < solver.rtol or float(damping[alive].max()) < SMALLEST_DAMPING


def largest(values: Float, axis: int | tuple[int, ...]) -> Float:
    """Largest magnitude along some axes, zero where they are empty; a NaN is larger than anything."""
    xp = namespace(values)
    if values.size == 0:  # CuPy's max has no initial value
        axes = {a % values.ndim for a in ((axis,) if isinstance(axis, int) else axis)}
        return xp.zeros([n for a, n in enumerate(values.shape) if a not in axes], values.dtype)  # type: ignore[no-any-return]
    return xp.abs(values).max(axis=axis)  # type: ignore[no-any-return]


def _column(values: NDArray[Any], xp: Any) -> Float:
    """One number for each sequence, from the host to where the sequences are."""
    return xp.asarray(values)[:, None, None]  # type: ignore[no-any-return]


class _Anderson:
    """Anderson acceleration (type II) of each sequence on its own.

    From the last changes ``g`` of the iterate, the combination of them that would have been smallest: ``h + d
    g - (dH + d dG)^T gamma`` with ``gamma = argmin |g - dG^T gamma|``, by regularised normal equations.
    """

    # A residual this much above the lowest so far says that the past misleads: it is forgotten.
    TOLERATED = 10.0

    def __init__(self, h: Float, memory: int) -> None:
        count, size = h.shape[0], math.prod(h.shape[1:])
        xp = namespace(h)
        self._dh = xp.zeros((count, memory, size), h.dtype)
        self._dg = xp.zeros((count, memory, size), h.dtype)
        self._last: tuple[Float, Float] | None = None
        self._slot = 0

    def __call__(
        self,
        h: Float,
        g: Float,
        plain: Float,
        damping: NDArray[np.float64],
        *,
        forget: NDArray[np.bool_],
        rest: NDArray[np.bool_],
    ) -> Float:
        """The next iterate; `plain`, the damped step, for a sequence with nothing to go by or one at rest."""
        xp = namespace(h)
        flat_h, flat_g = h.reshape(self._dh.shape[::2]), g.reshape(self._dg.shape[::2])
        if self._last is not None:
            self._dh[:, self._slot] = flat_h - self._last[0]
            self._dg[:, self._slot] = flat_g - self._last[1]
            self._slot = (self._slot + 1) % self._dh.shape[1]
        if forget.any():
            zero, which = h.dtype.type(0), _column(forget, xp)
            self._dh, self._dg = xp.where(which, zero, self._dh), xp.where(which, zero, self._dg)
        self._last = flat_h, flat_g
        # The small systems are solved on the host
        gram = to_numpy(xp.matmul(self._dg, self._dg.swapaxes(-1, -2))).astype(np.float64)
        against = to_numpy(xp.matmul(self._dg, flat_g[..., None])).astype(np.float64)
        usable = (
            ~forget & ~rest & np.isfinite(gram).all(axis=(-1, -2)) & np.isfinite(against).all(axis=(-1, -2))
        )
        trace = np.trace(gram, axis1=-2, axis2=-1)
        usable &= trace > 0
        eye = np.eye(gram.shape[-1])
        ridge = 10 * float(np.finfo(h.dtype).eps) * np.where(usable, trace, 1.0)
        gram = np.where(usable[:, None, None], gram + ridge[:, None, None] * eye, eye)
        gamma = np.linalg.solve(gram, np.where(usable[:, None, None], against, 0.0)).astype(h.dtype)
        correction = self._dh + _column(damping.astype(h.dtype), xp) * self._dg
        accelerated = plain - xp.matmul(xp.asarray(gamma).swapaxes(-1, -2), correction).reshape(h.shape)
        usable &= to_numpy(xp.isfinite(accelerated).all(axis=(-1, -2)))
        return xp.where(_column(usable, xp), accelerated, plain)  # type: ignore[no-any-return]
