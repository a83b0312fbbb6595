"""Several runs beside each other: what differs by the seed alone is one series with its spread."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from fpnumba.train.config import Config
from fpnumba.train.drawing import (
    COLORS,
    GREY,
    MARKERS,
    Drawing,
    legend_below,
    length_axis,
    task_name,
    written,
)
from fpnumba.train.evaluation import chance_of, read_evaluation
from fpnumba.train.folder import Folder, RunError

# What leaves the trained network as it is.
_BESIDE = (
    "seed",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "eval_lengths",
    "eval_batch",
    "baseline",
)


@dataclass(frozen=True)
class Run:
    """One network of a run: its results by length, the accuracy of guessing, and the seconds that its training took."""

    config: Config
    name: str
    results: dict[int, dict[str, Any]]
    chance: float
    seconds: float | None


@dataclass(frozen=True)
class Series:
    """Runs of one configuration that differ by their seeds."""

    label: str
    runs: list[Run]
    color: str
    marker: str
    baseline: bool

    def spread(self, *keys: str) -> tuple[list[int], list[float], list[float], list[float]]:
        """Lengths, and the lowest, the median and the highest of a result at each."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            for length, result in run.results.items():
                value: Any = result
                for key in keys:
                    value = value.get(key) if isinstance(value, dict) else None
                if value is not None:
                    found.setdefault(length, []).append(float(value))
        lengths = sorted(found)
        of = [found[length] for length in lengths]
        return lengths, [min(v) for v in of], [median(v) for v in of], [max(v) for v in of]


def compare(
    runs: Sequence[Path | str], *, out: Path | str | None = None, length: int | None = None
) -> list[Path]:
    """Draw ``lengths`` and ``seconds`` of several runs, each as PNG and SVG.

    ``lengths`` shows accuracy and parallel iterations against length, ``seconds`` the accuracy at one longer length
    against the time of training.

    Parameters
    ----------
    runs : sequence of path
        Folders of runs that have been evaluated. Those whose configurations agree apart from the seed are one series,
        drawn by its median and its range; their baselines are another.
    out : path, optional
        Folder for the pictures; the one that holds the first run if left out.
    length : int, optional
        For ``seconds``; the longest one that all runs were judged at if left out.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    RunError
        If a folder holds no run or no evaluation, if one is given twice, or if runs were not judged at `length`.
    """
    folders = [Folder(run) for run in runs]
    for k, folder in enumerate(folders):
        if folder.path.resolve() in [other.path.resolve() for other in folders[:k]]:
            raise RunError(f"run: {folder.path} is given twice")
    found = gathered(folders)
    common = set.intersection(*(set(run.results) for one in found for run in one.runs))
    if length is None and not common:
        raise RunError("length: the runs were not judged at any common length; fpnumba evaluate does that")
    at = max(common) if length is None else length
    if at not in common:
        raise RunError(
            f"length: not all runs were judged at {at}; fpnumba evaluate RUN --lengths ... {at} does that"
        )
    drawings: list[Drawing] = [
        ("lengths", lambda figure: draw_lengths(figure, found), (10.8, 5.0 + 0.24 * len(found))),
        ("seconds", lambda figure: draw_seconds(figure, found, at), (7.0, 4.4 + 0.24 * len(found))),
    ]
    return written(folders[0].path.parent if out is None else Path(out), drawings)


def gathered(folders: Sequence[Folder]) -> list[Series]:
    """Series in the order in which they first appear, each followed by its baseline."""
    groups: dict[str, dict[str, list[Run]]] = {}
    options: dict[str, dict[str, Any]] = {}
    for folder in folders:
        config = folder.config()
        judgement = read_evaluation(folder)
        plain = {name: value for name, value in config.to_dict().items() if name not in _BESIDE}
        key = json.dumps(plain, sort_keys=True)
        options[key] = _flat(plain)
        kinds = groups.setdefault(key, {"network": [], "baseline": []})
        for kind, where in (("network", folder), ("baseline", folder.baseline)):
            for network in judgement["networks"]:
                if network["kind"] == kind:
                    results = {result["length"]: result for result in network["results"]}
                    kinds[kind].append(
                        Run(config, network["name"], results, chance_of(judgement), _seconds(where))
                    )
    labels = _labels(list(options.values()))
    if len(groups) == 1:
        name = next(iter(groups.values()))["network"][0].name
        labels = ["fixed-point RNN" if name == "fixed point" else name]
    series = []
    for k, (label, kinds) in enumerate(zip(labels, groups.values(), strict=True)):
        color, marker = COLORS[k % len(COLORS)], MARKERS[k % len(MARKERS)]
        series.append(Series(label, kinds["network"], color, marker, False))
        if kinds["baseline"]:
            alone = len(groups) == 1
            color = COLORS[1] if alone else color
            said = (
                "the same, trained with one iteration: a diagonal RNN" if alone else f"{label}, one iteration"
            )
            series.append(Series(said, kinds["baseline"], color, MARKERS[1] if alone else marker, True))
    return series


