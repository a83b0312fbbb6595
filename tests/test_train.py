"""Training: resuming is bitwise, checkpoints are whole or refused, nothing is overwritten, interruptions are clean."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="training needs the train extra")
pytest.importorskip("tqdm", reason="training needs the train extra")

from fpnumba import nn, tasks, train
from fpnumba.train import checkpoint as checkpoints
from fpnumba.train import loop
from fpnumba.train.build import build_optimizer, stream
from fpnumba.train.evaluation import judge, summary_of
from fpnumba.train.extras import need

TINY: dict[str, Any] = {
    "task": "s3",
    "model": {"d_model": 6, "layer": {"mixer": "householder"}},
    "steps": 12,
    "batch": 4,
    "length": 5,
    "learning_rate": 3e-3,
    "log_every": 1,
    "eval_every": 4,
    "checkpoint_every": 4,
    "eval_lengths": [3, 6],
    "eval_batch": 8,
}


def tiny(**changes: Any) -> train.Config:
    return train.Config.from_dict({**TINY, **changes})


def timeless(folder: train.Folder) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in folder.metrics()]


def assert_same_run(one: Path, other: Path) -> None:
    a, b = (checkpoints.load(train.Folder(path).checkpoint_file) for path in (one, other))
    assert a.step == b.step
    assert a.config == b.config
    assert a.rng == b.rng
    for ours, theirs in ((a.params, b.params), (a.optimizer, b.optimizer)):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value.tobytes() == theirs[name].tobytes(), name
    assert timeless(train.Folder(one)) == timeless(train.Folder(other))


class Known:
    """A task whose answers are the tokens, every second one scored, the last one of odd sequences not."""

    name, vocab, vocab_out, chance = "known", 3, 3, 1 / 3

    @property
    def held_out(self) -> "Known":
        return self

    def sample(self, rng: np.random.Generator, batch: int, length: int) -> Any:
        tokens = rng.integers(3, size=(batch, length))
        tokens[:, 1] = 0
        targets = np.where(np.arange(length) % 2 == 1, tokens, tasks.UNSCORED)
        targets[0] = tasks.UNSCORED
        return tokens, targets


def test_judgement_is_of_scored_positions_alone() -> None:
    def zero(params: Any, tokens: Any, record: Any) -> Any:
        return np.eye(3)[np.zeros_like(tokens)]

    task = Known()
    judged = judge(zero, {}, task, tiny(), 5, 40)  # type: ignore[arg-type]
    _, targets = task.sample(stream(0, "evaluation", 5), 40, 5)
    wanted = (targets[1:, [1, 3]] == 0).mean()
    assert judged["accuracy"] == pytest.approx(wanted)
    assert judged["scaled_accuracy"] == pytest.approx((wanted - 1 / 3) / (2 / 3))
    assert judged["last_accuracy"] == pytest.approx((targets[1:, 3] == 0).mean())
    nothing = judge(zero, {}, task, tiny(), 5, 1)  # type: ignore[arg-type]
    assert np.isnan(nothing["accuracy"])
    assert nothing["loss"] == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from beginning to end."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    outcome = train.run(tiny(), path, quiet=True)
    assert (outcome.step, outcome.reason) == (12, "steps")
    return path


# --- configuration -----------------------------------------------------------------------------------------


def test_config_survives_json() -> None:
    config = tiny(curriculum=[[0, 2], [4, 5]], target_accuracy=0.9)
    assert train.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_curriculum_decides_the_length() -> None:
    config = tiny(curriculum=[[0, 2], [4, 3]], length=5)
    assert [config.length_at(step) for step in (0, 3, 4, 100)] == [2, 2, 3, 3]
    assert tiny().length_at(7) == 5


@pytest.mark.parametrize("name", train.PRESETS)
def test_presets_build(name: str) -> None:
    config = train.preset(name, "s3")
    model = train.build_model(config)
    build_optimizer(config)
    assert train.build_model(train.baseline_of(config)).vocab == model.vocab == 6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "s33x"}, "task: unknown group 's33x'"),
        ({"task": 3}, "task: 3 is no name"),
        ({"steps": 0}, "steps: 0 is below 1"),
        ({"batch": "many"}, "batch: 'many' is not of kind int"),
        ({"batch": True}, "batch: True is not of kind int"),
        ({"learning_rate": 0.0}, "learning_rate: 0.0 is not positive"),
        ({"learning_rate": float("nan")}, "learning_rate: nan is not positive"),
        ({"clip": -1.0}, "clip: -1.0 is below 0"),
        ({"dtype": "float16"}, "dtype: 'float16' is none of float32, float64"),
        ({"schedule": "linear"}, "schedule: 'linear' is none of constant, cosine"),
        ({"eval_lengths": []}, "eval_lengths: [] should be"),
        ({"eval_lengths": 5}, "eval_lengths"),
        ({"curriculum": [[5, 2], [1, 3]]}, "curriculum: [[5, 2], [1, 3]] should be"),
        ({"target_accuracy": 1.5}, "target_accuracy: 1.5 is not in (0, 1]"),
        ({"stepz": 3}, "stepz: no such option of a run; did you mean steps?"),
        ({"model": 3}, "model: 3 is not of kind dict"),
    ],
)
def test_bad_options_are_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(train.ConfigError) as caught:
        tiny(**changes)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model", [{}, {"d_model": 6, "depth": 3}, {"d_model": 6, "layer": {"mixer": "magic"}}, {"d_model": 0}]
)
def test_bad_models_are_refused_before_anything_is_written(model: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(train.ConfigError, match="model: "):
        train.run(tiny(model=model), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_unknown_preset_has_near_matches() -> None:
    with pytest.raises(train.ConfigError, match="unknown preset 'cpuu'; did you mean cpu"):
        train.preset("cpuu", "s3")


# --- the loop ------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_of_an_easy_group(tmp_path: Path) -> None:
    config = tiny(task="z2", steps=40, batch=16, log_every=1, learning_rate=1e-2, eval_every=40)
    train.run(config, tmp_path / "run", quiet=True)
    losses = [row["loss"] for row in train.Folder(tmp_path / "run").metrics() if row["kind"] == "train"]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_rows_say_what_happened(whole: Path) -> None:
    rows = train.Folder(whole).metrics()
    trained = [row for row in rows if row["kind"] == "train"]
    judged = [row for row in rows if row["kind"] == "evaluation"]
    assert [row["step"] for row in trained] == list(range(1, 13))
    assert [row["step"] for row in judged] == [4, 8, 12]
    for row in trained:
        assert row["iterations"] >= 1
        assert row["iterations_max"] >= row["iterations"]
        assert 0 <= row["unconverged"] <= 1
        assert 0 <= row["accuracy"] <= 1
        assert row["length"] == 5


def signal_at(patch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """Send this process a signal in the middle of an update."""
    update = loop.update

    def interrupted(*args: Any) -> Any:
        if int(args[3]["step"]) == step - 1:
            signal.raise_signal(number)
        return update(*args)

    patch.setattr(loop, "update", interrupted)


@pytest.mark.parametrize("pause", [1, 4, 7, 12])
def test_resuming_is_bitwise(
    pause: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at, before and after a checkpoint of its own, a run ends as if it had never stopped."""
    folder = train.Folder(tmp_path / "run")
    with monkeypatch.context() as patch:
        signal_at(patch, pause, signal.SIGINT)
        outcome = train.run(tiny(), folder.path, quiet=True)
    assert (outcome.step, outcome.reason) == (pause, "interrupted")
    if pause < 12:
        # A run that is killed has logged more than its checkpoint knows, and its last line may be torn.
        with open(folder.metrics_file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": pause + 1, "kind": "train", "loss": 99.0}) + '\n{"step": 99, "lo')
    outcome = train.run(folder.config(), folder.path, resume=True, quiet=True)
    assert (outcome.step, outcome.reason) == (12, "steps")
    assert_same_run(whole, folder.path)


def test_a_finished_run_has_nothing_left_to_do(whole: Path) -> None:
    before = train.Folder(whole).checkpoint_file.read_bytes()
    outcome = train.run(tiny(), whole, resume=True, quiet=True)
    assert (outcome.step, outcome.reason) == (12, "steps")
    assert train.Folder(whole).checkpoint_file.read_bytes() == before


def test_stops_at_the_target(tmp_path: Path) -> None:
    config = tiny(target_accuracy=0.01)
    outcome = train.run(config, tmp_path / "run", quiet=True)
    assert (outcome.step, outcome.reason) == (4, "target")
    assert train.run(config, tmp_path / "run", resume=True, quiet=True) == outcome


def test_stops_when_time_is_up_and_goes_on(whole: Path, tmp_path: Path) -> None:
    outcome = train.run(tiny(), tmp_path / "run", minutes=1e-9, quiet=True)
    assert (outcome.step, outcome.reason) == (1, "minutes")
    train.run(tiny(), tmp_path / "run", resume=True, quiet=True)
    assert_same_run(whole, tmp_path / "run")


def test_a_loss_that_is_no_number_ends_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = loop.update

    def broken(*args: Any) -> Any:
        row, params, state = update(*args)
        return ({**row, "loss": float("nan")} if int(state["step"]) == 6 else row), params, state

    monkeypatch.setattr(loop, "update", broken)
    with pytest.raises(train.TrainingError, match="the loss at step 6 is nan"):
        train.run(tiny(), tmp_path / "run", quiet=True)
    assert checkpoints.load(train.Folder(tmp_path / "run").checkpoint_file).step == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_leaves_a_checkpoint(
    number: signal.Signals, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        signal_at(patch, 6, number)
        outcome = train.run(tiny(), tmp_path / "run", quiet=True)
    assert (outcome.step, outcome.reason) == (6, "interrupted")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    train.run(tiny(), tmp_path / "run", resume=True, quiet=True)
    assert_same_run(whole, tmp_path / "run")


def test_the_second_signal_is_the_callers(tmp_path: Path) -> None:
    # A shell's background job starts with the signal ignored, and so would the caller's handler be.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with loop.Interrupt() as interrupt:
            signal.raise_signal(signal.SIGINT)
            assert interrupt.raised
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_trains_in_a_thread_without_touching_signals(tmp_path: Path) -> None:
    outcomes: list[train.Outcome] = []
    thread = threading.Thread(
        target=lambda: outcomes.append(train.run(tiny(steps=1), tmp_path / "run", quiet=True))
    )
    thread.start()
    thread.join()
    assert outcomes[0].step == 1


def test_streams_are_apart() -> None:
    draws = {
        (name, index): stream(0, name, index).integers(2**62)
        for name in ("parameters", "data", "evaluation")
        for index in range(5)
    }
    assert len(set(draws.values())) == len(draws)
    assert stream(1, "data", 3).integers(2**62) != draws["data", 3]


# --- checkpoints ---------------------------------------------------------------------------------------------


def damaged(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("these are not the weights you are looking for\n")
    elif how == "one bit of a weight":
        flipped = bytearray(data)
        flipped[-5] ^= 1
        path.write_bytes(bytes(flipped))
    elif how == "header":
        path.write_bytes(data.replace(b"params/", b"parens/", 1))
    elif how == "metadata":
        path.write_bytes(data.replace(b'"step":"12"', b'"step":"13"', 1))
    elif how == "foreign":
        from safetensors.numpy import save_file

        save_file({"weight": np.zeros(3)}, path)
    elif how == "another program's metadata":
        from safetensors.numpy import save_file

        save_file({"weight": np.zeros(3)}, path, metadata={"format": "pt"})
    elif how == "another version":
        path.write_bytes(data.replace(b'"version":"1"', b'"version":"7"', 1))
    elif how == "missing":
        path.unlink()
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated", "damaged, or no safetensors file"),
        ("empty", "damaged, or no safetensors file"),
        ("text", "damaged, or no safetensors file"),
        ("one bit of a weight", "do not match their checksum"),
        ("header", "do not match their checksum"),
        ("metadata", "do not match their checksum"),
        ("foreign", "no checkpoint of fpnumba"),
        ("another program's metadata", "no checkpoint of fpnumba"),
        ("another version", "of version 7"),
        ("missing", "no checkpoint there"),
        ("a folder", "no checkpoint there"),
    ],
)
def test_damaged_and_foreign_files_are_refused_and_left_alone(
    how: str, says: str, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    path.mkdir()
    for file in ("config.json", "metrics.jsonl", "checkpoint.safetensors"):
        (path / file).write_bytes((whole / file).read_bytes())
    damaged(path / "checkpoint.safetensors", how)
    before = {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.is_file()}
    calls = [lambda: train.run(tiny(), path, resume=True, quiet=True), lambda: train.evaluate(path)]
    for call in calls:
        with pytest.raises(train.CheckpointError) as caught:
            call()
        assert says in str(caught.value)
        assert "checkpoint.safetensors" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.is_file()} == before


def test_a_checkpoint_of_another_configuration_is_refused(whole: Path) -> None:
    with pytest.raises(train.CheckpointError, match=r"another configuration .*learning_rate differ"):
        train.run(tiny(learning_rate=1.0), whole, resume=True, quiet=True)


def test_shapes_and_names_are_verified(tmp_path: Path) -> None:
    here, there = {"a": np.zeros(3), "b": np.zeros(2)}, {"a": np.zeros(4), "b": np.zeros(2)}
    with pytest.raises(train.CheckpointError, match=r"parameter a is float64 \(3,\), .* float64 \(4,\)"):
        checkpoints.check_matches(tmp_path, here, there, "parameter")
    with pytest.raises(train.CheckpointError, match="parameter b is missing"):
        checkpoints.check_matches(tmp_path, {"a": np.zeros(3)}, here, "parameter")
    with pytest.raises(train.CheckpointError, match="parameter c is not part of this model"):
        checkpoints.check_matches(tmp_path, {**here, "c": np.zeros(1)}, here, "parameter")


def test_checkpoints_survive_the_round_trip_bitwise(tmp_path: Path, rng: np.random.Generator) -> None:
    saved = checkpoints.Checkpoint(
        {"w": rng.standard_normal((3, 4)).astype(np.float32), "odd": rng.standard_normal((4, 3)).T[::2]},
        {"step": np.array(7), "m.w": np.zeros((0, 4))},
        7,
        {"task": "s3"},
        {"seed": 0, "step": 7},
        {"reason": "steps"},
    )
    checkpoints.save(tmp_path / "c.safetensors", saved)
    found = checkpoints.load(tmp_path / "c.safetensors")
    assert (found.step, found.config, found.rng, found.extra) == (
        saved.step,
        saved.config,
        saved.rng,
        saved.extra,
    )
    for ours, theirs in ((saved.params, found.params), (saved.optimizer, found.optimizer)):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert theirs[name].dtype == value.dtype
            np.testing.assert_array_equal(theirs[name], value)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    checkpoints.write_atomically(path, b"old")

    def broken(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# --- folders -------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(whole: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in sorted(whole.rglob("*")) if p.is_file()}
    with pytest.raises(train.RunError, match=f"already holds a run; continue it with --resume {whole}"):
        train.run(tiny(), whole, quiet=True)
    assert {p: p.read_bytes() for p in sorted(whole.rglob("*")) if p.is_file()} == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(train.RunError, match="no empty folder"):
        train.run(tiny(), tmp_path, quiet=True)
    with pytest.raises(train.RunError, match="no empty folder"):
        train.run(tiny(), tmp_path / "notes.txt", quiet=True)
    with pytest.raises(train.RunError, match="cannot be made"):
        train.run(tiny(), tmp_path / "notes.txt" / "run", quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "holds no run"),
        ("{", "cannot be read"),
        ('{"format": "other"}', "no configuration of an fpnumba run"),
        ("[]", "no configuration of an fpnumba run"),
        ('{"format": "fpnumba-run", "version": 9}', "of version 9"),
        ('{"format": "fpnumba-run", "version": 1}', "config"),
        ('{"format": "fpnumba-run", "version": 1, "config": {"task": "m11"}}', "unknown group"),
        ('{"format": "fpnumba-run", "version": 1, "config": {"stepz": 1, "task": "s3"}}', "stepz"),
    ],
)
def test_folders_without_a_readable_run_are_refused(content: str | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(train.RunError) as caught:
        train.evaluate(tmp_path)
    assert says in str(caught.value)
    assert str(tmp_path) in str(caught.value)


# --- evaluation and pictures -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(whole: Path) -> dict[str, Any]:
    config = train.Folder(whole).config()
    train.run(train.baseline_of(config), train.Folder(whole).baseline.path, stop=12, quiet=True)
    return train.evaluate(whole, cuts=[1, 2])


def test_evaluation_covers_network_baseline_and_cuts(whole: Path, judged: dict[str, Any]) -> None:
    kinds = [(network["kind"], network["iterations"]) for network in judged["networks"]]
    assert kinds == [("network", None), ("baseline", 1), ("cut", 1), ("cut", 2)]
    for network in judged["networks"]:
        assert [result["length"] for result in network["results"]] == [3, 6]
        for result in network["results"]:
            assert 0 <= result["accuracy"] <= 1
    assert json.loads((whole / "evaluation.json").read_text()) == judged
    for network in judged["networks"][1:3]:
        assert all(result["iterations_max"] == 1 for result in network["results"])


def test_evaluation_is_the_accuracy_of_the_logits(whole: Path, judged: dict[str, Any]) -> None:
    config, task, model, saved = train.load_run(train.Folder(whole))
    tokens, targets = task.sample(stream(config.seed, "evaluation", 6), config.eval_batch, 6)
    logits = model(saved.params, tokens)
    right = logits.argmax(-1) == targets
    result = judged["networks"][0]["results"][1]
    assert result["accuracy"] == right.mean()
    assert result["last_accuracy"] == right[:, -1].mean()


def test_evaluating_again_repeats_the_numbers_and_keeps_the_file(whole: Path, judged: dict[str, Any]) -> None:
    first = (whole / "evaluation.json").read_bytes()
    assert train.evaluate(whole, cuts=[1, 2]) == judged
    assert (whole / "evaluation.json").read_bytes() == first
    assert train.Folder(whole).newest_evaluation() == whole / "evaluation-2.json"


def test_the_baseline_is_a_diagonal_rnn_with_an_exact_gradient() -> None:
    """Held to one iteration, no step mixes with the state: the layer is a scan, and its gradient is the true one."""
    config = train.baseline_of(tiny(dtype="float64", batch=2))
    model = train.build_model(config)
    params = model.init(np.random.default_rng(0), dtype=np.dtype(np.float64))
    tokens, targets = tasks.get("s3").sample(np.random.default_rng(1), 2, 5)
    record: list[Any] = []
    logits, pullback = model.vjp(params, tokens, record=record)
    assert record[0].iterations.tolist() == [1, 1]
    _, logits_bar = nn.cross_entropy_vjp(logits, targets)
    grads, _ = pullback(logits_bar)
    rng = np.random.default_rng(2)
    direction = {name: rng.standard_normal(value.shape) for name, value in params.items()}

    def loss(step: float) -> float:
        moved = {name: value + step * direction[name] for name, value in params.items()}
        return float(nn.cross_entropy(model(moved, tokens), targets))

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    assert sum(float(np.vdot(grads[n], direction[n])) for n in params) == pytest.approx(slope, rel=1e-6)


def test_lengths_and_cuts_must_be_positive(whole: Path) -> None:
    with pytest.raises(train.ConfigError, match="lengths: 0"):
        train.evaluate(whole, lengths=[0])
    with pytest.raises(train.ConfigError, match="iterations: -1"):
        train.evaluate(whole, cuts=[-1])
    with pytest.raises(train.ConfigError, match="batch: 0"):
        train.evaluate(whole, batch=0)


def test_judging_in_parts_is_judging_at_once(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, task, model, saved = train.load_run(train.Folder(whole))
    at_once = judge(model, saved.params, task, config, 6)
    monkeypatch.setattr("fpnumba.train.evaluation._TOKENS", 13)
    in_parts = judge(model, saved.params, task, config, 6)
    assert in_parts["loss"] == pytest.approx(at_once["loss"], rel=1e-5)
    assert in_parts["accuracy"] == at_once["accuracy"]


def test_summary_of_nothing_is_nothing() -> None:
    assert summary_of([]) == {}


def test_table_is_aligned(judged: dict[str, Any]) -> None:
    lines = train.table(judged).splitlines()
    assert lines[0].startswith("s3: trained for 12 steps at length 5")
    body = lines[2:]
    assert len({len(line) for line in body}) == 1
    assert body[0].split()[-2:] == ["3", "6"]
    for name in ("fixed point", "held to one iteration", "cut to 2 iterations", "guessing"):
        assert any(name in line for line in body)


def test_pictures_are_drawn_and_drawn_alike_again(
    whole: Path, judged: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the train extra")
    written = train.plot(whole, out=tmp_path / "one")
    assert [p.name for p in written] == ["accuracy.png", "accuracy.svg", "loss.png", "loss.svg"]
    for path in written:
        head = path.read_bytes()[:200]
        assert head.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in head
    again = train.plot(whole, out=tmp_path / "two")
    for a, b in zip(written, again, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_a_run_without_evaluation_cannot_be_drawn(tmp_path: Path) -> None:
    train.run(tiny(steps=1), tmp_path / "run", quiet=True)
    with pytest.raises(train.RunError, match="fpnumba evaluate"):
        train.plot(tmp_path / "run")


def test_missing_extras_name_the_command() -> None:
    with pytest.raises(train.MissingExtra, match=r'pip install "fpnumba\[train\]"'):
        need("safetensors_that_nobody_has")
    with pytest.raises(train.MissingExtra, match=r'pip install "fpnumba\[train\]"'):
        train.need_all("tqdm_that_nobody_has")


def test_importing_train_needs_no_extra() -> None:
    code = (
        "import sys\n"
        "for name in ('safetensors', 'tqdm', 'matplotlib'): sys.modules[name] = None\n"
        "import fpnumba.train"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
