"""The place that knows Lightning's internals. Imports neither package, so that a module of either one works.

Private names used here: ``_skip_backward``, ``_should_accumulate``, ``_combined_loader`` and ``_data_fetcher`` of
``fit_loop``; ``epoch_loop._build_kwargs``; of ``epoch_loop.automatic_optimization``, ``_make_zero_grad_fn``,
``_make_backward_fn``, ``_optimizer_step``, ``optim_progress``, ``output_result_cls`` and ``Closure``;
``loops.utilities._block_parallel_sync_behavior``; ``_forward_redirection``, ``_model_averaging_period``
and ``_ddp_comm_state`` of a strategy; ``_current_fx_name`` and ``_compiler_ctx`` of a module;
``_train_progress_bar`` of TQDMProgressBar. What has to do with rows is in `_results`.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
SHADOWED = "_soaa_shadowed"
PRECISIONS = frozenset({"Precision", "HalfPrecision", "DoublePrecision", "MixedPrecision"})
FLAT_PRECISIONS = ("32-true", "bf16-mixed")  # of FSDPPrecision

FLAT_STRATEGIES = frozenset({"FSDPStrategy"})
STRATEGIES = frozenset({"SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy"}) | FLAT_STRATEGIES


def lightning(trainer: Any, name: str) -> ModuleType:
    """Return module `name` of the Lightning package that `trainer` comes from."""
    package = type(trainer.fit_loop).__module__.removesuffix(".loops.fit_loop")
    return import_module(f"{package}.{name}")


def is_fitting(trainer: Any) -> bool:
    """Return whether `trainer` runs ``fit``, not ``validate``, ``test`` or ``predict``."""
    return bool(trainer.state.fn == "fit")


def is_default(function: Any) -> bool:
    """Return whether `function` is the one that LightningModule itself defines."""
    return getattr(function, "__module__", None) in {f"{package}.core.module" for package in PACKAGES}


def is_lightning(obj: object, names: frozenset[str]) -> bool:
    """Return whether `obj` is an instance of one of Lightning's own classes in `names`, not of a subclass."""
    kind = type(obj)
    return kind.__name__ in names and kind.__module__.startswith(PACKAGES)


def info(trainer: Any, text: str) -> None:
    """Log one line at level INFO on the first process."""
    lightning(trainer, "utilities.rank_zero").rank_zero_info(text)


def warn(trainer: Any, text: str, category: type[Warning] = UserWarning) -> None:
    """Warn on the first process."""
    lightning(trainer, "utilities.rank_zero").rank_zero_warn(text, category=category)


def say(bar: Any, text: str) -> None:
    """Print at the end of a fit beside progress bar `bar`; tqdm's may be closed by then, and would print nothing."""
    if getattr(getattr(bar, "_train_progress_bar", None), "disable", False):
        sys.stdout.write(f"{text}\n")
    else:
        bar.print(text)


