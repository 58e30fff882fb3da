"""The claims of torch's own optimizer tests, for every radius rule, and what they imply for a trust region."""

import copy
import functools
import gc
import subprocess
import sys
import textwrap
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from problems import RULES, Problem, assert_same, drive
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_soaa import SOAA, FixedRadius, PublishedRadius, RatioRadius
from lightning_soaa._bucket import CACHED
from lightning_soaa._state import PORTIONS

# (name, keywords, rule): what torch calls optimizer inputs.
INPUTS = [
    ("fixed", {}, FixedRadius()),
    ("fixed, small", {"lr": 0.01, "weight_decay": 0.1}, FixedRadius(0.3)),
    ("fixed, maximize", {"lr": 0.01, "maximize": True}, FixedRadius()),
    ("published", {"lr": 0.01}, PublishedRadius(30)),
    ("published, decay, maximize", {"lr": 0.01, "weight_decay": 0.1, "maximize": True}, PublishedRadius(30, gamma=0.5)),
    ("ratio", {}, RatioRadius()),
    ("ratio, lr of one", {"lr": 1.0, "betas": (0.5, 0.9), "eps": 1e-6}, RatioRadius(interval=2)),
    ("ratio, decay", {"weight_decay": 0.1}, RatioRadius()),
    ("ratio, maximize", {"maximize": True}, RatioRadius()),
    ("ratio, tensor lr", {"lr": torch.tensor(0.001)}, RatioRadius()),
]
each_input = pytest.mark.parametrize(("kwargs", "rule"), [row[1:] for row in INPUTS], ids=[row[0] for row in INPUTS])
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def noise(*shape, dtype=torch.float64, seed=0):
    real = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (
        torch.view_as_complex(real).to(dtype)
        if dtype.is_complex
        else real[..., 0].to(dtype).clone(memory_format=torch.contiguous_format)
    )


def squares(*params):
    return sum((p.abs().square() * (1 + i)).sum() for i, p in enumerate(params))


def bits(tensor):
    return tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8)


def equal_bits(left, right):
    return torch.equal(bits(left), bits(right))


def everything(optimizer):
    """State and groups as one flat dict, parameters included, by position."""
    packed = optimizer.state_dict()
    facts = {f"state {i} {key}": value for i, entry in packed["state"].items() for key, value in entry.items()}
    for i, group in enumerate(packed["param_groups"]):
        facts |= {f"group {i} {key}": value for key, value in group.items() if key != "params"}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {**facts, **{f"param {i}": p for i, p in enumerate(params)}}


# Direction


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
@each_input
def test_twenty_steps_go_the_right_way(kwargs, rule, grouped, contiguous):
    weight = noise(10, 5) if contiguous else noise(10, 5, 2)[..., 0]
    weight, bias, x = nn.Parameter(weight), nn.Parameter(noise(10, seed=1)), noise(5, seed=2)
    assert weight.is_contiguous() == contiguous
    sign = -1 if kwargs.get("maximize") else 1
    params = [{"params": [weight]}, {"params": [bias], "lr": 0.01}] if grouped else [weight, bias]
    optimizer = SOAA(params, radius=rule, **kwargs)
    loss = lambda: sign * (weight.mv(x) + bias).square().sum()  # noqa: E731
    first, start = sign * loss().item(), weight.detach().clone()
    drive(optimizer, loss, 20)
    assert sign * loss().item() < 0.9999 * first
    assert not torch.equal(weight, start)
    assert weight.is_contiguous() == contiguous


SCHEDULES = {
    "step": lambda o: [lr_scheduler.StepLR(o, 3, 0.9)],
    "plateau": lambda o: [lr_scheduler.ReduceLROnPlateau(o)],
    "step and plateau": lambda o: [lr_scheduler.StepLR(o, 3, 0.9), lr_scheduler.ReduceLROnPlateau(o)],
    "one cycle": lambda o: [lr_scheduler.OneCycleLR(o, 0.01, total_steps=25)],
    "cosine, restarts": lambda o: [lr_scheduler.CosineAnnealingWarmRestarts(o, 4)],
    "cyclic": lambda o: [lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 3, cycle_momentum=True)],
    "linear from far below": lambda o: [lr_scheduler.LinearLR(o, 0.01, total_iters=5)],
    "polynomial": lambda o: [lr_scheduler.PolynomialLR(o, 25)],
    "sequence": lambda o: [
        lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3])
    ],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tensor_lr", [False, True])
