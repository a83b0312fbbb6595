# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""A block of threads as one worker: who takes what, and how the threads agree on a number.

Thread ``k`` takes the channels ``k, k + THREADS, ...`` and nobody else writes them, so that no barrier is
needed between two passes over the channels. What every thread must know, a sum or a maximum over all
channels, goes through ``parts``, the first `THREADS` numbers of the block's shared memory.

That is one block of memory whose size the launch says, for in the simulator two threads that ask at once for a
shared array of a fixed size may get one each.
"""

import os

from numba import cuda
from numba.cuda.types import float64

__all__ = ["SIMULATED", "THREADS", "block_largest", "block_sum", "float64", "larger"]

# The simulator runs each thread of a block as a thread of Python: few, and no power of two, so that loops have a rest.
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")
THREADS = 3 if SIMULATED else 128


@cuda.jit(device=True)
def larger(a, b):
    """The larger of two numbers; a NaN stays."""
    if a >= b or a != a:
        return a
    return b


@cuda.jit(device=True)
def block_sum(mine, parts):
    """The sum of every thread's number, the same for all threads: added in the order of the threads."""
    parts[cuda.threadIdx.x] = mine
    cuda.syncthreads()
    total = 0.0
    for k in range(THREADS):
        total += parts[k]
    cuda.syncthreads()
    return total


@cuda.jit(device=True)
def block_largest(mine, parts):
    """The largest of every thread's number, none of which is negative, the same for all threads; a NaN stays."""
    parts[cuda.threadIdx.x] = mine
    cuda.syncthreads()
    largest = 0.0
    for k in range(THREADS):
        largest = larger(largest, parts[k])
    cuda.syncthreads()
    return largest
