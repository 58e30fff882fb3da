"""Torch's FullyShardedDataParallel (FSDP1): which parameters it holds in parts, and the copies that it has gathered.

It has no public way to ask for either. Private names used here: ``_handle`` and ``_is_root`` of its modules; of a
handle, ``flat_param``, ``process_group``, ``uses_sharded_strategy`` and ``needs_unshard``; of a flat parameter,
``_params`` and ``_numels``; the mark ``_fsdp_flattened`` of parameters; ``_reshard`` of its ``_runtime_utils``.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_soaa._dist import Shards, world_size

_PACKAGE = "torch.distributed.fsdp"


@dataclass(frozen=True)
class Part:
    """A parameter of which this process holds a flat part, which may be empty.

    Args:
        shards: the process groups over which its coordinates are spread; empty where each process holds all of them.
        coordinates: their number.
    """

    shards: Shards
    coordinates: int


Parts = Mapping[Tensor, Part]


def wrapper_class() -> Any:
    """Return FullyShardedDataParallel, or what nothing is an instance of where it has not been imported."""
    package: Any = sys.modules.get(_PACKAGE)
    return () if package is None else package.FullyShardedDataParallel


def parts_of(module: nn.Module) -> dict[Tensor, Part]:
    """Return the parameters that FullyShardedDataParallel has flattened in `module`, which may be one.

    Raises:
        RuntimeError: this release of torch keeps them in another way.
        ValueError: they are not there any more, but for the flat one that they have been made.
    """
    kind, parts = wrapper_class(), dict[Tensor, Part]()
    with _known_release():
        for handle in [part._handle for part in module.modules() if isinstance(part, kind)]:
            if handle is None:
                continue
            flat, shards = handle.flat_param, (handle.process_group,) if handle.uses_sharded_strategy else ()
            if flat._params is None:
                raise ValueError(
                    "SOAA: `FullyShardedDataParallel(use_orig_params=...)` must be True, got False; portions go by "
                    "parameters, of which a flat one knows nothing"
                )
            parts |= {p: Part(shards, size) for p, size in zip(flat._params, flat._numels, strict=True)}
    return parts


def is_flattened(param: Tensor) -> bool:
    """Return whether FullyShardedDataParallel has flattened a parameter."""
    return bool(getattr(param, "_fsdp_flattened", False))


def free_gathered(module: nn.Module) -> None:
    """Have the next forward gather the parameters anew where FullyShardedDataParallel has left gathered ones behind.

    After a forward without gradients it keeps those of the outermost part, or of all, until the next backward.

    Raises:
        RuntimeError: this release of torch does so in another way.
    """
    kind = wrapper_class()
    if world_size() == 1:  # nothing is in parts then
        return
    with _known_release():
        for part in module.modules():
            if isinstance(part, kind) and part._handle is not None and part._is_root is not None:  # has run a forward
                handle = part._handle
                if handle.uses_sharded_strategy and not handle.needs_unshard():
                    sys.modules[f"{_PACKAGE}._runtime_utils"]._reshard(part, handle, True)


@contextmanager
def _known_release() -> Iterator[None]:
    """Say what is wrong where a release of torch has not the private names."""
    try:
        yield
    except AttributeError as error:
        raise RuntimeError(
            f"SOAA: torch {torch.__version__} keeps the parts of FullyShardedDataParallel in a way that is not known "
            "here; use ModelParallelStrategy, which is FSDP2"
        ) from error
