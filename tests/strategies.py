"""Problems for every room: canonical ``(B, T, D)`` arrays from a seed, and strategies that draw the seed.

Hypothesis draws shapes and a seed, never single numbers: the arrays come from a NumPy generator, which is
quick, and what shrinks is what matters, the shape. Two ways in:

    problem(rng, "householder", batch=3, steps=17, dim=8, rank=2, dtype=np.float32)
    @given(problems(kinds=LOW_RANK, gated=True))

A `Problem` has the arguments of the solvers: ``solve(*p.system, p.x, p.initial, None, method="direct")``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]

KINDS = ("dplr", "householder", "kronecker", "monarch", "dense", "fixed")
LOW_RANK = ("dplr", "householder")


# A user's own mixer, as one would write it: loops over (D,) vectors, in the Python that Numba compiles


class OwnMixer(NamedTuple):
    """What the rooms ask of a user's own kind."""

    name: str
    apply: Callable[..., Any]
    cotangent: Callable[..., Any]
    apply_transpose: Callable[..., Any] | None = None

    def __repr__(self) -> str:
        return self.name


def _ring_apply(x: Array, out: Array, weight: Array, scale: Array) -> None:
    """``out = x - scale * weight * roll(x)``: every channel listens to its neighbour."""
    for i in range(x.shape[0]):
        out[i] = x[i] - scale[0] * weight[i] * x[i - 1]


def _ring_transpose(y: Array, out: Array, weight: Array, scale: Array) -> None:
    for i in range(y.shape[0]):
        out[i - 1] = y[i - 1] - scale[0] * weight[i] * y[i]


def _ring_cotangent(
    x: Array, ybar: Array, xbar: Array, weight: Array, scale: Array, weight_bar: Array, scale_bar: Array
) -> None:
    scale_bar[0] = 0.0
    for i in range(x.shape[0]):
        xbar[i - 1] = ybar[i - 1] - scale[0] * weight[i] * ybar[i]
        weight_bar[i] = -scale[0] * x[i - 1] * ybar[i]
        scale_bar[0] -= weight[i] * x[i - 1] * ybar[i]


RING = OwnMixer("ring", _ring_apply, _ring_cotangent, _ring_transpose)
RING_WITHOUT_TRANSPOSE = OwnMixer("ring-without-transpose", _ring_apply, _ring_cotangent)


