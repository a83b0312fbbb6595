"""FP-Mamba's map applied to all steps at once, with a mixer that is made on the way.

A product of matrices, the kernels of ``kernels/mamba_rows.cu``, and the selective scan.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fpnumba.gpu import _device, _mamba_kronecker_rows, _shapes, scan
from fpnumba.gpu._advance import most
from fpnumba.gpu._columns import column_sums
from fpnumba.gpu._engine import precision
from fpnumba.gpu._mamba import Arguments, Layout, later_states, layout, mode_of, norm_of
from fpnumba.gpu._report import store
from fpnumba.reference.mamba import Bars, System

Array = Any

# Threads of a row at most: of the kernels of the mixer, of the norm, where every meeting of a block costs, and of its
# adjoint; and blocks on a multiprocessor of the last, which adds up over rows.
BLOCK, NORM, NORM_BACK, BLOCKS_EACH = 256, 64, 128, 8
# Channels of a thread at most, as long as a block may have threads.
WIDEST, LARGEST = 16, 1024


class Rows(NamedTuple):
    """How rows are laid out: `one` as for steps, but for the threads; channels of an access, and the dtype of what
    linear maps say."""

    one: Layout
    each: int
    said: str

    def kernel(self, name: str) -> _device.Kernel:
        """One of the kernels."""
        return _kernel(self, name)

    def launch(self, name: str, blocks: int, arguments: tuple[Any, ...], sums: int) -> None:
        """Launch it with room for so many sums over a block."""
        warps, real = self.one.threads // 32, 8 if self.one.dtype == "float64" else 4
        shared = real * sums * 2 * warps
        _device.launch(self.kernel(name), blocks, self.one.threads, arguments, shared=shared)


@lru_cache(256)
def _kernel(rows: Rows, name: str) -> _device.Kernel:
    macros = {**rows.one.macros, "EACH": rows.each, "SAID": store(rows.said)}
    return _device.Kernel.of("mamba_rows.cu", name, macros)


@lru_cache(256)
def _rows(
    most: int, dtype: str, said: str, mode: int, gated: bool, dim: int, activation: str, *strides: int
) -> Rows:
    found = layout(dtype, 1, False, mode, gated, False, dim, 4)
    each = 2 if dtype == "float64" else 4
    while any(n % each for n in (dim, *strides)):
        each //= 2
    threads = _shapes.threads(dim, each, max(most, min(LARGEST, -(-dim // (WIDEST * 32)) * 32)))
    channels = each * -(-dim // (threads * each))
    one = found._replace(threads=threads, channels=channels, full=False, act=activation)
    return Rows(one, each, said)


class _Mix:
    """The mixing half of an application with a mixer of rank one; as `fpnumba.gpu._mamba_kronecker_rows.Mix`."""

    def __init__(self, s: System, given: Arguments, fed: Array | None, y: Array | None) -> None:
        self._s, self._given, (batch, steps, dim) = s, given, s.x.shape
        self._count = batch * steps
        about = _shapes.name(s.x.dtype), _shapes.name(given.mixer.dtype)
        width, stride, *at = given.places
        (to_mixer, *_), total = given.cotangents
        strides = int(width), int(stride), max(int(at[0]), 0), int(to_mixer), total
        self._rows = _rows(BLOCK, *about, 0, False, dim, given.activation, *strides)
        self.mixed, self.B, self.C = (_shapes.empty_like(a) for a in (s.x, s.B, s.C))
        sizes = np.int32(dim), np.int32(s.B.shape[-1])
        self._arguments = (
            *(given.mixer, given.b, given.c, fed, width, stride, *at, s.x, y, *sizes),
            *given.numbers,
        )
        self._rows.launch("mix_rows", self._count, (*self._arguments, self.mixed, self.B, self.C), 2)

    def pull(self, mixed_bar: Array, B_bar: Array, C_bar: Array, told_bar: Array, places: Any) -> Array:
        """The cotangent of ``x``; those of all arguments into `told_bar`."""
        x_bar = _shapes.empty_like(self._s.x)
        outputs = x_bar, told_bar, np.int32(told_bar.shape[1]), *places
        self._rows.launch(
            "mix_rows_vjp", self._count, (*self._arguments, mixed_bar, B_bar, C_bar, *outputs), 3
        )
        return x_bar


class Application:
    """One application at the iterate `y`, None for zero, whose steps see `before`, None for nothing.

    Attributes
    ----------
    last_state : (B, D, N) array
    argument : (B, T, n) array or None
        Of the step sizes, where they see ``y_{t-1}``.
    """

    def __init__(
        self, s: System, given: Arguments, initial: Array, y: Array | None, before: Array | None
    ) -> None:
        self._given, self._initial = given, initial
        (batch, steps, dim), dtype = s.x.shape, _shapes.name(s.x.dtype)
        self._count = batch * steps
        about = _shapes.name(given.mixer.dtype), mode_of(s), s.gate is not None
        self._rows, self._back = (
            _rows(most, dtype, *about, dim, given.activation) for most in (NORM, NORM_BACK)
        )
        fed = None
        if given.stacked is not None and before is not None:
            fed = _shapes.empty_like(given.mixer, self._count, len(given.stacked))
            flat = before.reshape(self._count, dim)
            _device.product(flat, given.stacked, fed, transposed=(False, True), precision=precision())
        self.argument = given.step_argument
        if self.argument is not None:
            if fed is not None:
                self.argument = self.argument + fed.reshape(batch, steps, -1)[..., given.at_steps].astype(
                    dtype
                )
            s = s._replace(delta=given.steps.delta(self.argument))
        self._s = s
        mix: Any = _mamba_kronecker_rows.Mix if s.kind == "kronecker" else _Mix
        self._mix = mix(s, given, fed, y)
        self._mixed, self._B, self._C = self._mix.mixed, self._mix.B, self._mix.C
        out = scan.selective_scan(self._mixed, s.delta, s.A, self._B, self._C, s.skip, initial)
        self._o, self.last_state = out

    @property
    def delta(self) -> Array:
        """The step sizes."""
        return self._s.delta

    def _normed(
        self, h: Array | None, pace: Array | None, published: bool, before: Array | None
    ) -> tuple[Array, Array | None]:
        new, (weight, bias, eps), s = _shapes.empty_like(self._o), norm_of(self._s), self._s
        weight, bias = _shapes.aligned(weight, bias)
        numbers = None if pace is None else _shapes.empty_like(new, self._count, 2)
        sizes = np.int64(new.shape[1]), np.int32(new.shape[2]), eps, np.int32(published)
        arguments = (self._o, s.gate, weight, bias, h, pace, *sizes, new, before, numbers)
        self._rows.launch("norm_rows", self._count, arguments, 3)
        return new, numbers

    def value(self) -> Array:
        """``f(y)``."""
        return self._normed(None, None, False, None)[0]

    def advance(
        self, h: Array | None, pace: Array, published: bool, before: Array | None
    ) -> tuple[Array, Array]:
        """``h + pace (f(y) - h)``, `h` None for zero, and how far it went, as `fpnumba.gpu.maps.advance`; what the step
        after each sees of it comes to `before`."""
        new, numbers = self._normed(h, pace, published, before)
        assert numbers is not None
        return new, most(numbers, new.shape[0])

    def states(self, first: int, last: int, state: Array) -> Array:
        """The states after the steps `first` to `last`, (last - first, B, D, N); `state` is that before the first."""
        s = self._s._replace(B=self._B, C=self._C)
        return later_states(s, self._mixed, first, last, state)

    @property
    def mixed(self) -> Array:
        """What drives the states."""
        return self._mixed

    def pull(self, new_bar: Array, *, through: bool) -> tuple[Bars, Array | None]:
        """Cotangents, of the arguments in ``params``, ``B`` and ``C``, of the iterate if it is wanted; and of what
        ``y_{t-1}`` says, (B T, width), whose rows may lie apart as those of the arguments."""
        s, given, xp, count = self._s, self._given, _device.xp(), self._count
        dim, (weight, _, eps) = s.x.shape[-1], norm_of(s)
        weight, new_bar = _shapes.aligned(weight, new_bar)
        blocks = max(1, min(count, BLOCKS_EACH * _device.multiprocessors()))
        o_bar = _shapes.empty_like(self._o)
        made = xp.empty if count else xp.zeros
        weights, biases = (made((blocks, dim), o_bar.dtype) for _ in range(2))
        gate_bar = None if s.gate is None else _shapes.empty_like(self._o)
        arguments = (
            *(self._o, s.gate, weight, new_bar, np.int64(count), np.int32(dim), eps),
            *(o_bar, gate_bar, weights, biases),
        )
        if count:
            self._back.launch("norm_rows_vjp", blocks, arguments, 4)
        mixed_bar, delta_bar, A_bar, B_bar, C_bar, skip_bar, initial_bar = scan.selective_scan_vjp(
            self._mixed, s.delta, s.A, self._B, self._C, s.skip, self._initial, o_bar, None
        )
        places, total = given.cotangents
        told_bar = _shapes.empty_like(given.mixer, count, total)
        x_bar = self._mix.pull(mixed_bar, B_bar, C_bar, told_bar, places)
        width = int(given.places[0])
        fed_bar = told_bar[:, :width] if width else None
        if given.step_argument is not None and fed_bar is not None:
            fed_bar[:, given.at_steps] = given.steps.pull(s.delta, delta_bar)[1].reshape(count, -1)
        mixer_bar, b_bar, c_bar = (
            told_bar[:, int(at) : int(at) + a.shape[2]].reshape(a.shape)
            for at, a in zip(places, (given.mixer, given.b, given.c), strict=True)
        )
        assert skip_bar is not None
        normed = s.norm is not None
        weight_bar = column_sums(weights) if normed else None
        bias_bar = column_sums(biases) if s.norm is not None and s.norm.bias is not None else None
        shared = A_bar, b_bar, c_bar, skip_bar
        y_bar: Any = mixed_bar - x_bar if through else None
        bars = Bars(mixer_bar, x_bar, delta_bar, *shared, gate_bar, weight_bar, bias_bar, initial_bar, y_bar)
        return bars, fed_bar


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    found = []
    for dtype, said, gated, mode, dim in (
        ("float32", "float32", False, 2, 1024),
        ("float32", "bfloat16", False, 2, 1024),
        ("float64", "float64", True, 1, 100),
        ("float32", "float32", True, 0, 77),
    ):
        kernels = (
            ("mix_rows", BLOCK),
            ("mix_rows_vjp", BLOCK),
            ("norm_rows", NORM),
            ("norm_rows_vjp", NORM_BACK),
        )
        for name, most_threads in kernels:
            found.append(_rows(most_threads, dtype, said, mode, gated, dim, "silu").kernel(name))
    return found
