"""How long training iterates: fixed, drawn for every update, or until enough of the batch has converged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="training needs the train extra")
pytest.importorskip("tqdm", reason="training needs the train extra")

from test_train import assert_same_run, tiny

from fpnumba import train
from fpnumba.train.build import iterations_at, training_models

GAMMA = {"draw": "gamma", "shape": 4, "scale": 1}
PUBLISHED = {
    "d_model": 6,
    "layer": {
        "mixer": "householder",
        "alpha_max": 1.0,
        "solver": {"criterion": "published", "quantile": 0.75, "rtol": 0.1},
        "adjoint": {"method": "one-step"},
        "n_backwards": 1,
    },
}


def trained(config: train.Config, path: Path) -> list[dict[str, Any]]:
    train.run(config, path, quiet=True)
    return [row for row in train.Folder(path).metrics() if row["kind"] == "train"]


def test_draws_follow_the_distribution_and_the_seed() -> None:
    config = tiny(iterations=GAMMA)
    draws = np.array([iterations_at(config, step) for step in range(2000)])
    assert draws.min() >= 1
    assert abs(draws.mean() - 4) < 0.15
    assert abs(draws.std() - 2) < 0.15
    assert draws.tolist() == [iterations_at(config, step) for step in range(2000)]
    other = tiny(iterations=GAMMA, seed=1)
    assert draws[:50].tolist() != [iterations_at(other, step) for step in range(50)]
    assert iterations_at(tiny(iterations=7), 3) == 7
    assert iterations_at(tiny(), 3) is None


def test_what_a_draw_leaves_out_is_the_papers() -> None:
    config = tiny(iterations={"draw": "gamma"})
    assert config.iterations == {"draw": "gamma", "shape": 4.0, "scale": 1.0}
    assert train.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("iterations", "says"),
    [
        (0, "iterations: 0 is below 1"),
        (2.5, "iterations: 2.5 is not of kind int or dict or NoneType"),
        ({"draw": "normal"}, "should be a number or"),
        ({"draw": "gamma", "shape": 0}, "both positive"),
        ({"draw": "gamma", "shape": float("nan")}, "both positive"),
        ({"draw": "gamma", "rate": 1}, "should be a number or"),
    ],
)
def test_bad_iterations_are_named(iterations: Any, says: str) -> None:
    with pytest.raises(train.ConfigError) as caught:
        tiny(iterations=iterations)
    assert says in str(caught.value)


def test_iterations_of_a_solver_that_has_none_are_refused(tmp_path: Path) -> None:
    model = {"d_model": 6, "layer": {"mixer": "householder", "solver": {"method": "sequential"}}}
    with pytest.raises(train.ConfigError, match="iterations: the solver goes step by step"):
        train.run(tiny(model=model, iterations=3), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_training_stops_where_it_is_told_to(tmp_path: Path) -> None:
    fixed = trained(tiny(steps=4, iterations=2), tmp_path / "fixed")
    assert [row["iterations_max"] for row in fixed] == [2, 2, 2, 2]
    config = tiny(steps=6, iterations={"draw": "gamma", "shape": 2, "scale": 1})
    drawn = trained(config, tmp_path / "drawn")
    limits = [iterations_at(config, step) for step in range(6)]
    assert len(set(limits)) > 1
    assert all(row["iterations_max"] <= limit for row, limit in zip(drawn, limits, strict=True))
    assert drawn[int(np.argmin(limits))]["iterations_max"] == min(limits)


def test_resuming_draws_the_same_iterations(tmp_path: Path) -> None:
    config = tiny(iterations=GAMMA)
    train.run(config, tmp_path / "whole", quiet=True)
    for k in range(12):
        train.run(config, tmp_path / "parts", resume=k > 0, minutes=1e-9, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_batch_stops_when_enough_of_it_has_converged(tmp_path: Path) -> None:
    solver = {"method": "parallel", "rtol": 1e-3, "on_failure": "ignore"}
    layer = {"mixer": "householder", "alpha_max": 1.0}
    shares = {}
    for quantile in (None, 0.25):
        model = {"d_model": 6, "layer": {**layer, "solver": {**solver, "quantile": quantile}}}
        rows = trained(tiny(steps=1, batch=16, model=model), tmp_path / str(quantile))
        shares[quantile] = (rows[0]["unconverged"], rows[0]["iterations_max"])
    assert shares[None][0] == 0
    assert 0 < shares[0.25][0] <= 0.75
    assert shares[0.25][1] < shares[None][1]


def test_the_published_rule_is_that_of_training_in_training_alone(tmp_path: Path) -> None:
    config = tiny(model=PUBLISHED, batch=16, iterations=GAMMA, eval_lengths=[3], curriculum=[[0, 2], [2, 5]])
    assert training_models(config)(0).layer_options["train_mode"] is True
    assert "train_mode" not in train.build_model(config).layer_options
    rows = trained(config, tmp_path / "run")
    assert [row["length"] for row in rows[:3]] == [2, 2, 5]
    assert any(row["unconverged"] > 0 for row in rows)
    judged = train.evaluate(tmp_path / "run", cuts=[1, 2])
    results = {n["name"]: n["results"][0] for n in judged["networks"]}
    assert results["fixed point"]["unconverged"] == 0
    assert results["cut to 1 iteration"]["iterations_max"] == 1
    assert results["cut to 2 iterations"]["iterations_max"] == 2
    assert train.baseline_of(config).iterations is None


def test_a_chunked_network_is_judged_like_any_other(tmp_path: Path) -> None:
    layer = {"mixer": "householder", "alpha_max": 1.0, "solver": {"method": "chunked", "chunk": 2}}
    train.run(tiny(steps=1, model={"d_model": 6, "layer": layer}), tmp_path / "run", quiet=True)
    judged = train.evaluate(tmp_path / "run", cuts=[1])
    assert judged["networks"][0]["results"][0]["parallel"]["iterations"] >= 1


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_a_cpu_has_no_other_precision(precision: str, tmp_path: Path) -> None:
    config = tiny(precision=precision)
    assert train.Config.from_dict(config.to_dict()).precision == precision
    with pytest.raises(train.ConfigError, match=f"precision: '{precision}' is of a GPU"):
        train.run(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(train.ConfigError, match="precision: 'float8' is none of float32, tf32, bfloat16"):
        tiny(precision="float8")
