"""A Fisher for each parameter group."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_soaa._checks import refuse
from lightning_soaa._estimate import AbstractFisher, Fishers


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


def joint_fisher(default: AbstractFisher, own: Sequence[AbstractFisher | None], groups: int) -> Fishers:
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
class GroupFishers:
    """Several Fishers, each for the buckets of one parameter group.

    Args:
        fishers: by the index of the group.
    """

    fishers: tuple[AbstractFisher, ...]

    @property
    def rotates(self) -> bool:
        """Return whether one of them has coordinates of its own."""
        return any(each.rotates for each in self.fishers)

    def of(self, group: int) -> AbstractFisher:
        """Return the Fisher of a parameter group."""
        return self.fishers[group]
