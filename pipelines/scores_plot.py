"""Quality over sampling steps, drawn: the student's points between chance and the ceiling."""

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.scores import Kind, Scores

PANELS: tuple[tuple[Kind, str, str], ...] = (
    ("single", "color", "color (one object)"),
    ("single", "shape", "shape (one object)"),
    ("single", "position", "position (one object)"),
    ("double", "both", "both objects right"),
)
CEILING = {"real": ("black", "-"), "reconstructed": ("gray", "--")}
TEACHER, STUDENT, CHANCE = "tab:blue", "tab:orange", "tab:red"


def plot_steps(scores: Scores) -> bytes:
    """A PNG with one panel for each of the attributes that matter most."""
    panels = [panel for panel in PANELS if panel[0] in scores.kinds]
    figure = Figure(figsize=(3.1 * len(panels), 3.2), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (kind, attribute, title) in zip(grid, panels, strict=True):
        _draw_panel(axes, scores, kind, attribute)
        axes.set_title(title, fontsize=10)
    grid[0].set_ylabel("share right")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _draw_panel(axes: Axes, scores: Scores, kind: Kind, attribute: str) -> None:
    for entry in scores.entries:
        row = scores.find(entry.name, kind, attribute)
        assert row is not None, entry.name
        if entry.source in CEILING:
            color, style = CEILING[entry.source]
            axes.axhline(row.rate, color=color, linestyle=style, linewidth=1, label=entry.name)
        elif entry.source == "teacher":
            axes.axhspan(row.low, row.high, color=TEACHER, alpha=0.15, linewidth=0)
            label = f"teacher, {entry.steps} steps"
            axes.axhline(row.rate, color=TEACHER, linewidth=1.5, label=label)
    axes.axhline(
        scores.chance[kind][attribute], color=CHANCE, linestyle=":", linewidth=1, label="chance"
    )
    _draw_student(axes, scores, kind, attribute)
    axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.2)


def _draw_student(axes: Axes, scores: Scores, kind: Kind, attribute: str) -> None:
    students = [entry for entry in scores.entries if entry.source == "student"]
    if not students:
        axes.set_xticks([])
        return
    steps = [entry.steps for entry in students]
    rows = [row for e in students if (row := scores.find(e.name, kind, attribute))]
    rates = [row.rate for row in rows]
    errors = [  # rounding may put a bound a hair on the wrong side of 0 or 1
        [max(0.0, row.rate - row.low) for row in rows],
        [max(0.0, row.high - row.rate) for row in rows],
    ]
    axes.errorbar(steps, rates, yerr=errors, color=STUDENT, marker="o", capsize=3, label="student")
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, labels=[str(count) for count in steps])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("sampling steps")
