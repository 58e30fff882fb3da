"""What a run's trust region did, as one page: ``python -m lightning_soaa.run_report RUN [RUN2 ...] --html FILE``.

Reads ``metrics.csv`` or TensorBoard's event files, of finished runs, running ones and old ones. The page needs no
network and follows the browser's light or dark mode. Drawing needs ``pip install 'lightning-soaa[report]'``.
"""

import argparse
import sys
from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from math import isnan
from pathlib import Path

from lightning_soaa._points import extremes, last_known
from lightning_soaa._runs import Run, RunError, advice_for, by_optimizer, events_of, read_run, short_names

STYLE = """
:root { color-scheme: light dark; --grid: #d8dce0; --line: #c4c9ce; --text: #1c2126; --page: #ffffff; --soft: #5a636c; }
@media (prefers-color-scheme: dark) {
  :root { --grid: #343b42; --line: #454d55; --text: #e3e7ea; --page: #14181c; --soft: #9aa4ad; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 2rem auto;
       max-width: 90rem; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .2rem; }
p.reading { color: var(--soft); margin: 0 0 .4rem; max-width: 50rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; }
td { font-variant-numeric: tabular-nums; border-top: 1px solid var(--line); } th { font-weight: 600; }
div.row { overflow-x: auto; } div.row svg { max-width: none; height: auto; }
ul.advice li { max-width: 50rem; margin-bottom: .5rem; }
"""


def needs(package: str) -> None:
    """Raise unless a package that reports need is installed.

    Raises:
        ModuleNotFoundError: it is not; the text says how to install it.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"a report needs {package}: pip install 'lightning-soaa[report]'", name=package)


def load(paths: Sequence[str | Path]) -> list[Run]:
    """Return the runs at `paths`, one for each SOAA optimizer, named by what tells them apart.

    Raises:
        RunError: a path holds no run with SOAA.
    """
    named = zip(paths, short_names([Path(path).resolve() for path in paths]), strict=True)
    return [run for path, name in named for run in by_optimizer(read_run(path, name))]


def write_report(
    runs: Sequence[Run],
    *,
    html: Path | None = None,
    png: Path | None = None,
    given: Sequence[Sequence[str]] | None = None,
) -> None:
    """Write the report of `runs`.

    Args:
        runs: at least one, see :func:`load`.
        html: where to write the page, if anywhere; folders are made.
        png: where to write the pictures alone, if anywhere.
        given: the texts of the advice that each run was given, where they are known; otherwise they are what rows tell.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    needs("matplotlib")
    from lightning_soaa import _plots

    for path in (html, png):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if html is not None:
        drawn = [(panel.title, panel.reading, _plots.svg(panel, runs)) for panel in _plots.PANELS]
        html.write_text(page(runs, drawn, given), "utf-8")
    if png is not None:
        _plots.png(_plots.PANELS, runs, png)


def figures(run: Run) -> dict[str, str]:
    """Return a run in a few numbers, as text by heading."""
    series = run.series
    low, high = extremes(series["trust_region/radius"])
    rate = last_known(series.get("trust_region/acceptance_rate", ()))
    shown = {
        "Rows": rows_of(run),
        "Last step": str(series["trust_region/radius"][-1][0]),
        "Radius": f"{low:.3g} to {high:.3g}, last {last_known(series['trust_region/radius']):.3g}",
        "Acceptance rate, last epoch": "no checks" if isnan(rate) else f"{rate:.3g}",
    }
    if "trust_region/rejects" not in series:  # a log from before they were counted
        shown["Rejects in rows"] = str(events_of(run).rejects.total)
    for name, heading in (("rejects", "Rejects"), ("skipped_steps", "Skipped steps"), ("outlier_steps", "Outliers")):
        count = last_known(series.get(f"trust_region/{name}", ()))
        shown[heading] = "not logged" if isnan(count) else f"{count:.0f}"
    if losses := run.losses()[:4]:
        shown["Last loss"] = ", ".join(f"{key} {last_known(series[key]):.4g}" for key in losses)
    return shown


def rows_of(run: Run) -> str:
    """Return how many rows there are, and how many of them were read if not all were."""
    read = len(run.series["trust_region/radius"])
    return f"{read + run.left_out}, {read} of them read" if run.left_out else str(read)


def page(
    runs: Sequence[Run], drawn: Sequence[tuple[str, str, str]], given: Sequence[Sequence[str]] | None = None
) -> str:
    """Return the whole page.

    Args:
        runs: what it is about.
        drawn: title, reading and ``<svg>`` of each panel.
        given: the texts of the advice that each run was given; None for what the rows tell.
    """
    title = "Trust region: " + ", ".join(run.name for run in runs)
    texts = [[advice.text for advice in advice_for(run)] for run in runs] if given is None else given
    parts = [f"<h1>{escape(title)}</h1>", table(runs), "<h2>Advice</h2>", *map(advice_list, runs, texts)]
    for heading, reading, picture in drawn:
        parts += [f"<h2>{escape(heading)}</h2>", f'<p class="reading">{escape(reading)}</p>']
        parts.append(f'<div class="row">{picture}</div>')
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def table(runs: Sequence[Run]) -> str:
    """Return the table of figures: a row for each figure, a column for each run."""
    columns = [figures(run) for run in runs]
    headings = list(dict.fromkeys(heading for column in columns for heading in column))
    names = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = [f"<tr><th></th>{names}</tr>"]
    for heading in headings:
        cells = "".join(f"<td>{escape(column.get(heading, ''))}</td>" for column in columns)
        rows.append(f"<tr><th>{heading}</th>{cells}</tr>")
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def advice_list(run: Run, texts: Sequence[str]) -> str:
    """Return the advice for one run as a list, or that there is none."""
    if not texts:
        return f"<p>{escape(run.name)}: none</p>"
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<p>{escape(run.name)}:</p><ul class="advice">{items}</ul>'


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_soaa.run_report", description="Write what runs with SOAA did, side by side."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder with metrics.csv or event files, or such a file")
    parser.add_argument("--html", type=Path, help="page to write (default: report.html, unless --png is given)")
    parser.add_argument("--png", type=Path, help="picture to write")
    options = parser.parse_args(arguments)
    html = Path("report.html") if options.html is None and options.png is None else options.html
    try:
        write_report(load(options.runs), html=html, png=options.png)
    except RunError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except ModuleNotFoundError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    for path in (html, options.png):
        if path is not None:
            sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