@each_rule
def test_twenty_scheduled_steps_go_the_right_way_without_a_warning(rule, tensor_lr, schedule):
    weight, bias, x = nn.Parameter(noise(10, 5)), nn.Parameter(noise(10, seed=1)), noise(5, seed=2)
    lr = torch.tensor(0.01, dtype=torch.float64) if tensor_lr else 0.01
    optimizer = SOAA([{"params": [weight]}, {"params": [bias]}], lr=lr, radius=rule)
    schedulers = SCHEDULES[schedule](optimizer)
    loss = lambda: (weight.mv(x) + bias).square().sum()  # noqa: E731
    first = loss().item()
    for _ in range(20):
        last = drive(optimizer, loss)
        for scheduler in schedulers:
            scheduler.step(*([last] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    assert loss().item() < first
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == tensor_lr


@pytest.mark.parametrize("factor", [0.5, 0.25, 0.125])
@pytest.mark.parametrize("rule", [FixedRadius(0.1), PublishedRadius(50), RatioRadius(relative=0.005)], ids=RULES)
def test_step_is_as_long_as_the_schedule_says(rule, factor):
    plain, scaled = Problem(rule, weight_decay=0.1).run(78), Problem(rule, weight_decay=0.1).run(78)
    before = [p.detach().clone() for p in plain.params]
    radius = plain.optimizer.radius
    lr_scheduler.LambdaLR(scaled.optimizer, lambda _: factor)
    plain.step()
    scaled.step()
    assert scaled.optimizer.last_step.trials == plain.optimizer.last_step.trials == 0
    # Where the learning rate is folded into the radius, this holds as long as the radius limits the step, as here.
    assert scaled.optimizer.last_step.active_fraction == plain.optimizer.last_step.active_fraction
    # A factor that is a power of two is exact in the length; the subtraction below is not.
    assert scaled.optimizer.last_step.step_norm == factor * plain.optimizer.last_step.step_norm > 0
    for a, b, c in zip(before, plain.params, scaled.params, strict=True):
        torch.testing.assert_close(c - a, factor * (b - a), atol=1e-14, rtol=1e-9)
    assert isinstance(rule, PublishedRadius) or scaled.optimizer.radius == plain.optimizer.radius == radius


def test_schedule_at_zero_moves_nothing_and_the_search_waits_for_it():
    problem, plain = Problem("ratio", weight_decay=0.1), Problem("ratio", weight_decay=0.1)
    scheduler = lr_scheduler.LambdaLR(problem.optimizer, lambda t: 0.0 if t < 3 else 1.0)
    before, radius = problem.facts(), problem.optimizer.radius
    for _ in range(3):
        problem.step()
        scheduler.step()
    assert all(equal_bits(before[f"param {i}"], p) for i, p in enumerate(problem.params))
    assert radius == 0
    plain.run(1)
    assert problem.optimizer.radius == plain.optimizer.param_groups[0]["group_radius"]
    problem.step()
    assert problem.optimizer.last_step.step_norm > 0
    assert problem.optimizer.radius > plain.optimizer.param_groups[0]["group_radius"]


@each_rule
def test_run_with_a_scheduler_resumes_bit_for_bit(rule, tmp_path):
    def start():
        problem = Problem(rule, lr=0.02)
        return problem, lr_scheduler.OneCycleLR(problem.optimizer, 0.05, total_steps=90)

    def run(problem, scheduler, steps):
        for _ in range(steps):
            problem.step()
            scheduler.step()

    (problem, scheduler), (other, other_scheduler) = start(), start()
    run(problem, scheduler, 40)
    torch.save([problem.params, problem.optimizer.state_dict(), scheduler.state_dict()], tmp_path / "state.pt")
    params, optimizer_state, scheduler_state = torch.load(tmp_path / "state.pt", weights_only=True)
    for mine, saved in zip(other.params, params, strict=True):
        mine.data.copy_(saved)
    other.batch = 40
    other.optimizer.load_state_dict(optimizer_state)
    other_scheduler.load_state_dict(scheduler_state)
    run(problem, scheduler, 40)
    run(other, other_scheduler, 40)
    assert_same(problem.facts(), other.facts())


# Multi-tensor path


def families(dtype):
    """Parameters of all awkward kinds."""
    return [
        nn.Parameter(noise(4, 3, dtype=dtype)),
        nn.Parameter(noise(3, seed=1, dtype=dtype)),
        nn.Parameter(noise(2, 3, 2, seed=2, dtype=dtype).transpose(0, 2)),
        nn.Parameter(noise(1, seed=3, dtype=dtype)[0].clone()),
        nn.Parameter(torch.empty(0, 4, dtype=dtype)),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128])
@each_input
def test_foreach_matches_for_loop_in_every_state_key(kwargs, rule, dtype):
    portions = PORTIONS if rule.fresh_slopes else ()
    runs = []
    for foreach in (False, True):
        params = families(dtype)
        optimizer = SOAA([{"params": params[:2]}, {"params": params[2:]}], radius=rule, foreach=foreach, **kwargs)
        runs.append((params, optimizer))
    for step in range(7):
        for params, optimizer in runs:
            if step == 3:
                radius = optimizer.radius
                for p in params:
                    p.grad = None
                optimizer.step(lambda: torch.tensor(1.0), loss_closure=lambda: torch.tensor(1.0))
                assert optimizer.radius == radius
            else:
                drive(optimizer, functools.partial(squares, *params))
        left, right = (everything(optimizer) for _, optimizer in runs)
        assert_same(left, right, but=["foreach"])
    assert {key for entry in runs[0][1].state.values() for key in entry} == {"step", "m", "v", *portions}
    assert all(entry["step"] == 6 for entry in runs[0][1].state.values())


@each_rule
def test_empty_and_scalar_parameters_beside_the_others_change_no_bit(rule):
    plain, mixed = Problem(rule), Problem(rule)
    empty = nn.Parameter(torch.empty(3, 0, dtype=torch.float64))
    integers = nn.Parameter(torch.arange(3), requires_grad=False)
    mixed.optimizer = SOAA([*mixed.params, empty, integers], radius=rule)
    inner = mixed.closure

    def closure():
        empty.grad = torch.zeros_like(empty)
        return inner()

    mixed.closure = closure
    plain.run(30)
    mixed.run(30)
    assert_same(plain.facts(), mixed.facts())
    assert torch.equal(integers, torch.arange(3))
    assert integers not in mixed.optimizer.state


@pytest.mark.parametrize("make", [lambda g: g.t().contiguous().t(), lambda g: torch.stack([g, -g], -1)[..., 0]])
@each_rule
def test_layout_of_the_gradient_makes_no_difference(rule, make):
    params = [nn.Parameter(noise(8, 5)) for _ in range(2)]
    optimizers = [SOAA([p], radius=rule) for p in params]
    for step in range(5):
        grad = noise(8, 5, seed=step)
        strided = make(grad)
        assert torch.equal(grad, strided)
        assert not strided.is_contiguous()
        for p, optimizer, g in zip(params, optimizers, (grad, strided), strict=True):
            p.grad = g
            optimizer.step(lambda: 1.0, loss_closure=lambda: 0.9)
    assert equal_bits(*params)


def test_expanded_gradient_is_read_and_not_written():
    x = nn.Parameter(noise(6))
    x.grad = torch.ones((), dtype=torch.float64).expand(6)
    SOAA([x], radius=FixedRadius()).step()
    assert torch.equal(x.grad, torch.ones(6, dtype=torch.float64))


@each_rule
def test_step_leaves_gradients_as_they_are(rule):
    problem = Problem(rule, weight_decay=0.1, maximize=True).run(3)
    problem.closure()
    grads = [p.grad for p in problem.params]
    before = [g.clone() for g in grads]
    problem.optimizer.step(lambda: problem.loss().detach(), loss_closure=problem.loss_closure)
    assert all(p.grad is g for p, g in zip(problem.params, grads, strict=True))
    assert all(equal_bits(g, kept) for g, kept in zip(grads, before, strict=True))


# Groups


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@each_rule
def test_group_of_vanishing_lr_stays_bitwise_and_the_other_moves(rule, weight_decay, first):
    problem = Problem(rule)
    still, moving = {"params": problem.params[:2], "lr": 1e-28}, {"params": problem.params[2:], "lr": 0.01}
    groups = [still, moving] if first else [moving, still]
    problem.optimizer = SOAA(groups, radius=rule, weight_decay=weight_decay)
    before = [p.detach().clone() for p in problem.params]
    problem.run(25)
    assert [equal_bits(a, b) for a, b in zip(before, problem.params, strict=True)] == [True, True, False, False]


@each_rule
def test_only_the_group_with_weight_decay_shrinks(rule):
    x, y = nn.Parameter(noise(6)), nn.Parameter(noise(6))
    optimizer = SOAA([{"params": [x], "weight_decay": 0.5}, {"params": [y]}], lr=0.1, radius=rule)
    drive(optimizer, lambda: squares(x, y) * 0 + (x.sum() + y.sum()))
    share = 0.5 * (optimizer.param_groups[0]["group_radius"] if isinstance(rule, RatioRadius) else 0.1)
    torch.testing.assert_close(x.detach() - y.detach(), -share * noise(6), atol=1e-14, rtol=1e-9)


def test_groups_keep_their_own_betas_and_eps():
    x, y = nn.Parameter(noise(4)), nn.Parameter(noise(4))
    optimizer = SOAA([{"params": [x], "betas": (0.5, 0.6)}, {"params": [y], "eps": 1.0}], radius=FixedRadius())
    drive(optimizer, lambda: x.sum() + y.sum())
    assert torch.equal(optimizer.state[x]["m"], torch.full_like(x, 0.5))
    torch.testing.assert_close(optimizer.state[x]["v"], torch.full_like(x, 0.4), atol=0, rtol=1e-15)
    torch.testing.assert_close(optimizer.state[y]["m"], torch.full_like(y, 0.1), atol=0, rtol=1e-15)
    # mh = vh = 1 in both groups, F = c = 1 + 8 / (4 (1 + 1e-8) + 4 (1 + 1)), and a step of lr mh / (c + eps)
    c = 1 + 8 / (4 * (1 + 1e-8) + 4 * 2)
    torch.testing.assert_close(noise(4) - x.detach(), torch.full_like(x, 1e-3 / (c + 1e-8)), atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(noise(4) - y.detach(), torch.full_like(y, 1e-3 / (c + 1.0)), atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (2, 3, 0, 1), (3, 2, 1, 0)])
@each_rule
def test_order_and_number_of_groups_is_irrelevant(rule, order):
    whole, split = Problem(rule).run(58), Problem(rule)
    # Options differ between the groups, so that the order could matter.
    options = [{"lr": 1e-3}, {"lr": 2e-3}, {"weight_decay": 0.1}, {"betas": (0.8, 0.99)}]
    split.optimizer = SOAA([{"params": [p]} for p in split.params], radius=rule)
    split.run(58)
    ordered, turned = Problem(rule), Problem(rule)
    ordered.optimizer = SOAA([{"params": [p], **o} for p, o in zip(ordered.params, options, strict=True)], radius=rule)
    turned.optimizer = SOAA([{"params": [turned.params[i]], **options[i]} for i in order], radius=rule)
    ordered.run(58)
    turned.run(58)
    for left, right in ((whole, split), (ordered, turned)):
        # Only the order of the global sums differs: 58 steps of a rounding error of 1e-16 each.
        assert right.optimizer.radius == pytest.approx(left.optimizer.radius, rel=1e-10)
        for p, q in zip(left.params, right.params, strict=True):
            torch.testing.assert_close(p, q, atol=1e-11, rtol=1e-11)
            for key in ("m", "v"):
                mine, theirs = left.optimizer.state[p][key], right.optimizer.state[q][key]
                torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-11)


