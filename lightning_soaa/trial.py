"""What makes a second forward of the same batch free of side effects. Nothing here knows the optimizer.

Each guard is a context manager that puts one kind of thing back, also when the forward raises;
:func:`trial` is all of them, under ``torch.no_grad()``.
"""

import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_soaa._dist import reshard
from lightning_soaa._flat import free_gathered
from lightning_soaa._holdings import CONTAINERS, Attributes, Contents, Marks, edited_tensors

# What torch says where something that needs a graph is done without one.
_WANTS_GRADIENTS = re.compile(r"requires?[ _]grad")
_PLAIN = (str, int, float, Path)


@dataclass(frozen=True)
class RandomState:
    """The global random streams a forward may draw from.

    Args:
        cpu: torch's stream on the CPU.
        device: torch's stream on the module's accelerator, None on the CPU.
        python: state of the module ``random``, None if it is not kept.
        numpy: state of numpy's global generator, None if it is not kept or numpy is not imported.

    Generators that a module owns itself are among its attributes.
    """

    cpu: Tensor
    device: Tensor | None
    python: Any
    numpy: Any


def capture_random(device: torch.device, *, torch_only: bool = False) -> RandomState:
    """Return where the streams stand; `device` is the module's.

    Those of torch are bytes that are copied at once; python's and numpy's take 50 times as long.
    """
    numpy = None if torch_only else sys.modules.get("numpy")
    return RandomState(
        torch.get_rng_state(),
        None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(*_which(device)),
        None if torch_only else random.getstate(),
        None if numpy is None else numpy.random.get_state(),
    )


def set_random(state: RandomState, device: torch.device) -> None:
    """Put the streams where `state` says."""
    torch.set_rng_state(state.cpu)
    if state.device is not None:
        torch.get_device_module(device).set_rng_state(state.device, *_which(device))
    if state.python is not None:
        random.setstate(state.python)
    if state.numpy is not None:
        sys.modules["numpy"].random.set_state(state.numpy)


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """Return what a backend's functions take to tell their devices apart; mps has one device only."""
    return () if device.type == "mps" else (device,)


@contextmanager
def preserved_random(device: torch.device) -> Iterator[None]:
    """Put back the random streams."""
    state = capture_random(device)
    try:
        yield
    finally:
        set_random(state, device)


@contextmanager
def preserved_module(module: nn.Module, also: Iterable[Tensor] = ()) -> Iterator[None]:
    """Put back attributes of `module` and its parts, and the contents of tensors that a forward may edit.

    See :class:`~lightning_soaa._holdings.Attributes` and :func:`~lightning_soaa._holdings.edited_tensors`.

    Args:
        module: whose.
        also: those of the larger tensors that are known to be edited.
    """
    attributes = Attributes(module)
    contents = Contents([*edited_tensors(attributes)[0], *also])
    try:
        yield
    finally:
        contents.put_back()
        attributes.put_back()


class Silence:
    """A logger, and all that hangs on one, that does nothing when called.

    Plain values of what it stands for, such as a logger's folder, are passed on; everything else is silence again.

    Args:
        real: what it stands for; None for the result of a call, which has no plain values.
    """

    def __init__(self, real: Any = None) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = None if self._real is None else getattr(self._real, name)
        return value if isinstance(value, _PLAIN) else Silence(value)

    def __call__(self, *args: Any, **kwargs: Any) -> "Silence":
        """Do nothing."""
        return Silence()

    def __getitem__(self, key: object) -> "Silence":
        return Silence()

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *error: object) -> None:
        pass


@contextmanager
def silenced(module: Any, trainer: Any) -> Iterator[None]:
    """Mark `module` as in a trial, which mutes its ``log`` and ``print``, and replace the trainer's loggers.

    Does not mute the builtin ``print`` or a logger's experiment that the module keeps a reference to.
    """
    loggers = trainer.loggers
    trainer.loggers = [Silence(logger) for logger in loggers]
    vars(module)["_soaa_in_trial"] = True
    try:
        yield
    finally:
        vars(module)["_soaa_in_trial"] = False
        trainer.loggers = loggers


@contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Have forwards inside, and those that follow, gather sharded parameters as they are then.

    Args:
        model: the module, or what it is wrapped in.
    """
    reshard(model)
    free_gathered(model)
    try:
        yield
    finally:
        reshard(model)
        free_gathered(model)


class Start:
    """What a forward of `module` is about to start from, so that a replay can start from it, too.

    Args:
        module: the LightningModule.
        replayed: whether a replay is to be expected. Without it, only torch's random streams are kept.
        contents: whether the contents of tensors are kept as well, which takes a copy of them. Of several micro-batches
            that are replayed in a row, those that follow the first find what the replay before has left.
    """

    def __init__(self, module: Any, *, replayed: bool, contents: bool = True) -> None:
        self._device = module.device
        self._random = capture_random(self._device, torch_only=not replayed)
        self._attributes: Attributes | None = None
        self._contents: Contents | None = None
        self._marks: Marks | None = None
        if replayed:
            self._attributes = Attributes(module)
            if contents:
                copied, large = edited_tensors(self._attributes)
                self._contents, self._marks = Contents(copied), Marks(large)

    def rewind(self) -> None:
        """Have the module start from here again."""
        if self._attributes is not None:
            self._attributes.put_back()
        if self._contents is not None:
            self._contents.put_back()
        set_random(self._random, self._device)

    def edited(self) -> list[Tensor]:
        """Return tensors too large to be copied always that have been edited since."""
        return [] if self._marks is None else self._marks.changed()


def evaluate(module: Any, trainer: Any, start: Start | None, loss: Callable[[], Tensor]) -> Tensor:
    """Return what `loss` returns in a :func:`trial`.

    Code that differentiates while it computes a loss, such as a physics-informed network or a gradient penalty, fails
    without gradients, as does code that registers hooks on tensors. It is evaluated with them, from its first trial on.
    """
    if not module._soaa_differentiates:
        try:
            with trial(module, trainer, start):
                return loss()
        except RuntimeError as error:
            if not _WANTS_GRADIENTS.search(str(error)):
                raise
            vars(module)["_soaa_differentiates"] = True
    with trial(module, trainer, start), torch.enable_grad():
        return loss()


@contextmanager
def trial(module: Any, trainer: Any, start: Start | None = None) -> Iterator[None]:
    """Evaluate `module` without gradients and without a trace: streams, tensors, metrics, attributes, logs.

    The module stays in train mode. To replay a forward, the body calls :meth:`Start.rewind`; what the forward left is
    there again afterwards.

    Args:
        module: the LightningModule.
        trainer: its trainer.
        start: what the first forward of the step started from.

    Does not undo in-place edits of the batch, files written, changes to objects outside of the module, nor edits of
    what an attribute only leads to, such as a list inside of a dict. Nor, where frozen parameters outweigh the trained
    ones, edits of the largest by ``.data``.
    """
    with (
        torch.no_grad(),
        resharded(trainer.strategy.model),
        preserved_random(module.device),
        preserved_module(module, () if start is None else start.edited()),
        silenced(module, trainer),
    ):
        yield


def own_containers(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return `arguments` with lists and dicts copied one level deep, so that a pop in a forward does not reach them."""
    return tuple(copy(argument) if type(argument) in CONTAINERS else argument for argument in arguments)


def versions(batch: Any) -> list[int]:
    """Return the version counters of all tensors in a batch: an edit in place raises one.

    Looks into lists, tuples and mappings; tensors made in inference mode have no counter and are left out.
    """
    if isinstance(batch, Tensor):
        return [] if batch.is_inference() else [batch._version]
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        return [version for item in batch for version in versions(item)]
    return []
