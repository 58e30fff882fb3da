"""What the terminal shows at the end of an epoch: plain rows in, text out."""

from collections.abc import Sequence
from typing import NamedTuple

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


def render(text: Text, console: Console | None = None) -> str:
    """Return `text` as `console` (default: one on standard output) would print it, colours as that terminal has them.

    Progress bars print strings. Does not print, and breaks no line that is too long.
    """
    console = console or Console()
    with console.capture() as capture:
        console.print(text, soft_wrap=True, highlight=False, end="")
    return capture.get()
