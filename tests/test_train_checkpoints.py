"""Checkpoints of any size: files stay small, a set is whole or not there, whatever happens while one is written."""

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

from test_train import assert_same_run, signal_at, tiny

from fpnumba import train
from fpnumba.train import checkpoint as checkpoints
from fpnumba.train.checkpoint import Checkpoint

SMALL = 100_000


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a size that tests can afford."""
    monkeypatch.setattr(checkpoints, "FILE_BYTES", SMALL)


def state(step: int, seed: int = 0, size: int = 150) -> Checkpoint:
    """About 400 kB: a tensor larger than a file, small ones, an empty one and a scalar."""
    rng = np.random.default_rng(seed)
    params = {"big": rng.standard_normal((size, size)), "b": rng.standard_normal(3).astype(np.float32)}
    params |= {f"layer.{i}": rng.standard_normal((40, 25)) for i in range(3)}
    optimizer = {
        "step": np.array(step),
        "empty": np.zeros((0, 4)),
        "m.big": rng.standard_normal((size, size)),
    }
    return Checkpoint(params, optimizer, step, {"task": "s3"}, {"seed": seed}, {"reason": "steps"})


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    assert (a.step, a.config, a.rng, a.extra) == (b.step, b.config, b.rng, b.extra)
    for ours, theirs in ((a.params, b.params), (a.optimizer, b.optimizer)):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert (value.dtype, value.shape) == (theirs[name].dtype, theirs[name].shape)
            assert value.tobytes() == theirs[name].tobytes(), name


@pytest.mark.usefixtures("small_files")
def test_no_file_is_larger_than_the_bound_and_older_shards_go(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    (tmp_path / "checkpoint-mine.safetensors").write_text("not a shard")
    for step, size in ((1, 150), (2, 150), (2, 160), (3, 5), (4, 150)):
        saved = state(step, seed=size, size=size)
        checkpoints.save(path, saved)
        assert_same(checkpoints.load(path), saved)
        files = [p for p in tmp_path.iterdir() if p.name != "checkpoint-mine.safetensors"]
        assert all(p.stat().st_size <= SMALL for p in files)
        assert (len(files) == 1) == (size == 5)
        assert all(f"-{step}-" in p.name for p in files if p != path)
    assert (tmp_path / "checkpoint-mine.safetensors").read_text() == "not a shard"


def test_the_bound_is_16_megabytes(tmp_path: Path) -> None:
    saved = Checkpoint({"w": np.arange(5_000_000, dtype=np.float32)}, {}, 1, {}, {}, {})
    checkpoints.save(tmp_path / "c.safetensors", saved)
    sizes = [p.stat().st_size for p in tmp_path.iterdir()]
    assert len(sizes) == 3
    assert max(sizes) <= 16_000_000
    assert_same(checkpoints.load(tmp_path / "c.safetensors"), saved)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("damage", ["missing", "truncated", "one bit", "of another set"])
def test_a_damaged_shard_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoints.save(path, state(1))
    shard = sorted(tmp_path.glob("checkpoint-1-*-2.safetensors"))[0]
    data = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(data[: len(data) // 2])
    elif damage == "one bit":
        shard.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    else:
        (tmp_path / "other").mkdir()
        checkpoints.save(tmp_path / "other" / "checkpoint.safetensors", state(1, seed=1))
        shard.write_bytes(sorted((tmp_path / "other").glob("*-2.safetensors"))[0].read_bytes())
    with pytest.raises(train.CheckpointError) as caught:
        checkpoints.load(path)
    named = shard if damage in ("missing", "truncated") else path
    assert str(named) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("stop", range(8))
def test_a_save_that_ends_anywhere_leaves_the_old_checkpoint(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before, after = tmp_path / "checkpoint.safetensors", state(1), state(2, seed=3)
    checkpoints.save(path, before)
    replace, done = os.replace, 0

    def broken(*args: Any) -> None:
        nonlocal done
        done += 1
        if done > stop:
            raise OSError("no space left")
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        whole = True
        try:
            checkpoints.save(path, after)
        except OSError:
            whole = False
    assert_same(checkpoints.load(path), after if whole else before)
    checkpoints.save(path, after)
    assert_same(checkpoints.load(path), after)
    assert all("-2-" in p.name for p in tmp_path.iterdir() if p != path)


KILLED = """
import sys
from pathlib import Path
from fpnumba.train import checkpoint as checkpoints
checkpoints.FILE_BYTES = 100_000
sys.path.insert(0, sys.argv[2])
from test_train_checkpoints import state
step = 0
while True:
    step += 1
    checkpoints.save(Path(sys.argv[1]), state(step, seed=step))
    print(step, flush=True)