def unit_rows(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Random vectors of length one along the last axis."""
    v = rng.standard_normal(shape)
    rows: Array = v / np.linalg.norm(v, axis=-1, keepdims=True)
    return rows


def factors(dim: int) -> tuple[int, int]:
    """``d1 <= d2`` with ``d1 d2 = dim``, as square as it goes."""
    d1 = max((d for d in range(1, int(dim**0.5) + 1) if dim % d == 0), default=1)
    return d1, dim // d1


def _scaled(rng: np.random.Generator, shape: tuple[int, ...], bound: float) -> Array:
    """Random matrices whose 2-norm lies in ``(bound / 2, bound)``."""
    m: Array = rng.standard_normal(shape)
    if 0 in shape:
        return m
    norm = np.linalg.norm(m, 2, axis=(-2, -1))[..., None, None]
    m *= rng.uniform(bound / 2, bound, norm.shape) / norm
    return m


def mixer_params(
    rng: np.random.Generator,
    kind: str | OwnMixer,
    batch: int,
    steps: int,
    dim: int,
    *,
    rank: int = 2,
    bound: float = 0.9,
    dtype: DTypeLike = np.float64,
) -> tuple[Array, ...]:
    """Parameters of a mixer with ``||P_t||_2 <= bound``: below one, the iteration contracts.

    ``rank`` is for the low-rank kinds. With rank one, ``bound=2`` reaches what the published code trains
    with.
    """
    lead = (batch, steps)
    params: tuple[Array, ...]
    if kind in LOW_RANK:
        # ||P|| <= sum of alpha, for the sum and for the product of reflections
        alpha = rng.uniform(0.3 * bound, bound, (*lead, rank)) / max(rank, 1)
        params = unit_rows(rng, (*lead, rank, dim)), alpha
    elif kind == "kronecker":
        d1, d2 = factors(dim)
        params = _scaled(rng, (*lead, d1, d1), bound**0.5), _scaled(rng, (*lead, d2, d2), bound**0.5)
    elif kind == "monarch":
        count, size = factors(dim)
        params = _scaled(rng, (*lead, count, size, size), 1.0), rng.uniform(-bound, bound, (*lead, count))
    elif kind in ("dense", "fixed"):
        shape = (*lead, dim, dim) if kind == "dense" else (dim, dim)
        params = (np.eye(dim) - _scaled(rng, shape, bound),)
    elif isinstance(kind, OwnMixer):
        params = rng.uniform(-1, 1, (*lead, dim)), rng.uniform(0.3 * bound, bound, (*lead, 1))
    else:
        raise ValueError(f"no such kind: {kind!r}")
    return tuple(np.ascontiguousarray(p, dtype) for p in params)


@dataclass(frozen=True, repr=False)
class Problem:
    """One fixed-point problem. ``hbar`` is a cotangent of ``h``, ``h`` an arbitrary iterate."""

    kind: str | OwnMixer
    params: tuple[Array, ...]
    lam: Array  # (B, T, D)
    gate: Array | None  # (B, T, D)
    x: Array  # (B, T, D)
    initial: Array | None  # (B, D)
    hbar: Array  # (B, T, D)
    h: Array  # (B, T, D)

    def __repr__(self) -> str:
        shapes = ", ".join(str(p.shape) for p in self.params)
        given = " gated" * (self.gate is not None) + " from a state" * (self.initial is not None)
        return f"Problem({self.kind} {shapes} on {self.x.shape} {self.x.dtype}{given})"

    @property
    def system(self) -> tuple[Any, tuple[Array, ...], Array, Array | None]:
        """The arguments that every door begins with."""
        return self.kind, self.params, self.lam, self.gate

    @property
    def gate_or_default(self) -> Array:
        return 1 - self.lam if self.gate is None else self.gate

    def astype(self, dtype: DTypeLike) -> "Problem":
        """The same numbers in another precision."""
        return self._map(lambda a: np.ascontiguousarray(a, dtype))

    def sequence(self, b: int) -> "Problem":
        """Sequence ``b`` alone, as a batch of one."""
        return self.take([b])

    def take(self, rows: Sequence[int]) -> "Problem":
        """A batch of these sequences, in this order."""
        shared = self.params if self.kind == "fixed" else None
        picked = replace(self, params=() if shared else self.params)._map(
            lambda a: np.ascontiguousarray(a[list(rows)])
        )
        return replace(picked, params=shared) if shared else picked

    def until(self, steps: int) -> "Problem":
        """The first ``steps`` steps."""
        cut = self._map(lambda a: np.ascontiguousarray(a[:, :steps]))
        params = self.params if self.kind == "fixed" else cut.params
        return replace(cut, params=params, initial=self.initial)

    def _map(self, change: Callable[[Array], Array]) -> "Problem":
        return Problem(
            self.kind,
            tuple(change(p) for p in self.params),
            change(self.lam),
            None if self.gate is None else change(self.gate),
            change(self.x),
            None if self.initial is None else change(self.initial),
            change(self.hbar),
            change(self.h),
        )


def problem(
    rng: np.random.Generator | int,
    kind: str | OwnMixer,
    *,
    batch: int = 2,
    steps: int = 7,
    dim: int = 6,
    rank: int = 2,
    bound: float = 0.9,
    gated: bool = False,
    initial: bool = True,
    slowest: float = 0.98,
    dtype: DTypeLike = np.float64,
) -> Problem:
    """A problem, contractive for ``bound < 1``; ``lam`` in ``(0.1, slowest)``, the gate in ``(0.1, 1)``."""
    rng = np.random.default_rng(rng)
    shape = (batch, steps, dim)
    made = Problem(
        kind=kind,
        params=mixer_params(rng, kind, batch, steps, dim, rank=rank, bound=bound),
        lam=rng.uniform(0.1, slowest, shape),
        gate=rng.uniform(0.1, 1.0, shape) if gated else None,
        x=rng.standard_normal(shape),
        initial=rng.standard_normal((batch, dim)) if initial else None,
        hbar=rng.standard_normal(shape),
        h=rng.standard_normal(shape),
    )
    return made if dtype == np.float64 else made.astype(dtype)


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    kinds: Sequence[str | OwnMixer] = KINDS,
    batches: tuple[int, int] = (0, 3),
    steps: tuple[int, int] = (0, 12),
    dims: Sequence[int] = (1, 2, 4, 6, 9),
    ranks: tuple[int, int] = (1, 3),
    gated: bool | None = None,
    initial: bool | None = None,
    bound: float = 0.9,
    dtype: DTypeLike = np.float64,
) -> Problem:
    """Problems of all kinds and small shapes, the empty ones included; None lets it vary."""
    return problem(
        draw(seeds()),
        draw(st.sampled_from(list(kinds))),
        batch=draw(st.integers(*batches)),
        steps=draw(st.integers(*steps)),
        dim=draw(st.sampled_from(list(dims))),
        rank=draw(st.integers(*ranks)),
        gated=draw(st.booleans()) if gated is None else gated,
        initial=draw(st.booleans()) if initial is None else initial,
        bound=bound,
        dtype=dtype,
    )


def seeds() -> st.SearchStrategy[int]:
    """Seeds for `numpy.random.default_rng`."""
    return st.integers(0, 2**32 - 1)


class Selective(NamedTuple):
    """Arguments of ``selective_scan``, and cotangents of its two outputs."""

    x: Array
    delta: Array
    A: Array
    B: Array
    C: Array
    D: Array | None
    initial: Array | None
    ybar: Array
    last_bar: Array

    @property
    def primals(self) -> Any:
        return self[:7]


def selective(
    rng: np.random.Generator | int,
    *,
    batch: int = 2,
    steps: int = 7,
    heads: int | None = None,
    dim: int = 6,
    size: int = 4,
    skip: bool = True,
    initial: bool = True,
    dtype: DTypeLike = np.float64,
) -> Selective:
    """A selective scan in Mamba's form, or with ``heads`` (a divisor of ``dim``) in Mamba-2's."""
    rng = np.random.default_rng(rng)
    width = dim if heads is None else heads
    arrays: tuple[Any, ...] = (
        rng.standard_normal((batch, steps, dim)),
        rng.uniform(0.05, 1.0, (batch, steps, width)),
        -rng.uniform(0.2, 2.0, (dim, size) if heads is None else (heads,)),
        rng.standard_normal((batch, steps, size)),
        rng.standard_normal((batch, steps, size)),
        rng.standard_normal(dim) if skip else None,
        rng.standard_normal((batch, dim, size)) if initial else None,
        rng.standard_normal((batch, steps, dim)),
        rng.standard_normal((batch, dim, size)),
    )
    cast: list[Any] = [None if a is None else a.astype(dtype) for a in arrays]
    return Selective(*cast)


@st.composite
def selectives(
    draw: st.DrawFn,
    *,
    batches: tuple[int, int] = (0, 3),
    steps: tuple[int, int] = (0, 9),
    dtype: DTypeLike = np.float64,
) -> Selective:
    """Selective scans in both forms."""
    heads = draw(st.sampled_from([None, 1, 2, 3]))
    return selective(
        draw(seeds()),
        batch=draw(st.integers(*batches)),
        steps=draw(st.integers(*steps)),
        heads=heads,
        dim=(heads or 1) * draw(st.integers(1, 3)),
        size=draw(st.integers(1, 4)),
        skip=draw(st.booleans()),
        initial=draw(st.booleans()),
        dtype=dtype,
    )
