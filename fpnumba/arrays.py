"""Whose arrays are these, which room serves them, and how the result goes back.

Every public function begins with `check`, which names each argument and says what shape it should have. What
comes back knows the caller's kind of array, the common dtype, the leading axes that all arguments broadcast
to, and the sizes behind the letters; it lays each argument out as a room wants it and hands results back as
the caller wants them.

The rules:

* all arguments are of one kind (NumPy; or JAX, torch, any library with DLPack, on the CPU) and of one dtype;
* float32 and float64 are computed as they are; float16 and bfloat16 are stored small and computed in float32;
* integers, booleans, complex numbers, lists and plain numbers are refused, not converted;
* leading axes broadcast as in NumPy, and a cotangent is summed back to the shape of its argument;
* inputs are never written to, and are copied only where a room could not read them as they lie.
"""

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Protocol, TypeAlias

import array_api_compat as compat
import numpy as np
from numpy.typing import NDArray

# A caller's array, of whatever library; what is inside the house is an ndarray.
Array: TypeAlias = Any
Float: TypeAlias = NDArray[Any]

DTYPES = ("float16", "bfloat16", "float32", "float64")
ROOMS = ("reference", "cpu", "gpu")
_CPU = 1  # DLPack's device code

_room: ContextVar[str] = ContextVar("fpnumba_room", default="cpu")


class Neighbour(Protocol):
    """What a file of `fpnumba.interop` that exchanges arrays provides."""

    def dtype_name(self, array: Any, /) -> str:
        """Name of the dtype in which `array` is stored."""

    def take(self, array: Any, /) -> Float:
        """View `array` as a NumPy array; raise `TypeError` with the reason where that cannot be."""

    def give(self, result: Float, like: Any, /) -> Any:
        """Hand `result` over as an array of the kind and dtype of `like`."""


_module = cache(importlib.import_module)


# --- rooms --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Room:
    """One room: its name and its doors, opened when first asked for."""

    name: str

    def _door(self, name: str) -> ModuleType:
        return _module(f"fpnumba.{self.name}.{name}")

    @property
    def scan(self) -> ModuleType:
        """Diagonal sequence mixing."""
        return self._door("scan")

    @property
    def mixers(self) -> ModuleType:
        """Channel mixing."""
        return self._door("mixers")

    @property
    def solve(self) -> ModuleType:
        """Fixed points and their adjoints."""
        return self._door("solve")


def room() -> Room:
    """The room that serves arrays on the CPU now: ``cpu``, unless inside `use_room`.

    Returns
    -------
    Room

    Examples
    --------
    >>> import fpnumba as fp
    >>> fp.arrays.room().name in fp.arrays.ROOMS
    True
    """
    return Room(_room.get())


@contextmanager
def use_room(name: str) -> Iterator[Room]:
    """Let another room serve the calls inside a ``with`` block, in this thread and this context.

    Meant for validation and for tests: ``reference`` is plain NumPy, slow and obvious, and gives the numbers
    that every other room is held to. A pullback stays in the room in which its forward pass ran.

    Parameters
    ----------
    name : {"cpu", "reference", "gpu"}

    Raises
    ------
    ValueError
        For an unknown name.
    NotImplementedError
        For ``gpu``: this version has no GPU kernels.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> lam, x = np.full((3, 1), 0.5), np.ones((3, 1))
    >>> with fp.arrays.use_room("reference"):
    ...     h = fp.linear_scan(lam, x)
    >>> h[:, 0]
    array([1.  , 1.5 , 1.75])
    """
    if name not in ROOMS:
        raise ValueError(f"argument `name`: got {name!r}, expected one of {', '.join(ROOMS)}")
    if name == "gpu":
        from fpnumba.gpu import MESSAGE

        raise NotImplementedError(MESSAGE)
    token = _room.set(name)
    try:
        yield Room(name)
    finally:
        _room.reset(token)


# --- kinds of array -----------------------------------------------------------------------------------------


