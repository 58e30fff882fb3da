"""SOAAMixin: gives a LightningModule the optimizer SOAA and hands it the loss closures, with every Trainer flag."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_soaa import _log, _manual
from lightning_soaa._closures import AROUND, Window, inside
from lightning_soaa._hooks import ACTS, outermost
from lightning_soaa._uneven import refuse_join
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
        ValueError: at the start of a fit, for what it does not carry: strategies other than DDP, FSDP2, FSDP1 and
            tensor parallelism, some options of FSDP1, precision plugins it does not know, several optimizers,
            ``torch.compile`` of the whole module where ``automatic_optimization`` is not set, ``dataloader_iter``, and
            a checkpoint of another optimizer's run. Later, for processes with different numbers of batches and for
            torch's Join. The text names flag and remedy.

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
    _soaa_differentiates: bool = False
    _soaa_batch_versions: Sequence[int] = ()
    _soaa_window: Window | None = None
    _soaa_hooks_inside: frozenset[str] = frozenset()
    _soaa_default_dtype: torch.dtype = torch.float32

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _take_over_flag(cls)
        for name, act in ACTS.items():
            inner = getattr(cls, name, None)
            if inner is not None and not getattr(inner, "_soaa_outermost", False):
                setattr(cls, name, outermost(name, inner, act))

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
            _log.log(self, super().log, args, kwargs)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print as LightningModule does; nothing in a trial."""
        if not self._soaa_in_trial:
            super().print(*args, **kwargs)


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
