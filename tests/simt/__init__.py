"""CUDA C of `gpu/kernels` on a CPU: compiled by g++ with `simt.h`, run on NumPy arrays.

`device()` puts NumPy and this in the place of CuPy and the driver, so that the GPU room's own Python runs as it is::

    with simt.device() as machine:
        h = scan.linear_scan(lam, x)
    machine.launches      # what was launched

or, as a fixture of pytest, ``def test_scan(simt_device): ...``.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import numpy as np

from fpnumba.gpu import _device

HERE = Path(__file__).resolve().parent
SHARED_LIMIT = 227 * 1024
MULTIPROCESSORS, BLOCKS_EACH = 2, 2
# Seconds of the processor that one launch may take.
LIMIT = 120.0

_FLAGS = ("-shared", "-fPIC", "-w", "-fno-strict-aliasing", "-fvisibility=hidden", "-DSIMT")
# handlers in simt.h turn what these find into an error with a line
_CHECKS = ("-O1", "-fsanitize=alignment,null,bounds", "-DSIMT_CHECKS")
# the same, and every access is told to simt.h
_RACES = (*_CHECKS, "-g1", "-fsanitize=thread", "--param=tsan-distinguish-volatile=1", "-DSIMT_RACES")
# an address computed from a null pointer is none of the device's concerns, as long as nothing is read there
_SANITIZED = (
    *("-O1", "-g1", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize=pointer-overflow", "-fno-sanitize-recover=all"),
)


class Fault(RuntimeError):
    """A kernel broke a rule: divergence at a barrier, deadlock, overrun, misaligned access and the like."""


class CompileError(RuntimeError):
    """g++ refused a kernel."""


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX", "g++"))


def sanitized() -> bool:
    """Whether kernels are compiled for the address sanitizer, which then must have been loaded first."""
    return os.environ.get("FPNUMBA_SIMT_SANITIZE") == "1"


def sanitizing() -> dict[str, str] | None:
    """The environment of a process in which kernels run under the address sanitizer, if the compiler has it."""
    command = compiler()
    if command is None:
        return None
    found = subprocess.run(
        [command, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    library = Path(found.stdout.strip())
    if not library.is_absolute() or not library.exists():  # a bare name: not found
        return None
    return {
        **os.environ,
        "FPNUMBA_SIMT_SANITIZE": "1",
        "LD_PRELOAD": str(library.resolve()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


# --- compilation --------------------------------------------------------------------------------------------------


def _cache() -> Path:
    given = os.environ.get("FPNUMBA_SIMT_CACHE")
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"fpnumba-simt-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} is not ours")
    return folder


@functools.cache
def _version(command: str) -> str:
    return str(subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout)


_BOUND = r"__launch_bounds__\s*\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)"


def _entry(text: str, function: str) -> str:
    """The line that exports `function`, with the bound that stands before its name."""
    found = re.search(_BOUND + r"[^;{}()]*\b" + function + r"\s*\(", text)
    bound = found.group(1).split(",")[0] if found else "1024"
    return f"#ifndef CLUSTER\n#define CLUSTER 1\n#endif\nSIMT_ENTRY({function}, ({bound}), (CLUSTER))\n"


def text(kernel: _device.Kernel) -> str:
    """The assembled source, whose lines messages speak of."""
    return _device.source(kernel.file)


def build(kernel: _device.Kernel, races: bool = False) -> Path:
    """Compile a kernel, unless it has been compiled before; the shared library."""
    command = compiler()
    if command is None:
        raise CompileError("there is no g++")
    body = text(kernel)
    # in a namespace, so that names of the C library may be used
    source = (
        '#include "simt.h"\nnamespace kernel_source {\n#line 1 "kernel"\n'
        f"{body}\n{_entry(body, kernel.function)}}}  // namespace\n"
    )
    checks = _SANITIZED if sanitized() else _RACES if races else _CHECKS
    flags = (*_FLAGS, *checks, *kernel.options)
    parts = (source, (HERE / "simt.h").read_text(encoding="utf-8"), _version(command), *flags)
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    library = _cache() / f"{name}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=_cache()) as work:
        path = Path(work) / "kernel.cpp"
        path.write_text(source, encoding="utf-8")
        made = Path(work) / "kernel.so"
        # checks without their library: it is not linked, simt.h has the handlers
        compiled = Path(work) / "kernel.o"
        steps = [[command, "-c", *flags[1:], f"-I{HERE}", str(path), "-o", str(compiled)]]
        link = ["-fsanitize=address,undefined"] if sanitized() else []
        steps.append([command, "-shared", *link, str(compiled), "-o", str(made)])
        outside = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # the compiler runs as it is
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, env=outside)
            if done.returncode:
                raise CompileError(f"{kernel}\n{done.stderr[:6000]}")
        made.replace(library)
    return library


class _Order(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.c_int64),
        ("resident", ctypes.c_int64),
        ("shared", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("limit", ctypes.c_double),
        ("threads", ctypes.c_int),
        ("message_size", ctypes.c_int),
        ("message", ctypes.c_char_p),
    )


class _Library(NamedTuple):
    handle: ctypes.CDLL
    parameters: tuple[str, ...]
    bound: int
    cluster: int


@functools.cache
def _load(kernel: _device.Kernel, races: bool = False) -> _Library:
    handle = ctypes.CDLL(str(build(kernel, races)))
    described = ctypes.create_string_buffer(4096)
    handle.simt_describe(described)
    return _Library(
        handle, tuple(described.value.decode().split()), handle.simt_bound(), handle.simt_cluster()
    )


# --- launching ----------------------------------------------------------------------------------------------------

_lock = RLock()


def _letter(dtype: np.dtype[Any]) -> str:
    if dtype.name in ("float16", "bfloat16"):
        return "?2"
    return {"f": "f", "i": "i", "u": "i", "b": "i"}.get(dtype.kind, "?") + str(dtype.itemsize)


def _pointer(argument: Any, parameter: str, place: str) -> ctypes.c_void_p:
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, np.uint64):  # an address: see `_device.address`
        return ctypes.c_void_p(int(argument))
    if not isinstance(argument, np.ndarray):
        raise TypeError(f"{place} is a pointer, but got {type(argument).__name__}")
    if not argument.flags.c_contiguous:
        raise TypeError(f"{place}: the array is not C-contiguous")
    wanted, given = parameter[1:], _letter(argument.dtype)
    # nothing is known of void*, and of pointers to structs but f16 and bf16
    anything = wanted[0] in "vp" or (wanted[0] == "?" and wanted != "?2")
    if not anything and wanted != given:
        raise TypeError(f"{place} points to {wanted}, but the array is {argument.dtype} ({given})")
    return ctypes.c_void_p(argument.ctypes.data)


def _packed(arguments: Sequence[Any], parameters: Sequence[str], function: str) -> list[Any]:
    """What `simt_launch` points to, argument by argument."""
    if len(arguments) != len(parameters):
        raise TypeError(f"{function} takes {len(parameters)} arguments, but got {len(arguments)}")
    packed: list[Any] = []
    for n, (argument, parameter) in enumerate(zip(arguments, parameters, strict=True)):
        place = f"argument {n} of {function}"
        if parameter[0] == "p":
            packed.append(_pointer(argument, parameter, place))
            continue
        if not isinstance(argument, np.generic):
            raise TypeError(
                f"{place} is a number ({parameter}): give a NumPy scalar, not {type(argument).__name__}"
            )
        if _letter(argument.dtype) != parameter:
            raise TypeError(f"{place} is {parameter}, but got {argument.dtype}")
        packed.append(ctypes.create_string_buffer(argument.tobytes(), argument.dtype.itemsize))
    return packed


def _told(message: str, kernel: _device.Kernel, races: bool) -> str:
    lines = text(kernel).splitlines()

    def line(n: int) -> str:
        return f"line {n} `{lines[n - 1].strip() if 0 < n <= len(lines) else '?'}`"

    def place(found: re.Match[str]) -> str:  # where in the library a call returns to
        tool, address = shutil.which("addr2line"), f"{int(found.group(1), 16) - 1:x}"
        if tool is None:
            return address
        command = [tool, "-i", "-e", str(build(kernel, races)), address]
        frames = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        within = [int(n) for n in re.findall(r"kernel:(\d+)", frames)]
        return line(within[0]) if within else address

    message = re.sub(r"@(\d+)@", lambda found: line(int(found.group(1))), message)
    return f"{kernel.file} {kernel.function}: " + re.sub(r"\$([0-9a-f]+)\$", place, message)


def launch(
    kernel: _device.Kernel,
    blocks: int,
    threads: int,
    arguments: tuple[Any, ...],
    *,
    shared: int = 0,
    seed: int = 1,
    resident: int = 1,
    limit: float = LIMIT,
    races: bool = False,
) -> None:
    """Run a kernel; as `_device.launch`, with arrays of NumPy.

    Parameters
    ----------
    kernel : Kernel
        `file` may be an absolute path, too.
    blocks, threads, arguments, shared
        As `_device.launch` takes them.
    seed : int
        Of the order in which threads take turns; 0 for the natural one. A right kernel's results are the same.
    resident : int
        Blocks that run at the same time, started in order; those of a cooperative kernel all do.
    limit : float
        Seconds of the processor, after which the kernel is stopped; 0 for none.
    races : bool
        Look for two accesses of shared memory that no barrier orders: slower, and exact for the barriers that
        the kernel has, whatever the order of threads.
    """
    if blocks == 0:
        return
    library = _load(kernel, races)
    if threads % 32 or not 32 <= threads <= min(library.bound, 1024):
        raise ValueError(f"{kernel.function}: {threads} threads, of at most {library.bound}, in warps of 32")
    if not 0 < blocks < 2**31 or blocks % library.cluster:
        raise ValueError(f"{kernel.function}: {blocks} blocks in clusters of {library.cluster}")
    if not 0 <= shared <= SHARED_LIMIT:
        raise ValueError(f"{kernel.function}: {shared} bytes of shared memory")
    packed = _packed(arguments, library.parameters, kernel.function)
    pointers = (ctypes.c_void_p * max(len(packed), 1))(*(ctypes.addressof(p) for p in packed))
    message = ctypes.create_string_buffer(4096)
    order = _Order(
        blocks,
        blocks if kernel.cooperative else min(resident, blocks),
        shared,
        seed,
        limit,
        threads,
        len(message),
        ctypes.cast(message, ctypes.c_char_p),
    )
    with _lock:
        fine = library.handle.simt_launch(pointers, ctypes.byref(order))
    if not fine:
        raise Fault(_told(message.value.decode(errors="replace"), kernel, races))


# --- the room on NumPy --------------------------------------------------------------------------------------------


def _poison(array: Any) -> Any:
    if array.dtype.kind in "iu":
        array.fill(np.iinfo(array.dtype).min if array.dtype.kind == "i" else np.iinfo(array.dtype).max)
    elif array.dtype.kind != "b":
        array.fill(np.nan)
    return array


class Namespace:
    """NumPy, but for memory that nobody has written: it is full of NaN, or of absurd whole numbers."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def empty(*args: Any, **kwargs: Any) -> Any:
        """As `numpy.empty`."""
        return _poison(np.empty(*args, **kwargs))

    @staticmethod
    def empty_like(*args: Any, **kwargs: Any) -> Any:
        """As `numpy.empty_like`."""
        return _poison(np.empty_like(*args, **kwargs))


