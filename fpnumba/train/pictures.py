"""Pictures of a run: accuracy and iterations against length, and how the loss fell."""

import json
from pathlib import Path
from typing import Any

from fpnumba import tasks
from fpnumba.train.evaluation import FORMAT, chance_of
from fpnumba.train.extras import need
from fpnumba.train.folder import Folder, RunError

# Okabe and Ito's palette: told apart by all common kinds of colour vision, and in print.
NETWORK, BASELINE, CUT, GREY = "#0072B2", "#D55E00", "#56B4E9", "#8a8a8a"
STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.labelcolor": "#222222",
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.labelsize": 11,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "font.family": "DejaVu Sans",
    "lines.linewidth": 2.2,
    "lines.markersize": 6,
    "legend.frameon": False,
    "svg.hashsalt": "fpnumba",
}


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
    newest = folder.newest_evaluation()
    if newest is None:
        raise RunError(f"run: {folder.path} has not been evaluated; fpnumba evaluate {folder.path} does that")
    try:
        judgement = json.loads(newest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"run: {newest} cannot be read ({error})") from None
    if not isinstance(judgement, dict) or judgement.get("format") != FORMAT:
        raise RunError(f"run: {newest} is no evaluation of an fpnumba run")
    target = folder.path if out is None else Path(out)
    target.mkdir(parents=True, exist_ok=True)

    matplotlib = need("matplotlib")
    backends = need("matplotlib.backends.backend_agg")
    figures = need("matplotlib.figure")
    written = []
    # Figures of our own rather than pyplot's: no state of the caller's session is touched.
    with matplotlib.rc_context(
        {**matplotlib.rcParamsDefault, **STYLE, "backend": matplotlib.rcParams["backend"]}
    ):
        drawn: tuple[tuple[str, Any, Any, tuple[float, float]], ...] = (
            ("accuracy", draw_accuracy, judgement, (10.8, 5.4)),
            ("loss", draw_loss, folder, (7.0, 4.2)),
        )
        for name, draw, of, size in drawn:
            figure = figures.Figure(figsize=size, layout="constrained")
            backends.FigureCanvasAgg(figure)
            draw(figure, of)
            for suffix in (".png", ".svg"):
                path = target / f"{name}{suffix}"
                # Without a date, the same numbers give the same file.
                figure.savefig(path, dpi=160, metadata={"Date": None} if suffix == ".svg" else None)
                written.append(path)
    return written


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
    left.set_title(f"{_name(judgement['task'])}: token accuracy")
    _series(left, lengths, [r["accuracy"] for r in network["results"]], NETWORK, "o", label)
    for baseline in by_kind.get("baseline", []):
        accuracies = [r["accuracy"] for r in baseline["results"]]
        _series(
            left, lengths, accuracies, BASELINE, "s", "the same, trained with one iteration: a diagonal RNN"
        )
    _cuts(left, [cut for cut in by_kind.get("cut", []) if cut["iterations"] > 1], trained)
    left.axhline(chance_of(judgement), color=GREY, linewidth=1.2, linestyle=(0, (2, 2)), label="guessing")
    left.set_ylim(0, 1.06)
    left.set_yticks([0, 0.25, 0.5, 0.75, 1.0])

    if len(panels) > 1:
        _draw_iterations(panels[1], lengths, counted)

    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_xticks([], minor=True)
        axes.set_xlim(lengths[0] / 1.12, lengths[-1] * 1.12)
        axes.set_xlabel("sequence length")
        axes.axvspan(
            axes.get_xlim()[0], trained, color="#f0f0f0", zorder=0, linewidth=0, label="trained on these"
        )
        # Below the panels, where no curve can be.
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.16), fontsize=10, handlelength=2.4)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.06)


def _draw_iterations(axes: Any, lengths: list[int], counted: list[dict[str, Any]]) -> None:
    """Parallel iterations against length."""
    axes.set_title("Parallel iterations to the fixed point")
    if all("iterations" in one for one in counted):
        mean, most = ([one[key] for one in counted] for key in ("iterations", "iterations_max"))
        _series(axes, lengths, mean, NETWORK, "o", "mean over sequences")
        _series(axes, lengths, most, NETWORK, "^", "most of any sequence", dashed=True)
    axes.plot(lengths, lengths, color=GREY, linewidth=1.2, linestyle=(0, (2, 2)), label="one for every step")
    axes.set_ylim(bottom=0)


def _name(task: str) -> str:
    """The group ``s3xz2`` as people write it, the name of a file, or else the name of the task."""
    kind, colon, path = task.partition(":")
    if colon:
        return f"{kind}, {Path(path).name}"
    try:
        tasks.group(task)
    except ValueError:
        return task
    subscripts = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
    return "Tracking the group " + " × ".join(f.upper().translate(subscripts) for f in task.split("x"))


def _cuts(axes: Any, cuts: list[dict[str, Any]], trained: int) -> None:
    """The trained network with its iteration cut short: thin lines, each with its count on it."""
    for k, cut in enumerate(cuts):
        results = cut["results"]
        lengths, accuracies = [r["length"] for r in results], [r["accuracy"] for r in results]
        counts = ", ".join(str(one["iterations"]) for one in cuts)
        label = f"the fixed-point RNN cut to {counts} iterations" if k == 0 else None
        axes.plot(lengths, accuracies, color=CUT, linewidth=1.4, zorder=2, label=label)
        at = min(range(len(lengths)), key=lambda i: abs(lengths[i] - trained))
        axes.annotate(
            str(cut["iterations"]),
            (lengths[at], accuracies[at]),
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


def _series(
    axes: Any, x: list[Any], y: list[Any], color: str, marker: str, label: str, *, dashed: bool = False
) -> None:
    axes.plot(
        x,
        y,
        color=color,
        marker=marker,
        markeredgecolor="white",
        markeredgewidth=1.0,
        linestyle=(0, (4, 2)) if dashed else "-",
        label=label,
        zorder=3,
    )
