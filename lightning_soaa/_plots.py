"""What the pictures of a run show: one panel for each question, the same in the report and in the documentation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from math import isfinite, nan
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

from lightning_soaa._runs import Points, Run, events_of

# Legible on white and on black alike.
BLUE, ORANGE, GREEN, RED, GREY = "#3d7fc4", "#d07020", "#3d9970", "#d0453f", "#808890"
# Stand for the page's own colours in an SVG, which are put in their place: no other element has them.
TEXT, GRID = "#010203", "#040506"
# Ratios are cut off here: -100 occurs, and would leave nothing of the range that matters.
LOWEST_RATIO, HIGHEST_RATIO = -1.5, 1.5
METADATA = ("Date", "Creator", "Format", "Type")  # left out, so that the same run gives the same file
COLUMN, ROW = 5.2, 1.9  # inches of one run's column and one panel's row


@dataclass(frozen=True)
class Panel:
    """One row of pictures.

    Args:
        title: what is shown.
        reading: how it is read, in one or two sentences.
        draw: draws one run into matplotlib's axes and returns whether there was anything to draw.
        height: of its row, relative to others.
    """

    title: str
    reading: str
    draw: Callable[[Any, Run], bool]
    height: float = 1.0


def line(axes: Any, points: Points, label: str, color: str, **style: Any) -> bool:
    """Draw a key's finite values over steps, a mark where there is only one; return whether there were any."""
    known = [(step, value if isfinite(value) else nan) for step, value in points]
    if not any(isfinite(value) for _, value in known):
        return False
    marker = "o" if len(known) == 1 else None
    options = {"linewidth": 1.3, "markersize": 3, "marker": marker, **style}
    axes.plot(*zip(*known, strict=True), label=label, color=color, **options)
    return True


def log_scale(axes: Any, points: Points) -> None:
    """Give the axes a logarithmic scale if there is a positive value to show on it."""
    if any(isfinite(value) and value > 0 for _, value in points):
        axes.set_yscale("log")


def draw_radius(axes: Any, run: Run) -> bool:
    """Draw radius and step norm."""
    radius, norm = run.series.get("trust_region/radius", []), run.series.get("trust_region/step_norm", [])
    moved = [(step, value) for step, value in norm if value > 0]
    drawn = line(axes, radius, "radius", BLUE)
    drawn |= line(axes, moved, "step norm", ORANGE, linewidth=0.8, alpha=0.8)
    log_scale(axes, radius)
    return drawn


def draw_ratio(axes: Any, run: Run) -> bool:
    """Draw the acceptance ratio of the last check, cut off at both ends, and the acceptance rate."""
    ratio = run.series.get("trust_region/acceptance_ratio", [])
    cut = [(step, min(HIGHEST_RATIO, max(LOWEST_RATIO, value))) for step, value in ratio if value == value]
    drawn = line(axes, cut, "acceptance ratio", BLUE)
    low = [(step, value) for step, value in cut if value == LOWEST_RATIO]
    if low:
        axes.plot(*zip(*low, strict=True), "v", color=RED, markersize=5, label=f"{LOWEST_RATIO} or below")
    drawn |= line(axes, run.series.get("trust_region/acceptance_rate", []), "acceptance rate", GREEN, linewidth=0.9)
    for level in (0, 1):
        axes.axhline(level, color=GREY, linewidth=0.7, linestyle=":")
    axes.set_ylim(LOWEST_RATIO - 0.15, HIGHEST_RATIO + 0.15)
    return drawn


