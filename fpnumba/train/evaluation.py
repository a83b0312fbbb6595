"""Judging a trained network: token accuracy and iterations at several lengths, beside its baseline."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fpnumba import nn, tasks
from fpnumba.arrays import namespace, to_numpy
from fpnumba.tasks import Task
from fpnumba.train.build import build_model, load_run, placed, stream, with_solver
from fpnumba.train.checkpoint import Arrays, write_atomically
from fpnumba.train.config import Config, ConfigError
from fpnumba.train.folder import Folder, RunError, versions

FORMAT = "fpnumba-evaluation"
VERSION = 1
CUTS = (1, 2, 4, 8)
# Where parallel iterations are counted: how exactly, and over how many sequences.
COUNT_RTOL, COUNT_BATCH = 1e-4, 64
# Options of a solver that let every sequence go its own way, whatever the network was trained with.
PLAIN: dict[str, Any] = {"chunk": None, "criterion": "max", "quantile": None, "on_failure": "ignore"}
# Tokens that pass through the network at a time.
_TOKENS = 16384


def summary_of(record: Sequence[Any]) -> dict[str, Any]:
    """Iterations and failures of the fixed-point layers of one pass, over layers and sequences."""
    if not record:
        return {}
    iterations = np.concatenate([np.ravel(np.asarray(solution.iterations)) for solution in record])
    converged = np.concatenate([np.ravel(np.asarray(solution.converged)) for solution in record])
    if not iterations.size:
        return {}
    return {
        "iterations": float(iterations.mean()),
        "iterations_max": int(iterations.max()),
        "unconverged": float(1 - converged.mean()),
    }


def _beside(tokens: Any, params: Arrays) -> Any:
    """The tokens where the parameters lie."""
    return namespace(next(iter(params.values()), tokens)).asarray(tokens)


def judge(
    model: nn.Model, params: Arrays, task: Task, config: Config, length: int, batch: int | None = None
) -> dict[str, Any]:
    """Score a network on held-out sequences of one length; the same sequences for the same seed and length.

    Returns
    -------
    dict
        ``length``, ``accuracy`` over all tokens that are scored (NaN if none is), ``scaled_accuracy`` (0 for guessing,
        1 for all right), ``last_accuracy`` over the last scored token of each sequence, ``loss``, and of the
        fixed-point layers ``iterations`` (mean), ``iterations_max`` and ``unconverged`` (share of sequences).
    """
    batch = config.eval_batch if batch is None else batch
    tokens, targets = task.held_out.sample(stream(config.seed, "evaluation", length), batch, length)
    record: list[Any] = []
    size = max(1, _TOKENS // tokens.shape[1])
    there = _beside(tokens, params)
    parts = [model(params, there[start : start + size], record=record) for start in range(0, batch, size)]
    logits = np.concatenate([to_numpy(part) for part in parts])
    accuracy = float(nn.accuracy(logits, targets))
    scored = targets != tasks.UNSCORED
    last = np.where(scored, np.arange(targets.shape[1]), -1).max(axis=1)
    whole, last = last >= 0, np.maximum(last, 0)
    every = np.arange(batch)
    last_targets = np.where(whole, targets[every, last], tasks.UNSCORED)
    return {
        "length": length,
        "accuracy": accuracy,
        "scaled_accuracy": tasks.scaled_accuracy(accuracy, task.chance),
        "last_accuracy": float(nn.accuracy(logits[every, last], last_targets)),
        "loss": float(nn.cross_entropy(logits, targets)),
        **summary_of(record),
    }


def evaluate(
    run: Path | str,
    *,
    lengths: Sequence[int] | None = None,
    cuts: Sequence[int] = CUTS,
    batch: int | None = None,
) -> dict[str, Any]:
    """Judge a run and its baseline, and write the judgement beside them.

    Parameters
    ----------
    run : path
        Folder of the run.
    lengths : sequence of int, optional
        The configuration's ``eval_lengths`` if left out.
    cuts : sequence of int
        The trained network is also judged with its iteration cut off after so many steps.
    batch : int, optional
        Sequences at each length; the configuration's ``eval_batch`` if left out.

    Returns
    -------
    dict
        What is written to ``evaluation.json`` (or ``evaluation-2.json`` and so on): ``networks`` is a list of
        ``{name, kind, iterations, results}`` with one result per length (see :func:`judge`; of a network with a fixed
        point also :func:`count`). A network without one is judged alone.

    Raises
    ------
    RunError, CheckpointError
        If the folder holds no run, or one that cannot be read.
    ConfigError
        If a length, a cut or the batch is not positive.
    """
    for name, values in (
        ("lengths", lengths or ()),
        ("iterations", cuts),
        ("batch", () if batch is None else (batch,)),
    ):
        for value in values:
            if value < 1:
                raise ConfigError(f"{name}: {value} is not positive")
    folder = Folder(run)
    config, task, model, saved = load_run(folder)
    lengths = sorted(set(config.eval_lengths if lengths is None else lengths))

    def judged(
        name: str, kind: str, network: nn.Model, params: Arrays, cut: int | None = None
    ) -> dict[str, Any]:
        results = [judge(network, params, task, config, length, batch) for length in lengths]
        return {"name": name, "kind": kind, "iterations": cut, "results": results}

    name, params = (
        "fixed point" if model.iterates else str(model.layer_options["kind"]),
        placed(config, saved.params),
    )
    networks = [judged(name, "network", model, params)]
    for result in networks[0]["results"]:
        at = result["length"]
        result["parallel"] = count(config, params, task, at) if model.iterates else {}
    if folder.baseline.holds_run():
        _, _, held, theirs = load_run(folder.baseline)
        networks.append(judged("held to one iteration", "baseline", held, placed(config, theirs.params), 1))
    for cut in sorted(set(cuts)) if model.iterates else ():
        name = f"cut to {cut} iteration{'s' if cut > 1 else ''}"
        networks.append(judged(name, "cut", build_model(config, **truncated(cut)), params, cut))
    judgement = {
        "format": FORMAT,
        "version": VERSION,
        "task": config.task,
        "seed": config.seed,
        "step": saved.step,
        "trained_length": config.length,
        "batch": config.eval_batch if batch is None else batch,
        "classes": task.vocab_out,
        "chance": task.chance,
        "made_with": versions(),
        "networks": networks,
    }
    data = (json.dumps(judgement, indent=2) + "\n").encode()
    write_atomically(folder.fresh("evaluation", ".json"), data)
    return judgement


def read_evaluation(folder: Folder) -> dict[str, Any]:
    """The newest judgement of a run.

    Raises
    ------
    RunError
        If there is none, or one that cannot be read.
    """
    newest = folder.newest_evaluation()
    if newest is None:
        raise RunError(f"run: {folder.path} has not been evaluated; fpnumba evaluate {folder.path} does that")
    try:
        judgement = json.loads(newest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"run: {newest} cannot be read ({error})") from None
    if not isinstance(judgement, dict) or judgement.get("format") != FORMAT:
        raise RunError(f"run: {newest} is no evaluation of an fpnumba run")
    return judgement


def count(config: Config, params: Arrays, task: Task, length: int) -> dict[str, Any]:
    """How many parallel iterations, over all steps at once, the fixed point takes at one length.

    Whatever way the network was solved in training: the count is what moves a layer from diagonal (one iteration) to
    dense (all that it takes).
    """
    solver = {**PLAIN, "method": "parallel", "rtol": COUNT_RTOL, "max_iter": 16 * length}
    record: list[Any] = []
    model = build_model(config, **solver)
    tokens, _ = task.held_out.sample(stream(config.seed, "evaluation", length), COUNT_BATCH, length)
    model(params, _beside(tokens, params), record=record)
    return {"rtol": COUNT_RTOL, "batch": COUNT_BATCH, **summary_of(record)}


def truncated(iterations: int) -> dict[str, Any]:
    """Options of a solver that stops after so many parallel iterations: part of the model, not a failure."""
    return {**PLAIN, "method": "parallel", "max_iter": iterations}


def baseline_of(config: Config) -> Config:
    """The same network, trained in the same way, held to one iteration: a diagonal RNN.

    Its gradient is exact as well: one application of the iteration, differentiated.

    Raises
    ------
    ConfigError
        If the network has no iteration.
    """
    if not build_model(config).iterates:
        kind = config.model["layer"]["kind"]
        raise ConfigError(f"baseline: a layer of kind {kind!r} has no iteration to hold to one")
    layer = with_solver(config.model.get("layer", {}), truncated(1))
    layer["adjoint"] = {"method": "one-step"}
    model = {**config.model, "layer": layer}
    return config.replace(model=model, iterations=None, baseline=False, target_accuracy=None)


def _counted(parallel: dict[str, Any]) -> str:
    """The mean count, marked where some sequences did not get there."""
    if "iterations" not in parallel:
        return "-"
    return f"{'>' if parallel['unconverged'] else ''}{parallel['iterations']:.1f}"


def table(judgement: dict[str, Any]) -> str:
    """The judgement as an aligned text table."""
    networks = judgement["networks"]
    lengths = [result["length"] for result in networks[0]["results"]]
    title = "token accuracy at length"
    first = max(len(title), *(len(network["name"]) + 2 for network in networks)) + 1

    def row(name: str, cells: list[str]) -> str:
        return name.ljust(first) + "".join(cell.rjust(8) for cell in cells)

    lines = [
        f"{judgement['task']}: trained for {judgement['step']} steps at length {judgement['trained_length']},"
        f" judged on {judgement['batch']} new sequences of each length",
        "",
        row(title, [str(length) for length in lengths]),
    ]
    for network in networks:
        results = network["results"]
        indent = "  " if network["kind"] == "cut" else ""
        lines.append(row(indent + network["name"], [f"{result['accuracy']:.3f}" for result in results]))
        if network["kind"] == "network":
            for label, key in (
                ("its last token alone", "last_accuracy"),
                ("scaled past guessing", "scaled_accuracy"),
            ):
                if all(key in result for result in results):
                    lines.append(row(f"  {label}", [f"{result[key]:.3f}" for result in results]))
            if any(result["parallel"] for result in results):
                lines.append(
                    row("  parallel iterations", [_counted(result["parallel"]) for result in results])
                )
    lines.append(row("guessing", [f"{chance_of(judgement):.3f}"] * len(lengths)))
    return "\n".join(lines)


def chance_of(judgement: dict[str, Any]) -> float:
    """The accuracy of guessing; judgements of earlier versions do not say it."""
    return float(judgement.get("chance", 1 / judgement["classes"]))
