"""Checkpoints: all that a run needs to go on bitwise, in one safetensors file that is whole or not there."""

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.train.extras import need

FORMAT = "fpnumba-checkpoint"
VERSION = 1
Arrays = dict[str, NDArray[Any]]


class CheckpointError(ValueError):
    """A file that is no checkpoint of this format and version, or a damaged one. The message is one line."""


@dataclass(frozen=True)
class Checkpoint:
    """Parameters, optimiser state and where the run stood.

    Attributes
    ----------
    params, optimizer : dict of ndarray
        Flat, with dotted names.
    step : int
        Updates made.
    config : dict
        The run's configuration (:meth:`fpnumba.train.Config.to_dict`).
    rng : dict
        The state of the random streams: the seed and the step, from which all of them are derived.
    extra : dict
        JSON-able facts about the run, such as why it stopped.
    """

    params: Arrays
    optimizer: Arrays
    step: int
    config: dict[str, Any]
    rng: dict[str, Any]
    extra: dict[str, Any]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a power cut, sees the old one or the new one and nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    # The new name must survive a power cut too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint atomically; an older one of the same name is replaced only by a whole new one."""
    numpy_format = need("safetensors.numpy")
    tensors = _tensors(checkpoint)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "step": str(checkpoint.step),
        "config": json.dumps(checkpoint.config, sort_keys=True),
        "rng": json.dumps(checkpoint.rng, sort_keys=True),
        "extra": json.dumps(checkpoint.extra, sort_keys=True),
    }
    metadata["crc32"] = str(_checksum(tensors, metadata))
    write_atomically(path, numpy_format.save(tensors, metadata=metadata))


def load(path: Path) -> Checkpoint:
    """Read a checkpoint and verify it.

    Raises
    ------
    CheckpointError
        If the file is missing, of another program or version, truncated, or does not match its checksum.
    """
    safetensors = need("safetensors")
    if not path.is_file():
        raise CheckpointError(f"{path}: no checkpoint there")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            names = list(file.keys())
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path}: a safetensors file, but no checkpoint of fpnumba")
            if metadata.get("version") != str(VERSION):
                raise CheckpointError(
                    f"{path}: a checkpoint of version {metadata.get('version')}, this fpnumba reads {VERSION}"
                )
            tensors = {name: file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: damaged, or no safetensors file ({error})") from None
    try:
        checksum, step = int(metadata["crc32"]), int(metadata["step"])
        config, rng, extra = (json.loads(metadata[key]) for key in ("config", "rng", "extra"))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged, its metadata cannot be read ({error!r})") from None
    if _checksum(tensors, metadata) != checksum:
        raise CheckpointError(f"{path}: damaged, its contents do not match their checksum")
    parts: dict[str, Arrays] = {"params": {}, "optimizer": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    return Checkpoint(parts["params"], parts["optimizer"], step, config, rng, extra)


def check_matches(path: Path, found: Arrays, expected: Arrays, what: str) -> None:
    """Raise ``CheckpointError`` unless names, shapes and dtypes are those expected."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            problem = "missing" if name not in found else "not part of this model"
            raise CheckpointError(f"{path}: {what} {name} is {problem}")
        a, b = found[name], expected[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            raise CheckpointError(
                f"{path}: {what} {name} is {a.dtype} {a.shape}, its configuration says {b.dtype} {b.shape}"
            )


def _tensors(checkpoint: Checkpoint) -> Arrays:
    parts = {"params": checkpoint.params, "optimizer": checkpoint.optimizer}
    return {
        f"{part}/{name}": np.asarray(value, order="C")
        for part, arrays in parts.items()
        for name, value in arrays.items()
    }


def _checksum(tensors: Arrays, metadata: dict[str, str]) -> int:
    total = zlib.crc32(repr(sorted((k, v) for k, v in metadata.items() if k != "crc32")).encode())
    for name in sorted(tensors):
        value = tensors[name]
        total = zlib.crc32(f"{name} {value.dtype.str} {value.shape}".encode(), total)
        total = zlib.crc32(value.tobytes(), total)
    return total
