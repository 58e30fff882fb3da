"""What the pictures of a run show: one panel for each question, the same in the report and in the documentation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

from lightning_soaa._points import Column, Points, arrays, at, extremes, spread, thinned
from lightning_soaa._runs import Run, events_of

# Legible on white and on black alike.
BLUE, ORANGE, GREEN, RED, GREY = "#3d7fc4", "#d07020", "#3d9970", "#d0453f", "#808890"
# Stand for the page's own colours in an SVG, which are put in their place: no other element has them.
TEXT, GRID = "#010203", "#040506"
# Ratios are cut off here: -100 occurs, and would leave nothing of the range that matters.
LOWEST_RATIO, HIGHEST_RATIO = -1.5, 1.5
METADATA = ("Date", "Creator", "Format", "Type")  # left out, so that the same run gives the same file
# Points of a line and marks of a row that are drawn at most: a column is as wide as 500 of them.
MOST_POINTS, MOST_MARKS = 3000, 600
COLUMN, ROW = 5.2, 1.9  # inches of one run's column and one panel's row


@dataclass(frozen=True)
class Panel:
    """One row of pictures.

    Args:
        title: what is shown.
        reading: how it is read, in one or two sentences.
        draw: draws one run into matplotlib's axes and returns whether there was anything to draw.
        height: of its row, relative to others.
        across: what its x-axis shows, if not steps.
    """

    title: str
    reading: str
    draw: Callable[[Any, Run], bool]
    height: float = 1.0
    across: str | None = None


def line(axes: Any, points: Points, label: str, color: str, **style: Any) -> bool:
    """Draw a key's finite values over steps, a mark where there is only one; return whether there were any."""
    steps, values = thinned(points, MOST_POINTS)
    if np.isnan(values).all():
        return False
    marker = "o" if len(values) == 1 else None
    options = {"linewidth": 1.3, "markersize": 3, "marker": marker, **style}
    axes.plot(steps, values, label=label, color=color, **options)
    return True


def kept(points: Points, test: Callable[[Any], Any]) -> Column:
    """Return the points whose values pass `test`, of all values at once."""
    steps, values = arrays(points)
    passed = test(values)
    return Column(steps[passed], values[passed])


def log_scale(axes: Any, points: Points) -> None:
    """Give the axes a logarithmic scale if there is a positive value to show on it."""
    if extremes(points)[1] > 0:
        axes.set_yscale("log")


def draw_radius(axes: Any, run: Run) -> bool:
    """Draw radius and step norm."""
    radius, norm = run.series.get("trust_region/radius", ()), run.series.get("trust_region/step_norm", ())
    drawn = line(axes, radius, "radius", BLUE)
    drawn |= line(axes, kept(norm, lambda values: values > 0), "step norm", ORANGE, linewidth=0.8, alpha=0.8)
    log_scale(axes, radius)
    return drawn


def draw_ratio(axes: Any, run: Run) -> bool:
    """Draw the acceptance ratio of the last check, cut off at both ends, and the acceptance rate."""
    steps, ratio = arrays(kept(run.series.get("trust_region/acceptance_ratio", ()), lambda values: values == values))
    drawn = line(axes, Column(steps, ratio.clip(LOWEST_RATIO, HIGHEST_RATIO)), "acceptance ratio", BLUE)
    low = spread(steps[ratio <= LOWEST_RATIO], MOST_MARKS)
    if len(low):
        marks = {"color": RED, "markersize": 5, "label": f"{LOWEST_RATIO} or below"}
        axes.plot(low, np.full(len(low), LOWEST_RATIO), "v", **marks)
    drawn |= line(axes, run.series.get("trust_region/acceptance_rate", ()), "acceptance rate", GREEN, linewidth=0.9)
    for level in (0, 1):
        axes.axhline(level, color=GREY, linewidth=0.7, linestyle=":")
    axes.set_ylim(LOWEST_RATIO - 0.15, HIGHEST_RATIO + 0.15)
    return drawn


def draw_reductions(axes: Any, run: Run) -> bool:
    """Draw predicted and actual reduction of the last check, on a scale that is logarithmic on both sides of 0."""
    predicted, actual = (run.series.get(f"trust_region/{name}_reduction", ()) for name in ("predicted", "actual"))
    drawn = line(axes, actual, "actual", ORANGE)
    drawn |= line(axes, predicted, "predicted", BLUE)
    both_sides_of_zero(axes, predicted, actual)
    return drawn


