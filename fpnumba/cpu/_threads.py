"""Sequences and channel blocks over threads.

Kernels release the GIL, so plain threads run them side by side. Numba's own ``prange`` would do it too, at a second of
compilation for every kernel, and with a threading layer that may not be entered by two Python threads or after a fork.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
from numba.np.ufunc import parallel

# A call that is over sooner than this, in elements of work, is not worth waking a thread for.
SMALLEST = 1 << 15

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _forget() -> None:
    """After a fork the child has the pool's bookkeeping but none of its threads."""
    global _pool, _pool_size
    _pool, _pool_size = None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def count() -> int:
    """Threads to use: Numba's setting, ``NUMBA_NUM_THREADS`` or ``numba.set_num_threads``."""
    # Asking Numba starts its threads. If they do not run yet, nobody can have set another number.
    return int(numba.get_num_threads() if parallel._is_initialized else numba.config.NUMBA_NUM_THREADS)


def _workers(wanted: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    if _pool is None or _pool_size < wanted:
        # A pool that another thread is using finishes its work; it is only not used again.
        _pool, _pool_size = ThreadPoolExecutor(wanted, thread_name_prefix="fpnumba"), wanted
    return _pool


def run(kernel: Callable[..., Any], tasks: int, work: int, *args: Any, shares_each: int = 4) -> None:
    """Call ``kernel(first, last, *args)`` so that all of ``range(tasks)`` is covered, over the threads.

    `work` is the size of the whole in elements. A task must not care which thread runs it, or beside which others.
    What runs on a thread must not call this again.
    """
    threads = min(count(), tasks)
    if threads <= 1 or work < SMALLEST:
        kernel(0, tasks, *args)
        return
    # Tasks differ (a sequence may converge sooner): whoever is free takes the next share.
    shares = min(tasks, shares_each * threads)
    bounds = [tasks * k // shares for k in range(shares + 1)]
    queue = itertools.count()

    def drain() -> None:
        while (k := next(queue)) < shares:
            kernel(bounds[k], bounds[k + 1], *args)

    helpers = [_workers(threads - 1).submit(drain) for _ in range(threads - 1)]
    try:
        drain()
    finally:
        for helper in helpers:
            helper.result()
