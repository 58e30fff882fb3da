"""Command line: ``python -m benchmarks run regret``, ``table regret``, ``list``, ``prune``."""

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import plugins, tables
from benchmarks.contenders import CONTENDERS
from benchmarks.experiments import EXPERIMENTS
from benchmarks.run import run
from benchmarks.search import Plan
from benchmarks.specs import RESULTS, Store
from benchmarks.tasks import ALL

FAST_TASKS = ("digits_mlp", "autompg_mlp")
FAST_CONTENDERS = ("adamw", "soaa_ratio", "soaa_published")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="tasks, contenders and experiments")
    prune = commands.add_parser("prune", help="drop the runs of tasks and contenders that have changed since")
    prune.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    for name, text in (("run", "run what is missing of an experiment"), ("table", "print and write its table")):
        command = commands.add_parser(name, help=text)
        command.add_argument("experiment", choices=EXPERIMENTS)
        command.add_argument("--tasks", help="names with commas between; default: the experiment's own")
        command.add_argument("--contenders", help="names with blanks or semicolons between; name:option=value,...")
        command.add_argument("--seeds", type=int, default=3)
        command.add_argument("--fast", action="store_true", help="a smoke test: 2 tasks, few steps, nothing is kept")
        command.add_argument("--plugin", help="python file with a list CONTENDERS")
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    commands.choices["run"].add_argument("--jobs", type=int, default=1, help="processes side by side")
    return parser


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Return the plan that the command line asks for."""
    experiment = EXPERIMENTS[arguments.experiment]
    tasks, contenders = experiment.tasks, experiment.contenders
    if arguments.fast:
        tasks, contenders = FAST_TASKS, FAST_CONTENDERS
    if arguments.tasks:
        tasks = tuple(arguments.tasks.split(","))
    if arguments.contenders:
        contenders = tuple(arguments.contenders.replace(";", " ").split())
    return Plan(tasks, contenders, 1 if arguments.fast else arguments.seeds, 0.05 if arguments.fast else 1.0)


def show_lists(console: Console) -> None:
    """Print tasks, contenders and experiments."""
    table = Table("task", "steps", "batch", "about")
    for task in ALL.values():
        table.add_row(task.name, str(task.steps), str(task.batch_size), task.about)
    console.print(table)
    table = Table("contender", "package", "schedule", "rates")
    for each in CONTENDERS.values():
        table.add_row(each.name, each.package, each.schedule, " ".join(f"{rate:g}" for rate in each.rates))
    console.print(table, "experiments:", *EXPERIMENTS)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = _parser().parse_args(argv)
    console = Console()
    if arguments.command == "list":
        show_lists(console)
        return 0
    if arguments.command == "prune":
        console.print(f"{Store(arguments.results).prune()} runs dropped")
        return 0
    if arguments.plugin:
        plugins.load(arguments.plugin)
    experiment, plan = EXPERIMENTS[arguments.experiment], plan_of(arguments)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) if arguments.fast else arguments.results)
        errors = []
        if arguments.command == "run":
            errors = run(experiment, plan, store, arguments.jobs, arguments.plugin, console)
        if arguments.command == "table" or arguments.fast:
            text = tables.write(experiment, plan, store)
            console.print(text, markup=False, soft_wrap=True)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
