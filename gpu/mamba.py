"""The fixed point with a matrix state on the device, sections 5 and 6 of docs/mathematics.md: doors as in
`fpnumba.reference.mamba`.

Arrays are CuPy's, C-contiguous, all float32 or all float64. With a mixer of low rank a step is one kernel each way,
`fpnumba.gpu._mamba`, and with a Kronecker mixer that is made on the way two, `fpnumba.gpu._mamba_kronecker`; with any
other, kernels of the room's scan and mixers are put together here, and an iteration goes on until no sequence moves,
which the host learns two iterations late, so that the device does not wait for it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fpnumba.gpu import _device, _mamba, _mamba_kronecker, _mamba_kronecker_rows, _shapes, mixers, scan
from fpnumba.gpu._look import wild
from fpnumba.gpu._mamba import Arguments
from fpnumba.gpu._mamba_rows import Application
from fpnumba.reference import mamba as reference
from fpnumba.reference import products
from fpnumba.reference.mamba import Bars, Norm, Solved, System, normalize, normalize_vjp
from fpnumba.reference.solve import CONVERGED, DIVERGED, MAX_ITER, NONFINITE_INPUT

__all__ = [
    "Application",
    "Arguments",
    "Bars",
    "Norm",
    "Solved",
    "System",
    "application_vjp",
    "every_state",
    "iterate",
    "keep_made",
    "makes",
    "normalize",
    "normalize_vjp",
    "pull_made",
    "pullback",
    "solve",
    "solve_alone",
    "solve_made",
]

Array = Any

# Steps between two states that a pullback keeps.
SPAN = 16
# Bytes of states whose steps are solved each by itself at once.
ALONE_BYTES = 2**29
# An iteration that goes back and forth, so many times without getting closer, is damped by half.
PATIENCE = 4
# Changes of an adjoint that have grown so much since the first will not shrink; what is found without the step's own
# Jacobian, as by the one-step gradient, takes its place.
GROWN = 1e4


class _Doors:
    scan = scan
    mixers = mixers


def iterate(system: System, initial: Array | None, y: Array) -> Array:
    """One parallel iteration; see `fpnumba.reference.mamba.iterate`."""
    return reference.iterate(system, initial, y, _Doors)


def application_vjp(system: System, initial: Array | None, y: Array, new_bar: Array) -> Bars:
    """Cotangents of `iterate`; see `fpnumba.reference.mamba.application_vjp`."""
    return reference.application_vjp(system, initial, y, new_bar, _Doors)


def every_state(system: System, y: Array, state: Array) -> tuple[Array, Array]:
    """The state before every step at the outputs ``y (B, T, D)``, (B, T, D, N), and that after the last."""
    after = _mamba.later_states(system, reference.channel_mix(system, y, mixers), 0, y.shape[1], state)
    return _before(state, after), after[-1]


def _before(state: Array, after: Array) -> Array:
    """Of the states after every step those before, sequence by sequence."""
    count, batch, *shape = after.shape
    found = _shapes.empty_like(after, batch, count, *shape)
    found[:, 0] = state
    found[:, 1:] = after[:-1].swapaxes(0, 1)
    return found


def at_step(s: System, t: int) -> System:
    """The system of one step."""
    if s.x.shape[1] == 1:
        return s
    gate = None if s.gate is None else _mamba.at(s.gate, t)
    here = products.at_steps(s.kind, s.params, slice(t, t + 1), 1)
    params = products.each(s.kind, here, _device.xp().ascontiguousarray)
    arrays = (_mamba.at(s.x, t), _mamba.at(s.delta, t), s.A, _mamba.at(s.B, t), _mamba.at(s.C, t))
    return System(s.kind, params, *arrays, s.skip, gate, s.norm)


def _largest(v: Array) -> Array:
    """By sequence; keeps a NaN."""
    return _device.xp().abs(v).max(axis=(1, 2))


def _per_channel(s: System) -> tuple[Array, Array]:
    """``w = delta (B . C) + D`` and ``delta`` of one step, a number for each channel."""
    delta = s.delta if s.A.ndim == 2 else s.delta.repeat(s.x.shape[-1] // s.A.shape[0], axis=-1)
    return delta * (s.B * s.C).sum(-1, keepdims=True) + s.skip, delta


def _inner(s: System, r: Array, w: Array, y: Array) -> Array:
    """What the norm sees."""
    v = r + w * reference.channel_mix(s, y, mixers)
    return v if s.gate is None else s.gate * v


def solve(
    system: System,
    initial: Array | None,
    *,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int = 1000,
    damping: float = 1.0,
) -> Solved:
    """Solve (M) step by step; see `fpnumba.reference.mamba.solve`.

    Parameters
    ----------
    system : System
        Arrays (B, T, ...) on the device.
    initial : (B, D, N) array or None
    rtol, atol, max_iter, damping
        As there.

    Returns
    -------
    Solved
        On the device.
    """
    s, xp = system, _device.xp()
    batch, steps, dim = s.x.shape
    state = xp.zeros((batch, dim, s.B.shape[-1]), s.x.dtype) if initial is None else initial
    options: dict[str, Any] = {"rtol": rtol, "atol": atol, "max_iter": max_iter, "damping": damping}
    if _mamba.serves(s):
        y, state, iterations, residual, met = _mamba.solve(s, state, **options)
    else:
        y = xp.empty_like(s.x)
        iterations, residual = xp.zeros(batch, np.int64), xp.zeros(batch, np.float64)
        met = xp.ones(batch, bool)
        for t in range(steps if batch * dim else 0):
            here = at_step(s, t)
            now, count, left, met_now = _solve_step(here, state, **options)
            u = reference.channel_mix(here, now, mixers)
            _, state = scan.selective_scan(u, here.delta, here.A, here.B, here.C, None, state)
            y[:, t] = now[:, 0]
            iterations, residual = xp.maximum(iterations, count), xp.maximum(residual, left)
            met &= met_now
    return Solved(y, state, iterations, residual, _status(s, initial, y, state, met))


def _status(s: System, initial: Array | None, y: Array, state: Array, met: Array) -> Array:
    xp = _device.xp()
    lost = wild(y, state)
    # inputs are looked at only where that explains something
    bad = wild(s.x, s.delta, s.B, s.C, s.gate, initial, only=lost)
    status = xp.where(lost, xp.where(bad, NONFINITE_INPUT, DIVERGED), xp.where(met, CONVERGED, MAX_ITER))
    return status.astype(np.int8)


def _solve_step(
    s: System, state: Array, *, rtol: float, atol: float, max_iter: int, damping: float
) -> tuple[Array, Array, Array, Array]:
    """``y (B, 1, D)`` of one step from zero, applications, residual, and whether the tolerance was met."""
    xp, eps = _device.xp(), float(np.finfo(s.x.dtype).eps)
    batch = len(s.x)
    y = xp.zeros_like(s.x)
    r, _ = scan.selective_scan(y, s.delta, s.A, s.B, s.C, None, state)
    w, _ = _per_channel(s)
    count, residual = xp.zeros(batch, np.int64), xp.zeros(batch, np.float64)
    met, moving, swing = xp.zeros(batch, bool), xp.ones(batch, bool), _Swing(y, damping)
    watch = _device.Watch(xp.ones(1, np.int32))
    try:
        for _ in range(max_iter):
            new = normalize(s.norm, _inner(s, r, w, y))
            change = new - y
            moved = _largest(change).astype(np.float64)
            size = xp.maximum(_largest(y), _largest(new)).astype(np.float64)
            count += moving
            residual = xp.where(moving, moved / xp.maximum(size, float(np.finfo(y.dtype).tiny)), residual)
            now = moved <= xp.maximum(atol + rtol * size, 8 * eps * size)
            met |= now & moving
            # a sequence that has stopped keeps its value, whatever the others' bring
            step = xp.where(moving, xp.where(now, 1.0, swing.factor(change, moved)), 0.0)[:, None, None]
            y = xp.where(step > 0, y + step.astype(y.dtype) * change, y)
            moving = moving & ~now & xp.isfinite(moved)
            watch.counter[:] = moving.sum()
            if watch.look() == 0:
                break
    finally:
        watch.close()
    return y, count, residual, met


def makes(system: System, activation: str) -> bool:
    """Whether `solve_made` and `Application` serve a system whose mixers this activation makes from arguments."""
    if system.kind == "kronecker":
        made = _mamba_kronecker.makes(system, activation)
        return bool(made and _mamba_kronecker_rows.fits(system))
    return bool(_mamba.makes(system, activation))


def solve_made(
    system: System,
    given: Arguments,
    initial: tuple[Array, Array],
    *,
    keep: bool,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int = 1000,
    damping: float = 1.0,
) -> tuple[Array, Array, tuple[Array, Array, Array], Any]:
    """`solve` where the mixer, of rank one or Kronecker, ``B`` and ``C`` of step ``t`` are made from arguments and
    ``y_{t-1}``.

    Parameters
    ----------
    system : System
        Its parameters, ``B`` and ``C`` are written; of Kronecker factors only the edges are looked at.
    given : Arguments
    initial : pair of arrays
        ``y_0 (B, D)`` and ``H_0 (B, D, N)``.
    keep : bool
        Whether `pull_made` will follow.
    rtol, atol, max_iter, damping
        As of `solve`.

    Returns
    -------
    y : (B, T, D) array
    last_state : (B, D, N) array
    solved : tuple of arrays
        Iterations, residual and status of each sequence.
    made
        For `pull_made`.
    """
    options: dict[str, Any] = {"rtol": rtol, "atol": atol, "max_iter": max_iter, "damping": damping}
    solved: Any = _mamba_kronecker.solve_made if system.kind == "kronecker" else _mamba.solve_made
    y, state, iterations, residual, met, made = solved(system, given, initial, keep=keep, **options)
    status = _status(system, initial[1], y, state, met)
    return y, state, (iterations, residual, status), made


class Alone(NamedTuple):
    """Steps that were solved each by itself.

    Attributes
    ----------
    steps : slice
    y : (B, n, D) array
    status : (B, n) int8 array
    state : (B, D, N) array
        Before the first of them.
    after : (n, B, D, N) array
        The states after them, at the outputs that were given.
    made
        Of `solve_made`, with a sequence for every step.
    """

    steps: slice
    y: Array
    status: Array
    state: Array
    after: Array
    made: Any


def solve_alone(
    system: System,
    given: Arguments,
    initial: Array,
    y: Array,
    before: Array | None,
    applied: Application,
    *,
    keep: bool,
    **options: Any,
) -> Iterator[Alone]:
    """Solve every step by itself, many at once, from the state that the one before leaves at outputs ``y``.

    Parameters
    ----------
    system, given, keep, options
        As for `solve_made`.
    initial : (B, D, N) array
    y : (B, T, D) array
    before : (B, T, D) array or None
        ``y_{t-1}``; None where nothing sees it.
    applied : Application
        At `y`.

    Yields
    ------
    Alone
        Some of the steps, in order.
    """
    xp, (batch, steps, dim), size = _device.xp(), y.shape, initial.shape[-1]
    state, together = initial, max(1, ALONE_BYTES // max(1, initial.nbytes))
    for first in range(0, steps, together):
        here = slice(first, min(first + together, steps))
        after, many = applied.states(here.start, here.stop, state), here.stop - here.start
        count = batch * many

        def alone(array: Any, here: slice = here, count: int = count) -> Any:
            if array is None:
                return None
            return xp.ascontiguousarray(array[:, here]).reshape(count, 1, *array.shape[2:])

        def room(array: Any, count: int = count) -> Any:
            return xp.empty((count, 1, *array.shape[2:]), array.dtype)

        params = tuple(p[:0] if system.kind == "kronecker" else room(p) for p in system.params)
        changed = {"x": alone(system.x), "delta": alone(applied.delta), "gate": alone(system.gate)}
        s = system._replace(params=params, B=room(system.B), C=room(system.C), **changed)
        own = given._replace(mixer=alone(given.mixer), b=alone(given.b), c=alone(given.c))
        own = own._replace(step_argument=alone(given.step_argument))
        past = alone(y if before is None else before).reshape(count, dim)
        states = _before(state, after).reshape(count, dim, size)
        found, _, (_, _, status), made = solve_made(s, own, (past, states), keep=keep, **options)
        shape = batch, many
        yield Alone(here, found.reshape(*shape, dim), status.reshape(shape), state, after, made)
        state = after[-1]


def keep_made(
    system: System, given: Arguments, initial: Array, y: Array, before: Array | None, applied: Application
) -> Any:
    """What `solve_made` would have kept, at outputs that were found in another way.

    Parameters
    ----------
    system, given, initial, y, before, applied
        As for `solve_alone`.

    Returns
    -------
    made
        For `pull_made`.
    """
    batch, steps, _ = y.shape
    span = max(1, -(-steps * initial.nbytes // _mamba.KEPT_BYTES))
    kept: list[Array] = []
    parts: list[Any] = []
    options = {"rtol": 1e-3, "max_iter": 1}  # what is found is not looked at
    for one in solve_alone(system, given, initial, y, before, applied, keep=True, **options):
        for k, t in enumerate(range(one.steps.start, one.steps.stop)):
            if t % span == 0:
                past = one.after[k - 1] if k else one.state
                kept.append(past if span == 1 else past.copy())
        parts.append(one.made)

    def whole(of: Any) -> Any:
        found = [of(made) for made in parts]
        if found[0] is None:
            return None
        shaped = [a.reshape(batch, len(a) // batch, *a.shape[2:]) for a in found]
        return shaped[0] if len(shaped) == 1 else _device.joined(shaped, 1)

    B, C = (whole(lambda made, name=name: getattr(made.system, name)) for name in ("B", "C"))
    s = system._replace(delta=applied.delta, B=B, C=C)
    about = whole(lambda made: made.arguments), whole(lambda made: made.norms)
    if system.kind == "kronecker":
        return _mamba_kronecker.Made(s, *about, kept, span, applied.mixed if span > 1 else None)
    params = tuple(whole(lambda made, i=i: made.system.params[i]) for i in range(2))
    seen = whole(lambda made: made.seen)
    return _mamba.Made(s._replace(params=params), *about, seen, kept, span)


def pull_made(
    made: Any,
    given: Arguments,
    y: Array,
    y_bar: Array,
    last_bar: Array | None,
    *,
    rtol: float = 1e-6,
    max_iter: int = 1000,
) -> tuple[Bars, Array, Array]:
    """The exact gradient behind `solve_made`.

    Parameters
    ----------
    made, given
        Of `solve_made`.
    y, y_bar : (B, T, D) arrays
    last_bar : (B, D, N) array or None
    rtol, max_iter
        Of the adjoint of a step, unless the mixer is of rank one.

    Returns
    -------
    bars : Bars
        ``params``, ``B`` and ``C`` are the cotangents of ``given.mixer``, ``given.b`` and ``given.c``.
    fed_bar : (B, T, width) array
        Those of what ``y_{t-1}`` says.
    status : (B,) int8 array
    """
    xp, met = _device.xp(), None
    if made.system.kind == "kronecker":
        options: dict[str, Any] = {"rtol": rtol, "max_iter": max_iter}
        bars, fed_bar, met = _mamba_kronecker.pull_made(made, given, y, y_bar, last_bar, **options)
    else:
        bars, fed_bar = _mamba.pull_made(made, given, y, y_bar, last_bar)
    status = xp.where(
        wild(bars.y), DIVERGED, CONVERGED if met is None else xp.where(met, CONVERGED, MAX_ITER)
    )
    return bars, fed_bar, status.astype(np.int8)


class _Swing:
    """How far iterations go, by sequence."""

    def __init__(self, like: Array, damping: float) -> None:
        xp, batch = _device.xp(), len(like)
        self._factor, self._swings = xp.full(batch, damping), xp.zeros(batch, np.int64)
        self._past, self._before = xp.zeros_like(like), xp.full(batch, np.inf)

    def factor(self, change: Array, moved: Array) -> Array:
        """Of this iteration, which would make this `change`, the largest of it `moved`."""
        xp = _device.xp()
        back = (change * self._past).sum((1, 2)) < 0
        self._swings += back & (moved > 0.98 * self._before)
        enough = self._swings >= PATIENCE
        self._factor = xp.where(enough, self._factor / 2, self._factor)
        self._swings = xp.where(enough, 0, self._swings)
        self._past, self._before = change, moved
        return self._factor


def pullback(
    system: System,
    initial: Array | None,
    y: Array,
    y_bar: Array,
    last_bar: Array | None,
    *,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int = 1000,
) -> tuple[Bars, Array]:
    """The exact gradient at the fixed point ``y``, backward in time; see `fpnumba.reference.mamba.pullback`.

    Parameters
    ----------
    system, initial
        As for `solve`.
    y, y_bar : (B, T, D) arrays
    last_bar : (B, D, N) array or None
    rtol, max_iter
        Of the adjoint of a step, unless the mixer is of low rank; `atol` is of no use.

    Returns
    -------
    bars : Bars
    status : (B,) int8 array
    """
    s, xp = system, _device.xp()
    batch, steps, dim = s.x.shape
    shape = (batch, dim, s.B.shape[-1])
    start = xp.zeros(shape, s.x.dtype) if initial is None else initial
    G = xp.zeros(shape, s.x.dtype) if last_bar is None else last_bar
    total = _mamba.Total(s)
    met, z = xp.ones(batch, bool), xp.empty_like(y)
    u = reference.channel_mix(s, y, mixers) if steps > 1 else y
    ends = [*range(0, steps, SPAN), steps]
    spans = [start]
    for begin in ends[1:-1]:
        # the state before the step after the span
        spans.append(_mamba.later_states(s, u, begin - SPAN, begin, spans[-1])[-1])
    pull = _mamba.pull if steps and _mamba.serves(s) else _pull_step
    for begin, end, state in reversed(list(zip(ends, ends[1:], spans, strict=False))):
        pasts = _mamba.states(s, u, begin, end, state)
        for t in reversed(range(begin, end)):
            arguments = at_step(s, t), pasts[t - begin], _mamba.at(y, t), _mamba.at(y_bar, t), G
            pulled, met_now = pull(*arguments, rtol=rtol, max_iter=max_iter)
            G = pulled.initial
            z[:, t] = pulled.y[:, 0]
            met &= met_now
            total.add(pulled, t)
    status = xp.where(wild(z), DIVERGED, xp.where(met, CONVERGED, MAX_ITER)).astype(np.int8)
    return total.bars(G, z), status


def _pull_step(
    s: System, past: Array, y: Array, y_bar: Array, G: Array, *, rtol: float, max_iter: int
) -> tuple[Bars, Array]:
    """One step: its adjoint system by iteration, then its cotangents; ``y`` of them is ``z``."""
    xp, eps = _device.xp(), float(np.finfo(y.dtype).eps)
    r, _ = scan.selective_scan(xp.zeros_like(y), s.delta, s.A, s.B, s.C, None, past)
    w, delta = _per_channel(s)
    u = reference.channel_mix(s, y, mixers)
    o = r + w * u
    v = o if s.gate is None else s.gate * o
    through = w if s.gate is None else s.gate * w
    from_later = delta * (G * s.B[:, 0, None, :]).sum(-1)[:, None]
    right = y_bar + from_later - products.apply_transpose(mixers, s.kind, s.params, from_later)
    z, moving, met, swing = right, xp.ones(len(y), bool), xp.zeros(len(y), bool), _Swing(y, 1.0)
    first, last = None, xp.full(len(y), np.inf, y.dtype)
    watch = _device.Watch(xp.ones(1, np.int32))
    try:
        for _ in range(max_iter):
            e = through * normalize_vjp(s.norm, v, z)[0]
            new = right + e - products.apply_transpose(mixers, s.kind, s.params, e)
            change = new - z
            moved, size = _largest(change), _largest(new)
            step = swing.factor(change, moved).astype(z.dtype)[:, None, None]
            z = xp.where(moving[:, None, None], z + step * change, z)
            now = moved <= max(rtol, 8 * eps) * size
            met |= moving & now
            first, last = moved if first is None else first, xp.where(moving, moved, last)
            moving = moving & ~now & (moved <= GROWN * first)
            watch.counter[:] = moving.sum()
            if watch.look() == 0:
                break
    finally:
        watch.close()
    # an adjoint whose changes do not shrink has no solution that iterating finds
    shrunk = met if first is None else met | (last < first)
    z = xp.where(shrunk[:, None, None], z, right)
    v_bar, weight_bar, bias_bar = normalize_vjp(s.norm, v, z)
    o_bar = v_bar if s.gate is None else s.gate * v_bar
    # one step of the scan: a cotangent of the state that it leaves comes in
    u_bar, delta_bar, A_bar, B_bar, C_bar, skip_bar, before = scan.selective_scan_vjp(
        u, s.delta, s.A, s.B, s.C, s.skip, past, o_bar, G
    )
    assert skip_bar is not None
    x_bar = products.apply_transpose(mixers, s.kind, s.params, u_bar)
    bars = Bars(
        products.cotangent(mixers, s.kind, s.params, s.x - y, u_bar),
        x_bar,
        delta_bar,
        A_bar,
        B_bar,
        C_bar,
        skip_bar,
        None if s.gate is None else v_bar * o,
        weight_bar,
        bias_bar,
        before,
        z,
    )
    return bars, met
