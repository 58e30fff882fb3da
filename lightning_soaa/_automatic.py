"""Automatic optimization: Lightning's own closure, with a loss closure for the optimizer beside it.

Nothing here runs inside of `training_step`, so that a module compiled as a whole is traced without the mixin.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from lightning_soaa import _compat
from lightning_soaa._closures import (
    AROUND,
    HANDED_OVER,
    Replay,
    Window,
    closure_loss,
    soaa_of,
    start_of,
    trial_loss,
    warn_of_edits,
)
from lightning_soaa.trial import Start, own_containers, versions


def begin_batch(module: Any, batch: Any, batch_idx: int) -> None:
    """Keep what a trial needs of the batch that the loop is about to run."""
    trainer = module.trainer
    optimizer = soaa_of(trainer)
    if _compat.forward_only(trainer):
        return
    vars(module)["_soaa_phase"] = HANDED_OVER
    if module._soaa_window is None or _compat.make_zero_grad(trainer, optimizer) is not None:
        vars(module)["_soaa_window"] = Window()
    if optimizer.radius_rule.needs_trial:
        arguments = _compat.step_arguments(trainer, batch, batch_idx)
        if not module._soaa_batch_seen:
            vars(module)["_soaa_batch_versions"] = versions(arguments)
        window: Window = module._soaa_window
        window.replays.append(Replay(module.training_step, own_containers(arguments), Start(module, replayed=False)))
        if _starts_inside(trainer):
            _start_at_forward(module, window)
        elif _compat.accumulating(trainer):
            _start(module, window)


def _starts_inside(trainer: Any) -> bool:
    """Return whether a batch starts inside of the forward of what the module is wrapped in."""
    return _compat.is_wrapped(trainer) and not _compat.gathers(trainer)


def _start(module: Any, window: Window) -> None:
    """Have the newest micro-batch of `window` start from here."""
    if window.replays:
        newest = window.replays.pop()
        window.replays.append(replace(newest, start=start_of(module, window)))


def _start_at_forward(module: Any, window: Window) -> None:
    """Have it start where DistributedDataParallel, which has given this process the buffers of the first, calls it."""

    def start(*_: Any) -> None:
        handle.remove()
        _start(module, window)

    handle = module.register_forward_pre_hook(start)


def end_batch(module: Any, outputs: Any) -> None:
    """Enter the loss of a batch on which the optimizer did not step; `outputs` is what hooks are given of it.

    Lightning calls that hook also for a batch that it has not run, because it is None.
    """
    if module._soaa_phase == HANDED_OVER:
        _enter(module, module._soaa_window, (outputs or {}).get("loss"))


def optimizer_step(module: Any, step: Callable[..., Any], closure: Callable[[], Any]) -> None:
    """Step the optimizer, or run the closure alone in an epoch that only collects statistics.

    Args:
        module: the LightningModule, whose `optimizer_step` Lightning has just called.
        step: the user's `optimizer_step`, which takes a closure.
        closure: Lightning's own: `training_step`, zero_grad, backward.
    """
    if _compat.forward_only(module.trainer):
        closure()
        return
    window: Window = module._soaa_window

    def whole() -> Tensor | None:
        if not _starts_inside(module.trainer):  # the user's `optimizer_step` may have drawn random numbers
            _start(module, window)
        loss = closure()
        _enter(module, window, loss)
        _compat.before_clipping(module.trainer, module, raw)
        return closure_loss(module, window, loss)

    raw = soaa_of(module.trainer)
    if raw.radius_rule.needs_trial:
        raw.bind_loss_closure(partial(trial_loss, module, window))
    try:
        step(whole)
    finally:
        vars(module)["_soaa_window"] = None
        window.replays.clear()  # an `optimizer_step` of the user's that took none leaves the loss closure bound


def _enter(module: Any, window: Window, loss: Tensor | None) -> None:
    """Add the loss of the newest micro-batch to those of its window; one without a loss is not evaluated again."""
    vars(module)["_soaa_phase"] = AROUND
    if window.replays and not module._soaa_batch_seen:
        warn_of_edits(module.trainer, module._soaa_batch_versions, window.replays[-1].arguments)
        vars(module)["_soaa_batch_seen"] = True
    if loss is None:
        del window.replays[-1:]
    else:
        window.base = loss if window.base is None else window.base + loss
