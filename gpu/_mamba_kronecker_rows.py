"""The mixing half of FP-Mamba's map applied to all steps at once, with a Kronecker mixer made on the way.

``kernels/mamba_kronecker_rows.cu`` says what is computed; here is how it is laid out over the device.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fpnumba.gpu import _device, _shapes
from fpnumba.gpu._mamba import ACTS, Arguments
from fpnumba.gpu._mamba_kronecker import STEPS
from fpnumba.gpu._report import store
from fpnumba.reference.mamba import System

Array = Any

# Blocks that a multiprocessor shall hold in single precision: where no edge is longer than SHORT, and else.
RESIDENT = {"kronecker_mix_rows": (12, 3), "kronecker_mix_rows_vjp": (8, 2)}
SHORT = 32


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


class Rows(NamedTuple):
    """How a row is laid out over a block: dtypes of it and of what linear maps say; edges of the factors."""

    dtype: str
    said: str
    edges: tuple[int, int]
    spectral: bool
    act: str

    @property
    def threads(self) -> int:
        """A warp for 16 rows of the larger edge, and one for each factor."""
        return 32 * max(2, -(-max(self.edges) // 16))

    @property
    def _real(self) -> int:
        return 8 if self.dtype == "float64" else 4

    def kernel(self, name: str) -> _device.Kernel:
        """One of the kernels."""
        resident = RESIDENT[name][max(self.edges) > SHORT] if self.dtype == "float32" else 1
        macros: dict[str, object] = {
            "STORE": store(self.dtype),
            "SAID": store(self.said),
            "EDGE1": self.edges[0],
            "EDGE2": self.edges[1],
            "SPECTRAL": int(self.spectral),
            "ACT": ACTS[self.act],
            "THREADS": self.threads,
            "RESIDENT": resident,
        }
        # of no concern here
        macros.update(RANK=1, PRODUCT=0, MADE=1, MODE=0, GATED=0, HEADS=0, CHANNELS=1, STATES=4, FULL=0)
        return _device.Kernel.of("mamba_kronecker_rows.cu", name, macros)

    def shared(self, name: str) -> int:
        """Bytes of shared memory of a block: both factors, channels, and what is known of the factors."""
        piece, (d1, d2) = 16 // self._real, self.edges
        squares = [_up(edge, 16) * (_up(edge, 16) + 2 * piece) for edge in self.edges]
        flat, back = _up(d1, 16) * (_up(d2, 16) + piece), name.endswith("_vjp")
        channels = sum(max(flat, square) for square in squares) if back else flat
        vectors = [(STEPS + 2 + (STEPS + 1) * (edge > SHORT)) if back else 2 for edge in self.edges]
        about = sum(
            3 * _up(edge, 16) + _up(STEPS + 2, piece) + count * (_up(edge, 16) + piece)
            for edge, count in zip(self.edges, vectors, strict=True)
        )
        return self._real * (sum(squares) + channels + about)

    def launch(self, name: str, rows: int, arguments: tuple[Any, ...]) -> None:
        """Launch it for so many rows."""
        _device.launch(self.kernel(name), rows, self.threads, arguments, shared=self.shared(name))


@lru_cache(256)
def _rows(dtype: str, said: str, edges: tuple[int, int], spectral: bool, act: str) -> Rows:
    return Rows(dtype, said, edges, spectral, act)


def _edges(s: System) -> tuple[int, int]:
    return s.params[0].shape[-1], s.params[1].shape[-1]


def fits(s: System) -> bool:
    """Whether a block has enough shared memory for the edges of this system."""
    of = _rows(_shapes.name(s.x.dtype), "float32", _edges(s), True, "identity")
    return bool(max(of.shared(name) for name in RESIDENT) <= _device.shared_limit())


class Mix:
    """The mixing half of an application with a Kronecker mixer at the iterate `y`, None for zero.

    Parameters
    ----------
    s : System
        Of its ``params`` only the shapes count.
    given : Arguments
    fed : (B T, width) array or None
        What ``y_{t-1}`` says.
    y : (B, T, D) array or None

    Attributes
    ----------
    mixed : (B, T, D) array
        ``x - K1 (X - Y) K2^T``.
    B, C : (B, T, N) arrays
    """

    def __init__(self, s: System, given: Arguments, fed: Array | None, y: Array | None) -> None:
        self._s, (batch, steps, _), edges = s, s.x.shape, _edges(s)
        self._count = batch * steps
        about = _shapes.name(s.x.dtype), _shapes.name(given.mixer.dtype)
        self._rows = _rows(*about, edges, bool(given.spectral), given.activation)
        self.mixed, self.B, self.C = (_shapes.empty_like(a) for a in (s.x, s.B, s.C))
        x, y = _shapes.aligned(s.x, y)
        alpha_max, unit_eps, bc_eps = given.numbers
        start = np.float64(1.0 / np.sqrt(edges[0] * edges[1]))
        self._arguments = (
            *(given.mixer, given.b, given.c, fed, *given.places, x, y, np.int64(self._count)),
            *(np.int32(s.B.shape[-1]), start, unit_eps, alpha_max, bc_eps),
        )
        self._rows.launch("kronecker_mix_rows", self._count, (*self._arguments, self.mixed, self.B, self.C))

    def pull(self, mixed_bar: Array, B_bar: Array, C_bar: Array, told_bar: Array, places: Any) -> Array:
        """The cotangent of ``x``; those of all arguments into `told_bar`.

        Parameters
        ----------
        mixed_bar, B_bar, C_bar : arrays
            As the attributes.
        told_bar : (B T, told) array
            Has them from `places` on: of the mixer, of ``b``, of ``c``.
        places : tuple of np.int32
        """
        x_bar, (mixed_bar,) = _shapes.empty_like(self._s.x), _shapes.aligned(mixed_bar)
        outputs = x_bar, told_bar, np.int32(told_bar.shape[1]), *places
        arguments = (*self._arguments, mixed_bar, B_bar, C_bar, *outputs)
        self._rows.launch("kronecker_mix_rows_vjp", self._count, arguments)
        return x_bar


def representative() -> list[_device.Kernel]:
    """The kernels that are compiled where there is no device."""
    shapes: list[tuple[Any, ...]] = [
        # dtype, of what linear maps say, edges, spectral, activation
        ("float32", "float32", (32, 32), True, "silu"),
        ("float32", "bfloat16", (32, 32), True, "silu"),
        ("float64", "float64", (4, 6), True, "identity"),
        ("float32", "float32", (32, 64), False, "relu"),
    ]
    return [_rows(*shape).kernel(name) for shape in shapes for name in RESIDENT]
