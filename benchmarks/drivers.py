"""What trains a model in a run: one or more optimizers behind one uniform step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from benchmarks.schedules import SCHEDULES
from lightning_soaa import get_polynomial_avg_fn

Closure = Callable[[], Tensor]


class Driver:
    """One or more optimizers with their schedules, stepped together.

    Args:
        optimizers: each owns some of the parameters.
        step: takes the driver, the closure and the loss closure, and makes one step.
        modes: whether the optimizer wants to be told about evaluation (schedule-free averaging does).
    """

    def __init__(
        self, *optimizers: torch.optim.Optimizer, step: Callable[..., None] | None = None, modes: bool = False
    ):
        self.optimizers, self.modes = optimizers, modes
        self._step = step or _plain_step
        self._schedulers: list[torch.optim.lr_scheduler.LRScheduler] = []

    def schedule(self, name: str, total_steps: int) -> None:
        """Multiply every learning rate by the factors of schedule `name` from now on."""
        factor = partial(_factor, SCHEDULES[name], total_steps)
        self._schedulers = [torch.optim.lr_scheduler.LambdaLR(each, factor) for each in self.optimizers]

    def step(self, closure: Closure, loss_closure: Closure) -> None:
        """Make one optimizer step and one step of the schedule."""
        self._step(self, closure, loss_closure)
        for scheduler in self._schedulers:
            scheduler.step()

    def train(self, mode: bool) -> None:
        """Announce training (or evaluation) to optimizers that keep two sets of weights."""
        if self.modes:
            for each in self.optimizers:
                each.train() if mode else each.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        parts = [*self.optimizers, *self._schedulers]
        return {str(index): part.state_dict() for index, part in enumerate(parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        for index, part in enumerate([*self.optimizers, *self._schedulers]):
            part.load_state_dict(state[str(index)])

    def figures(self) -> dict[str, float]:
        """Return SOAA's own figures, or nothing for other optimizers."""
        report = getattr(self.optimizers[0], "last_step", None)
        if report is None:
            return {}
        names = ("radius", "checks", "accepted_checks", "skipped_steps", "total_trials", "active_fraction")
        return {name: float(getattr(report, name)) for name in names}


class Averaged(Driver):
    """A driver whose model is evaluated with the polynomial-decay average of its weights and buffers.

    Args:
        driver: what trains the model.
        model: the model.
    """

    def __init__(self, driver: Driver, model: nn.Module):
        super().__init__(*driver.optimizers, step=driver._step)
        self._model, self._shown = model, False
        self._average = AveragedModel(model, avg_fn=get_polynomial_avg_fn(), use_buffers=True)

    def step(self, closure: Closure, loss_closure: Closure) -> None:
        """Make one step and add where it leads to the average."""
        super().step(closure, loss_closure)
        self._average.update_parameters(self._model)

    @torch.no_grad()
    def train(self, mode: bool) -> None:
        """Give the model its own weights back to train (or the average to be evaluated)."""
        if self._shown == mode:
            pairs = zip(_tensors(self._model), _tensors(self._average.module), strict=True)
            for own, averaged in pairs:
                kept = own.clone()
                own.copy_(averaged)
                averaged.copy_(kept)
        self._shown = not mode

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {**super().state_dict(), "average": self._average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        super().load_state_dict(state)
        self._average.load_state_dict(state["average"])


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _factor(schedule: Callable[[int, int], float], total: int, step: int) -> float:
    return schedule(min(step, total), total)


def _plain_step(driver: Driver, closure: Closure, loss_closure: Closure) -> None:
    driver.optimizers[0].step(closure)


def joint_step(driver: Driver, closure: Closure, loss_closure: Closure) -> None:
    """Step all optimizers on the same gradients."""
    closure()
    for each in driver.optimizers:
        each.step()


def clipped_step(driver: Driver, closure: Closure, loss_closure: Closure) -> None:
    """Step on gradients clipped to norm 1."""
    closure()
    params = [param for group in driver.optimizers[0].param_groups for param in group["params"]]
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    driver.optimizers[0].step()


def checked_step(driver: Driver, closure: Closure, loss_closure: Closure) -> None:
    """Step with a loss closure."""
    driver.optimizers[0].step(closure, loss_closure=loss_closure)