"""


def test_kill_in_the_middle_of_a_save_leaves_a_usable_checkpoint(tmp_path: Path) -> None:
    """A process that does nothing but save is killed at several moments; what it left is whole and goes on."""
    path, here = tmp_path / "checkpoint.safetensors", str(Path(__file__).parent)
    for wait in (0.0, 0.003, 0.011, 0.05):
        command = [sys.executable, "-c", KILLED, str(path), here]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        told = [1, *(int(line) for line in process.stdout.read().splitlines() if line)]
        process.wait()
        process.stdout.close()
        found = checkpoints.load(path)
        # the last one that was reported, or the one being written, whose index was there already
        assert found.step in (told[-1], told[-1] + 1)
        assert_same(found, state(found.step, seed=found.step))
    checkpoints.save(path, state(1, size=5))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_reader_sees_one_whole_checkpoint_while_it_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "FILE_BYTES", SMALL)
    path, joined = tmp_path / "checkpoint.safetensors", checkpoints._joined
    checkpoints.save(path, state(1))

    def overtaken(*args: Any) -> Any:
        monkeypatch.setattr(checkpoints, "_joined", joined)
        checkpoints.save(path, state(2))
        return joined(*args)

    monkeypatch.setattr(checkpoints, "_joined", overtaken)
    assert checkpoints.load(path).step == 2


# --- in a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "whole"
    train.run(tiny(), path, quiet=True)
    return path


def test_a_run_is_stopped_and_continued_many_times(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise, with a checkpoint in shards, a signal of either kind at every third step."""
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 70_000)
    path = tmp_path / "run"
    for turn, step in enumerate(range(3, 12, 3)):
        with monkeypatch.context() as patch:
            signal_at(patch, step, (signal.SIGINT, signal.SIGTERM)[turn % 2])
            outcome = train.run(tiny(), path, resume=turn > 0, quiet=True)
        assert (outcome.step, outcome.reason) == (step, "interrupted")
    assert len(list(path.glob("checkpoint-9-*.safetensors"))) > 1
    train.run(tiny(), path, resume=True, quiet=True)
    assert_same_run(whole, path)


def test_checkpoints_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    save = checkpoints.save
    monkeypatch.setattr(
        checkpoints, "save", lambda path, saved: (steps.append(saved.step), save(path, saved))
    )
    train.run(tiny(steps=5, checkpoint_every=100, checkpoint_minutes=1e-9), tmp_path / "often", quiet=True)
    assert steps == [0, 1, 2, 3, 4, 5]
    steps.clear()
    train.run(tiny(steps=5, checkpoint_every=100, checkpoint_minutes=0), tmp_path / "never", quiet=True)
    assert steps == [0, 5]


def test_options_that_a_checkpoint_is_too_old_to_know_have_their_defaults(
    whole: Path, tmp_path: Path
) -> None:
    config = tiny()
    saved = checkpoints.load(train.Folder(whole).checkpoint_file)
    old = {name: value for name, value in saved.config.items() if name not in ("iterations", "precision")}
    folder = train.Folder(tmp_path / "old")
    folder.create(config)
    checkpoints.save(
        folder.checkpoint_file,
        Checkpoint(saved.params, saved.optimizer, saved.step, old, saved.rng, saved.extra),
    )
    assert train.load_run(folder)[3].step == 12
