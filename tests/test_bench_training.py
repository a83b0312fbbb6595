"""The record of trained networks: its commands are those of its configurations, and what is shown is drawn from it."""

import importlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from fpnumba import cli

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "bench" / "results" / "training.json"
RUNS = json.loads(RECORD.read_text(encoding="utf-8"))["runs"]
# What says how a run is looked at on the way.
BESIDE = {"log_every", "eval_every", "checkpoint_every", "checkpoint_minutes", "eval_lengths", "eval_batch"}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``bench.training``, which is run from the root of the repository and not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    yield importlib.import_module("bench.training")
    for name in [name for name in sys.modules if name.partition(".")[0] == "bench"]:
        del sys.modules[name]


@pytest.mark.parametrize("run", RUNS, ids=[f"{n} {run['name']}" for n, run in enumerate(RUNS)])
def test_a_command_makes_the_configuration_beside_it(run: dict[str, Any]) -> None:
    program, *arguments = shlex.split(run["command"])
    assert program == "fpnumba"
    config = cli._configured(cli._parser().parse_args(arguments)).to_dict()
    assert {k: v for k, v in config.items() if k not in BESIDE} == {
        k: v for k, v in run["config"].items() if k not in BESIDE
    }


def test_table_and_figure(module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(module, "IMAGES", tmp_path)
    module.main(["--draw"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len({run["name"] for run in RUNS})
    assert {path.name for path in tmp_path.iterdir()} == {"gradients.png", "gradients.svg"}
