"""Threads of the matrix products between the kernels."""

import contextlib
import importlib
from collections.abc import Iterator


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep NumPy's matrix products to one thread inside a ``with`` block, where threadpoolctl is there to do it.

    The products of these networks are small. A second BLAS thread gains them a tenth on an idle machine, and waits
    by spinning: next to any other busy process that makes training ten times slower. The kernels keep their threads.
    """
    try:
        threadpoolctl = importlib.import_module("threadpoolctl")
    except ImportError:
        yield
        return
    with threadpoolctl.threadpool_limits(limits=1, user_api="blas"):
        yield
