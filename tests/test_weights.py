"""`fpnumba import-weights`: published state dicts become checkpoints, or one line says why not."""

import json
from pathlib import Path

import numpy as np
import pytest

from fpnumba import nn, train
from fpnumba.cli import main

safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is an extra")
GOLDEN = sorted((Path(__file__).parent / "golden").glob("fp*.npz"))
BASE = "mixer.q_proj.parametrizations.weight.0.base"


def published(path: Path):
    data = np.load(path, allow_pickle=False)
    state = {name[6:]: data[name] for name in data.files if name.startswith("param.")}
    return json.loads(bytes(data["meta"])), state, data


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["import-weights", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("inside", [False, True])
def test_round_trip(path, inside, tmp_path, capsys) -> None:
    meta, state, data = published(path)
    file, out = tmp_path / "state.safetensors", tmp_path / "new" / "layer"
    arguments: list = [file, "--out", out]
    if inside:
        file.write_bytes(safetensors.save(state, metadata={"config": json.dumps(meta)}))
    else:
        compiled = {f"_orig_mod.{name}": value for name, value in state.items()}
        file.write_bytes(safetensors.save(compiled))
        config = tmp_path / "config.json"
        config.write_text(json.dumps(meta))
        arguments += ["--config", config]
    code, said, complaints = run(capsys, *arguments)
    assert (code, complaints) == (0, "")
    assert f"{meta['cls']}, d_model {meta['d_model']}" in said
    layer, params = train.load_weights(out)
    np.testing.assert_allclose(layer(params, data["in.x"]), data["out.y"], rtol=0, atol=1e-9)
    code, _, complaints = run(capsys, *arguments)
    assert code == 2
    assert "nothing is overwritten" in complaints


def test_the_base_of_a_fixed_mixer_is_kept(tmp_path, capsys) -> None:
    rng = np.random.default_rng(0)
    options = {"mixer_type": "nonselective"}
    state = nn.FPRNN(4, **nn.official.layer_options(options)).init(rng, np.float64)
    state[BASE] = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    meta = {"cls": "FPRNN", "d_model": 4, "config": options}
    file = tmp_path / "state.safetensors"
    file.write_bytes(safetensors.save(state, metadata={"config": json.dumps(meta)}))
    assert run(capsys, file, "--out", tmp_path / "layer")[0] == 0
    layer, params = train.load_weights(tmp_path / "layer")
    first, theirs = nn.from_official(meta, state)
    x = rng.standard_normal((1, 3, 4))
    np.testing.assert_array_equal(layer(params, x), first(theirs, x))


def _rename(meta, state):
    state["mixer.u_projection"] = state.pop("D")


def _nan(meta, state):
    state["D"] = np.full_like(state["D"], np.nan)


def _huge(meta, state):
    for name in ("in_proj.weight", "out_proj.weight"):
        state[name] = np.full_like(state[name], 1e300)


def _shape(meta, state):
    state["D"] = state["D"][:-1]


def _half(meta, state):
    state["D"] = state["D"].astype(np.float16)


def _class(meta, state):
    meta["cls"] = "LSTM"


def _width(meta, state):
    del meta["d_model"]


def _mixer(meta, state):
    meta["config"]["mixer_type"] = "circulant"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_rename, "state lacks D"),
        (_nan, "not finite: D"),
        (_huge, "the output of a forward pass is not"),
        (_shape, "D has shape"),
        (_half, "float16"),
        (_class, "'LSTM'"),
        (_width, "'d_model'"),
        (_mixer, "'circulant'"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_wrong_is_said_in_one_line(spoil, message, tmp_path, capsys) -> None:
    meta, state, _ = published(next(path for path in GOLDEN if "fpmamba_householder_r1_iter8" in path.stem))
    spoil(meta, state)
    file = tmp_path / "state.safetensors"
    file.write_bytes(safetensors.save(state, metadata={"config": json.dumps(meta)}))
    code, said, complaints = run(capsys, file, "--out", tmp_path / "layer")
    assert (code, said) == (2, "")
    assert message in complaints
    assert str(file) in complaints
    assert len(complaints.splitlines()) == 1
    assert not (tmp_path / "layer").exists()


def test_files_that_are_not_what_they_should_be(tmp_path, capsys) -> None:
    _, state, _ = published(GOLDEN[0])
    bare, text = tmp_path / "bare.safetensors", tmp_path / "text.json"
    bare.write_bytes(safetensors.save(state))
    text.write_text("no JSON")
    out = tmp_path / "layer"
    for arguments, message in (
        ((tmp_path / "nothing", "--out", out), "no such file"),
        ((text, "--out", out), "no safetensors file"),
        ((bare, "--out", out), "no 'config' in its metadata"),
        ((bare, "--config", text, "--out", out), "not JSON"),
        ((bare, "--config", tmp_path / "nothing.json", "--out", out), "No such file"),
    ):
        code, _, complaints = run(capsys, *arguments)
        assert code == 2
        assert message in complaints
        assert len(complaints.splitlines()) == 1
    with pytest.raises(train.CheckpointError, match="no checkpoint there"):
        train.load_weights(out)
