"""What all pictures have in common: their look, and how they are written."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fpnumba import tasks
from fpnumba.train.extras import need

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
# The palette in the order in which it is used for what is compared, and what tells the same apart in grey.
COLORS = (NETWORK, BASELINE, "#009E73", "#CC79A7", "#E69F00", CUT)
MARKERS = ("o", "s", "^", "D", "v", "P")
# From light to dark in one hue that all colour vision sees.
SHADES = "cividis_r"

Drawing = tuple[str, Callable[[Any], None], tuple[float, float]]


def written(target: Path, drawings: Sequence[Drawing]) -> list[Path]:
    """Draw each on a figure of its own and write it as PNG and SVG.

    Parameters
    ----------
    target : Path
        The folder; it is made. Pictures of the same names are drawn anew.
    drawings : sequence of (name, draw, size)
        ``draw(figure)`` fills a figure of that size in inches.

    Returns
    -------
    list of Path
    """
    target.mkdir(parents=True, exist_ok=True)
    matplotlib = need("matplotlib")
    backends = need("matplotlib.backends.backend_agg")
    figures = need("matplotlib.figure")
    paths = []
    # Figures of our own rather than pyplot's: no state of the caller's session is touched.
    with matplotlib.rc_context(
        {**matplotlib.rcParamsDefault, **STYLE, "backend": matplotlib.rcParams["backend"]}
    ):
        for name, draw, size in drawings:
            figure = figures.Figure(figsize=size, layout="constrained")
            backends.FigureCanvasAgg(figure)
            draw(figure)
            for suffix in (".png", ".svg"):
                path = target / f"{name}{suffix}"
                # Without a date, the same numbers give the same file.
                figure.savefig(path, dpi=160, metadata={"Date": None} if suffix == ".svg" else None)
                paths.append(path)
    return paths


def task_name(task: str) -> str:
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


def length_axis(axes: Any, lengths: Sequence[int], trained: int | None = None) -> None:
    """Lengths on a logarithmic axis, those that were trained on shaded."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xticks([], minor=True)
    axes.set_xlim(lengths[0] / 1.12, lengths[-1] * 1.12)
    axes.set_xlabel("sequence length")
    if trained is not None and trained >= lengths[0]:
        left = axes.get_xlim()[0]
        axes.axvspan(left, trained, color="#f0f0f0", zorder=0, linewidth=0, label="trained on these")


def legend_below(axes: Any) -> None:
    """A legend where no curve can be."""
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.16), fontsize=10, handlelength=2.4)


def series(
    axes: Any, x: list[Any], y: list[Any], color: str, marker: str, label: str, *, dashed: bool = False
) -> None:
    """A line with a marker at every point."""
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
