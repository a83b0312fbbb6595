"""Pictures of several runs and of how a network is solved: the numbers behind them, and that they are drawn."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="training needs the train extra")
pytest.importorskip("tqdm", reason="training needs the train extra")
pytest.importorskip("matplotlib", reason="pictures need the train extra")

from test_train import tiny

from fpnumba import cli, train
from fpnumba.train import several
from fpnumba.train.build import build_model, stream

DPLR = {"d_model": 6, "layer": {"mixer": "dplr"}}


def pictures(*names: str) -> list[str]:
    return [f"{name}{suffix}" for name in names for suffix in (".png", ".svg")]


def text_of(path: Path) -> str:
    """An SVG, whose letters are paths with the text in a comment above them."""
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of one network, the first with its baseline, and one of another."""
    folder = tmp_path_factory.mktemp("runs")
    changes: list[dict[str, Any]] = [
        {"seed": 0, "log_every": 1},
        {"seed": 1, "log_every": 2, "eval_lengths": [3, 6, 9]},
        {"seed": 0, "model": DPLR},
    ]
    for k, change in enumerate(changes):
        config = tiny(steps=2, **change)
        train.run(config, folder / str(k), quiet=True)
        if k == 0:
            train.run(train.baseline_of(config), folder / "0" / "baseline", quiet=True)
        train.evaluate(folder / str(k), cuts=[1])
    return [folder / str(k) for k in range(3)]


# --- several runs ----------------------------------------------------------------------------------------------


def test_runs_that_differ_by_the_seed_alone_are_one_series(runs: list[Path]) -> None:
    found = several.gathered([train.Folder(run) for run in runs])
    assert [(one.label, len(one.runs), one.baseline) for one in found] == [
        ("mixer householder", 2, False),
        ("mixer householder, one iteration", 1, True),
        ("mixer dplr", 1, False),
    ]
    alone = several.gathered([train.Folder(run) for run in runs[:2]])
    assert [one.label for one in alone] == [
        "fixed-point RNN",
        "the same, trained with one iteration: a diagonal RNN",
    ]
    assert len({one.color for one in alone}) == 2


def test_the_spread_is_that_of_the_evaluations(runs: list[Path]) -> None:
    found = several.gathered([train.Folder(run) for run in runs])[0]
    judged = [json.loads((run / "evaluation.json").read_text()) for run in runs[:2]]
    networks = [{r["length"]: r for r in j["networks"][0]["results"]} for j in judged]
    lengths, low, middle, high = found.spread("accuracy")
    assert lengths == [3, 6, 9]  # the last one of one seed alone
    for k, length in enumerate(lengths):
        accuracies = [network[length]["accuracy"] for network in networks if length in network]
        assert (low[k], middle[k], high[k]) == (min(accuracies), median(accuracies), max(accuracies))
    assert found.spread("parallel", "iterations")[0] == [3, 6, 9]
    assert found.spread("parallel", "nothing")[0] == []
    assert found.runs[0].seconds == train.Folder(runs[0]).metrics()[-2]["seconds"]


def test_several_runs_are_drawn_and_drawn_alike_again(runs: list[Path], tmp_path: Path) -> None:
    written = train.compare(runs, out=tmp_path / "one")
    assert [p.name for p in written] == pictures("lengths", "seconds")
    again = train.compare(runs, out=tmp_path / "two")
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(written, again, strict=True))
    assert "mixer householder (median and range of 2 seeds)" in text_of(tmp_path / "one" / "lengths.svg")
    assert "at length 6 against" in text_of(tmp_path / "one" / "seconds.svg")
    beside = train.compare(runs[:2], length=3)
    assert {p.parent for p in beside} == {runs[0].parent}
    for path in beside:
        path.unlink()