def kind_of(argument: str, array: Any) -> str:
    """Name the kind of `array`: ``numpy``, ``jax``, ``torch``, or the library behind DLPack.

    Parameters
    ----------
    argument : str
        What an error calls it.
    array : object

    Returns
    -------
    str

    Raises
    ------
    TypeError
        For what is no array, for masked arrays and matrices, and for arrays that are not on the CPU.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> fp.arrays.kind_of("x", np.zeros(3))
    'numpy'
    """
    if isinstance(array, np.ma.MaskedArray | np.matrix):
        raise TypeError(f"argument `{argument}`: got {_called(array)}, expected an array without a mask")
    if isinstance(array, np.ndarray):
        return "numpy"
    jax = compat.is_jax_array(array)
    exchanges = hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")
    if isinstance(array, type) or not (jax or exchanges):
        raise TypeError(
            f"argument `{argument}`: got {_called(array)}, expected a NumPy array, or another array on "
            "the CPU that supports DLPack (JAX, torch)"
        )
    try:
        device = int(array.__dlpack_device__()[0])
    except Exception as reason:
        if jax:  # a traced one has no device: its neighbour says so better
            return "jax"
        raise TypeError(f"argument `{argument}`: {_called(array)} is not on the CPU ({reason})") from None
    if device != _CPU:
        from fpnumba.gpu import MESSAGE

        raise TypeError(f"argument `{argument}`: {_called(array)} is not on the CPU; {MESSAGE}")
    kind = "jax" if jax else "torch" if compat.is_torch_array(array) else None
    if kind is not None:
        return kind
    from fpnumba.interop.dlpack import importer

    if importer(array) is None:
        raise TypeError(
            f"argument `{argument}`: {_called(array)} can be read through DLPack, but its library has no "
            "from_dlpack to take the result; pass numpy.from_dlpack(x)"
        )
    return type(array).__module__.partition(".")[0]


@cache
def neighbour(kind: str) -> Neighbour:
    """The file that exchanges arrays of this kind."""
    known = kind if kind in ("numpy", "jax", "torch") else "dlpack"
    module: Any = _module(f"fpnumba.interop.{known}")
    return module  # type: ignore[no-any-return]


def _called(thing: Any) -> str:
    cls = thing if isinstance(thing, type) else type(thing)
    name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    return f"the class {name}" if isinstance(thing, type) else name


# --- checking -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """The arrays of one call, checked against each other.

    Attributes
    ----------
    kind : str
        The caller's kind of array.
    dtype : str
        Name of the dtype in which the arrays are stored.
    compute : numpy.dtype
        The dtype that the room computes in.
    lead : tuple of int
        The leading axes that all batched arguments broadcast to.
    sizes : dict
        What the letters of the shapes stand for.
    """

    kind: str
    dtype: str
    compute: np.dtype[Any]
    lead: tuple[int, ...]
    sizes: dict[str, int]
    _given: dict[str, Array]
    _views: dict[str, Float]
    _rank: dict[str, int]  # trailing axes, or -1 for an argument without leading axes

    @property
    def batch(self) -> int:
        """Number of sequences: the product of the leading axes."""
        return math.prod(self.lead)

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def __getitem__(self, name: str) -> Float:
        """The argument as a room takes it: ``(B, ...)``, C-contiguous, in the dtype of the computation."""
        view, rank = self._views[name], self._rank[name]
        if rank >= 0:
            trailing = view.shape[view.ndim - rank :]
            if view.shape != self.lead + trailing:
                view = np.broadcast_to(view, self.lead + trailing)
            view = view.reshape((self.batch, *trailing))
        return _for_a_room(view, self.compute)

    def get(self, name: str) -> Float | None:
        """The same, or None for an argument that was not given."""
        return self[name] if name in self._given else None

    def view(self, name: str) -> Float:
        """The argument as it lies in the caller's memory."""
        return self._views[name]

    def back(self, result: Float, *, trailing: tuple[int, ...] | None = None) -> Array:
        """Hand a room's result ``(B, ...)`` back: leading axes restored, in the caller's kind and dtype."""
        rest = result.shape[1:] if trailing is None else trailing
        return self._give(result.reshape(self.lead + rest))

    def back_to(self, name: str, cotangent: Float) -> Array:
        """Hand a cotangent ``(B, ...)`` back in its argument's own shape, summed over axes that broadcast."""
        view, rank = self._views[name], self._rank[name]
        if rank >= 0:
            trailing = view.shape[view.ndim - rank :]
            cotangent = _sum_to(cotangent.reshape(self.lead + trailing), view.shape)
        return self._give(cotangent, like=self._given[name])

    def _give(self, result: Float, like: Array = None) -> Array:
        like = next(iter(self._given.values())) if like is None else like
        return neighbour(self.kind).give(result, like)

    def take(self, name: str, array: Array, shape: tuple[int, ...]) -> Float:
        """Check an output's cotangent, its kind, dtype and whole shape, and lay it out like the arguments."""
        other = check({name: (array, None)})
        if other.kind != self.kind or other.dtype != self.dtype:
            raise TypeError(
                f"argument `{name}`: got {other.kind} {other.dtype}, expected {self.kind} {self.dtype} "
                "like the primals"
            )
        got = other._views[name].shape
        if got != shape:
            raise ValueError(f"argument `{name}`: got shape {got}, expected {shape}, the shape of the output")
        view = other._views[name].reshape((self.batch, *shape[len(self.lead) :]))
        return _for_a_room(view, self.compute)


