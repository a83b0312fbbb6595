"""Training on a device makes the updates that the host makes."""

from typing import Any

import numpy as np
import pytest
from gpu_machine import GpuRoom as Room

from fpnumba import gpu, nn, tasks, train
from fpnumba.arrays import Room as Doors
from fpnumba.nn import backend
from fpnumba.train.build import build_optimizer, initial_params, training_models
from fpnumba.train.device import OnDevice
from fpnumba.train.loop import update


@pytest.fixture
def room(gpu_room: Room, monkeypatch: pytest.MonkeyPatch) -> Room:
    """The GPU room; in the stand-in there is a GPU, and it records nothing."""
    if gpu_room.name == "simt":

        def refuse(function: Any) -> Any:
            function()
            raise gpu.NotRecorded

        monkeypatch.setattr(backend, "on_host", lambda array: False)
        monkeypatch.setattr(backend, "room", lambda array: Doors("gpu"))
        monkeypatch.setattr(gpu, "absent", lambda: None)
        monkeypatch.setattr(gpu, "capture", refuse, raising=False)
    return gpu_room


LAYERS = {
    "FP-Mamba": {"kind": "FPMamba", "d_state": 4, "short_conv": 3},
    "one-step": {"kind": "FPMamba", "d_state": 4, "adjoint": {"method": "one-step"}},
    "Mamba": {"kind": "Mamba", "d_state": 4},
    "FPRNN": {"mixer": "householder", "rank": 2},
}


@pytest.mark.parametrize(("task", "layer"), [*(("s3", layer) for layer in LAYERS), ("copy", "FP-Mamba")])
def test_updates(room: Room, task: str, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"d_model": 6, "layer": LAYERS[layer]}
    config = train.Config(
        task=task, model=options, dtype="float64", device="gpu", batch=3, length=4, steps=9, clip=0.1
    )
    problem, optimizer = tasks.get(task), build_optimizer(config)
    params = initial_params(config, training_models(config)(0))
    state = optimizer.init(params)
    work = OnDevice(config, problem, optimizer, params, state, 0)
    lengths, batches = (4, 4, 5, 4, 4), []
    for length in lengths:
        work.advance(length)
        tokens, targets, _ = next(w for key, w in work._work.items() if key[0] == length)
        batches.append((room.get(tokens).copy(), room.get(targets).copy()))
    rows = work.rows()
    assert work.rows() == []
    assert len({b[0].tobytes() for b in batches}) == len(batches)
    monkeypatch.undo()
    model = training_models(config)(0)
    for row, (tokens, targets) in zip(rows, batches, strict=True):
        told, params, state = update(model, optimizer, params, state, tokens, targets)
        assert row["loss"] == pytest.approx(told["loss"], rel=1e-7)
        assert row["accuracy"] == told["accuracy"]
        assert ("iterations" in row) == ("iterations" in told)
    found, moments = work.fetched()
    for name, value in params.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-7, err_msg=name)
    assert moments.keys() == state.keys()
    assert moments["step"] == state["step"] == len(lengths)


def test_a_run_goes_on_bitwise(room: Room) -> None:
    options = {"d_model": 6, "layer": {"kind": "FPMamba", "d_state": 4}}
    config = train.Config(task="s3", model=options, device="gpu", batch=3, length=4, steps=9)
    problem, optimizer = tasks.get("s3"), build_optimizer(config)
    params = initial_params(config, training_models(config)(0))
    whole = OnDevice(config, problem, optimizer, params, optimizer.init(params), 0)
    for _ in range(5):
        whole.advance(4)
    part = OnDevice(config, problem, optimizer, params, optimizer.init(params), 0)
    for _ in range(2):
        part.advance(4)
    part = OnDevice(config, problem, optimizer, *part.fetched(), 2)
    for _ in range(3):
        part.advance(4)
    for one, other in zip(whole.fetched(), part.fetched(), strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.skipif(gpu.absent() is None, reason="there is a GPU")
def test_without_a_gpu() -> None:
    config = train.Config(task="s3", model={"d_model": 6}, device="gpu", steps=2)
    optimizer = build_optimizer(config)
    with pytest.raises(train.ConfigError, match="device: the GPU room needs"):
        OnDevice(config, tasks.get("s3"), optimizer, {}, nn.AdamW(0.1).init({}), 0)
