"""What a module holds beside the parameters that it trains, kept so that it can be put back.

Two kinds: what attributes refer to, and the contents of tensors that a forward may edit in place.
"""

import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_soaa._dist import is_sharded, local
from lightning_soaa._flat import wrapper_class

# Attributes that every torch module has and no forward writes, so that they need not be looked at.
_PLUMBING = frozenset(vars(nn.Module())) - {"_buffers", "training"}
_OWN = "_soaa"  # what names of the mixin's own attributes begin with
CONTAINERS = frozenset({list, dict, set, deque, OrderedDict, defaultdict, Counter})
# Of these, to keep the reference is enough.
_PLAIN = frozenset({bool, int, float, str, tuple, type(None), torch.dtype, torch.device})
_TENSORS = frozenset({Tensor, nn.Parameter})


class Attributes:
    """What attributes of a module and its parts refer to, and what lists, dicts, sets and deques among them hold.

    That covers counters, hidden states, lists of outputs, buffers replaced by new tensors, the bookkeeping of
    torchmetrics, and where random generators stand: torch's, numpy's, python's. It goes one level deep: a list inside a
    dict stays edited.

    Args:
        module: whose attributes are kept as they are now: references, and shallow copies of containers.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parts: list[tuple[nn.Module, tuple[str, ...], dict[str, Any]]] = []
        self._contents: list[tuple[Any, Any]] = []
        self._streams: list[tuple[Callable[[Any], Any], Any]] = []
        plumbing = wrapper_class()  # torch counts on its own attributes there from one forward to the next
        for part in module.modules():
            if isinstance(part, plumbing):
                continue
            own = vars(part)
            names = tuple(own)
            kept = {name: own[name] for name in _writable_names(names)}
            self.parts.append((part, names, kept))
            for value in kept.values():
                kind = type(value)
                if kind in CONTAINERS:
                    self._contents.append((value, value.copy()))
                elif kind not in _PLAIN and kind not in _TENSORS:
                    self._streams += _stream(value)

    def put_back(self) -> None:
        """Give the module these attributes, and no others."""
        for container, content in self._contents:
            _refill(container, content)
        for put, state in self._streams:
            put(state)
        for part, names, kept in self.parts:
            own = vars(part)
            if (now := tuple(own)) != names:
                for name in set(_writable_names(now)) - kept.keys():
                    del own[name]
            own.update(kept)


@lru_cache(maxsize=1024)
def _writable_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return which of the attributes of one module a forward may write."""
    return tuple(name for name in names if name not in _PLUMBING and not name.startswith(_OWN))


def _refill(container: Any, content: Any) -> None:
    """Give `container` the elements of `content`, its shallow copy (modified in place)."""
    container.clear()
    if isinstance(container, list | deque):
        container.extend(content)
    else:
        container.update(content)


def _stream(value: Any) -> list[tuple[Callable[[Any], Any], Any]]:
    """Return what puts a random generator back, and the state to put back; nothing for all else."""
    numpy: Any = sys.modules.get("numpy")
    if isinstance(value, torch.Generator):
        put: Callable[[Any], Any] = value.set_state
        return [(put, value.get_state())]
    if isinstance(value, Random):
        return [(value.setstate, value.getstate())]
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return [(partial(setattr, value.bit_generator, "state"), value.bit_generator.state)]
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return [(value.set_state, value.get_state())]
    return []


class Contents:
    """Copies of what `tensors` hold.

    Contents are copied, since native batch normalisation leaves no trace in a tensor's version counter, nor does an
    edit of ``.data``.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        with torch.no_grad():
            self._kept = [(tensor, tensor.clone()) for tensor in tensors]

    def put_back(self) -> None:
        """Give the tensors their contents again, in place, unseen by their version counters.

        A graph that is kept for a later backward may hold the tensors; to it nothing has changed.
        """
        with torch.no_grad():
            for tensor, content in self._kept:
                tensor.data.copy_(content)


def edited_tensors(attributes: Attributes) -> tuple[list[Tensor], list[Tensor]]:
    """Return tensors that a forward may edit in place, each once: those to be copied, and those that are too large.

    Always copied are buffers and what torchmetrics' metrics keep. Parameters that are not trained, such as a teacher's,
    and tensors that are attributes are copied, the smallest first, as long as they take no more memory than the trained
    parameters. What is beyond that, such as a pretrained part that is frozen, rarely moves.

    Left out are expanded tensors, which cannot be written in place, lazy ones that have no shape yet, and, but for
    buffers, those of tensor subclasses or sparse.

    Args:
        attributes: those of the module.
    """
    torchmetrics = sys.modules.get("torchmetrics")
    metric = torchmetrics.Metric if torchmetrics is not None else ()
    always: dict[int, Tensor] = {}
    others: dict[int, Tensor] = {}
    trained: dict[int, int] = {}
    for part, _, own in attributes.parts:
        kept = always if isinstance(part, metric) else others
        for value in own.values():
            if type(value) not in _PLAIN and isinstance(value, Tensor):
                kept[id(value)] = value
        for value in part._buffers.values():
            if value is not None:
                always[id(value)] = value
        for value in part._parameters.values():
            if value is not None and value.requires_grad:
                trained[id(value)] = 0 if is_lazy(value) else value.nbytes
            elif value is not None:
                others[id(value)] = value
    budget = sum(trained.values())
    copied: list[Tensor] = [value for value in always.values() if _writable(value)]
    large: list[Tensor] = []
    found = [value for key, value in others.items() if key not in always and _copyable(value) and _writable(value)]
    for tensor in sorted(found, key=lambda tensor: tensor.nbytes):
        budget -= tensor.nbytes
        (copied if budget >= 0 else large).append(tensor)
    return copied, large


def _writable(tensor: Tensor) -> bool:
    """Return whether a tensor can be written in place here: not expanded, not lazy, not made in inference mode."""
    if is_lazy(tensor) or tensor.is_inference():
        return False
    if tensor.layout != torch.strided:
        return True
    return all(stride != 0 or size <= 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _copyable(tensor: Tensor) -> bool:
    """Return whether a tensor has no gradients, and is of a kind whose copy is just a copy."""
    if tensor.layout != torch.strided:
        return False
    return not tensor.requires_grad and (type(tensor) in _TENSORS or is_sharded(tensor))


class Marks:
    """What shows that one of `tensors` has been edited, or has been given other memory, without a look at its content.

    An edit of ``.data`` in place does not show.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._marks = [(tensor, _mark(tensor)) for tensor in tensors]

    def changed(self) -> list[Tensor]:
        """Return the tensors that have been edited since."""
        return [tensor for tensor, mark in self._marks if _mark(tensor) != mark]


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Return version counter and address."""
    here = local(tensor)
    return here._version, here.data_ptr()
