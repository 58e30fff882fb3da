"""Make the pictures of the documentation, from short runs on scikit-learn's digits.

python docs/pictures.py            # one or two minutes; writes docs/pictures/*.png

Three runs under Lightning are drawn as the report draws them. In a plain loop, SOAA and AdamW are run at rates that lie
a factor 10**6 apart, with a constant rate and with a cosine. ``--only cost`` makes the picture of a step's cost alone.
"""

import argparse
import math
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_soaa import SOAA, SOAAMixin
from lightning_soaa._plots import BLUE, GREY, ORANGE, PANELS, png
from lightning_soaa._runs import Run, advice_for, read_run

FOLDER = Path(__file__).parent / "pictures"
SHOWN = (
    "Radius",
    "Acceptance ratio and rate",
    "Predicted and actual reduction",
    "Loss",
    "Rejects, skipped steps and outliers",
)
NAMES = {"healthy": "a healthy run", "small-batch": "batches of two", "poisoned": "five poisoned batches"}
STEPS = 300
RATES = tuple(4.0**exponent for exponent in range(-10, 2))  # 1e-6 to 4; powers of two, since schedules round others
SEEDS, HELD_OUT = 3, 360

# What operations of torch are for.
WORK = {
    "AdamW's kernel": {"fused_adamw"},
    "averages, moves": {"add", "lerp", "addcmul", "addcdiv"},
    "products, mask": {"mul", "threshold_backward", "maximum", "bitwise_and", "bitwise_or", "clamp", "neg"},
    "roots, quotients": {"sqrt", "div"},
    "norms, sums": {"linalg_vector_norm", "norm", "sum"},
    "copies, zeros": {"copy", "clone", "zero", "zeros_like", "fill"},
}
REST = "python, small things"
COLORS = (ORANGE, BLUE, "#6aa0d8", "#7bbf8e", "#b9a3d6", "#d8c06a", GREY)

Runs = dict[float, list[tuple[float, list[float]]]]  # by rate, for each seed: final loss, and the bound of each step
# Batches that are poisoned: inputs times 100 with wrong labels, or a loss that is nan.
LARGE, NAN = (100, 140, 220), (180, 181)


class Net(SOAAMixin, L.LightningModule):
    """A small network without dropout, so that all that is seen comes from the batches."""

    def __init__(self, poisoned: bool) -> None:
        super().__init__()
        self.poisoned = poisoned
        self.net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        if self.poisoned and batch_idx in LARGE:
            images, labels = 100 * images, 9 - labels
        loss = nn.functional.cross_entropy(self.net(images), labels)
        if self.poisoned and batch_idx in NAN:
            loss = loss * float("nan")
        self.log("train/loss", loss)
        return loss


def train(name: str, logs: str, *loggers: Any) -> Run:
    """Return a run whose rows are in a table, and in `loggers`."""
    L.seed_everything(0, verbose=False)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    if name == "small-batch":  # a third of the labels are wrong: two samples say next to nothing about the loss
        wrong = torch.rand(len(labels)) < 1 / 3
        labels = torch.where(wrong, torch.randint(0, 10, labels.shape), labels)
    size = 2 if name == "small-batch" else 64
    sampler = torch.randint(0, len(labels), (STEPS * size,)).tolist()
    data = DataLoader(TensorDataset(images, labels), size, sampler=sampler)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=[CSVLogger(logs, name=name, version=0), *loggers],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(poisoned=name == "poisoned"), data)
    return read_run(Path(logs) / name / "version_0", NAMES[name])


