"""The ways to the fixed point of :class:`fpnumba.nn.recurrence.Cell`, and back from it: section 4 and 6.

* **sequential**: the mixer of a step is final once the step before is, and what remains is linear and one
  step long.
* **parallel**: every iteration makes all mixers from the previous iterate and scans over all time (the
  published way).
* **chunked**: the same, chunk after chunk.

The exact gradient goes backward in time, whatever the way forward: the adjoint of one linear step, then the
dependence of the mixer on ``h_{t-1}``. The one-step gradient and the Neumann series use the adjoint of one
application of the whole map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.arrays import namespace
from fpnumba.nn import backend, mixing
from fpnumba.nn.backend import contiguous, product
from fpnumba.nn.basic import rows
from fpnumba.nn.mixer_maps import MixerMap
from fpnumba.nn.mixing import Mixer
from fpnumba.nn.recurrence import B, Bars, Cell, Recurrence, Solve
from fpnumba.relax import decided, relax
from fpnumba.solve import FEW_ITERATIONS, Adjoint, Solution, Solved, Solver, Status

Array = NDArray[Any]


def way(solver: Solver, map: MixerMap) -> str:
    """``parallel``, ``chunked`` or ``sequential`` for a mixer that sees the hidden state.

    ``auto`` is ``sequential`` unless a chunk, a policy of the whole iteration, or fewer than 64 iterations
    are asked for, and see :func:`tried`; ``direct`` is ``sequential`` where the linear step can be solved directly.
    """
    if solver.method == "direct" and map.kind not in ("householder", "dplr"):
        raise ValueError(
            f"argument `solver`: method 'direct' needs a householder or dplr mixer, not {map.kind}"
        )
    if solver.method == "direct":
        return "sequential"
    if solver.method == "auto":
        chosen = solver.way(rank=None)
        return "sequential" if chosen == "chunked" and solver.chunk is None else chosen
    return solver.method


def solve_linear(mixer: Mixer, cell: Cell, solver: Solver, method: str) -> Solved:
    """(F) for a mixer that is given: by the room, or by :func:`fpnumba.relax.relax` for a product of
    mixers."""
    kind, params = mixer
    if kind == "mixture":
        here = replace(cell, fixed=mixer)
        plain = replace(solver, method="parallel", chunk=None)
        return relax(here.iterate, np.zeros_like(cell.v), plain, here.finite)[0]
    solved: Solved = backend.room(cell.v).solve.solve(
        kind,
        params,
        cell.lam,
        None,
        cell.v,
        cell.initial,
        None,
        method=method,
        chunk=solver.chunk,
        rtol=solver.rtol,
        atol=solver.atol,
        max_iter=solver.max_iter,
        damping=solver.damping,
    )
    return solved


def solve_linear_adjoint(
    mixer: Mixer, lam: Array, hbar: Array, adjoint: Adjoint, solver: Solver, method: str
) -> Solved:
    """``s = S^T (hbar + P^T (g * s))``, section 6."""
    kind, params = mixer
    if kind == "mixture":
        gate, after = 1 - lam, backend.joined([lam[:, 1:], np.zeros_like(lam[:, :1])], axis=1)

        def iterate(s: Array) -> Array:
            e = gate * s
            z = hbar + e - mixing.apply_transpose(mixer, e)
            new: Array = backend.room(z).scan.linear_scan(after, z, None, True)
            return new

        plain = Solver(
            "parallel",
            rtol=adjoint.rtol,
            atol=adjoint.atol,
            max_iter=adjoint.max_iter,
            damping=solver.damping,
        )
        return relax(iterate, np.zeros_like(hbar), plain, lambda b: bool(np.isfinite(hbar[b]).all()))[0]
    solved: Solved = backend.room(hbar).solve.solve_adjoint(
        kind,
        params,
        lam,
        None,
        hbar,
        None,
        method=method,
        chunk=solver.chunk,
        rtol=adjoint.rtol,
        atol=adjoint.atol,
        max_iter=adjoint.max_iter,
        damping=solver.damping,
    )
    return solved


def _solution(
    value: Array, method: str, told: dict[str, Any], history: NDArray[np.float64] | None = None
) -> Solution:
    """What is said of a solve; what lies on a device is fetched when it is looked at."""
    if namespace(value) is not np:
        told = backend.room(value).for_the_host(**{name: (a, a.shape) for name, a in told.items()})
    return Solution(value=value, method=method, history=history, **told)


def _reported(solved: Solved, way: str) -> Solution:
    names = ("status", "iterations", "residual", "chunk_iterations")
    return _solution(solved.value, way, {name: getattr(solved, name) for name in names})


class Verdict:
    """Iterations, residual and status of a solve that goes chunk by chunk."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._parts: list[tuple[Any, Any, Any]] = []

    def add(self, solved: Solved) -> None:
        """The next chunk; the first failure of a sequence stays its status."""
        self._parts.append((solved.iterations, solved.residual, solved.status))

    def add_status(self, status: Array) -> None:
        """The next chunk, of a solve that does not iterate."""
        xp = namespace(status)
        self._parts.append((xp.ones(self._batch, np.int64), xp.zeros(self._batch), status))

    def solution(self, value: Array, method: str, history: NDArray[np.float64] | None = None) -> Solution:
        """All of them together."""
        batch = self._batch
        if not self._parts:
            none, zero = np.zeros((batch, 0), np.int64), np.zeros(batch)
            status, counts = zero.astype(np.int8), zero.astype(np.int64)
            return Solution(value, status, counts, zero, method, none, history=history)
        xp = namespace(self._parts[0][2])
        counts, residuals, statuses = (
            backend.joined([a[..., None] for a in part], axis=-1) for part in zip(*self._parts, strict=True)
        )
        first = (statuses != int(Status.CONVERGED)).argmax(-1)
        told: dict[str, Any] = {
            "status": xp.take_along_axis(statuses, first[:, None], -1)[:, 0].astype(np.int8),
            "iterations": counts.max(-1),
            "residual": residuals.max(-1),
            "chunk_iterations": counts,
        }
        return _solution(value, method, told, history)


