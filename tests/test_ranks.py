"""Two gloo processes: same averaged gradient, different local losses, one decision."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_soaa import SOAA


def run_rank(rank, port, nan_step, folder):
    """Train on averaged gradients and local losses, and save what each step came to."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        x = torch.nn.Parameter(torch.tensor([3.0, -2.0, 1.5], dtype=torch.float64))
        optimizer = SOAA([x], lr=1000.0)  # starts too large, so that the first steps are rejected
        target = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64) * (1 + rank)
        scale = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)
        facts = []
        for step in range(40):

            def loss_closure(step=step):
                loss = (scale * (x - target) ** 2).sum() + torch.cos(3 * x).sum() * (1 + rank)
                return loss * float("nan") if rank == 1 and step == nan_step else loss

            def closure(loss_closure=loss_closure):
                optimizer.zero_grad()
                loss = loss_closure()
                loss.backward()
                x.grad.nan_to_num_()  # so that only the loss of one rank says that something is wrong
                dist.all_reduce(x.grad)
                x.grad /= 2
                return loss

            optimizer.step(closure, loss_closure=loss_closure)
            report = optimizer.last_step
            facts.append((x.detach().clone(), report.radius, report.accepted, report.skipped, report.trials))
        torch.save(facts, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("nan_step", [-1, 7, 35])
def test_two_ranks_hold_identical_parameters_and_take_one_decision(nan_step, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_rank, args=(port, nan_step, str(tmp_path)), nprocs=2)  # raises what a process raises
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (x, *one), (y, *other) in zip(first, second, strict=True):
        assert torch.equal(x, y)
        assert one == other
    assert any(trials > 1 for *_, trials in first)
    assert any(accepted for _, _, accepted, _, _ in first)
    assert [step for step, fact in enumerate(first) if fact[3]] == ([] if nan_step < 0 else [nan_step])
