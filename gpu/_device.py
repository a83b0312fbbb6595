"""The device: its array module, and how a kernel of `gpu/kernels` gets there.

Everything that the room knows of CuPy and of the driver is here. Nothing is imported, compiled or probed before the
first call.
"""

import ctypes
import math
import struct
import sys
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fpnumba.gpu._recording import recording

KERNELS = Path(__file__).with_name("kernels")
# How NumPy's names of dtypes are spelt in the kernels.
STORES = {"float64": "double", "float32": "float", "float16": "f16", "bfloat16": "bf16"}
FLAGS = ("-std=c++17",)


class Kernel:
    """One kernel for one shape class: a function of a file of `gpu/kernels`, under some macros. Equal ones are the same
    object, so that it is looked up quickly."""

    __slots__ = ("cooperative", "file", "function", "macros")
    _known: ClassVar[dict[tuple[Any, ...], "Kernel"]] = {}

    file: str
    function: str
    macros: tuple[tuple[str, str], ...]
    cooperative: bool

    @classmethod
    def of(
        cls, file: str, function: str, macros: Mapping[str, object], *, cooperative: bool = False
    ) -> "Kernel":
        """Name a kernel; the order of `macros` does not matter."""
        which = file, function, tuple(sorted((k, str(v)) for k, v in macros.items())), cooperative
        found = cls._known.get(which)
        if found is None:
            found = object.__new__(cls)
            found.file, found.function, found.macros, found.cooperative = which
            found = cls._known.setdefault(which, found)
        return found

    def __repr__(self) -> str:
        return f"Kernel({self.file}, {self.function}, {self.macros})"

    @property
    def options(self) -> tuple[str, ...]:
        """The compiler's options."""
        return (*FLAGS, *(f"-D{name}={value}" for name, value in self.macros))


@cache
def source(file: str) -> str:
    """The text of a kernel with the shared pieces that it includes pasted in: each once."""
    seen: set[str] = set()

    def paste(name: str) -> str:
        lines = []
        for line in (KERNELS / name).read_text(encoding="utf-8").splitlines():
            if line.startswith('#include "'):
                included = line.split('"')[1]
                if included not in seen:
                    seen.add(included)
                    lines.append(paste(included))
            elif line.strip() != "#pragma once":
                lines.append(line)
        return "\n".join(lines) + "\n"

    return paste(file)


def xp() -> Any:
    """The array module of the room, CuPy.

    Raises
    ------
    ImportError
        If it is not installed; the message says how to.
    """
    found = sys.modules.get("cupy")
    if found is not None:
        return found
    try:
        import cupy
    except ImportError as reason:
        raise ImportError(MISSING) from reason
    return cupy


MISSING = (
    "the GPU room needs CuPy: pip install 'fpnumba[cuda13]' for a driver of CUDA 13, or 'fpnumba[cuda12]' "
    "for one of CUDA 12"
)

_lock = threading.Lock()
_loaded: dict[tuple[int, Kernel], Any] = {}
_allowed: dict[tuple[int, Kernel], int] = {}  # dynamic shared memory that a kernel was allowed beyond 48 KiB


def _function(kernel: Kernel, shared: int) -> Any:
    """The kernel on the current device, allowed so much shared memory."""
    key = (current(), kernel)
    found = _loaded.get(key)
    if found is None:
        with _lock:
            found = _loaded.get(key)
            if found is None:
                module = xp().RawModule(
                    code=source(kernel.file),
                    options=kernel.options,
                    enable_cooperative_groups=kernel.cooperative,
                )
                found = module.get_function(kernel.function)
                _loaded[key] = found
    if shared > _allowed.get(key, 48 * 1024):
        found.max_dynamic_shared_size_bytes = shared
        _allowed[key] = shared
    return found


_threads = threading.local()


def _context() -> None:
    """See to it that this thread has a context of the current device: the driver makes none, and the runtime does at a
    thread's first call."""
    seen, device = vars(_threads).setdefault("devices", set()), current()
    if device not in seen:
        xp().cuda.runtime.setDevice(device)
        seen.add(device)


def loaded() -> list[Kernel]:
    """The kernels that this process has compiled or loaded so far, on the current device."""
    device = current()
    return [kernel for at, kernel in _loaded if at == device]


