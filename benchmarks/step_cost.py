"""What a step costs beside AdamW: ``python -m benchmarks.step_cost [--part training|growth|worst|memory]``.

All contestants of a row are stepped in turn in one process; a figure is the median over rounds of the ratio within a
round, with its quartiles. Times are the processor's where there is one thread, which other processes on the machine
disturb less. No forward or backward pass is timed, except by ``--part training``, where whole training steps are: the
checks' forward passes are in it. ``--part memory`` times nothing.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from math import log
from statistics import median, quantiles

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.contenders import parse
from benchmarks.data import batches
from benchmarks.search import Plan, spec_of
from benchmarks.tasks import get_task
from benchmarks.train import Run
from lightning_soaa import SOAA, FixedRadius, KroneckerFisher, RatioRadius

Step = Callable[[], object]

TRANSFORMER = [(256, 512)] + [(1536, 512), (512, 512), (2048, 512), (512, 2048), (2048,), (512,), (512,)] * 8
SHAPES = {
    "1 M in 4": [(500, 500)] * 4,
    "0.5 M in 200": [(50, 50)] * 200,
    "0.5 M in 2 000": [(250,)] * 2000,
    "embedding 3.2 M": [(50_000, 64)],
    "transformer 25 M": TRANSFORMER,
}
NEVER = 10**9
TASKS = ("mnist_cnn", "char_transformer", "mnist_autoencoder")


def _soaa(params: list[nn.Parameter], *, interval: int, slope: float = 0.0, **options: object) -> Step:
    """Return a step of SOAA after burn-in that is a check every `interval` steps.

    With a `slope`, that of a check, it is the step after one, which holds its gradient against it.
    """
    optimizer = SOAA(params, radius=RatioRadius(interval=interval), **options)  # type: ignore[arg-type]
    head, loss, lower = optimizer.param_groups[0], torch.tensor(1.0), torch.tensor(1.0 - 1e-9)

    def step() -> None:
        head.update({"rule_phase": 0, "rule_steady": 0.0, "radius": 1e-6, "rule_scale": 1.0, "gradient_rms": 1.0})
        head["checked_slope"] = slope
        optimizer.step(lambda: loss, loss_closure=lambda: lower)

    return step


def _adamw(params: list[nn.Parameter], **options: bool) -> Step:
    return torch.optim.AdamW(params, **options).step  # type: ignore[arg-type]


def _peer(name: str, params: list[nn.Parameter]) -> Step:
    driver = parse(name)[0].build(nn.ParameterList(params), 1e-3, 100, {})
    driver.train(True)
    return lambda: driver.step(lambda: torch.tensor(1.0), lambda: torch.tensor(1.0))


def contestants(*, peers: bool) -> dict[str, Callable[[list[nn.Parameter]], Step]]:
    """Return what builds each contestant's step from parameters with gradients."""
    own: dict[str, Callable[[list[nn.Parameter]], Step]] = {
        "AdamW foreach": lambda params: _adamw(params, foreach=True),
        "AdamW fused": lambda params: _adamw(params, fused=True),
        "AdamW for-loop": lambda params: _adamw(params, foreach=False),
        "SOAA, FixedRadius": lambda params: SOAA(params, radius=FixedRadius()).step,
        "SOAA between checks": lambda params: _soaa(params, interval=NEVER),
        "SOAA between checks, compiled": lambda params: _soaa(params, interval=NEVER, compile=True),
        "SOAA on a check": lambda params: _soaa(params, interval=1),
        "SOAA on the step after one": lambda params: _soaa(params, interval=NEVER, slope=1.0),
        "SOAA, KroneckerFisher": lambda params: _soaa(params, interval=NEVER, fisher=KroneckerFisher()),
    }
    names = {"Prodigy": "prodigy", "Schedule-Free": "schedule_free", "MoMo": "momo", "SOAP": "soap", "Muon": "muon"}
    others = {label: lambda params, name=name: _peer(name, params) for label, name in names.items()}
    return own | (others if peers else {})


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
    """Return parameters with gradients, the same on each call."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
    return params


def rounds(steps: Mapping[str, Step], count: int, clock: Callable[[], float] | None = None) -> dict[str, list[float]]:
    """Step all in turn, `count` times after three to warm up; return the seconds of each."""
    clock = clock or (time.process_time if torch.get_num_threads() == 1 else time.perf_counter)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(count + 3):
        for name, step in steps.items():
            start = clock()
            step()
            if turn >= 3:
                seconds[name].append(clock() - start)
    return seconds


def ratio(values: list[float], base: list[float]) -> str:
    """Return the median of the ratios within rounds, with quartiles."""
    ratios = [value / other for value, other in zip(values, base, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return f"{median(ratios):.2f} ({low:.2f}-{high:.2f})"


def shapes_part(console: Console, names: list[str], dtype: torch.dtype, count: int, *, peers: bool) -> None:
    """Print the cost of optimizer steps alone."""
    for name in names:
        table = Table("step", "ms", "x AdamW foreach", "x AdamW fused", title=f"{name}, {dtype}", title_justify="left")
        built = contestants(peers=peers)
        if SHAPES[name] is TRANSFORMER:
            built = {key: built[key] for key in list(built)[:8] if key != "AdamW for-loop"}
        seconds = rounds({key: make(parameters(SHAPES[name], dtype)) for key, make in built.items()}, count)
        foreach, fused = seconds["AdamW foreach"], seconds["AdamW fused"]
        for key, values in seconds.items():
            table.add_row(key, f"{1e3 * median(values):.2f}", ratio(values, foreach), ratio(values, fused))
        console.print(table)


def training_part(console: Console, tasks: list[str], contenders: list[str], steps: int) -> None:
    """Print the processor time of whole training steps, with the checks and what they evaluate."""
    for task in tasks:
        table = Table("contender", "ms a step", f"x {contenders[0]}", title=task, title_justify="left")
        runs = {name: Run(spec_of(Plan((task,), (name,)), task, name, 1e-3, 0)) for name in contenders}
        some = next(iter(runs.values()))
        stream = list(zip(range(steps), batches(some.task.data().train, some.spec.batch_size, 0), strict=False))
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for first in range(0, len(stream), 20):  # in turns of 20 steps, so that each has its checks in all of them
            for name, run in runs.items():
                start = run.cpu
                for index, batch in stream[first : first + 20]:
                    run.step(index, batch)
                seconds[name].append((run.cpu - start) / 20)
        late = {name: values[len(values) // 4 :] for name, values in seconds.items()}  # after burn-in
        for name, values in late.items():
            table.add_row(name, f"{1e3 * median(values):.2f}", ratio(values, late[contenders[0]]))
        console.print(table)


def growth_part(console: Console, sizes: list[int], count: int) -> None:
    """Print how the cost of a step grows with the number of parameters, and what the state holds."""
    table = Table("parameters", "SOAA between checks, ms", "AdamW foreach, ms", "state, bytes a parameter")
    points = []
    for size in sizes:
        params = parameters([(size // 10,)] * 10, torch.float32)
        optimizer = SOAA(params, radius=FixedRadius())
        optimizer.step()
        held = sum(x.nbytes for kept in optimizer.state.values() for x in kept.values() if isinstance(x, torch.Tensor))
        del optimizer
        steps = {"soaa": _soaa(params, interval=NEVER), "adamw": _adamw(params, foreach=True)}
        seconds = {name: median(values) for name, values in rounds(steps, count).items()}
        points.append((log(size), log(seconds["soaa"])))
        table.add_row(
            f"{size:.0e}", f"{1e3 * seconds['soaa']:.2f}", f"{1e3 * seconds['adamw']:.2f}", f"{held / size:.2f}"
        )
    console.print(table)
    if len(points) > 1:
        x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
        slope = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
        console.print(f"slope of log time against log n: {slope:.3f}")


def worst_part(console: Console, tasks: list[str], count: int) -> None:
    """Print the processor time of optimizer steps on the tasks' models after burn-in, and that of the dearest one."""
    for task in tasks:
        table = Table("step", "ms, median", "ms, largest", "largest / median", title=task, title_justify="left")
        shapes = [tuple(param.shape) for param in get_task(task).build(0).parameters()]
        steps = {key: make(parameters(shapes, torch.float32)) for key, make in contestants(peers=False).items()}
        kept = {key: steps[key] for key in ("AdamW foreach", "SOAA between checks", "SOAA, KroneckerFisher")}
        for key, values in rounds(kept, count, time.process_time).items():
            middle, most = median(values), max(values)
            table.add_row(key, f"{1e3 * middle:.2f}", f"{1e3 * most:.2f}", f"{most / middle:.2f}")
        console.print(table)


