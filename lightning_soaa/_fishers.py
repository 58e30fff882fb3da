"""A Fisher for each parameter group."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_soaa._bucket import Bucket, Pace
from lightning_soaa._checks import refuse
from lightning_soaa.fisher import AbstractFisher, Slopes, Unit


def check_fisher(fisher: object, *, compiled: bool) -> None:
    """Check a Fisher that an optimizer or one of its groups is given.

    Raises:
        TypeError: it is none.
        ValueError: steps are to be compiled, and it has no compiled one.
    """
    if not isinstance(fisher, AbstractFisher):
        refuse("SOAA", "fisher", "a Fisher estimate such as DiagonalFisher()", fisher, TypeError)
    if compiled and not fisher.compiles:
        refuse("SOAA", "compile", f"False with {type(fisher).__name__}", compiled)


def joint_fisher(default: AbstractFisher, own: Sequence[AbstractFisher | None], groups: int) -> AbstractFisher:
    """Return the Fisher of all groups: the default, unless a group has one of its own.

    Args:
        default: of groups without one.
        own: by the index of the group; None, or nothing, for the default.
        groups: their number.
    """
    if all(fisher is None for fisher in own):
        return default
    padded = [*own, *[None] * (groups - len(own))]
    return GroupFishers(tuple(default if fisher is None else fisher for fisher in padded))


@dataclass(frozen=True)
class GroupFishers(AbstractFisher):
    """Several Fishers, each for the buckets of one parameter group.

    Args:
        fishers: by the index of the group.
    """

    fishers: tuple[AbstractFisher, ...]

    @property
    def compiles(self) -> bool:
        """Return whether all have a compiled step."""
        return all(each.compiles for each in self.fishers)

    @property
    def rotates(self) -> bool:
        """Return whether one of them has coordinates of its own."""
        return any(each.rotates for each in self.fishers)

    def of(self, group: int) -> AbstractFisher:
        """Return the Fisher of a parameter group."""
        return self.fishers[group]

    def init(self, param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Raise: state is made by the Fisher of a group.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError

    def blocks(self, bucket: Bucket, *, whole: bool = False) -> list[Bucket]:
        """Return the bucket in the parts that are worked on one by one."""
        return self.of(bucket.group).blocks(bucket, whole=whole)

    def update(self, bucket: Bucket, ok: Tensor | None) -> None:
        """Absorb the bucket's gradients where `ok`."""
        self.of(bucket.group).update(bucket, ok)

    def turn(self, bucket: Bucket, ok: Tensor | None) -> None:
        """Let the coordinates of the bucket's Fisher follow the gradients where `ok`."""
        self.of(bucket.group).turn(bucket, ok)

    def square(self, bucket: Bucket) -> Tensor:
        """Return ``sum(vh)`` over the bucket, 0-d."""
        return self.of(bucket.group).square(bucket)

    def sums(self, bucket: Bucket) -> Tensor:
        """Return ``[sum(mh^2), sum(vh), eps n]`` over the bucket's n coordinates, shape (3,)."""
        return self.of(bucket.group).sums(bucket)

    def direction(
        self,
        bucket: Bucket,
        scale: Tensor | None,
        ok: Tensor | None,
        radius: float,
        unit: Unit = None,
        *,
        cautious: bool = False,
        marked: bool = False,
    ) -> list[Tensor]:
        """Return u of step 5 for each parameter of the bucket, zero where not `ok`."""
        return self.of(bucket.group).direction(bucket, scale, ok, radius, unit, cautious=cautious, marked=marked)

    def mark(self, bucket: Bucket) -> None:
        """Keep which coordinates moved in a check."""
        self.of(bucket.group).mark(bucket)

    def advance(self, bucket: Bucket, ok: Tensor | None, radius: float, unit: Unit, *, cautious: bool) -> list[Tensor]:
        """Do :meth:`update` and return :meth:`direction` without a scale."""
        return self.of(bucket.group).advance(bucket, ok, radius, unit, cautious=cautious)

    def strides(self, bucket: Bucket, unit: Unit, pace: Pace) -> bool:
        """Return whether :meth:`stride` takes such a step of the bucket."""
        return self.of(bucket.group).strides(bucket, unit, pace)

    def stride(
        self, bucket: Bucket, ok: Tensor | None, radius: float, unit: Unit, pace: Pace
    ) -> tuple[Tensor, list[Slopes]]:
        """Do :meth:`advance` and move the parameters, at one go."""
        return self.of(bucket.group).stride(bucket, ok, radius, unit, pace)

    def model_reduction(self, bucket: Bucket, directions: Sequence[Tensor]) -> Tensor:
        """Return ``sum(mh u) - 1/2 sum(vh u^2)`` over the bucket, 0-d."""
        return self.of(bucket.group).model_reduction(bucket, directions)

    def statistics(self, bucket: Bucket, scale: Tensor, radius: float) -> Tensor:
        """Return ``[min, max, sum, number of coordinates that F limits]`` of F over a non-empty bucket, shape (4,)."""
        return self.of(bucket.group).statistics(bucket, scale, radius)

    def rotation(self, bucket: Bucket) -> tuple[int, list[Tensor]]:
        """Return how many coordinates of the bucket are rotated, and the ages of their bases."""
        return self.of(bucket.group).rotation(bucket)