def both_sides_of_zero(axes: Any, predicted: Points, actual: Points) -> None:
    """Give the y-axis a scale that is linear where the smallest tenth of predicted reductions is, else logarithmic."""
    sizes, others = (np.abs(values[np.isfinite(values)]) for _, values in (arrays(predicted), arrays(actual)))
    if not sizes.any():
        return
    widest = max(sizes.max(), others.max(initial=0.0))
    sizes = np.sort(sizes[sizes > 0])
    threshold = max(sizes[len(sizes) // 10], 1e-12 * widest)
    if axes.get_yscale() == "symlog":  # shared with runs that are drawn already
        threshold = min(threshold, axes.yaxis.get_transform().linthresh)
    axes.set_yscale("symlog", linthresh=threshold)
    axes.yaxis.set_major_locator(Decades(threshold))
    axes.axhline(0, color=GREY, linewidth=0.7, linestyle=":")


def draw_model(axes: Any, run: Run) -> bool:
    """Draw a point for each check that has a row: actual over predicted reduction, and where both are the same."""
    steps, trials = arrays(run.series.get("trust_region/trials", ()))
    names = ("predicted_reduction", "actual_reduction", "step_norm")
    columns = [at(run.series.get(f"trust_region/{name}", ()), steps) for name in names]
    shown = (trials > 0) & (columns[0] > 0) & np.isfinite(columns[0] + columns[1])
    predicted, actual, norm = (values[shown][:: max(1, -(-shown.sum() // MOST_MARKS))] for values in columns)
    if not len(predicted):
        return False
    undone = norm == 0
    for chosen, label, color in ((~undone, "step taken", BLUE), (undone, "rejected", RED)):
        if chosen.any():
            dots = {"color": color, "markersize": 4, "alpha": 0.7, "label": label}
            axes.plot(predicted[chosen], actual[chosen], "o", markeredgewidth=0, **dots)
    both_sides_of_zero(axes, *(Column(np.arange(len(values)), values) for values in (predicted, actual)))
    threshold = axes.yaxis.get_transform().linthresh
    axes.set_xscale("symlog", linthresh=threshold)  # the same scale, so that the line is straight
    axes.xaxis.set_major_locator(Decades(threshold))
    axes.plot([0, predicted.max()], [0, predicted.max()], color=GREY, linewidth=0.9, label="as predicted")
    axes.set_ylabel("actual reduction", fontsize=8)
    return True


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
    if all(not extremes(run.series[key])[0] <= 0 for key in keys) and any(drawn):
        axes.set_yscale("log")
    return any(drawn)


def draw_fisher(axes: Any, run: Run) -> bool:
    """Draw mean, largest entry and trace of the Fisher."""
    shown = (("fisher/trace", "trace", ORANGE), ("fisher/max", "max", GREEN), ("fisher/mean", "mean", BLUE))
    drawn = [line(axes, run.series.get(key, ()), label, color) for key, label, color in shown]
    log_scale(axes, run.series.get("fisher/mean", ()))
    return any(drawn)


def draw_events(axes: Any, run: Run) -> bool:
    """Draw a mark for each row that tells of rejects, skipped steps or outliers, and how many there were."""
    events = events_of(run)
    rows = (("rejects", events.rejects, ORANGE), ("skipped", events.skipped, RED), ("outliers", events.outliers, BLUE))
    for height, (_, marks, color) in enumerate(reversed(rows)):
        steps = spread(marks.steps, MOST_MARKS)
        axes.plot(steps, np.full(len(steps), height), "|", color=color, markersize=11, markeredgewidth=1.6)
        beside = {"ha": "left", "va": "center", "fontsize": 7}
        axes.text(1.0, height, f" {marks.total}", transform=axes.get_yaxis_transform(), **beside)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    last = max((points[-1][0] for points in run.series.values() if points), default=0) or 1
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
    Panel(
        "Actual over predicted reduction",
        "A point for each check that has a row. On the line, the loss did what the gradient promised; below it, "
        "curvature took its share; below 0 the loss rose. Points that lie far below the line, or on both sides of 0 "
        "at every promise, are checks that measure something else than the step.",
        draw_model,
        height=1.4,
        across="predicted reduction",
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
        "the gradient was far outside its recent distribution. What happened between two rows of the log is marked at "
        "the later one. On the right, how often it happened.",
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
    grid = whole.subplots(len(panels), len(runs), sharey="row", squeeze=False, height_ratios=heights)
    over_steps = [row for row, panel in enumerate(panels) if panel.across is None]
    for row, (panel, cells) in enumerate(zip(panels, grid, strict=True)):
        for column, (run, axes) in enumerate(zip(runs, cells, strict=True)):
            if panel.across is None:
                axes.sharex(grid[over_steps[0], column])
            if not panel.draw(axes, run):
                axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center")
            elif axes.get_legend_handles_labels()[0]:
                axes.legend(loc="best", fontsize=7, frameon=False, labelcolor=axes.xaxis.label.get_color())
            axes.grid(True, color=GRID, linewidth=0.5, alpha=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            if row == 0 and (titles or len(runs) > 1):
                axes.set_title(run.name, fontsize=9)
            lowest = panel.across is not None or row == over_steps[-1]
            axes.tick_params(labelsize=7, labelbottom=lowest)
            if lowest:
                axes.set_xlabel(panel.across or "step", fontsize=8)
        if titles and panel.across is None:
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