def check(arguments: Mapping[str, tuple[Array, str | None]]) -> Checked:
    """Check the arrays of a call, before anything is computed.

    Parameters
    ----------
    arguments : mapping of name to (array or None, shape)
        The shape is a string of letters, such as ``"... T D"``, where ``...`` stands for leading axes that
        broadcast between arguments; a letter means the same size everywhere. None as the array: the argument
        was not given. None as the shape: any.

    Returns
    -------
    Checked

    Raises
    ------
    TypeError
        For things that are no arrays, arrays of different kinds or dtypes, and dtypes that are not floating
        point.
    ValueError
        For shapes that do not match.

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba.arrays import check
    >>> call = check({"x": (np.ones((2, 5, 3)), "... T D"), "lam": (np.ones((5, 3)), "... T D")})
    >>> call.lead, call.sizes, call["lam"].shape
    ((2,), {'T': 5, 'D': 3}, (2, 5, 3))
    >>> check({"x": (np.ones((5, 3)), "... T D"), "lam": (np.ones((4, 3)), "... T D")})
    Traceback (most recent call last):
        ...
    ValueError: argument `lam`: got shape (4, 3), expected (..., T=5, D=3)
    """
    given = {name: array for name, (array, _) in arguments.items() if array is not None}
    kind = _same("kinds", {name: kind_of(name, array) for name, array in given.items()})
    host = neighbour(kind)
    views: dict[str, Float] = {}
    dtypes: dict[str, str] = {}
    for name, array in given.items():
        try:
            dtypes[name] = host.dtype_name(array)
            if dtypes[name] in DTYPES:
                views[name] = host.take(array)
        except (TypeError, ValueError, RuntimeError, BufferError) as reason:
            raise TypeError(f"argument `{name}`: {reason}") from None
        if dtypes[name] not in DTYPES:
            raise TypeError(
                f"argument `{name}`: got dtype {dtypes[name]}, expected one of {', '.join(DTYPES)}"
            )
    dtype = _same("dtypes", dtypes)
    sizes: dict[str, int] = {}
    rank: dict[str, int] = {}
    lead: tuple[int, ...] = ()
    for name, view in views.items():
        shape = arguments[name][1]
        rank[name] = _bind(name, view.shape, shape, sizes) if shape is not None else view.ndim
        if rank[name] >= 0:
            lead = _broadcast(name, view.shape[: view.ndim - rank[name]], lead)
    compute = np.dtype("float64" if dtype == "float64" else "float32")
    return Checked(kind, dtype, compute, lead, sizes, given, views, rank)


