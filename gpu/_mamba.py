"""FP-Mamba with a mixer of low rank: a kernel for all steps of the solve, and one for the adjoint of a step.

``kernels/mamba_solve.cu`` and ``kernels/mamba_pull.cu`` say what is computed; here is how it is laid out over the
device.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fpnumba.gpu import _device, _shapes, mixers
from fpnumba.gpu._engine import tuned
from fpnumba.gpu._report import store
from fpnumba.reference.mamba import Bars, System

Array = Any

# The largest rank, and the most threads of a block.
MOST_RANK, BLOCK = 8, 512
# Numbers of the state's cotangents that a thread adds up in registers at most.
MOST_HELD = 128
# Blocks of the adjoint on a multiprocessor; each takes several sequences, and adds up what they share.
BLOCKS_EACH = 2


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

    def kernel(self, name: str) -> _device.Kernel:
        """One of the two kernels."""
        macros = {
            "STORE": store(self.dtype),
            "RANK": self.rank,
            "PRODUCT": int(self.product),
            "MODE": self.mode,
            "GATED": int(self.gated),
            "HEADS": int(self.heads),
            "THREADS": self.threads,
            "CHANNELS": self.channels,
            "STATES": self.states,
        }
        return _device.Kernel.of(f"{name}.cu", name, macros)

    def shared(self, size: int, more: int, *sums: int) -> int:
        """Bytes of shared memory: rows of B and C, `more` numbers, and rounds of so many sums."""
        warps = self.threads // 32
        each = [n if warps == 1 else 2 * n * warps for n in sums]
        return (2 * size + more + sum(each)) * (8 if self.dtype == "float64" else 4)


@lru_cache(256)
def layout(
    dtype: str, rank: int, product: bool, mode: int, gated: bool, heads: bool, dim: int, size: int
) -> Layout:
    """Lay out steps of `dim` channels with `size` states each."""
    threads = min(BLOCK, max(32, -(-dim // 32) * 32))
    states = 4
    while states < size:
        states *= 2
    return Layout(dtype, rank, product, mode, gated, heads, threads, -(-dim // threads), states)


def _layout(s: System) -> Layout:
    mode = 0 if s.norm is None else 2 if s.norm.centred else 1
    about = (s.kind == "householder", mode, s.gate is not None, s.A.ndim == 1)
    return layout(_shapes.name(s.x.dtype), s.params[1].shape[2], *about, s.x.shape[-1], s.B.shape[-1])


def serves(s: System) -> bool:
    """Whether these kernels serve a system."""
    if s.kind not in ("dplr", "householder") or not tuned(s.kind, None) or s.x.shape[0] * s.x.shape[2] == 0:
        return False
    if not 1 <= s.params[1].shape[2] <= MOST_RANK or s.x.dtype.itemsize < 4:
        return False
    one = _layout(s)
    return one.channels * one.states <= MOST_HELD


def _norm(s: System) -> tuple[Array, Array | None, np.float64]:
    if s.norm is None:
        return _device.xp().ones(s.x.shape[-1], s.x.dtype), None, np.float64(0)
    return s.norm.weight, s.norm.bias, np.float64(s.norm.eps)


def _inputs(s: System) -> tuple[Any, ...]:
    return *s.params, s.x, s.delta, s.A, s.B, s.C, s.skip, s.gate


def _heads(s: System) -> np.int32:
    return np.int32(s.A.shape[0] if s.A.ndim == 1 else 1)


def solve(
    s: System, initial: Array, *, rtol: float, atol: float, max_iter: int, damping: float
) -> tuple[Array, Array, Array, Array, Array]:
    """All steps: ``y``, the last state, iterations, residual, and whether the tolerance was met."""
    one, (batch, steps, dim) = _layout(s), s.x.shape
    rank, size = one.rank, s.B.shape[-1]
    y, state = _shapes.empty_like(s.x), initial.copy()
    told = _device.several(((batch,), np.int64), ((batch,), np.float64), ((batch,), np.bool_))
    iterations, residual, met = told
    weight, bias, eps = _norm(s)
    arguments = (
        *(*_inputs(s), weight, bias, state, y, np.int64(steps), np.int32(dim), np.int32(size), _heads(s)),
        *(eps, np.float64(rtol), np.float64(atol), np.int64(max_iter), np.float64(damping)),
        *(iterations, residual, met.view(np.uint8)),
    )
    gram = rank * (rank - 1) // 2 if one.product else 0
    sums = 1 + 3 * rank + gram, 1 + 2 * rank + rank * (rank + 1) // 2 + rank**2
    shared = one.shared(size, 2 * rank + 4 + one.threads // 16, *sums)
    _device.launch(one.kernel("mamba_solve"), batch, one.threads, arguments, shared=shared)
    return y, state, iterations, residual, met


def pull(
    s: System, past: Array, y: Array, y_bar: Array, G: Array, *, rtol: float, max_iter: int
) -> tuple[Bars, Array]:
    """The cotangents of one step; ``y`` of them is ``z``. `rtol` and `max_iter` are of no use: nothing iterates."""
    xp, one, (batch, _, dim) = _device.xp(), _layout(s), s.x.shape
    rank, size = one.rank, s.B.shape[-1]
    blocks = min(batch, BLOCKS_EACH * _device.multiprocessors())
    weight, _, eps = _norm(s)
    z, u_bar, delta_bar = (_shapes.empty_like(y) for _ in range(3))
    gate_bar = None if s.gate is None else _shapes.empty_like(y)
    B_bar, C_bar, before = (_shapes.empty_like(a) for a in (s.B, s.C, G))
    rates = xp.empty((blocks, dim) if one.heads else (blocks, dim, size), y.dtype)
    skip_bar, weight_bar, bias_bar = (xp.empty((blocks, dim), y.dtype) for _ in range(3))
    arguments = (
        *(*_inputs(s), weight, past, G, y, y_bar),
        *(np.int64(batch), np.int32(dim), np.int32(size), _heads(s), eps),
        *(before, z, u_bar, gate_bar, delta_bar, B_bar, C_bar, rates, skip_bar, weight_bar, bias_bar),
    )
    gram = rank * (rank - 1) // 2 if one.product else 0
    sums = 2 * rank + gram, 1, 3 + 5 * rank + rank * (rank + 1) // 2, 2 * one.states
    _device.launch(
        one.kernel("mamba_pull"), blocks, one.threads, arguments, shared=one.shared(size, 3 * rank, *sums)
    )
    A_bar = rates.sum(0)
    if one.heads:
        A_bar = A_bar.reshape(len(s.A), -1).sum(-1)
        delta_bar = delta_bar.reshape(batch, 1, len(s.A), -1).sum(-1)
    bars = Bars(
        mixers.cotangent(s.kind, s.params, s.x - y, u_bar),
        mixers.apply_transpose(s.kind, s.params, u_bar),
        delta_bar,
        A_bar,
        B_bar,
        C_bar,
        skip_bar.sum(0),
        gate_bar,
        None if s.norm is None else weight_bar.sum(0),
        None if s.norm is None or s.norm.bias is None else bias_bar.sum(0),
        before,
        z,
    )
    return bars, xp.ones(batch, bool)


class Total:
    """Cotangents of the steps of a system, put together."""

    def __init__(self, s: System) -> None:
        self._system, self._steps = s, dict[int, Bars]()
        self._sums: tuple[Any, ...] = ()

    def add(self, bars: Bars, t: int) -> None:
        """Those of step `t`."""
        self._steps[t] = bars
        shared = bars.A, bars.skip, bars.weight, bars.bias
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
            arrays = (zero(a) for a in (s.x, s.delta, s.A, s.B, s.C, s.skip))
            return Bars(params, *arrays, gate, weight, bias, G, z)

        def along(name: str) -> Array:
            parts = [getattr(one, name) for one in steps]
            return parts[0] if len(parts) == 1 or parts[0] is None else xp.concatenate(parts, axis=1)

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
    return tuple(_device.xp().concatenate(each, axis=1) for each in zip(*parts, strict=True))


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    shapes = [
        # dtype, rank, product, mode, gated, heads, dim, size
        ("float32", 1, True, 2, False, False, 1024, 16),
        ("float32", 4, True, 2, True, False, 1024, 16),
        ("float32", 8, False, 1, False, True, 512, 64),
        ("float64", 2, True, 0, True, False, 96, 5),
        ("float32", 1, False, 2, False, False, 4096, 16),
    ]
    return [layout(*shape).kernel(name) for shape in shapes for name in ("mamba_solve", "mamba_pull")]
