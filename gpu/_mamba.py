"""FP-Mamba with a mixer of low rank: a kernel for all steps of the solve, and one for the adjoint of a step.

``kernels/mamba_solve.cu`` and ``kernels/mamba_pull.cu`` say what is computed; here is how it is laid out over the
device.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fpnumba.gpu import _device, _shapes, mixers, scan
from fpnumba.gpu._engine import precision, tuned
from fpnumba.gpu._report import store
from fpnumba.reference.mamba import Bars, System, channel_mix

Array = Any

# The largest rank, and the most threads of a block.
MOST_RANK, BLOCK = 8, 512
# Numbers of the state's cotangents that a thread adds up in registers at most.
MOST_HELD = 128
# With rank one in float32, measured with N = 16: up to so many channels, threads of a block and blocks on a
# multiprocessor; first where there are fewer sequences than multiprocessors.
FEW, LIGHT = ((1024, (1024, 1)),), ((512, (256, 4)), (1024, (512, 2)))
# Bytes of cotangents of the rates that are added up in shared memory.
MOST_SHARED_RATES = 128 * 1024


# Activations by the numbers of the kernels.
ACTS = {None: 0, "identity": 0, "silu": 1, "relu": 2}
# Threads of a block that makes states again, and numbers of a channel's state that it takes.
STATE_THREADS, MOST_STATES = 256, 1024
# Bytes of states that a gradient keeps; beyond that they are made again from every so many.
KEPT_BYTES = 2**31


class Layout(NamedTuple):
    """How a step is laid out over a block."""

    dtype: str
    rank: int
    product: bool
    mode: int
    gated: bool
    heads: bool
    threads: int
    channels: int
    states: int
    full: bool  # whether N is `states`
    resident: int = 1  # blocks that a multiprocessor shall hold
    act: str | None = None  # of the arguments that the mixer is made from; None where it is given

    def kernel(self, name: str, function: str = "") -> _device.Kernel:
        """A kernel of the file `name`; the one of that name unless told."""
        return _kernel(self, name, function)

    @property
    def macros(self) -> dict[str, object]:
        """Those of all kernels."""
        return {
            "STORE": store(self.dtype),
            "RANK": self.rank,
            "PRODUCT": int(self.product),
            "MODE": self.mode,
            "GATED": int(self.gated),
            "HEADS": int(self.heads),
            "THREADS": self.threads,
            "CHANNELS": self.channels,
            "STATES": self.states,
            "FULL": int(self.full),
            "MADE": int(self.act is not None),
            "ACT": ACTS[self.act],
        }

    @property
    def group(self) -> int:
        """Channels that the threads of a block have at a time."""
        vector = min(self.states, 16 // self._real) if self.full else 1
        return self.threads // min(32, self.states // vector)

    @property
    def rates(self) -> int:
        """Numbers of shared memory for the cotangents of the rates; none where they would be too many."""
        count = (1 if self.heads else self.states) * self.channels * self.threads
        return count if count * self._real <= MOST_SHARED_RATES else 0

    @property
    def _real(self) -> int:
        return 8 if self.dtype == "float64" else 4

    def shared(self, more: int, *sums: int) -> int:
        """Bytes of shared memory: rows of B, C and the B before, `more` numbers, and rounds of so many sums."""
        warps = self.threads // 32
        each = [n if warps == 1 else 2 * n * warps for n in sums]
        return (3 * self.states + more + sum(each)) * self._real


@lru_cache(1024)
def _kernel(one: Layout, name: str, function: str) -> _device.Kernel:
    macros = {**one.macros, "RESIDENT": one.resident}
    if name == "mamba_pull":
        macros["RATES_SHARED"] = int(one.rates > 0)
    return _device.Kernel.of(f"{name}.cu", function or name, macros)


@lru_cache(256)
def layout(
    dtype: str,
    rank: int,
    product: bool,
    mode: int,
    gated: bool,
    heads: bool,
    dim: int,
    size: int,
    few: bool = False,
) -> Layout:
    """Lay out steps of `dim` channels with `size` states each; `few` sequences leave multiprocessors without one."""
    states = 4
    while states < size:
        states *= 2
    most, resident = BLOCK, 1
    if rank == 1 and dtype == "float32" and states <= 16:
        shapes = (FEW if few else ()) + LIGHT
        most, resident = next((shape for up_to, shape in shapes if dim <= up_to), (BLOCK, 1))
    threads = min(most, max(32, -(-dim // 32) * 32))
    return Layout(
        *(dtype, rank, product, mode, gated, heads, threads, -(-dim // threads), states),
        full=states == size,
        resident=resident,
    )


def mode_of(s: System) -> int:
    """The norm by the number of the kernels."""
    return 0 if s.norm is None else 2 if s.norm.centred else 1


def _layout(s: System) -> Layout:
    about = (s.kind == "householder", mode_of(s), s.gate is not None, s.A.ndim == 1)
    sizes = s.x.shape[-1], s.B.shape[-1], len(s.x) <= _device.multiprocessors()
    return layout(_shapes.name(s.x.dtype), s.params[1].shape[2], *about, *sizes)


def serves(s: System) -> bool:
    """Whether these kernels serve a system."""
    if s.kind not in ("dplr", "householder") or not tuned(s.kind, None) or s.x.shape[0] * s.x.shape[2] == 0:
        return False
    if not 1 <= s.params[1].shape[2] <= MOST_RANK or s.x.dtype.itemsize < 4:
        return False
    one = _layout(s)
    return one.channels * one.states <= MOST_HELD


def norm_of(s: System) -> tuple[Array, Array | None, np.float64]:
    """Weight, bias and eps of the norm as the kernels take them."""
    if s.norm is None:
        return _device.xp().ones(s.x.shape[-1], s.x.dtype), None, np.float64(0)
    return s.norm.weight, s.norm.bias, np.float64(s.norm.eps)


def _inputs(s: System) -> tuple[Any, ...]:
    return *s.params, s.x, s.delta, s.A, s.B, s.C, s.skip, s.gate


def _heads(s: System) -> np.int32:
    return np.int32(s.A.shape[0] if s.A.ndim == 1 else 1)


def _aligned(s: System) -> System:
    """With rows of ``A`` that begin where the widest access may."""
    return s._replace(A=_shapes.aligned(s.A)[0])


class Arguments(NamedTuple):
    """What the linear maps of a layer say, from which a mixer, of rank one or Kronecker, ``B`` and ``C`` are made.

    Attributes
    ----------
    mixer : (B, T, D + 1) array
        Of ``u``, then of ``alpha``, as far as ``x_t`` decides; ``b, c`` (B, T, N) alike. Kronecker: of the triangles of
        both factors, then of their diagonals. What comes after is not looked at, and its cotangent is zero.
    b, c : (B, T, N) arrays
    stacked : (width, D) array or None
        The linear maps of ``y_{t-1}``, of those that see it in this order: mixer, b, c.
    seen : tuple of str
        Which do.
    activation : str
    alpha_max, unit_eps : float
        ``alpha = alpha_max sigmoid(.)``; of the length of ``u``. Kronecker: the scale of the first factor; of the
        lengths of rows.
    bc_eps : float or None
        Of the lengths of ``b`` and ``c``; None where they are not normalised.
    spectral : bool
        Kronecker: whether a factor is divided by its largest eigenvalue.
    steps : object or None
        From arguments to ``delta``, where that sees ``y_{t-1}``, last in `stacked`: its ``delta(argument, out)`` and
        ``pull(delta, delta_bar)``, which returns cotangents of what softplus sees and of the argument.
    step_argument : (B, T, n) array or None
        Of ``delta``, as far as ``x_t`` decides.
    """

    mixer: Array
    b: Array
    c: Array
    stacked: Array | None
    seen: tuple[str, ...]
    activation: str
    alpha_max: float
    unit_eps: float
    bc_eps: float | None
    spectral: bool = True
    steps: Any = None
    step_argument: Array | None = None

    @property
    def at_steps(self) -> slice:
        """Where in what ``y_{t-1}`` says the argument of ``delta`` stands."""
        assert self.stacked is not None
        assert self.step_argument is not None
        return slice(len(self.stacked) - self.step_argument.shape[2], None)

    @property
    def places(self) -> tuple[np.int32, ...]:
        """The width of what ``y_{t-1}`` says and of `mixer`, and where in the former each stands."""
        at, width = [], 0
        for name, array in (("mixer", self.mixer), ("b", self.b), ("c", self.c)):
            seen = name in self.seen
            at.append(width if seen else -1)
            width += array.shape[2] if seen else 0
        width += 0 if self.step_argument is None else self.step_argument.shape[2]
        return tuple(np.int32(n) for n in (width, self.mixer.shape[2], *at))

    @property
    def cotangents(self) -> tuple[tuple[np.int32, ...], int]:
        """Where the cotangents of all arguments of a row stand if those of what sees ``y_{t-1}`` come first, as in
        `stacked`: of `mixer`, `b` and `c`; and how many they are."""
        width, _, *at = self.places
        total, places = int(width), []
        for place, array in zip(at, (self.mixer, self.b, self.c), strict=True):
            places.append(place if place >= 0 else np.int32(total))
            total += array.shape[2] if place < 0 else 0
        return tuple(places), total

    @property
    def numbers(self) -> tuple[np.float64, np.float64, np.float64]:
        """As the kernels take them."""
        bc = -1.0 if self.bc_eps is None else self.bc_eps
        return np.float64(self.alpha_max), np.float64(self.unit_eps), np.float64(bc)


class Made(NamedTuple):
    """What a solve leaves for the way back: parameters that it made, and states."""

    system: System
    arguments: Array | None
    norms: Array | None
    seen: Array | None
    states: list[Array]
    span: int


# What stands in the place of arguments where parameters are given.
_GIVEN = (None,) * 4 + (np.int32(0),) * 2 + (np.int32(-1),) * 3 + (np.float64(0),) * 3 + (None,) * 3


class _Walk:
    """The kernel `mamba_solve` over some of the steps."""

    def __init__(self, s: System, one: Layout, y: Array, options: tuple[float, float, int, float]) -> None:
        batch, steps, dim = s.x.shape
        rank, size, gram = one.rank, s.B.shape[-1], one.rank * (one.rank - 1) // 2 if one.product else 0
        told = _device.several(((batch,), np.int64), ((batch,), np.float64), ((batch,), np.uint8))
        self.iterations, self.residual, self.met = told
        weight, bias, eps = norm_of(s)
        rtol, atol, max_iter, damping = options
        sums = 1 + 3 * rank + gram, 1 + 2 * rank + rank * (rank + 1) // 2 + rank**2, rank
        self._shared = one.shared(2 * rank + 4 + one.threads // 16 + one.channels * one.threads, *sums)
        self._kernel, self._threads, self._batch = one.kernel("mamba_solve"), one.threads, batch
        self._before = (*_inputs(s), weight, bias)
        self._y, self._steps = y, np.int64(steps)
        self._launch: _device.Repeated | None = None
        self._after = (
            *(np.int32(dim), np.int32(size), _heads(s), eps, np.float64(rtol), np.float64(atol)),
            *(np.int64(max_iter), np.float64(damping), *told),
        )

    def go(self, first: int, last: int, before: Array, state: Array, made: tuple[Any, ...] = _GIVEN) -> None:
        """Steps `first` to `last`, from the state `before` to `state`."""
        if self._launch is None:
            steps = self._steps, np.int64(first), np.int64(last)
            arguments = (*self._before, before, state, self._y, *steps, *self._after, *made)
            shape = self._kernel, self._batch, self._threads
            self._launch = _device.Repeated(*shape, arguments, shared=self._shared)
        self._launch(_11=before, _12=state, _15=np.int64(first), _16=np.int64(last))


def solve(
    s: System, initial: Array, *, rtol: float, atol: float, max_iter: int, damping: float
) -> tuple[Array, Array, Array, Array, Array]:
    """All steps: ``y``, the last state, iterations, residual, and whether the tolerance was met."""
    y, state = _shapes.empty_like(s.x), _shapes.empty_like(initial)
    s, (initial,) = _aligned(s), _shapes.aligned(initial)
    walk = _Walk(s, _layout(s), y, (rtol, atol, max_iter, damping))
    if s.x.shape[1] == 0:
        xp, batch = _device.xp(), len(s.x)
        return y, initial.copy(), xp.zeros(batch, np.int64), xp.zeros(batch), xp.ones(batch, bool)
    walk.go(0, s.x.shape[1], initial, state)
    return y, state, walk.iterations, walk.residual, walk.met.astype(bool)


def makes(s: System, activation: str) -> bool:
    """Whether mixers of this system can be made from arguments, step by step."""
    return serves(s) and s.params[1].shape[2] == 1 and activation in ACTS


def solve_made(
    s: System,
    given: Arguments,
    initial: tuple[Array, Array],
    *,
    keep: bool,
    rtol: float,
    atol: float,
    max_iter: int,
    damping: float,
) -> tuple[Array, Array, Array, Array, Array, Made]:
    """The same where step ``t`` is made from arguments and ``y_{t-1}``: a product of matrices and a kernel each.

    The mixer, ``B`` and ``C`` of `s` are written, and ``delta`` where it sees ``y_{t-1}``; `initial` is ``y_0`` and
    ``H_0``.
    """
    xp, (batch, steps), s = _device.xp(), s.x.shape[:2], _aligned(s)
    one = _layout(s)._replace(act=given.activation)
    y = _shapes.empty_like(s.x)
    walk = _Walk(s, one, y, (rtol, atol, max_iter, damping))
    arguments, seen = (_shapes.empty_like(s.x) if keep else None for _ in range(2))
    norms = xp.empty((batch, steps, 3), y.dtype) if keep else None
    fed = None
    if given.stacked is not None:
        fed = xp.empty((batch, len(given.stacked)), y.dtype)
    made = (given.mixer, given.b, given.c, fed, *given.places, *given.numbers, arguments, norms, seen)
    before, state = initial[0], *_shapes.aligned(initial[1])
    each = state.nbytes
    span = max(1, -(-steps * each // KEPT_BYTES)) if keep else steps
    states, t = [], 0
    while t < steps:
        if keep and t % span == 0:
            states.append(state)
            now = _shapes.empty_like(state)
        else:
            now = state if t else _shapes.empty_like(state)
        last = t + 1 if fed is not None else min(steps, t - t % span + span)
        if fed is not None:
            _device.product(before, given.stacked, fed, transposed=(False, True), precision=precision())
            if given.step_argument is not None:
                given.steps.delta(given.step_argument[:, t] + fed[:, given.at_steps], s.delta[:, t])
        walk.go(t, last, state, now, made)
        state, before, t = now, y[:, last - 1], last
    if steps == 0:
        told = xp.zeros(batch, np.int64), xp.zeros(batch), xp.ones(batch, bool)
        return y, state, *told, Made(s, arguments, norms, seen, states, span)
    return (
        y,
        state,
        walk.iterations,
        walk.residual,
        walk.met.astype(bool),
        Made(s, arguments, norms, seen, states, span),
    )


class _Back:
    """The kernel `mamba_pull`, and what it adds up over the steps."""

    def __init__(self, s: System, one: Layout, batch: int, steps: int, *, given: bool = False) -> None:
        xp, dim, size, dtype = _device.xp(), s.x.shape[-1], s.B.shape[-1], s.x.dtype
        self.blocks = min(batch, one.resident * _device.multiprocessors())
        self.rates = xp.zeros((self.blocks, dim) if one.heads else (self.blocks, dim, size), dtype)
        self.skip, self.weight, self.bias = xp.zeros((3, self.blocks, dim), dtype)
        gram = one.rank * (one.rank - 1) // 2 if one.product else 0
        sums = 2 * one.rank + gram, 1, 3 + 5 * one.rank + one.rank * (one.rank + 1) // 2, 2 * one.states, 2
        self._shared = one.shared(3 * one.rank + one.rates + 2 * one.channels * one.threads, *sums)
        self._kernel, self._threads = one.kernel("mamba_pull"), one.threads
        self._system, self._one = s, one
        self.z, self.delta_bar = (xp.empty((batch, steps, dim), dtype) for _ in range(2))
        # of a mixer that is given; through one that is made, the kernel goes on
        self.u_bar = _shapes.empty_like(self.z) if given else None
        self.gate_bar = None if s.gate is None else _shapes.empty_like(self.z)
        self.B_bar, self.C_bar = _shapes.empty_like(s.B), _shapes.empty_like(s.C)
        weight, _, eps = norm_of(s)
        self._inputs = (*_inputs(s), weight)
        self._launch: _device.Repeated | None = None
        self._sizes = np.int64(batch), np.int64(steps), np.int32(dim), np.int32(size), _heads(s), eps

    def go(
        self, t: int, past: Array, G: Array, y: Array, y_bar: Array, more: Array | None, made: tuple[Any, ...]
    ) -> Array:
        """Step `t`; returns the cotangent of the state before it."""
        before = _shapes.empty_like(G)
        if self._launch is None:
            batch, steps, *rest = self._sizes
            arguments = (
                *(*self._inputs, past, G, y, y_bar, more, batch, steps, np.int64(t), *rest),
                *(before, self.z, self.u_bar, self.gate_bar, self.delta_bar, self.B_bar, self.C_bar),
                *(self.rates, self.skip, self.weight, self.bias, *made),
            )
            shape = self._kernel, self.blocks, self._threads
            self._launch = _device.Repeated(*shape, arguments, shared=self._shared)
            self._count = len(arguments)
        fed_bar, _, later, earlier = made[-4:]
        last = self._count - 4
        changed = {f"_{last}": fed_bar, f"_{last + 2}": later, f"_{last + 3}": earlier}
        self._launch(_10=past, _11=G, _14=more, _17=np.int64(t), _22=before, **changed)
        return before

    def step_bar(self, t: Any) -> Array:
        """The cotangent of ``delta`` at some of the steps."""
        bar = self.delta_bar[:, t]
        return bar.reshape(*bar.shape[:-1], len(self._system.A), -1).sum(-1) if self._one.heads else bar

    def bars(self, params: Any, x_bar: Array, G: Array) -> Bars:
        """All that was found."""
        s, A_bar, delta_bar = self._system, self.rates.sum(0), self.step_bar(slice(None))
        if self._one.heads:
            A_bar = A_bar.reshape(len(s.A), -1).sum(-1)
        normed = s.norm is not None
        return Bars(
            *(params, x_bar, delta_bar, A_bar, self.B_bar, self.C_bar, self.skip.sum(0), self.gate_bar),
            self.weight.sum(0) if normed else None,
            self.bias.sum(0) if s.norm is not None and s.norm.bias is not None else None,
            *(G, self.z),
        )


_NOT_MADE = (None, None, *(np.int32(0),) * 2, *(np.int32(-1),) * 3, *(np.float64(0),) * 3, *(None,) * 6)


def pull(
    s: System, past: Array, y: Array, y_bar: Array, G: Array, *, rtol: float, max_iter: int
) -> tuple[Bars, Array]:
    """The cotangents of one step; ``y`` of them is ``z``. `rtol` and `max_iter` are of no use: nothing iterates."""
    batch, s, (past, G) = len(s.x), _aligned(s), _shapes.aligned(past, G)
    back = _Back(s, _layout(s), batch, 1, given=True)
    before = back.go(0, past, G, y, y_bar, None, _NOT_MADE)
    params = mixers.cotangent(s.kind, s.params, s.x - y, back.u_bar)
    bars = back.bars(params, mixers.apply_transpose(s.kind, s.params, back.u_bar), before)
    return bars, _device.xp().ones(batch, bool)


def pull_made(
    made: Made, given: Arguments, y: Array, y_bar: Array, last_bar: Array | None
) -> tuple[Bars, Array]:
    """The exact gradient behind `solve_made`, backward in time.

    Returns
    -------
    bars : Bars
        Its ``params`` are the cotangent of ``given.mixer`` alone; its ``B`` and ``C`` are those of ``given.b`` and
        ``given.c``, its ``y`` is ``z``.
    fed_bar : (B, T, width) array
        The cotangents of what ``y_{t-1}`` says at each step.
    """
    s, xp, (batch, steps, dim) = made.system, _device.xp(), y.shape
    one = _layout(s)._replace(act=given.activation)
    back = _Back(s, one, batch, steps)
    x_bar, mixer_bar = _shapes.empty_like(y), _shapes.empty_like(given.mixer)
    width = 0 if given.stacked is None else len(given.stacked)
    fed_bar = xp.empty((steps, batch, width), y.dtype)
    G = xp.zeros((batch, dim, s.B.shape[-1]), y.dtype) if last_bar is None else _shapes.aligned(last_bar)[0]
    later, earlier = xp.zeros((2, batch, dim), y.dtype)
    if last_bar is not None and steps:
        later[...] = (G * s.B[:, -1, None]).sum(-1)
    more, u = None, channel_mix(s, y, mixers) if made.span > 1 else y
    for first in reversed(range(0, steps, made.span)):
        last = min(first + made.span, steps)
        pasts = states(s, u, first, last, made.states[first // made.span])
        for t in reversed(range(first, last)):
            rest = made.arguments, made.norms, *given.places, *given.numbers, x_bar, mixer_bar, fed_bar[t]
            G = back.go(t, pasts[t - first], G, y, y_bar, more, (*rest, made.seen, later, earlier))
            later, earlier = earlier, later
            if given.step_argument is not None:
                fed_bar[t][:, given.at_steps] = given.steps.pull(s.delta[:, t], back.step_bar(t))[1]
            if given.stacked is not None:
                more = _device.product(fed_bar[t], given.stacked, more, precision=precision())
    return back.bars(mixer_bar, x_bar, G), fed_bar.swapaxes(0, 1)


def at(array: Array, t: int) -> Array:
    """One step of an array, contiguous."""
    return _device.xp().ascontiguousarray(array[:, t : t + 1])


def states(s: System, u: Array, first: int, last: int, state: Array) -> list[Array]:
    """The states before the steps `first` to `last`; `state` is that before the first, and ``u = Q (x - y) + y``."""
    return [state, *later_states(s, u, first, last - 1, state)]


def later_states(s: System, u: Array, first: int, last: int, state: Array) -> Array:
    """The states after the steps `first` to `last`, (last - first, B, D, N); `state` is that before the first."""
    count, (batch, steps, dim), size = max(0, last - first), u.shape, s.B.shape[-1]
    after = _shapes.empty_like(u, count, *state.shape)
    of = layout(_shapes.name(u.dtype), 1, False, 0, False, s.A.ndim == 1, dim, size)
    of = of._replace(threads=STATE_THREADS, channels=1)
    if of.states > MOST_STATES:
        for t in range(first, last):
            now, delta, B, C = (at(a, t) for a in (u, s.delta, s.B, s.C))
            state = after[t - first] = scan.selective_scan(now, delta, s.A, B, C, None, state)[1]
    elif count:
        u, A, B, before = _shapes.aligned(u, s.A, s.B, state)
        sizes = *(np.int64(n) for n in (batch, steps, first, count)), np.int32(dim), np.int32(size)
        arguments = (u, s.delta, A, B, before, after, *sizes, _heads(s))
        blocks = batch * -(-dim // of.group)
        _device.launch(of.kernel("mamba_states"), blocks, STATE_THREADS, arguments)
    return after


class Total:
    """Cotangents of the steps of a system, put together."""

    def __init__(self, s: System) -> None:
        self._system, self._steps = s, dict[int, Bars]()
        self._sums: tuple[Any, ...] = ()

    def add(self, bars: Bars, t: int) -> None:
        """Those of step `t`."""
        self._steps[t] = bars
        shared: tuple[Any, ...] = (bars.A, bars.skip, bars.weight, bars.bias)
        if self._sums:
            shared = tuple(None if a is None else a + b for a, b in zip(shared, self._sums, strict=True))
        self._sums = shared

    def bars(self, G: Array, z: Array) -> Bars:
        """All of them; `G` is that of the initial state."""
        s, xp, steps = self._system, _device.xp(), [self._steps[t] for t in sorted(self._steps)]
        if not steps:
            zero = xp.zeros_like
            norm = (None, None) if s.norm is None else (s.norm.weight, s.norm.bias)
            weight, bias = (None if a is None else zero(a) for a in norm)
            gate = None if s.gate is None else zero(s.gate)
            params = _zeros(s.kind, s.params)
            x, delta, A, B, C, skip = (zero(a) for a in (s.x, s.delta, s.A, s.B, s.C, s.skip))
            return Bars(params, x, delta, A, B, C, skip, gate, weight, bias, G, z)

        def along(name: str) -> Array:
            parts = [getattr(one, name) for one in steps]
            return parts[0] if len(parts) == 1 or parts[0] is None else _device.joined(parts, 1)

        A, skip, weight, bias = self._sums
        params = _joined(s.kind, s.params, [one.params for one in steps])
        x, delta, B, C, gate = (along(name) for name in ("x", "delta", "B", "C", "gate"))
        return Bars(params, x, delta, A, B, C, skip, gate, weight, bias, G, z)


def _zeros(kind: Any, params: Any) -> Any:
    if kind == "mixture":
        return [_zeros(one, theirs) for one, theirs in params]
    return tuple(_device.xp().zeros_like(p) for p in params)


def _joined(kind: Any, params: Any, parts: list[Any]) -> Any:
    """Cotangents of parameters, step after step."""
    if kind == "mixture":
        return [_joined(one, theirs, [p[i] for p in parts]) for i, (one, theirs) in enumerate(params)]
    if kind == "fixed":
        return (sum(p[0] for p in parts[1:]) + parts[0][0],) if len(parts) > 1 else parts[0]
    if len(parts) == 1:
        return parts[0]
    return tuple(_device.joined(list(each), 1) for each in zip(*parts, strict=True))


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    shapes = [
        # dtype, rank, product, mode, gated, heads, dim, size
        ("float32", 1, True, 2, False, False, 1024, 16),
        ("float32", 4, True, 2, True, False, 1024, 16),
        ("float32", 8, False, 1, False, True, 512, 64),
        ("float64", 2, True, 0, True, False, 96, 5),
        ("float32", 1, False, 2, False, False, 4096, 16),
        ("float32", 1, True, 2, False, False, 512, 16),
        ("float32", 1, True, 2, False, False, 1024, 16, True),
    ]
    layouts = [layout(*shape) for shape in shapes]
    layouts += [layouts[n]._replace(act="silu") for n in (0, -2, -1)]
    layouts.append(layouts[0]._replace(act="relu", gated=True, heads=True))
    found = [one.kernel(name) for one in layouts for name in ("mamba_solve", "mamba_pull")]
    plain = [
        layout(dtype, 1, False, 0, False, heads, 1024, size)._replace(threads=STATE_THREADS, channels=1)
        for dtype, heads, size in (("float32", False, 16), ("float32", True, 64), ("float64", False, 5))
    ]
    return found + [one.kernel("mamba_states") for one in plain]
