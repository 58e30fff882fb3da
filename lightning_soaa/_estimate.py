"""What the optimizer asks of a Fisher estimate. Tensors only: no loss is known here."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from lightning_soaa._bucket import Bucket, Pace, divide, side_by_side

MOMENT = "m"
SQUARE = "v"

Unit: TypeAlias = Tensor | float | None
# Which parameters of the step, and something of each, shape (n,).
Slopes: TypeAlias = tuple[list[int], Tensor]


class Fishers(Protocol):
    """The Fisher of each parameter group: one for all, or several."""

    @property
    def rotates(self) -> bool:
        """Return whether one of them has coordinates of its own."""

    def of(self, group: int) -> "AbstractFisher":
        """Return the Fisher of a parameter group."""


class AbstractFisher(ABC):
    """What the optimizer asks of a Fisher estimate: coordinates, and a diagonal in them. It sees no loss."""

    # Whether it may be asked of parts of tensors, and of several in one.
    elementwise: ClassVar[bool] = False

    @property
    def compiles(self) -> bool:
        """Return whether it has a compiled step, :meth:`stride`."""
        return False

    @property
    def rotates(self) -> bool:
        """Return whether it has coordinates of its own, see :meth:`turn`."""
        return False

    def of(self, group: int) -> "AbstractFisher":
        """Return the Fisher of a parameter group: itself for all."""
        return self

    @abstractmethod
    def init(self, param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the fresh state of one real parameter, in `dtype`; the same keys for every parameter."""

    def lay_out(self, states: Sequence[dict[str, Any]]) -> None:
        """Move tensors side by side where they are worked on as one (`states`, of parameters in order, modified)."""
        for name in states[0] if states and self.elementwise else ():
            if isinstance(states[0][name], Tensor):
                for each, tensor in zip(states, side_by_side([each[name] for each in states]), strict=True):
                    each[name] = tensor

    def blocks(self, bucket: Bucket, *, whole: bool = False) -> list[Bucket]:
        """Return the bucket in the parts that are worked on one by one; with `whole`, for the compiled step."""
        return divide(bucket, whole=whole) if self.elementwise else [bucket]

    @abstractmethod
    def update(self, bucket: Bucket, ok: Tensor | None) -> None:
        """Absorb the bucket's gradients where `ok`, None for true (step 1; the state is modified in place)."""

    def turn(self, bucket: Bucket, ok: Tensor | None) -> None:  # noqa: B027  (most have no coordinates of their own)
        """Let its own coordinates follow the gradients where `ok`, once the step is over; nothing if it has none.

        Moments and frame are modified in place.
        """

    def rotation(self, bucket: Bucket) -> tuple[int, list[Tensor]]:
        """Return how many coordinates of the bucket are rotated, and steps since each of their bases was refreshed."""
        return 0, []

    @abstractmethod
    def square(self, bucket: Bucket) -> Tensor:
        """Return ``sum(vh)`` over the bucket, 0-d."""

    @abstractmethod
    def sums(self, bucket: Bucket) -> Tensor:
        """Return ``[sum(mh^2), sum(vh), eps n]`` over the bucket's n coordinates (the sums of step 3), shape (3,)."""

    @abstractmethod
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
        """Return u of step 5 for each parameter of the bucket, zero where not `ok`.

        Args:
            bucket: its moments are read.
            scale: c of step 3, 0-d; None leaves F out.
            ok: 0-d bool; None for true.
            radius: d.
            unit: what eps is a multiple of, a number or 0-d; None for 1.
            cautious: coordinates on which u does not descend along the bucket's gradients are zero.
            marked: those that :meth:`mark` has not marked are zero.
        """

    def mark(self, bucket: Bucket) -> None:
        """Keep which coordinates moved in a check, for what :meth:`direction` calls `marked`.

        The moments have absorbed the gradients, and are modified in place.

        Raises:
            NotImplementedError: it cannot; rules with fresh slopes ask for it.
        """
        raise NotImplementedError

    def advance(self, bucket: Bucket, ok: Tensor | None, radius: float, unit: Unit, *, cautious: bool) -> list[Tensor]:
        """Do :meth:`update` and return :meth:`direction` without a scale."""
        self.update(bucket, ok)
        return self.direction(bucket, None, ok, radius, unit, cautious=cautious)

    def strides(self, bucket: Bucket, unit: Unit, pace: Pace) -> bool:
        """Return whether :meth:`stride` takes such a step of the bucket."""
        return False

    def stride(
        self, bucket: Bucket, ok: Tensor | None, radius: float, unit: Unit, pace: Pace
    ) -> tuple[Tensor, list[Slopes]]:
        """Do :meth:`advance` and move the parameters, at one go (parameters and state are modified in place).

        Returns:
            The squared norm of the step, 0-d, and ``lr g . u`` for each parameter, if it is asked for.

        Raises:
            NotImplementedError: it has no such form, see :meth:`strides`.
        """
        raise NotImplementedError

    @abstractmethod
    def model_reduction(self, bucket: Bucket, directions: Sequence[Tensor]) -> Tensor:
        """Return ``sum(mh u) - 1/2 sum(vh u^2)`` over the bucket (step 10 without its lr), 0-d."""

    @abstractmethod
    def statistics(self, bucket: Bucket, scale: Tensor, radius: float) -> Tensor:
        """Return ``[min, max, sum, number of coordinates that F limits]`` of F over a non-empty bucket, shape (4,).

        F limits a coordinate where ``d F > sqrt(vh)`` (step 4): there the model binds, not the radius.
        """
