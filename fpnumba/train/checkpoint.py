"""Checkpoints: all that a run needs to go on bitwise, in safetensors files of at most 16 MB, whole or not there.

A small one is one file. A larger one is that file without tensors, which lists the shards that hold them:

    checkpoint.safetensors                      the index, written last
    checkpoint-STEP-CHECKSUM-K.safetensors      shard K

Shards of another checkpoint are removed only once the index no longer lists them, so that at every moment the file
``checkpoint.safetensors`` stands for one whole checkpoint.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpnumba.train.extras import need

FORMAT = "fpnumba-checkpoint"
# Of one file, and of an index with shards.
VERSION, SHARDED = 1, 2
FILE_BYTES = 16_000_000
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
    """Write the checkpoint atomically; an older one of the same name is replaced only by a whole new one.

    No file is larger than `FILE_BYTES`.
    """
    tensors = _tensors(checkpoint)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "step": str(checkpoint.step),
        "config": json.dumps(checkpoint.config, sort_keys=True),
        "rng": json.dumps(checkpoint.rng, sort_keys=True),
        "extra": json.dumps(checkpoint.extra, sort_keys=True),
    }
    shards = list(_shards(tensors))
    if len(shards) > 1:
        metadata["version"] = str(SHARDED)
        shapes = {name: [value.dtype.str, list(value.shape)] for name, value in tensors.items()}
        metadata["tensors"] = json.dumps(shapes, sort_keys=True)
    checksum = _checksum(tensors, metadata)
    names = []
    if len(shards) > 1:
        # The checksum in its name keeps a shard apart from those of any other checkpoint of this step.
        names = [
            f"{path.stem}-{checkpoint.step}-{checksum:08x}-{k}{path.suffix}"
            for k in range(1, len(shards) + 1)
        ]
        for name, shard in zip(names, shards, strict=True):
            write_atomically(path.with_name(name), _packed(shard, {"format": f"{FORMAT}-shard"}))
        metadata["shards"], tensors = json.dumps(names), {}
    write_atomically(path, _packed(tensors, {**metadata, "crc32": str(checksum)}))
    _sweep(path, keep=names)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint and verify it.

    Raises
    ------
    CheckpointError
        If a file is missing, of another program or version, truncated, or does not match the checksum.
    """
    while True:
        metadata, tensors = _opened(path, FORMAT)
        if metadata.get("version") not in (str(VERSION), str(SHARDED)):
            raise CheckpointError(
                f"{path}: a checkpoint of version {metadata.get('version')}, this fpnumba reads {VERSION} and {SHARDED}"
            )
        try:
            checksum, step = int(metadata["crc32"]), int(metadata["step"])
            config, rng, extra = (json.loads(metadata[key]) for key in ("config", "rng", "extra"))
            names = [str(name) for name in json.loads(metadata.get("shards", "[]"))]
            shapes = json.loads(metadata.get("tensors", "{}"))
            if names:
                tensors = _joined(path, names, shapes)
            break
        except CheckpointError:
            # Written anew in the meantime, the older shards gone?
            if _opened(path, FORMAT)[0] == metadata:
                raise
        except (KeyError, ValueError, TypeError, AttributeError) as error:
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


def _shards(tensors: Arrays) -> Iterator[Arrays]:
    """Tensors in the order of their names, in groups that each fit into a file; a larger one in flat pieces."""
    # What the header of a file takes: something at its head, and something for every tensor.
    head, each = 65536, 256
    group: Arrays = {}
    room = FILE_BYTES - head
    for name in sorted(tensors):
        value = tensors[name]
        most = max(1, (FILE_BYTES - head - each - len(name)) // value.itemsize)
        pieces = {name: value}
        if value.size > most:
            flat = value.reshape(-1)
            pieces = {
                f"{name}#{k}": flat[start : start + most]
                for k, start in enumerate(range(0, value.size, most))
            }
        for piece, part in pieces.items():
            cost = part.nbytes + each + len(piece)
            if cost > room and group:
                yield group
                group, room = {}, FILE_BYTES - head
            group[piece] = part
            room -= cost
    yield group


def _joined(path: Path, names: list[str], shapes: dict[str, Any]) -> Arrays:
    """The tensors of an index, from all of its shards."""
    pieces: Arrays = {}
    for name in names:
        pieces |= _opened(path.with_name(Path(name).name), f"{FORMAT}-shard")[1]
    tensors: Arrays = {}
    for name, (dtype, shape) in shapes.items():
        if name in pieces:
            tensors[name] = pieces[name]
            continue
        cut = sorted(
            (int(rest), piece) for piece in pieces for own, _, rest in [piece.rpartition("#")] if own == name
        )
        whole = np.concatenate([pieces[piece] for _, piece in cut]) if cut else np.empty(0)
        if whole.dtype.str != dtype or whole.size != math.prod(shape):
            raise CheckpointError(f"{path}: damaged, its shards do not hold all of {name}")
        tensors[name] = whole.reshape(shape)
    return tensors


def _sweep(path: Path, keep: list[str]) -> None:
    """Remove shards that the checkpoint does not list, and what killed processes left half-written."""
    shard = re.compile(re.escape(path.stem) + r"-\d+-[0-9a-f]{8}-\d+" + re.escape(path.suffix))
    for other in path.parent.iterdir():
        name = other.name.removeprefix(".").partition(path.suffix)[0] + path.suffix
        ours = shard.fullmatch(name) or name == path.name
        left = ours and re.fullmatch(r"\..*\.\d+\.tmp", other.name)
        if left or (shard.fullmatch(other.name) and other.name not in keep):
            other.unlink(missing_ok=True)


def _packed(tensors: Arrays, metadata: dict[str, str]) -> bytes:
    data: bytes = need("safetensors.numpy").save(tensors, metadata=metadata)
    return data


def _opened(path: Path, kind: str) -> tuple[dict[str, str], Arrays]:
    """Metadata and tensors of one file of that format."""
    safetensors = need("safetensors")
    if not path.is_file():
        raise CheckpointError(f"{path}: no checkpoint there")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") != kind:
                raise CheckpointError(f"{path}: a safetensors file, but no checkpoint of fpnumba")
            return metadata, {name: file.get_tensor(name) for name in list(file.keys())}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: damaged, or no safetensors file ({error})") from None


def _checksum(tensors: Arrays, metadata: dict[str, str]) -> int:
    """Over all numbers, names and metadata; where the numbers lie is left out."""
    listed = sorted((k, v) for k, v in metadata.items() if k not in ("crc32", "shards"))
    total = zlib.crc32(repr(listed).encode())
    for name in sorted(tensors):
        value = tensors[name]
        total = zlib.crc32(f"{name} {value.dtype.str} {value.shape}".encode(), total)
        total = zlib.crc32(value.tobytes(), total)
    return total
