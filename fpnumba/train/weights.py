"""Weights of the published implementation: read, checked, and kept as a checkpoint that this library loads again."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fpnumba import nn
from fpnumba.nn.official import Official
from fpnumba.train import checkpoint as checkpoints
from fpnumba.train.checkpoint import Arrays, Checkpoint, CheckpointError
from fpnumba.train.extras import need
from fpnumba.train.folder import RunError

WEIGHTS = "weights.safetensors"


class WeightsError(ValueError):
    """Weights that are not those of a published layer, or not usable. The message is one line and names the file."""


@dataclass(frozen=True)
class Imported:
    """What was brought over.

    Attributes
    ----------
    path : Path
        The new checkpoint.
    layer : FPRNN or FPMamba
    params : dict of ndarray
    iterations : int
        That the check's forward pass took, by the published rule.
    """

    path: Path
    layer: Official
    params: Arrays
    iterations: int


def import_weights(file: Path | str, out: Path | str, *, config: Path | str | None = None) -> Imported:
    """Bring over a safetensors file of the published FPRNN or FPMamba.

    Every number must be finite, and so must be the output of one forward pass over noise.

    Parameters
    ----------
    file : path
        The state dict.
    out : path
        The folder to write into; it is made, and may not hold weights yet.
    config : path, optional
        JSON of the form that :func:`fpnumba.nn.from_official` takes. Without, it is looked for in the metadata of
        `file`, under "config".

    Returns
    -------
    Imported

    Raises
    ------
    WeightsError
        If the file, the configuration, or the two together are not what they should be.
    RunError
        If there are weights in `out` already.
    """
    source, target = Path(file), Path(out) / WEIGHTS
    if target.exists():
        raise RunError(f"{target} exists, and nothing is overwritten")
    state, metadata = _read(source)
    meta = _config(source, metadata, None if config is None else Path(config))
    broken = [name for name, value in state.items() if not np.isfinite(value).all()]
    if broken:
        raise WeightsError(f"{source}: not finite: {', '.join(sorted(broken))}")
    layer, params = _converted(source, meta, state)
    iterations = _tried(source, layer, params)
    target.parent.mkdir(parents=True, exist_ok=True)
    # the state as it came, so that what is no parameter here (the base of a fixed mixer) is kept as well
    checkpoints.save(target, Checkpoint(state, {}, 0, meta, {}, {"imported from": source.name}))
    return Imported(target, layer, params, iterations)


def load_weights(folder: Path | str) -> tuple[Official, Arrays]:
    """The layer and the parameters that :func:`import_weights` wrote.

    Parameters
    ----------
    folder : path

    Returns
    -------
    layer : FPRNN or FPMamba
    params : dict of ndarray

    Raises
    ------
    CheckpointError
        If there are none, or they are damaged.
    """
    path = Path(folder) / WEIGHTS
    saved = checkpoints.load(path)
    try:
        return nn.from_official(saved.config, saved.params)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read(path: Path) -> tuple[Arrays, dict[str, str]]:
    safetensors = need("safetensors")
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    state: Arrays = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            for name in opened.keys():  # noqa: SIM118  (it is no dict)
                try:
                    value = opened.get_tensor(name)
                except (TypeError, AttributeError) as error:
                    # what NumPy has no name for, such as bfloat16
                    raise WeightsError(f"{path}: {name} cannot be read by NumPy ({error})") from None
                # torch.compile wraps a module and so puts a word into the names below it
                state[name.replace("_orig_mod.", "")] = value
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: damaged, or no safetensors file ({error})") from None
    return state, metadata


def _config(source: Path, metadata: dict[str, str], path: Path | None) -> dict[str, Any]:
    if path is not None:
        try:
            where, text = str(path), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise WeightsError(f"{path}: not JSON") from None
    elif "config" in metadata:
        where, text = f"{source}, metadata 'config'", metadata["config"]
    else:
        raise WeightsError(
            f"{source}: has no 'config' in its metadata; give its configuration as a JSON file"
        )
    try:
        meta = json.loads(text)
    except ValueError as error:
        raise WeightsError(f"{where}: not JSON ({error})") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("config", {}), dict):
        raise WeightsError(f"{where}: should be an object with 'cls', 'd_model' and 'config'")
    return meta


def _converted(source: Path, meta: dict[str, Any], state: Arrays) -> tuple[Official, Arrays]:
    try:
        return nn.from_official(meta, state)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{source}: {error}") from None


def _tried(source: Path, layer: Official, params: Arrays) -> int:
    """Iterations of one forward pass over noise, whose output must be finite."""
    dtype = next(iter(params.values())).dtype
    x = np.random.default_rng(0).standard_normal((2, 8, layer.d_model)).astype(dtype)
    record: list[Any] = []
    y = layer(params, x, record=record)
    if not np.isfinite(y).all():
        raise WeightsError(f"{source}: all numbers are finite, but the output of a forward pass is not")
    return int(record[0].iterations.max())
