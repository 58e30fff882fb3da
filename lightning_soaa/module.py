"""SOAAMixin: gives a LightningModule the optimizer SOAA and hands it the loss closures, with every Trainer flag."""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_soaa import _automatic, _compat, _manual
from lightning_soaa._closures import AROUND, HANDED_OVER, Window, inside, run_batch
from lightning_soaa._setup import (
    make_soaa,
    refuse_foreign_state,
    refuse_join,
    refuse_tensor_parallel,
    refuse_uneven,
    refuse_unsupported,
    warn_of_no_soaa,
    with_monitor,
    with_soaa,
)
from lightning_soaa.optimizer import SOAA

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object


class SOAAMixin(_Base):
    """Trains a LightningModule with :class:`~lightning_soaa.SOAA`; its `training_step` returns the loss, as always.

    It works in both forms; the mixin comes first, and whatever the class defines is the user's:

    .. code-block:: python

        class Net(SOAAMixin, TheirModule): pass
        class Net(SOAAMixin, LightningModule):
            def training_step(self, batch, batch_idx): return loss

    Without `configure_optimizers`, SOAA gets all parameters that require gradients. An existing one may stay: the
    optimizer it returns is replaced, its parameter groups and learning-rate schedulers are kept, and one line says so.
    A :class:`~lightning_soaa.monitor.TrustRegionMonitor` is added unless there is one.

    Lightning's loop sees manual optimization while it hands over a batch, and nowhere else: ``automatic_optimization``
    reads False from the end of ``on_train_batch_start`` until `training_step` has returned, and True around. So checks,
    schedulers, clipping, accumulation, checkpoints and hooks are Lightning's own, as under automatic optimization. The
    same hooks run on the same values in the same order, and ``optimizer_step`` may be overridden.

    A module that sets ``automatic_optimization = True`` itself gets the same trust region on Lightning's own closure,
    through the hook ``optimizer_step``; ``torch.compile`` of the whole module needs that. One that sets it to False is
    left alone: it steps one or several SOAA by :meth:`soaa_step`, and adds a monitor if it wants one.

    Raises:
        TypeError: when a subclass is made in which the mixin comes after LightningModule.
        ValueError: at the start of a fit, for what it does not carry: strategies other than DDP and FSDP2, precision
            plugins it does not know, several optimizers, ``torch.compile`` of the whole module where
            ``automatic_optimization`` is not set, ``dataloader_iter``, and a checkpoint of another optimizer's run. At
            the start of an epoch, for processes with different numbers of batches, and at a batch for torch's Join. The
            text names flag and remedy.

    A trial starts from what the batch started from: random streams, buffers, attributes such as a hidden state that is
    carried on, frozen parameters such as a teacher's that `training_step` moves. What the batch left is there again
    afterwards. Does not undo what `training_step` does outside of the module, nor in what an attribute only leads to,
    such as a list inside of a dict; nor, where frozen parameters outweigh the trained ones, edits of the largest by
    ``.data``. For these see :attr:`in_trial`.
    """

    # Class attributes instead of __init__, which would hide the user's signature from LightningCLI. On the instance
    # they are set by vars(): on each other assignment torch searches parameters, buffers and modules for the name.
    _soaa_choice: bool | None = None
    _soaa_phase: str = AROUND
    _soaa_in_trial: bool = False
    _soaa_batch_seen: bool = False
    _soaa_batch_versions: Sequence[int] = ()
    _soaa_window: Window | None = None
    _soaa_hooks_inside: frozenset[str] = frozenset()
    _soaa_default_dtype: torch.dtype = torch.float32

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _take_over_flag(cls)
        for name, act in _ACTS.items():
            inner = getattr(cls, name, None)
            if inner is not None and not getattr(inner, "_soaa_outermost", False):
                setattr(cls, name, _outermost(name, inner, act))

    @property
    def automatic_optimization(self) -> bool:
        """Return what the module set, if it did; otherwise whether Lightning's own code runs, not the module's."""
        return self._soaa_phase == AROUND if self._soaa_choice is None else self._soaa_choice

    @automatic_optimization.setter
    def automatic_optimization(self, automatic_optimization: bool) -> None:
        self._soaa_choice = automatic_optimization

    @property
    def in_trial(self) -> bool:
        """Return whether `training_step` runs only to evaluate a trial loss.

        Code in it that has side effects outside of the module, prints or writes files can ask.
        """
        return self._soaa_in_trial

    def configure_soaa(self, params: Any) -> SOAA:
        """Return the optimizer for `params`; override to change its options.

        Args:
            params: a list of parameters, or the parameter groups of an existing `configure_optimizers`. What a group
                holds (lr, weight decay, betas) wins over options given to SOAA here, as everywhere in torch.
        """
        return SOAA(params)

    def soaa_step(self, optimizer: Any, loss_fn: Callable[[], Tensor]) -> Tensor:
        """Take one step of one of several optimizers, in a module that sets ``automatic_optimization = False``.

        It zeroes the optimizer's gradients, calls `loss_fn` and :meth:`manual_backward`, and steps: one global step. To
        clip gradients, call :meth:`clip_gradients` in ``on_before_optimizer_step``.

        .. code-block:: python

            def training_step(self, batch, batch_idx):
                generator, discriminator = self.optimizers()
                self.soaa_step(discriminator, lambda: self.discriminator_loss(batch))
                self.soaa_step(generator, lambda: self.generator_loss(batch))

        Args:
            optimizer: a SOAA, or what :meth:`optimizers` returns of it; of several, each has a radius of its own.
            loss_fn: computes the loss of the batch, with gradients, and returns it. A trial calls it again, without
                gradients and without a trace: random streams, buffers, metrics and logs are put back.

        Returns:
            The loss, detached.

        Raises:
            TypeError: `optimizer` is no SOAA, or `loss_fn` is not callable or returns no tensor of one element.
            ValueError: the module does not set ``automatic_optimization = False``, `optimizer` is not one of those that
                `configure_optimizers` returned, or the model is inside of torch's Join.
        """
        refuse_join(self.trainer)
        return _manual.soaa_step(self, optimizer, loss_fn)

    def _soaa_step(self, step: Callable[..., Any], *arguments: Any) -> Any:
        """Run the user's `training_step`; DistributedDataParallel calls this by way of its own forward."""
        with inside(self):
            return step(*arguments)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log as LightningModule does; nothing in a trial."""
        if not self._soaa_in_trial:
            super().log(*args, **kwargs)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print as LightningModule does; nothing in a trial."""
        if not self._soaa_in_trial:
            super().print(*args, **kwargs)


