"""Compile the kernels of the readable GPU room for a device, without one: python tests/simulated/compile_all.py

Numba derives types, and NVVM makes PTX. Arrays are NumPy's, and a launch compiles what it would have launched.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import strategies
from numba import cuda, from_dtype, types
from numba.cuda import dispatcher

from fpnumba.gpu import _device, portable

CAPABILITY = (9, 0)
MIXERS: tuple[Any, ...] = ("householder", "kronecker", strategies.RING_WITHOUT_TRANSPOSE)

compiled: set[Any] = set()


def numba_type(argument: Any) -> Any:
    """What Numba would call an argument of a launch."""
    if isinstance(argument, tuple):
        return types.BaseTuple.from_types([numba_type(a) for a in argument], type(argument))
    if isinstance(argument, np.ndarray):
        return types.Array(from_dtype(argument.dtype), argument.ndim, "C")
    return {bool: types.boolean, int: types.int64, float: types.float64}[type(argument)]


def compile_instead(kernel: Any, blocks: int, *arguments: Any, numbers: int = 0) -> None:
    signature = types.void(*map(numba_type, arguments))
    if (kernel, signature) not in compiled:
        start = time.perf_counter()
        ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=CAPABILITY)
        compiled.add((kernel, signature))
        name = f"{kernel.py_func.__module__}.{kernel.py_func.__qualname__}"
        print(f"{name}: {len(ptx)} characters in {time.perf_counter() - start:.1f} s", flush=True)


def call_every_door(kind: Any, dtype: Any) -> None:
    p = strategies.problem(0, kind, steps=3, dim=4, gated=True, dtype=dtype)
    portable.apply(kind, p.params, p.x)
    for adjoint in (False, True):
        source, initial = (p.hbar, None) if adjoint else (p.x, p.initial)
        options: dict[str, Any] = {"rtol": 1e-6, "atol": 0.0, "max_iter": 9, "damping": 1.0}
        for chunk in (1, 3):
            portable.solve(*p.system, source, initial, None, adjoint=adjoint, chunk=chunk, **options)
        if kind in strategies.LOW_RANK:
            portable.solve_direct(*p.system, source, initial, adjoint=adjoint)
    portable.pull(*p.system, p.x, p.initial, p.h, p.hbar)
    portable.linear_scan_vjp(p.lam, portable.linear_scan(p.lam, p.x), p.initial, False, p.hbar)


def main() -> None:
    # Device functions are compiled for the current device, which is asked for what it can do.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=CAPABILITY)
    try:
        cuda.compile_ptx(lambda: None, types.void(), cc=CAPABILITY)
    except Exception as reason:
        print(f"NVVM is missing: {reason}")
        return
    np.seterr(all="ignore")  # nothing is computed: results are what the memory happens to hold
    _device.xp = lambda: np
    portable._launch = compile_instead
    for kind in MIXERS:
        call_every_door(kind, np.float32)
    print(f"{len(compiled)} kernels")


if __name__ == "__main__":
    main()