def _seconds(folder: Folder) -> float | None:
    times = [row["seconds"] for row in folder.metrics() if "seconds" in row]
    return float(times[-1]) if times else None


def _flat(options: dict[str, Any], before: str = "") -> dict[str, Any]:
    """``{"model.layer.rank": 2}`` of nested options."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return flat


def _labels(options: list[dict[str, Any]]) -> list[str]:
    """What sets each configuration apart from the others."""
    names = sorted({name for one in options for name in one})
    differ = [name for name in names if len({json.dumps(one.get(name)) for one in options}) > 1]
    short = {name: name.rpartition(".")[2] for name in differ}
    labels = []
    for one in options:
        said = [
            # A network and a task have names that speak for themselves.
            str(one[name]) if short[name] in ("kind", "task") else f"{short[name]} {one[name]}"
            for name in differ
            if one.get(name) is not None
        ]
        labels.append(", ".join(said) or "the rest as it is")
    return [label if len(label) <= 70 else f"{label[:67]}..." for label in labels]


def draw_lengths(figure: Any, found: list[Series]) -> None:
    """Token accuracy and, if there are any, parallel iterations against length, medians within their ranges."""
    iterate = [one for one in found if not one.baseline and one.spread("parallel", "iterations")[0]]
    panels = figure.subplots(1, 2 if iterate else 1, squeeze=False)[0]
    left = panels[0]
    tasks = {run.config.task for one in found for run in one.runs}
    left.set_title(f"{task_name(*tasks)}: token accuracy" if len(tasks) == 1 else "Token accuracy")
    for one in found:
        _band(left, one, "accuracy")
    _chance(left, found)
    left.set_ylim(0, 1.06)
    left.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    lengths = sorted({length for one in found for run in one.runs for length in run.results})
    if iterate:
        right = panels[1]
        right.set_title("Parallel iterations to the fixed point")
        for one in iterate:
            _band(right, one, "parallel", "iterations")
        dots = (0, (6, 2, 1, 2))
        right.plot(lengths, lengths, color=GREY, linewidth=1.2, linestyle=dots, label="one for every step")
        right.set_ylim(bottom=0)
    trained = {run.config.length for one in found for run in one.runs}
    for axes in panels:
        length_axis(axes, _thinned(lengths), max(trained) if len(trained) == 1 else None)
    # One legend for both, since what is compared may need long names
    named = {
        label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        named.values(), named.keys(), loc="outside lower left", fontsize=10, handlelength=2.4, ncols=1
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.06)


def draw_seconds(figure: Any, found: list[Series], length: int) -> None:
    """Accuracy at one length against the time of training, a point for every run."""
    axes = figure.subplots()
    axes.set_title(f"Token accuracy at length {length} against the time of training")
    times: list[float] = []
    for one in found:
        points = [(run.seconds, run.results[length]["accuracy"]) for run in one.runs if run.seconds]
        if not points:
            continue
        x, y = zip(*sorted(points), strict=True)
        times += x
        fill = "white" if one.baseline else one.color
        axes.plot(x, y, one.marker, color=one.color, markersize=8, markerfacecolor=fill, label=one.label)
    _chance(axes, found)
    axes.set_ylim(0, 1.06)
    if times and max(times) > 8 * min(times):
        axes.set_xscale("log")
    else:
        axes.set_xlim(0, 1.08 * max(times, default=1))
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("token accuracy")
    legend_below(axes)


def _band(axes: Any, one: Series, *keys: str) -> None:
    lengths, low, middle, high = one.spread(*keys)
    if not lengths:
        return
    label = one.label
    if len(one.runs) > 1:
        label += f" (median and range of {len(one.runs)} seeds)"
        axes.fill_between(lengths, low, high, color=one.color, alpha=0.18, linewidth=0, zorder=2)
    axes.plot(
        lengths,
        middle,
        color=one.color,
        marker=one.marker,
        markeredgecolor=one.color if one.baseline else "white",
        markerfacecolor="white" if one.baseline else one.color,
        linestyle=(0, (4, 2)) if one.baseline else "-",
        label=label,
        zorder=3,
    )


def _chance(axes: Any, found: list[Series]) -> None:
    chances = {run.chance for one in found for run in one.runs}
    if len(chances) == 1:
        axes.axhline(max(chances), color=GREY, linewidth=1.2, linestyle=(0, (2, 2)), label="guessing")


def _thinned(lengths: list[int]) -> list[int]:
    """Lengths whose ticks do not run into each other on a logarithmic axis; the first and the last among them."""
    kept = lengths[:1]
    for here, after in pairwise([*lengths[1:], 0]):
        if not after or (here >= 1.15 * kept[-1] and lengths[-1] >= 1.15 * here):
            kept.append(here)
    return kept
