"""What makes a second forward of the same batch free of side effects. Nothing here knows the optimizer.

Each guard is a context manager that puts one kind of thing back, also when the forward raises;
:func:`trial` is all of them, under ``torch.no_grad()``.
"""

import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_soaa._dist import reshard

# Attributes that every torch module has and no forward writes, so that they need not be looked at.
_PLUMBING = frozenset(vars(nn.Module())) - {"_buffers", "training"}
_PLAIN = (str, int, float, Path)
_CONTAINERS = frozenset({list, dict, set, deque, OrderedDict, defaultdict, Counter})


@dataclass(frozen=True)
class RandomState:
    """The global random streams a forward may draw from.

    Args:
        cpu: torch's stream on the CPU.
        device: torch's stream on the module's accelerator, None on the CPU.
        python: state of the module ``random``.
        numpy: state of numpy's global generator, None if numpy is not imported.

    Does not hold generators that a module owns itself.
    """

    cpu: Tensor
    device: Tensor | None
    python: Any
    numpy: Any


def capture_random(device: torch.device) -> RandomState:
    """Return where the streams stand; `device` is the module's."""
    numpy = sys.modules.get("numpy")
    return RandomState(
        torch.get_rng_state(),
        None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(*_which(device)),
        random.getstate(),
        None if numpy is None else numpy.random.get_state(),
    )


def set_random(state: RandomState, device: torch.device) -> None:
    """Put the streams where `state` says."""
    torch.set_rng_state(state.cpu)
    if state.device is not None:
        torch.get_device_module(device).set_rng_state(state.device, *_which(device))
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
def preserved_tensors(module: nn.Module) -> Iterator[None]:
    """Put back the contents of all buffers and of the tensors that torchmetrics' metrics keep, in place.

    Contents are copied, since native batch normalisation leaves no trace in a tensor's version counter.
    """
    kept = [(tensor, tensor.clone()) for tensor in _mutable_tensors(module)]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, content in kept:
                tensor.copy_(content)


def _mutable_tensors(module: nn.Module) -> list[Tensor]:
    """Return buffers and metric states, each once, without expanded ones: those cannot be written in place."""
    torchmetrics = sys.modules.get("torchmetrics")
    found: dict[int, Tensor] = {}
    for part in module.modules():
        values = list(part._buffers.values())
        if torchmetrics is not None and isinstance(part, torchmetrics.Metric):
            values += list(vars(part).values())
        found |= {id(value): value for value in values if isinstance(value, Tensor) and not _overlaps(value)}
    return list(found.values())


def _overlaps(tensor: Tensor) -> bool:
    """Return whether several entries of an expanded tensor share memory."""
    if tensor.layout != torch.strided:
        return False
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@contextmanager
def preserved_attributes(module: nn.Module) -> Iterator[None]:
    """Put back what attributes of `module` and its parts refer to, and what lists, dicts, sets and deques hold.

    That covers counters, lists of outputs, buffers replaced by new tensors, and the bookkeeping of torchmetrics.
    It goes one level deep: a list inside a dict, or a tensor that is no buffer and is edited in place, stays edited.
    """
    kept = [(part, _attributes(part)) for part in module.modules()]
    contents = [(value, copy(value)) for _, values in kept for value in values.values() if type(value) in _CONTAINERS]
    try:
        yield
    finally:
        for value, content in contents:
            _refill(value, content)
        for part, values in kept:
            for name in _attributes(part).keys() - values.keys():
                del vars(part)[name]
            vars(part).update(values)


def _attributes(part: nn.Module) -> dict[str, Any]:
    """Return the attributes of one module that a forward may write."""
    return {name: value for name, value in vars(part).items() if name not in _PLUMBING}


def _refill(container: Any, content: Any) -> None:
    """Give `container` the elements of `content`, its shallow copy (modified in place)."""
    container.clear()
    if isinstance(container, list | deque):
        container.extend(content)
    else:
        container.update(content)


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
    module._soaa_in_trial = True
    try:
        yield
    finally:
        module._soaa_in_trial = False
        trainer.loggers = loggers


@contextmanager
def resharded(module: nn.Module) -> Iterator[None]:
    """Have forwards inside, and those that follow, gather sharded parameters as they are then."""
    reshard(module)
    try:
        yield
    finally:
        reshard(module)


@contextmanager
def trial(module: Any, trainer: Any) -> Iterator[None]:
    """Evaluate `module` without gradients and without a trace: streams, buffers, metrics, attributes, logs.

    The module stays in train mode. To replay a forward, the body sets the streams with :func:`set_random`.

    Does not undo in-place edits of the batch, files written, or changes to objects outside of the module.
    """
    with (
        torch.no_grad(),
        resharded(module),
        preserved_random(module.device),
        preserved_attributes(module),
        preserved_tensors(module),
        silenced(module, trainer),
    ):
        yield


def own_containers(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return `arguments` with lists and dicts copied one level deep, so that a pop in a forward does not reach them."""
    return tuple(copy(argument) if type(argument) in _CONTAINERS else argument for argument in arguments)


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
