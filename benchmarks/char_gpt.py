"""Loss against time of the longer runs of `examples/char_gpt.py`: the curves as CSV, a table and a picture.

    python -m benchmarks.char_gpt logs/char_gpt

Reads every run's `csv/metrics.csv` and `hparams.yaml` below the folder; writes `benchmarks/results/char_gpt.csv` and
`.md`, and `docs/pictures/char_gpt.png`. With `--again` picture and table are made from the CSV file that is there.
"""

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results" / "char_gpt.csv"
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "char_gpt.png"
NAMES = {"soaa": "SOAA", "kronecker": "SOAA, KroneckerFisher", "adamw": "AdamW"}
# By optimizer; shades of a rate lighter than the last.
COLORS = {"soaa": "#c2571a", "kronecker": "#7a3e9d", "adamw": "#2a6f97"}

Point = tuple[int, float, float]  # steps, seconds, validation loss
Curves = dict[str, list[Point]]


def read_runs(folder: Path) -> Curves:
    """Return the validation losses of every run below a folder, by name.

    Raises:
        FileNotFoundError: there is no run.
    """
    found: Curves = {}
    for path in sorted(folder.glob("*/version_*/csv/metrics.csv")):
        lines = (path.parents[1] / "hparams.yaml").read_text().splitlines()
        options = dict(line.split(": ", 1) for line in lines if ": " in line)
        name = NAMES[options["optimizer"]] + (
            f" at {float(options['lr']):g}" if options["optimizer"] == "adamw" else ""
        )
        with path.open() as file:
            rows = [row for row in csv.DictReader(file) if row.get("val/loss")]
        found[name] = [(int(row["step"]) + 1, float(row["val/seconds"]), float(row["val/loss"])) for row in rows]
    if not found:
        raise FileNotFoundError(f"benchmarks.char_gpt: `folder` must hold runs of examples/char_gpt.py, got {folder}")
    return found


def write_curves(curves: Curves) -> None:
    """Write all points to the CSV file."""
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "steps", "seconds", "validation_loss"])
        for name, points in curves.items():
            writer.writerows([name, steps, f"{seconds:.0f}", f"{loss:.4f}"] for steps, seconds, loss in points)


def read_curves() -> Curves:
    """Return what :func:`write_curves` has written."""
    found: Curves = {}
    with RESULTS.open() as file:
        for row in csv.DictReader(file):
            point = (int(row["steps"]), float(row["seconds"]), float(row["validation_loss"]))
            found.setdefault(row["run"], []).append(point)
    return found


def reached(points: Iterable[Point], loss: float) -> str:
    """Return the minutes and steps until a loss was first measured, or a dash."""
    hit = next(((steps, seconds) for steps, seconds, value in points if value <= loss), None)
    return "-" if hit is None else f"{hit[1] / 60:.1f} min, {hit[0]} steps"


def table(curves: Curves) -> str:
    """Return what each run came to, and when it had AdamW's best last loss."""
    bar = min((points[-1][2] for name, points in curves.items() if name.startswith("AdamW")), default=0.0)
    lines = [
        "# char_gpt",
        "",
        "`python -m benchmarks.char_gpt logs/char_gpt`, after runs of `examples/char_gpt.py`; the commands are in "
        "docs/kronecker.md. One seed.",
        "",
        "| run | steps | minutes | validation loss, nats a character | AdamW's best last loss reached after |",
        "|---|---|---|---|---|",
    ]
    for name, points in sorted(curves.items(), key=lambda item: item[1][-1][2]):
        steps, seconds, loss = points[-1]
        lines.append(f"| {name} | {steps} | {seconds / 60:.1f} | {loss:.3f} | {reached(points, bar)} |")
    return "\n".join(lines) + "\n"


def draw(curves: Curves) -> None:
    """Write the picture: loss against minutes, and against steps."""
    figure = Figure(figsize=(9, 3.4), layout="constrained", dpi=110)
    by_time, by_steps = figure.subplots(1, 2, sharey=True)
    kinds = {value: key for key, value in NAMES.items()}
    rates = sorted(name for name in curves if " at " in name)
    for name, points in curves.items():
        shade = 1.0 if name not in rates else 0.4 + 0.6 * (rates.index(name) + 1) / len(rates)
        style = {"color": COLORS[kinds[name.split(" at ")[0]]], "alpha": shade, "label": name}
        kept = [point for point in points if point[0] > 20]
        by_time.plot([seconds / 60 for _, seconds, _ in kept], [loss for *_, loss in kept], **style)
        by_steps.plot([steps for steps, *_ in kept], [loss for *_, loss in kept], **style)
    by_time.set(xlabel="minutes", ylabel="validation loss, nats a character")
    by_steps.set(xlabel="steps")
    by_time.legend(frameon=False, fontsize=8)
    for axes in (by_time, by_steps):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("logs/char_gpt"))
    parser.add_argument("--again", action="store_true", help="from benchmarks/results/char_gpt.csv")
    args = parser.parse_args()
    if args.again:
        curves = read_curves()
    else:
        curves = read_runs(args.folder)
        write_curves(curves)
    text = table(curves)
    RESULTS.with_suffix(".md").write_text(text)
    draw(curves)
    print(text)


if __name__ == "__main__":
    main()