def draw_reductions(axes: Any, run: Run) -> bool:
    """Draw predicted and actual reduction of the last check, on a scale that is logarithmic on both sides of 0."""
    predicted, actual = (run.series.get(f"trust_region/{name}_reduction", []) for name in ("predicted", "actual"))
    drawn = line(axes, actual, "actual", ORANGE)
    drawn |= line(axes, predicted, "predicted", BLUE)
    sizes = sorted(abs(value) for _, value in predicted if isfinite(value) and value)
    if sizes:
        widest = max(abs(value) for _, value in (*predicted, *actual) if isfinite(value))
        threshold = max(sizes[len(sizes) // 10], 1e-12 * widest)
        if axes.get_yscale() == "symlog":  # shared with runs that are drawn already
            threshold = min(threshold, axes.yaxis.get_transform().linthresh)
        axes.set_yscale("symlog", linthresh=threshold)
        axes.yaxis.set_major_locator(Decades(threshold))
        axes.axhline(0, color=GREY, linewidth=0.7, linestyle=":")
    return drawn


class Decades(SymmetricalLogLocator):
    """Marks 0 and powers of ten, but not those where the scale is linear: there they would lie on each other.

    Args:
        threshold: where the scale becomes linear.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__(base=10, linthresh=threshold)
        self.threshold = threshold
        self.set_params(numticks=8)

    def tick_values(self, vmin: float, vmax: float) -> Any:
        """Return the places of the marks between two values."""
        return [place for place in super().tick_values(vmin, vmax) if place == 0 or abs(place) >= self.threshold]


def draw_losses(axes: Any, run: Run) -> bool:
    """Draw all keys that speak of a loss, four at most."""
    colors = (BLUE, ORANGE, GREEN, GREY)
    keys = run.losses()[: len(colors)]
    drawn = [line(axes, run.series[key], key, color) for key, color in zip(keys, colors, strict=False)]
    values = [value for key in keys for _, value in run.series[key] if isfinite(value)]
    if values and min(values) > 0:
        axes.set_yscale("log")
    return any(drawn)


def draw_fisher(axes: Any, run: Run) -> bool:
    """Draw mean, largest entry and trace of the Fisher."""
    shown = (("fisher/trace", "trace", ORANGE), ("fisher/max", "max", GREEN), ("fisher/mean", "mean", BLUE))
    drawn = [line(axes, run.series.get(key, []), label, color) for key, label, color in shown]
    log_scale(axes, run.series.get("fisher/mean", []))
    return any(drawn)


def draw_events(axes: Any, run: Run) -> bool:
    """Draw a mark for each step with a reject, a skipped step or an outlier."""
    events = events_of(run)
    rows = (("rejects", events.rejects, ORANGE), ("skipped", events.skipped, RED), ("outliers", events.outliers, BLUE))
    for height, (_, steps, color) in enumerate(reversed(rows)):
        axes.plot(steps, [height] * len(steps), "|", color=color, markersize=11, markeredgewidth=1.6)
        beside = {"ha": "left", "va": "center", "fontsize": 7}
        axes.text(1.0, height, f" {len(steps)}", transform=axes.get_yaxis_transform(), **beside)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    last = max((step for points in run.series.values() for step, _ in points), default=0) or 1
    axes.set_xlim(-0.03 * last, 1.03 * last)
    return True


PANELS = (
    Panel(
        "Radius",
        "The bound of the step, in place of a learning rate. It grows from far below (burn-in), then stays within a "
        "factor of a few. A flat line at the bottom is its floor: even the smallest step looks too large.",
        draw_radius,
    ),
    Panel(
        "Acceptance ratio and rate",
        "What the loss did over what the gradient promised, at the last check. Near 1 the step is short, around 0.6 it "
        "is as long as it should be, below 0 the loss rose; far below -1 the step was undone. The rate is the share of "
        "an epoch's checks that were not undone.",
        draw_ratio,
    ),
    Panel(
        "Predicted and actual reduction",
        "Both lines together: the model of the loss holds. The actual one on both sides of 0, far from the predicted "
        "one: the batch is too small to tell, or the loss closure computes another loss.",
        draw_reductions,
    ),
    Panel("Loss", "What the module logs under a name with loss in it.", draw_losses),
    Panel(
        "Fisher",
        "The diagonal Fisher: squared gradients. Sharp peaks are batches unlike the others; a mean of exactly 0 is a "
        "loss that does not depend on the parameters.",
        draw_fisher,
    ),
    Panel(
        "Rejects, skipped steps and outliers",
        "Where a step was undone, was skipped because the loss or a gradient was not finite, or was left out because "
        "the gradient was far outside its recent distribution. Rejects between two rows of the log are not seen.",
        draw_events,
        height=0.6,
    ),
)


def figure(panels: Sequence[Panel], runs: Sequence[Run], *, titles: bool) -> Figure:
    """Return a figure with a row for each panel and a column for each run; a row has one scale.

    Args:
        panels: what is shown.
        runs: of which runs.
        titles: write the panel's title beside its row.
    """
    heights = [panel.height for panel in panels]
    whole = Figure(figsize=(COLUMN * len(runs) + 0.6, ROW * sum(heights) + 0.5), layout="constrained")
    layout: Any = {"sharex": "col", "sharey": "row", "squeeze": False, "height_ratios": heights}
    grid = whole.subplots(len(panels), len(runs), **layout)
    for row, (panel, cells) in enumerate(zip(panels, grid, strict=True)):
        for run, axes in zip(runs, cells, strict=True):
            if not panel.draw(axes, run):
                axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center")
            elif axes.get_legend_handles_labels()[0]:
                axes.legend(loc="best", fontsize=7, frameon=False, labelcolor=axes.xaxis.label.get_color())
            axes.grid(True, color=GRID, linewidth=0.5, alpha=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            if row == 0 and (titles or len(runs) > 1):
                axes.set_title(run.name, fontsize=9)
            if row == len(panels) - 1:
                axes.set_xlabel("step", fontsize=8)
            axes.tick_params(labelsize=7)
        if titles:
            cells[0].set_ylabel(panel.title.replace(" and ", "\nand ").replace("skipped", "\nskipped"), fontsize=8)
    return whole


def svg(panel: Panel, runs: Sequence[Run]) -> str:
    """Return one panel as an ``<svg>`` element whose text and grid take the colours of the page around it."""
    colors = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: Any = {**dict.fromkeys(colors, TEXT), "svg.fonttype": "none", "svg.hashsalt": panel.title}
    with rc_context({**settings, "axes.facecolor": "none", "figure.facecolor": "none", "font.family": "sans-serif"}):
        buffer = StringIO()
        figure([panel], runs, titles=False).savefig(buffer, format="svg", metadata=dict.fromkeys(METADATA))
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(TEXT, "currentColor").replace(GRID, "var(--grid)")


def png(panels: Sequence[Panel], runs: Sequence[Run], path: Any, *, dpi: int = 110) -> None:
    """Write all panels below each other as a PNG on white."""
    with rc_context({"font.family": "sans-serif"}):
        whole = figure(panels, runs, titles=True)
        for axes in whole.axes:
            axes.grid(True, color="#d8dce0", linewidth=0.5)
        whole.savefig(path, format="png", dpi=dpi)
