"""Processes with different numbers of batches: refused on all of them before any waits for another."""

from typing import Any, NoReturn

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_soaa import _compat
from lightning_soaa._dist import mean_over_ranks
from lightning_soaa._setup import refuse

# What is left of an epoch after a process has asked for a batch: there was none, it was the last, there is another.
NONE, LAST, MORE = 0, 1, 2


def refuse_uneven(trainer: Any) -> None:
    """Refuse processes that have different numbers of batches, at the start of an epoch. All must ask.

    Where one of them has a loader that does not know its length, or may be wrong about it, they compare at each batch.

    Raises:
        ValueError: as said, on all of them.
    """
    if trainer.world_size == 1:
        return
    counts = _of_ranks(float(trainer.num_training_batches), trainer)
    surely = _of_ranks(all(_knows_its_length(loader) for loader in _compat.loaders_of(trainer)), trainer)
    if not all(surely):
        _compat.replace_fetcher(trainer, lambda fetcher: _watched(fetcher, trainer))
    elif min(counts) != max(counts):
        least, most = min(counts), max(counts)
        _refuse(
            f"{most:g} in process {counts.index(most)} and {least:g} in process {counts.index(least)}",
            f"leave use_distributed_sampler=True, which evens them out, or set Trainer(limit_train_batches={least:g})",
        )


def _of_ranks(value: float, trainer: Any) -> list[float]:
    """Return the `value` of each process, which waits for all of them."""
    values = torch.zeros(trainer.world_size, device=trainer.strategy.root_device)
    values[trainer.global_rank] = value * trainer.world_size
    found: list[float] = mean_over_ranks(values).tolist()
    return found


def _refuse(found: str, remedy: str) -> NoReturn:
    """Refuse what has been found."""
    refuse(
        "train_dataloader",
        "one that gives each process as many batches",
        found,
        f"those that go on would wait for the one that has ended: {remedy}",
    )


def _knows_its_length(loader: Any) -> bool:
    """Return whether a loader is sure to give as many batches as its length says."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def _watched(fetcher: Any, trainer: Any) -> Any:
    """Return what the epoch's batches are taken from, so that processes compare what is left at each."""
    kind = type(fetcher)
    if issubclass(kind, _Watched):
        return fetcher
    watching: Any = type(kind.__name__, (_Watched, kind), {"_soaa_trainer": trainer})
    watched = watching.__new__(watching)
    vars(watched).update(vars(fetcher))
    return watched


class _Watched:
    """What an epoch takes its batches from, where all processes end together or all raise.

    The one place that each of them comes to for each batch and once more where a loader ends unforeseen.
    """

    _soaa_trainer: Any
    done: bool

    def __next__(self) -> Any:
        try:
            batch = super().__next__()  # type: ignore[misc]
        except StopIteration:
            _refuse_unequal(self._soaa_trainer, NONE)
            raise
        _refuse_unequal(self._soaa_trainer, LAST if self.done else MORE)
        return batch


def _refuse_unequal(trainer: Any, left: int) -> None:
    """Refuse processes of which one has come to the end and another has not.

    Raises:
        ValueError: as said, on all of them.
    """
    all_left = _of_ranks(left, trainer)
    least, most = min(all_left), max(all_left)
    if least != most:
        count = _compat.batches_taken(trainer) + int(least)
        limit = f"set Trainer(limit_train_batches={count}), or " if count else ""
        _refuse(
            f"{count} in process {all_left.index(least)} and more in process {all_left.index(most)}",
            f"{limit}have the loaders end together",
        )


def refuse_join(trainer: Any) -> None:
    """Refuse torch's Join, whose stand-in for a process without batches takes no part in the radius.

    Raises:
        ValueError: as said.
    """
    if _compat.joins(trainer):
        refuse(
            "torch.distributed.algorithms.Join",
            "left out",
            "a model inside of one",
            "a process that has run out of batches has no loss to decide by: give each process as many batches, as "
            "Trainer(use_distributed_sampler=True) does",
        )
