"""What the mixin does in Lightning's hooks, around what the user's class does there."""

from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch

from lightning_soaa import _automatic, _compat
from lightning_soaa._closures import AROUND, HANDED_OVER, run_batch
from lightning_soaa._setup import (
    make_soaa,
    refuse_foreign_state,
    refuse_unsupported,
    warn_of_no_soaa,
    with_monitor,
    with_parts,
    with_soaa,
)
from lightning_soaa._uneven import refuse_join, refuse_uneven

Act = Callable[..., Any]

# Attribute that the module has while a batch is handed over: a function that lets the strategy wrap the module again.
_WRAP_AGAIN = "_soaa_wrap_again"


def outermost(name: str, inner: Act, act: Act) -> Act:
    """Return hook `name` with `act` around `inner`; a call that comes from inside of it, by super(), is passed on.

    Lightning looks through one ``__wrapped__`` for a hook's signature and whether it is overridden. It finds what it
    would find without the mixin, except where the mixin does the work: there the hook counts as overridden.
    """
    left_alone = _LEFT_ALONE[name]

    @wraps(inner)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._soaa_choice in left_alone or name in self._soaa_hooks_inside:
            return inner(self, *args, **kwargs)
        around = self._soaa_hooks_inside
        vars(self)["_soaa_hooks_inside"] = around | {name}
        try:
            return act(self, partial(inner, self), *args, **kwargs)
        finally:
            vars(self)["_soaa_hooks_inside"] = around

    vars(hook)["_soaa_outermost"] = True
    vars(hook)["__wrapped__"] = getattr(inner, "__wrapped__", inner)
    if name == "configure_optimizers":
        del vars(hook)["__wrapped__"]
    return hook


def _configure_callbacks(module: Any, inner: Act) -> Any:
    """Refuse what cannot be carried, start afresh, and see to a monitor: the first hook of a fit."""
    callbacks: Any = inner()
    trainer: Any = module._trainer
    if trainer is None or not _compat.is_fitting(trainer):
        return callbacks
    refuse_unsupported(module, trainer)
    _adopt_configure_optimizers(module)
    vars(module).update(_soaa_phase=AROUND, _soaa_window=None, _soaa_batch_seen=False)
    vars(module).pop(_WRAP_AGAIN, None)
    return with_monitor(callbacks, trainer.callbacks)


def _adopt_configure_optimizers(module: Any) -> None:
    """Take over a `configure_optimizers` that was put on the instance, as LightningCLI does."""
    own = vars(module).get("configure_optimizers")
    if own is not None and not getattr(own, "_soaa_outermost", False):
        hook = outermost("configure_optimizers", lambda _: own(), _configure_optimizers)
        vars(module)["configure_optimizers"] = MethodType(hook, module)


def _configure_optimizers(module: Any, inner: Act) -> Any:
    """Return the user's configuration with SOAA in it, or SOAA alone; as it is where the module runs its own loop."""
    if module._soaa_choice is False:
        config = inner()
        if module._trainer is not None:
            warn_of_no_soaa(config, module._trainer)
        return with_parts(config, module)
    if _compat.is_default(inner.func):  # type: ignore[attr-defined]
        made = make_soaa(module, [param for param in module.parameters() if param.requires_grad])
        return with_parts(made, module)
    return with_parts(with_soaa(module, inner()), module)


def _on_load_checkpoint(module: Any, inner: Act, checkpoint: dict[str, Any]) -> Any:
    """Refuse to go on with another optimizer's run, before anything is loaded."""
    if module._trainer is not None and _compat.is_fitting(module._trainer):
        refuse_foreign_state(checkpoint)
    return inner(checkpoint)


def _on_train_epoch_start(module: Any, inner: Act) -> Any:
    """Refuse processes that would wait for each other at the end of the epoch."""
    refuse_uneven(module.trainer)
    return inner()


def _on_train_batch_start(module: Any, inner: Act, batch: Any, batch_idx: int) -> Any:
    """Hand the batch over, unless the user's hook ends the epoch: the last hook before the loop looks at the flag."""
    response = inner(batch, batch_idx)
    if response == -1:
        return response
    refuse_join(module.trainer)
    if module._soaa_choice:
        _automatic.begin_batch(module, batch, batch_idx)
    else:
        _compat.level_steps(module.trainer)
        vars(module).update(_soaa_default_dtype=torch.get_default_dtype(), _soaa_phase=HANDED_OVER)
        vars(module)[_WRAP_AGAIN] = _compat.unwrap(module.trainer, module)
    return response


def _training_step(module: Any, inner: Act, *args: Any, **kwargs: Any) -> Any:
    """Run the batch that was handed over. A call from elsewhere, such as `validation_step`, is the user's own."""
    if module._soaa_phase != HANDED_OVER:
        return inner(*args, **kwargs)
    own = vars(module)
    own["_soaa_phase"] = AROUND
    own.pop(_WRAP_AGAIN)()
    return run_batch(module, partial(inner, **kwargs), args)


def _optimizer_step(module: Any, inner: Act, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
    """Let the user's hook step with a closure that returns the loss of all micro-batches of the step."""
    _automatic.optimizer_step(module, partial(inner, epoch, batch_idx, optimizer), closure)


def _on_train_batch_end(module: Any, inner: Act, outputs: Any, *args: Any) -> Any:
    """Take down the loss of a batch whose gradients accumulate."""
    _automatic.end_batch(module, outputs)
    return inner(outputs, *args)


ACTS: dict[str, Act] = {
    "configure_callbacks": _configure_callbacks,
    "configure_optimizers": _configure_optimizers,
    "on_load_checkpoint": _on_load_checkpoint,
    "on_train_epoch_start": _on_train_epoch_start,
    "on_train_batch_start": _on_train_batch_start,
    "training_step": _training_step,
    "optimizer_step": _optimizer_step,
    "on_train_batch_end": _on_train_batch_end,
}
# What `automatic_optimization` was set to where a hook is the user's own, as if there were no mixin.
_LEFT_ALONE: dict[str, tuple[bool | None, ...]] = {
    "configure_callbacks": (False,),
    "configure_optimizers": (),
    "on_load_checkpoint": (False,),
    "on_train_epoch_start": (),
    "on_train_batch_start": (False,),
    "training_step": (False, True),
    "optimizer_step": (False, None),
    "on_train_batch_end": (False, None),
}
