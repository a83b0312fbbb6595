"""FP-Mamba with a Kronecker mixer that is made on the way: a product of matrices and a kernel or two a step.

``kernels/mamba_kronecker_make.cu``, ``mamba_kronecker_solve.cu`` and ``mamba_kronecker_pull.cu`` say what is computed;
here is how it is laid out over the device. The host waits for nothing, so that it can be recorded.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fpnumba.gpu import _device, _mamba, _shapes
from fpnumba.gpu._engine import precision, tuned
from fpnumba.gpu._mamba import ACTS, MOST_HELD, MOST_SHARED_RATES, Arguments, Layout, mode_of, norm_of
from fpnumba.gpu._report import store
from fpnumba.reference.mamba import Bars, System

Array = Any

# The largest edge of a factor; warps of a sequence at most; threads of a factor.
MOST_EDGE, MOST_WARPS, MAKERS = 64, 16, 128
# Bytes of trails that are made at once for the way back.
TRAIL_BYTES = 2**26
# Power iterations of a factor, see the kernel.
STEPS = 16
# Shared memory of a multiprocessor, of which each block takes a little more than it asks for.
SHARED_EACH, SHARED_MORE = 228 * 1024, 1024


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def tiles(dtype: str, edges: tuple[int, int]) -> int:
    """Tiles of a matrix of channels: 16 x 8 on tensor cores, in double 8 x 16."""
    tall, wide = (8, 16) if dtype == "float64" else (16, 8)
    return -(-edges[0] // tall) * -(-edges[1] // wide)


class Kronecker(NamedTuple):
    """How a step is laid out: `one` as for a mixer of low rank, but for the threads; and the edges of the factors."""

    one: Layout
    edges: tuple[int, int]
    size: int
    spectral: bool
    act: str

    @property
    def real(self) -> int:
        """Bytes of a number in shared memory."""
        return 8 if self.one.dtype == "float64" else 4

    @property
    def piece(self) -> int:
        """Numbers of 16 bytes."""
        return 16 // self.real

    def matrix(self, rows: int, columns: int) -> int:
        """Numbers of shared memory of a matrix."""
        return _up(rows, 16) * (_up(columns, 16) + self.piece)

    @property
    def factors(self) -> int:
        """Numbers of both factors."""
        return self.edges[0] ** 2 + self.edges[1] ** 2

    @property
    def outputs(self) -> int:
        """What a mixer is made from."""
        return sum(edge * (edge + 1) // 2 + edge for edge in self.edges)

    @property
    def trail(self) -> int:
        """Numbers that are kept of both factors for a step back."""
        return sum(edge**2 + edge + (2 * STEPS + 2) * edge + STEPS + 1 for edge in self.edges)

    def _macros(self) -> dict[str, object]:
        return {"STORE": store(self.one.dtype), "EDGE1": self.edges[0], "EDGE2": self.edges[1]}

    def maker(self, function: str) -> _device.Kernel:
        """A kernel for factors."""
        macros = self._macros()
        macros.update(RANK=1, PRODUCT=0, MADE=1, ACT=ACTS[self.act], SPECTRAL=int(self.spectral))
        # of no concern here
        macros.update(MODE=0, GATED=0, HEADS=0, CHANNELS=1, STATES=4, FULL=0, RESIDENT=1, THREADS=MAKERS)
        return _device.Kernel.of("mamba_kronecker_make.cu", function, macros)

    def maker_shared(self, matrices: int, rows: int) -> int:
        """Bytes of shared memory of a block of a kernel for factors."""
        edge = max(self.edges)
        return self.real * (matrices * self.matrix(edge, edge) + rows * _up(edge, self.piece) + 64)

    def step(self, name: str, resident: int, **more: int) -> _device.Kernel:
        """The kernel of a step of so many blocks on a multiprocessor."""
        one, making = self.one, self.kept and name == "mamba_kronecker_solve"
        macros: dict[str, object] = {
            **self._macros(),
            "RANK": 1,
            "PRODUCT": 0,
            "MODE": one.mode,
            "GATED": int(one.gated),
            "HEADS": int(one.heads),
            "THREADS": one.threads,
            "CHANNELS": one.channels,
            "STATES": one.states,
            "FULL": int(one.full),
            "MADE": 1,
            "ACT": ACTS[self.act] if making else 0,
            "SPECTRAL": int(self.spectral and making),
            "RESIDENT": resident,
        }
        macros.update(more)
        return _device.Kernel.of(f"{name}.cu", name, macros)

    @property
    def _small(self) -> int:
        return _up(2 * self.one.states + 6 * self.one.threads // 32, self.piece)

    @property
    def _matrices(self) -> tuple[int, int]:
        """Numbers of both factors, and of the channels and of them transposed."""
        (d1, d2), of = self.edges, self.matrix
        return of(d1, d1) + of(d2, d2), of(d1, d2) + of(d2, d1)

    def solve_plan(self, resident: int) -> tuple[int, dict[str, int]]:
        """Bytes of shared memory of a block, and macros."""
        one, (squares, flat), dim = self.one, self._matrices, self.edges[0] * self.edges[1]
        more = _up(3 * sum(self.edges) + 2, self.piece) if self.kept else 0
        flat += self.matrix(self.edges[1], self.edges[1]) - self.matrix(self.edges[1], self.edges[0])
        bytes_ = self.real * (self._small + squares + flat + _up(dim, 4) + more)
        if resident > 1:
            bytes_ += self.real * 20 * self._tiles * one.threads
        each = one.channels * one.states
        held, room = self.real * each * one.threads, SHARED_EACH // resident - SHARED_MORE
        registers = self.kept and resident == 1 and each <= 64
        hold = 1 if registers else 2 if bytes_ + held <= room else 0
        return bytes_ + (held if hold == 2 else 0), {"KEPT": int(self.kept), "HOLD": hold}

    @property
    def _tiles(self) -> int:
        """Of a warp, at most."""
        return -(-self._warps // (self.one.threads // 32))

    @property
    def _warps(self) -> int:
        """That could have a tile."""
        return tiles(self.one.dtype, self.edges)

    @property
    def kept(self) -> bool:
        """Whether the factors are kept in registers."""
        return self.one.dtype == "float32" and all(edge in (16, 32) for edge in self.edges)

    def pull_plan(self, resident: int) -> tuple[int, dict[str, int]]:
        """The same of the way back."""
        one, (squares, flat), dim = self.one, self._matrices, self.edges[0] * self.edges[1]
        warps = one.threads // 32
        sums = 2 * one.states * (1 if warps == 1 else 2 * warps)
        small = _up(2 * one.states + 6 * warps + sums, self.piece)
        bytes_ = self.real * (small + squares + 3 * flat + 2 * dim)
        rates = self.real * one.channels * one.states * one.threads
        room = SHARED_EACH // resident - SHARED_MORE
        share = not one.heads and rates <= MOST_SHARED_RATES and bytes_ + rates <= room
        return bytes_ + (rates if share else 0), {"KEPT": int(self.kept), "RATES_SHARED": int(share)}


@lru_cache(256)
def layout(
    dtype: str,
    edges: tuple[int, int],
    mode: int,
    gated: bool,
    heads: bool,
    size: int,
    spectral: bool,
    act: str,
) -> Kronecker:
    """Lay out steps of ``edges[0] * edges[1]`` channels with `size` states each."""
    dim, threads = edges[0] * edges[1], 32 * min(tiles(dtype, edges), MOST_WARPS)
    one = _mamba.layout(dtype, 1, False, mode, gated, heads, dim, size)
    one = one._replace(threads=threads, channels=-(-dim // threads))
    return Kronecker(one, edges, size, spectral, act)


def _layout(s: System, spectral: bool, act: str) -> Kronecker:
    edges = s.params[0].shape[-1], s.params[1].shape[-1]
    about = mode_of(s), s.gate is not None, s.A.ndim == 1
    return layout(_shapes.name(s.x.dtype), edges, *about, s.B.shape[-1], spectral, act)


def makes(s: System, activation: str) -> bool:
    """Whether there are kernels for Kronecker mixers of this system, made from arguments step by step."""
    if not tuned("kronecker") or activation not in ACTS or s.x.dtype.itemsize < 4:
        return False
    if s.x.shape[0] * s.x.shape[2] == 0 or max(p.shape[-1] for p in s.params) > MOST_EDGE:
        return False
    of = _layout(s, True, activation)
    most = max(of.solve_plan(1)[0], of.pull_plan(1)[0], of.maker_shared(3, 3 * STEPS + 8))
    return of.one.channels * of.one.states <= MOST_HELD and most <= _device.shared_limit()


class Made(NamedTuple):
    """What a solve leaves for the way back: arguments of the mixers, norms of those of B and C, and states; and ``u``
    where states will be made again."""

    system: System
    arguments: Array | None
    norms: Array | None
    states: list[Array]
    span: int
    mixed: Array | None


def _resident(of: Kronecker, batch: int) -> int:
    """Blocks that a multiprocessor shall hold."""
    return 2 if of.kept and batch > _device.multiprocessors() else 1


class _Makers:
    """The factors of some steps."""

    def __init__(self, of: Kronecker, given: Arguments, batch: int, steps: int) -> None:
        self._of, self._batch, self._steps = of, batch, np.int64(steps)
        start = np.float64(1.0 / np.sqrt(of.edges[0] * of.edges[1]))
        self.numbers = start, np.float64(given.unit_eps), np.float64(given.alpha_max)

    def launches(
        self,
        mixer: Array,
        fed: Array | None,
        at: int,
        count: int,
        arguments: Array | None,
        *out: Array | None,
    ) -> _device.Repeated:
        """A launch for `count` steps, whose argument 4 is the first of them."""
        width = 0 if fed is None else fed.shape[1]
        places = np.int32(width), np.int32(mixer.shape[2]), np.int32(at)
        sizes = np.int64(self._batch), self._steps, np.int64(0)
        given = (mixer, fed, *sizes, *places, *self.numbers, arguments, *out)
        kernel, shared = self._of.maker("mamba_kronecker_make"), self._of.maker_shared(2, STEPS + 5)
        return _device.Repeated(kernel, 2 * count * self._batch, MAKERS, given, shared=shared)


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
    """As of `fpnumba.gpu._mamba`; of the parameters of `s` only the edges are looked at."""
    xp, (batch, steps), s = _device.xp(), s.x.shape[:2], s._replace(A=_shapes.aligned(s.A)[0])
    of, y = _layout(s, given.spectral, given.activation), _shapes.empty_like(s.x)
    state, size = _shapes.aligned(initial[1])[0], s.B.shape[-1]
    span = max(1, -(-steps * state.nbytes // _mamba.KEPT_BYTES)) if keep else max(steps, 1)
    arguments = xp.empty((batch, steps, of.outputs), y.dtype) if keep else None
    norms = xp.empty((batch, steps, 2), y.dtype) if keep else None
    mixed = _shapes.empty_like(s.x) if keep and span > 1 else None
    kept: list[Array] = []
    if steps == 0:
        told = xp.zeros(batch, np.int64), xp.zeros(batch), xp.ones(batch, bool)
        return y, state, *told, Made(s, arguments, norms, kept, span, mixed)
    iterations, residual, met = _device.several(
        ((batch,), np.int64), ((batch,), np.float64), ((batch,), np.uint8)
    )
    fed = None if given.stacked is None else xp.empty((batch, len(given.stacked)), y.dtype)
    width, _, at_mixer, at_b, at_c = given.places
    factors = None if of.kept else xp.empty((batch, of.factors), y.dtype)
    makers, make = _Makers(of, given, batch, steps), None
    if factors is not None:
        make = makers.launches(given.mixer, fed, int(at_mixer), 1, arguments, factors, None)
    weight, bias, eps = norm_of(s)
    heads = np.int32(s.A.shape[0] if of.one.heads else 1)
    resident = _resident(of, batch)
    shared, plan = of.solve_plan(resident)
    now = _shapes.empty_like(state)
    step = _device.Repeated(
        of.step("mamba_kronecker_solve", resident, **plan),
        batch,
        of.one.threads,
        (
            *(factors, s.x, s.delta, s.A, s.B, s.C, s.skip, s.gate, weight, bias, state, now, y, mixed),
            *(np.int64(steps), np.int64(0), np.int32(size), heads, eps, np.float64(rtol), np.float64(atol)),
            *(np.int64(max_iter), np.float64(damping), iterations, residual, met, given.b, given.c, fed),
            *(width, at_b, at_c, given.numbers[2], norms),
            *(given.mixer, np.int32(given.mixer.shape[2]), at_mixer, *makers.numbers, arguments),
        ),
        shared=shared,
    )
    before = initial[0]
    for t in range(steps):
        if keep and t % span == 0:
            kept.append(state)
            now = _shapes.empty_like(state)
        elif t:
            now = state
        if fed is not None:
            _device.product(before, given.stacked, fed, transposed=(False, True), precision=precision())
            if given.step_argument is not None:
                given.steps.delta(given.step_argument[:, t] + fed[:, given.at_steps], s.delta[:, t])
        if make is not None:
            make(_4=np.int64(t))
        step(_10=state, _11=now, _15=np.int64(t))
        state, before = now, y[:, t]
    made = Made(s, arguments, norms, kept, span, mixed)
    return y, state, iterations, residual, met.astype(bool), made


class _Back(_mamba._Back):
    """The kernel `mamba_kronecker_pull`, and what it adds up over the steps."""

    def __init__(
        self,
        made: Made,
        of: Kronecker,
        given: Arguments,
        y: Array,
        y_bar: Array,
        options: tuple[float, int],
        out: tuple[Any, ...],
    ) -> None:
        s, (batch, steps, _), resident = made.system, y.shape, _resident(of, len(y))
        super().__init__(s, of.one._replace(resident=resident), batch, steps)
        shared, plan = of.pull_plan(resident)
        kernel, (rtol, max_iter) = of.step("mamba_kronecker_pull", resident, **plan), options
        width, _, _, at_b, at_c = given.places
        weight, _, eps = norm_of(s)
        heads = np.int32(s.A.shape[0] if of.one.heads else 1)
        factors_bar, x_bar, met = out
        arguments = (
            *(None, s.x, s.delta, s.A, s.B, s.C, s.skip, s.gate, weight, None, None, y, y_bar, None),
            *(np.int64(batch), np.int64(steps), np.int64(0), np.int32(s.B.shape[-1]), heads, eps),
            *(np.float64(rtol), np.int64(max_iter), None, self.z, self.gate_bar, self.delta_bar),
            *(self.B_bar, self.C_bar, self.rates, self.skip, self.weight, self.bias, made.norms),
            *(width, at_b, at_c, given.numbers[2], x_bar, factors_bar, None, met),
        )
        self._step = _device.Repeated(kernel, self.blocks, of.one.threads, arguments, shared=shared)

    def pull(
        self, t: int, factors: Array, past: Array, G: Array, more: Array | None, fed_bar: Array
    ) -> Array:
        """Step `t`; returns the cotangent of the state before it."""
        before = _shapes.empty_like(G)
        self._step(_0=factors, _9=past, _10=G, _13=more, _16=np.int64(t), _22=before, _39=fed_bar)
        return before


def pull_made(
    made: Made,
    given: Arguments,
    y: Array,
    y_bar: Array,
    last_bar: Array | None,
    *,
    rtol: float,
    max_iter: int,
) -> tuple[Bars, Array, Array]:
    """As of `fpnumba.gpu._mamba`, and whether the adjoint of every step got below its tolerance; (B,)."""
    s, xp, (batch, steps, dim) = made.system, _device.xp(), y.shape
    of = _layout(s, given.spectral, given.activation)
    x_bar, mixer_bar = _shapes.empty_like(y), _shapes.empty_like(given.mixer)
    met, factors_bar = xp.ones(batch, np.uint8), xp.empty((batch, of.factors), y.dtype)
    back = _Back(made, of, given, y, y_bar, (rtol, max_iter), (factors_bar, x_bar, met))
    width, _, at_mixer, *_ = given.places
    fed_bar = xp.empty((steps, batch, int(width)), y.dtype)
    G = xp.zeros((batch, dim, s.B.shape[-1]), y.dtype) if last_bar is None else _shapes.aligned(last_bar)[0]
    chunk = max(1, min(steps, TRAIL_BYTES // max(1, batch * of.trail * y.dtype.itemsize)))
    factors, trails = (xp.empty((chunk, batch, n), y.dtype) for n in (of.factors, of.trail))
    makers = _Makers(of, given, batch, steps)
    unit, alpha = np.float64(given.unit_eps), np.float64(given.alpha_max)
    through = _device.Repeated(
        of.maker("mamba_kronecker_back"),
        2 * batch,
        MAKERS,
        (
            *(made.arguments, factors_bar, None, np.int64(steps), np.int64(0), width),
            *(np.int32(mixer_bar.shape[2]), at_mixer, unit, alpha, mixer_bar, None),
        ),
        shared=of.maker_shared(3, 3 * STEPS + 8),
    )
    more, begin = None, steps
    for first in reversed(range(0, steps, made.span)):
        last = min(first + made.span, steps)
        pasts = _mamba.states(
            s, y if made.mixed is None else made.mixed, first, last, made.states[first // made.span]
        )
        for t in reversed(range(first, last)):
            if t < begin:
                end, begin = begin, max(0, begin - chunk)
                arguments = (made.arguments, None, -1, end - begin, None, factors, trails)
                makers.launches(*arguments)(_4=np.int64(begin))
            G = back.pull(t, factors[t - begin], pasts[t - first], G, more, fed_bar[t])
            through(_2=trails[t - begin], _4=np.int64(t), _11=fed_bar[t])
            if given.step_argument is not None:
                fed_bar[t][:, given.at_steps] = given.steps.pull(s.delta[:, t], back.step_bar(t))[1]
            if given.stacked is not None:
                more = _device.product(fed_bar[t], given.stacked, more, precision=precision())
    return back.bars(mixer_bar, x_bar, G), fed_bar.swapaxes(0, 1), met.astype(bool)


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    shapes: list[tuple[Any, ...]] = [
        # dtype, edges, mode, gated, heads, size, spectral, activation
        ("float32", (32, 32), 2, False, False, 16, True, "silu"),
        ("float32", (16, 32), 1, True, True, 64, False, "relu"),
        ("float64", (4, 6), 0, True, False, 5, True, "identity"),
        ("float32", (32, 64), 2, False, False, 16, True, "silu"),
    ]
    found = []
    for n, shape in enumerate(shapes):
        of = layout(*shape)
        found += [of.maker(f"mamba_kronecker_{name}") for name in ("make", "back")]
        for resident in (1, 2) if n == 0 else (1,):
            found.append(of.step("mamba_kronecker_solve", resident, **of.solve_plan(resident)[1]))
            found.append(of.step("mamba_kronecker_pull", resident, **of.pull_plan(resident)[1]))
    return found
