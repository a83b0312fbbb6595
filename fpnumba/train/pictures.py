"""Pictures of a run: accuracy and iterations against length, and how the loss fell."""

from pathlib import Path
from typing import Any

from fpnumba.train.drawing import (
    BASELINE,
    CUT,
    GREY,
    NETWORK,
    Drawing,
    legend_below,
    length_axis,
    series,
    task_name,
    written,
)
from fpnumba.train.evaluation import chance_of, read_evaluation
from fpnumba.train.folder import Folder


def plot(run: Path | str, *, out: Path | str | None = None) -> list[Path]:
    """Draw ``accuracy`` and ``loss``, each as PNG and SVG.

    Parameters
    ----------
    run : path
        Folder of a run that has been evaluated.
    out : path, optional
        Folder for the pictures; the run itself if left out. Pictures of an earlier call are drawn anew.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    RunError
        If the folder holds no run, or no evaluation.
    """
    folder = Folder(run)
    folder.config()
    judgement = read_evaluation(folder)
    drawings: list[Drawing] = [
        ("accuracy", lambda figure: draw_accuracy(figure, judgement), (10.8, 5.4)),
        ("loss", lambda figure: draw_loss(figure, folder), (7.0, 4.2)),
    ]
    return written(folder.path if out is None else Path(out), drawings)


def draw_accuracy(figure: Any, judgement: dict[str, Any]) -> None:
    """Two panels: token accuracy against length, and parallel iterations against length if there are any."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for network in judgement["networks"]:
        by_kind.setdefault(network["kind"], []).append(network)
    (network,) = by_kind["network"]
    lengths = [result["length"] for result in network["results"]]
    counted = [result["parallel"] for result in network["results"]]
    panels = figure.subplots(1, 2 if any(counted) else 1, squeeze=False)[0]
    left, trained = panels[0], judgement["trained_length"]

    label = "fixed-point RNN" if network["name"] == "fixed point" else network["name"]
    left.set_title(f"{task_name(judgement['task'])}: token accuracy")
    series(left, lengths, [r["accuracy"] for r in network["results"]], NETWORK, "o", label)
    for baseline in by_kind.get("baseline", []):
        accuracies = [r["accuracy"] for r in baseline["results"]]
        series(
            left, lengths, accuracies, BASELINE, "s", "the same, trained with one iteration: a diagonal RNN"
        )
    _cuts(left, [cut for cut in by_kind.get("cut", []) if cut["iterations"] > 1], trained)
    left.axhline(chance_of(judgement), color=GREY, linewidth=1.2, linestyle=(0, (2, 2)), label="guessing")
    left.set_ylim(0, 1.06)
    left.set_yticks([0, 0.25, 0.5, 0.75, 1.0])

    if len(panels) > 1:
        _draw_iterations(panels[1], lengths, counted)

    for axes in panels:
        length_axis(axes, lengths, trained)
        legend_below(axes)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.06)


def _draw_iterations(axes: Any, lengths: list[int], counted: list[dict[str, Any]]) -> None:
    """Parallel iterations against length."""
    axes.set_title("Parallel iterations to the fixed point")
    if all("iterations" in one for one in counted):
        mean, most = ([one[key] for one in counted] for key in ("iterations", "iterations_max"))
        series(axes, lengths, mean, NETWORK, "o", "mean over sequences")
        series(axes, lengths, most, NETWORK, "^", "most of any sequence", dashed=True)
    axes.plot(lengths, lengths, color=GREY, linewidth=1.2, linestyle=(0, (2, 2)), label="one for every step")
    axes.set_ylim(bottom=0)


def _cuts(axes: Any, cuts: list[dict[str, Any]], trained: int) -> None:
    """The trained network with its iteration cut short: thin lines, each with its count on it, or with those of all
    that lie too close for their own."""
    named: list[tuple[tuple[int, float], list[str]]] = []
    for k, cut in enumerate(cuts):
        results = cut["results"]
        lengths, accuracies = [r["length"] for r in results], [r["accuracy"] for r in results]
        told = ", ".join(str(one["iterations"]) for one in cuts)
        label = f"the fixed-point RNN cut to {told} iterations" if k == 0 else None
        axes.plot(lengths, accuracies, color=CUT, linewidth=1.4, zorder=2, label=label)
        at = min(range(len(lengths)), key=lambda i: abs(lengths[i] - trained))
        place = lengths[at], accuracies[at]
        together = named.pop()[1] if named and abs(place[1] - named[-1][0][1]) < 0.05 else []
        named.append((place, [*together, str(cut["iterations"])]))
    for place, counts in named:
        axes.annotate(
            ", ".join(counts),
            place,
            (3, 2),
            textcoords="offset points",
            va="bottom",
            color="#2f7fb0",
            fontsize=9,
        )


def draw_loss(figure: Any, folder: Folder) -> None:
    """Loss against step, the network and its baseline."""
    axes = figure.subplots()
    axes.set_title("Training loss")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy (nats per token)")
    runs = [(folder, NETWORK, "fixed-point RNN"), (folder.baseline, BASELINE, "held to one iteration")]
    for one, color, label in runs:
        # zero where nothing was scored, which a logarithm has no place for
        rows = [row for row in one.metrics() if row.get("kind") == "train" and row["loss"] > 0]
        if rows:
            axes.set_yscale("log")
            axes.plot(
                [r["step"] for r in rows], [r["loss"] for r in rows], color=color, label=label, linewidth=1.6
            )
    axes.set_xlim(left=0)
    if axes.lines:
        axes.legend(loc="best", fontsize=10)
