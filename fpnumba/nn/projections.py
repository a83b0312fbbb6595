"""Linear maps whose rows become the parameters of a mixer: stacked, weight-normalised, factored.

The mixer of step ``t`` sees an argument ``p_t`` made of ``x_t`` and ``h_{t-1}``. All its linear maps are one
stack,

    v = F p + bias,        a = v, part by part; a factored part is multiplied once more, a_part = G v_part,

so that ``F p = F_x x_t + F_h h_{t-1}`` splits into a part that no iteration changes and one small product
per step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fpnumba.arrays import namespace
from fpnumba.nn import backend
from fpnumba.nn.backend import contiguous, product
from fpnumba.nn.basic import Params, rows, uniform

Array = NDArray[Any]

# On a device, products are fast where rows begin at multiples of so many numbers; zeros fill up a stack.
ALIGNED = 8

MAGNITUDE = "parametrizations.weight.original0"
DIRECTION = "parametrizations.weight.original1"


def weight_names(name: str, weight_norm: bool) -> tuple[str, ...]:
    """Names of the parameters of one linear map's weight, those of the published state dict."""
    return (f"{name}.{MAGNITUDE}", f"{name}.{DIRECTION}") if weight_norm else (f"{name}.weight",)


def init_weight(
    name: str, outputs: int, inputs: int, weight_norm: bool, rng: np.random.Generator, dtype: DTypeLike
) -> Params:
    """A uniform weight, split into magnitude and direction where it is weight-normalised."""
    weight = uniform(rng, (outputs, inputs), inputs, np.float64)
    if not weight_norm:
        return {f"{name}.weight": weight.astype(dtype)}
    return {
        f"{name}.{MAGNITUDE}": np.linalg.norm(weight, axis=1, keepdims=True).astype(dtype),
        f"{name}.{DIRECTION}": weight.astype(dtype),
    }


def weight_of(name: str, weight_norm: bool, params: Params, out: Array | None = None) -> Array:
    """The weight itself: ``magnitude * direction / ||direction||`` row by row, or the parameter as it is; into `out` if
    there is one."""
    if weight_norm:
        direction = params[f"{name}.{DIRECTION}"]
        given = contiguous(direction), contiguous(params[f"{name}.{MAGNITUDE}"])
        found: Array = backend.kernels(direction).weight(*given, out)
        return found
    weight = params[f"{name}.weight"]
    if out is None:
        return weight
    out[...] = weight
    return out


def weight_vjp(name: str, weight_norm: bool, params: Params, weight_bar: Array) -> Params:
    """Cotangents of the parameters of a weight."""
    if not weight_norm:
        return {f"{name}.weight": weight_bar}
    direction, magnitude = (contiguous(params[f"{name}.{part}"]) for part in (DIRECTION, MAGNITUDE))
    direction_bar, magnitude_bar = backend.kernels(direction).weight_vjp(direction, magnitude, weight_bar)
    return {f"{name}.{MAGNITUDE}": magnitude_bar, f"{name}.{DIRECTION}": direction_bar}


@dataclass(frozen=True)
class Part:
    """One linear map of a stack: its name, its outputs, a bias or none, and the rank of its factors if it
    has two."""

    name: str
    outputs: int
    bias: bool = False
    rank: int | None = None

    @property
    def first(self) -> str:
        """Name of the map that sees the argument."""
        return self.name if self.rank is None else f"{self.name}.0"

    @property
    def second(self) -> str:
        """Name of the second factor."""
        return f"{self.name}.1"

    @property
    def inner(self) -> int:
        """Rows in the stack ``F``."""
        return self.outputs if self.rank is None else self.rank


