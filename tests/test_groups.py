"""Parameter groups: what a new optimizer takes from them, and how far decay goes."""

import pytest
import torch
from problems import RULES, Problem, assert_same
from torch import nn

from lightning_soaa import SOAA, FixedRadius, RatioRadius


@pytest.mark.parametrize("rule", RULES)
def test_new_optimizer_on_the_groups_of_an_old_one_starts_afresh(rule):
    old, fresh = Problem(rule, grouped=True, lr=0.02), Problem(rule, grouped=True, lr=0.02)
    old.run(20)
    start = fresh.facts()
    for mine, theirs in zip(fresh.params, old.params, strict=True):
        theirs.data.copy_(mine.data)
    old.optimizer = SOAA(old.optimizer.param_groups, radius=RULES[rule])
    assert_same(start, old.facts())
    old.batch = 0
    assert_same(fresh.run(5).facts(), old.run(5).facts())


def test_options_and_keys_of_the_users_carry_over_and_the_numbers_of_the_run_do_not():
    old = Problem("ratio", lr=0.02).run(3)
    kept = {"name": "body", "initial_lr": 0.04, "max_lr": 0.08, "weight_decay": 0.3, "betas": (0.5, 0.6)}
    old.optimizer.param_groups[0].update(kept)
    source = dict(old.optimizer.param_groups[0])
    first = SOAA([source], radius=FixedRadius(3.0)).param_groups[0]
    assert {key: first[key] for key in kept} == kept
    assert (first["radius"], first["radius_rule"], first["steps"], first["lr_unit"]) == (3.0, "FixedRadius", 0, 0.0)
    assert not any(key.startswith("rule_") for key in first)
    x = nn.Parameter(torch.ones(1))
    later = SOAA([x])
    later.add_param_group({**source, "params": old.params})
    assert later.param_groups[1].keys() == {
        "params", "lr", "betas", "eps", "weight_decay", "foreach", "fused", "maximize", "base_lr", "group_radius",
        "name", "initial_lr", "max_lr",
    }  # fmt: skip
    assert later.param_groups[1]["base_lr"] == 0.02


def test_group_given_to_the_optimizer_is_not_written_to():
    group = {"params": [nn.Parameter(torch.ones(1))], "lr": 0.1}
    SOAA([group])
    assert group.keys() == {"params", "lr"}


def test_tensor_lr_on_the_cpu_stays_the_users_tensor():
    lr = torch.tensor(0.25)
    optimizer = Problem("ratio", lr=lr).run(3).optimizer
    assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_tensor_lr_on_an_accelerator_becomes_a_number():
    x, y = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    device = torch.accelerator.current_accelerator()
    optimizer = SOAA([x], lr=torch.tensor(0.25, device=device))
    optimizer.add_param_group({"params": [y], "lr": torch.tensor(0.5, device=device)})
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]
    assert [type(group["lr"]) for group in optimizer.param_groups] == [float, float]


@pytest.mark.parametrize("foreach", [True, False])
def test_weight_decay_takes_no_more_than_the_parameters_however_large_the_radius(foreach):
    x = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    optimizer = SOAA([x], weight_decay=0.5, radius=RatioRadius(), foreach=foreach)
    optimizer.param_groups[0].update(radius=1e9, rule_phase=0, unchecked_steps=0)
    x.grad = torch.zeros_like(x)
    x.grad[0] = 1e-12
    optimizer.step(lambda: 1.0, loss_closure=lambda: 1.0)
    assert not optimizer.last_step.checked
    assert x[1:].tolist() == [0.0, 0.0]


def test_weight_decay_of_rules_that_keep_the_learning_rate_is_that_of_adamw():
    x = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    optimizer = SOAA([x], lr=3.0, weight_decay=1.0, radius=FixedRadius())
    x.grad = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    optimizer.step()
    assert x[1:].tolist() == [-4.0, -4.0]