def settles(solver: Solver) -> bool:
    """Whether a solve is for the fixed point, rather than for what a policy of the whole iteration arrives at."""
    return solver.criterion == "max" and solver.quantile is None and solver.max_iter >= FEW_ITERATIONS


def _settled(
    cell: Recurrence[Any], step: Any, solved: Solved, history: NDArray[np.float64], solver: Solver
) -> tuple[Solved, NDArray[np.float64]]:
    """Go on until every step is at the fixed point that it reaches by itself, its past being what it is.

    Where there are several, an iteration of all steps may leave some of them at another one, because it passes them
    while their past still changes. Every round makes at least one more step final.
    """
    for _ in range(cell.v.shape[1]):
        start = cell.settle(solved.value, solved.status == Status.CONVERGED, solver)
        if start is None:
            break
        again, more = relax(step, start, solver, cell.finite)
        count = solved.iterations + again.iterations
        solved = Solved(again.value, count, again.residual, again.status, count[:, None].copy())
        history = np.concatenate([history, more])
    return solved, history


class _Steps:
    """Iterations of a recurrence, of which the last iterate is known; the first is from zero."""

    def __init__(self, cell: Recurrence[Any]) -> None:
        self._cell, self.last, self._first = cell, cell.v, True

    def __call__(self, h: Array) -> Array:
        """One application of the whole map."""
        self.last, self._first = h, False
        return self._cell.iterate(h)

    def advance(self, h: Array, pace: Array, published: bool) -> tuple[Array, Array] | None:
        """As of :class:`fpnumba.nn.matrix_state.MatrixCell`; None where the recurrence has none."""
        found = self._cell.advance(h, pace, published, first=self._first)
        if found is not None:
            self.last, self._first = h, False
        return found


def solve_parallel(cell: Recurrence[Any], solver: Solver, *, further: int) -> Solve:
    """All steps at once, then ``further`` applications that are differentiated (the published code makes
    one)."""
    step = _Steps(cell)
    solved, history = relax(step, np.zeros_like(cell.v), solver, cell.finite)
    return _chained(cell, step, solved, history, solver, further=further)