class Repeated:
    """A launch that is repeated with few of its arguments changed: those are written into the packed ones.

    Parameters
    ----------
    kernel, blocks, threads, arguments, shared
        As of :func:`launch`.
    """

    def __init__(
        self, kernel: Kernel, blocks: int, threads: int, arguments: tuple[Any, ...], *, shared: int = 0
    ) -> None:
        self._plain = (kernel, blocks, threads, shared) if not hasattr(xp(), "cuda") else None
        self._arguments = list(arguments)
        if self._plain is None and blocks:
            _context()
            cuda = xp().cuda
            self._at, (data, table) = _packed(arguments)
            self._data, self._table, self._launch = data, table, cuda.driver.launchKernel
            shape = blocks, 1, 1, threads, 1, 1, shared, cuda.get_current_stream().ptr
            self._call = (_function(kernel, shared).kernel.ptr, *shape)
            self._begin = ctypes.addressof(data)
        self._blocks = blocks

    def __call__(self, **changed: Any) -> None:
        """Launch; ``_3=array`` puts an array, or a number of eight bytes, in the place of argument 3."""
        if self._plain is not None:
            for place, value in changed.items():
                self._arguments[int(place[1:])] = value
            kernel, blocks, threads, shared = self._plain
            launch(kernel, blocks, threads, tuple(self._arguments), shared=shared)
            return
        if not self._blocks:
            return
        for place, value in changed.items():
            number = 0 if value is None else int(value) if isinstance(value, np.integer) else value.data.ptr
            ctypes.c_int64.from_address(self._begin + 8 * int(place[1:])).value = number
        self._launch(*self._call, self._at, 0)


def launch(kernel: Kernel, blocks: int, threads: int, arguments: tuple[Any, ...], *, shared: int = 0) -> None:
    """Launch on the current stream of the current device.

    Parameters
    ----------
    kernel : Kernel
    blocks, threads : int
        One-dimensional. No blocks: nothing is launched.
    arguments : tuple
        Arrays, NumPy scalars of the right width (``np.int64(...)``), or None for a null pointer.
    shared : int
        Bytes of dynamic shared memory.
    """
    if blocks == 0:
        return
    _context()
    function = _function(kernel, shared).kernel.ptr
    cuda = xp().cuda
    at, keeps = _packed(arguments)
    stream = cuda.get_current_stream().ptr
    if kernel.cooperative:
        cuda.driver.launchCooperativeKernel(function, blocks, 1, 1, threads, 1, 1, shared, stream, at)
    else:
        cuda.driver.launchKernel(function, blocks, 1, 1, threads, 1, 1, shared, stream, at, 0)
    del keeps  # the driver has copied them


# How an argument lies in the eight bytes that each is given; an array is its address.
_LETTERS: dict[type, str] = {np.int64: "q", np.float64: "d", np.int32: "i4x", type(None): "Q"}


def _packed(arguments: tuple[Any, ...]) -> tuple[int, Any]:
    """Arguments as the driver takes them: where their addresses lie, and what must live until it has read them.

    CuPy's own launch does the same, an object an argument; with forty of them it takes longer than a small solve.
    """
    letters, values = [], []
    for argument in arguments:
        letter = _LETTERS.get(type(argument))
        if letter is None:
            letters.append("Q")
            values.append(argument.data.ptr)
        else:
            letters.append(letter)
            values.append(0 if argument is None else argument)
    data = ctypes.create_string_buffer(_layout("".join(letters)).pack(*values))
    count, begin = len(values), ctypes.addressof(data)
    table = _table(count)(*range(begin, begin + 8 * count, 8))
    return ctypes.addressof(table), (data, table)


@cache
def _layout(letters: str) -> struct.Struct:
    return struct.Struct("<" + letters)


@cache
def _table(count: int) -> Any:
    return ctypes.c_uint64 * count