@each_rule
def test_group_added_in_mid_training_is_as_if_it_had_always_been_there_without_gradients(rule):
    late, early = Problem(rule), Problem(rule)
    groups = [{"params": early.params[:3]}, {"params": early.params[3:], "weight_decay": 0.1}]
    early.optimizer = SOAA(groups, radius=rule)
    late.optimizer = SOAA(late.params[:3], radius=rule)
    for problem in (early, late):
        problem.params[3].requires_grad_(False)
        problem.run(20)
    late.optimizer.add_param_group({"params": late.params[3:], "weight_decay": 0.1})
    for problem in (early, late):
        problem.params[3].requires_grad_(True)
        problem.run(40)
    assert late.optimizer.state[late.params[3]]["step"] == 40
    assert_same(early.facts(), late.facts())


@each_rule
def test_unfrozen_parameters_get_state_of_their_own_age(rule):
    problem = Problem(rule)
    problem.params[0].requires_grad_(False)
    problem.run(5)
    assert problem.params[0] not in problem.optimizer.state
    problem.params[0].requires_grad_(True)
    problem.run(2)
    assert [problem.optimizer.state[p]["step"] for p in problem.params] == [2, 7, 7, 7]


def test_parameters_come_in_every_form_that_torch_takes():
    model = nn.Linear(2, 2)
    for params in (
        model.parameters(),
        list(model.parameters()),
        model.named_parameters(),
        ({"params": p} for p in model.parameters()),
        [{"params": model.weight}, {"params": [model.bias], "lr": 1.0}],
        [{"params": iter(model.parameters())}],
    ):
        assert sum(len(group["params"]) for group in SOAA(params).param_groups) == 2


