"""One thread for all tests: the problems are small, and on a busy machine threads that wait for each other are slow."""

import pytest
import torch

from lightning_soaa import _bucket, _describe, _proposal, _sums, _unread, fisher

torch.set_num_threads(1)


@pytest.fixture
def accelerator(monkeypatch):
    """Has the optimizer take the CPU for a device that the host would have to wait for."""
    for module in (_bucket, _describe, _proposal, _sums, _unread, fisher):
        monkeypatch.setattr(module, "on_host", lambda device: False)
