"""Channel mixing: the matrices ``Q_t`` of section 2 of docs/mathematics.md, and a user's own.

A mixer holds the parameters of one matrix for each step of each sequence, as arrays of the caller's own kind.
It is checked once, when it is made.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from numpy.typing import NDArray

from fpnumba.arrays import Array, Checked, check, declared_range

__all__ = ["DPLR", "CustomKind", "Dense", "Fixed", "Householder", "Kronecker", "Mixer", "Monarch", "define"]


@dataclass(frozen=True, eq=False)
class CustomKind:
    """What a room needs to know of a user's own mixer; made by `define`.

    Attributes
    ----------
    name : str
    apply : callable
        ``apply(x, out, *params)`` writes ``out = Q x`` for one step.
    cotangent : callable
        ``cotangent(x, ybar, xbar, *params, *params_bar)`` writes ``xbar = Q^T ybar`` and the parameters'
        cotangents.
    apply_transpose : callable or None
        ``apply_transpose(y, out, *params)`` writes ``out = Q^T y`` for one step.

    Examples
    --------
    >>> import fpnumba as fp
    >>> fp.mixers.DPLR.kind
    'dplr'
    """

    name: str
    apply: Callable[..., Any]
    cotangent: Callable[..., Any]
    apply_transpose: Callable[..., Any] | None = None

    def __repr__(self) -> str:
        return f"CustomKind({self.name!r})"


class Mixer:
    """One matrix ``Q_t`` for each step of each sequence: what all mixers have in common.

    Attributes
    ----------
    kind : str or CustomKind
        Which mixer this is, to a room.
    shapes : dict
        The parameters and their shapes; ``...`` stands for leading batch axes, ``T`` for steps, ``D`` for
        channels.
    params : tuple of arrays
        The parameters, in that order.
    lead : tuple of int
        Leading batch axes.
    steps : int or None
        Number of steps ``T``; None for one matrix that serves any number.
    channels : int or None
        Number of channels ``D``; None where the parameters do not tell.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> q = fp.mixers.Dense(np.eye(3) * np.ones((2, 5, 1, 1)))
    >>> q
    Dense(q: (2, 5, 3, 3) float64)
    >>> q.lead, q.steps, q.channels
    ((2,), 5, 3)
    """

    kind: ClassVar[str | CustomKind]
    shapes: ClassVar[Mapping[str, str]]

    params: tuple[Array, ...]
    lead: tuple[int, ...]
    steps: int | None
    channels: int | None

    def _keep(self, *params: Array) -> Checked:
        """Check the parameters against each other and hold them."""
        checked = check({name: (p, s) for (name, s), p in zip(self.shapes.items(), params, strict=True)})
        self.params = params
        self.lead = checked.lead
        self.steps = checked.sizes.get("T")
        self.channels = self._channels(checked.sizes)
        for name, param in zip(self.shapes, params, strict=True):
            setattr(self, name, param)
        return checked

    def _channels(self, sizes: Mapping[str, int]) -> int | None:
        return sizes.get("D")

    def like(self, *params: Array) -> Self:
        """A mixer of the same class with other parameters, held to no declared range: a cotangent, say."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._keep(*params)
        return other

    def arguments(self, prefix: str = "mixer.") -> dict[str, tuple[Array, str]]:
        """The parameters as arguments of `fpnumba.arrays.check`, under dotted names."""
        return {prefix + name: (p, s) for (name, s), p in zip(self.shapes.items(), self.params, strict=True)}

    def suits(self, sizes: Mapping[str, int]) -> None:
        """Raise `ValueError` unless this mixer acts on as many channels as the call has."""
        if self.channels is not None and self.channels != sizes["D"]:
            raise ValueError(
                f"argument `mixer`: {self!r} is for {self.channels} channels, expected {sizes['D']} as in `x`"
            )

    def _call(self, name: str, x: Array) -> tuple[Checked, tuple[Array, ...]]:
        call = check({name: (x, "... T D")} | self.arguments(""))
        self.suits(call.sizes)
        return call, tuple(call[p] for p in self.shapes)

    def apply(self, x: Array, /) -> Array:
        """Mix channels: ``y_t = Q_t x_t``.

        Parameters
        ----------
        x : array (..., T, D)

        Returns
        -------
        array (..., T, D)

        Examples
        --------
        >>> import numpy as np
        >>> import fpnumba as fp
        >>> swap = fp.mixers.Fixed(np.array([[0.0, 1.0], [1.0, 0.0]]))
        >>> swap.apply(np.array([[1.0, 2.0]]))
        array([[2., 1.]])
        """
        call, params = self._call("x", x)
        return call.back(call.room.mixers.apply(self.kind, params, call["x"]))

    def apply_transpose(self, y: Array, /) -> Array:
        """Mix channels with the transpose: ``x_t = Q_t^T y_t``.

        Parameters
        ----------
        y : array (..., T, D)

        Returns
        -------
        array (..., T, D)

        Examples
        --------
        >>> import numpy as np
        >>> import fpnumba as fp
        >>> q = fp.mixers.Fixed(np.array([[0.0, 2.0], [1.0, 0.0]]))
        >>> q.apply_transpose(np.array([[1.0, 3.0]]))
        array([[3., 2.]])
        """
        call, params = self._call("y", y)
        return call.back(call.room.mixers.apply_transpose(self.kind, params, call["y"]))

    def to_dense(self) -> Array:
        """The matrices themselves.

        Returns
        -------
        array (..., T, D, D)
            For `Fixed`, its one matrix (D, D).

        Raises
        ------
        ValueError
            For a mixer whose parameters do not tell the number of channels.

        Examples
        --------
        >>> import numpy as np
        >>> import fpnumba as fp
        >>> fp.mixers.Householder(np.array([[[1.0, 0.0]]]), np.array([[2.0]])).to_dense()
        array([[[-1.,  0.],
                [ 0.,  1.]]])
        """
        call, dense = self._dense()
        return self._back(call, dense)

    def contraction_bound(self) -> Array:
        """The spectral norm of ``P_t = I - Q_t``, or a bound on it.

        Below one, the fixed-point iteration converges from anywhere with ``gate = 1 - lam`` and ``lam`` in
        [0, 1) (Theorem 3.1 of arXiv 2503.10799 for a matrix that does not depend on the input). Above one it
        may still converge, and the direct solve may exist where the iteration does not.

        Returns
        -------
        array (..., T)
            Exact up to rounding; for a user's own mixer, from its dense form. A 0-d array for `Fixed`.

        Examples
        --------
        >>> import numpy as np
        >>> import fpnumba as fp
        >>> u = np.array([[[0.6, 0.8]]])
        >>> fp.mixers.DPLR(u, np.array([[0.5]])).contraction_bound()
        array([0.5])
        """
        if isinstance(self.kind, CustomKind):
            call, dense = self._dense()
            return self._back(call, call.room.mixers.contraction_bound("dense", (dense,)))
        call = check(self.arguments(""))
        return self._back(
            call, call.room.mixers.contraction_bound(self.kind, tuple(call[p] for p in self.shapes))
        )

    def _dense(self) -> tuple[Checked, NDArray[Any]]:
        if self.channels is None:
            raise ValueError(
                f"{self!r}: its parameters do not tell the number of channels, so it has no dense form"
            )
        call = check(self.arguments(""))
        return call, call.room.mixers.to_dense(self.kind, tuple(call[p] for p in self.shapes), self.channels)

    def _back(self, call: Checked, result: NDArray[Any]) -> Array:
        """One matrix for all steps has no leading axes, in the room or outside."""
        return call.back(result if self.steps is not None else result[None])

    def __repr__(self) -> str:
        named = zip(self.shapes, self.params, strict=True)
        return f"{type(self).__name__}({', '.join(f'{n}: {tuple(p.shape)} {p.dtype}' for n, p in named)})"


