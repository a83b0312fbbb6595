"""Work of many launches, recorded once and launched as one: CUDA graphs of what a function does.

A layer of small matrices is a hundred launches, and takes as long as the host takes to ask for them. Recorded, it takes
as long as the device needs.
"""

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

from fpnumba.gpu import _device, _recording

# Memory that cuBLAS works in, as it asks for on a Hopper.
WORKSPACE = 32 * 2**20


class NotRecorded(RuntimeError):
    """Work that cannot be recorded."""


class Captured:
    """What a function did on the device, to be done again.

    Attributes
    ----------
    result
        What the function returned. Its arrays are written anew by every call.
    """

    def __init__(self, graph: Any, result: Any, kept: Any) -> None:
        self._graph, self.result, self._kept = graph, result, kept

    def __call__(self) -> Any:
        """Do it all again, on the current stream; nothing waits.

        Returns
        -------
        result
        """
        self._graph.launch(_device.xp().cuda.get_current_stream())
        return self.result


def capture(function: Callable[[], Any], *, same_iterations: bool = False) -> Captured:
    """Record what a function does on the device.

    The function runs twice: once for real, so that every kernel is compiled, and once only to be recorded. What it
    reads it has to find in the same arrays at every call, so new inputs are copied into old arrays; the arrays that it
    makes are the recording's own. It may not wait for the device: solvers need ``on_failure="ignore"`` and the
    sequential way, and values of tokens and targets are not checked while they are recorded.

    Parameters
    ----------
    function : callable without arguments
    same_iterations : bool, default False
        Record layers that are solved in parallel by a rule for the whole iteration (the published one, a quantile,
        fewer than 64 iterations), too: every call makes as many iterations as the first run took, and the status says
        whether that was enough.

    Returns
    -------
    Captured

    Raises
    ------
    NotRecorded
        If the function waits for the device, or copies from memory of the host. A ``RuntimeError``; the first run has
        been made.

    Examples
    --------
    >>> import fpnumba.gpu
    >>> if fpnumba.gpu.absent() is None:
    ...     import cupy
    ...     x = cupy.zeros(3)
    ...     again = fpnumba.gpu.capture(lambda: x + 1)
    ...     x[...] = 5
    ...     y = again()
    """
    cuda = _device.xp().cuda
    outer, stream, pool = cuda.get_current_stream(), cuda.Stream(non_blocking=True), cuda.MemoryPool()
    outer.synchronize()
    counts: list[int] = []
    with stream, cuda.using_allocator(pool.malloc):
        with _recording.rehearsing(counts) if same_iterations else contextlib.nullcontext():
            function()
        stream.synchronize()
        recording = _Recorded(stream, counts, same_iterations)
        stream.begin_capture()
        try:
            with _recording.into(recording):
                result = function()
        except BaseException as error:
            _abandon(stream)
            # CuPy's and the runtime's own errors say it in words alone
            if isinstance(error, RuntimeError) and "captur" in str(error).lower():
                raise NotRecorded(
                    "this work cannot be recorded, because it waits for the device or copies from the host: a solver "
                    "needs on_failure='ignore' and the sequential way, or `same_iterations`"
                ) from error
            raise
        graph = stream.end_capture()
        if _of_host(graph.graph):
            raise NotRecorded("this work cannot be recorded, because it copies from or to memory of the host")
        for act in recording.afterwards:
            act()
        stream.synchronize()
    return Captured(graph, result, (pool, recording))


# Of the driver: a node that copies; kinds of memory in the description of a copy, and where they stand in it.
_COPY, _HOST, _UNIFIED, _ENDS, _SIZE = 1, 1, 4, ((32, 48), (120, 136)), 200
_KIND_OF_POINTER = 2


def _of_host(graph: int) -> bool:
    """Whether a graph copies from or to memory of the host, which may be another's when it is launched."""
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments: Any) -> None:
        if getattr(driver, name)(*arguments):
            raise RuntimeError(f"{name} of the driver failed")

    count, kind = ctypes.c_size_t(), ctypes.c_int()
    call("cuGraphGetNodes", ctypes.c_void_p(graph), None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * max(count.value, 1))()
    call("cuGraphGetNodes", ctypes.c_void_p(graph), nodes, ctypes.byref(count))
    for node in nodes[: count.value]:
        at = ctypes.c_void_p(node)
        call("cuGraphNodeGetType", at, ctypes.byref(kind))
        if kind.value != _COPY:
            continue
        told = ctypes.create_string_buffer(_SIZE)
        call("cuGraphMemcpyNodeGetParams", at, told)
        for where, address in _ENDS:
            memory = int.from_bytes(told.raw[where : where + 4], "little")
            if memory == _UNIFIED:
                pointer = ctypes.c_uint64(int.from_bytes(told.raw[address : address + 8], "little"))
                found = ctypes.c_int(_HOST)
                driver.cuPointerGetAttribute(ctypes.byref(found), _KIND_OF_POINTER, pointer)
                memory = found.value
            if memory == _HOST:
                return True
    return False


def _abandon(stream: Any) -> None:
    with contextlib.suppress(Exception):  # the recording was broken off already
        stream.end_capture()


class _Recorded:
    """A recording that goes on: its own handle of cuBLAS, since CuPy's does not work while a stream is recorded."""

    def __init__(self, stream: Any, counts: list[int], rehearsed: bool) -> None:
        self.afterwards: list[Callable[[], None]] = []
        self.counts, self.rehearsed = list(counts), rehearsed
        xp = _device.xp()
        self._workspace = xp.empty(WORKSPACE, xp.uint8)
        version = xp.cuda.runtime.runtimeGetVersion() // 1000
        self._blas = ctypes.CDLL(f"libcublas.so.{version}")
        handle = ctypes.c_void_p()
        self._call("cublasCreate_v2", ctypes.byref(handle))
        self._handle = handle
        self._call("cublasSetStream_v2", handle, ctypes.c_void_p(stream.ptr))
        where = ctypes.c_void_p(self._workspace.data.ptr)
        self._call("cublasSetWorkspace_v2", handle, where, ctypes.c_size_t(WORKSPACE))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._blas, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} of cuBLAS: status {status}")

    def gemm(self, _: int, ta: int, tb: int, m: int, n: int, k: int, *rest: int) -> None:
        """As CuPy's ``gemmEx``, whose handle is not looked at."""
        alpha, a, a_kind, lda, b, b_kind, ldb, beta, c, c_kind, ldc, compute, how = rest
        at, number = ctypes.c_void_p, ctypes.c_int
        self._call(
            "cublasGemmEx",
            *(self._handle, *(number(v) for v in (ta, tb, m, n, k)), at(alpha)),
            *(at(a), number(a_kind), number(lda), at(b), number(b_kind), number(ldb), at(beta)),
            *(at(c), number(c_kind), number(ldc), number(compute), number(how)),
        )

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._blas.cublasDestroy_v2(self._handle)