def _chained(
    cell: Recurrence[Any],
    step: _Steps,
    solved: Solved,
    history: NDArray[np.float64],
    solver: Solver,
    *,
    further: int,
) -> Solve:
    """Every step at its own fixed point, and the applications that are differentiated."""
    if settles(solver):
        solved, history = _settled(cell, step, solved, history, solver)
    verdict = Verdict(len(cell.v))
    verdict.add(solved)
    chain, h = [step.last], solved.value
    if further:
        chain = []
        for _ in range(further):
            chain.append(h)
            h = cell.iterate(h)
    return Solve(h, verdict.solution(h, "parallel", history), chain)


def solve_chunked(cell: Recurrence[Any], solver: Solver) -> Solve:
    """Chunk after chunk, each iterated until it has converged."""
    steps, size = cell.v.shape[1], solver.chunk or 64
    tolerance = cell.share() if steps > size else 1.0
    plain = replace(
        solver, method="parallel", chunk=None, rtol=solver.rtol * tolerance, atol=solver.atol * tolerance
    )
    h, verdict, carry = np.empty_like(cell.v), Verdict(len(cell.v)), cell.initial
    for start in range(0, steps, size):
        here = cell.part(slice(start, start + size), carry)
        step = _Steps(here)
        solved, history = relax(step, np.zeros_like(here.v), plain, here.finite)
        if settles(solver):
            solved, _ = _settled(here, step, solved, history, plain)
        h[:, start : start + size], carry = solved.value, here.carry(solved.value)
        verdict.add(solved)
    return Solve(h, verdict.solution(h, "chunked"))


def solve_sequential(cell: Cell, solver: Solver, *, keep: bool) -> Solve:
    """Step after step: make the mixer from ``h_{t-1}``, then solve the linear step."""
    batch, steps, _ = cell.v.shape
    direct = cell.map.kind in ("householder", "dplr")
    method, tolerance = "direct" if direct else "sequential", cell.share()
    tight = replace(
        solver, method="auto", chunk=None, rtol=solver.rtol * tolerance, atol=solver.atol * tolerance
    )
    h, verdict, before, made_steps = np.empty_like(cell.v), Verdict(batch), cell.initial, []
    for t in range(steps):
        here = cell.part(slice(t, t + 1), before)
        made = here.mix(here.v)
        solved = solve_linear(made.mixer, here, tight, method)
        h[:, t] = before = contiguous(solved.value[:, 0])
        verdict.add(solved)
        if keep:
            made_steps.append(made)
    return Solve(h, verdict.solution(h, "sequential"), steps=made_steps)


def solve_given(cell: Cell, solver: Solver, way: str) -> Solve:
    """All of (F) by the room, for mixers that do not see the hidden state."""
    made = cell.mix(cell.v)
    solved = solve_linear(made.mixer, cell, solver, way)
    return Solve(solved.value, _reported(solved, way))


# What a step costs that is solved when the one before is, an iteration of all steps, and looking whether every step is
# at its own fixed point: seconds, and seconds for every row (b, t) of 1024 channels. Measured on an H200, launch by
# launch. On a CPU two cores go through all steps in the time of four to eight iterations, and nothing is tried.
STEP, ROW_OF_STEP = 30e-6, 105e-9
ITERATION, ROW_OF_ITERATION = 0.6e-3, 23e-9
LOOK, ROW_OF_LOOK = 3e-3, 200e-9
# Iterations of all steps after which is judged how many it will take; they are risked where so many times as many would
# still be cheaper. And after how many more it is judged again.
PROBE, WORTH, STAGE = 3, 8, 6
# What the exact gradient costs beside that, one way and the other.
BACK_STEP, BACK_ITERATION = 2.5, 2.5


def affordable(batch: int, steps: int, dim: int) -> int:
    """How many iterations of all steps on a device cost as much as going step after step."""
    rows = batch * steps * dim / 1024
    one_by_one = STEP * steps + ROW_OF_STEP * rows
    left = one_by_one - LOOK - ROW_OF_LOOK * rows
    return max(0, int(left / (ITERATION + ROW_OF_ITERATION * rows)))


