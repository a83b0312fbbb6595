"""From what a layer sees to the matrix that mixes its channels: one class for each mixer.

A map turns pre-activations ``a (B, T, outputs)``, the rows of its :class:`~fpnumba.nn.projections.Stack`,
into the parameters of a mixer of section 2 of docs/mathematics.md, and cotangents of those back into
``a_bar``. The formulas are those of section 5, in the published form: ``u = normalize(activation(.))``,
``alpha = alpha_max * sigmoid(.)``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from scipy.linalg import expm, expm_frechet

from fpnumba.arrays import namespace, to_numpy
from fpnumba.nn import backend
from fpnumba.nn.activations import activate, activate_vjp, sigmoid
from fpnumba.nn.basic import Params, rows
from fpnumba.nn.mixing import Mixer
from fpnumba.nn.projections import Part, Stack, divisors, triangle

Array = NDArray[Any]
Built = tuple[Mixer, Any]


def sigmoid_vjp(y: Array, ybar: Array) -> Array:
    """Cotangent of a sigmoid from its value."""
    xbar: Array = ybar * y * (1 - y)
    return xbar


class MixerMap(ABC):
    """What all maps have in common; see the module's docstring.

    Attributes
    ----------
    kind : str
        The mixer that comes out, by its name in a room; "mixture" is a product of several.
    stack : Stack
        The linear maps.
    """

    kind: str
    stack: Stack

    def init(self, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Params:
        """Fresh parameters."""
        return self.stack.init(rng, dtype)

    @abstractmethod
    def build(self, a: Array) -> Built:
        """``a (B, T, outputs)`` to a mixer, and what :meth:`build_vjp` needs."""

    @abstractmethod
    def build_vjp(self, a: Array, kept: Any, bars: Any) -> Array:
        """Cotangents of the mixer's parameters to ``a_bar``."""


class LowRankMap(MixerMap):
    """Householder products and DPLR: ``u_i = normalize(activation(.))``, ``alpha_i = alpha_max *
    sigmoid(.)``."""

    def __init__(
        self,
        kind: str,
        dim: int,
        inputs: int,
        *,
        rank: int,
        projection_rank: int | None,
        activation: str,
        alpha_max: float,
        norm_eps: float,
        weight_norm: bool,
        prefix: str = "",
    ) -> None:
        self.kind, self.dim, self.rank, self.activation = kind, dim, rank, activation
        self.alpha_max, self.norm_eps = alpha_max, norm_eps
        parts = (
            Part(f"{prefix}u_proj", rank * dim, rank=projection_rank),
            Part(f"{prefix}alpha_proj", rank, bias=True),
        )
        self.stack = Stack(inputs, parts, weight_norm=weight_norm)

    def build(self, a: Array) -> Built:
        lead, size = a.shape[:-1], self.rank * self.dim
        y = activate(self.activation, a[..., :size]).reshape(math.prod(lead) * self.rank, self.dim)
        u, norm = backend.kernels(y).normalize(y, self.norm_eps)
        u = u.reshape(*lead, self.rank, self.dim)
        open_ = sigmoid(a[..., size:])
        return (self.kind, (u, a.dtype.type(self.alpha_max) * open_)), (u, norm, open_)

    def build_vjp(self, a: Array, kept: Any, bars: Any) -> Array:
        u, norm, open_ = kept
        u_bar, alpha_bar = bars
        size = self.rank * self.dim
        y_bar = backend.kernels(u).normalize_vjp(rows(u), norm, self.norm_eps, rows(u_bar))
        abar = np.empty_like(a)
        abar[..., :size] = activate_vjp(self.activation, a[..., :size], y_bar.reshape(*a.shape[:-1], size))
        abar[..., size:] = sigmoid_vjp(open_, a.dtype.type(self.alpha_max) * alpha_bar)
        return abar


