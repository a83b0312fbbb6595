"""``python -m bench.training``: the results table of trained networks, and the figure of gradients, from
``bench/results/training.json``.

Every run of that file says its command and configuration, the device, its curve and its final accuracies.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fpnumba.train.drawing import COLORS, MARKERS, legend_below, length_axis, written

RESULTS = Path(__file__).with_name("results") / "training.json"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
GRADIENTS = {"implicit": "exact", "neumann": "Neumann, 4 terms", "one-step": "one step"}
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))
REACHED = 0.99

Run = dict[str, Any]


def runs() -> list[Run]:
    """All of the file."""
    found: list[Run] = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
    return found


def groups(of: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ by their seeds, by their names."""
    found: dict[str, list[Run]] = {}
    for run in of:
        found.setdefault(run["name"], []).append(run)
    return found


def reached(run: Run) -> tuple[int, float] | None:
    """Updates and seconds to the accuracy at the length of training, as trained."""
    curve, length = run["curve"], run["config"]["length"]
    rows = zip(curve["step"], curve["length"], curve["accuracy"], curve["seconds"], strict=True)
    return next(((step, at) for step, n, share, at in rows if n == length and share >= REACHED), None)


def _range(values: Sequence[float], form: str) -> str:
    low, high = min(values), max(values)
    return format(low, form) if low == high else f"{low:{form}} to {high:{form}}"


def table(of: Sequence[Run]) -> str:
    """What was trained and what came of it, in Markdown."""
    lines = ["| network | seeds | updates to 0.99 | seconds | accuracy at length |", "|---|---|---|---|---|"]
    for name, mine in groups(of).items():
        there = [found for run in mine if (found := reached(run))]
        steps = _range([step for step, _ in there], "d") if there else "none"
        if there and len(there) < len(mine):
            steps += f" ({len(there)} of {len(mine)})"
        seconds = _range([round(run["seconds"], 1) for run in mine], ".1f")
        lengths = [result["length"] for result in mine[0]["final"]]
        scores = []
        for at, length in enumerate(lengths):
            score = median(run["final"][at]["accuracy"] for run in mine)
            scores.append(f"{length}: {score:.3f}")
        seeds = ", ".join(str(run["config"]["seed"]) for run in mine)
        lines.append(f"| {name} | {seeds} | {steps} | {seconds} | {'; '.join(scores)} |")
    return "\n".join(lines)


def gradients(of: Sequence[Run], figure: Any) -> None:
    """What each gradient learns, how far it carries, and how far it points from the exact one."""
    learns, carries, points = figure.subplots(1, 3)
    for (method, label), color, marker, dashes in zip(
        GRADIENTS.items(), COLORS, MARKERS, DASHES, strict=False
    ):
        mine = [run for run in of if run["gradient"] == method]
        for run in mine:
            curve = run["curve"]
            learns.plot(curve["step"], curve["accuracy"], color=color, lw=1.4, ls=dashes)
        lengths = [result["length"] for result in mine[0]["final"]]
        scores = [[result["accuracy"] for result in run["final"]] for run in mine]
        for each in scores:
            carries.plot(lengths, each, color=color, lw=0.8, ls=dashes)
        middle, look = [median(each) for each in zip(*scores, strict=True)], {"marker": marker, "ls": dashes}
        carries.plot(lengths, middle, color=color, markeredgecolor="white", label=label, zorder=3, **look)
    learns.set(xlabel="updates", ylabel="token accuracy, training", ylim=(0, 1.03))
    learns.set_title("What each gradient learns")
    length_axis(carries, lengths)
    carries.set(ylabel="token accuracy", ylim=(0, 1.03))
    carries.set_title("How far it carries: every seed, and the median")
    probed = next(run for run in of if run["gradient"] == "implicit" and run["cosines"])
    for method, at in (("one-step", 2), ("neumann-4", 1)):
        steps = [row["step"] for row in probed["cosines"]]
        cosines = [row[method] for row in probed["cosines"]]
        look = {"color": COLORS[at], "marker": MARKERS[at], "ls": DASHES[at]}
        points.plot(steps, cosines, markeredgecolor="white", **look)
    points.set(xlabel="updates (of the exact run)", ylabel="cosine to the exact gradient", ylim=(0, 1.03))
    points.set_title("Where it points")
    legend_below(carries)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; with ``--draw``, draw the figure."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--draw", action="store_true", help="draw docs/images/gradients.png and .svg as well")
    options = parser.parse_args(arguments)
    found = runs()
    print(table(found))
    if options.draw:
        shown = [run for run in found if run.get("gradient")]
        for path in written(IMAGES, [("gradients", lambda figure: gradients(shown, figure), (13.5, 4.9))]):
            print(path)


if __name__ == "__main__":
    main()