class Stack:
    """All linear maps of a mixer.

    Parameters
    ----------
    inputs : int
        Width of the argument ``p``.
    parts : sequence of Part
        In the order in which they stand in ``a``.
    weight_norm : bool
    """

    def __init__(self, inputs: int, parts: tuple[Part, ...], *, weight_norm: bool) -> None:
        self.inputs, self.parts, self.weight_norm = inputs, parts, weight_norm
        self.inner = sum(part.inner for part in parts)
        self.outputs = sum(part.outputs for part in parts)
        self.factored = any(part.rank is not None for part in parts)

    def init(self, rng: np.random.Generator, dtype: DTypeLike) -> Params:
        """Uniform weights, zero biases."""
        params: Params = {}
        for part in self.parts:
            params |= init_weight(part.first, part.inner, self.inputs, self.weight_norm, rng, dtype)
            if part.rank is not None:
                params |= init_weight(part.second, part.outputs, part.rank, self.weight_norm, rng, dtype)
            if part.bias:
                params[f"{part.name}.bias"] = np.zeros(part.outputs, dtype)
        return params

    def weights(self, params: Params, dtype: DTypeLike) -> Weights:
        """The matrices behind the parameters, made once per call, where the parameters lie."""
        like = next(iter(params.values()), np.zeros(0))
        xp, inner = namespace(like), self.inner
        if not backend.on_host(like):
            inner = -(-inner // ALIGNED) * ALIGNED
        first = xp.empty((inner, self.inputs), dtype)
        first[self.inner :] = 0
        bias = xp.zeros(inner, dtype)
        seconds: list[Array | None] = []
        at = 0
        for part in self.parts:
            weight_of(part.first, self.weight_norm, params, first[at : at + part.inner])
            if part.bias:
                bias[at : at + part.inner] = params[f"{part.name}.bias"]
            seconds.append(None if part.rank is None else weight_of(part.second, self.weight_norm, params))
            at += part.inner
        return Weights(self, first, bias, seconds)

    def weights_vjp(self, params: Params, bars: Weights) -> Params:
        """Cotangents of the parameters from those of the matrices."""
        grads: Params = {}
        at = 0
        for part, second_bar in zip(self.parts, bars.seconds, strict=True):
            inner = slice(at, at + part.inner)
            grads |= weight_vjp(part.first, self.weight_norm, params, bars.first[inner])
            if second_bar is not None:
                grads |= weight_vjp(part.second, self.weight_norm, params, second_bar)
            if part.bias:
                grads[f"{part.name}.bias"] = bars.bias[inner].copy()
            at += part.inner
        return grads


@dataclass
class Weights:
    """The matrices of a :class:`Stack`: ``first (inner, inputs)``, ``bias (inner,)``, second factors or
    None. On a device `inner` is a multiple of :data:`ALIGNED`."""

    stack: Stack
    first: Array
    bias: Array
    seconds: list[Array | None]

    def zeros(self) -> Weights:
        """Where cotangents are added up."""
        seconds = [None if w is None else np.zeros_like(w) for w in self.seconds]
        return Weights(self.stack, np.zeros_like(self.first), np.zeros_like(self.bias), seconds)

    def add_bias(self, arguments: Array) -> None:
        """Add the bias to rows of arguments, in place."""
        at = 0
        for part in self.stack.parts:
            if part.bias:
                own = slice(at, at + part.inner)
                arguments[:, own] = (arguments[:, own].astype(self.bias.dtype) + self.bias[own]).astype(
                    arguments.dtype
                )
            at += part.inner

    def bias_vjp(self, argument_bar: Array, bars: Weights) -> None:
        """Add to the cotangent of the bias that of rows of arguments, which may lie apart."""
        at = 0
        for part in self.stack.parts:
            if part.bias:
                own = slice(at, at + part.inner)
                bars.bias[own] += backend.column_sums(argument_bar[:, own])
            at += part.inner

    def expand(self, v: Array) -> Array:
        """``v (..., inner)`` to ``a (..., outputs)``: the second factors."""
        if not self.stack.factored:
            return v if v.shape[-1] == self.stack.inner else contiguous(v[..., : self.stack.inner])
        a = backend.empty((*v.shape[:-1], self.stack.outputs), v)
        at = out = 0
        for part, second in zip(self.stack.parts, self.seconds, strict=True):
            inner = v[..., at : at + part.inner]
            a[..., out : out + part.outputs] = (
                inner
                if second is None
                else product(rows(inner), second, transposed=(False, True)).reshape(
                    *v.shape[:-1], part.outputs
                )
            )
            at, out = at + part.inner, out + part.outputs
        return a

    def expand_vjp(self, v: Array, abar: Array, bars: Weights) -> Array:
        """Cotangent of ``v``; those of the second factors are added to ``bars``."""
        if not self.stack.factored:
            return self._filled(abar)
        vbar = self._filled(backend.empty((*abar.shape[:-1], self.stack.inner), abar))
        at = out = 0
        for part, second, second_bar in zip(self.stack.parts, self.seconds, bars.seconds, strict=True):
            into, of = slice(at, at + part.inner), slice(out, out + part.outputs)
            if second is None or second_bar is None:
                vbar[..., into] = abar[..., of]
            else:
                own = rows(abar[..., of])
                vbar[..., into] = product(own, second).reshape(*abar.shape[:-1], part.inner)
                second_bar += product(own, rows(v[..., into]), transposed=(True, False))
            at, out = at + part.inner, out + part.outputs
        return vbar

    def _filled(self, v: Array) -> Array:
        """With as many columns as there are rows in `first`."""
        if v.shape[-1] == len(self.first):
            return v
        wide = backend.empty((*v.shape[:-1], len(self.first)), v)
        wide[..., : v.shape[-1]] = v
        wide[..., v.shape[-1] :] = 0
        return wide

    def expand_transpose(self, abar: Array) -> Array:
        """Cotangent of ``v`` alone."""
        if not self.stack.factored:
            return abar
        vbar = backend.empty((*abar.shape[:-1], self.stack.inner), abar)
        at = out = 0
        for part, second in zip(self.stack.parts, self.seconds, strict=True):
            piece = abar[..., out : out + part.outputs]
            vbar[..., at : at + part.inner] = piece if second is None else piece @ second
            at, out = at + part.inner, out + part.outputs
        return vbar


def triangle(size: int) -> int:
    """Entries of an upper triangle."""
    return size * (size + 1) // 2


def divisors(dim: int) -> tuple[int, int]:
    """``d1 * d2 = dim`` with ``d1 <= sqrt(dim)`` as large as possible."""
    first = next(a for a in range(math.isqrt(dim), 0, -1) if dim % a == 0)
    return first, dim // first