class KroneckerMap(MixerMap):
    """``Q v = v - alpha_max * vec(K1^T V K2^T)``, ``K_n = diag(sigmoid(.)) mat(activation(.))``.

    Each ``mat`` is ``U U^T`` of an upper triangle, its rows normalised, and with
    ``normalization="spectral"`` divided by the largest eigenvalue as 16 power iterations find it.
    """

    kind = "kronecker"

    def __init__(
        self,
        dim: int,
        inputs: int,
        *,
        projection_rank: int | None,
        activation: str,
        alpha_max: float,
        norm_eps: float,
        weight_norm: bool,
        normalization: str = "spectral",
        prefix: str = "",
    ) -> None:
        if normalization not in ("spectral", "rows"):
            raise ValueError(f"normalization must be 'spectral' or 'rows', not {normalization!r}")
        self.dim, self.activation, self.alpha_max, self.norm_eps = dim, activation, alpha_max, norm_eps
        self.spectral = normalization == "spectral"
        self.sizes = divisors(dim)
        self.entries = triangle(self.sizes[0]), triangle(self.sizes[1])
        parts = (
            Part(f"{prefix}uv_project", sum(self.entries), rank=projection_rank),
            Part(f"{prefix}diag", sum(self.sizes), bias=True),
        )
        self.stack = Stack(inputs, parts, weight_norm=weight_norm)

    def _factors(self, a: Array) -> list[tuple[slice, slice, tuple[Any, ...]]]:
        """For each factor, where its triangle and its diagonal stand in ``a``, and the options of the
        kernel."""
        (n1, n2), (d1, d2) = self.entries, self.sizes
        shared = 1.0 / math.sqrt(self.dim), self.norm_eps, self.spectral
        # the published product has diag(.) on the left of both matrices and the first one transposed
        return [
            (slice(0, n1), slice(n1 + n2, n1 + n2 + d1), (*shared, self.alpha_max, True)),
            (slice(n1, n1 + n2), slice(n1 + n2 + d1, n1 + n2 + d1 + d2), (*shared, 1.0, False)),
        ]

    def build(self, a: Array) -> Built:
        params, kept = [], []
        for entries, diagonal, options in self._factors(a):
            p, diag = rows(activate(self.activation, a[..., entries])), rows(sigmoid(a[..., diagonal]))
            k = backend.kernels(a).kronecker_factor(p, diag, *options)
            params.append(k.reshape(*a.shape[:-1], *k.shape[1:]))
            kept.append((p, diag))
        return (self.kind, tuple(params)), kept

    def build_vjp(self, a: Array, kept: Any, bars: Any) -> Array:
        abar, lead = np.empty_like(a), a.shape[:-1]
        for (entries, diagonal, options), (p, diag), bar in zip(self._factors(a), kept, bars, strict=True):
            k_bar = backend.contiguous(bar).reshape(*diag.shape, diag.shape[1])
            p_bar, diag_bar = backend.kernels(a).kronecker_factor_vjp(p, diag, *options, k_bar)
            abar[..., entries] = activate_vjp(
                self.activation, a[..., entries], p_bar.reshape(*lead, p.shape[1])
            )
            abar[..., diagonal] = sigmoid_vjp(diag, diag_bar).reshape(*lead, diag.shape[1])
        return abar


class MonarchMap(MixerMap):
    """``Q = I - blockdiag(alpha_j M_j)``: blocks ``U U^T / (largest column norm + eps)``, ``alpha_j =
    sigmoid(.)``."""

    kind = "monarch"

    def __init__(
        self,
        dim: int,
        inputs: int,
        *,
        block: int,
        projection_rank: int | None,
        activation: str,
        norm_eps: float,
        weight_norm: bool,
    ) -> None:
        if block < 1 or dim % block:
            raise ValueError(
                f"rank is the block size of a monarch mixer and must divide {dim}, but is {block}"
            )
        self.dim, self.block, self.activation, self.norm_eps = dim, block, activation, norm_eps
        self.blocks = dim // block
        parts = (
            Part("uv_project", self.blocks * triangle(block), rank=projection_rank),
            Part("alpha", self.blocks, bias=True),
        )
        self.stack = Stack(inputs, parts, weight_norm=weight_norm)

    def build(self, a: Array) -> Built:
        size, b = self.blocks * triangle(self.block), self.block
        p = activate(self.activation, a[..., :size]).reshape(
            math.prod(a.shape[:-1]) * self.blocks, triangle(b)
        )
        blocks = backend.kernels(a).monarch_block(p, self.norm_eps, b)
        alpha = sigmoid(a[..., size:])
        return (self.kind, (blocks.reshape(*a.shape[:-1], self.blocks, b, b), alpha)), (p, alpha)

    def build_vjp(self, a: Array, kept: Any, bars: Any) -> Array:
        p, alpha = kept
        blocks_bar, alpha_bar = bars
        b, size = self.block, self.blocks * triangle(self.block)
        blocks_bar = backend.contiguous(blocks_bar).reshape(len(p), b, b)
        p_bar = backend.kernels(a).monarch_block_vjp(p, self.norm_eps, blocks_bar)
        abar = np.empty_like(a)
        abar[..., :size] = activate_vjp(self.activation, a[..., :size], p_bar.reshape(*a.shape[:-1], size))
        abar[..., size:] = sigmoid_vjp(alpha, alpha_bar)
        return abar


