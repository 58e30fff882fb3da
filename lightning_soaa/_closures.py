"""One batch under the mixin: what Lightning's automatic loop does, with a loss closure for the optimizer beside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import nan
from typing import Any

import torch
from torch import Tensor

from lightning_soaa import _compat
from lightning_soaa.optimizer import SOAA
from lightning_soaa.trial import Start, evaluate, own_containers, versions

# Who runs the batch. Lightning reads `automatic_optimization` as False in the second and third phase only.
AROUND, HANDED_OVER, INSIDE = "around", "handed over", "inside"


@dataclass
class Replay:
    """A micro-batch that a trial evaluates again.

    Args:
        step: the user's `training_step`.
        arguments: what it was called with.
        start: what the real forward started from.
    """

    step: Callable[..., Any]
    arguments: tuple[Any, ...]
    start: Start


@dataclass
class Window:
    """The micro-batches of one optimizer step.

    Args:
        base: sum of their losses, each divided by their number; None as long as none returned one.
        replays: what a trial needs of them; empty if the radius rule makes no trials.
    """

    base: Tensor | None = None
    replays: list[Replay] = field(default_factory=list)


def soaa_of(trainer: Any) -> SOAA:
    """Return the run's optimizer.

    Raises:
        TypeError: it is not a SOAA.
    """
    optimizer = trainer.optimizers[0]
    if not isinstance(optimizer, SOAA):
        raise TypeError(
            f"SOAAMixin: `trainer.optimizers[0]` must be a SOAA, got {type(optimizer).__name__}; return SOAA(...) "
            "where it was set, or leave `configure_optimizers` to the mixin"
        )
    return optimizer


def start_of(module: Any, window: Window) -> Start:
    """Return what the next micro-batch of a window starts from."""
    return Start(module, replayed=soaa_of(module.trainer).check_due, contents=not window.replays)


def run_batch(module: Any, step: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Run one batch and step the optimizer unless gradients accumulate; return what hooks are given of it.

    Args:
        module: the LightningModule, whose `training_step` Lightning has just called.
        step: the user's `training_step`, bound.
        arguments: what Lightning called it with.
    """
    trainer = module.trainer
    optimizer = soaa_of(trainer)
    zero_grad = _compat.make_zero_grad(trainer, optimizer)
    window: Window | None = module._soaa_window
    if zero_grad is not None or window is None:
        window = vars(module)["_soaa_window"] = Window()
    with_trials = optimizer.radius_rule.needs_trial and not _compat.forward_only(trainer)
    forward = partial(_forward, module, step, arguments, window if with_trials else None)
    try:
        with _compat.outside_precision(module.device, module._soaa_default_dtype):
            return _optimize(module, optimizer, forward, zero_grad, window)
    except BaseException:
        vars(module)["_soaa_window"] = None
        raise


def _optimize(
    module: Any,
    optimizer: SOAA,
    forward: Callable[[], Any],
    zero_grad: Callable[[], None] | None,
    window: Window,
) -> dict[str, Any]:
    """Run the closure of one micro-batch in the way the trainer's flags ask for."""
    trainer = module.trainer
    inner = _compat.make_closure(trainer, forward, _compat.make_backward(trainer, optimizer), zero_grad)
    accumulating = _compat.accumulating(trainer)

    def closure() -> Tensor | None:
        loss = inner()
        if loss is not None:
            window.base = loss if window.base is None else window.base + loss
        if not accumulating:
            _compat.before_clipping(trainer, module, optimizer)
        return closure_loss(module, window, loss)

    if _compat.forward_only(trainer):
        closure()
    elif accumulating:
        with _compat.without_sync(trainer):
            closure()
    else:
        if optimizer.radius_rule.needs_trial:
            optimizer.bind_loss_closure(partial(trial_loss, module, window))
        _compat.optimizer_step(trainer, closure)
        vars(module)["_soaa_window"] = None
        window.replays.clear()  # an `optimizer_step` of the user's that took none leaves the loss closure bound
    result = inner.consume_result()
    return {} if result.loss is None else dict(result.asdict())


@contextmanager
def inside(module: Any) -> Iterator[None]:
    """Let ``automatic_optimization`` read False: the user's step runs in here."""
    vars(module)["_soaa_phase"] = INSIDE
    try:
        yield
    finally:
        vars(module)["_soaa_phase"] = AROUND


def _forward(module: Any, step: Callable[..., Any], arguments: tuple[Any, ...], window: Window | None) -> Any:
    """Run the user's `training_step`; keep in `window`, if given, what a trial needs to run it again."""
    trainer = module.trainer
    if window is None:
        with _compat.training_step_context(module):
            return _compat.result_of(trainer, _compat.forward(trainer, module, "_soaa_step", step, *arguments))
    started: list[Start] = []

    def start_and_step(*given: Any) -> Any:
        """Keep the start where DistributedDataParallel has given this process the buffers of the first."""
        if not started:
            started.append(start_of(module, window))
        return step(*given)

    if _compat.gathers(trainer):  # inside, it would hold what is gathered for this forward
        started.append(start_of(module, window))

    own, before = own_containers(arguments), None if module._soaa_batch_seen else versions(arguments)
    with _compat.training_step_context(module):
        result = _compat.result_of(trainer, _compat.forward(trainer, module, "_soaa_step", start_and_step, *arguments))
    kept = Replay(step, own, started[0])
    if before is not None:
        warn_of_edits(trainer, before, kept.arguments)
    vars(module)["_soaa_batch_seen"] = True
    if result.loss is not None:
        window.replays.append(kept)
    return result


def closure_loss(module: Any, window: Window, loss: Tensor | None) -> Tensor | None:
    """Return what the closure of a window's last micro-batch returns, whose own loss is `loss`.

    A gradient scaler calls the closure itself and passes none to the optimizer. There the optimizer is given the base
    loss, unscaled, with the loss closure; a closure that returns None has the scaler leave out the step.
    """
    if not _compat.scales_gradients(module.trainer):
        return window.base
    if window.base is not None:
        soaa_of(module.trainer).bind_loss_closure(partial(trial_loss, module, window), base_loss=window.base)
    return loss


def warn_of_edits(trainer: Any, before: list[int], arguments: tuple[Any, ...]) -> None:
    """Warn if the tensors of a batch are no longer what they were `before`."""
    if before != versions(arguments):
        _compat.warn(
            trainer,
            "SOAAMixin: `training_step` edits its batch in place. A trial sees the edited batch, so that acceptance "
            "ratios compare two different losses; edit a copy.",
        )


def trial_loss(module: Any, window: Window) -> Tensor:
    """Return the loss of a window's micro-batches at the current parameters, without a trace.

    A `training_step` that returns None here, where it returned a loss before, has met a bad point: the loss is nan.
    """
    start = window.replays[0].start if window.replays else None
    return evaluate(module, module.trainer, start, partial(_replayed_loss, module, window))


def _replayed_loss(module: Any, window: Window) -> Tensor:
    """Run the micro-batches of a window again and return the sum of their losses."""
    total: Tensor | None = None
    with inside(module):
        for replay in window.replays:
            replay.start.rewind()
            with _compat.training_step_context(module):
                arguments = own_containers(replay.arguments)
                output = _compat.forward_again(module.trainer, module, replay.step, *arguments)
                loss = _compat.result_of(module.trainer, output).loss
            if loss is None:
                return torch.tensor(nan, device=module.device)
            total = loss if total is None else total + loss
    return torch.tensor(nan, device=module.device) if total is None else total
