"""From a configuration to the things it names: task, model, optimiser, random streams, a trained run."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from fpnumba import nn, tasks
from fpnumba.tasks import Task
from fpnumba.train import checkpoint as checkpoints
from fpnumba.train.checkpoint import Arrays, Checkpoint, CheckpointError
from fpnumba.train.config import Config, ConfigError
from fpnumba.train.folder import Folder

Stream = Literal["parameters", "data", "evaluation", "iterations"]
_STREAMS: dict[Stream, int] = {"parameters": 0, "data": 1, "evaluation": 2, "iterations": 3}


def stream(seed: int, name: Stream, index: int = 0) -> np.random.Generator:
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


def iterations_at(config: Config, step: int) -> int | None:
    """Most iterations of a solve in the update after so many; None where the solver's own option says it."""
    if not isinstance(config.iterations, dict):
        return config.iterations
    shape, scale = config.iterations["shape"], config.iterations["scale"]
    return max(1, round(stream(config.seed, "iterations", step).gamma(shape, scale)))


def training_models(config: Config) -> Callable[[int], nn.Model]:
    """The network as it is solved in the update after so many.

    It differs from :func:`build_model` in how its iteration ends: after the `iterations` of the configuration, and by
    the rules of training where the solver's criterion is the published one.

    Raises
    ------
    ConfigError
        As :func:`build_model`, and for `iterations` of a solver that does not iterate over time.
    """
    layer = config.model.get("layer", {})
    solver = layer.get("solver", {})
    if config.iterations is not None and solver.get("method", "auto") in ("direct", "sequential"):
        raise ConfigError(
            f"iterations: the solver goes step by step (method {solver['method']!r}), so there are none to limit"
        )
    if solver.get("criterion") == "published":
        config = config.replace(model={**config.model, "layer": {**layer, "train_mode": True}})

    @functools.lru_cache(maxsize=64)
    def build(most: int | None) -> nn.Model:
        if most is None:
            return build_model(config)
        options: dict[str, Any] = {"max_iter": most, "on_failure": "ignore"}
        if solver.get("chunk") is None and solver.get("method", "auto") == "auto":
            options["method"] = "parallel"  # however many are drawn
        return build_model(config, **options)

    build(None if config.iterations is None else 1)
    return lambda step: build(iterations_at(config, step))


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


def placed(config: Config, params: Arrays) -> Arrays:
    """The parameters where the run computes: on its GPU, if it has one and there is one here."""
    if config.device == "cpu":
        return params
    from fpnumba import gpu

    if gpu.absent() is not None:
        return params
    return {name: gpu.xp().asarray(value) for name, value in params.items()}


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
    ours, theirs = config.to_dict(), saved.config
    with contextlib.suppress(ConfigError):  # what an older version did not know has its default
        theirs = Config.from_dict(theirs).to_dict()
    if theirs != ours:
        differ = sorted(k for k in ours.keys() | theirs.keys() if theirs.get(k) != ours.get(k))
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