class DenseMap(MixerMap):
    """``Q = U U^T / (largest eigenvalue + eps)``, the eigenvalue by 32 power iterations."""

    kind = "dense"
    iterations = 32

    def __init__(
        self,
        dim: int,
        inputs: int,
        *,
        projection_rank: int | None,
        activation: str,
        norm_eps: float,
        weight_norm: bool,
    ) -> None:
        self.dim, self.activation, self.norm_eps = dim, activation, norm_eps
        self.stack = Stack(
            inputs, (Part("proj", triangle(dim), rank=projection_rank),), weight_norm=weight_norm
        )

    def _power(self, gram: Array) -> tuple[list[Array], list[Array], Array]:
        """The iterates ``v``, the products ``Q v`` and the last one's norm."""
        vectors = [backend.ones((*gram.shape[:-1], 1), gram) / gram.dtype.type(math.sqrt(self.dim))]
        products: list[Array] = []
        for _ in range(self.iterations):
            products.append(gram @ vectors[-1])
            norm = np.linalg.norm(products[-1], axis=-2, keepdims=True)
            vectors.append(products[-1] / (norm + self.norm_eps))
        return vectors, products, norm

    def build(self, a: Array) -> Built:
        p = activate(self.activation, a)
        upper = backend.zeros((*a.shape[:-1], self.dim, self.dim), a)
        upper[..., *np.triu_indices(self.dim)] = p
        gram = upper @ np.swapaxes(upper, -1, -2)
        vectors, products, norm = self._power(gram)
        q = gram / (norm + self.norm_eps)
        return (self.kind, (q,)), (upper, gram, vectors, products, norm)

    def build_vjp(self, a: Array, kept: Any, bars: Any) -> Array:
        upper, gram, vectors, products, norm = kept
        (q_bar,) = bars
        divisor = norm + self.norm_eps
        gram_bar = q_bar / divisor
        # of the last norm alone: the vector it normalises is not used any more
        norm_bar = -(q_bar * gram).sum((-2, -1), keepdims=True) / divisor**2
        vector_bar: Array | None = None
        seen: list[Array] = []
        bars_w: list[Array] = []
        for v, w in zip(reversed(vectors[:-1]), reversed(products), strict=True):
            length = np.linalg.norm(w, axis=-2, keepdims=True)
            if vector_bar is None:
                w_bar = norm_bar * w / length
            else:
                # v' = w / (||w|| + eps)
                scale = length + self.norm_eps
                w_bar = vector_bar / scale - w * (
                    (vector_bar * w).sum(-2, keepdims=True) / (length * scale**2)
                )
            seen.append(v)
            bars_w.append(w_bar)
            vector_bar = gram @ w_bar
        # the matrix is symmetric; its cotangents from all iterations are one product
        gram_bar += backend.joined(bars_w, axis=-1) @ np.swapaxes(backend.joined(seen, axis=-1), -1, -2)
        upper_bar = (gram_bar + np.swapaxes(gram_bar, -1, -2)) @ upper
        p_bar = backend.contiguous(upper_bar[..., *np.triu_indices(self.dim)])
        return activate_vjp(self.activation, a, p_bar)


