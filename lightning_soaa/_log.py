"""``self.log`` with arguments that it has been called with before, and a new value.

Lightning's own goes through all that it keeps of a key on each call, which takes several times as long as to enter the
value. What it has found out about a call is kept here, and the value entered where it would enter it.

Private names used here: ``__to_tensor`` and ``_current_fx_name`` of a module; ``_logger_connector`` with
``should_reset_tensors`` and ``_current_fx``; ``_results`` with ``_extract_batch_size``, ``update_metrics`` and
``dataloader_idx``.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_soaa._compat import is_default

_KNOWN = "_soaa_known"  # attribute of what Lightning keeps logged values in


class Call(NamedTuple):
    """One call of ``log``.

    Args:
        place: the hook that it comes from.
        name: the key.
        value: a number or a tensor.
        batch_size: as it was given.
        arguments: place, key and all other arguments.
    """

    place: str
    name: str
    value: Any
    batch_size: int | None
    arguments: tuple[Any, ...]


def log(module: Any, inner: Callable[..., None], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Log as `inner` does, the ``log`` of LightningModule or of a class of the user's.

    Args:
        module: the LightningModule.
        inner: its ``log``, bound.
        args: what it is called with.
        kwargs: likewise.
    """
    call = None if torch.compiler.is_compiling() else _call_of(module, args, kwargs)
    if call is None or not _again(module, call):
        inner(*args, **kwargs)
        if call is not None and is_default(inner):
            _remember(module._trainer, call)


def _call_of(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """Return a call of ``log``; None for one that is not to be remembered."""
    options = dict(kwargs)
    batch_size = options.pop("batch_size", None)
    if not args and options.keys() >= {"name", "value"}:
        args = (options.pop("name"), options.pop("value"))
    if len(args) != 2 or not isinstance(args[1], Tensor | float | int) or options.get("enable_graph"):
        return None
    arguments = (module._current_fx_name, args[0], *options.items())
    try:
        hash(arguments)
    except TypeError:
        return None
    if options.get("logger") and module._trainer is not None and not module._trainer.loggers:
        return None  # of which Lightning warns
    return Call(module._current_fx_name, *args, batch_size, arguments)


def _again(module: Any, call: Call) -> bool:
    """Enter the value of a call that was made before; return False where Lightning has more to do than that."""
    trainer: Any = module._trainer
    results: Any = None if trainer is None else trainer._results
    kept = getattr(results, _KNOWN, {}).get(call.arguments)
    key = f"{call.place}.{call.name}"
    if (
        kept is None
        or results.get(key) is not kept
        or results.dataloader_idx is not None
        or trainer._logger_connector.should_reset_tensors(call.place)
    ):
        return False
    value = module._LightningModule__to_tensor(call.value, call.name)
    if value.device != kept.value.device:
        return False
    results.update_metrics(key, value, results._extract_batch_size(kept, call.batch_size, kept.meta))
    trainer._logger_connector._current_fx = call.place
    return True


def _remember(trainer: Any, call: Call) -> None:
    """Keep where Lightning has entered the value of a call."""
    results = None if trainer is None else trainer._results
    kept = None if results is None else results.get(f"{call.place}.{call.name}")
    if kept is not None:
        vars(results).setdefault(_KNOWN, {})[call.arguments] = kept