class _LowRank(Mixer):
    """``P = I - Q`` of rank ``r``, from unit rows ``u_i`` and strengths ``alpha_i``."""

    shapes: ClassVar[Mapping[str, str]] = {"u": "... T r D", "alpha": "... T r"}
    u: Array
    alpha: Array
    alpha_max: float | None

    def __init__(self, u: Array, alpha: Array, *, alpha_max: float | None = 2.0) -> None:
        self.alpha_max = None if alpha_max is None else float(alpha_max)
        checked = self._keep(u, alpha)
        if self.alpha_max is not None:
            bounds = 0.0, self.alpha_max, f"alpha_max={self.alpha_max}"
            with checked.room.current():
                declared_range("alpha", checked.view("alpha"), *bounds)

    @property
    def rank(self) -> int:
        """Number of rows ``r``."""
        return int(self.alpha.shape[-1])


class DPLR(_LowRank):
    """Diagonal plus low rank: ``Q_t = I - sum_i alpha_i u_i u_i^T``.

    Section 2 of docs/mathematics.md. Symmetric. Has a direct solve.

    Parameters
    ----------
    u : array (..., T, r, D)
        Unit rows. Their length is not enforced: other rows are as well-defined, and `contraction_bound` takes
        it in.
    alpha : array (..., T, r)
        Strengths.
    alpha_max : float or None
        ``alpha`` is declared to be in [0, alpha_max], and held to it here, which waits for a GPU; None declares
        nothing. NaN is let through: it is flagged by the solve, for its own sequence alone.

    Raises
    ------
    ValueError
        For shapes that do not match and for `alpha` outside its range.
    TypeError
        For arrays of different kinds or dtypes, or not of floating point.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> mixer = fp.mixers.DPLR(np.array([[[1.0, 0.0]]]), np.array([[0.5]]))
    >>> mixer
    DPLR(u: (1, 1, 2) float64, alpha: (1, 1) float64)
    >>> mixer.apply(np.array([[4.0, 4.0]]))
    array([[2., 4.]])
    """

    kind = "dplr"


