"""FP-Mamba's map applied to all steps at once, with a mixer of rank one made on the way: a product of matrices, the
kernels of ``kernels/mamba_rows.cu``, and the selective scan.
"""

from typing import Any

import numpy as np

from fpnumba.gpu import _device, _shapes, scan
from fpnumba.gpu._columns import column_sums
from fpnumba.gpu._engine import precision
from fpnumba.gpu._mamba import Arguments, Layout, layout, mode_of, norm_of
from fpnumba.reference.mamba import Bars, System

Array = Any

# Threads of a row at most, and blocks on a multiprocessor of the kernel that adds up over rows.
BLOCK, BLOCKS_EACH = 256, 4


def _layout(dtype: str, mode: int, gated: bool, dim: int, activation: str) -> Layout:
    found = layout(dtype, 1, False, mode, gated, False, dim, 4)
    threads = min(BLOCK, found.threads)
    return found._replace(threads=threads, channels=-(-dim // threads), full=False, act=activation)


def _kernel(one: Layout, name: str) -> _device.Kernel:
    return one.kernel("mamba_rows", name)


def _fed(given: Arguments, before: Array) -> Array | None:
    """What ``y_{t-1}`` says at every step: ``before (B, T, D)``."""
    if given.stacked is None:
        return None
    flat = before.reshape(-1, before.shape[-1])
    return _device.product(flat, given.stacked, transposed=(False, True), precision=precision())


class Application:
    """One application at the iterate ``y``, whose steps see `before`."""

    def __init__(self, s: System, given: Arguments, initial: Array, y: Array, before: Array) -> None:
        self._s, self._given, self._initial = s, given, initial
        dim, size, self._rows = s.x.shape[-1], s.B.shape[-1], s.x.shape[0] * s.x.shape[1]
        about = _shapes.name(s.x.dtype), mode_of(s), s.gate is not None
        self._one = _layout(*about, dim, given.activation)
        self._fed = _fed(given, before)
        if given.step_argument is not None and self._fed is not None:
            fed = self._fed.reshape(*y.shape[:2], -1)[..., given.at_steps]
            self._s = s = s._replace(delta=given.steps.delta(given.step_argument + fed))
        self._mixed, self._B, self._C = (_shapes.empty_like(a) for a in (s.x, s.B, s.C))
        self._arguments = (
            *(given.mixer, given.b, given.c, self._fed, *given.places, s.x, y, np.int32(dim), np.int32(size)),
            *given.numbers,
        )
        self._launch("mix_rows", self._rows, (*self._arguments, self._mixed, self._B, self._C), 2)
        out = scan.selective_scan(self._mixed, s.delta, s.A, self._B, self._C, s.skip, initial)
        self._o, self.last_state = out

    def _launch(self, name: str, blocks: int, arguments: tuple[Any, ...], sums: int) -> None:
        warps, real = self._one.threads // 32, 8 if self._one.dtype == "float64" else 4
        shared = real * sums * (1 if warps == 1 else 2 * warps)
        _device.launch(_kernel(self._one, name), blocks, self._one.threads, arguments, shared=shared)

    @property
    def delta(self) -> Array:
        """The step sizes."""
        return self._s.delta

    def value(self) -> Array:
        """``f(y)``."""
        new, (weight, bias, eps) = _shapes.empty_like(self._o), norm_of(self._s)
        arguments = (self._o, self._s.gate, weight, bias, np.int32(new.shape[-1]), eps, new)
        self._launch("norm_rows", self._rows, arguments, 2)
        return new

    def pull(self, new_bar: Array) -> tuple[Bars, Array | None]:
        """Cotangents, of the arguments in ``params``, ``B`` and ``C``; and of what ``y_{t-1}`` says, (B T, width)."""
        s, given, xp = self._s, self._given, _device.xp()
        dim, (weight, _, eps) = s.x.shape[-1], norm_of(s)
        blocks = max(1, min(self._rows, BLOCKS_EACH * _device.multiprocessors()))
        o_bar = _shapes.empty_like(self._o)
        weights, biases = (xp.zeros((blocks, dim), o_bar.dtype) for _ in range(2))
        gate_bar = None if s.gate is None else _shapes.empty_like(self._o)
        rows, width = np.int64(self._rows), np.int32(dim)
        arguments = (self._o, s.gate, weight, new_bar, rows, width, eps, o_bar, gate_bar, weights, biases)
        if self._rows:
            self._launch("norm_rows_vjp", blocks, arguments, 4)
        mixed_bar, delta_bar, A_bar, B_bar, C_bar, skip_bar, initial_bar = scan.selective_scan_vjp(
            self._mixed, s.delta, s.A, self._B, self._C, s.skip, self._initial, o_bar, None
        )
        x_bar, mixer_bar, b_bar, c_bar = (_shapes.empty_like(a) for a in (s.x, given.mixer, given.b, given.c))
        fed_bar = None if self._fed is None else _shapes.empty_like(self._fed)
        outputs = (x_bar, mixer_bar, b_bar, c_bar, fed_bar)
        self._launch("mix_rows_vjp", self._rows, (*self._arguments, mixed_bar, B_bar, C_bar, *outputs), 3)
        if given.step_argument is not None and fed_bar is not None:
            fed_bar[:, given.at_steps] = given.steps.pull(s.delta, delta_bar)[1].reshape(self._rows, -1)
        assert skip_bar is not None
        normed = s.norm is not None
        weight_bar = column_sums(weights) if normed else None
        bias_bar = column_sums(biases) if s.norm is not None and s.norm.bias is not None else None
        shared = A_bar, b_bar, c_bar, skip_bar
        y_bar = mixed_bar - x_bar
        bars = Bars(mixer_bar, x_bar, delta_bar, *shared, gate_bar, weight_bar, bias_bar, initial_bar, y_bar)
        return bars, fed_bar


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    found = []
    for dtype, gated, mode, dim in (("float32", False, 2, 1024), ("float64", True, 1, 100)):
        one = _layout(dtype, mode, gated, dim, "silu")
        found += [_kernel(one, name) for name in ("mix_rows", "mix_rows_vjp", "norm_rows", "norm_rows_vjp")]
    return found
