"""The stand-in for a device, and the room's report through it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simt
from numpy.typing import NDArray

from fpnumba.gpu import _device, _report

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="no g++: CUDA C is not run on the CPU")

TRIALS = _device.Kernel.of(str(Path(simt.__file__).with_name("trials.cu")), "trial", {"STORE": "float"})
TOGETHER = _device.Kernel.of(TRIALS.file, "trial", {"STORE": "float"}, cooperative=True)
IN_CLUSTERS = _device.Kernel.of(TRIALS.file, "trial", {"STORE": "float", "CLUSTER": 4})
# the other way of switching between threads, which other machines take
BY_UCONTEXT = _device.Kernel.of(TRIALS.file, "trial", {"STORE": "float", "SIMT_UCONTEXT": 1})
THREADS = 128


def trial(
    which: int,
    blocks: int = 2,
    *,
    n: int = 0,
    shared: int = 4 * THREADS,
    values: NDArray[np.int32] | None = None,
    kernel: _device.Kernel = TRIALS,
    **options: Any,
) -> NDArray[np.int32]:
    """What one value of `which` leaves in `out`, one row per block."""
    given = np.arange(blocks * THREADS, dtype=np.int32) if values is None else values
    out = np.full((blocks, THREADS), -99, np.int32)
    numbers = np.zeros(16, np.float32)
    arguments = (np.int32(which), given, out, np.zeros(blocks + 2, np.uint32), numbers, np.int64(n))
    simt.launch(kernel, blocks, THREADS, arguments, shared=shared, **options)
    return out if which != 8 else numbers.view(np.int32)


# --- what works ---------------------------------------------------------------------------------------------------


@pytest.mark.sanitize
@pytest.mark.parametrize("kernel", [TRIALS, BY_UCONTEXT])
def test_shuffles(kernel: _device.Kernel) -> None:
    v = np.arange(2 * THREADS).reshape(-1, 32)
    lane = np.arange(32)
    expected = (
        v[:, [5] * 32]
        + 10 * v[:, lane ^ 3]
        + 100 * v[:, np.where(lane < 2, lane, lane - 2)]
        + 1000 * v[:, np.where(lane + 7 > 31, lane, lane + 7)]
        + 10000 * v[:, lane // 8 * 8 + 1]
    )
    np.testing.assert_array_equal(trial(0, kernel=kernel).reshape(-1, 32), expected)


def test_votes() -> None:
    v = np.arange(2 * THREADS).reshape(2, -1, 32)
    warp = 1 * (v == 3).any(2) + 2 * (v >= 0).all(2) + 4 * (v & 1).sum(2)
    block = 1000 * (v == 3).sum((1, 2)) + 1000000 * (v == 40).any((1, 2)) + 2000000 * (v >= 0).all((1, 2))
    np.testing.assert_array_equal(trial(1)[:, ::32], warp + block[:, None])


@pytest.mark.sanitize
def test_barrier_and_order_of_threads() -> None:
    v = np.arange(2 * THREADS, dtype=np.int32).reshape(2, -1)
    for seed in range(6):
        np.testing.assert_array_equal(trial(2, seed=seed), v[:, ::-1])
    # without its barrier the result depends on the order
    assert len({trial(3, seed=seed).tobytes() for seed in range(6)}) > 1


@pytest.mark.parametrize("resident", [1, 3])
def test_blocks_wait_for_those_before(resident: int) -> None:
    for seed in range(3):
        np.testing.assert_array_equal(trial(4, 7, resident=resident, seed=seed)[:, 0], np.arange(1, 8))


def test_blocks_that_wait_for_later_ones_are_a_deadlock() -> None:
    with pytest.raises(simt.Fault, match="deadlock"):
        trial(5, 4, resident=2)
    trial(5, 4, kernel=TOGETHER)


@pytest.mark.sanitize
def test_barrier_of_the_grid() -> None:
    assert (trial(6, 5, kernel=TOGETHER) == 5).all()
    with pytest.raises(simt.Fault, match="deadlock"):
        trial(6, 5)


@pytest.mark.parametrize("resident", [1, 8])
def test_clusters(resident: int) -> None:
    sums = np.repeat([1 + 2 + 3 + 4, 5 + 6 + 7 + 8, 9 + 10 + 11 + 12], 4)
    for seed in range(3):
        out = trial(10, 12, kernel=IN_CLUSTERS, resident=resident, seed=seed)
        np.testing.assert_array_equal(out, np.repeat(sums[:, None], THREADS, 1))
    with pytest.raises(simt.Fault, match="at a barrier of the cluster"):
        trial(37, 8, kernel=IN_CLUSTERS)
    with pytest.raises(simt.Fault, match="block 4 of the cluster leaves it"):
        trial(38, 8, kernel=IN_CLUSTERS)
    with pytest.raises(ValueError, match="clusters"):
        trial(10, 6, kernel=IN_CLUSTERS)


def test_asynchronous_copies_arrive_when_waited_for() -> None:
    v = np.arange(2 * THREADS).reshape(2, -1)
    out = trial(12, shared=8 * THREADS)
    np.testing.assert_array_equal(out, (v + 1000 + 100000 * v).astype(np.int32))


def test_races_are_found() -> None:
    for which in (0, 1, 2, 4, 7, 11, 12):
        expected = trial(which, shared=8 * THREADS)
        np.testing.assert_array_equal(trial(which, shared=8 * THREADS, races=True), expected)
    for which in (3, 39, 42):
        for seed in (0, 1):
            with pytest.raises(
                simt.Fault,
                match=r"race: byte \d+ of .* (read|written) by .*thread \d+ at line \d+ `.*by this",
            ):
                trial(which, races=True, seed=seed)


def test_atomics() -> None:
    values = np.random.default_rng(0).permutation(THREADS).astype(np.int32)
    assert (trial(7, 1, values=values) == THREADS - 1 + 1000 * THREADS).all()


def test_shared_memory_starts_as_nan() -> None:
    assert (trial(8) == -1).all()


def test_extrema() -> None:
    values = np.arange(-64, 64, dtype=np.int32)
    np.testing.assert_array_equal(trial(9, 1, values=values)[0, :64], np.clip(values, -2, 7)[:64])


# --- broken rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (20, r"threads 0 to 31 are at a barrier of the block line \d+ `.*threads 32 to 127 have finished"),
        (21, "thread.* 7 to 7 have finished"),
        (22, "at an operation of the warp.*threads 16 to 31 have finished"),
        (23, "divergence: some threads wait at"),
        (24, "threads 3 to 3 are at a barrier of the block.*threads 4 to 34 are at an operation of the warp"),
        (25, "overrun: byte 0 after the 512 bytes"),
        (26, "overrun: byte 1 before"),
        (27, "misaligned access at line"),
        (28, "null pointer at line"),
        (29, "wild pointer: no memory at 0x1000"),
        (30, "index 512 out of an array's bounds at line"),
        (32, "only whole warps"),
        (34, "stack overflow"),
        (40, "copies are under way where the thread ends"),
        (41, "misaligned asynchronous copy of 8 bytes"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_broken_rules_are_found(which: int, message: str, seed: int) -> None:
    with pytest.raises(simt.Fault, match=message):
        trial(which, n=4 * THREADS, seed=seed)
    trial(0)  # nothing is left behind


def test_division_by_zero_is_found() -> None:
    with pytest.raises(simt.Fault, match="divided by zero"):
        trial(31, n=1000)


def test_an_endless_kernel_is_stopped() -> None:
    with pytest.raises(simt.Fault, match="time limit"):
        trial(33, limit=0.2)


def test_arguments_are_checked() -> None:
    v, f = np.zeros(THREADS, np.int32), np.zeros(16, np.float32)
    good = [np.int32(9), v, v.copy(), np.zeros(3, np.uint32), f, np.int64(0)]
    simt.launch(TRIALS, 1, THREADS, tuple(good), shared=512)
    bad = [(0, np.int64(9)), (0, 9), (0, np.float32(9)), (1, f), (1, v[::2]), (4, np.zeros(16)), (5, v)]
    for place, argument in bad:
        with pytest.raises(TypeError):
            simt.launch(TRIALS, 1, THREADS, (*good[:place], argument, *good[place + 1 :]), shared=512)
    with pytest.raises(TypeError, match="takes 6"):
        simt.launch(TRIALS, 1, THREADS, tuple(good[:-1]))
    with pytest.raises(ValueError, match="threads"):
        simt.launch(TRIALS, 1, 160, tuple(good))


# --- types --------------------------------------------------------------------------------------------------------

HALVES = """
#include "common.cuh"
extern "C" __global__ void __launch_bounds__(32)
convert(const float* from, store* to, float* back, i64 n) {
  for (i64 i = threadIdx.x; i < n; i += 32) { to[i] = narrow(from[i]); back[i] = widen(to[i]); }
}
"""


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_types_round_to_nearest_even(name: str, tmp_path: Path) -> None:
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else np.float16
    (tmp_path / "halves.cu").write_text(HALVES)
    kernel = _device.Kernel.of(str(tmp_path / "halves.cu"), "convert", {"STORE": _device.STORES[name]})
    exact = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    drawn = np.random.default_rng(0).integers(0, 2**32, 2**17, dtype=np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        middle = (exact[:-1] + exact[1:]) / 2  # ties
        from_ = np.concatenate([exact, drawn, middle, drawn * 1e-30, np.nextafter(middle, np.float32(0))])
        from_ = np.concatenate([from_, np.float32(2) ** np.arange(-30, 20) * np.float32(1.00048828125)])
        from_ = from_.astype(np.float32)
        expected = from_.astype(dtype)
    to, back = np.empty(from_.shape, dtype), np.empty(from_.shape, np.float32)
    simt.launch(kernel, 1, 32, (from_, to, back, np.int64(from_.size)))
    nan = np.isnan(from_)
    np.testing.assert_array_equal(to.view(np.uint16)[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(back[nan]).all()
    np.testing.assert_array_equal(back[~nan], expected[~nan].astype(np.float32))


# --- the report ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["float64", "float32", "float16"])
def dtype(request: pytest.FixtureRequest) -> np.dtype[Any]:
    return np.dtype(request.param)


@pytest.mark.sanitize
def test_report(simt_device: simt.Device, dtype: np.dtype[Any]) -> None:
    value = np.ones((6, 3, 4), dtype)
    x, u, weights = value.copy(), value.copy(), np.ones(700, dtype)
    x[2, 1, 1] = np.inf
    u[4, 2, 3] = np.nan
    report = _report.blank(6, 3, 2)
    report.counts[:] = [[1, 5, 2]]
    report.state[1, 1] = report.state[2, 0] = _report.DIVERGED
    report.state[3, 0] = _report.ILL_CONDITIONED
    report.state[4] = [_report.MAX_ITER, _report.DIVERGED]
    report.state[5, 0] = _report.MAX_ITER
    report.change[:] = [1e-3, 1e-4]
    report.change[1] = [1e-3, np.nan]
    report.scale[:] = [2, 0.5]
    report.rcond[:] = [0.5, 0.25]
    solved = _report.summary(value, report, False, (x, u), (weights,))
    assert solved.status.tolist() == [0, 2, 3, 4, 3, 1]
    assert solved.iterations.tolist() == [5] * 6
    np.testing.assert_array_equal(solved.chunk_iterations, report.counts)
    np.testing.assert_array_equal(solved.residual, np.where(np.arange(6) == 1, np.nan, 1e-3 / 2))
    eps = np.finfo(np.float64 if dtype == np.float64 else np.float32).eps
    # something shared that is not finite concerns all that went wrong, and nobody else
    weights[600] = np.nan
    solved = _report.summary(value, report, True, (x, u), (weights,))
    assert solved.status.tolist() == [0, 3, 3, 3, 3, 1]
    assert (solved.iterations == 1).all()
    assert (solved.chunk_iterations == 1).all()
    np.testing.assert_allclose(solved.residual, eps / 0.25, rtol=1e-15)
    assert [launch.blocks for launch in simt_device.launches] == [6, 6]


def test_report_of_nothing(simt_device: simt.Device) -> None:
    solved = _report.summary(np.ones((0, 3, 4)), _report.blank(0, 3), False, (np.ones((0, 3, 4)),))
    assert solved.status.shape == (0,)
    assert not simt_device.launches
    solved = _report.summary(np.ones((2, 0, 4)), _report.blank(2, 0), True, (np.ones((2, 0, 4)),))
    np.testing.assert_array_equal(solved.residual, [0, 0])
    assert solved.chunk_iterations.shape == (2, 0)


def test_memory_that_nobody_wrote_is_nan(simt_device: simt.Device) -> None:
    xp = _device.xp()
    assert np.isnan(xp.empty((3, 2), np.float32)).all()
    assert (xp.empty_like(np.ones(3, np.int32)) < -1000).all()
    assert xp.asarray is np.asarray
