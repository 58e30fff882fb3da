"""What the mixin settles before the first batch: flags it cannot carry, the optimizer, the monitor."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_soaa import _compat
from lightning_soaa._flat import parts_of
from lightning_soaa.optimizer import SOAA


def refuse(flag: str, rule: str, value: str, remedy: str) -> NoReturn:
    """Raise ``SOAAMixin: `flag` must be rule, got value; remedy``."""
    raise ValueError(f"SOAAMixin: `{flag}` must be {rule}, got {value}; {remedy}")


def refuse_unsupported(module: Any, trainer: Any) -> None:
    """Refuse what the mixin does not carry, at the start of a fit.

    Raises:
        ValueError: the text names the flag and the remedy.
    """
    _refuse_strategy(trainer.strategy)
    plugin = trainer.precision_plugin
    if _compat.shards_flat(trainer):
        _refuse_flat(trainer.strategy, plugin)
    elif not _compat.is_lightning(plugin, _compat.PRECISIONS):
        supported = "32-true, 64-true, 16-true, bf16-true, bf16-mixed or 16-mixed"
        refuse("Trainer(precision=...)", supported, type(plugin).__name__, "not supported yet: use one of these")
    if module._soaa_choice is None and module._compiler_ctx is not None:
        refuse(
            "torch.compile",
            "applied to parts of the LightningModule",
            "the whole module",
            "set automatic_optimization = True, or compile a part, as in self.net = torch.compile(self.net)",
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        refuse(
            "training_step",
            "a function of the batch",
            "the signature with dataloader_iter",
            "a trial needs the batch again: use training_step(self, batch, batch_idx)",
        )


def refuse_foreign_state(checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint to resume from whose optimizer was not SOAA.

    Raises:
        ValueError: the text says how to start from its weights.
    """
    for state in checkpoint.get("optimizer_states", []):
        group = state.get("param_groups", [{}])[0]
        if "radius" not in group:
            refuse(
                "fit(ckpt_path=...)",
                "a checkpoint of a run with SOAA",
                f"one of another optimizer with {', '.join(sorted(group.keys() - {'params'}))}",
                "to start from its weights, load them with load_from_checkpoint and leave ckpt_path out",
            )


def _refuse_strategy(strategy: Any) -> None:
    """Refuse a strategy under which SOAA's own step, or a trial beside it, cannot run.

    Raises:
        ValueError: the text names the strategy and the remedy.
    """
    kind = type(strategy).__name__
    if not _compat.is_lightning(strategy, _compat.STRATEGIES):
        remedy = _REMEDIES.get(kind, "not supported yet: use devices=1 or strategy='ddp'")
        refuse("Trainer(strategy=...)", "on a single device, DDP, FSDP2 or FSDP1", kind, remedy)
    averaging = _compat.model_averaging(strategy)
    if averaging is not None:
        remedy = "parameters that differ between processes have no common radius: leave it out"
        refuse(f"{kind}({averaging[0]}=...)", "left out", averaging[1], remedy)


_REMEDIES = {
    "DeepSpeedStrategy": "its engine steps the optimizer and passes no loss closure on: use strategy='ddp'",
}


def _refuse_flat(strategy: Any, plugin: Any) -> None:
    """Refuse what FSDP1 has beside its defaults that cannot be carried.

    Raises:
        ValueError: the text names the flag and the remedy.
    """
    kind, other = "FSDPStrategy", "ModelParallelStrategy, which is FSDP2"
    if not strategy.kwargs.get("use_orig_params"):
        found = str(strategy.kwargs.get("use_orig_params"))
        reason = "portions go by parameters, of which a flat one knows nothing: leave it out"
        refuse(f"{kind}(use_orig_params=...)", "True", found, reason)
    if strategy.cpu_offload.offload_params:
        reason = f"sums over processes are formed on the device: leave it out, or use {other}"
        refuse(f"{kind}(cpu_offload=...)", "left out", "parameters that are offloaded", reason)
    precision = getattr(plugin, "precision", type(plugin).__name__)
    if not _compat.is_lightning(plugin, frozenset({"FSDPPrecision"})) or precision not in _compat.FLAT_PRECISIONS:
        rule = f"{' or '.join(_compat.FLAT_PRECISIONS)} under {kind}"
        refuse("Trainer(precision=...)", rule, precision, f"not supported yet: use one of these, or {other}")


def with_parts(config: Any, module: Any) -> Any:
    """Return `config` as it is, with its SOAA told of parameters that FSDP1 holds in parts."""
    trainer = module._trainer
    if trainer is not None and _compat.shards_flat(trainer):
        parts = parts_of(trainer.strategy.model)
        for optimizer in optimizers_in(config):
            if isinstance(optimizer, SOAA):
                optimizer._note_parts(parts)
    return config


