"""State dicts: what is refused before anything changes, and what loading has to put right."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lightning_soaa._checks import check_count, check_nonnegative, check_positive, refuse
from lightning_soaa._estimate import AbstractFisher, Fishers
from lightning_soaa._state import (
    COUNTERS,
    GATE,
    GRADIENT_RMS,
    LAST_PORTION,
    LR_UNIT,
    PORTION,
    PORTIONS,
    RADIUS,
    RULE,
    RULE_NAME,
    STEP,
    as_real,
    check_options,
    state_dtype,
)
from lightning_soaa.gate import SIZE
from lightning_soaa.radius import AbstractRadius


@contextmanager
def loading(optimizer: Optimizer, state_dict: dict[str, Any], rule: AbstractRadius, fisher: Fishers) -> Iterator[None]:
    """Check what `optimizer` loads inside before it changes, and give it back the precision that torch takes from it.

    Raises:
        TypeError: `state_dict` or a part of it has the wrong type.
        ValueError: it does not fit, see :func:`check_loadable`.
    """
    check_dict("state_dict", state_dict)
    incoming: dict[str, Any] = {}

    def take(_: Optimizer, final: dict[str, Any]) -> None:
        check_loadable(final, optimizer.param_groups, optimizer.defaults, rule, fisher)
        incoming.update(final)

    handle = optimizer.register_load_state_dict_pre_hook(take)
    try:
        yield
    finally:
        handle.remove()
    restore_precision(incoming, optimizer.param_groups, optimizer.state)


def check_loadable(
    incoming: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any],
    rule: AbstractRadius,
    fisher: Fishers,
) -> None:
    """Refuse a state dict that is not SOAA's, is of another radius rule, or does not fit the parameters of `groups`.

    How many groups and parameters there are is left to torch to check. Options that a group lacks are `defaults`.

    Raises:
        TypeError: a part of it has the wrong type; nothing has been changed.
        ValueError: as said; nothing has been changed.
    """
    if not {"state", "param_groups"} <= incoming.keys():
        refuse("SOAA", "state_dict", "one with `state` and `param_groups`", sorted(incoming))
    saved = incoming["param_groups"]
    check_dict("state_dict['state']", incoming["state"])
    if not isinstance(saved, list | tuple):
        refuse("SOAA", "state_dict['param_groups']", "a list of dicts", type(saved).__name__, TypeError)
    for index, group in enumerate(saved):
        check_dict(f"state_dict['param_groups'][{index}]", group)
    head: Mapping[str, Any] = saved[0] if saved else {}
    if RADIUS not in head:
        refuse("SOAA", "state_dict", f"SOAA's own, with `{RADIUS}` in its first group", sorted(head))
    for index, group in enumerate(saved):
        if not {"lr", "params"} <= group.keys():
            refuse("SOAA", f"state_dict['param_groups'][{index}]", "a group with `lr` and `params`", sorted(group))
        check_options({**defaults, **group})
    name = head.get(RULE_NAME, type(rule).__name__)
    if name != type(rule).__name__:
        refuse("SOAA", "state_dict", f"of radius rule {type(rule).__name__}", name)
    _check_head("state_dict['param_groups'][0]", head)
    extra = PORTIONS if rule.fresh_slopes else {}
    for at, (theirs, mine) in enumerate(zip(saved, groups, strict=False)):
        for index, param in _pairs([theirs], [mine]):
            _check_entry(index, incoming["state"], param, fisher.of(at), extra)


def check_dict(name: str, value: object) -> None:
    """Refuse what is no dict.

    Raises:
        TypeError: as said.
    """
    if not isinstance(value, Mapping):
        refuse("SOAA", name, "a dict", type(value).__name__, TypeError)


def _check_head(who: str, head: Mapping[str, Any]) -> None:
    """Refuse numbers of the first group that no step leaves there; those that it lacks are not missed.

    Raises:
        TypeError: a number is none.
        ValueError: a number is out of range.
    """
    for name in (RADIUS, LR_UNIT):
        check_nonnegative("SOAA", f"{who}['{name}']", head.get(name, 0.0))
    if (unit := head.get(GRADIENT_RMS)) is not None:
        check_nonnegative("SOAA", f"{who}['{GRADIENT_RMS}']", unit)
    for name, fresh in COUNTERS.items():
        if isinstance(fresh, int):
            check_count("SOAA", f"{who}['{name}']", head.get(name, fresh), 0)
    for name, value in head.items():
        if name.startswith(RULE) and (isinstance(value, bool) or not isinstance(value, Real)):
            refuse("SOAA", f"{who}['{name}']", "a real number", value, TypeError)
    gate = head.get(GATE, ())
    if not isinstance(gate, list | tuple) or len(gate) not in (0, SIZE):
        refuse("SOAA", f"{who}['{GATE}']", f"empty or of {SIZE} numbers", gate)


def restore_precision(
    incoming: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, dict[str, Any]]
) -> None:
    """Copy floating state from the `incoming` state dict again in the state's own dtype.

    ``Optimizer.load_state_dict`` casts it to the dtype of the parameter, which rounds float32 moments of a bfloat16
    parameter (`state` is modified in place).
    """
    for index, param in _pairs(incoming["param_groups"], groups):
        for key, value in incoming["state"].get(index, {}).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                state[param][key] = value.to(device=param.device, dtype=state_dtype(param.dtype), copy=True)


def _pairs(saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Any, Tensor]]:
    """Yield the name that a parameter goes by in a state dict, and the parameter; as many as there are of both."""
    for theirs, mine in zip(saved, groups, strict=False):
        yield from zip(theirs["params"], mine["params"], strict=False)


def _check_entry(
    index: Any, state: Mapping[Any, Any], param: Tensor, fisher: AbstractFisher, extra: Mapping[str, float]
) -> None:
    """Refuse the state of one parameter if it is not what a step of SOAA leaves there. No state at all is fine.

    Raises:
        TypeError: it is no dict, or its age is no number.
        ValueError: as said; the text names the parameter.
    """
    if index not in state:
        return
    who, entry = f"state_dict['state'][{index!r}]", state[index]
    check_dict(who, entry)
    if not entry:
        return
    wanted = fisher.init(torch.empty(as_real(param).shape, device="meta"), state_dtype(param.dtype))
    names = {STEP, *wanted, *extra}
    if names != entry.keys():
        refuse("SOAA", who, f"one with {', '.join(f'`{key}`' for key in sorted(names))}", sorted(entry))
    check_count("SOAA", f"{who}['{STEP}']", entry[STEP], 0)
    for key in extra:
        if isinstance(entry[key], bool) or not isinstance(entry[key], Real):
            refuse("SOAA", f"{who}['{key}']", "a real number", entry[key], TypeError)
        if key in (PORTION, LAST_PORTION):
            check_positive("SOAA", f"{who}['{key}']", entry[key])
    for key, like in wanted.items():
        shape = tuple(getattr(entry[key], "shape", ()))
        if shape != tuple(like.shape) or not isinstance(entry[key], Tensor):
            refuse("SOAA", f"{who}[{key!r}]", f"a tensor of shape {tuple(like.shape)}", shape)
        if not entry[key].is_floating_point():
            refuse("SOAA", f"{who}[{key!r}]", "a tensor of floating-point numbers", entry[key].dtype)
