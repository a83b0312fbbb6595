"""What a training run is: one frozen record, checked when it is made, written to the run as JSON."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fpnumba import tasks

# What a preset says, the command line may say again. The model's part goes to fpnumba.nn.Model.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": {"d_model": 16, "layer": {"mixer": "householder"}},
        "steps": 60,
        "batch": 32,
        "length": 8,
        "learning_rate": 3e-3,
        "log_every": 5,
        "eval_every": 20,
        "checkpoint_every": 20,
        "eval_lengths": [4, 8, 16],
        "eval_batch": 64,
    },
    # Word problems of groups that no diagonal network tracks, in minutes on two cores, in seconds on a GPU. What does
    # not converge on the way is told in the metrics.
    "cpu": {
        "model": {
            "d_model": 128,
            "layer": {
                "kind": "FPMamba",
                "d_state": 16,
                "mixer": "householder",
                "solver": {"rtol": 1e-4, "on_failure": "ignore"},
                "adjoint": {"rtol": 1e-4, "on_failure": "ignore"},
            },
        },
        "steps": 4400,
        "batch": 64,
        "curriculum": [[0, 3], [2400, 5], [2700, 8], [3000, 12], [3400, 16]],
        "learning_rate": 3e-3,
        "warmup": 100,
        "schedule": "cosine",
        "eval_every": 500,
        "checkpoint_every": 500,
        "eval_lengths": [4, 8, 16, 32, 64, 128],
    },
    "gpu": {
        "model": {
            "d_model": 256,
            "layer": {"kind": "FPMamba", "d_state": 16, "mixer": "householder"},
        },
        "device": "gpu",
        "precision": "tf32",
        "steps": 6000,
        "batch": 512,
        "curriculum": [[0, 3], [2000, 5], [2400, 8], [2700, 16]],
        "learning_rate": 1e-3,
        "warmup": 200,
        "schedule": "cosine",
        "log_every": 50,
        "eval_every": 500,
        "checkpoint_every": 1000,
        "eval_lengths": [16, 32, 64, 128, 256],
    },
}


class ConfigError(ValueError):
    """An option that does not exist, or a value that it cannot have. The message is one line and names it."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration of a run; together with the library's version it determines every number.

    Parameters
    ----------
    task : str
        A name for :func:`fpnumba.tasks.get`.
    model : dict
        Options of :class:`fpnumba.nn.Model` apart from the vocabularies, which the task decides.
    seed : int
        Of parameters, training data and evaluation data; each draws from a stream of its own.
    dtype : {"float32", "float64"}
        Of parameters and activations.
    device : {"cpu", "gpu"}
        Where to train. Numbers drawn, and so the run, differ between the two.
    precision : {"float32", "tf32", "bfloat16"}
        In which a GPU multiplies matrices (``fpnumba.gpu.use_precision``). A CPU knows float32 alone.
    steps, batch, length : int
        Updates, sequences per update, and steps per sequence, or what the task counts as its length.
    curriculum : sequence of (step, length)
        From that step on, sequences of that length; before the first entry and without any, `length`.
    iterations : int, dict or None
        Most iterations of a solve in training, instead of the solver's ``max_iter``. A dict draws them anew for every
        update: ``{"draw": "gamma", "shape": 4, "scale": 1}`` as in arXiv 2503.10799, rounded, at least one. To be
        stopped there is no failure. Evaluation iterates as the solver says.
    learning_rate, weight_decay, clip : float
        Of AdamW; `clip` bounds the global norm of the gradient, 0 turns it off.
    schedule : {"constant", "cosine"}
        What follows `warmup` steps of linear warm-up; cosine falls to a hundredth at `steps`.
    log_every, eval_every, checkpoint_every : int
        Steps between rows of ``metrics.jsonl``, evaluations during training, and checkpoints.
    checkpoint_minutes : float
        A checkpoint is also written after that much time; 0 turns it off.
    eval_lengths : sequence of int
        Lengths at which the trained network is judged.
    eval_batch : int
        Sequences in each evaluation.
    target_accuracy : float or None
        Training stops once an evaluation at `length` reaches it.
    baseline : bool
        Whether the same network held to one iteration is trained as well.

    Raises
    ------
    ConfigError
        If an option is unknown, of the wrong kind or out of range; the message names it.

    Examples
    --------
    >>> from fpnumba import train
    >>> train.Config(task="s3", model={}, steps=100).batch
    128
    """

    task: str
    model: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    precision: str = "float32"
    steps: int = 1000
    batch: int = 128
    length: int = 16
    curriculum: tuple[tuple[int, int], ...] = ()
    iterations: int | dict[str, Any] | None = None
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 0.01
    clip: float = 1.0
    log_every: int = 10
    eval_every: int = 100
    checkpoint_every: int = 100
    checkpoint_minutes: float = 10.0
    eval_lengths: tuple[int, ...] = (16, 32, 64)
    eval_batch: int = 256
    target_accuracy: float | None = None
    baseline: bool = False

    def __post_init__(self) -> None:
        # "S3" and "s3" are the same run, wherever it goes on: paths are whole ones.
        object.__setattr__(self, "task", _checked_task(self.task))
        _check_kinds(self)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not value >= least:
                raise ConfigError(f"{name}: {value} is below {least}")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate: {self.learning_rate} is not positive")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is none of {', '.join(choices)}")
        if not self.eval_lengths or min(self.eval_lengths) < 1:
            raise ConfigError(
                f"eval_lengths: {list(self.eval_lengths)} should be one or more positive lengths"
            )
        if self.target_accuracy is not None and not 0 < self.target_accuracy <= 1:
            raise ConfigError(f"target_accuracy: {self.target_accuracy} is not in (0, 1]")
        starts = [start for start, _ in self.curriculum]
        if starts != sorted(set(starts)) or any(s < 0 or n < 1 for s, n in self.curriculum):
            raise ConfigError(
                f"curriculum: {[list(pair) for pair in self.curriculum]} should be [step, length] pairs with "
                "steps rising from 0 and positive lengths"
            )
        if isinstance(self.iterations, dict):
            object.__setattr__(self, "iterations", _checked_draw(self.iterations))
        elif self.iterations is not None and self.iterations < 1:
            raise ConfigError(f"iterations: {self.iterations} is below 1")

    def length_at(self, step: int) -> int:
        """The length of the sequences of that step."""
        length = self.length
        for start, wanted in self.curriculum:
            if step >= start:
                length = wanted
        return length

    def replace(self, **changes: Any) -> "Config":
        """A copy with some options changed, checked again; unknown names raise `ConfigError`."""
        for name in changes:
            if name not in _FIELDS:
                raise _unknown_option(name)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, and the inverse of :meth:`from_dict`."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "Config":
        """From what :meth:`to_dict` gave; unknown names raise `ConfigError`."""
        for name in options:
            if name not in _FIELDS:
                raise _unknown_option(name)
        if "task" not in options:
            raise ConfigError("task: missing from the configuration")
        thawed = dict(options)
        try:
            if "eval_lengths" in thawed:
                thawed["eval_lengths"] = tuple(thawed["eval_lengths"])
            if "curriculum" in thawed:
                thawed["curriculum"] = tuple((int(s), int(n)) for s, n in thawed["curriculum"])
        except (TypeError, ValueError):
            raise ConfigError("eval_lengths, curriculum: expected a list of lengths and of pairs") from None
        return cls(**thawed)


_FIELDS = {f.name: f for f in dataclasses.fields(Config)}
_CHOICES = {
    "device": ("cpu", "gpu"),
    "dtype": ("float32", "float64"),
    "precision": ("float32", "tf32", "bfloat16"),
    "schedule": ("constant", "cosine"),
}
_LEAST = {
    "seed": 0,
    "steps": 1,
    "batch": 1,
    "length": 1,
    "warmup": 0,
    "weight_decay": 0,
    "clip": 0,
    "log_every": 1,
    "eval_every": 1,
    "checkpoint_every": 1,
    "checkpoint_minutes": 0,
    "eval_batch": 1,
}


def _unknown_option(name: str) -> ConfigError:
    near = difflib.get_close_matches(name, _FIELDS, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(_FIELDS)}"
    return ConfigError(f"{name}: no such option of a run{hint}")


def _checked_task(name: object) -> str:
    if not isinstance(name, str):
        raise ConfigError(f"task: {name!r} is no name")
    try:
        return tasks.get(name).name
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _checked_draw(draw: Mapping[str, Any]) -> dict[str, Any]:
    """A distribution of iterations, all of it said; those of the paper where nothing is."""
    said = {"draw": "gamma", "shape": 4.0, "scale": 1.0, **draw}
    numbers = [said["shape"], said["scale"]]
    positive = all(isinstance(n, int | float) and not isinstance(n, bool) and 0 < n < 1e6 for n in numbers)
    if said["draw"] != "gamma" or len(said) != 3 or not positive:
        raise ConfigError(
            f'iterations: {dict(draw)} should be a number or {{"draw": "gamma", "shape": 4, "scale": 1}}, both positive'
        )
    return said


def _check_kinds(config: Config) -> None:
    """Plain kinds only: a word where a number belongs should say so before anything is trained."""
    hints = typing.get_type_hints(Config)
    for name in _FIELDS:
        value, hint = getattr(config, name), hints[name]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        allowed = tuple(typing.get_origin(kind) or kind for kind in kinds)
        if float in allowed and isinstance(value, int) and not isinstance(value, bool):
            continue
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            wanted = " or ".join(kind.__name__ for kind in allowed)
            raise ConfigError(f"{name}: {value!r} is not of kind {wanted}")


def preset(name: str, task: str) -> Config:
    """The configuration of that preset for that task.

    Parameters
    ----------
    name : str
        A key of ``PRESETS``.
    task : str
        A name for :func:`fpnumba.tasks.get`.

    Raises
    ------
    ConfigError
        If there is no such preset or task.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"preset: unknown preset {name!r}{hint} (there are {', '.join(sorted(PRESETS))})")
    return Config.from_dict({"task": task, **PRESETS[name]})
