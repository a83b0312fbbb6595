"""Runs of several processes: what one process finds, one writes, all stop together, and one that dies ends them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="training needs the train extra")
pytest.importorskip("tqdm", reason="training needs the train extra")

from test_train import timeless, tiny

from fpnumba import train
from fpnumba.train import checkpoint as checkpoints
from fpnumba.train import parallel

ARGUMENTS = ["--preset", "tiny", "--batch", "7", "--length", "4", "--lengths", "3", "6", "--dtype", "float64"]
SMALL = [
    f"--set={one}"
    for one in ("model.d_model=6", "eval_batch=8", "eval_every=2", "checkpoint_every=2", "log_every=1")
]


@pytest.fixture(scope="module")
def mpirun() -> list[str]:
    """The launcher that belongs to mpi4py's MPI, here the one of the `mpich` package."""
    pytest.importorskip("mpi4py", reason="several processes need mpi4py")
    launcher = Path(sys.executable).parent / "mpirun"
    if not launcher.is_file():
        pytest.skip("several processes need mpirun: pip install mpich")
    return [str(launcher), "-n", "2", sys.executable]


def called(command: list[str], code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "NUMBA_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


# --- one process -----------------------------------------------------------------------------------------------


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in parallel._LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    assert train.group() is parallel.ALONE
    monkeypatch.setenv("PMI_SIZE", "1")
    assert train.group() is parallel.ALONE
    alone, grads, row = parallel.ALONE, {"w": np.ones(2)}, {"loss": 1.0}
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.share(grads["w"]) == (grads["w"],)
    assert alone.mean(grads, row, np.zeros(3)) == (grads, row)
    assert alone.first(lambda: 3) == 3
    assert alone.any(True, False) == (True, False)
    with pytest.raises(ValueError, match="ours"), alone.together():
        raise ValueError("ours")


def test_several_processes_without_mpi4py_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    with pytest.raises(train.MissingExtra, match=r'pip install "fpnumba\[mpi\]"'):
        train.group()


@pytest.mark.parametrize(("said", "threads"), [(None, 2), ("7", None)])
def test_processes_of_a_machine_divide_its_cores(
    said: str | None, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processes on the cores of this one, and a fourth that is bound to others."""
    import numba

    class Local:
        def allgather(self, mine: list[int]) -> list[list[int]]:
            return [mine, mine, [-1], mine]

    told: list[int] = []
    monkeypatch.setattr(numba, "set_num_threads", told.append)
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 8)
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("NUMBA_NUM_THREADS", said)
    parallel._share_cores(Local())
    assert told == ([] if threads is None else [threads])


class _Several(train.Group):
    size = 5


def test_more_processes_than_sequences_are_refused(tmp_path: Path) -> None:
    with pytest.raises(train.ConfigError, match="batch: 4 sequences are too few for 5 processes"):
        train.run(tiny(), tmp_path / "run", quiet=True, group=_Several())
    assert not (tmp_path / "run").exists()


# --- two processes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(mpirun: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, interrupted by the clock and continued, and its baseline."""
    run = tmp_path_factory.mktemp("two") / "run"
    fpnumba = [*mpirun, "-m", "fpnumba", "train"]
    options = ["--steps", "6", "--out", str(run), "--minutes", "0.00001"]
    done = called([*fpnumba, "s3", *ARGUMENTS, *SMALL, *options])
    assert done.stdout.count("token accuracy at length") == 1
    assert done.stderr.count("parameters, steps 0 to 6") == 1
    assert "out of time: step 1" in done.stderr
    done = called([*fpnumba, "--resume", str(run)])
    assert "all steps made: step 6" in done.stderr
    return run


def test_two_processes_do_what_one_does(two: Path, tmp_path: Path) -> None:
    """Seven sequences, three and four: the parameters after six steps agree to rounding, and so do the metrics."""
    config = train.Folder(two).config()
    train.run(config, tmp_path / "one", quiet=True)
    a, b = (checkpoints.load(train.Folder(path).checkpoint_file) for path in (two, tmp_path / "one"))
    assert a.step == b.step == 6
    moved = 0.0
    for name, value in train.initial_params(config, train.build_model(config)).items():
        np.testing.assert_allclose(a.params[name], b.params[name], rtol=1e-9, atol=1e-12)
        moved = max(moved, float(np.abs(a.params[name] - value).max()))
    assert moved > 1e-4
    ours, theirs = (timeless(train.Folder(path)) for path in (two, tmp_path / "one"))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.pop("kind") == its.pop("kind")
        assert mine == pytest.approx(its, rel=1e-9)


MEAN = """
import numpy as np
from fpnumba import train
group = train.group()
assert group.size == 2 and 0 <= group.local_rank < 2
whole = np.arange(7)
(mine,) = group.share(whole)
targets = np.where(np.arange(len(mine)) % 2, -1, 3)           # 3 and 4 sequences, 2 and 2 targets that count
if group.rank == 1:
    targets[:] = 3                                              # 2 and 4
grads = {"a": np.full((2, 2), group.rank + 1.0), "b": np.full(3, group.rank, np.float32), "c": np.zeros(())}
row = {"loss": float(group.rank), "iterations_max": 3 + group.rank}
grads, row = group.mean(grads, row, targets)
assert mine.tolist() == [[0, 1, 2], [3, 4, 5, 6]][group.rank]
assert np.allclose(grads["a"], 5 / 3) and grads["a"].shape == (2, 2) and grads["c"].shape == ()
assert np.allclose(grads["b"], 2 / 3) and grads["b"].dtype == np.float32
assert abs(row["loss"] - 2 / 3) < 1e-12 and row["iterations_max"] == 4 and type(row["iterations_max"]) is int
# one process has nothing that counts, and its accuracy is no number
nothing = np.full(len(mine), -1 if group.rank else 1)
assert group.mean({}, {"accuracy": float("nan") if group.rank else 0.5}, nothing)[1] == {"accuracy": 0.5}
assert group.any(group.rank == 1, False) == (True, False)
assert group.first(lambda: group.rank) == 0
try:
    group.first(lambda: train.Folder("nowhere").config())
except train.RunError as error:
    print("told:", error)
"""


def test_means_weigh_targets_and_errors_of_the_first_are_everybodys(mpirun: list[str]) -> None:
    done = called([*mpirun, "-c", MEAN])
    assert done.stdout.count("nowhere holds no run") == 2  # both at once, and so may mix


DEVICES = """
import cupy
from fpnumba import train
group = train.group()
cupy.cuda.Device(group.local_rank).use()
grads = {"a": cupy.full((2, 3), group.rank + 1.0), "b": cupy.full(5, group.rank, cupy.float32)}
for _ in range(2):
    found, row = group.mean(grads, {"loss": cupy.asarray(float(group.rank))}, cupy.zeros(2 + 2 * group.rank, int))
    assert float(abs(found["a"] - 5 / 3).max()) < 1e-12 and found["a"].shape == (2, 3)
    assert float(abs(found["b"] - 2 / 3).max()) < 1e-6 and found["b"].dtype == cupy.float32
    assert abs(row["loss"] - 2 / 3) < 1e-12
"""


@pytest.mark.gpu
def test_gradients_on_two_gpus_are_summed_by_nccl(mpirun: list[str]) -> None:
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    called([*mpirun, "-c", DEVICES])


def test_a_mistake_is_said_once(mpirun: list[str], two: Path) -> None:
    done = called([*mpirun, "-m", "fpnumba", "train", "s3", *ARGUMENTS, "--out", str(two)], code=2)
    assert done.stderr.count("fpnumba: error: ") == 1
    assert "already holds a run" in done.stderr
    assert "Traceback" not in done.stderr


def started(mpirun: list[str], run: Path, *script: str) -> "subprocess.Popen[str]":
    """A long run, once it has made some steps."""
    options = [*ARGUMENTS, *SMALL, "--steps", "100000", "--out", str(run)]
    process = subprocess.Popen(
        [*mpirun, *(script or ("-m", "fpnumba")), "train", "z2", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NUMBA_NUM_THREADS": "1"},
    )
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 6):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_processes_at_the_same_step(
    number: signal.Signals, mpirun: list[str], tmp_path: Path
) -> None:
    process = started(mpirun, tmp_path / "run")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("fpnumba: interrupted at step ") == 1
    step = int(err.partition("interrupted at step ")[2].partition(";")[0])
    saved = checkpoints.load(tmp_path / "run" / "checkpoint.safetensors")
    assert (saved.step, saved.extra["reason"]) == (step, "interrupted")


DIES = """
import os, signal, sys
from fpnumba import cli
from fpnumba.train import loop, parallel
parallel.PATIENCE = 0.5
update = loop.update
def dying(*args):
    if int(args[3]["step"]) == 9 and args[-1].rank == 1:
        if sys.argv[1] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("out of luck")
    return update(*args)
loop.update = dying
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_a_process_that_dies_ends_the_run_with_its_last_checkpoint(
    how: str, mpirun: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    run = tmp_path / "run"
    process = started(mpirun, run, str(script), how)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    if how == "kill":
        assert "signal 9" in out + err  # said by the launcher
    else:
        assert "RuntimeError: out of luck" in err
        assert (
            "process 2 of 2 failed (RuntimeError('out of luck')); the run ends at its last checkpoint" in err
        )
    assert checkpoints.load(run / "checkpoint.safetensors").step == 8
    config: Any = train.Folder(run).config()
    assert train.run(config, run, resume=True, stop=12, quiet=True).step == 12