def shadow_bar(bar: Any, add: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Have progress bar `bar` show what `add` makes of its own metrics, until :func:`unshadow_bar`."""
    unshadow_bar(bar)
    own = bar.get_metrics

    def get_metrics(trainer: Any, pl_module: Any) -> dict[str, Any]:
        return add(own(trainer, pl_module))

    vars(get_metrics)[SHADOWED] = vars(bar).get("get_metrics")
    vars(bar)["get_metrics"] = get_metrics


def unshadow_bar(bar: Any) -> None:
    """Have progress bar `bar` show its own metrics again."""
    shadow = vars(bar).get("get_metrics")
    if SHADOWED in getattr(shadow, "__dict__", ()):
        before = vars(shadow)[SHADOWED]
        if before is None:
            del vars(bar)["get_metrics"]
        else:
            vars(bar)["get_metrics"] = before


def automatic_loop(trainer: Any) -> Any:
    """Return the loop that automatic optimization would run; it counts the steps."""
    return trainer.fit_loop.epoch_loop.automatic_optimization


def level_steps(trainer: Any) -> None:
    """Set the count of steps that ``global_step`` reads inside a batch to the one it reads around it."""
    total = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
    total.ready = total.completed = automatic_loop(trainer).optim_progress.optimizer_steps


def step_arguments(trainer: Any, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """Return what `training_step` will be called with: the batch, and its index if it takes that."""
    return tuple(trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx).values())


def result_of(trainer: Any, output: Any) -> Any:
    """Return what `training_step` returned, validated, with the loss divided by the micro-batches of a step."""
    return automatic_loop(trainer).output_result_cls.from_training_step_output(output, trainer.accumulate_grad_batches)


def make_closure(trainer: Any, step: Callable[[], Any], backward: Any, zero_grad: Any) -> Any:
    """Return Lightning's closure: `step`, `zero_grad` if given, `backward` if given and there is a loss."""
    return sys.modules[type(automatic_loop(trainer)).__module__].Closure(step, backward, zero_grad)


def make_zero_grad(trainer: Any, optimizer: Any) -> Callable[[], None] | None:
    """Return what zeroes the gradients with all hooks around it; None unless a micro-batch is the step's first."""
    batch_idx = trainer.fit_loop.epoch_loop.batch_idx
    zero_grad: Callable[[], None] | None = automatic_loop(trainer)._make_zero_grad_fn(batch_idx, optimizer)
    return zero_grad


def make_backward(trainer: Any, optimizer: Any) -> Callable[[Any], None] | None:
    """Return what runs the backward of a loss with all hooks around it; None in an epoch that is forward only."""
    backward: Callable[[Any], None] | None = automatic_loop(trainer)._make_backward_fn(optimizer)
    return backward


def model_averaging(strategy: Any) -> tuple[str, str] | None:
    """Return the flag of a DDPStrategy that lets parameters differ between processes, and its value; None if unset."""
    period, state = getattr(strategy, "_model_averaging_period", None), getattr(strategy, "_ddp_comm_state", None)
    if period is not None:
        return "model_averaging_period", str(period)
    if type(state).__name__ == "PostLocalSGDState":
        return "ddp_comm_state", type(state).__name__
    return None


def loaders_of(trainer: Any) -> list[Any]:
    """Return the loaders of an epoch of training."""
    found: list[Any] = trainer.fit_loop._combined_loader.flattened
    return found


def replace_fetcher(trainer: Any, replaced: Callable[[Any], Any]) -> None:
    """Have an epoch of training take its batches from what `replaced` makes of that from which it takes them."""
    trainer.fit_loop._data_fetcher = replaced(trainer.fit_loop._data_fetcher)


def batches_taken(trainer: Any) -> int:
    """Return how many batches of this epoch have been taken before the one that is being taken."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def joins(trainer: Any) -> bool:
    """Return whether torch's Join stands in for processes that have run out of batches."""
    return is_wrapped(trainer) and bool(getattr(getattr(trainer.strategy.model, "_join_config", None), "enable", False))


def is_wrapped(trainer: Any) -> bool:
    """Return whether the strategy calls the module by way of what it is wrapped in, as DistributedDataParallel."""
    return trainer.strategy.model is not trainer.lightning_module


def shards_flat(trainer: Any) -> bool:
    """Return whether the strategy is FSDP1, whose parameters are flat parts of the module's."""
    return is_lightning(trainer.strategy, FLAT_STRATEGIES)


def gathers(trainer: Any) -> bool:
    """Return whether parameters are whole only inside of the forward of what the module is wrapped in, as for FSDP1."""
    return is_wrapped(trainer) and shards_flat(trainer)


def unwrap(trainer: Any, module: Any) -> Callable[[], None]:
    """Let the strategy call `module` itself, not what it is wrapped in, and return what undoes that."""
    strategy = trainer.strategy
    if strategy.model is module:
        return lambda: None
    undo = partial(setattr, strategy, "model", strategy.model)
    strategy.model = module
    return undo


def forward(trainer: Any, module: Any, method: str, *arguments: Any) -> Any:
    """Return what `method` of `module` returns, called by way of what `module` is wrapped in (as for DDP).

    Raises:
        RuntimeError: it returned None, and there are other processes, which would wait for this one's gradients.
    """
    strategy = trainer.strategy
    if strategy.model is module:
        output = getattr(module, method)(*arguments)
    else:
        output = strategy._forward_redirection(strategy.model, module, method, *arguments)
    if output is None and trainer.world_size > 1:
        raise RuntimeError(
            "SOAAMixin: `training_step` must return a loss where there are several processes, got None in process "
            f"{trainer.global_rank}; the others wait for its gradients: return a loss of 0 that depends on all "
            "parameters"
        )
    return output


def forward_again(trainer: Any, module: Any, step: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `step` of `module` returns in a trial: called by way of a wrapper only where that gathers parameters.

    DistributedDataParallel would take the forward for one that gradients follow.
    """
    if not gathers(trainer):
        return step(*arguments)
    strategy = trainer.strategy
    return strategy._forward_redirection(strategy.model, module, "_soaa_step", step, *arguments)


def scales_gradients(trainer: Any) -> bool:
    """Return whether a gradient scaler steps the optimizer: it passes no closure, and skips steps that overflow."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def before_clipping(trainer: Any, module: Any, optimizer: Any) -> None:
    """Have `optimizer` note its gradients, at the end of the closure, where something may edit them before it steps.

    That is the flag, a gradient scaler, and whatever of the user's runs in between: a method of the module, a callback
    or the optimizer that is not of Lightning or of this package. Elsewhere what is noted would be what is found.
    """
    if (
        trainer.gradient_clip_val is not None
        or scales_gradients(trainer)
        or _origin(optimizer, "step") != "lightning_soaa.optimizer"
        or any(_origin(module, name) not in _LIGHTNING_MODULES for name in _BEFORE_STEP)
        or any(_origin(callback, _BEFORE_STEP[0]) not in _IDLE_CALLBACKS for callback in trainer.callbacks)
    ):
        optimizer.before_clipping(scale=gradient_scale(trainer))


# What a module may override of all that runs between the end of the closure and the step.
_BEFORE_STEP = ("on_before_optimizer_step", "configure_gradient_clipping", "clip_gradients", "optimizer_step")
_LIGHTNING_MODULES = frozenset(f"{package}.core.{name}" for package in PACKAGES for name in ("module", "hooks"))
# The callbacks whose hook before the step leaves gradients as they are.
_IDLE_CALLBACKS = frozenset({*(f"{package}.callbacks.callback" for package in PACKAGES), "lightning_soaa.monitor"})


def _origin(owner: Any, name: str) -> Any:
    """Return the name of the Python module that method `name` of `owner` was written in."""
    return getattr(getattr(owner, name), "__module__", None)


def gradient_scale(trainer: Any) -> Any:
    """Return what a gradient scaler has multiplied the gradients by, without waiting for the device; 1 without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = getattr(scaler, "_scale", None)  # a scaler that is disabled has none
    return 1.0 if scale is None else scale


def optimizer_step(trainer: Any, closure: Callable[[], Any]) -> None:
    """Call the hook ``optimizer_step``, which steps the LightningOptimizer, and count the step."""
    automatic_loop(trainer)._optimizer_step(trainer.fit_loop.epoch_loop.batch_idx, closure)


def accumulating(trainer: Any) -> bool:
    """Return whether this batch leaves its gradients for a later batch to step on."""
    return trainer.accumulate_grad_batches != 1 and bool(trainer.fit_loop._should_accumulate())


def forward_only(trainer: Any) -> bool:
    """Return whether this epoch only collects statistics (StochasticWeightAveraging with batch normalisation)."""
    return bool(trainer.fit_loop._skip_backward)


def without_sync(trainer: Any) -> AbstractContextManager[None]:
    """Return the context for a backward whose gradients are not averaged over ranks yet."""
    context: AbstractContextManager[None] = lightning(trainer, "loops.utilities")._block_parallel_sync_behavior(
        trainer.strategy, block=True
    )
    return context


@contextmanager
def training_step_context(module: Any) -> Iterator[None]:
    """Enter what surrounds the user's `training_step`: the precision plugin and the name that logging goes by."""
    own = vars(module)  # since torch takes its time to set an attribute of a module
    name, own["_current_fx_name"] = own["_current_fx_name"], "training_step"
    try:
        with module.trainer.precision_plugin.train_step_context():
            yield
    finally:
        own["_current_fx_name"] = name


def outside_precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Leave the precision plugin's context, in which Lightning calls `training_step`.

    Backward, hooks and optimizer run outside of it under automatic optimization: without autocast, and with `dtype` as
    the default dtype.
    """
    if torch.get_default_dtype() == dtype and not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return _outside_precision(device, dtype)


@contextmanager
def _outside_precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Leave a precision plugin's context that has changed something."""
    inner = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        torch.set_default_dtype(dtype)
        stack.callback(torch.set_default_dtype, inner)
        yield
