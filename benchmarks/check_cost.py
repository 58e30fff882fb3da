"""What checks cost after burn-in: ``python -m benchmarks.check_cost [--tasks a,b] [--seeds 3]``."""

import argparse
import time
from statistics import mean, median

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.data import batches
from benchmarks.search import Plan, spec_of
from benchmarks.train import Run

TASKS = ("digits_mlp", "mnist_cnn", "mnist_autoencoder", "char_transformer", "row_lstm", "poisson_pinn")


def measure(task: str, seed: int) -> tuple[float, float]:
    """Return (checks, time spent on them) of a run after its burn-in, as shares of steps and of all other time.

    A check costs what its step takes beyond the median step without one.
    """
    spec = spec_of(Plan((task,), ("soaa_ratio",)), task, "soaa_ratio", 1e-3, seed)
    run = Run(spec)
    torch.manual_seed(10_000 + seed)
    head = run.driver.optimizers[0].param_groups[0]
    plain, checked = [], []
    for index, batch in zip(range(spec.steps), batches(run.task.data().train, spec.batch_size, seed), strict=False):
        searching, checks, start = head["rule_phase"] > 0, head["checks"], time.process_time()
        run.step(index, batch)
        if not searching:
            (checked if head["checks"] > checks else plain).append(time.process_time() - start)
    typical = median(plain)
    extra = sum(checked) - len(checked) * typical
    return len(checked) / (len(checked) + len(plain)), extra / (typical * (len(checked) + len(plain)))


def main() -> None:
    """Print one row a task."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check_cost", description=__doc__)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table, costs = Table("task", "checks, % of steps", "time, %", "over seeds"), []
    for task in arguments.tasks.split(","):
        rows = [measure(task, seed) for seed in range(arguments.seeds)]
        costs.append(mean(cost for _, cost in rows))
        spread = " ".join(f"{100 * cost:.1f}" for _, cost in rows)
        table.add_row(task, f"{100 * mean(share for share, _ in rows):.1f}", f"{100 * costs[-1]:.1f}", spread)
    table.add_row("mean", "", f"{100 * mean(costs):.1f}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
