"""What this installation is and what it would compute with: the facts behind ``fpnumba info``."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REQUIRED = ("numpy", "numba", "scipy")
EXTRAS = ("safetensors", "tqdm", "matplotlib")


def gather() -> dict[str, Any]:
    """The facts, JSON-able. Nothing is compiled and no thread is started.

    Returns
    -------
    dict
        ``versions`` by package (None for what is not installed), ``cpu`` (model, cores that this process may
        use, threads that kernels use), ``rooms`` by name, ``cache`` (where compiled kernels are kept).

    Examples
    --------
    >>> from fpnumba.info import gather
    >>> sorted(gather()["rooms"])
    ['cpu', 'gpu', 'reference']
    """
    threads = _threads()
    return {
        "versions": {
            "python": platform.python_version(),
            **{n: _version(n) for n in ("fpnumba", *REQUIRED, *EXTRAS)},
        },
        "cpu": {"model": _cpu_model(), "cores": _cores(), "threads": threads},
        "rooms": {
            "reference": "NumPy, plain and slow: what is true",
            "cpu": f"Numba, {threads} thread{'s' if threads > 1 else ''}",
            "gpu": "absent: this version has no GPU kernels, and none of a machine's GPUs is used",
        },
        "cache": _cache(),
    }


def text(facts: dict[str, Any]) -> str:
    """The facts as aligned lines."""
    versions = dict(facts["versions"])
    lines = [("fpnumba", versions.pop("fpnumba") or "not installed: running from a source tree")]
    lines.append(("python", versions.pop("python")))
    for name, found in versions.items():
        missing = 'not installed: pip install "fpnumba[train]"' if name in EXTRAS else "not installed"
        lines.append((name, found or missing))
    cpu = facts["cpu"]
    cores = f"{cpu['cores']} core{'s' if cpu['cores'] > 1 else ''}"
    lines.append(("processor", f"{cpu['model']}, {cores} for this process"))
    lines.append(("threads", f"{cpu['threads']} (NUMBA_NUM_THREADS sets them)"))
    lines += [(f"room {name}", what) for name, what in facts["rooms"].items()]
    lines.append(("kernel cache", f"{facts['cache']} (NUMBA_CACHE_DIR moves it)"))
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{what}" for name, what in lines)


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