def affordable_back(batch: int, steps: int, dim: int) -> int:
    """The same of iterations of the adjoint, where the way forward has left nothing of its steps."""
    rows = batch * steps * dim / 1024
    one_by_one = BACK_STEP * (STEP * steps + ROW_OF_STEP * rows)
    return int(one_by_one / (ITERATION + BACK_ITERATION * ROW_OF_ITERATION * rows))


def tried(cell: Recurrence[Any], solver: Solver, *, further: int) -> Solve | None:
    """What ``auto`` does where all steps at once could be cheaper than one after the other.

    A few iterations, from whose residuals follows how many it takes; and more, as long as that pays. None if it does
    not.
    """
    most = affordable(*cell.v.shape)
    if most < WORTH * PROBE or not settles(solver) or backend.repeated(cell.v):
        return None
    step = _Steps(cell)
    found = _as_long_as_it_pays(step, np.zeros_like(cell.v), solver, most, cell.finite)
    return None if found is None else _chained(cell, step, *found, solver, further=further)


def _as_long_as_it_pays(
    step: Any, start: Array, solver: Solver, most: int, finite: Callable[[int], bool]
) -> tuple[Solved, NDArray[np.float64]] | None:
    """Iterate, and judge every few iterations whether `most` will be enough; nor is what is lost of any use."""
    solver = replace(solver, method="parallel", chunk=None, max_iter=PROBE)
    solved, history = relax(step, start, solver, finite)
    done = PROBE

    def any_is(status: Status, solved: Solved) -> bool:
        return bool((solved.status == int(status)).any())

    def pays(history: NDArray[np.float64], done: int) -> bool:
        return done + _needed(history, solver.rtol) <= most

    while decided(start, partial(any_is, Status.MAX_ITER, solved)):
        if not decided(start, partial(pays, history, done)):
            return None
        again, more = relax(step, solved.value, replace(solver, max_iter=STAGE), finite)
        count = solved.iterations + again.iterations
        solved = Solved(again.value, count, again.residual, again.status, count[:, None].copy())
        history, done = np.concatenate([history, more]), done + STAGE
    return None if decided(start, partial(any_is, Status.DIVERGED, solved)) else (solved, history)


def pull_together(cell: Recurrence[B], h: Array, hbar: Array, adjoint: Adjoint) -> tuple[B, Solution] | None:
    """The exact gradient by iterations of the adjoint of all steps at once; None where they do not pay."""
    most = affordable_back(*h.shape)
    if most < WORTH * PROBE or backend.blind(h):
        return None

    def step(z: Array) -> Array:
        back = cell.transposed(None, h, z)
        return hbar if back is None else hbar + back

    def finite(b: int) -> bool:
        return bool(np.isfinite(hbar[b]).all())

    solver = Solver("parallel", rtol=adjoint.rtol, atol=adjoint.atol)
    found = _as_long_as_it_pays(step, hbar, solver, most, finite)
    if found is None:
        return None
    solved, history = found
    verdict, bars = Verdict(len(h)), cell.bars()
    verdict.add(solved)
    bars.application(None, h, h, solved.value, through=False)
    return bars, verdict.solution(solved.value, "parallel", history)


def _needed(history: NDArray[np.float64], rtol: float) -> float:
    """How many more iterations the slowest sequence takes, if residuals go on to shrink as in the last two."""
    with np.errstate(all="ignore"):
        now, rate = history[-1], np.sqrt(history[-1] / history[-3])
        left = np.where(now <= rtol, 0.0, np.where(rate < 1, np.log(rtol / now) / np.log(rate), np.inf))
    return float(np.nanmax(left, initial=0.0))


def pull_chain(cell: Recurrence[B], found: Solve, hbar: Array) -> B:
    """The one-step gradient: through the last applications, and not into the iterate from which they
    start."""
    chain = found.chain or [found.h]
    bars, outputs = cell.bars(), [*chain[1:], found.h]
    for i in range(len(chain) - 1, -1, -1):
        h = chain[i]
        back = bars.application(None, h, outputs[i], hbar, through=i > 0)
        if back is not None:
            hbar = back
    return bars