class Launch(NamedTuple):
    """One launch that was made."""

    kernel: _device.Kernel
    blocks: int
    threads: int
    shared: int


@dataclass
class Device:
    """What stands in for the device: the options of its launches, and a record of them.

    Attributes
    ----------
    seed, resident, limit, races
        As `launch` takes them; they may be set between launches.
    launches : list of Launch
    """

    seed: int = 1
    resident: int = 1
    limit: float = LIMIT
    multiprocessors: int = MULTIPROCESSORS
    races: bool = False
    xp: Namespace = field(default_factory=Namespace)
    launches: list[Launch] = field(default_factory=list)

    def most(self, kernel: _device.Kernel, threads: int, *, shared: int = 0) -> int:
        """As `_device.resident`."""
        cluster = _load(kernel).cluster
        return self.multiprocessors * BLOCKS_EACH // cluster * cluster

    def launch(
        self,
        kernel: _device.Kernel,
        blocks: int,
        threads: int,
        arguments: tuple[Any, ...],
        *,
        shared: int = 0,
    ) -> None:
        """As `_device.launch`."""
        if blocks == 0:
            return
        if kernel.cooperative and blocks > self.most(kernel, threads, shared=shared):
            raise ValueError(f"{kernel.function}: {blocks} blocks are too many for a cooperative launch")
        self.launches.append(Launch(kernel, blocks, threads, shared))
        launch(
            kernel,
            blocks,
            threads,
            arguments,
            shared=shared,
            seed=self.seed,
            resident=self.resident,
            limit=self.limit,
            races=self.races,
        )


@contextmanager
def device(
    *,
    seed: int = 1,
    resident: int = 1,
    multiprocessors: int = MULTIPROCESSORS,
    limit: float = LIMIT,
    races: bool = False,
) -> Iterator[Device]:
    """Put NumPy in the place of CuPy, and this in the place of the driver."""
    made = Device(seed, resident, limit, multiprocessors, races)
    patches = {
        "xp": lambda: made.xp,
        "launch": made.launch,
        "current": lambda: -made.multiprocessors,  # another device for the plans that are kept
        "multiprocessors": lambda: made.multiprocessors,
        "resident": made.most,
        "loaded": lambda: list(dict.fromkeys(launched.kernel for launched in made.launches)),
    }
    before = {name: getattr(_device, name) for name in patches}
    for name, patch in patches.items():
        setattr(_device, name, patch)
    try:
        yield made
    finally:
        for name, value in before.items():
            setattr(_device, name, value)