class _Unlocked:
    """The memory of a read-only array without the lock.

    Numba compiles a kernel anew for each pattern of read-only arguments. No room writes to its inputs, so one pattern
    serves them all.
    """

    def __init__(self, array: Float) -> None:
        self.owner = array
        self.__array_interface__ = array.__array_interface__ | {"data": (array.ctypes.data, False)}


def _for_a_room(array: Float, dtype: np.dtype[Any]) -> Float:
    """The array itself where a room can read it as it lies; a copy otherwise."""
    if not (array.dtype == dtype and array.flags.carray):
        array = np.require(array, dtype, ["C_CONTIGUOUS", "ALIGNED"])
    return array if array.flags.writeable else np.asarray(_Unlocked(array))


def _same(what: str, found: dict[str, str]) -> str:
    """The one kind, or dtype, of all arguments."""
    first, one = next(iter(found.items()))
    for name, other in found.items():
        if other != one:
            raise TypeError(
                f"arguments `{first}` and `{name}` are of different {what}: {one} and {other}; "
                "convert them to one first"
            )
    return one


def _bind(name: str, shape: tuple[int, ...], wanted: str, sizes: dict[str, int]) -> int:
    """Match a shape against its letters, give new letters their size, return the number of trailing axes."""
    letters = wanted.split()
    leading = letters[:1] == ["..."]
    letters = letters[1:] if leading else letters
    trailing = shape[len(shape) - len(letters) :] if len(shape) >= len(letters) else ()
    fits = len(trailing) == len(letters) and (leading or len(shape) == len(letters))
    before = dict(sizes)
    # A letter may come twice in one shape, so each is bound before the next is compared.
    if not fits or any(sizes.setdefault(letter, n) != n for letter, n in zip(letters, trailing, strict=True)):
        named = [f"{letter}={before[letter]}" if letter in before else letter for letter in letters]
        if leading:
            named = ["...", *named]
        sizes.clear()
        sizes.update(before)
        expected = f"({', '.join(named)}{',' if len(named) == 1 else ''})"
        raise ValueError(f"argument `{name}`: got shape {shape}, expected {expected}")
    return len(letters) if leading else -1


def _broadcast(name: str, mine: tuple[int, ...], lead: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(lead, mine)
    except ValueError:
        raise ValueError(
            f"argument `{name}`: got leading axes {mine}, expected axes that broadcast with {lead}, "
            "those of the arguments before it"
        ) from None


def _sum_to(array: Float, shape: tuple[int, ...]) -> Float:
    """Sum over the axes along which `shape` was broadcast: the transpose of broadcasting."""
    extra = array.ndim - len(shape)
    stretched = [i + extra for i, n in enumerate(shape) if n == 1 and array.shape[i + extra] != 1]
    axes = (*range(extra), *stretched)
    return array.sum(axis=axes, keepdims=True).reshape(shape) if axes else array.reshape(shape)


def _plain(index: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(i) for i in index)


def declared_range(name: str, view: Float, low: float, high: float, what: str) -> None:
    """Refuse values outside a declared range, naming the worst one and where it is.

    NaN passes: it is flagged later, for its own sequence alone.

    Raises
    ------
    ValueError

    Examples
    --------
    >>> import numpy as np
    >>> from fpnumba.arrays import declared_range
    >>> declared_range("alpha", np.array([0.5, 2.5]), 0.0, 2.0, "alpha_max=2.0")
    Traceback (most recent call last):
        ...
    ValueError: argument `alpha`: got 2.5 at index (1,), outside the declared range [0.0, 2.0] (alpha_max=2.0)
    """
    if view.size == 0:
        return
    small, large = np.fmin.reduce(view, axis=None), np.fmax.reduce(view, axis=None)
    if not (small < low or large > high):
        return
    beyond = large - high > low - small
    where = np.unravel_index(np.nanargmax(view) if beyond else np.nanargmin(view), view.shape)
    raise ValueError(
        f"argument `{name}`: got {float(large if beyond else small):g} at index {_plain(where)}, outside "
        f"the declared range [{low}, {high}] ({what})"
    )