def memory_part(console: Console) -> None:
    """Print what the state of each Fisher takes, for the benchmarks' models and the shapes here."""
    table = Table("model", "parameters", "rotated", "DiagonalFisher", "KroneckerFisher", title="bytes a parameter")
    fisher = KroneckerFisher()
    models = {name: list(get_task(name).build(0).parameters()) for name in TASKS}
    for name, shapes in SHAPES.items():
        models[name] = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    for name, params in models.items():
        count, turned = sum(p.numel() for p in params), sum(p.numel() for p in params if fisher.rotated(p))
        held = (KroneckerFisher(max_dim=1).state_bytes(params) / count, fisher.state_bytes(params) / count)
        table.add_row(name, f"{count:,}", f"{turned / count:.0%}", *(f"{value:.1f}" for value in held))
    console.print(table)


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_cost", description=__doc__)
    parser.add_argument("--part", choices=("shapes", "training", "growth", "worst", "memory"), default="shapes")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="names with commas between")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--peers", action="store_true", help="with other packages' optimizers")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of training and worst, names with commas between")
    parser.add_argument(
        "--contenders", default="adamw:foreach=true,fused=false soaa_ratio soaa_kronecker", help="blanks between"
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=400, help="of --part training")
    parser.add_argument("--largest", type=float, default=1e8, help="of --part growth")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=100)
    if arguments.part == "shapes":
        names, dtype = arguments.shapes.split(","), getattr(torch, arguments.dtype)
        shapes_part(console, names, dtype, arguments.rounds, peers=arguments.peers)
    elif arguments.part == "training":
        training_part(console, arguments.tasks.split(","), arguments.contenders.split(), arguments.steps)
    elif arguments.part == "worst":
        worst_part(console, arguments.tasks.split(","), arguments.rounds)
    elif arguments.part == "memory":
        memory_part(console)
    else:
        sizes = [10**power for power in range(5, 9) if 10**power <= arguments.largest]
        growth_part(console, sizes, max(5, arguments.rounds // 3))


if __name__ == "__main__":
    main()
