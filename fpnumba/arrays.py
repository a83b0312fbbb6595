"""Whose arrays are these, which room serves them, and how the result goes back.

Every public function begins with `check`, which names each argument and says what shape it should have. What
comes back knows the caller's kind of array, the room that serves it, the common dtype, the leading axes that all
arguments broadcast to, and the sizes behind the letters; it lays each argument out as the room wants it and hands
results back as the caller wants them.

The rules:

* all arguments are of one kind (NumPy, CuPy; or JAX, torch, any library with DLPack; Numba's device arrays) and
  of one dtype, and lie on one device, the CPU or a GPU: nothing is moved from one to the other;
* float32 and float64 are computed as they are; float16 and bfloat16 are stored small and computed in float32;
* integers, booleans, complex numbers, lists and plain numbers are refused, not converted;
* leading axes broadcast as in NumPy, and a cotangent is summed back to the shape of its argument;
* inputs are never written to, and are copied only where a room could not read them as they lie.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any, Protocol, TypeAlias

import array_api_compat as compat
import numpy as np
from numpy.typing import NDArray

# A caller's array, of whatever library; what is inside the house is an ndarray, or CuPy's in the GPU room.
Array: TypeAlias = Any
Float: TypeAlias = NDArray[Any]

DTYPES = ("float16", "bfloat16", "float32", "float64")
ROOMS = ("reference", "cpu", "gpu")
# DLPack's device codes: the CPU, pinned memory with it; CUDA, managed memory with it
_HOST, _CUDA = (1, 3), (2, 13)
_NEIGHBOURS = ("numpy", "cupy", "jax", "torch", "numba")

_room: ContextVar[str | None] = ContextVar("fpnumba_room", default=None)


class Neighbour(Protocol):
    """What a file of `fpnumba.interop` that exchanges arrays provides."""

    def dtype_name(self, array: Any, /) -> str:
        """Name of the dtype in which `array` is stored."""

    def take(self, array: Any, /) -> Float:
        """View `array` as a NumPy array, or as a CuPy array if it lies on a GPU; raise `TypeError` with the reason
        where that cannot be."""

    def give(self, result: Float, like: Any, /) -> Any:
        """Hand `result` over as an array of the kind and dtype of `like`."""


_module = cache(importlib.import_module)


# --- rooms --------------------------------------------------------------------------------------------------


_AS_IT_IS: AbstractContextManager[Any] = nullcontext()


def _gpu() -> Any:
    """What is asked of a device; nothing of it is imported before the first GPU array."""
    return _module("fpnumba.gpu._host")


@dataclass(frozen=True)
class Room:
    """One room: its name, the GPU whose arrays it serves (None: the current one), and its doors, opened when first
    asked for."""

    name: str
    device: int | None = None

    def _door(self, name: str) -> Any:
        doors = _module(f"fpnumba.{self.name}.{name}")
        return doors if self.device is None else _OnDevice(doors, self)

    @property
    def scan(self) -> Any:
        """Diagonal sequence mixing."""
        return self._door("scan")

    @property
    def mixers(self) -> Any:
        """Channel mixing."""
        return self._door("mixers")

    @property
    def solve(self) -> Any:
        """Fixed points and their adjoints."""
        return self._door("solve")

    @property
    def mamba(self) -> Any:
        """Fixed points with a matrix state."""
        return self._door("mamba")

    @property
    def xp(self) -> Any:
        """The array module of what goes through the doors: NumPy, or CuPy."""
        return _gpu().xp() if self.name == "gpu" else np

    def current(self) -> AbstractContextManager[Any]:
        """Make this room's device the current one inside a ``with`` block."""
        return _AS_IT_IS if self.device is None else _gpu().at(self.device)

    def for_the_host(self, **told: tuple[Float, tuple[int, ...]]) -> "dict[str, Float | Later]":
        """What the host may want to know of a result: arrays in the shapes beside them, or what fetches them from the
        device."""
        if self.name != "gpu":
            return {name: array.reshape(shape) for name, (array, shape) in told.items()}
        fetchers = _gpu().later(*(array for array, _ in told.values()))
        return {
            name: Later(fetch, shape, array)
            for (name, (array, shape)), fetch in zip(told.items(), fetchers, strict=True)
        }