def several(*wanted: tuple[tuple[int, ...], Any]) -> list[Any]:
    """Arrays of these shapes and dtypes, not filled in, from one piece of memory."""
    array = xp()
    if not hasattr(array, "cuda"):
        return [array.empty(shape, dtype) for shape, dtype in wanted]
    begins, total = [], 0
    for shape, dtype in wanted:
        begins.append(total)
        total += -(-math.prod(shape) * np.dtype(dtype).itemsize // 256) * 256
    memory = array.cuda.alloc(total)
    return [
        array.ndarray(shape, dtype, memory + at) for (shape, dtype), at in zip(wanted, begins, strict=True)
    ]


def address(array: Any) -> int:
    """Where an array begins in memory."""
    return int(array.ctypes.data) if isinstance(array, np.ndarray) else int(array.data.ptr)


def current() -> int:
    """The number of the current device."""
    return int(xp().cuda.runtime.getDevice())


@cache
def _multiprocessors(device: int) -> int:
    return int(xp().cuda.Device(device).attributes["MultiProcessorCount"])


def multiprocessors() -> int:
    """Number of multiprocessors of the current device."""
    return _multiprocessors(current())


def resident(kernel: Kernel, threads: int, *, shared: int = 0) -> int:
    """How many blocks of this kernel the device holds at once: the most that a cooperative launch may have."""
    driver = xp().cuda.driver
    function = _function(kernel, shared)
    each = driver.occupancyMaxActiveBlocksPerMultiprocessor(function.kernel.ptr, threads, shared)
    return int(each) * multiprocessors()


# Shared memory that a block may have where there is no device to ask: that of a Hopper.
SHARED_LIMIT = 227 * 1024


@cache
def _shared_limit(device: int) -> int:
    return int(xp().cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"])


def shared_limit() -> int:
    """Bytes of shared memory that a block may have on the current device."""
    cuda = getattr(xp(), "cuda", None)
    return SHARED_LIMIT if cuda is None else _shared_limit(current())


def matmul(a: Any, b: Any, out: Any = None) -> Any:
    """The product of two matrices or batches of them, ``float32`` in full precision.

    Raises
    ------
    RuntimeError
        If CuPy has been told to take TF32 for ``float32``, which has ten bits: no tolerance could be met.
    """
    array = xp()
    if hasattr(array, "cuda") and np.dtype(np.float32) in (a.dtype, b.dtype) and _takes_tf32():
        raise RuntimeError(
            "CuPy multiplies float32 matrices in TF32 (CUPY_TF32=1), with errors of 1e-3; the mixers 'fixed' and "
            "'dense' promise more: unset CUPY_TF32, or use float64"
        )
    if a.ndim == b.ndim == 2:  # the same, with less work for the host
        return array.dot(a, b, out)
    return array.matmul(a, b, out=out)


def joined(arrays: list[Any], axis: int) -> Any:
    """The arrays after each other: as CuPy's ``concatenate``, which reads addresses from the host and so cannot be
    recorded."""
    first = arrays[0]
    axis %= first.ndim
    shape = list(first.shape)
    shape[axis] = sum(a.shape[axis] for a in arrays)
    found, at = xp().empty(shape, first.dtype), 0
    for a in arrays:
        found[(slice(None),) * axis + (slice(at, at + a.shape[axis]),)] = a
        at += a.shape[axis]
    return found


# cuBLAS's names of dtypes, the bytes of a number, and names of what is computed in
_KINDS = {"float32": (0, 4), "float64": (1, 8), "bfloat16": (14, 2)}
_COMPUTE = {
    "float64": "CUBLAS_COMPUTE_64F",
    "float32": "CUBLAS_COMPUTE_32F",
    "tf32": "CUBLAS_COMPUTE_32F_FAST_TF32",
    "bfloat16": "CUBLAS_COMPUTE_32F_FAST_16BF",
}


_ONE_ZERO = {name: np.array([1, 0, 1], name) for name in ("float32", "float64")}


@cache
def _gemm(precision: str) -> tuple[Any, int, int, int]:
    """The product, in what it is computed, where a one and a zero lie, and how far apart."""
    cublas = xp().cuda.cublas
    numbers = _ONE_ZERO["float64" if precision == "float64" else "float32"]
    return cublas.gemmEx, getattr(cublas, _COMPUTE[precision]), int(numbers.ctypes.data), numbers.itemsize


@cache
def _kind(dtype: Any) -> tuple[int, int]:
    return _KINDS[np.dtype(dtype).name]


def product(
    a: Any,
    b: Any,
    out: Any = None,
    *,
    transposed: tuple[bool, bool] = (False, False),
    precision: str = "float32",
    add: bool = False,
) -> Any:
    """The product of two matrices, each of which may be taken transposed.

    Parameters
    ----------
    a, b : arrays of two axes
        float32, float64, or one or both bfloat16, as which the other is taken then. Rows are contiguous, and may lie
        apart.
    out : array, optional
        Its rows alike; for bfloat16 that or float32, which is the dtype of what is returned without.
    transposed : pair of bool
    precision : str
        Of `fpnumba.gpu.use_precision`.
    add : bool
        Whether the product is added to what `out` has.

    Returns
    -------
    array
    """
    array = xp()
    small = a.dtype.itemsize == 2 or b.dtype.itemsize == 2
    if small and a.dtype != b.dtype:
        a, b = (m if m.dtype.itemsize == 2 else m.astype(o.dtype) for m, o in ((a, b), (b, a)))
    (rows, inner), columns = a.shape[:: -1 if transposed[0] else 1], b.shape[0 if transposed[1] else 1]
    if out is None:
        out = array.empty((rows, columns), np.float32 if small else a.dtype)
    if 0 in (rows, inner, columns):
        if not add:
            out[...] = 0
        return out
    if not hasattr(array, "cuda"):
        if small:
            a, b = a.astype(np.float32), b.astype(np.float32)
        found = array.matmul(a.T if transposed[0] else a, b.T if transposed[1] else b)
        out[...] = out + found if add else found
        return out
    double = a.dtype == np.float64
    gemm, compute, one_zero, apart = _gemm("float64" if double else "float32" if small else precision)
    (a_kind, a_size), (b_kind, b_size), (kind, size) = _kind(a.dtype), _kind(b.dtype), _kind(out.dtype)
    now = recording()
    if now is not None:
        gemm, handle = now.gemm, 0
    else:
        handle = array.cuda.device.get_cublas_handle()
    # cuBLAS has columns where we have rows: the transposed product
    gemm(
        *(handle, int(transposed[1]), int(transposed[0]), columns, rows, inner),
        *(one_zero, b.data.ptr, b_kind, max(b.strides[0] // b_size, 1)),
        *(a.data.ptr, a_kind, max(a.strides[0] // a_size, 1)),
        *(one_zero + apart * (2 if add else 1), out.data.ptr, kind, max(out.strides[0] // size, columns)),
        *(compute, -1),
    )
    return out


def _takes_tf32() -> bool:
    from cupy._core import _routines_linalg as linalg

    return bool(linalg.get_compute_type(np.float32) == linalg.COMPUTE_TYPE_TF32)


# Pinned memory that copies may still be on their way to, and what says that they have come.
_arriving: list[tuple[Any, Any]] = []


class Watch:
    """A number on the device that the host sees a few looks later, so that the device never waits for the host.

    Parameters
    ----------
    counter : array of one int32
        What to look at.
    late : int
        How many looks later.
    """

    def __init__(self, counter: Any, late: int = 2) -> None:
        self.counter, self.late, self.looks = counter, late, 0
        cuda = getattr(xp(), "cuda", None)
        self._cuda = cuda
        if cuda is None:
            self._seen = np.zeros(late + 1, np.int32)
        else:
            self._memory = cuda.alloc_pinned_memory(4 * (late + 1))
            self._seen = np.frombuffer(self._memory, np.int32, late + 1)
            self._events = [cuda.Event(disable_timing=True) for _ in range(late + 1)]

    def close(self) -> None:
        """Nobody looks any more; copies that are on their way must not come to another's memory."""
        if self._cuda is not None and self.looks:
            last = self._events[(self.looks - 1) % (self.late + 1)]
            with _lock:
                _arriving[:] = [(memory, event) for memory, event in _arriving if not event.done]
                _arriving.append((self._memory, last))

    def look(self) -> int | None:
        """Ask for the number as it is when the work that is queued now is done.

        Returns
        -------
        int or None
            The number that was asked for `late` looks ago; waits for that one. None before.
        """
        slot = self.looks % (self.late + 1)
        if self._cuda is None:
            self._seen[slot] = self.counter[0]
        else:
            stream, runtime = self._cuda.get_current_stream(), self._cuda.runtime
            at = self._seen.ctypes.data + 4 * slot
            runtime.memcpyAsync(at, self.counter.data.ptr, 4, runtime.memcpyDeviceToHost, stream.ptr)
            self._events[slot].record(stream)
        self.looks += 1
        if self.looks <= self.late:
            return None
        before = (self.looks - 1 - self.late) % (self.late + 1)
        if self._cuda is not None:
            self._events[before].synchronize()
        return int(self._seen[before])