class Householder(_LowRank):
    """Product of generalised reflections: ``Q_t = (I - alpha_r u_r u_r^T) ... (I - alpha_1 u_1 u_1^T)``.

    Section 2 of docs/mathematics.md; reflection 1 is applied to the vector first. With unit rows and ``alpha
    = 2`` the matrix is orthogonal. Has a direct solve.

    Parameters
    ----------
    u : array (..., T, r, D)
        Unit rows.
    alpha : array (..., T, r)
        Strengths.
    alpha_max : float or None
        ``alpha`` is declared to be in [0, alpha_max], and held to it here, which waits for a GPU; None declares
        nothing. NaN is let through.

    Raises
    ------
    ValueError
        For shapes that do not match and for `alpha` outside its range.
    TypeError
        For arrays of different kinds or dtypes, or not of floating point.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> u = np.array([[[1.0, 0.0], [0.0, 1.0]]])
    >>> fp.mixers.Householder(u, np.array([[2.0, 2.0]])).apply(np.array([[3.0, 4.0]]))
    array([[-3., -4.]])
    """

    kind = "householder"


class Kronecker(Mixer):
    """Identity minus a Kronecker product: ``Q_t = I - K1_t (x) K2_t`` on ``D = d1 d2`` channels.

    Section 2 of docs/mathematics.md. A vector is read as a ``d1 x d2`` matrix ``V``, row by row, and ``Q v``
    is ``v - vec(K1 V K2^T)``.

    Parameters
    ----------
    k1 : array (..., T, d1, d1)
    k2 : array (..., T, d2, d2)

    Raises
    ------
    ValueError
        For shapes that do not match.
    TypeError
        For arrays of different kinds or dtypes, or not of floating point.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> mixer = fp.mixers.Kronecker(np.full((1, 1, 1), 0.5), np.array([[[0.0, 1.0], [1.0, 0.0]]]))
    >>> mixer.apply(np.array([[2.0, 4.0]]))
    array([[0., 3.]])
    """

    kind = "kronecker"
    shapes: ClassVar[Mapping[str, str]] = {"k1": "... T d1 d1", "k2": "... T d2 d2"}
    k1: Array
    k2: Array

    def __init__(self, k1: Array, k2: Array) -> None:
        self._keep(k1, k2)

    def _channels(self, sizes: Mapping[str, int]) -> int:
        return sizes["d1"] * sizes["d2"]


class Monarch(Mixer):
    """Identity minus a block-diagonal matrix: ``Q_t = I - blockdiag(alpha_j M_j)`` on ``D = J b`` channels.

    Section 2 of docs/mathematics.md.

    Parameters
    ----------
    blocks : array (..., T, J, b, b)
        The blocks ``M_j``.
    alpha : array (..., T, J)
        Strengths, of any size.

    Raises
    ------
    ValueError
        For shapes that do not match.
    TypeError
        For arrays of different kinds or dtypes, or not of floating point.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> swap = np.array([[0.0, 1.0], [1.0, 0.0]])
    >>> fp.mixers.Monarch(swap[None, None], np.array([[0.5]])).apply(np.array([[2.0, 4.0]]))
    array([[0., 3.]])
    """

    kind = "monarch"
    shapes: ClassVar[Mapping[str, str]] = {"blocks": "... T J b b", "alpha": "... T J"}
    blocks: Array
    alpha: Array

    def __init__(self, blocks: Array, alpha: Array) -> None:
        self._keep(blocks, alpha)

    def _channels(self, sizes: Mapping[str, int]) -> int:
        return sizes["J"] * sizes["b"]


class Dense(Mixer):
    """Any matrix for each step.

    Section 2 of docs/mathematics.md.

    Parameters
    ----------
    q : array (..., T, D, D)

    Raises
    ------
    ValueError
        For a shape that does not fit.
    TypeError
        For anything but an array of floating point.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> fp.mixers.Dense(np.array([[[0.0, 1.0], [1.0, 0.0]]])).apply(np.array([[2.0, 4.0]]))
    array([[4., 2.]])
    """

    kind = "dense"
    shapes: ClassVar[Mapping[str, str]] = {"q": "... T D D"}
    q: Array

    def __init__(self, q: Array) -> None:
        self._keep(q)


