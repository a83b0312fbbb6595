"""The command line: one clear line for every mistake of a user's, and everything the commands promise."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fpnumba import cli, info

ARGUMENTS = ["--preset", "tiny", "--steps", "6", "--batch", "4", "--length", "4", "--lengths", "3", "6"]
SMALL = ["--set", "model.d_model=6", "--set", "eval_batch=8"]


def call(*argv: Any) -> int:
    return cli.main([str(a) for a in argv])


def refused(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """The one line with which a mistake is answered."""
    assert call(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fpnumba: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err.strip()


def test_a_length_replaces_the_lengths_of_a_preset(tmp_path: Path) -> None:
    options = ["--preset", "cpu", "--length", "4", "--lengths", "4", "--steps", "1", "--batch", "2", *SMALL]
    assert call("train", "s3", *options, "--out", tmp_path / "run", "--quiet") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert json.dumps(config).count('"curriculum": []') == 1
    assert json.dumps(config).count('"length": 4') == 1


# --- help and info -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [[], ["info"], ["validate"], ["train"], ["evaluate"], ["plot"], ["import-weights"]]
)
def test_help_explains(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call(*command, "--help")
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"usage: {' '.join(['fpnumba', *command])}" in out
    assert all(len(line) <= 100 for line in out.splitlines())


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from fpnumba.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'numba', 'scipy', 'matplotlib', 'tqdm', 'safetensors', 'fpnumba.nn', 'fpnumba.train'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_module_and_version() -> None:
    import fpnumba

    done = subprocess.run(
        [sys.executable, "-m", "fpnumba", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"fpnumba {fpnumba.__version__}"


def test_info_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    import numpy

    assert call("info") == 0
    out = capsys.readouterr().out
    for expected in (
        "fpnumba",
        "numpy",
        numpy.__version__,
        "threads",
        "room cpu",
        "room gpu",
        "kernel cache",
    ):
        assert expected in out
    assert call("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == info.gather()
    absent = facts["gpu"]["absent"]
    assert facts["rooms"]["gpu"].startswith("CUDA, " if absent is None else f"absent: {absent}")
    assert ("GPU 0" in out) is (absent is None)
    assert facts["cpu"]["threads"] >= 1


def test_info_names_the_command_for_what_is_missing() -> None:
    facts = info.gather()
    facts["versions"]["tqdm"] = facts["versions"]["cupy"] = None
    assert 'pip install "fpnumba[train]"' in info.text(facts)
    assert 'pip install "fpnumba[cuda13]"' in info.text(facts)


def test_info_describes_a_device() -> None:
    facts = info.gather()
    device = {"index": 0, "name": "Some GPU", "compute_capability": "9.0", "memory": 80 * 2**30}
    facts["gpu"] = {
        "absent": None,
        "devices": [device],
        "driver": "13.0",
        "runtime": "12.9",
        "kernels": [],
        "cache": {"folder": "/somewhere", "bytes": None},
    }
    said = info.text(facts)
    for expected in (
        "Some GPU, compute capability 9.0, 80 GiB",
        "driver 13.0, runtime 12.9",
        "none (compiled or loaded by this process)",
        "/somewhere, nothing yet (CUPY_CACHE_DIR moves it)",
    ):
        assert expected in said
    facts["gpu"]["kernels"] = ["scan of scan.cu"]
    facts["gpu"]["cache"]["bytes"] = 3 * 2**20
    assert "scan of scan.cu (" in info.text(facts)
    assert "/somewhere, 3.0 MiB" in info.text(facts)


# --- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "COMMAND"),
        (["trane"], "invalid choice: 'trane'"),
        (["train"], "argument TASK: missing"),
        (["train", "s33x"], "task: unknown group 's33x'; did you mean"),
        (["train", "coppy"], "task: unknown task 'coppy'; did you mean copy?"),
        (["train", "copy,size=3"], "task: Copy has no option 'size'"),
        (["train", "text:nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["train", "s3", "--set", "model.layer.kind=GRU"], "model: kind of the layer must be one of 'FPRNN'"),
        (
            ["train", "s3", "--set", "model.layer.kind=LSTM", "--baseline"],
            "baseline: a layer of kind 'LSTM' has no iteration to hold to one",
        ),
        (["train", "s3", "--preset", "gpu9"], "preset: unknown preset 'gpu9'"),
        (["train", "s3", "--steps", "0"], "argument --steps: '0' is no positive whole number"),
        (["train", "s3", "--steps", "many"], "argument --steps: 'many' is no positive whole number"),
        (["train", "s3", "--minutes", "-1"], "argument --minutes: '-1' is no positive number of minutes"),
        (["train", "s3", "--lr", "0"], "learning_rate: 0.0 is not positive"),
        (["train", "s3", "--dtype", "int8"], "dtype: 'int8' is none of float32, float64"),
        (["train", "s3", "--target", "2"], "target_accuracy: 2.0 is not in (0, 1]"),
        (["train", "s3", "--seed", "-1"], "seed: -1 is below 0"),
        (["train", "s3", "--set", "steps"], "argument --set: 'steps' is not of the form NAME=VALUE"),
        (["train", "s3", "--set", "stepz=3"], "stepz: no such option of a run; did you mean steps?"),
        (["train", "s3", "--set", "layer.rank=3"], "argument --set: 'layer.rank'"),
        (["train", "s3", "--set", "model.layer.mixer=magic"], "model: "),
        (["train", "s3", "--set", "model.depth=3"], "model: "),
        (["train", "s3", "--nonsense"], "--nonsense"),
        (["train", "--resume", "nowhere"], "run: nowhere holds no run"),
        (["evaluate", "nowhere"], "run: nowhere holds no run"),
        (["evaluate", "nowhere", "--lengths", "0"], "argument --lengths: '0' is no positive whole number"),
        (["plot", "nowhere"], "run: nowhere holds no run"),
        (["validate", "--room", "attic"], "argument --room: 'attic' is not present here"),
        (["validate", "--seed", "x"], "argument --seed"),
    ],
)
def test_mistakes_get_one_line(
    argv: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["safetensors", "tqdm", "matplotlib"])
def test_missing_packages_are_found_before_training(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fpnumba.train import extras

    find = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == package else find(name))
    said = refused(capsys, "train", "s3", "--out", tmp_path / "run")
    assert package in said
    assert 'pip install "fpnumba[train]"' in said
    assert list(tmp_path.iterdir()) == []


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ValueError("ours")

    monkeypatch.setattr(info, "gather", broken)
    with pytest.raises(ValueError, match="ours"):
        call("info")


# --- from training to pictures -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("safetensors", reason="training needs the train extra")
    pytest.importorskip("tqdm", reason="training needs the train extra")
    pytest.importorskip("matplotlib", reason="training needs the train extra")
    run = tmp_path_factory.mktemp("cli") / "run"
    assert call("train", "s3", *ARGUMENTS, *SMALL, "--out", run, "--baseline", "--quiet") == 0
    return run


def test_training_ends_in_a_table_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: Path
) -> None:
    run = tmp_path / "run"
    assert call("train", "S3", *ARGUMENTS, *SMALL, "--out", run, "--baseline") == 0
    out, err = capsys.readouterr()
    assert out.startswith("s3: trained for 6 steps at length 4")
    for row in ("token accuracy at length", "fixed point", "held to one iteration", "guessing"):
        assert row in out
    assert "parameters, steps 0 to 6 of 4 sequences of length 4" in err
    assert "accuracy.png" in err
    names = {p.name for p in run.iterdir()}
    assert names == {p.name for p in trained.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "checkpoint.safetensors",
        "evaluation.json",
        "accuracy.png",
        "accuracy.svg",
        "loss.png",
        "loss.svg",
        "baseline",
    }


def test_quiet_prints_the_table_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "z2", *ARGUMENTS, *SMALL, "--out", tmp_path / "run", "--quiet") == 0
    out, err = capsys.readouterr()
    assert "guessing" in out
    assert "held to one iteration" not in out
    assert err.splitlines() == []


@pytest.mark.parametrize("task", ["mod5-brackets,shortest=3", "parity-final", "copy", "text:{}", "babi:{}"])
def test_other_tasks(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a file.txt"
    file.write_text("1 Mary went home.\n2 Where is Mary?\thome\t1\n1 Jo left.\n2 Is Jo here?\tno\t1\n" * 30)
    task, run = task.format(file), tmp_path / "run"
    assert call("train", task, *ARGUMENTS, *SMALL, "--lengths", "4", "9", "--out", run, "--quiet") == 0
    out, _ = capsys.readouterr()
    assert out.startswith(f"{task}: trained for 6 steps at length 4")
    for row in ("fixed point", "its last token alone", "scaled past guessing", "guessing"):
        assert row in out
    judged = json.loads((run / "evaluation.json").read_text())
    (result,) = [one for one in judged["networks"][0]["results"] if one["length"] == 9]
    assert 0 <= result["accuracy"] <= 1
    chance = judged["chance"]
    assert result["scaled_accuracy"] == pytest.approx((result["accuracy"] - chance) / (1 - chance))
    assert call("train", task, "--resume", run, "--quiet") == 0
    assert call("plot", run) == 0


@pytest.mark.parametrize("kind", ["LSTM", "Mamba"])
def test_networks_without_a_fixed_point(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--set", "model.layer.d_inner=5", "--set", f"model.layer.kind={kind}"]
    assert call("train", "mod5,shortest=none", *ARGUMENTS, *SMALL, *options) == 0
    out, err = capsys.readouterr()
    assert f"{kind}: " in err
    assert len([line for line in out.splitlines() if line.startswith(kind)]) == 1
    for absent in ("fixed point", "iterations", "cut to"):
        assert absent not in out
    run = Path("runs") / "mod5-shortest-none-tiny"
    config = json.loads((run / "config.json").read_text())["config"]
    assert config["model"]["layer"] == {"kind": kind, "d_inner": 5}
    assert (run / "accuracy.png").exists()


def test_evaluate_and_plot(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "evaluation.json").read_bytes()
    assert call("evaluate", trained, "--lengths", "2", "5", "--iterations", "1", "--batch", "4") == 0
    out, _ = capsys.readouterr()
    assert "cut to 1 iteration " in out
    assert "cut to 2" not in out
    assert (trained / "evaluation.json").read_bytes() == before
    judged = json.loads((trained / "evaluation-2.json").read_text())
    assert [result["length"] for result in judged["networks"][0]["results"]] == [2, 5]
    assert call("plot", trained, "--out", tmp_path / "pictures") == 0
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {
        "accuracy.png",
        "accuracy.svg",
        "loss.png",
        "loss.svg",
    }


def test_a_folder_in_use_is_left_alone(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in sorted(trained.rglob("*")) if p.is_file()}
    said = refused(capsys, "train", "s3", "--out", trained)
    assert f"already holds a run; continue it with --resume {trained}" in said
    assert {p: p.read_bytes() for p in sorted(trained.rglob("*")) if p.is_file()} == before


def test_a_resumed_run_keeps_its_configuration(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "argument --lr: " in refused(capsys, "train", "--resume", trained, "--lr", "1")
    assert "argument --set: " in refused(capsys, "train", "--resume", trained, "--set", "steps=9")
    assert "argument TASK: 'a5'" in refused(capsys, "train", "a5", "--resume", trained)


def test_foreign_checkpoints_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((trained / "config.json").read_bytes())
    (tmp_path / "checkpoint.safetensors").write_text("not a checkpoint")
    for argv in (["train", "--resume", tmp_path], ["evaluate", tmp_path]):
        assert "checkpoint.safetensors: damaged" in refused(capsys, *argv)
    assert (tmp_path / "checkpoint.safetensors").read_text() == "not a checkpoint"
    assert len(list(tmp_path.iterdir())) == 2


def test_an_unwritable_place_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    said = refused(capsys, "train", "s3", "--out", tmp_path / "file" / "run")
    assert f"out: {tmp_path / 'file' / 'run'} cannot be made" in said


def test_ctrl_c_leaves_a_checkpoint_and_resume_goes_on(tmp_path: Path) -> None:
    """As a user sees it: the signal ends the process with 130 and one line that says how to go on."""
    run = tmp_path / "run"
    arguments = [*ARGUMENTS, *SMALL, "--steps", "100000", "--set", "log_every=1"]
    command = [sys.executable, "-m", "fpnumba", "train", "z2", *arguments, "--out", str(run)]
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("fpnumba: interrupted at step ")
    assert last.endswith(f"go on with: fpnumba train --resume {run}")
    assert "Traceback" not in err
    step = int(last.removeprefix("fpnumba: interrupted at step ").partition(";")[0])
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert rows[-1]["step"] == step
    done = subprocess.run(
        [sys.executable, "-m", "fpnumba", "train", "--resume", str(run), "--minutes", "0.0001", "--quiet"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert f"z2: trained for {step + 1} steps" in done.stdout


def test_a_network_that_was_interrupted_comes_before_its_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fpnumba import train
    from fpnumba.train import loop

    run, update = tmp_path / "run", loop.update

    def interrupted(*args: Any) -> Any:
        if int(args[3]["step"]) == 2:
            signal.raise_signal(signal.SIGTERM)
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", interrupted)
        assert call("train", "s3", *ARGUMENTS, *SMALL, "--out", run, "--baseline", "--quiet") == 130
        assert not (run / "baseline").exists()
        assert "interrupted at step 3" in capsys.readouterr().err
        # going on, the network is past the signal and its baseline is not
        assert call("train", "--resume", run, "--quiet") == 130
        assert (run / "baseline").exists()
    capsys.readouterr()
    assert call("train", "--resume", run, "--quiet") == 0
    assert "held to one iteration" in capsys.readouterr().out
    assert train.Folder(run).newest_evaluation() == run / "evaluation.json"