def loop(make: Any, lr: float, seed: int, cosine: bool) -> tuple[float, list[float]]:
    """Return the loss on held-out digits after a run, and the bound of each step: radius or rate, schedule included."""
    torch.manual_seed(seed)
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]
    net = Net(poisoned=False).net
    optimizer = make(net.parameters(), lr)
    factor = (lambda step: 0.5 + 0.5 * math.cos(math.pi * step / STEPS)) if cosine else (lambda step: 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    bounds = []
    for rows in torch.randint(0, len(labels) - HELD_OUT, (STEPS, 64)):

        def loss_closure(rows=rows):
            return nn.functional.cross_entropy(net(images[rows]), labels[rows])

        def closure(loss_closure=loss_closure):
            optimizer.zero_grad()
            loss = loss_closure()
            loss.backward()
            return loss

        group = optimizer.param_groups[0]
        if isinstance(optimizer, SOAA):
            optimizer.step(closure, loss_closure=loss_closure)
            bounds.append(group["group_radius"])
        else:
            bounds.append(group["lr"])
            optimizer.step(closure)
        schedule.step()
    with torch.no_grad():
        held_out = nn.functional.cross_entropy(net(images[-HELD_OUT:]), labels[-HELD_OUT:])
    return held_out.item(), bounds


def sweep(make: Any, rates: Sequence[float], cosine: bool) -> Runs:
    """Return the runs of an optimizer by rate, one for each seed."""
    return {lr: [loop(make, lr, seed, cosine) for seed in range(SEEDS)] for lr in rates}


def best_rate(found: Runs) -> float:
    """Return the rate whose median loss is the lowest."""
    return min(found, key=lambda lr: typical(found[lr]))


def typical(runs: list[tuple[float, list[float]]]) -> float:
    """Return the median loss over seeds; what is not finite counts as infinite."""
    return median(loss if math.isfinite(loss) else math.inf for loss, _ in runs)


def draw_sweep(axes: Any, adamw: Runs, soaa: Runs) -> None:
    """Draw the loss over the rate: the median of all seeds, and from the best to the worst."""
    for name, found, color in (("AdamW", adamw, ORANGE), ("SOAA", soaa, BLUE)):
        losses = [[loss if math.isfinite(loss) else 1e3 for loss, _ in runs] for runs in found.values()]
        rates = list(found)
        axes.plot(rates, list(map(median, losses)), "o-", color=color, markersize=3.5, linewidth=1.3, label=name)
        axes.fill_between(rates, list(map(min, losses)), list(map(max, losses)), color=color, alpha=0.2, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel="lr", ylabel="loss on held-out digits", ylim=(0.05, 30))
    axes.legend(fontsize=8, frameon=False)


def draw_bounds(axes: Any, adamw: Runs, soaa: Runs, title: str) -> None:
    """Draw SOAA's radius of each seed over the run, and AdamW's rate: its best, and the next ones on both sides."""
    best = best_rate(adamw)
    for lr, color, style in ((best / 4, GREY, "--"), (best, ORANGE, "-"), (4 * best, GREY, ":")):
        label = f"AdamW, lr {lr:.2g}: loss {typical(adamw[lr]):.2g}"
        axes.plot(adamw[lr][0][1], style, color=color, linewidth=1.3, label=label)
    (runs,) = list(soaa.values())[:1]
    for seed, (_, bounds) in enumerate(runs):
        label = None if seed else f"SOAA, radius of {SEEDS} seeds: loss {typical(runs):.2g}"
        axes.plot(bounds, color=BLUE, linewidth=1.1, alpha=0.8, label=label)
    axes.set(yscale="log", xlabel="step", ylabel="radius, or lr", title=title, ylim=(1e-7, 1))
    axes.title.set_fontsize(9)
    axes.legend(fontsize=7, frameon=False, loc="lower center")


class Spent(TorchDispatchMode):
    """Adds up the processor's milliseconds that torch's operations take, by what they are for."""

    def __init__(self) -> None:
        super().__init__()
        self.by_work = dict.fromkeys(WORK, 0.0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.thread_time()
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.removeprefix("_foreach_").strip("_")
        for work, names in WORK.items():
            if name in names:
                self.by_work[work] += 1e3 * (time.thread_time() - start)
        return out


def timed(step: Any, rounds: int) -> dict[str, float]:
    """Return the processor's milliseconds that a step takes, by what is done: medians over rounds."""
    wholes, parts = [], []
    for _ in range(rounds):
        start = time.thread_time()
        step()
        wholes.append(1e3 * (time.thread_time() - start))
        with Spent() as spent:
            step()
        parts.append(spent.by_work)
    found = {work: median(part[work] for part in parts) for work in WORK}
    return {**found, REST: max(0.0, median(wholes) - sum(found.values()))}


def draw_cost(folder: Path) -> None:
    """Draw what the time of a step goes to: AdamW's, SOAA's between checks and on a check."""
    steps = {}
    for name in ("AdamW, foreach", "AdamW, fused", "SOAA between checks", "SOAA on a check"):
        params = [nn.Parameter(torch.randn(500, 500)) for _ in range(12)]
        for param in params:
            param.grad = torch.randn_like(param)
        if name.startswith("AdamW"):
            steps[name] = torch.optim.AdamW(params, foreach="foreach" in name, fused="fused" in name).step
        else:
            steps[name] = after_burn_in(SOAA(params), checks="on a check" in name)
    for step in steps.values():
        step()
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes, ends = figure.subplots(), dict.fromkeys(steps, 0.0)
    times = {name: timed(step, 15) for name, step in reversed(steps.items())}
    for color, label in zip(COLORS, [*WORK, REST], strict=True):
        widths = [spent[label] for spent in times.values()]
        axes.barh(list(times), widths, left=[ends[name] for name in times], color=color, label=label, height=0.6)
        ends = {name: ends[name] + spent[label] for name, spent in times.items()}
    axes.set(xlabel="ms a step, 3 million parameters, one thread")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, folder / "cost.png")
    print(
        f"{folder / 'cost.png'}: " + ", ".join(f"{name} {sum(spent.values()):.1f} ms" for name, spent in times.items())
    )


def after_burn_in(optimizer: SOAA, *, checks: bool) -> Any:
    """Return a step of an optimizer whose burn-in is over, a check or not."""
    head, loss, lower = optimizer.param_groups[0], torch.tensor(1.0), torch.tensor(1.0 - 1e-9)
    numbers = {"rule_phase": 0, "rule_steady": 0.0, "radius": 1e-6, "rule_scale": 1.0, "gradient_rms": 1.0}

    def step() -> None:
        head.update({**numbers, "checked_slope": 0.0, "unchecked_steps": 10**9 if checks else 0})
        optimizer.step(lambda: loss, loss_closure=lambda: lower)

    return step


def save(figure: Figure, path: Path) -> None:
    """Write a figure on white."""
    for axes in figure.axes:
        axes.grid(True, color="#d8dce0", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(path, dpi=90)
    shrink(path)


def shrink(path: Path) -> None:
    """Keep 256 colours of a picture, which is enough for lines, in half of the bytes."""
    Image.open(path).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


def compare(folder: Path) -> None:
    """Draw both optimizers over the rate, and their steps over a run."""
    adamw = {cosine: sweep(torch.optim.AdamW, RATES, cosine) for cosine in (False, True)}
    soaa = {False: sweep(SOAA, RATES[:1], False), True: sweep(SOAA, RATES, True)}
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    draw_sweep(figure.subplots(), adamw[True], soaa[True])
    save(figure, folder / "sensitivity.png")
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, cosine in zip(figure.subplots(1, 2), (False, True), strict=True):
        draw_bounds(axes, adamw[cosine], soaa[cosine], "cosine" if cosine else "constant")
    save(figure, folder / "radius-and-lr.png")
    same = all(runs == soaa[True][RATES[0]] for runs in soaa[True].values())
    print(f"{folder / 'sensitivity.png'}: SOAA's runs are the same bit for bit at all {len(RATES)} rates: {same}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write the pictures")
    parser.add_argument("--only", choices=("cost",), help="make this picture alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # of workers that a data set in memory does not need, and the advice of bad runs
    options.folder.mkdir(parents=True, exist_ok=True)
    draw_cost(options.folder)
    if options.only:
        return
    panels = [panel for panel in PANELS if panel.title in SHOWN]
    with tempfile.TemporaryDirectory() as logs:
        for name in NAMES:
            run = train(name, logs)
            png(panels, [run], options.folder / f"{name}.png", dpi=90)
            shrink(options.folder / f"{name}.png")
            advice = ", ".join(advice.kind for advice in advice_for(run)) or "none"
            print(f"{options.folder / name}.png: advice {advice}")
    compare(options.folder)


if __name__ == "__main__":
    main()
