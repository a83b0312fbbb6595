"""The fixed point of FP-Mamba, matrix state: sections 5 and 6 of docs/mathematics.md.

    u_t = Q_t (x_t - y_t) + y_t                                                (channel mixing)
    H_t = exp(delta_t A) * H_{t-1} + (delta_t u_t) B_t^T
    o_t = H_t C_t + D * u_t                                                    (sequence mixing)
    y_t = norm(gate_t * o_t)                                                                            (M)

What the hidden state decides is decided step by step: once ``y_{t-1}`` and ``H_{t-1}`` are final, (M) at step ``t`` is

    y = norm(gate * (r + w * (x - P (x - y)))),   r = (exp(delta A) * H_{t-1}) C,   w = delta (B . C) + D,

a fixed point in ``y`` alone. Here it is found by iteration and, near it, Newton's method with the dense Jacobian; the
adjoint of the step is one dense system. The step may have several fixed points. The one that is meant, in every room
and by every way that solves (M) to a tolerance, is the one that its iteration reaches from ``y = 0``.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpnumba.reference import mixers, products, scan
from fpnumba.reference.kinds import Array
from fpnumba.reference.scan import _per_channel, selective_scan, selective_scan_vjp
from fpnumba.reference.solve import CONVERGED, DIVERGED, MAX_ITER, NONFINITE_INPUT

__all__ = [
    "Bars",
    "Norm",
    "Solved",
    "System",
    "application_vjp",
    "channel_mix",
    "finite_inputs",
    "iterate",
    "normalize",
    "normalize_vjp",
    "pullback",
    "solve",
]


class _Doors(NamedTuple):
    scan: Any
    mixers: Any


_THIS = _Doors(scan, mixers)

# A step may have several fixed points (the norm stretches small differences), and the one that is meant is the one that
# the iteration reaches from zero. So Newton's method takes over only where the geometric series of the iteration has
# less than this of the size of ``y`` left, and may not go much further than that.
NEAR = 1e-3
# An iteration that goes back and forth, so many times without getting closer, is damped by half.
PATIENCE = 4


class Norm(NamedTuple):
    """``weight * (v - mean) / sqrt(var + eps) + bias`` over channels, or, not `centred`, by the mean square.

    Attributes
    ----------
    weight : (D,) array
    bias : (D,) array or None
    eps : float
    centred : bool
        LayerNorm; otherwise RMSNorm.
    """

    weight: Array
    bias: Array | None
    eps: float
    centred: bool


class System(NamedTuple):
    """All of (M) but the initial state.

    Attributes
    ----------
    kind, params
        The mixer, as in `fpnumba.reference.mixers`, or a "mixture" of `fpnumba.reference.products`.
    x : (..., T, D) array
    delta : (..., T, D) array, (..., T, H) in the Mamba-2 form
    A : (D, N) array, (H,) in the Mamba-2 form
    B, C : (..., T, N) arrays
    skip : (D,) array
        ``D`` of the equations.
    gate : (..., T, D) array or None
        Multiplies ``o`` before the norm; None is one.
    norm : Norm or None
        None: ``y = gate * o``.
    """

    kind: Any
    params: Any
    x: Array
    delta: Array
    A: Array
    B: Array
    C: Array
    skip: Array
    gate: Array | None
    norm: Norm | None


class Solved(NamedTuple):
    """What a solve returns; ``...`` are the inputs' leading axes.

    Attributes
    ----------
    value : (..., T, D) array
    last_state : (..., D, N) array
    iterations : (...) int64 array
        Applications of the step's map, the most that any step took.
    residual : (...) float64 array
        ``max|f(y) - y| / max|y|`` of the last iteration, the largest of all steps.
    status : (...) int8 array
        As in `fpnumba.reference.solve.Solved`.
    """

    value: Array
    last_state: Array
    iterations: NDArray[np.int64]
    residual: NDArray[np.float64]
    status: NDArray[np.int8]


class Bars(NamedTuple):
    """Cotangents of the parts of a `System`, of the initial state and (for one application) of the iterate."""

    params: Any
    x: Array
    delta: Array
    A: Array
    B: Array
    C: Array
    skip: Array
    gate: Array | None
    weight: Array | None
    bias: Array | None
    initial: Array
    y: Array


# --- one application ----------------------------------------------------------------------------------------------


def normalize(norm: Norm | None, v: Array) -> Array:
    """``y = norm(v)`` over the last axis; section 5.

    Examples
    --------
    >>> normalize(Norm(np.ones(2), None, 0.0, True), np.array([1.0, 3.0]))
    array([-1.,  1.])
    """
    if norm is None:
        return v
    n, _ = _normal(norm, v)
    y: Array = n * norm.weight
    return y if norm.bias is None else y + norm.bias


def _normal(norm: Norm, v: Array) -> tuple[Array, Array]:
    """``v`` centred and scaled, and the scale."""
    centred = v - v.mean(-1, keepdims=True) if norm.centred else v
    scale = 1 / np.sqrt((centred * centred).mean(-1, keepdims=True) + v.dtype.type(norm.eps))
    return centred * scale, scale


def normalize_vjp(norm: Norm | None, v: Array, y_bar: Array) -> tuple[Array, Array | None, Array | None]:
    """Cotangents of ``v``, weight and bias of `normalize`.

    Examples
    --------
    >>> normalize_vjp(None, np.ones(2), np.array([1.0, 2.0]))
    (array([1., 2.]), None, None)
    """
    if norm is None:
        return y_bar, None, None
    n, scale = _normal(norm, v)
    inner = y_bar * norm.weight
    mean = inner.mean(-1, keepdims=True) if norm.centred else 0
    v_bar = scale * (inner - mean - n * (inner * n).mean(-1, keepdims=True))
    axes = tuple(range(v.ndim - 1))
    return v_bar, (y_bar * n).sum(axes), None if norm.bias is None else y_bar.sum(axes)


def _gated(system: System, o: Array) -> Array:
    return o if system.gate is None else system.gate * o


def channel_mix(system: System, y: Array, doors: Any = mixers) -> Array:
    """``u = Q (x - y) + y``, by the ``mixers`` of a room."""
    u: Array = products.apply(doors, system.kind, system.params, system.x - y) + y
    return u


def iterate(system: System, initial: Array | None, y: Array, room: Any = None) -> Array:
    """One parallel iteration of (M): mix all steps of ``y``, scan over time, normalise.

    Parameters
    ----------
    system : System
    initial : (..., D, N) array or None
        ``H_0``; None is zero.
    y : (..., T, D) array
        The previous iterate.
    room : optional
        The room whose ``scan`` and ``mixers`` do the work; this one by default.

    Returns
    -------
    (..., T, D) array

    Examples
    --------
    >>> ones = np.ones((1, 2))
    >>> system = System(
    ...     "fixed", (np.eye(2),), 3 * ones, ones, -np.ones((2, 1)), ones[:, :1], ones[:, :1], ones[0], None, None
    ... )
    >>> iterate(system, None, np.zeros((1, 2)))
    array([[6., 6.]])
    """
    s, doors = system, _THIS if room is None else room
    o, _ = doors.scan.selective_scan(channel_mix(s, y, doors.mixers), s.delta, s.A, s.B, s.C, s.skip, initial)
    return normalize(s.norm, _gated(s, o))


def application_vjp(
    system: System, initial: Array | None, y: Array, new_bar: Array, room: Any = None
) -> Bars:
    """Cotangents of `iterate` at ``y``.

    Parameters
    ----------
    system, initial, y, room
        As for `iterate`.
    new_bar : (..., T, D) array

    Returns
    -------
    Bars

    Examples
    --------
    >>> ones = np.ones((1, 2))
    >>> system = System(
    ...     "fixed", (np.eye(2),), 3 * ones, ones, -np.ones((2, 1)), ones[:, :1], ones[:, :1], ones[0], None, None
    ... )
    >>> bars = application_vjp(system, None, np.zeros((1, 2)), ones)
    >>> bars.x, bars.y
    (array([[2., 2.]]), array([[0., 0.]]))
    """
    s, doors = system, _THIS if room is None else room
    u = channel_mix(s, y, doors.mixers)
    o, _ = doors.scan.selective_scan(u, s.delta, s.A, s.B, s.C, s.skip, initial)
    v_bar, weight_bar, bias_bar = normalize_vjp(s.norm, _gated(s, o), new_bar)
    gate_bar = None if s.gate is None else v_bar * o
    o_bar = _gated(s, v_bar)
    u_bar, delta_bar, A_bar, B_bar, C_bar, skip_bar, initial_bar = doors.scan.selective_scan_vjp(
        u, s.delta, s.A, s.B, s.C, s.skip, initial, o_bar, None
    )
    x_bar = products.apply_transpose(doors.mixers, s.kind, s.params, u_bar)
    params_bar = products.cotangent(doors.mixers, s.kind, s.params, s.x - y, u_bar)
    return Bars(
        params_bar,
        x_bar,
        delta_bar,
        A_bar,
        B_bar,
        C_bar,
        skip_bar,
        gate_bar,
        weight_bar,
        bias_bar,
        initial_bar,
        u_bar - x_bar,
    )


# --- one step -----------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """(M) at one step: what of it does not change with ``y``."""

    P: Array  # (..., D, D)
    x: Array
    r: Array
    w: Array
    gate: Array
    norm: Norm | None
    decay: Array  # (..., D, N)
    delta: Array
    B: Array
    C: Array


def _step(system: System, state: Array, t: int) -> _Step:
    s, axis, dim = system, system.x.ndim - 2, system.x.shape[-1]
    rate, delta = _per_channel(s.A, s.delta[..., t : t + 1, :], dim, s.B.shape[-1])
    delta, B, C = delta[..., 0, :], s.B[..., t, :], s.C[..., t, :]
    decay = np.exp(delta[..., None] * rate)
    here = products.at_steps(s.kind, s.params, slice(t, t + 1), axis)
    units = np.eye(dim, dtype=s.x.dtype).reshape(dim, *([1] * axis), 1, dim)
    units = np.ascontiguousarray(np.broadcast_to(units, (dim, *s.x.shape[:-2], 1, dim)))
    Q = np.moveaxis(products.apply(mixers, s.kind, here, units)[..., 0, :], 0, -1)
    r = (decay * state * C[..., None, :]).sum(-1)
    w = delta * (B * C).sum(-1, keepdims=True) + s.skip
    gate = np.ones_like(r) if s.gate is None else s.gate[..., t, :]
    return _Step(np.eye(dim, dtype=Q.dtype) - Q, s.x[..., t, :], r, w, gate, s.norm, decay, delta, B, C)


def _times(matrix: Array, v: Array) -> Array:
    product: Array = (matrix @ v[..., None])[..., 0]
    return product


def _mixed(step: _Step, y: Array) -> Array:
    return step.x - _times(step.P, step.x - y)


def _inner(step: _Step, y: Array) -> Array:
    """What the norm sees."""
    v: Array = step.gate * (step.r + step.w * _mixed(step, y))
    return v


def _jacobian(step: _Step, y: Array) -> Array:
    """``d f / d y`` of the step's map: the norm's, times ``diag(gate w) P``."""
    through: Array = (step.gate * step.w)[..., None] * step.P
    if step.norm is None:
        return through
    n, scale = _normal(step.norm, _inner(step, y))
    if step.norm.centred:
        through = through - through.mean(-2, keepdims=True)
    along = (n[..., None] * through).mean(-2, keepdims=True)
    jacobian: Array = (step.norm.weight * scale)[..., None] * (through - n[..., None] * along)
    return jacobian


def _newton(step: _Step, y: Array, change: Array) -> Array:
    """``y + (I - J)^{-1} change``, NaN where that cannot be had."""
    matrix = np.eye(y.shape[-1], dtype=y.dtype) - _jacobian(step, y)
    usable = np.asarray(np.isfinite(matrix).all((-2, -1)) & np.isfinite(change).all(-1))
    matrix = np.where(usable[..., None, None], matrix, np.eye(y.shape[-1], dtype=y.dtype))
    try:
        found = y + np.linalg.solve(matrix, change[..., None])[..., 0]
    except np.linalg.LinAlgError:
        return np.full_like(y, np.nan)
    return np.where(usable[..., None], found, np.nan)


def _largest(v: Array) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.abs(v).max(-1, initial=0.0).astype(np.float64)
    return found


def _solve_step(
    step: _Step, *, rtol: float, atol: float, max_iter: int, damping: float
) -> tuple[Array, NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
    """``y``, applications, residual, and whether the tolerance was met."""
    y = np.zeros_like(step.r)
    lead, eps = y.shape[:-1], float(np.finfo(y.dtype).eps)
    iterations, residual = np.zeros(lead, np.int64), np.zeros(lead)
    met, moving = np.zeros(lead, bool), np.ones(lead, bool)
    before, ratio, last = (np.full(lead, np.inf) for _ in range(3))
    new = normalize(step.norm, _inner(step, y))
    factor, swings, change = np.full(lead, damping), np.zeros(lead, int), np.zeros_like(y)
    for _ in range(max_iter):
        previous, change = change, new - y
        moved, size = _largest(change), np.maximum(_largest(y), _largest(new))
        iterations += moving
        residual = np.where(moving, moved / np.maximum(size, float(np.finfo(y.dtype).tiny)), residual)
        now = moved <= np.maximum(atol + rtol * size, 8 * eps * size)
        met |= now & moving
        y = np.where((moving & now)[..., None], new, y)
        moving = moving & ~now & np.isfinite(moved)
        if not moving.any():
            break
        known = np.isfinite(before)
        last, ratio = np.where(known, ratio, last), np.where(known, moved / np.where(known, before, 1), ratio)
        before = moved
        swings += moving & ((change * previous).sum(-1) < 0) & (ratio > 0.98)
        factor, swings = (
            np.where(swings >= PATIENCE, factor / 2, factor),
            np.where(swings >= PATIENCE, 0, swings),
        )
        proposal = y + factor[..., None].astype(y.dtype) * change
        after = normalize(step.norm, _inner(step, proposal))
        steady = moving & (ratio < 1) & (last < 1) & (moved <= NEAR * (1 - ratio) * size)
        if steady.any():
            candidate = _newton(step, y, change)
            there = normalize(step.norm, _inner(step, candidate))
            good = steady & (_largest(candidate - y) <= 2 * NEAR * size)
            good &= _largest(there - candidate) < 0.5 * moved
            proposal = np.where(good[..., None], candidate, proposal)
            after = np.where(good[..., None], there, after)
            # what Newton's method leaves says nothing about how the iteration contracts
            before = np.where(good, np.inf, before)
        y = np.where(moving[..., None], proposal, y)
        new = np.where(moving[..., None], after, new)
    return y, iterations, residual, met


def _next_state(step: _Step, state: Array, y: Array) -> Array:
    after: Array = step.decay * state + (step.delta * _mixed(step, y))[..., None] * step.B[..., None, :]
    return after


# --- all steps ----------------------------------------------------------------------------------------------------


def _initial(system: System, initial: Array | None) -> Array:
    x = system.x
    shape = (*x.shape[:-2], x.shape[-1], system.B.shape[-1])
    return np.zeros(shape, x.dtype) if initial is None else initial


def solve(
    system: System,
    initial: Array | None,
    *,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int = 1000,
    damping: float = 1.0,
) -> Solved:
    """Solve (M) step by step.

    Parameters
    ----------
    system : System
    initial : (..., D, N) array or None
        ``H_0``; None is zero.
    rtol, atol : float
        A step has converged when ``max|f(y) - y| <= atol + rtol * max|y|``.
    max_iter : int
        Most iterations of a step.
    damping : float
        Step size of the iteration, halved where it goes back and forth.

    Returns
    -------
    Solved

    Examples
    --------
    >>> ones = np.ones((1, 2))
    >>> system = System(
    ...     "fixed", (np.eye(2) / 2,), ones, ones, -np.ones((2, 1)), ones[:, :1], ones[:, :1], 0 * ones[0], None, None
    ... )
    >>> solve(system, None).value
    array([[1., 1.]])
    """
    steps, lead = system.x.shape[-2], system.x.shape[:-2]
    state, y = _initial(system, initial), np.empty_like(system.x)
    iterations, residual, met = np.zeros(lead, np.int64), np.zeros(lead), np.ones(lead, bool)
    with np.errstate(over="ignore", invalid="ignore"):
        for t in range(steps):
            step = _step(system, state, t)
            now, count, left, met_now = _solve_step(
                step, rtol=rtol, atol=atol, max_iter=max_iter, damping=damping
            )
            y[..., t, :] = now
            state = _next_state(step, state, now)
            iterations, residual = np.maximum(iterations, count), np.maximum(residual, left)
            met &= met_now
    status = np.where(met, CONVERGED, MAX_ITER)
    wild = ~(np.isfinite(y).all((-2, -1)) & np.isfinite(state).all((-2, -1)))
    status = np.where(wild, np.where(finite_inputs(system, initial), DIVERGED, NONFINITE_INPUT), status)
    return Solved(y, state, iterations, residual, status.astype(np.int8))


def finite_inputs(system: System, initial: Array | None) -> NDArray[np.bool_]:
    """Whether the inputs of each sequence are finite; the mixer's parameters are not looked at."""
    lead = system.x.shape[:-2]
    good = np.ones(lead, bool)
    for array in (system.x, system.delta, system.B, system.C, system.gate, initial):
        if array is not None:
            good &= np.isfinite(array).all(tuple(range(len(lead), array.ndim)))
    return good