def test_what_cannot_be_compared_is_named(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(train.RunError, match="is given twice"):
        train.compare([runs[0], runs[0].parent / "." / "0"], out=tmp_path)
    with pytest.raises(train.RunError, match="length: not all runs were judged at 9"):
        train.compare(runs, out=tmp_path, length=9)
    with pytest.raises(train.RunError, match="holds no run"):
        train.compare([runs[0], tmp_path], out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ticks_do_not_run_into_each_other() -> None:
    assert several._thinned([16]) == [16]
    assert several._thinned([4, 8, 16]) == [4, 8, 16]
    assert several._thinned([16, 17, 18, 24, 62, 64]) == [16, 24, 64]


# --- how a network is solved -------------------------------------------------------------------------------------


def test_the_iterations_are_those_of_the_chunked_way(runs: list[Path]) -> None:
    found = train.iteration_map(runs[0], length=10, chunk=4, batch=3, history=True)
    config, task, _, saved = train.load_run(train.Folder(runs[0]))
    tokens, _ = task.sample(stream(config.seed, "evaluation", 10), 3, 10)
    record: list[Any] = []
    build_model(config, method="chunked", chunk=4, rtol=found["rtol"])(saved.params, tokens, record=record)
    assert found["layers"][0]["iterations"] == record[0].chunk_iterations.tolist()
    assert np.shape(found["layers"][0]["iterations"]) == (3, 3)
    residuals = np.array(found["layers"][0]["residuals"])
    assert residuals.shape[1] == 3
    assert (residuals[-1] <= found["rtol"]).all()
    assert train.iteration_map(runs[0])["chunk"] == 1
    assert train.iteration_map(runs[0])["layers"][0]["residuals"] is None


def test_the_ways_agree_and_their_accuracy_is_that_of_the_evaluation(runs: list[Path]) -> None:
    found = train.compare_ways(runs[0], lengths=[6, 3], batch=8)
    assert [one["way"] for one in found["ways"]] == ["sequential", "chunked", "parallel"]
    judged = json.loads((runs[0] / "evaluation.json").read_text())["networks"][0]["results"]
    for one in found["ways"]:
        assert [result["length"] for result in one["results"]] == [3, 6]
        for result, seen in zip(one["results"], judged, strict=True):
            assert result["accuracy"] == pytest.approx(seen["accuracy"], abs=0.06)
            assert result["difference"] < 1e-3
            assert result["changed"] <= 0.1
    assert all(result["difference"] == 0 for result in found["ways"][0]["results"])


def test_layers_and_matrix_states_have_panels_of_their_own(tmp_path: Path) -> None:
    model = {"d_model": 4, "n_layers": 2, "layer": {"kind": "FPMamba", "d_state": 2}}
    train.run(tiny(steps=1, model=model), tmp_path / "run", quiet=True)
    written = train.plot_iterations(tmp_path / "run", length=5, chunk=2, batch=3, history=True)
    assert [p.name for p in written] == pictures("iterations", "residuals")
    assert "layer 2" in text_of(tmp_path / "run" / "iterations.svg")
    assert len(json.loads((tmp_path / "run" / "iterations.json").read_text())["layers"]) == 2
    train.plot_ways(tmp_path / "run", lengths=[3], batch=2)


def test_numbers_must_be_positive(runs: list[Path]) -> None:
    with pytest.raises(train.ConfigError, match="chunk: 0 is not positive"):
        train.iteration_map(runs[0], chunk=0)
    with pytest.raises(train.ConfigError, match="lengths: -1 is not positive"):
        train.compare_ways(runs[0], lengths=[4, -1])


# --- the command -----------------------------------------------------------------------------------------------


def call(*argv: Any) -> int:
    return cli.main([str(a) for a in argv])


def test_the_command_draws_each_kind(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("plot", *runs, "--out", tmp_path / "a", "--length", 3) == 0
    assert call("plot", "iterations", runs[0], "--out", tmp_path / "b", "--history", "--batch", 4) == 0
    assert call("plot", "iterations", runs[0], "--out", tmp_path / "c", "--length", 4, "--chunk", 2) == 0
    assert call("plot", "ways", runs[0], "--out", tmp_path / "d", "--lengths", 3) == 0
    names = [{p.name for p in (tmp_path / folder).iterdir()} for folder in "abcd"]
    assert names == [
        set(pictures("lengths", "seconds")),
        {*pictures("iterations", "residuals"), "iterations.json"},
        {*pictures("iterations"), "iterations.json"},
        {*pictures("ways"), "ways.json"},
    ]
    out, err = capsys.readouterr()
    assert out == ""
    assert "ways.png" in err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["iterations"], "argument RUN: plot iterations draws one run, not 0"),
        (["ways", "a", "b"], "argument RUN: plot ways draws one run, not 2"),
        (["a", "--chunk", "3"], "argument --chunk: is an option of plot iterations"),
        (["a", "--length", "3"], "argument --length: is an option of several runs and of plot iterations"),
        (["ways", "a", "--history"], "argument --history: is an option of plot iterations"),
        (["iterations", "a"], "run: a holds no run"),
        (["a", "b"], "run: a holds no run"),
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
    assert call("plot", *argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"fpnumba: error: {says}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_may_be_called_iterations(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "iterations").mkdir()
    for name in ("config.json", "metrics.jsonl", "evaluation.json"):
        (tmp_path / "iterations" / name).write_bytes((runs[0] / name).read_bytes())
    assert call("plot", "iterations") == 0
    assert (tmp_path / "iterations" / "accuracy.png").is_file()


def test_counts_of_curves_that_lie_together_share_a_label() -> None:
    from matplotlib.figure import Figure

    from fpnumba.train.pictures import draw_accuracy

    def network(kind: str, name: str, accuracies: list[float], **more: Any) -> dict[str, Any]:
        results = [
            {"length": n, "accuracy": a, "parallel": {}} for n, a in zip((4, 16), accuracies, strict=True)
        ]
        return {"kind": kind, "name": name, "results": results, **more}

    cuts = {2: [0.50, 0.14], 4: [0.55, 0.15], 8: [0.80, 0.25]}
    networks = [network("network", "fixed point", [1.0, 0.99])]
    networks += [network("cut", f"cut to {n} iterations", a, iterations=n) for n, a in cuts.items()]
    figure = Figure(layout="constrained")
    draw_accuracy(figure, {"task": "a5", "classes": 60, "trained_length": 16, "networks": networks})
    labels = {text.get_text(): text.xy for text in figure.axes[0].texts}
    assert labels == {"2, 4": (16, 0.15), "8": (16, 0.25)}
