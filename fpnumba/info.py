"""What this installation is and what it would compute with: the facts behind ``fpnumba info``."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REQUIRED = ("numpy", "numba", "scipy")
EXTRAS = ("safetensors", "tqdm", "matplotlib")
# What the GPU room needs, and the packages that bring it
GPU = {"cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"), "numba-cuda": ("numba-cuda",)}


def gather() -> dict[str, Any]:
    """The facts, JSON-able. Nothing is compiled, no thread is started, and no memory of a GPU is taken.

    Returns
    -------
    dict
        ``versions`` by package (None for what is not installed), ``cpu`` (model, cores that this process may
        use, threads that kernels use), ``gpu`` (``absent``: why there is none, or None; ``devices``; the
        versions of CUDA that the ``driver`` serves and that the ``runtime`` of CuPy is; ``kernels`` that this
        process has compiled or loaded; ``cache``, where CuPy keeps compiled ones, and its size), ``rooms`` by name,
        ``cache`` (where compiled kernels of the CPU room are kept).

    Examples
    --------
    >>> from fpnumba.info import gather
    >>> sorted(gather()["rooms"])
    ['cpu', 'gpu', 'reference']
    """
    threads = _threads()
    gpu = _gpu()
    count = len(gpu["devices"])
    return {
        "versions": {
            "python": platform.python_version(),
            **{n: _version(n) for n in ("fpnumba", *REQUIRED, *EXTRAS)},
            **{n: next(filter(None, map(_version, packages)), None) for n, packages in GPU.items()},
        },
        "cpu": {"model": _cpu_model(), "cores": _cores(), "threads": threads},
        "gpu": gpu,
        "rooms": {
            "reference": "NumPy, plain and slow: what is true",
            "cpu": f"Numba, {threads} thread{'s' if threads > 1 else ''}",
            "gpu": f"absent: {gpu['absent']}"
            if count == 0
            else f"CUDA, {count} device{'s' if count > 1 else ''}",
        },
        "cache": _cache(),
    }


def text(facts: dict[str, Any]) -> str:
    """The facts as aligned lines."""
    versions = dict(facts["versions"])
    lines = [("fpnumba", versions.pop("fpnumba") or "not installed: running from a source tree")]
    lines.append(("python", versions.pop("python")))
    for name, found in versions.items():
        extra = "train" if name in EXTRAS else "cuda13" if name in GPU else None
        lines.append(
            (name, found or "not installed" + (f': pip install "fpnumba[{extra}]"' if extra else ""))
        )
    cpu = facts["cpu"]
    cores = f"{cpu['cores']} core{'s' if cpu['cores'] > 1 else ''}"
    lines.append(("processor", f"{cpu['model']}, {cores} for this process"))
    lines.append(("threads", f"{cpu['threads']} (NUMBA_NUM_THREADS sets them)"))
    lines += _gpu_lines(facts["gpu"])
    lines += [(f"room {name}", what) for name, what in facts["rooms"].items()]
    lines.append(("kernel cache", f"{facts['cache']} (NUMBA_CACHE_DIR moves it)"))
    if facts["gpu"]["absent"] is None:
        cache = facts["gpu"]["cache"]
        size = "nothing yet" if cache["bytes"] is None else f"{cache['bytes'] / 2**20:.1f} MiB"
        lines.append(("GPU kernel cache", f"{cache['folder']}, {size} (CUPY_CACHE_DIR moves it)"))
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{what}" for name, what in lines)


def _gpu_lines(gpu: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [
        (
            f"GPU {device['index']}",
            f"{device['name']}, compute capability {device['compute_capability']}, {device['memory'] / 2**30:.0f} GiB",
        )
        for device in gpu["devices"]
    ]
    if gpu["absent"] is None:
        lines.append(("CUDA", f"driver {gpu['driver']}, runtime {gpu['runtime']}"))
        kernels = ", ".join(gpu["kernels"]) or "none"
        lines.append(("GPU kernels", f"{kernels} (compiled or loaded by this process)"))
    return lines


def _gpu() -> dict[str, Any]:
    """What the GPU room would compute with; a context is not created, so no memory of a device is taken."""
    from fpnumba.gpu import _device, _host

    absent = _host.absent()
    facts: dict[str, Any] = {"absent": absent, "devices": [], "driver": None, "runtime": None, "kernels": []}
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or "~/.cupy/kernel_cache").expanduser()
    sizes = [file.stat().st_size for file in folder.glob("*")] if folder.is_dir() else None
    facts["cache"] = {"folder": str(folder), "bytes": None if sizes is None else sum(sizes)}
    if absent is None:
        runtime = _host.xp().cuda.runtime
        facts["driver"] = _host.version(runtime.driverGetVersion())
        facts["runtime"] = _host.version(runtime.runtimeGetVersion())
        facts["devices"] = [_gpu_device(runtime, index) for index in range(runtime.getDeviceCount())]
        facts["kernels"] = sorted({f"{kernel.function} of {kernel.file}" for kernel in _device.loaded()})
    return facts


def _gpu_device(runtime: Any, index: int) -> dict[str, Any]:
    found = runtime.getDeviceProperties(index)
    return {
        "index": index,
        "name": found["name"].decode(),
        "compute_capability": f"{found['major']}.{found['minor']}",
        "memory": int(found["totalGlobalMem"]),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def _threads() -> int:
    from numba import config

    return int(config.NUMBA_NUM_THREADS)


def _cache() -> str:
    """Asked of a kernel: Numba decides by environment and by what it may write to."""
    from fpnumba.cpu import scan

    for thing in vars(scan).values():
        stats = getattr(thing, "stats", None)
        if stats is not None and getattr(stats, "cache_path", None):
            return str(stats.cache_path)
    return "none"