@dataclass(frozen=True)
class Later:
    """Numbers that a device still has, and may not have computed yet."""

    come: Callable[[], NDArray[Any]]
    shape: tuple[int, ...]
    array: Any = None

    def fetch(self) -> NDArray[Any]:
        """The numbers; the device is waited for."""
        return self.come().reshape(self.shape)


_room_of = cache(Room)


class _OnDevice:
    """Doors of the GPU room that open on the device of their arrays."""

    def __init__(self, doors: ModuleType, room: Room) -> None:
        self._doors, self._room = doors, room

    def __getattr__(self, name: str) -> Any:
        return partial(self._through, getattr(self._doors, name))

    def _through(self, door: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with self._room.current():
            return door(*arguments, **options)


def room() -> Room:
    """The room that serves arrays on the CPU now: ``cpu``, unless inside `use_room`.

    Arrays on a GPU are served by ``gpu``.

    Returns
    -------
    Room

    Examples
    --------
    >>> import fpnumba as fp
    >>> fp.arrays.room().name in fp.arrays.ROOMS
    True
    """
    return Room(_room.get() or "cpu")


def host_room() -> Room:
    """The same for what computes on NumPy arrays and nothing else, which ``use_room("gpu")`` leaves without a room.

    Raises
    ------
    TypeError
    """
    if _room.get() == "gpu":
        raise TypeError(
            "layers and models compute NumPy's arrays on the CPU, and so not inside use_room('gpu'); for the GPU give "
            "them CuPy's arrays (cupy.asarray), parameters too"
        )
    return room()


def served_by(array: Any) -> Room:
    """The GPU room on the device of one of CuPy's arrays."""
    return _room_of("gpu", int(array.device.id))


@contextmanager
def use_room(name: str) -> Iterator[Room]:
    """Let another room serve the calls inside a ``with`` block, in this thread and this context.

    Meant for validation and for tests: ``reference`` is plain NumPy, slow and obvious, and gives the numbers
    that every other room is held to. A pullback stays in the room in which its forward pass ran. A room takes the
    arrays of its own side only, ``reference`` and ``cpu`` those on the CPU, ``gpu`` those on a GPU: with a room
    asked for by name, others are refused, and never moved.

    Parameters
    ----------
    name : {"cpu", "reference", "gpu"}

    Raises
    ------
    ValueError
        For an unknown name.
    ImportError, RuntimeError
        For ``gpu``: where CuPy, a driver or a device is missing.

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
        _gpu().require()
    token = _room.set(name)
    try:
        yield Room(name)
    finally:
        _room.reset(token)


@contextmanager
def use_engine(name: str) -> Iterator[None]:
    """Let one kind of kernel serve the calls on GPU arrays inside a ``with`` block, in this thread and this context.

    ``raw`` are the tuned kernels in CUDA C; ``numba`` are their readable twins in numba.cuda, which also take a
    user's own mixer. Without this the room takes ``raw`` where there is one. What is asked for by name runs or
    raises. Arrays on the CPU are not concerned. A pullback takes the engine of the block in which it is called.

    Parameters
    ----------
    name : {"raw", "numba"}

    Raises
    ------
    ValueError
        For an unknown name.
    ImportError
        For ``numba``: where numba-cuda is missing.

    Examples
    --------
    >>> import fpnumba as fp
    >>> with fp.arrays.use_engine("raw"):
    ...     fp.gpu.engine()
    'raw'
    """
    from fpnumba.gpu import ENGINES
    from fpnumba.gpu import use_engine as use

    if name not in ENGINES:
        raise ValueError(f"argument `name`: got {name!r}, expected one of {', '.join(ENGINES)}")
    if name == "numba":
        _gpu().require_numba()
    with use(name):
        yield


def _serving(name: str, kind: str, device: int | None, asked: str | None) -> Room:
    """The room for arrays on that device, the one asked for by name if any; `name` is the first of them."""
    if device is None and asked == "gpu":
        raise TypeError(
            f"argument `{name}`: got {kind} on the CPU inside use_room('gpu'), and nothing is moved; "
            "move it first (cupy.asarray(x), x.cuda(), jax.device_put(x, jax.devices('gpu')[0]))"
        )
    if device is not None and asked not in (None, "gpu"):
        raise TypeError(
            f"argument `{name}`: got {kind} on a GPU inside use_room({asked!r}), and nothing is moved; "
            "move it first (cupy.asnumpy(x), x.cpu(), jax.device_get(x))"
        )
    return _room_of("gpu", device) if device is not None else _room_of(asked or "cpu")


# --- kinds of array -----------------------------------------------------------------------------------------


def kind_of(argument: str, array: Any) -> str:
    """Name the kind of `array`: ``numpy``, ``cupy``, ``jax``, ``torch``, ``numba``, or the library behind DLPack.

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
        For what is no array, for masked arrays and matrices, and for arrays that are neither on the CPU nor on a
        CUDA device.

    Examples
    --------
    >>> import numpy as np
    >>> import fpnumba as fp
    >>> fp.arrays.kind_of("x", np.zeros(3))
    'numpy'
    """
    return _look(argument, array)[0]


def _look(argument: str, array: Any) -> tuple[str, int | None]:
    """The kind of an array, and the GPU that it lies on; None for the CPU."""
    if isinstance(array, np.ma.MaskedArray | np.matrix):
        raise TypeError(f"argument `{argument}`: got {_called(array)}, expected an array without a mask")
    if isinstance(array, np.ndarray):
        return "numpy", None
    if is_cupy(array):
        return "cupy", int(array.device.id)
    jax = compat.is_jax_array(array)
    exchanges = hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")
    # A tensor that requires grad would not even let itself be asked
    shares = not (jax or exchanges) and hasattr(array, "__cuda_array_interface__")
    if isinstance(array, type) or not (jax or exchanges or shares):
        raise TypeError(
            f"argument `{argument}`: got {_called(array)}, expected a NumPy or CuPy array, or another array "
            "that supports DLPack (JAX, torch)"
        )
    if shares and type(array).__module__.partition(".")[0] in ("numba", "numba_cuda"):
        _gpu().require()
        view: Any = neighbour("numba").take(array)
        return "numba", int(view.device.id)
    if shares:
        raise TypeError(
            f"argument `{argument}`: {_called(array)} can be read through __cuda_array_interface__, but its library "
            "has no from_dlpack to take the result; pass cupy.asarray(x)"
        )
    try:
        code, index = (int(part) for part in array.__dlpack_device__())
    except Exception as reason:
        if jax:  # a traced one has no device: its neighbour says so better
            return "jax", None
        raise TypeError(
            f"argument `{argument}`: {_called(array)} is not on the CPU ({reason}), nor on a CUDA device"
        ) from None
    if code not in (*_HOST, *_CUDA):
        raise TypeError(
            f"argument `{argument}`: {_called(array)} is not on the CPU, nor on a CUDA device (but on DLPack's {code})"
        )
    device = index if code in _CUDA else None
    kind = "jax" if jax else "torch" if compat.is_torch_array(array) else None
    if kind is not None:
        return kind, device
    from fpnumba.interop.dlpack import importer

    if importer(array) is None:
        raise TypeError(
            f"argument `{argument}`: {_called(array)} can be read through DLPack, but its library has no "
            f"from_dlpack to take the result; pass {'numpy' if device is None else 'cupy'}.from_dlpack(x)"
        )
    return type(array).__module__.partition(".")[0], device


@cache
def neighbour(kind: str) -> Neighbour:
    """The file that exchanges arrays of this kind."""
    known = kind if kind in _NEIGHBOURS else "dlpack"
    module: Any = _module(f"fpnumba.interop.{known}")
    return module  # type: ignore[no-any-return]


def namespace(view: Any) -> Any:
    """The array module of an array inside the house: NumPy, or CuPy."""
    return np if isinstance(view, np.ndarray) else _gpu().xp()


def to_numpy(view: Any) -> NDArray[Any]:
    """An array inside the house as one of NumPy; a GPU array is waited for."""
    return view if isinstance(view, np.ndarray) else _gpu().later(view)[0]()


def is_cupy(array: Any) -> bool:
    """Whether it is an array of CuPy's, which need not be installed."""
    return compat.is_cupy_array(array)


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
    room : Room
        The room that serves them.
    carried : numpy.dtype
        The dtype in which the room takes arrays and gives results: on a GPU the one they are stored in, on the
        CPU the one of the computation.
    """

    kind: str
    dtype: str
    compute: np.dtype[Any]
    lead: tuple[int, ...]
    sizes: dict[str, int]
    room: Room
    carried: np.dtype[Any]
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
        """The argument as the room takes it: ``(B, ...)``, C-contiguous, in the dtype `carried`."""
        view, rank = self._views[name], self._rank[name]
        if rank >= 0:
            trailing = view.shape[view.ndim - rank :]
            if view.shape != self.lead + trailing:
                view = namespace(view).broadcast_to(view, self.lead + trailing)
            if view.ndim != rank + 1:
                with self.room.current():
                    view = view.reshape((self.batch, *trailing))
        return self._laid_out(view)

    def _laid_out(self, view: Float) -> Float:
        if self.room.device is None:
            return _for_a_room(view, self.compute)
        if view.flags.c_contiguous:
            return view
        with self.room.current():
            return namespace(view).ascontiguousarray(view)  # type: ignore[no-any-return]

    def zeros(self, shape: tuple[int, ...]) -> Float:
        """Zeros as the room takes them."""
        with self.room.current():
            return self.room.xp.zeros(shape, self.carried)  # type: ignore[no-any-return]

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
            with self.room.current():
                cotangent = _sum_to(cotangent.reshape(self.lead + trailing), view.shape, self.compute)
        return self._give(cotangent, like=self._given[name])

    def _give(self, result: Float, like: Array = None) -> Array:
        like = next(iter(self._given.values())) if like is None else like
        with self.room.current():
            return neighbour(self.kind).give(result, like)

    def take(self, name: str, array: Array, shape: tuple[int, ...]) -> Float:
        """Check an output's cotangent, its kind, dtype and whole shape, and lay it out like the arguments."""
        other = check({name: (array, None)}, any_room=True)
        ours, theirs = (
            f"{call.kind} {call.dtype}"
            + f" on {_place(call.room.device)}" * (self.room.device != other.room.device)
            for call in (self, other)
        )
        if ours != theirs:
            raise TypeError(f"argument `{name}`: got {theirs}, expected {ours} like the primals")
        got = other._views[name].shape
        if got != shape:
            raise ValueError(f"argument `{name}`: got shape {got}, expected {shape}, the shape of the output")
        with self.room.current():
            return self._laid_out(other._views[name].reshape((self.batch, *shape[len(self.lead) :])))


def check(arguments: Mapping[str, tuple[Array, str | None]], *, any_room: bool = False) -> Checked:
    """Check the arrays of a call, before anything is computed.

    Parameters
    ----------
    arguments : mapping of name to (array or None, shape)
        The shape is a string of letters, such as ``"... T D"``, where ``...`` stands for leading axes that
        broadcast between arguments; a letter means the same size everywhere. None as the array: the argument
        was not given. None as the shape: any.
    any_room : bool
        Whether `use_room` has no say: for arrays that belong to an earlier call.

    Returns
    -------
    Checked

    Raises
    ------
    TypeError
        For things that are no arrays, arrays of different kinds or dtypes or on different devices, and dtypes
        that are not floating point.
    ValueError
        For shapes that do not match.
    ImportError, RuntimeError
        For arrays on a GPU, where CuPy is missing or has no device.

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
    looks = {name: _look(name, array) for name, array in given.items()}
    first, (kind, device) = next(iter(looks.items()))
    if len(set(looks.values())) > 1:
        places = {name: _place(look[1]) for name, look in looks.items()}
        _same("are on different devices", places, "move them to one first")
        _same("are of different kinds", {name: look[0] for name, look in looks.items()}, _CONVERT)
    served = _serving(first, kind, device, None if any_room else _room.get())
    if device is not None:
        _gpu().require()
    # What CUDA says then is of no argument in particular
    refusals = _REFUSALS if device is None else _REFUSALS[:-1]
    host = neighbour(kind)
    views: dict[str, Float] = {}
    dtypes: dict[str, str] = {}
    with served.current():
        for name, array in given.items():
            try:
                dtypes[name] = host.dtype_name(array)
                if dtypes[name] in DTYPES:
                    views[name] = host.take(array)
            except refusals as reason:
                raise TypeError(f"argument `{name}`: {reason}") from None
            if dtypes[name] not in DTYPES:
                raise TypeError(
                    f"argument `{name}`: got dtype {dtypes[name]}, expected one of {', '.join(DTYPES)}"
                )
    dtype = _same("are of different dtypes", dtypes, _CONVERT)
    sizes: dict[str, int] = {}
    rank: dict[str, int] = {}
    lead: tuple[int, ...] = ()
    for name, view in views.items():
        shape = arguments[name][1]
        rank[name] = _bind(name, view.shape, shape, sizes) if shape is not None else view.ndim
        if rank[name] >= 0:
            lead = _broadcast(name, view.shape[: view.ndim - rank[name]], lead)
    compute = np.dtype("float64" if dtype == "float64" else "float32")
    carried = views[first].dtype if device is not None else compute
    return Checked(kind, dtype, compute, lead, sizes, served, carried, given, views, rank)


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


_CONVERT = "convert them to one first"
_REFUSALS = (TypeError, ValueError, BufferError, RuntimeError)


def _same(complaint: str, found: dict[str, str], remedy: str) -> str:
    """The one kind, dtype or device of all arguments."""
    first, one = next(iter(found.items()))
    for name, other in found.items():
        if other != one:
            raise TypeError(f"arguments `{first}` and `{name}` {complaint}: {one} and {other}; {remedy}")
    return one


def _place(device: int | None) -> str:
    return "cpu" if device is None else f"cuda:{device}"


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
    if mine in (lead, ()):  # the usual case, without NumPy's pains
        return lead
    try:
        return np.broadcast_shapes(lead, mine)
    except ValueError:
        raise ValueError(
            f"argument `{name}`: got leading axes {mine}, expected axes that broadcast with {lead}, "
            "those of the arguments before it"
        ) from None


def _sum_to(array: Float, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Float:
    """Sum, in that dtype, over the axes along which `shape` was broadcast: the transpose of broadcasting."""
    extra = array.ndim - len(shape)
    stretched = [i + extra for i, n in enumerate(shape) if n == 1 and array.shape[i + extra] != 1]
    axes = (*range(extra), *stretched)
    if not axes:
        return array.reshape(shape)
    total: Float = array.astype(dtype, copy=False).sum(axis=axes, keepdims=True)
    return total.reshape(shape)


def _extremes(view: Any) -> tuple[Any, Any]:
    """The smallest and the largest element that is a number; a GPU is waited for."""
    if isinstance(view, np.ndarray):
        return np.fmin.reduce(view, axis=None), np.fmax.reduce(view, axis=None)
    xp = namespace(view)
    wide = view.astype(np.float64 if view.dtype == np.float64 else np.float32, copy=False)
    found = to_numpy(xp.stack((xp.nanmin(wide), xp.nanmax(wide))))
    return found[0], found[1]


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
    small, large = _extremes(view)
    if not (small < low or large > high):
        return
    view = to_numpy(view)
    beyond = large - high > low - small
    where = np.unravel_index(np.nanargmax(view) if beyond else np.nanargmin(view), view.shape)
    raise ValueError(
        f"argument `{name}`: got {float(large if beyond else small):g} at index {_plain(where)}, outside "
        f"the declared range [{low}, {high}] ({what})"
    )
