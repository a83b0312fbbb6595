"""The folder of a run: where its files are, and the rule that nothing in it is overwritten by accident.

config.json                what the run is, and the versions that made it
metrics.jsonl              one line per logged step or evaluation, flushed as it is written
checkpoint.safetensors     the newest state, replaced atomically
checkpoint-*.safetensors   its shards, where it is larger than one file may be
evaluation.json            a judgement of the trained network; a second one is evaluation-2.json, and so on
accuracy.png, loss.png     pictures, and their .svg twins; iterations.png, residuals.png and ways.png where asked for
iterations.json, ways.json the numbers of the pictures of these names
baseline/                  the same network held to one iteration: a run of its own
"""

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fpnumba.train.checkpoint import write_atomically
from fpnumba.train.config import Config

FORMAT = "fpnumba-run"
VERSION = 1


class RunError(ValueError):
    """A folder that holds no run, or already holds one. The message is one line and names the argument."""


class Folder:
    """Paths and small files of a run."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def config_file(self) -> Path:
        """What the run is."""
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        """What happened, a JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoint_file(self) -> Path:
        """The newest state."""
        return self.path / "checkpoint.safetensors"

    @property
    def baseline(self) -> "Folder":
        """The same network held to one iteration."""
        return Folder(self.path / "baseline")

    def holds_run(self) -> bool:
        """Whether there is a run here."""
        return self.config_file.is_file()

    def refuse_occupied(self) -> None:
        """Raise `RunError` if there is anything here."""
        if self.holds_run():
            raise RunError(
                f"out: {self.path} already holds a run; continue it with --resume {self.path} "
                "or choose another --out"
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunError(f"out: {self.path} exists and is no empty folder; choose another --out")

    def create(self, config: Config) -> None:
        """Make the folder and write the configuration; refuse any folder with something in it."""
        self.refuse_occupied()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"out: {self.path} cannot be made ({error.strerror})") from None
        record = {"format": FORMAT, "version": VERSION, "config": config.to_dict(), "made_with": versions()}
        write_atomically(self.config_file, (json.dumps(record, indent=2) + "\n").encode())

    def config(self) -> Config:
        """The configuration of the run here."""
        if not self.holds_run():
            raise RunError(f"run: {self.path} holds no run (there is no config.json in it)")
        try:
            record = json.loads(self.config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"run: {self.config_file} cannot be read ({error})") from None
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise RunError(f"run: {self.config_file} is no configuration of an fpnumba run")
        if record.get("version") != VERSION:
            raise RunError(
                f"run: {self.config_file} is of version {record.get('version')}, "
                f"and this fpnumba reads version {VERSION}"
            )
        try:
            return Config.from_dict(record["config"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"run: {self.config_file}: {error}") from None

    def metrics(self) -> list[dict[str, Any]]:
        """All rows logged so far."""
        return list(_rows(self.metrics_file)) if self.metrics_file.is_file() else []

    def forget_metrics_after(self, step: int) -> None:
        """Drop rows beyond the checkpoint that a run continues from: it is about to write them again."""
        rows = self.metrics()
        kept = [row for row in rows if row["step"] <= step]
        if self.metrics_file.is_file():
            write_atomically(self.metrics_file, "".join(json.dumps(r) + "\n" for r in kept).encode())

    def fresh(self, stem: str, suffix: str) -> Path:
        """``stem.suffix``, or ``stem-2.suffix`` and so on: the first name not taken."""
        path, k = self.path / f"{stem}{suffix}", 1
        while path.exists():
            k += 1
            path = self.path / f"{stem}-{k}{suffix}"
        return path

    def newest_evaluation(self) -> Path | None:
        """The last evaluation written here."""
        numbered = {1: self.path / "evaluation.json"}
        for path in self.path.glob("evaluation-*.json"):
            number = path.stem.partition("-")[2]
            if number.isdigit():
                numbered[int(number)] = path
        newest = numbered[max(numbered)]
        return newest if newest.is_file() else None


def versions() -> dict[str, str | None]:
    """Versions of everything that decides the numbers of a run."""
    found: dict[str, str | None] = {}
    for name in ("fpnumba", "numpy", "numba"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                # A power cut tears at most the last line; whatever follows a torn line was not ours.
                return
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row