# dtypes


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("foreach", [True, False])
@each_input
def test_complex_parameters_are_pairs_of_reals(kwargs, rule, dtype, foreach):
    params = [nn.Parameter(noise(2, 3, dtype=dtype)), nn.Parameter(noise(4, seed=1, dtype=dtype))]
    pairs = [nn.Parameter(torch.view_as_real(p.detach().clone())) for p in params]
    left, right = (SOAA(p, radius=rule, foreach=foreach, **kwargs) for p in (params, pairs))
    for step in range(15):
        drive(left, lambda: squares(*params).real)
        drive(right, lambda: squares(*[torch.view_as_complex(p) for p in pairs]).real)
        assert left.radius == right.radius, step
        for p, q in zip(params, pairs, strict=True):
            assert equal_bits(torch.view_as_real(p), q), step
            assert equal_bits(left.state[p]["v"], right.state[q]["v"]), step


def test_state_of_complex_parameters_survives_a_checkpoint():
    params = [nn.Parameter(noise(3, dtype=torch.complex64))]
    optimizer = SOAA(params, radius=FixedRadius())
    drive(optimizer, lambda: squares(*params), 3)
    others = copy.deepcopy(params)
    other = SOAA(others, radius=FixedRadius())
    other.load_state_dict(optimizer.state_dict())
    drive(optimizer, lambda: squares(*params), 3)
    drive(other, lambda: squares(*others), 3)
    assert equal_bits(params[0], others[0])
    assert_same(everything(optimizer), everything(other))


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
@each_rule
def test_default_dtype_changes_no_bit(rule, dtype, default):
    def run():
        params = families(dtype)
        optimizer = SOAA(params, lr=0.01, radius=rule, weight_decay=0.1)
        drive(optimizer, lambda: squares(*params).double(), 4)
        for p in params:
            p.grad = p.detach() + 1
        for loss in (1 / 3, 1 / 7, 1 / 9):  # plain floats are not rounded to the default dtype
            optimizer.step(lambda loss=loss: loss, loss_closure=lambda loss=loss: loss - 1e-5)
        report = optimizer.last_step
        return {**everything(optimizer), **{f"report {key}": value for key, value in vars(report).items()}}

    plain, before = run(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        assert_same(plain, run())
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(
    ("rule", "lr"),
    # A floor of RatioRadius below 1/128 of the parameters' size would be raised by the coarsest.
    [(FixedRadius(), 0.5), (PublishedRadius(50), 0.5), (RatioRadius(relative=10.0), 2.0)],
    ids=RULES,
)
def test_mixed_dtypes_in_one_list_step_like_one_precise_list(rule, lr, foreach):
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    start = [noise(4, seed=i).bfloat16().double() for i in range(4)]
    mixed = [nn.Parameter(x.to(dtype)) for x, dtype in zip(start, dtypes, strict=True)]
    exact = [nn.Parameter(x.clone()) for x in start]
    left, right = (SOAA(params, lr=lr, radius=rule, foreach=foreach) for params in (mixed, exact))
    for params, optimizer in ((mixed, left), (exact, right)):
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = noise(4, seed=10 * step + i).bfloat16().to(p.dtype)
            optimizer.step(lambda: 1.0, loss_closure=lambda: -1e3)
    for p, q, dtype in zip(mixed, exact, dtypes, strict=True):
        assert p.dtype == dtype
        assert left.state[p]["m"].dtype == left.state[p]["v"].dtype == torch.promote_types(dtype, torch.float32)
        # Moments are float32 at least; what differs is one rounding of the parameter a step.
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(p.double(), q, atol=1e-6, rtol=4 * max(ulp, 2e-7))
    assert left.radius == pytest.approx(right.radius, rel=1e-9)


# No information


@pytest.mark.parametrize("loss", [torch.tensor([1]), torch.tensor(1.0), 1, 1.0])
@each_input
def test_zero_gradients_are_a_no_op_for_a_fresh_optimizer(kwargs, rule, loss):
    params = families(torch.float32)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = SOAA(params, radius=rule, **{**kwargs, "weight_decay": 0.0})
    before, radius = [bits(p) for p in params], optimizer.radius
    optimizer.step(lambda: loss, loss_closure=lambda: loss)
    assert all(torch.equal(bits(p), kept) for p, kept in zip(params, before, strict=True))
    if not isinstance(rule, RatioRadius):  # whose radius is at the floor that it finds in the first check
        assert optimizer.radius == radius
    assert all(not entry[key].any() for entry in optimizer.state.values() for key in ("m", "v"))


def test_zero_gradients_in_mid_training_move_nothing_under_the_default_rule():
    problem = Problem("ratio").run(70)
    for _ in range(6):
        before, radius = [bits(p) for p in problem.params], problem.optimizer.radius
        problem.spoil = 0.0
        problem.step()
        assert all(torch.equal(bits(p), kept) for p, kept in zip(problem.params, before, strict=True))
        assert problem.optimizer.radius == radius
        assert not problem.optimizer.last_step.skipped


@pytest.mark.parametrize("with_closure", [True, False])
@each_input
def test_missing_gradients_are_a_no_op_also_with_integer_parameters(kwargs, rule, with_closure):
    params = [*families(torch.float32), nn.Parameter(torch.arange(4), requires_grad=False)]
    optimizer = SOAA(params, radius=rule, **kwargs)
    before = [bits(p) for p in params]
    groups = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    if with_closure:
        assert optimizer.step(lambda: torch.tensor([1]), loss_closure=lambda: torch.tensor([1])).item() == 1
    else:
        assert optimizer.step() is None
        assert len(optimizer.state) == len(params) - 1
    assert params[-1] not in optimizer.state
    assert all(torch.equal(bits(p), kept) for p, kept in zip(params, before, strict=True))
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == groups
    assert optimizer.last_step is None


# Closures


@pytest.mark.parametrize(
    "returned", [None, 1, 1.0, torch.tensor(1), torch.tensor(1.0), torch.tensor([[1.0]]), torch.tensor(True)]
)
@pytest.mark.parametrize("early_exit", [True, False])
@each_rule
def test_step_returns_the_object_that_the_closure_returned(rule, early_exit, returned):
    x, calls = nn.Parameter(noise(3)), []
    optimizer = SOAA([x], radius=rule)

    def closure():
        calls.append(1)
        if not early_exit:
            x.grad = torch.ones_like(x)
        return returned

    if returned is None and isinstance(rule, PublishedRadius) and not early_exit:
        with pytest.raises(ValueError, match="`closure` must return the loss under PublishedRadius, got None"):
            optimizer.step(closure, loss_closure=None)
    else:
        assert optimizer.step(closure, loss_closure=lambda: 0.9) is returned
        assert len(optimizer.state) == (0 if early_exit else 1)
    assert calls == [1]


@each_rule
def test_closure_argument_is_positional_or_a_keyword(rule):
    left, right = Problem(rule), Problem(rule)
    for _ in range(4):
        left.optimizer.step(left.closure, loss_closure=left.loss_closure)
        right.optimizer.step(loss_closure=right.loss_closure, closure=right.closure)
    assert_same(left.facts(), right.facts())
    with pytest.raises(TypeError, match="positional argument"):
        left.optimizer.step(left.closure, left.loss_closure)


# state_dict


def named(problem, prefix):
    return [(f"{prefix}{i}", p) for i, p in enumerate(problem.params)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("save_named", "load_named"), [(True, True), (True, False), (False, True), (False, False)])
@each_rule
def test_ten_steps_and_ten_more_are_twenty(rule, save_named, load_named, dtype, tmp_path):
    def start(with_names):
        problem = Problem(rule, dtype=dtype)
        problem.optimizer = SOAA(named(problem, "p") if with_names else problem.params, radius=rule, weight_decay=0.1)
        return problem

    whole, half = start(save_named).run(20), start(save_named).run(10)
    torch.save({"optimizer": half.optimizer.state_dict(), "params": half.params}, tmp_path / "half.pt")
    saved = torch.load(tmp_path / "half.pt", weights_only=True)
    other = start(load_named)
    other.run(3)  # what was there before is replaced
    other.batch = 10
    with torch.no_grad():
        for mine, theirs in zip(other.params, saved["params"], strict=True):
            mine.copy_(theirs)
    other.optimizer.load_state_dict(saved["optimizer"])
    assert other.optimizer.last_step is None
    other.run(10)
    facts = [{k: v for k, v in run.facts().items() if "param_names" not in k} for run in (whole, other)]
    assert_same(*facts)
    assert all(
        entry["m"].dtype == torch.promote_types(dtype, torch.float32) for entry in other.optimizer.state.values()
    )


@each_rule
def test_saving_changes_nothing(rule):
    plain, saving = Problem(rule), Problem(rule)
    for _ in range(25):
        plain.step()
        saving.step()
        saving.optimizer.state_dict()
    assert_same(plain.facts(), saving.facts())


KEYS = sorted(set(Problem("ratio").optimizer.param_groups[0]) - {"params", "radius", "lr"})


@pytest.mark.parametrize("key", KEYS)
def test_older_state_dict_without_a_key_still_loads_and_steps(key):
    problem = Problem("ratio", lr=0.005).run(4)
    state = copy.deepcopy(problem.optimizer.state_dict())
    del state["param_groups"][0][key]
    other = Problem("ratio", lr=0.005)
    other.optimizer.load_state_dict(state)
    assert key in other.optimizer.param_groups[0]
    kept = other.optimizer.param_groups[0][key]
    assert kept == Problem("ratio", lr=0.005).optimizer.param_groups[0][key]
    other.run(6)
    assert other.optimizer.last_step.step == 6 + (0 if key == "steps" else 4)


@each_rule
def test_state_is_on_every_parameter_after_a_step_and_on_none_before(rule):
    problem = Problem(rule)
    assert problem.optimizer.state_dict()["state"] == {}
    problem.step()
    state = problem.optimizer.state_dict()["state"]
    assert sorted(state) == [0, 1, 2, 3]
    for entry, p in zip(state.values(), problem.params, strict=True):
        assert entry["m"].shape == entry["v"].shape == p.shape
        assert entry["step"] == 1


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_copy_of_a_fresh_optimizer_steps(how):
    problem = Problem("ratio")
    clone = how(problem.optimizer)
    assert isinstance(clone, SOAA)
    assert clone.radius_rule == problem.optimizer.radius_rule
    assert clone.last_step is None
    if how is copy.copy:
        problem.optimizer = clone
        problem.run(2)
        assert clone.last_step.step == 2


def test_whole_optimizer_survives_torch_save(tmp_path):
    problem, other = Problem("ratio").run(20), Problem("ratio")
    torch.save((problem.params, problem.optimizer), tmp_path / "all.pt")
    other.params, other.optimizer = torch.load(tmp_path / "all.pt", weights_only=False)
    other.batch = 20
    assert_same(problem.run(20).facts(), other.run(20).facts())


@pytest.mark.parametrize("rule", [RatioRadius(interval=3), PublishedRadius(7, gamma=0.5), FixedRadius(2.0)])
def test_rule_objects_are_copied_by_value(rule):
    optimizer = copy.deepcopy(Problem(rule).optimizer)
    assert optimizer.radius_rule == rule
    assert type(optimizer.radius_rule) is type(rule)
    assert not {type(v) for v in optimizer.state_dict()["param_groups"][0].values()} & {type(rule)}


def test_state_dict_of_other_groups_is_refused_and_changes_nothing():
    problem, other = Problem("fixed", grouped=True).run(2), Problem("fixed").run(3)
    before = other.facts()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        other.optimizer.load_state_dict(problem.optimizer.state_dict())
    shorter = SOAA(other.params[:2], radius=FixedRadius(0.5))
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        shorter.load_state_dict(other.optimizer.state_dict())
    assert_same(before, other.facts())
    assert other.optimizer.last_step.step == 3


class Holder(nn.Module):
    def __init__(self, params):
        super().__init__()
        self.params = nn.ParameterList(params)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("tensor_lr", [True, False])
@each_rule
def test_distributed_checkpoint_on_disk_resumes_bit_for_bit(rule, tensor_lr, flatten, grouped, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    lr = torch.tensor(0.01) if tensor_lr else 0.01

    def pack(problem):
        problem.optimizer.zero_grad()
        return get_optimizer_state_dict(Holder(problem.params), problem.optimizer, options=options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no process group; torch's own deprecations
        problem = Problem(rule, lr=lr, grouped=grouped, weight_decay=0.1).run(12)
        dcp.save({"optimizer": pack(problem)}, checkpoint_id=str(tmp_path))
        other = Problem(rule, lr=lr, grouped=grouped, weight_decay=0.1)
        other.batch = 12
        untouched = [bits(p) for p in other.params]
        incoming = pack(other)  # takes a step at lr 0 with zero gradients to have the state created
        assert all(torch.equal(bits(p), kept) for p, kept in zip(other.params, untouched, strict=True))
        dcp.load({"optimizer": incoming}, checkpoint_id=str(tmp_path))
        set_optimizer_state_dict(Holder(other.params), other.optimizer, incoming, options=options)
    with torch.no_grad():
        for mine, theirs in zip(other.params, problem.params, strict=True):
            mine.copy_(theirs)
    assert_same(problem.run(12).facts(), other.run(12).facts())


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
@each_rule
def test_bare_step_at_lr_zero_creates_state_and_moves_nothing(rule, lr):
    problem = Problem(rule, weight_decay=0.1)
    radius, before = problem.optimizer.radius, [bits(p) for p in problem.params]
    for p in problem.params:
        p.grad = torch.zeros_like(p)
    problem.optimizer.param_groups[0]["lr"] = lr
    problem.optimizer.step(closure=None)
    problem.optimizer.param_groups[0]["lr"] = 1e-3
    assert all(torch.equal(bits(p), kept) for p, kept in zip(problem.params, before, strict=True))
    assert problem.optimizer.radius == radius
    assert len(problem.optimizer.state) == 4
    problem.optimizer.zero_grad()
    problem.run(2)
    assert problem.optimizer.last_step.step_norm > 0


# Hooks


def test_step_hooks_see_the_arguments_and_may_replace_them():
    problem, plain, seen = Problem("ratio"), Problem("ratio"), []

    def hand_over(optimizer, args, kwargs):
        seen.append("pre")
        return args, {**kwargs, "loss_closure": problem.loss_closure}

    def after(optimizer, args, kwargs):
        seen.append(f"post {optimizer.last_step.step} {sorted(kwargs)}")

    handles = [problem.optimizer.register_step_pre_hook(hand_over), problem.optimizer.register_step_post_hook(after)]
    for _ in range(2):
        problem.optimizer.step(problem.closure)
        problem.batch += 1
    assert seen == ["pre", "post 1 ['loss_closure']", "pre", "post 2 ['loss_closure']"]
    assert_same(plain.run(2).facts(), problem.facts())
    for handle in handles:
        handle.remove()
    problem.step()
    assert len(seen) == 4


@each_rule
def test_global_step_hooks_run_around_local_ones_once_a_step(rule):
    problem, seen = Problem(rule), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
        problem.optimizer.register_step_pre_hook(lambda *_: seen.append("pre")),
        problem.optimizer.register_step_post_hook(lambda *_: seen.append("post")),
    ]
    try:
        problem.run(2)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["global pre", "pre", "post", "global post"] * 2


def test_state_dict_hooks_run_once_each_and_load_hooks_do_not_add_up():
    problem, seen = Problem("fixed").run(1), []
    optimizer = problem.optimizer

    def note(name):
        return lambda *args: seen.append((name, len(args)))

    optimizer.register_state_dict_pre_hook(note("save pre"))
    optimizer.register_state_dict_post_hook(note("save post"))
    optimizer.register_load_state_dict_pre_hook(note("load pre"))
    optimizer.register_load_state_dict_post_hook(note("load post"))
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [("save pre", 1), ("save post", 2), ("load pre", 2), ("load post", 1)] * 2
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


def test_state_dict_post_hook_may_replace_what_is_saved():
    problem = Problem("fixed").run(1)
    problem.optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    assert problem.optimizer.state_dict()["extra"] == 1


# Gradient scaler


def test_grad_scaler_steps_and_skips_around_a_bound_loss_closure():
    problem, plain = Problem("ratio", dtype=torch.float32), Problem("ratio", dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for step in range(4):
        problem.optimizer.zero_grad()
        scaler.scale(problem.loss()).backward()
        problem.optimizer.bind_loss_closure(problem.loss_closure, base_loss=problem.loss().detach())
        if step == 2:
            problem.params[0].grad[0, 0] = torch.inf
            before = problem.facts()
        scaler.step(problem.optimizer)
        scaler.update()
        if step == 2:
            assert_same(before, problem.facts())
            continue
        problem.batch += 1
        plain.step()
    # A scale that is a power of two rounds nothing.
    assert_same(plain.facts(), problem.facts())


# Memory


class LiveBytes(TorchDispatchMode):
    """Bytes of storages that were made under the mode: how many live now, and the most that lived at once."""

    def __init__(self):
        super().__init__()
        self.made, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.live())
        return out

    def live(self):
        self.made = {key: (ref, size) for key, (ref, size) in self.made.items() if not ref.expired()}
        return sum(size for _, size in self.made.values())


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize(
    ("rule", "kept", "worked"),
    [(FixedRadius(), 0, 3), (PublishedRadius(9), 0, 3), (RatioRadius(), 1, 4)],
    ids=["fixed", "published", "ratio"],
)
@pytest.mark.parametrize("count", [2, 8, 32])
def test_peak_of_a_step_is_a_few_blocks_and_on_a_check_the_parameters(rule, kept, worked, foreach, count):
    params = [nn.Parameter(torch.ones(300_000)) for _ in range(count)]
    optimizer = SOAA(params, radius=rule, foreach=foreach)
    drive(optimizer, lambda: squares(*params), 2)
    loss = squares(*params).item()
    with LiveBytes() as live:
        optimizer.step(lambda: loss, loss_closure=lambda: loss / 2)
    sets, blocks = kept * count * 300_000 * 4, worked * CACHED * 4
    assert sets < live.peak <= sets + blocks + 5_000 + 100 * count
    assert live.live() < 200


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("foreach", [True, False])
@each_rule
def test_first_step_leaves_eight_bytes_a_parameter_and_nothing_else(rule, foreach, read):
    params = [nn.Parameter(torch.ones(3_000)) for _ in range(4)]
    optimizer = SOAA(params, radius=rule, foreach=foreach, weight_decay=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    with LiveBytes() as live:
        optimizer.step(lambda: 1.0, loss_closure=lambda: 0.5)
        if read:
            assert optimizer.last_step.step == 1
    assert 0 <= live.live() - 8 * 4 * 3_000 < 200


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("foreach", [True, False])
@each_rule
def test_neither_gradients_nor_the_loss_graph_outlive_a_step(rule, foreach, read):
    problem = Problem(rule, foreach=foreach)
    refs = []

    def closure():
        problem.optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        refs.extend([weakref.ref(loss), *(weakref.ref(p.grad) for p in problem.params)])
        return loss

    for _ in range(3):
        problem.optimizer.step(closure, loss_closure=problem.loss_closure)
        if read:
            assert problem.optimizer.last_step is not None
    problem.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    assert [ref() for ref in refs] == [None] * 15


def test_dropped_optimizer_frees_its_state_without_the_collector():
    x = nn.Parameter(torch.ones(4))
    optimizer = SOAA([x], radius=FixedRadius())
    drive(optimizer, lambda: squares(x), 2)
    m = weakref.ref(optimizer.state[x]["m"])
    gc.disable()
    try:
        del optimizer
        assert m() is None
    finally:
        gc.enable()


# torch's own tables, in a process of their own: importing them changes torch globally

TORCH_TABLES = """
    import sys, types, unittest, warnings

    try:
        import expecttest
    except ImportError:  # torch imports it for other tests
        sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase, ACCEPT=False)
    import torch
    from torch.testing._internal import common_optimizers as tables
    from lightning_soaa import SOAA, FixedRadius, PublishedRadius, RatioRadius

    rules = [FixedRadius(), PublishedRadius(50), RatioRadius()]

    def inputs(device, dtype=None):
        rows = []
        for row in tables.optim_inputs_func_adamw("cpu"):
            kwargs = {key: value for key, value in row.kwargs.items() if key not in {"amsgrad", "capturable"}}
            rows += [tables.OptimizerInput(None, {**kwargs, "radius": rule}, row.desc) for rule in rules]
        return rows

    info = tables.OptimizerInfo(
        SOAA,
        optim_inputs_func=inputs,
        optim_error_inputs_func=tables.get_error_inputs_for_all_optims,
        supported_impls=("foreach",),
        supports_sparse=False,
    )
    seen = 0
    for row in info.optim_error_inputs_func("cpu", torch.float32):
        wanted = row.optimizer_error_input
        params = wanted.params if wanted.params is not None else [torch.nn.Parameter(torch.ones(1, 1))]
        regex = row.error_regex
        if "1-element" in regex:
            regex = "SOAA: `lr` must be a number or a tensor of one element"
        if issubclass(row.error_type, Warning):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                info.optim_cls(params, **wanted.kwargs)
            texts = [str(w.message) for w in caught if issubclass(w.category, row.error_type)]
            assert any(__import__("re").match(regex, text) for text in texts), (wanted.desc, texts)
        else:
            with unittest.TestCase().assertRaisesRegex(row.error_type, regex):
                info.optim_cls(params, **wanted.kwargs)
        seen += 1

    for row in tables._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info):
        torch.manual_seed(0)
        weight, bias, x = torch.nn.Parameter(torch.randn(10, 5)), torch.nn.Parameter(torch.randn(10)), torch.randn(5)
        for scheduler_inputs in [*info.scheduler_inputs, []]:
            optimizer = info.optim_cls([weight, bias], **row.kwargs)
            schedulers = [make(optimizer) for make in scheduler_inputs]
            sign = -1 if row.kwargs.get("maximize") else 1

            def loss():
                return sign * (weight.mv(x) + bias).pow(2).sum()

            def closure():
                optimizer.zero_grad()
                value = loss()
                value.backward()
                return value

            first = loss().item()
            for _ in range(20):
                value = optimizer.step(closure, loss_closure=loss)
                for scheduler in schedulers:
                    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(value) if plateau else scheduler.step()
            if row.kwargs.get("lr") != 0.0:
                assert sign * loss().item() < sign * first, (row, first, loss().item())
        seen += 1
    print("rows", seen)
"""


@pytest.mark.timeout(120)
def test_torchs_own_error_inputs_and_adamw_inputs_hold():
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TORCH_TABLES)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) >= 6 + 3 * 3