class Fixed(Mixer):
    """One matrix shared by all steps and sequences; not input-dependent.

    Section 2 of docs/mathematics.md.

    Parameters
    ----------
    q : array (D, D)

    Raises
    ------
    ValueError
        For a shape that does not fit.
    TypeError
        For anything but an array of floating point.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> rotate = fp.mixers.Fixed(np.array([[0.0, -1.0], [1.0, 0.0]]))
    >>> rotate.apply(np.array([[1.0, 0.0], [0.0, 1.0]]))
    array([[ 0.,  1.],
           [-1.,  0.]])
    """

    kind = "fixed"
    shapes: ClassVar[Mapping[str, str]] = {"q": "D D"}
    q: Array

    def __init__(self, q: Array) -> None:
        self._keep(q)


def define(
    name: str,
    apply: Callable[..., Any],
    cotangent: Callable[..., Any],
    apply_transpose: Callable[..., Any] | None = None,
    *,
    params: Mapping[str, str],
    channels: Callable[[Mapping[str, int]], int] | None = None,
) -> type[Mixer]:
    """Make a mixer class out of two functions for one step.

    The functions are plain Python, or compiled with ``numba.njit``; the CPU room compiles plain ones, and
    inlines them in its solver loops, as the GPU room does with numba-cuda. ``fpnumba.reference`` calls them as
    plain Python. docs/own-mixer.md is a worked example.

    Parameters
    ----------
    name : str
        Name of the class.
    apply : callable
        ``apply(x, out, *params)`` writes ``out = Q x``; ``x`` and ``out`` are (D,), each parameter is that of
        one step.
    cotangent : callable
        ``cotangent(x, ybar, xbar, *params, *params_bar)`` writes ``xbar = Q^T ybar`` and the cotangents of
        the parameters of ``y = Q x``.
    apply_transpose : callable, optional
        ``apply_transpose(y, out, *params)`` writes ``out = Q^T y``; worth giving where it is cheaper than
        `cotangent`.
    params : mapping of str to str
        The parameters' names and the letters of their shapes at one step, such as ``{"u": "r D", "alpha":
        "r"}``. ``D`` is the number of channels; ``T`` is taken, for time.
    channels : callable, optional
        The number of channels from the sizes behind the letters, where no ``D`` tells.

    Returns
    -------
    type
        A subclass of `Mixer`, whose constructor takes the parameters as arrays (..., T, ...).

    Raises
    ------
    TypeError
        For functions that are not callable.
    ValueError
        For a mapping without parameters, or a parameter with a ``T`` of its own.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> def apply(x, out, scale):
    ...     for i in range(x.shape[0]):
    ...         out[i] = scale[i] * x[i]
    >>> def cotangent(x, ybar, xbar, scale, scale_bar):
    ...     for i in range(x.shape[0]):
    ...         xbar[i] = scale[i] * ybar[i]
    ...         scale_bar[i] = ybar[i] * x[i]
    >>> Diagonal = fp.mixers.define("Diagonal", apply, cotangent, params={"scale": "D"})
    >>> with fp.arrays.use_room("reference"):
    ...     Diagonal(np.array([[0.5, 2.0]])).apply(np.array([[4.0, 4.0]]))
    array([[2., 8.]])
    """
    for argument, function in (
        ("apply", apply),
        ("cotangent", cotangent),
        ("apply_transpose", apply_transpose),
    ):
        if not callable(function) and not (function is None and argument == "apply_transpose"):
            raise TypeError(f"argument `{argument}`: got {type(function).__name__}, expected a function")
    if not params:
        raise ValueError("argument `params`: got no parameters, expected at least one")
    for parameter, letters in params.items():
        if not parameter.isidentifier() or hasattr(Mixer, parameter) or parameter in Mixer.__annotations__:
            raise ValueError(f"argument `params`: {parameter!r} cannot name a parameter")
        if "T" in letters.split() or "..." in letters:
            raise ValueError(
                f"argument `params`: got {letters!r} for {parameter!r}, expected letters of one step, no T"
            )

    def __init__(self: Mixer, *arrays: Array) -> None:
        if len(arrays) != len(params):
            raise TypeError(f"{name} takes {len(params)} arrays ({', '.join(params)}), got {len(arrays)}")
        self._keep(*arrays)

    body: dict[str, Any] = {
        "__init__": __init__,
        "__module__": apply.__module__,
        "kind": CustomKind(name, apply, cotangent, apply_transpose),
        "shapes": {parameter: f"... T {letters}".strip() for parameter, letters in params.items()},
    }
    if channels is not None:
        body["_channels"] = lambda self, sizes: int(channels(sizes))
    return type(name, (Mixer,), body)