def pull_neumann(cell: Recurrence[B], h: Array, hbar: Array, terms: int) -> B:
    """``z = sum_{k <= terms} (J^T)^k hbar`` at the fixed point, then one application."""
    z = term = hbar
    made = cell.mix(h) if backend.on_host(h) else None
    for _ in range(terms):
        back = cell.transposed(made, h, term)
        if back is not None:
            term = back
            z = z + term
    bars = cell.bars()
    bars.application(made, h, h, z, through=False)
    return bars


def pull_sequential(
    cell: Cell, found: Solve, hbar: Array, adjoint: Adjoint, solver: Solver
) -> tuple[Bars, Solution]:
    """The exact gradient, backward in time.

    With ``r_t`` the cotangent of ``h_t`` from everything after step ``t``: ``s_t = r_t + P_t^T (g_t s_t)``,
    then ``r_{t-1} = hbar_{t-1} + lam_t s_t + F_h^T (cotangent of the mixer's arguments at t)``.
    """
    bars, h = Bars.zeros(cell), found.h
    batch, steps, _ = h.shape
    direct = cell.map.kind in ("householder", "dplr")
    method, tolerance = "direct" if direct else "sequential", cell.share()
    tight = replace(adjoint, rtol=adjoint.rtol * tolerance, atol=adjoint.atol * tolerance)
    whole = replace(solver, method="auto", chunk=None)
    before, s, verdict = cell.before(h), np.empty_like(h), Verdict(batch)
    r, at_t = hbar[:, -1] if steps else None, cell
    for t in range(steps - 1, -1, -1):
        at_t = cell.part(slice(t, t + 1), contiguous(before[:, t]))
        made = found.steps[t] if found.steps else at_t.mix(at_t.v)
        assert r is not None
        r_t = contiguous(r)[:, None]
        solved = solve_linear_adjoint(made.mixer, at_t.lam, r_t, tight, whole, method)
        verdict.add(solved)
        s_t = solved.value
        e = (1 - at_t.lam) * s_t
        s[:, t], bars.v[:, t] = s_t[:, 0], mixing.apply_transpose(made.mixer, e)[:, 0]
        h_t = contiguous(h[:, t : t + 1])
        d = at_t.v - h_t
        mixed = mixing.apply(made.mixer, d) + h_t
        bars.lam[:, t] = (s_t * (before[:, t : t + 1] - mixed))[:, 0]
        arguments_bar = bars.mixer(made, d, e)
        if t:
            r = hbar[:, t - 1] + (at_t.lam * s_t)[:, 0]
        if arguments_bar is not None:
            bars.base[:, t] = arguments_bar[:, 0]
            if t and cell.feedback is not None:
                r = r + product(arguments_bar[:, 0], cell.feedback)
    if bars.feedback is not None:
        bars.feedback += product(rows(bars.base), rows(before), transposed=(True, False))
    return bars, verdict.solution(s, "sequential")


def pull_given(
    cell: Cell, found: Solve, hbar: Array, adjoint: Adjoint, solver: Solver
) -> tuple[Bars, Solution]:
    """The exact gradient for mixers that do not see the hidden state: section 6."""
    made, bars, h = cell.mix(found.h), Bars.zeros(cell), found.h
    low_rank = made.mixer[1][0].shape[-2] if made.mixer[0] in ("householder", "dplr") else None
    way = solver.adjoint_way(low_rank)
    solved = solve_linear_adjoint(made.mixer, cell.lam, hbar, adjoint, solver, way)
    s = solved.value
    e, d = cell.gate * s, cell.v - h
    mixed = mixing.apply(made.mixer, d) + h
    bars.lam, bars.v = s * (cell.before(h) - mixed), mixing.apply_transpose(made.mixer, e)
    arguments_bar = bars.mixer(made, d, e)
    if arguments_bar is not None:
        bars.base = arguments_bar
    return bars, _reported(solved, way)
