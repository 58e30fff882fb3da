"""Replays a forward pass: the same dropout masks, the same buffers, and nothing left behind."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Replay:
    """Remembers torch's random stream and a model's buffers as they are before the forward pass of a step."""

    def __init__(self, model: nn.Module):
        self._buffers = list(model.buffers())
        self.mark()

    def _state(self) -> tuple[Tensor, list[Tensor]]:
        return torch.get_rng_state(), [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def _restore(self, state: tuple[Tensor, list[Tensor]]) -> None:
        torch.set_rng_state(state[0])
        for buffer, old in zip(self._buffers, state[1], strict=True):
            buffer.copy_(old)

    def mark(self) -> None:
        """Remember the state that the next forward pass starts from."""
        self._marked = self._state()

    def rewind(self) -> None:
        """Go back to the marked state."""
        self._restore(self._marked)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run the body from the marked state, then return to the state found on entry."""
        entry = self._state()
        self.rewind()
        try:
            yield
        finally:
            self._restore(entry)
