"""One run over several processes: each takes its share of every batch, and their gradients are averaged.

``mpirun -n 4 fpnumba train s3`` starts them, and :func:`group` finds out. Every process holds all parameters and makes
the same update, so that a run of several is that of one to rounding, and bitwise repeatable with as many. The first
process alone writes, judges and shows progress.

Gradients in NumPy's arrays are summed by MPI (mpi4py), those in CuPy's by NCCL, one process for each GPU.
"""

import contextlib
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from fpnumba.train.checkpoint import Arrays
from fpnumba.train.extras import MissingExtra

T = TypeVar("T")

# What a launcher tells the processes that it starts: how many there are (PMIx: only which one this is).
_LAUNCHED = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK")
# How long a process in trouble waits for the others to be in the same.
PATIENCE = 5.0


class ParallelError(RuntimeError):
    """Processes that do not form a group. The message is one line."""


class Group:
    """The processes of a run. This class is that of one process, which has nobody to talk to.

    Attributes
    ----------
    rank, size : int
        Which process this is, and how many there are.
    local_rank : int
        Which of those on the same machine, and so which of its GPUs is this one's.
    """

    rank, size, local_rank = 0, 1, 0

    def share(self, *arrays: Any) -> tuple[Any, ...]:
        """This process's part of a batch: consecutive entries of the first axis."""
        return arrays

    def mean(self, grads: Arrays, row: dict[str, Any], targets: Any) -> tuple[Arrays, dict[str, Any]]:
        """What one process would have found for the whole batch.

        Parameters
        ----------
        grads : dict of arrays
            Of the mean loss over this process's targets.
        row : dict of numbers
            Seen on the way: means over the targets, or, where the name ends in ``_max``, maxima.
        targets : array of integers
            Of this process. Each process weighs as much as it has targets that count.
        """
        return grads, row

    def first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; also what it raises."""
        return make()

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Which of the flags are raised in any process."""
        return flags

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Within it, an error of one process alone ends them all; one that all of them meet is raised as it is."""
        yield


ALONE = Group()


class MpiGroup(Group):
    """The processes of an MPI communicator."""

    def __init__(self, comm: Any) -> None:
        # Duplicates, so that nothing here meets a message of anybody else's.
        self._comm, self._end = comm.Dup(), comm.Dup()
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._mpi = importlib.import_module("mpi4py.MPI")
        local = comm.Split_type(self._mpi.COMM_TYPE_SHARED)
        self.local_rank = local.Get_rank()
        _share_cores(local)
        local.Free()
        self._nccl: Any = None

    def share(self, *arrays: Any) -> tuple[Any, ...]:
        """This process's part of a batch: consecutive entries of the first axis."""
        return tuple(
            a[len(a) * self.rank // self.size : len(a) * (self.rank + 1) // self.size] for a in arrays
        )

    def mean(self, grads: Arrays, row: dict[str, Any], targets: Any) -> tuple[Arrays, dict[str, Any]]:
        """What one process would have found for the whole batch; see :meth:`Group.mean`."""
        mine = np.array([int((targets >= 0).sum()), *map(float, row.values())])
        everyone = np.empty((self.size, len(mine)))
        self._comm.Allgather(mine, everyone)
        counts = everyone[:, 0]
        weights = counts / counts.sum() if counts.any() else np.full(self.size, 1 / self.size)
        found: dict[str, Any] = {}
        for (name, value), told in zip(row.items(), everyone[:, 1:].T, strict=True):
            # What weighs nothing may be no number: the accuracy where nothing counts.
            mean = told.max() if name.endswith("_max") else np.dot(weights[weights > 0], told[weights > 0])
            found[name] = int(mean) if isinstance(value, int) else float(mean)
        return self._summed(grads, float(weights[self.rank])), found

    def _summed(self, grads: Arrays, weight: float) -> Arrays:
        """The sum over processes of their gradients times their weights, in one message for each dtype."""
        summed: Arrays = {}
        for dtype in sorted({g.dtype for g in grads.values()}, key=str):
            names = [name for name, g in grads.items() if g.dtype == dtype]
            on_host = isinstance(grads[names[0]], np.ndarray)
            xp = np if on_host else importlib.import_module("cupy")
            flat = xp.concatenate([grads[name].reshape(-1) for name in names])
            flat *= dtype.type(weight)
            if on_host:
                self._comm.Allreduce(self._mpi.IN_PLACE, flat)
            else:
                self._on_devices(flat)
            bounds = np.cumsum([grads[name].size for name in names])[:-1].tolist()
            for name, part in zip(names, xp.split(flat, bounds), strict=True):
                summed[name] = part.reshape(grads[name].shape)
        return {name: summed[name] for name in grads}

    def _on_devices(self, flat: Any) -> None:
        """Sum a CuPy array over the GPUs of the processes, in place and in the order of the current stream."""
        cuda = importlib.import_module("cupy.cuda")
        nccl = importlib.import_module("cupy.cuda.nccl")
        if not nccl.available:
            raise ParallelError("several GPUs need NCCL, which this CuPy does not find")
        kinds = {"float32": nccl.NCCL_FLOAT32, "float64": nccl.NCCL_FLOAT64}
        if self._nccl is None:
            told = self._comm.bcast(nccl.get_unique_id() if self.rank == 0 else None)
            self._nccl = nccl.NcclCommunicator(self.size, told, self.rank)
        where, kind = flat.data.ptr, kinds[flat.dtype.name]
        self._nccl.allReduce(where, where, flat.size, kind, nccl.NCCL_SUM, cuda.get_current_stream().ptr)

    def first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; also what it raises."""
        found: tuple[Any, Exception | None] = (None, None)
        if self.rank == 0:
            try:
                found = make(), None
            except Exception as error:
                found = None, error
        _wait(self._comm.Ibarrier())
        value, failed = self._comm.bcast(found)
        if failed is not None:
            raise failed
        return value  # type: ignore[no-any-return]

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Which of the flags are raised in any process."""
        raised = np.array(flags, np.uint8)
        self._comm.Allreduce(self._mpi.IN_PLACE, raised, op=self._mpi.MAX)
        return tuple(bool(flag) for flag in raised)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Within it, an error of one process alone ends them all; one that all of them meet is raised as it is."""
        try:
            yield
        except BaseException as error:
            if not _wait(self._end.Ibarrier(), PATIENCE):
                traceback.print_exception(error)
                said = f"process {self.rank + 1} of {self.size} failed ({error!r})"
                print(f"fpnumba: {said}; the run ends at its last checkpoint", file=sys.stderr, flush=True)
                self._comm.Abort(1)
            raise


def group() -> Group:
    """The processes that an MPI launcher started, or this one alone.

    Raises
    ------
    MissingExtra
        If there are several and mpi4py is not here.
    ParallelError
        If the launcher and mpi4py belong to different installations of MPI.
    """
    told = [os.environ[name] for name in _LAUNCHED if name in os.environ]
    if not told or ("PMIX_RANK" not in os.environ and told[0] == "1"):
        return ALONE
    try:
        world = importlib.import_module("mpi4py.MPI").COMM_WORLD
    except (ImportError, RuntimeError) as error:
        raise MissingExtra(
            f'several processes need mpi4py, which cannot be imported ({error}); pip install "fpnumba[mpi]" brings it'
        ) from error
    wanted = os.environ.get("PMI_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE") or str(world.Get_size())
    if str(world.Get_size()) != wanted:
        raise ParallelError(
            f"the launcher started {wanted} processes and mpi4py sees {world.Get_size()}: use the mpirun of the MPI "
            "that mpi4py was made for"
        )
    return MpiGroup(world) if world.Get_size() > 1 else ALONE


def _wait(request: Any, seconds: float = float("inf")) -> bool:
    """Whether a request is done in that time; the core is left to others meanwhile."""
    end = time.monotonic() + seconds
    while not request.Test():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def _share_cores(local: Any) -> None:
    """Let the processes of one machine divide the cores that they share, unless the user has said otherwise."""
    if "NUMBA_NUM_THREADS" in os.environ:
        return
    numba = importlib.import_module("numba")
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    sharing = local.allgather(mine).count(mine)
    numba.set_num_threads(max(1, numba.config.NUMBA_NUM_THREADS // sharing))