class FixedMap(MixerMap):
    """One orthogonal matrix for all steps, ``q = base expm(A)`` with ``A`` the skew part of ``tril(X)``.

    ``base`` is a constant of the map, None for the identity: the published parametrisation keeps the matrix
    at which training began there.
    """

    kind = "fixed"
    name = "q_proj.parametrizations.weight.original"

    def __init__(self, dim: int) -> None:
        self.dim, self.stack = dim, Stack(dim, (), weight_norm=False)
        self.base: Array | None = None

    def init(self, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Params:
        """A random rotation by angles of order one."""
        x = rng.standard_normal((self.dim, self.dim)) / math.sqrt(self.dim)
        return {self.name: x.astype(dtype)}

    def _skew(self, params: Params) -> Array:
        lower = np.tril(to_numpy(params[self.name])).astype(np.float64)
        skew: Array = lower - lower.T
        return skew

    def matrix(self, params: Params) -> Array:
        """``q (D, D)``."""
        q = expm(self._skew(params))
        q = q if self.base is None else self.base @ q
        like = params[self.name]
        found: Array = namespace(like).asarray(np.ascontiguousarray(q, dtype=like.dtype))
        return found

    def matrix_vjp(self, params: Params, q_bar: Array) -> Params:
        """Cotangent of ``X``: the adjoint of the derivative of ``expm`` at ``A`` is its derivative at
        ``A^T``."""
        wide = to_numpy(q_bar).astype(np.float64)
        wide = wide if self.base is None else self.base.T @ wide
        skew_bar = expm_frechet(self._skew(params).T, wide, compute_expm=False)
        found = np.tril(skew_bar - skew_bar.T).astype(params[self.name].dtype)
        return {self.name: namespace(q_bar).asarray(found)}

    def build(self, a: Array) -> Built:
        raise NotImplementedError("a fixed mixer has nothing to build step by step")

    def build_vjp(self, a: Array, kept: Any, bars: Any) -> Array:
        raise NotImplementedError("a fixed mixer has nothing to build step by step")


class MixtureMap(MixerMap):
    """A product of mixers: Householder, Kronecker, Householder, ..., the first applied first."""

    kind = "mixture"

    def __init__(self, children: tuple[MixerMap, ...], inputs: int, *, weight_norm: bool) -> None:
        self.children = children
        parts = tuple(part for child in children for part in child.stack.parts)
        self.stack = Stack(inputs, parts, weight_norm=weight_norm)

    def _pieces(self, a: Array) -> list[Array]:
        ends = np.cumsum([child.stack.outputs for child in self.children])[:-1]
        return [backend.contiguous(piece) for piece in np.split(a, ends, axis=-1)]

    def build(self, a: Array) -> Built:
        built = [child.build(piece) for child, piece in zip(self.children, self._pieces(a), strict=True)]
        return (self.kind, [mixer for mixer, _ in built]), [kept for _, kept in built]

    def build_vjp(self, a: Array, kept: Any, bars: Any) -> Array:
        pieces = zip(self.children, self._pieces(a), kept, bars, strict=True)
        return backend.joined([child.build_vjp(piece, k, bar) for child, piece, k, bar in pieces], axis=-1)


def make_map(
    mixer: str,
    dim: int,
    inputs: int,
    *,
    rank: int,
    projection_rank: int | None,
    activation: str,
    normalization: str,
    alpha_max: float,
    norm_eps: float,
    weight_norm: bool,
) -> MixerMap:
    """The map of a mixer by its name in :class:`fpnumba.nn.FPRNN`, whose options these are."""
    shared: dict[str, Any] = {
        "projection_rank": projection_rank,
        "activation": activation,
        "weight_norm": weight_norm,
    }
    scaled = {**shared, "alpha_max": alpha_max}
    if mixer in ("householder", "dplr"):
        return LowRankMap(mixer, dim, inputs, rank=rank, norm_eps=norm_eps, **scaled)
    if mixer == "kronecker":
        return KroneckerMap(dim, inputs, norm_eps=norm_eps, normalization=normalization, **scaled)
    if mixer == "monarch":
        return MonarchMap(dim, inputs, block=rank, norm_eps=norm_eps, **shared)
    if mixer == "dense":
        return DenseMap(dim, inputs, norm_eps=norm_eps, **shared)
    if mixer == "fixed":
        return FixedMap(dim)
    children: list[MixerMap] = []
    for i in range(rank):
        # the published mixture leaves its parts their own defaults: eps, and no spectral normalisation
        options = {**scaled, "norm_eps": 1e-5, "prefix": f"mixers.{i}."}
        if i % 2 == 0:
            children.append(LowRankMap("householder", dim, inputs, rank=1, **options))
        else:
            children.append(KroneckerMap(dim, inputs, normalization="rows", **options))
    return MixtureMap(tuple(children), inputs, weight_norm=weight_norm)
