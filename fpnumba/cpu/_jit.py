"""How every kernel of this room is compiled and cached, and the few instructions that Numba has no word for."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import caching, cgutils
from numba.extending import intrinsic

try:
    import fcntl
except ImportError:  # Windows has other locks; there, two processes that compile at once may compile twice
    fcntl = None  # type: ignore[assignment]

# What lets LLVM vectorise a sum. Not `nnan` or `ninf`: a NaN or an infinity must stay what it is.
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}

# A call that touches more bytes than this leaves little of its results in the cache anyway: they are written
# past it, which saves reading them first.
STREAM_BYTES = 1 << 24

# Kernels that go back in time take each row in strips of this many bytes, the last strip first. Memory is then read
# downwards all along, which hardware prefetches; rows that are read upwards, one below the other, it takes for
# many short beginnings, and the kernel runs at half the speed.
STRIP_BYTES = 256


@cache
def room_hash() -> str:
    """Digest of all sources of this room.

    Numba keys a kernel on its own file, so that one which calls a function of another file would be served stale.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _has_functions(argument_types: Iterable[Any]) -> bool:
    """Whether a user's own functions are among the arguments.

    A kernel for them must not reach the disk: the next process may not even be able to import what they came from.
    """
    return any(
        isinstance(t, types.Dispatcher) or (isinstance(t, types.BaseTuple) and _has_functions(t.types))
        for t in argument_types
    )


class _CacheFile(caching.IndexDataCacheFile):
    """Numba's index and data files, one process at a time: without, two that compile at once mix up their entries."""

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        if fcntl is None:
            yield
            return
        Path(self._cache_path).mkdir(parents=True, exist_ok=True)
        with open(self._index_path + ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def save(self, key: Any, data: Any) -> None:
        if _has_functions(key[0]):
            return
        with self._lock():
            super().save(key, data)

    def load(self, key: Any) -> Any:
        # Nothing is created, and nothing locked, where there is nothing to read.
        if _has_functions(key[0]) or not os.path.exists(self._index_path):
            return None
        try:
            with self._lock():
                return super().load(key)
        except PermissionError:  # a read-only cache cannot be locked, and does not change
            return super().load(key)


# Without Numba's reference counts: it would count, in atomic instructions, whenever an array is sliced or
# handed on, which takes longer than many of the steps. A kernel gets its memory from whoever calls it.
OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": FASTMATH, "error_model": "numpy", "_nrt": False}


def stamped(dispatcher: Any, *digests: str) -> Any:
    """What Numba keeps on disk, keyed on these digests of sources too, one process at a time."""
    stored = dispatcher._cache
    stored._cache_file = _CacheFile(
        cache_path=stored._cache_path,
        filename_base=stored._impl.filename_base,
        source_stamp=(stored._impl.locator.get_source_stamp(), *digests),
    )
    return dispatcher


def _cached(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    return stamped(njit(cache=True, **options)(function), room_hash())


def kernel(function: Callable[..., Any]) -> Any:
    """Compile `function` when first called, cached on disk; it may not allocate."""
    return _cached(function, OPTIONS)


def inlined(function: Callable[..., Any]) -> Any:
    """As `kernel`, for what is called at every step: handing on the fields of a dozen arrays takes as long as a row."""
    return _cached(function, OPTIONS | {"forceinline": True})


def entry(function: Callable[..., Any]) -> Any:
    """As `kernel`, for what Python calls: it may allocate scratch, and hands it to kernels."""
    return _cached(function, OPTIONS | {"_nrt": True})


def uncached(function: Callable[..., Any]) -> Any:
    """As `kernel`, in memory only: for a user's own functions."""
    return njit(**(OPTIONS | {"_nrt": True}))(function)


# Instructions


@intrinsic
def magnitude_bits(typingctx: Any, value: Any) -> Any:
    """The bits of ``|value|`` as an integer, in the order of the magnitudes, NaN above infinity.

    A maximum over them is exact, keeps a NaN and vectorises; a maximum of floats does only two of the three.
    """
    if not isinstance(value, types.Float):
        return None
    integer = types.int32 if value.bitwidth == 32 else types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        llvm = ir.IntType(value.bitwidth)
        mask = ir.Constant(llvm, (1 << (value.bitwidth - 1)) - 1)
        return builder.and_(builder.bitcast(args[0], llvm), mask)

    return integer(value), codegen


@intrinsic
def bits_of(typingctx: Any, value: Any) -> Any:
    """The bits of `value` as an integer."""
    if not isinstance(value, types.Float):
        return None
    integer = types.int32 if value.bitwidth == 32 else types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(value.bitwidth))

    return integer(value), codegen


@intrinsic
def from_bits(typingctx: Any, bits: Any) -> Any:
    """The number back from `bits_of` or `magnitude_bits`."""
    if bits not in (types.int32, types.int64):
        return None
    float_type = types.float32 if bits == types.int32 else types.float64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(float_type))

    return float_type(bits), codegen


@intrinsic
def stream_row(typingctx: Any, target: Any, at: Any, source: Any, begin: Any, count: Any) -> Any:
    """``target.flat[at:at + count] = source.flat[begin:begin + count]``, past the cache.

    The target must be aligned to 32 bytes there and `count` fill whole 32-byte words; see `streams`.
    """
    size = target.dtype.bitwidth // 8
    lanes = 32 // size

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to = context.make_array(signature.args[0])(context, builder, args[0]).data
        of = context.make_array(signature.args[2])(context, builder, args[2]).data
        to, of = builder.gep(to, [args[1]]), builder.gep(of, [args[3]])
        word = ir.VectorType(context.get_data_type(target.dtype), lanes).as_pointer()
        i64 = ir.IntType(64)
        hint = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        zero, step = ir.Constant(i64, 0), ir.Constant(i64, lanes)
        with cgutils.for_range_slice(builder, zero, args[4], step) as (k, _):
            value = builder.load(builder.bitcast(builder.gep(of, [k]), word), align=size)
            store = builder.store(value, builder.bitcast(builder.gep(to, [k]), word), align=32)
            store.set_metadata("nontemporal", hint)
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64, types.int64), codegen


@intrinsic
def stream_end(typingctx: Any) -> Any:
    """Make what was streamed visible to other threads."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def streams(touched: int, *results: Any) -> bool:
    """Whether `results` should be written by `stream_row`, and can be: a call touches so many bytes."""
    if touched < STREAM_BYTES:
        return False
    return all(a.shape[-1] * a.itemsize % 32 == 0 and a.ctypes.data % 32 == 0 for a in results)