def pullback(
    system: System, initial: Array | None, y: Array, y_bar: Array, last_bar: Array | None, **options: Any
) -> tuple[Bars, NDArray[np.int8]]:
    """The exact gradient at the fixed point ``y``, backward in time.

    At each step, with ``G`` the cotangent of ``H_t`` from later steps and ``J`` the step's Jacobian,

        z = y_bar_t + P^T (delta * G B) + J^T z

    is one dense system; then (M) is differentiated once with ``z`` as the cotangent of ``y_t``.

    Parameters
    ----------
    system, initial
        As for `solve`.
    y : (..., T, D) array
        What `solve` found.
    y_bar : (..., T, D) array
    last_bar : (..., D, N) array or None
        Cotangent of the last state; None is zero.
    **options
        Tolerances, which this room has no use for.

    Returns
    -------
    bars : Bars
        Its ``y`` is ``z``.
    status : (...) int8 array

    Examples
    --------
    >>> ones = np.ones((1, 2))
    >>> system = System(
    ...     "fixed", (np.eye(2) / 2,), ones, ones, -np.ones((2, 1)), ones[:, :1], ones[:, :1], 0 * ones[0], None, None
    ... )
    >>> bars, _ = pullback(system, None, ones, ones, None)
    >>> bars.x
    array([[1., 1.]])
    """
    s, dim = system, system.x.shape[-1]
    lead, steps = s.x.shape[:-2], s.x.shape[-2]
    states, made = [_initial(s, initial)], []
    for t in range(steps):
        made.append(_step(s, states[-1], t))
        states.append(_next_state(made[-1], states[-1], y[..., t, :]))
    G = np.zeros_like(states[0]) if last_bar is None else last_bar
    # cotangents of o and u, with which the adjoint of the scan and of the mixing is one call each
    v = np.empty_like(y)
    z, u_bar, o_bar = np.empty_like(y), np.empty_like(y), np.empty_like(y)
    for t in reversed(range(steps)):
        step = made[t]
        from_later = step.delta * _times(G, step.B)
        rhs = y_bar[..., t, :] + _times(np.swapaxes(step.P, -1, -2), from_later)
        matrix = np.eye(dim, dtype=y.dtype) - np.swapaxes(_jacobian(step, y[..., t, :]), -1, -2)
        z[..., t, :] = _solve_dense(matrix, rhs)
        v[..., t, :] = _inner(step, y[..., t, :])
        o_bar[..., t, :] = step.gate * normalize_vjp(s.norm, v[..., t, :], z[..., t, :])[0]
        u_bar[..., t, :] = step.w * o_bar[..., t, :] + from_later
        G = step.decay * (G + o_bar[..., t, :, None] * step.C[..., None, :])
    u = channel_mix(s, y)
    _, delta_bar, A_bar, B_bar, C_bar, skip_bar, initial_bar = selective_scan_vjp(
        u, s.delta, s.A, s.B, s.C, s.skip, states[0], o_bar, last_bar
    )
    assert skip_bar is not None
    v_bar, weight_bar, bias_bar = normalize_vjp(s.norm, v, z)
    gate_bar = None
    if s.gate is not None:
        o, _ = selective_scan(u, s.delta, s.A, s.B, s.C, s.skip, states[0])
        gate_bar = v_bar * o
    x_bar = products.apply_transpose(mixers, s.kind, s.params, u_bar)
    params_bar = products.cotangent(mixers, s.kind, s.params, s.x - y, u_bar)
    status = np.where(np.isfinite(z).all((-2, -1)), CONVERGED, DIVERGED).astype(np.int8).reshape(lead)
    bars = Bars(
        params_bar,
        x_bar,
        delta_bar,
        A_bar,
        B_bar,
        C_bar,
        skip_bar,
        gate_bar,
        weight_bar,
        bias_bar,
        initial_bar,
        z,
    )
    return bars, status


def _solve_dense(matrix: Array, rhs: Array) -> Array:
    """NaN where the matrix is singular or not finite."""
    usable = np.asarray(np.isfinite(matrix).all((-2, -1)))
    safe = np.where(usable[..., None, None], matrix, np.eye(matrix.shape[-1], dtype=matrix.dtype))
    try:
        found = np.linalg.solve(safe, rhs[..., None])[..., 0]
    except np.linalg.LinAlgError:
        return np.full_like(rhs, np.nan)
    return np.where(usable[..., None], found, np.nan)
