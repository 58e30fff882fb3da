"""One step of a module that runs its own loop: gradients, a trial without a trace, any number of optimizers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_soaa import _compat
from lightning_soaa._checks import refuse
from lightning_soaa.optimizer import SOAA
from lightning_soaa.trial import Start, evaluate


def soaa_step(module: Any, optimizer: Any, loss_fn: Callable[[], Tensor]) -> Tensor:
    """Zero the gradients, run `loss_fn` and its backward, step; return the loss. See ``SOAAMixin.soaa_step``."""
    wrapped = _check(module, optimizer, loss_fn)
    soaa: SOAA = wrapped.optimizer
    with_trials = soaa.radius_rule.needs_trial
    losses: list[Tensor] = []
    start: list[Start] = []

    def closure() -> Tensor:
        wrapped.zero_grad()
        if with_trials:
            start.append(Start(module, replayed=soaa.check_due))
        loss = loss_fn()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise TypeError(f"SOAAMixin: `loss_fn` must return a tensor of one element, got {kind}")
        module.manual_backward(loss)
        _compat.before_clipping(module.trainer, module, soaa)
        losses.append(loss.detach())
        return losses[0]

    def replayed_loss() -> Tensor:
        start[0].rewind()
        return loss_fn()

    def trial_loss() -> Tensor:
        return evaluate(module, module.trainer, start[0], replayed_loss)

    if with_trials:
        wrapped.step(closure, loss_closure=trial_loss)
    else:
        wrapped.step(closure)
    return losses[0]


def _check(module: Any, optimizer: Any, loss_fn: Any) -> Any:
    """Return the run's LightningOptimizer of `optimizer`, whose steps the trainer counts.

    Raises:
        TypeError: `optimizer` is no SOAA, or `loss_fn` is not callable.
        ValueError: the module does not step by itself, `optimizer` is not one of the run's, or the strategy is FSDP1.
    """
    who = "SOAAMixin"
    if module._soaa_choice is not False:
        rule = "set to False by a module that calls soaa_step"
        refuse(who, "automatic_optimization", rule, module._soaa_choice)
    raw = getattr(optimizer, "optimizer", optimizer)  # LightningOptimizer wraps
    if not isinstance(raw, SOAA):
        refuse(who, "optimizer", "one SOAA, or what self.optimizers() returns of it", type(raw).__name__, TypeError)
    if _compat.gathers(module.trainer):
        raise ValueError(
            f"{who}: `Trainer(strategy=...)` must be another than FSDPStrategy for a module that calls soaa_step, got "
            f"{type(module.trainer.strategy).__name__}; no backward can run inside of the forward of what wraps it: "
            "wrap parts of it in configure_model, or use ModelParallelStrategy, which is FSDP2"
        )
    if not callable(loss_fn):
        refuse(who, "loss_fn", "callable", loss_fn, TypeError)
    own = module.optimizers()
    for wrapped in own if isinstance(own, list) else [own]:
        if wrapped.optimizer is raw:
            return wrapped
    return refuse(who, "optimizer", "one of those that configure_optimizers returned", "another SOAA")
