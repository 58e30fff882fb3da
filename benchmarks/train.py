"""One run: a model trained by one contender, with everything counted."""

import io
import time
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha1
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import Driver, parse
from benchmarks.data import Batch, batches
from benchmarks.guard import Replay
from benchmarks.poison import OFFSETS, SCATTERED, poisoned_steps, spoil_gradients, spoil_inputs
from benchmarks.specs import RunSpec
from benchmarks.tasks import Task, get_task

EVALUATIONS = 20


class Run:
    """State of a run: model, optimizer, stream of batches and counters."""

    def __init__(self, spec: RunSpec):
        self.spec, self.task = spec, get_task(spec.task)
        self.forwards = self.backwards = 0
        self.cpu = 0.0
        self.evaluations: list[list[float | None]] = []
        self.trace: list[list[float | None]] = []
        self.figures: dict[str, dict[str, float]] = {}
        self.poisoned = poisoned_steps(spec.poison, spec.steps, spec.seed)
        self.build()

    def build(self) -> None:
        """Make a fresh model, optimizer and schedule."""
        contender, options = parse(self.spec.contender)
        self.model = self.task.build(self.spec.seed)
        self.driver: Driver = contender.build(self.model, self.spec.lr, self.spec.steps, options)
        self.driver.schedule(self.spec.schedule, self.spec.steps)
        self.driver.train(True)
        self.replay = Replay(self.model)

    def step(self, index: int, batch: Batch) -> None:
        """Make optimizer step `index` on `batch`."""
        bad = self.spec.poison if index in self.poisoned else ""
        if bad in ("inputs", "scattered"):
            batch = spoil_inputs(batch, index)
        start = time.process_time()
        self.replay.mark()
        calls = 0

        def loss_of() -> Tensor:
            self.forwards += 1
            loss = self.task.training_loss(self.model, batch)
            return loss * float("nan") if bad.endswith("nan") else loss

        def closure() -> Tensor:
            nonlocal calls
            if calls:
                self.replay.rewind()
            calls += 1
            self.backwards += 1
            with torch.enable_grad():
                self.model.zero_grad()
                loss = loss_of()
                loss.backward()
            if bad == "gradients":
                spoil_gradients(list(self.model.parameters()))
            return loss

        @torch.no_grad()
        def loss_closure() -> Tensor:
            with self.replay.again():
                return loss_of()

        self.driver.step(closure, loss_closure)
        self.cpu += time.process_time() - start

    def validate(self) -> float | None:
        """Return the validation loss, or None if it is not finite."""
        self.driver.train(False)
        if self.driver.modes:
            loss = _recalibrated(self.task, self.model, self.spec.seed)
        else:
            loss = self.task.validation_loss(self.model)
        self.driver.train(True)
        return float(f"{loss:.7g}") if isfinite(loss) else None

    def evaluate(self, step: int) -> None:
        """Record the validation loss after `step` steps, with the cost so far."""
        loss = self.validate()
        self.evaluations.append([step, loss, self.forwards, self.backwards, round(self.cpu, 3)])

    def checkpoint(self) -> None:
        """Write everything to memory, forget it, and read it back."""
        buffer = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "optimizer": self.driver.state_dict()}, buffer)
        self.build()
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.driver.load_state_dict(state["optimizer"])


def _recalibrated(task: Task, model: nn.Module, seed: int) -> float:
    """Return the validation loss with batch-norm statistics of the averaged weights, then put the old ones back."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return task.validation_loss(model)
    replay = Replay(model)
    with replay.again(), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        for _, batch in zip(range(20), batches(task.data().train, task.batch_size, seed + 1), strict=False):
            task.loss(model, batch)
        loss = task.validation_loss(model)
        for norm in norms:
            norm.momentum = 0.1
    return loss


def _loop(run: Run, stream: Iterator[Batch]) -> None:
    """Train and evaluate; stop early once the validation loss is not finite."""
    spec = run.spec
    count = min(EVALUATIONS, spec.steps)
    due = {round(spec.steps * k / count) for k in range(1, count + 1)}
    marks = {round(spec.steps * part / 100): f"{part}%" for part in (25, 50, 100)}
    watched = {spec.steps // 2 + offset: offset for offset in OFFSETS if spec.poison not in ("", *SCATTERED)}
    for index in range(spec.steps):
        if index in watched:
            run.trace.append([watched[index], run.validate()])
        if spec.restart and index == spec.steps // 2:
            run.checkpoint()
        run.step(index, next(stream))
        if index + 1 in marks and (figures := run.driver.figures()):
            run.figures[marks[index + 1]] = figures
        if index + 1 in due:
            run.evaluate(index + 1)
            if run.evaluations[-1][1] is None:
                return


def fingerprint(model: nn.Module) -> str:
    """Return twelve hexadecimal digits of the final parameters, bit for bit."""
    digest = sha1()
    for param in model.parameters():
        digest.update(param.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def execute(spec: RunSpec) -> dict[str, Any]:
    """Train as `spec` says and return the record of the run, ready for JSON."""
    run = Run(spec)
    torch.manual_seed(10_000 + spec.seed)
    initial = run.validate()
    _loop(run, batches(run.task.data().train, spec.batch_size, spec.seed))
    losses = [loss for _, loss, *_ in run.evaluations]
    finite = [loss for loss in losses if loss is not None]
    final = losses[-1]
    record = {
        "key": spec.key,
        "spec": asdict(spec),
        "versions": {**spec.versions, "torch": torch.__version__},
        "initial": initial,
        "best": min(finite, default=None),
        "final": final,
        "diverged": final is None or (initial is not None and final > initial),
        "forwards": run.forwards,
        "backwards": run.backwards,
        "cpu": round(run.cpu, 3),
        "fingerprint": fingerprint(run.model),
        "evaluations": run.evaluations,
    }
    return record | {name: value for name, value in (("trace", run.trace), ("figures", run.figures)) if value}
