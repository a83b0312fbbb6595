"""How a trained network is solved: iterations over batch and time, and whether the ways to its fixed point agree."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fpnumba import nn
from fpnumba.train.build import build_model, load_run, stream
from fpnumba.train.checkpoint import write_atomically
from fpnumba.train.config import ConfigError
from fpnumba.train.drawing import (
    COLORS,
    GREY,
    MARKERS,
    NETWORK,
    SHADES,
    Drawing,
    legend_below,
    length_axis,
    written,
)
from fpnumba.train.evaluation import COUNT_BATCH, COUNT_RTOL, PLAIN
from fpnumba.train.folder import Folder, RunError

WAYS = ("sequential", "chunked", "parallel")
# What only the parallel way can honour.
_OFF: dict[str, Any] = {**PLAIN, "acceleration": None, "damping_decay": 1.0}


def _positive(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name}: {value} is not positive")


def _refuse_plain(run: Path | str, model: nn.Model) -> None:
    if not model.iterates:
        raise RunError(f"run: {run} is of a network without a fixed point")


def iteration_map(
    run: Path | str,
    *,
    length: int | None = None,
    chunk: int | None = None,
    batch: int = 32,
    history: bool = False,
) -> dict[str, Any]:
    """Iterations of every chunk of every sequence, solved the chunked way.

    Parameters
    ----------
    run : path
        Folder of the run.
    length : int, optional
        Of the sequences; the longest of the configuration's ``eval_lengths`` if left out.
    chunk : int, optional
        Steps of a chunk; a sixteenth of the length, rounded up, if left out.
    batch : int
        Sequences.
    history : bool
        Solve the parallel way as well, and keep the residual after each of its iterations.

    Returns
    -------
    dict
        ``length``, ``steps``, ``chunk``, ``rtol``, and ``layers``: a list of ``{iterations, residuals}``, the first
        ``batch`` rows of a number for each chunk, the second (or None) a row of ``batch`` numbers for each iteration.

    Raises
    ------
    RunError, CheckpointError
        If the folder holds no run, one that cannot be read, or a network without fixed points.
    ConfigError
        If a number is not positive, or the network cannot be solved so.
    """
    _positive(length=length, chunk=chunk, batch=batch)
    config, task, model, saved = load_run(Folder(run))
    _refuse_plain(run, model)
    length = max(config.eval_lengths) if length is None else length
    tokens, _ = task.held_out.sample(stream(config.seed, "evaluation", length), batch, length)
    steps = tokens.shape[1]  # what a task counts as length may be another number
    chunk = -(-steps // 16) if chunk is None else chunk
    common = {**_OFF, "rtol": COUNT_RTOL, "max_iter": 16 * steps}

    def solved(**way: Any) -> list[Any]:
        record: list[Any] = []
        build_model(config, **{**common, **way})(saved.params, tokens, record=record)
        return record

    chunked = solved(method="chunked", chunk=chunk)
    whole = solved(method="parallel") if history else [None] * len(chunked)
    layers = [
        {
            "iterations": np.asarray(a.chunk_iterations).tolist(),
            "residuals": None if b is None or b.history is None else np.asarray(b.history).tolist(),
        }
        for a, b in zip(chunked, whole, strict=True)
    ]
    return {"length": length, "steps": steps, "chunk": chunk, "rtol": COUNT_RTOL, "layers": layers}


def compare_ways(
    run: Path | str, *, lengths: Sequence[int] | None = None, batch: int = COUNT_BATCH
) -> dict[str, Any]:
    """The fixed points that the ways of a solver find for one trained network; a chunk is an eighth of the length.

    Parameters
    ----------
    run : path
        Folder of the run.
    lengths : sequence of int, optional
        The configuration's ``eval_lengths`` if left out.
    batch : int
        Sequences at each length.

    Returns
    -------
    dict
        ``batch``, ``dtype``, ``trained_length``, and ``ways``: a list of ``{way, results}`` with, for each length,
        ``accuracy``, ``difference`` (the largest of any logit from that of the sequential way), ``changed`` (share of
        scored tokens whose prediction is another one) and ``unconverged`` (share of sequences).

    Raises
    ------
    RunError, CheckpointError
        If the folder holds no run, or one that cannot be read.
    ConfigError
        If a number is not positive, or the network cannot be solved so.
    """
    _positive(batch=batch, **{"lengths": min(lengths)} if lengths else {})
    config, task, model, saved = load_run(Folder(run))
    _refuse_plain(run, model)
    lengths = sorted(set(config.eval_lengths if lengths is None else lengths))
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for length in lengths:
        tokens, targets = task.held_out.sample(stream(config.seed, "evaluation", length), batch, length)
        reference: Any = None
        for way in WAYS:
            record: list[Any] = []
            steps = tokens.shape[1]
            chunk = {"chunk": -(-steps // 8)} if way == "chunked" else {}
            options = {**_OFF, **chunk, "method": way, "max_iter": max(1000, 16 * steps)}
            model = build_model(config, **options)
            logits = model(saved.params, tokens, record=record)
            reference = logits if reference is None else reference
            best = logits.argmax(-1)[targets >= 0]
            converged = [np.ravel(np.asarray(solution.converged)) for solution in record]
            results[way].append(
                {
                    "length": length,
                    "accuracy": float(nn.accuracy(logits, targets)),
                    "difference": float(np.abs(logits - reference).max()),
                    "changed": float((best != reference.argmax(-1)[targets >= 0]).sum() / max(best.size, 1)),
                    "unconverged": float(1 - np.concatenate(converged).mean()) if converged else 0.0,
                }
            )
    return {
        "batch": batch,
        "dtype": config.dtype,
        "trained_length": config.length,
        "ways": [{"way": way, "results": results[way]} for way in WAYS],
    }


def plot_iterations(run: Path | str, *, out: Path | str | None = None, **options: Any) -> list[Path]:
    """Draw ``iterations`` and, with ``history=True``, ``residuals``; the numbers go to ``iterations.json``.

    Parameters
    ----------
    run : path
        Folder of the run.
    out : path, optional
        Folder for the pictures; the run itself if left out.
    **options
        Of :func:`iteration_map`, which also says what is raised.

    Returns
    -------
    list of Path
        The pictures.
    """
    found = iteration_map(run, **options)
    layers = found["layers"]
    drawings: list[Drawing] = [
        ("iterations", lambda figure: draw_iterations(figure, found), (8.0, 0.6 + 4.2 * len(layers)))
    ]
    if options.get("history"):
        drawings.append(
            ("residuals", lambda figure: draw_residuals(figure, found), (7.0, 0.6 + 3.8 * len(layers)))
        )
    return _with_numbers(Path(run if out is None else out), "iterations", found, drawings)


def plot_ways(run: Path | str, *, out: Path | str | None = None, **options: Any) -> list[Path]:
    """Draw ``ways``, and write its numbers to ``ways.json``.

    Parameters
    ----------
    run : path
        Folder of the run.
    out : path, optional
        Folder for the pictures; the run itself if left out.
    **options
        Of :func:`compare_ways`, which also says what is raised.

    Returns
    -------
    list of Path
        The pictures.
    """
    found = compare_ways(run, **options)
    drawings: list[Drawing] = [("ways", lambda figure: draw_ways(figure, found), (10.8, 5.2))]
    return _with_numbers(Path(run if out is None else out), "ways", found, drawings)


def _with_numbers(target: Path, name: str, found: dict[str, Any], drawings: Sequence[Drawing]) -> list[Path]:
    paths = written(target, drawings)
    write_atomically(target / f"{name}.json", (json.dumps(found) + "\n").encode())
    return paths


def draw_iterations(figure: Any, found: dict[str, Any]) -> None:
    """A panel for each layer: sequences upwards, time to the right, iterations in shades."""
    layers, steps, chunk = found["layers"], found["steps"], found["chunk"]
    panels = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
    for k, (axes, layer) in enumerate(zip(panels, layers, strict=True)):
        counts = np.array(layer["iterations"])
        batch, chunks = counts.shape
        which = f", layer {k + 1}" if len(layers) > 1 else ""
        axes.set_title(f"Iterations of each chunk of {chunk} step{'s' if chunk > 1 else ''}{which}")
        # The last chunk may be shorter than the others.
        edges = np.minimum(np.arange(chunks + 1) * chunk, steps)
        mesh = axes.pcolormesh(edges, np.arange(batch + 1), counts, cmap=SHADES, vmin=0)
        axes.grid(False)
        axes.set_xlabel("step of the sequence")
        axes.set_ylabel("sequence")
        bar = figure.colorbar(mesh, ax=axes, pad=0.02)
        bar.set_label(f"iterations to a relative change of {found['rtol']:g}")
        bar.outline.set_visible(False)


def draw_residuals(figure: Any, found: dict[str, Any]) -> None:
    """A panel for each layer: the residual of every sequence, solved the parallel way, and their median."""
    layers = found["layers"]
    panels = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
    for k, (axes, layer) in enumerate(zip(panels, layers, strict=True)):
        residuals = np.array(layer["residuals"])
        residuals = np.where(residuals > 0, residuals, np.nan)  # no place on a logarithmic axis
        resting = np.zeros(residuals.shape, bool)
        resting[1:] = residuals[1:] == residuals[:-1]
        at = np.arange(1, len(residuals) + 1)
        which = f", layer {k + 1}" if len(layers) > 1 else ""
        axes.set_title(f"Residual after each parallel iteration, length {found['length']}{which}")
        for b, one in enumerate(np.where(resting, np.nan, residuals).T):
            axes.plot(at, one, color=GREY, linewidth=0.7, alpha=0.7, label="a sequence" if b == 0 else None)
        axes.plot(at, np.nanmedian(residuals, axis=1), color=NETWORK, label="their median")
        axes.axhline(found["rtol"], color=COLORS[1], linewidth=1.2, linestyle=(0, (4, 2)), label="tolerance")
        axes.set_yscale("log")
        axes.set_xlim(1, max(2, len(residuals)))
        axes.set_xlabel("iteration")
        axes.set_ylabel("largest change / largest value")
        axes.legend(loc="best", fontsize=10)


def draw_ways(figure: Any, found: dict[str, Any]) -> None:
    """Two panels: accuracy by way, and how far the logits are from those of the sequential way."""
    left, right = figure.subplots(1, 2)
    left.set_title("Token accuracy, by the way to the fixed point")
    right.set_title("Largest difference of a logit from the sequential way")
    lengths = [result["length"] for result in found["ways"][0]["results"]]
    # Curves that lie on each other stay visible: wide and pale below, narrow and dashed above.
    looks: list[dict[str, Any]] = [
        {"linewidth": 7, "alpha": 0.35, "markersize": 10},
        {"linewidth": 2.4},
        {"linestyle": (0, (2, 2)), "linewidth": 2},
    ]
    rounding = float(np.finfo(found["dtype"]).eps)
    for k, (one, look) in enumerate(zip(found["ways"], looks, strict=True)):
        results, color, marker = one["results"], COLORS[k], MARKERS[k]
        label = {
            "sequential": "step after step",
            "chunked": "chunk after chunk",
            "parallel": "all steps at once",
        }
        said = label[one["way"]]
        left.plot(lengths, [r["accuracy"] for r in results], color=color, marker=marker, label=said, **look)
        if k:
            differences = [max(r["difference"], rounding) for r in results]
            changed = max(r["changed"] for r in results)
            said += (
                f" ({f'up to {changed:.2%} of predictions change' if changed else 'no prediction changes'})"
            )
            right.plot(lengths, differences, color=color, marker=marker, label=said, **look)
    right.axhline(
        rounding, color=GREY, linewidth=1.2, linestyle=(0, (2, 2)), label=f"rounding of {found['dtype']}"
    )
    right.set_yscale("log")
    left.set_ylim(0, 1.06)
    for axes in (left, right):
        length_axis(axes, lengths, found["trained_length"])
        legend_below(axes)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.06)