def with_monitor(callbacks: Any, present: Iterable[Any]) -> Any:
    """Return the module's `callbacks` and a TrustRegionMonitor, unless there or among those `present` is one."""
    from lightning_soaa.monitor import TrustRegionMonitor

    own = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
    if any(isinstance(callback, TrustRegionMonitor) for callback in [*own, *present]):
        return callbacks
    return [*own, TrustRegionMonitor()]


def make_soaa(module: Any, params: Any) -> SOAA:
    """Return what `configure_soaa` makes of `params`.

    Raises:
        ValueError: it is not a SOAA.
    """
    optimizer = module.configure_soaa(params)
    if not isinstance(optimizer, SOAA):
        refuse("configure_soaa", "a function that returns a SOAA", type(optimizer).__name__, "return SOAA(params, ...)")
    return optimizer


def with_soaa(module: Any, config: Any) -> Any:
    """Return what `configure_optimizers` returned, in the same form, with its optimizer replaced by a SOAA.

    Parameter groups keep their numbers, and schedulers go on with the new optimizer. A SOAA is kept as it is.

    Raises:
        ValueError: there is no optimizer, or more than one.
    """
    found = optimizers_in(config)
    if len(found) != 1:
        refuse(
            "configure_optimizers",
            "one that returns one optimizer, or left out",
            f"{len(found)} optimizers",
            "to step several, set automatic_optimization = False and call self.soaa_step(optimizer, loss_fn) for each",
        )
    old = getattr(found[0], "optimizer", found[0])  # LightningOptimizer wraps
    if isinstance(old, SOAA):
        return config
    # An optimizer that outlives a fit, as LightningCLI's does, goes on in the next one; so does what replaces it.
    new = vars(old).get("_soaa_replacement") or make_soaa(module, [kept_options(group) for group in old.param_groups])
    vars(old)["_soaa_replacement"] = new
    move_schedulers(config, old, new)
    _accept_schedulers(new)
    if module._trainer is not None:
        text = f"SOAAMixin: {type(old).__name__} of `configure_optimizers` is replaced by SOAA"
        _compat.info(module._trainer, f"{text}; parameter groups and learning-rate schedulers are kept.")
    return _replaced(config, found[0], new)


def warn_of_no_soaa(config: Any, trainer: Any) -> None:
    """Warn where a module that runs its own loop has no SOAA to step: the mixin is nothing there."""
    found = [type(optimizer).__name__ for optimizer in optimizers_in(config) if not isinstance(optimizer, SOAA)]
    if found and len(found) == len(optimizers_in(config)):
        _compat.warn(
            trainer,
            f"SOAAMixin: `configure_optimizers` returns no SOAA, got {', '.join(found)}; in a module that sets "
            "automatic_optimization = False the mixin replaces none: return SOAA(...) in their place, and step them by "
            "self.soaa_step(optimizer, loss_fn), or leave the mixin out.",
        )


def optimizers_in(config: Any) -> list[Any]:
    """Return the optimizers in any of the forms that `configure_optimizers` may return."""
    if isinstance(config, Optimizer):
        return [config]
    if isinstance(config, dict):
        return optimizers_in(config.get("optimizer"))
    if isinstance(config, list | tuple):
        return [optimizer for item in config for optimizer in optimizers_in(item)]
    return []


def kept_options(group: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters, numbers and names of a parameter group, without the replaced optimizer's switches."""
    kept = {"params", "param_names", "betas", "maximize"}
    return {
        name: value
        for name, value in group.items()
        if name in kept or (isinstance(value, int | float | str | Tensor) and not isinstance(value, bool))
    }


def move_schedulers(item: Any, old: Optimizer, new: Optimizer) -> None:
    """Point the schedulers in `item` from `old` to `new`, those inside of other schedulers too."""
    if isinstance(item, dict):
        item = list(item.values())
    if isinstance(item, list | tuple):
        for part in item:
            move_schedulers(part, old, new)
    elif not isinstance(item, Optimizer) and getattr(item, "optimizer", None) is old:
        item.optimizer = new
        for part in vars(item).values():
            if isinstance(part, list | tuple | LRScheduler):
                move_schedulers(part, old, new)


def _accept_schedulers(optimizer: Optimizer) -> None:
    """Let torch see that `optimizer` steps before its schedulers do; otherwise the first of their steps warns.

    A scheduler installs that on the optimizer it is made for. One that is made here on a stand-in group and thrown
    away does so for those that were made for another optimizer.
    """
    groups, optimizer.param_groups = optimizer.param_groups, [{"params": [], "lr": 1.0}]
    try:
        LambdaLR(optimizer, lambda _: 1.0)
    finally:
        optimizer.param_groups = groups


def _replaced(config: Any, old: Any, new: SOAA) -> Any:
    """Return a copy of `config` with `new` in the place of `old`."""
    if config is old:
        return new
    if isinstance(config, dict):
        return {key: new if value is old else value for key, value in config.items()}
    if isinstance(config, list | tuple):
        return type(config)(_replaced(item, old, new) for item in config)
    return config
