"""From a configuration to the things it names: task, model, optimiser, random streams, a trained run."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from fpnumba import nn, tasks
from fpnumba.tasks import Task
from fpnumba.train import checkpoint as checkpoints
from fpnumba.train.checkpoint import Arrays, Checkpoint, CheckpointError
from fpnumba.train.config import Config, ConfigError
from fpnumba.train.folder import Folder

_STREAMS = {"parameters": 0, "data": 1, "evaluation": 2}


def stream(
    seed: int, name: Literal["parameters", "data", "evaluation"], index: int = 0
) -> np.random.Generator:
    """The random numbers of one purpose and one step; independent of all others, and in need of no state."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAMS[name], index)))


def build_model(config: Config, **solver: Any) -> nn.Model:
    """The network of a configuration, some options of its solver changed.

    Raises
    ------
    ConfigError
        If the model knows no such option, or refuses its value.
    """
    task = tasks.get(config.task)
    options = {"vocab": task.vocab, "vocab_out": task.vocab_out, **config.model}
    if solver:
        options["layer"] = with_solver(options.get("layer", {}), solver)
    try:
        return nn.Model.from_config(options)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"model: {error}") from None


def with_solver(layer: Mapping[str, Any], solver: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a layer, some of its solver's changed."""
    return {**layer, "solver": {**layer.get("solver", {}), **solver}}


def build_optimizer(config: Config) -> nn.AdamW:
    """AdamW with the schedule of a configuration."""
    rate: Any
    if config.schedule == "constant":
        rate = nn.schedules.warmup_constant(config.learning_rate, warmup=config.warmup)
    else:
        floor = config.learning_rate / 100
        rate = nn.schedules.warmup_cosine(
            config.learning_rate,
            warmup=config.warmup,
            total=max(config.steps, config.warmup + 1),
            floor=floor,
        )
    return nn.AdamW(rate, weight_decay=config.weight_decay, clip=config.clip or None)


def initial_params(config: Config, model: nn.Model) -> Arrays:
    """The parameters before the first step."""
    params: Arrays = model.init(stream(config.seed, "parameters"), dtype=np.dtype(config.dtype))
    return params


def load_checkpoint(
    folder: Folder, config: Config, params: Arrays, state: Arrays | None = None
) -> Checkpoint:
    """The checkpoint of a run, once it is sure that it belongs to this configuration.

    Parameters
    ----------
    folder : Folder
    config : Config
    params, state : dict of ndarray
        What the configuration makes before the first step: names, shapes and dtypes have to agree.

    Raises
    ------
    CheckpointError
    """
    path = folder.checkpoint_file
    saved = checkpoints.load(path)
    ours = config.to_dict()
    if saved.config != ours:
        differ = sorted(k for k in ours.keys() | saved.config.keys() if saved.config.get(k) != ours.get(k))
        raise CheckpointError(
            f"{path}: of another configuration than config.json ({', '.join(differ)} differ)"
        )
    checkpoints.check_matches(path, saved.params, params, "parameter")
    if state is not None:
        checkpoints.check_matches(path, saved.optimizer, state, "optimiser state")
    return saved


def load_run(folder: Folder) -> tuple[Config, Task, nn.Model, Checkpoint]:
    """Configuration, task, model and verified checkpoint of a run."""
    config = folder.config()
    model = build_model(config)
    return (
        config,
        tasks.get(config.task),
        model,
        load_checkpoint(folder, config, initial_params(config, model)),
    )