Act = Callable[..., Any]

# Attribute that the module has while a batch is handed over: a function that lets the strategy wrap the module again.
_WRAP_AGAIN = "_soaa_wrap_again"


def _take_over_flag(cls: type[SOAAMixin]) -> None:
    """Turn an assignment of ``automatic_optimization`` in a class body into what the mixin's property returns.

    Raises:
        TypeError: the property is hidden by a class that comes before the mixin.
    """
    name = "automatic_optimization"
    assigned = [vars(base)[name] for base in cls.__mro__ if isinstance(vars(base).get(name), bool)]
    if isinstance(vars(cls).get(name), bool):
        delattr(cls, name)
    if assigned:
        cls._soaa_choice = assigned[0]
    elif getattr(cls, name) is not vars(SOAAMixin)[name]:
        raise TypeError(
            f"SOAAMixin: `{cls.__name__}` must name the mixin first among its bases, got LightningModule before it; "
            f"write class {cls.__name__}(SOAAMixin, ...)"
        )


def _outermost(name: str, inner: Act, act: Act) -> Act:
    """Return hook `name` with `act` around `inner`; a call that comes from inside of it, by super(), is passed on.

    Lightning looks through one ``__wrapped__`` for a hook's signature and whether it is overridden. It finds what it
    would find without the mixin, except where the mixin does the work: there the hook counts as overridden.
    """
    left_alone = _LEFT_ALONE[name]

    @wraps(inner)
    def hook(self: SOAAMixin, *args: Any, **kwargs: Any) -> Any:
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


def _configure_callbacks(module: SOAAMixin, inner: Act) -> Any:
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


def _adopt_configure_optimizers(module: SOAAMixin) -> None:
    """Take over a `configure_optimizers` that was put on the instance, as LightningCLI does."""
    own = vars(module).get("configure_optimizers")
    if own is not None and not getattr(own, "_soaa_outermost", False):
        hook = _outermost("configure_optimizers", lambda _: own(), _configure_optimizers)
        vars(module)["configure_optimizers"] = MethodType(hook, module)


def _configure_optimizers(module: SOAAMixin, inner: Act) -> Any:
    """Return the user's configuration with SOAA in it, or SOAA alone; as it is where the module runs its own loop."""
    if module._soaa_choice is False:
        config = inner()
        if module._trainer is not None:
            warn_of_no_soaa(config, module._trainer)
        return config
    refuse_tensor_parallel(module._trainer)
    if _compat.is_default(inner.func):  # type: ignore[attr-defined]
        return make_soaa(module, [param for param in module.parameters() if param.requires_grad])
    return with_soaa(module, inner())


def _on_load_checkpoint(module: SOAAMixin, inner: Act, checkpoint: dict[str, Any]) -> Any:
    """Refuse to go on with another optimizer's run, before anything is loaded."""
    if module._trainer is not None and _compat.is_fitting(module._trainer):
        refuse_foreign_state(checkpoint)
    return inner(checkpoint)


def _on_train_epoch_start(module: SOAAMixin, inner: Act) -> Any:
    """Refuse processes that would wait for each other at the end of the epoch."""
    refuse_uneven(module.trainer)
    return inner()


def _on_train_batch_start(module: SOAAMixin, inner: Act, batch: Any, batch_idx: int) -> Any:
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


def _training_step(module: SOAAMixin, inner: Act, *args: Any, **kwargs: Any) -> Any:
    """Run the batch that was handed over. A call from elsewhere, such as `validation_step`, is the user's own."""
    if module._soaa_phase != HANDED_OVER:
        return inner(*args, **kwargs)
    own = vars(module)
    own["_soaa_phase"] = AROUND
    own.pop(_WRAP_AGAIN)()
    return run_batch(module, partial(inner, **kwargs), args)


def _optimizer_step(module: SOAAMixin, inner: Act, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
    """Let the user's hook step with a closure that returns the loss of all micro-batches of the step."""
    _automatic.optimizer_step(module, partial(inner, epoch, batch_idx, optimizer), closure)


def _on_train_batch_end(module: SOAAMixin, inner: Act, outputs: Any, *args: Any) -> Any:
    """Take down the loss of a batch whose gradients accumulate."""
    _automatic.end_batch(module, outputs)
    return inner(outputs, *args)


_ACTS: dict[str, Act] = {
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
