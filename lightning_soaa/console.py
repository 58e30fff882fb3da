"""What the terminal shows at the end of an epoch: plain rows in, text out."""

from collections.abc import Mapping, Sequence
from math import inf, isnan
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text


class EpochRow(NamedTuple):
    """One optimizer's epoch.

    Args:
        name: what tells it from the others; not shown where it is the only one.
        radius: at the end of the epoch.
        acceptance_rate: share of the epoch's checks whose step was accepted, or nan.
        checks: checks in the epoch.
        rejects: checks whose step was rejected.
        skipped_steps: steps skipped because the loss or a gradient was not finite.
    """

    name: str
    radius: float
    acceptance_rate: float
    checks: float
    rejects: float
    skipped_steps: float


def _count(value: float, word: str) -> str:
    """Return ``1 check``, ``12 checks``: `word` is the plural."""
    return f"{value:.12g} {word[:-1] if value == 1 else word}"


class RunRow(NamedTuple):
    """One optimizer's fit.

    Args:
        name: what tells it from the others; not shown where it is the only one.
        steps: steps of the whole run.
        checks: checks of the whole run.
        rejects: checks whose step was rejected.
        skipped_steps: steps skipped because the loss or a gradient was not finite.
        outlier_steps: steps left out because the gradient was far outside its recent distribution.
        radius: at the end.
        radius_low: the smallest radius of this fit.
        radius_high: the largest radius of this fit.
        check_share: share of this fit's time that checks took, or nan.
        advice: kinds of advice given.
    """

    name: str
    steps: int
    checks: int
    rejects: int
    skipped_steps: int
    outlier_steps: int
    radius: float
    radius_low: float = inf
    radius_high: float = -inf
    check_share: float = float("nan")
    advice: Sequence[str] = ()


def epoch_lines(epoch: int, rows: Sequence[EpochRow]) -> Text:
    """Return one line for each row, as in ``Epoch 3: radius 0.012, acceptance rate 0.95, 40 checks, 2 rejects``.

    Numbers have three significant digits, counts all of theirs. Skipped steps are shown if there are any, in red.
    """
    lines = []
    for row in rows:
        line = Text(f"Epoch {epoch}" + (f", {row.name}" if len(rows) > 1 else "") + f": radius {row.radius:.3g}")
        if row.checks:
            line.append(f", acceptance rate {row.acceptance_rate:.3g}, {_count(row.checks, 'checks')}")
            line.append(f", {_count(row.rejects, 'rejects')}")
        else:
            line.append(", no checks")
        if row.skipped_steps:
            line.append(", ").append(_count(row.skipped_steps, "skipped steps"), style="bold red")
        lines.append(line)
    return Text("\n").join(lines)


def run_lines(rows: Sequence[RunRow]) -> Text:
    """Return what the end of a fit shows of each row: counts, the radius and the time of checks, advice if any.

    As in::

        Trust region: 600 steps, 140 checks, 2 rejects, 0 skipped steps, 1 outlier
          radius 1e-05 to 0.034, at the end 0.021; checks took 3 % of the time
          advice given: repeat_gap
    """
    lines = []
    for row in rows:
        line = Text("Trust region" + (f" ({row.name})" if len(rows) > 1 else "") + f": {_count(row.steps, 'steps')}")
        line.append(f", {_count(row.checks, 'checks')}, {_count(row.rejects, 'rejects')}, ")
        line.append(_count(row.skipped_steps, "skipped steps"), style="bold red" if row.skipped_steps else "")
        line.append(f", {_count(row.outlier_steps, 'outliers')}")
        low, high = (row.radius, row.radius) if row.radius_low > row.radius_high else (row.radius_low, row.radius_high)
        line.append(f"\n  radius {low:.3g} to {high:.3g}, at the end {row.radius:.3g}")
        if not isnan(row.check_share):
            line.append(f"; checks took {100 * row.check_share:.2g} % of the time")
        if row.advice:
            line.append("\n  advice given: " + ", ".join(row.advice), style="yellow")
        lines.append(line)
    return Text("\n").join(lines)


def bar_entries(rows: Mapping[str, tuple[float, int, int]]) -> dict[str, str]:
    """Return what a progress bar shows: text, since bars write a number of 1e-6 as 0.000.

    Args:
        rows: radius, checks of the epoch so far and how many of them were accepted, by suffix of the optimizer.
    """
    entries = {}
    for suffix, (radius, checks, accepted) in rows.items():
        entries[f"radius{suffix}"] = f"{radius:.2e}" if 0 < abs(radius) < 1e-3 else f"{radius:.3g}"
        entries[f"accepted{suffix}"] = f"{accepted / checks:.3g}" if checks else "-"
    return entries


def beside(shown: Mapping[str, Any], entries: Mapping[str, str]) -> dict[str, Any]:
    """Return a bar's own metrics with `entries` after them; what has the same name is left as it is."""
    return {**shown, **{name: text for name, text in entries.items() if name not in shown}}


def render(text: Text, console: Console | None = None) -> str:
    """Return `text` as `console` (default: one on standard output) would print it, colours as that terminal has them.

    Progress bars print strings. Does not print, and breaks no line that is too long.
    """
    console = console or Console()
    with console.capture() as capture:
        console.print(text, soft_wrap=True, highlight=False, end="")
    return capture.get()
