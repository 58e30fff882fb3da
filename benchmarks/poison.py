"""Batches that should never have been seen."""

import torch
from torch import Tensor

from benchmarks.data import Batch

KINDS = ("inputs", "gradients", "nan", "scattered", "scattered nan")
SCATTERED = KINDS[3:]
OFFSETS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30, 50)


def poisoned_steps(kind: str, steps: int, seed: int) -> set[int]:
    """Return the steps whose batch is poisoned: one half-way, or a random hundredth of all where they are scattered."""
    if not kind:
        return set()
    if kind not in KINDS:
        raise ValueError(f"benchmarks: no poison {kind!r}; there are {', '.join(KINDS)}")
    if kind not in SCATTERED:
        return {steps // 2}
    generator = torch.Generator().manual_seed(seed + 77)
    return set(torch.randperm(steps, generator=generator)[: max(1, steps // 100)].tolist())


def spoil_inputs(batch: Batch, seed: int) -> Batch:
    """Return `batch` with inputs times 100 and wrong labels, or with random tokens where the inputs are tokens."""
    generator = torch.Generator().manual_seed(seed)
    first, *rest = batch
    if first.is_floating_point():
        first = first * 100
    else:
        first = torch.randint(0, int(first.max()) + 1, first.shape, generator=generator)
    return (first, *(_wrong(target) for target in rest))


def _wrong(target: Tensor) -> Tensor:
    return -10 * target if target.is_floating_point() else (target + 1) % (int(target.max()) + 1)


def spoil_gradients(params: list[Tensor], factor: float = 100.0) -> None:
    """Multiply every gradient by `factor` (modified in place)."""
    for param in params:
        if param.grad is not None:
            param.grad.mul_(factor)
