"""The CPU room: Numba kernels, over threads in sequences, channel blocks or segments of time.

It has the doors of the reference room in the same files: ``scan``, ``mixers`` and ``solve``. Arrays are
C-contiguous, ``(B, T, D)``, float32 or float64, all of one dtype; nothing is compiled before the first call,
and what is compiled is kept on disk.
"""

from typing import Any

__all__ = ["info"]


def info() -> dict[str, Any]:
    """What this room computes with; nothing is compiled and no thread is started.

    Returns
    -------
    dict
        ``threads`` (how many), ``threading_layer`` (Numba's, if something has started it: this room needs
        none), ``numba`` (version), ``cache`` (folder of the compiled kernels), ``memory`` (bytes of result
        memory kept for reuse).

    Examples
    --------
    >>> import fpnumba.cpu
    >>> sorted(fpnumba.cpu.info())
    ['cache', 'memory', 'numba', 'threading_layer', 'threads']
    """
    import numba

    from fpnumba.cpu import _threads, memory
    from fpnumba.cpu.scan import _scan

    try:
        layer = numba.threading_layer()
    except ValueError:
        layer = None
    return {
        "threads": _threads.count(),
        "threading_layer": layer,
        "numba": numba.__version__,
        "cache": _scan.stats.cache_path,
        "memory": memory.held_bytes(),
    }
