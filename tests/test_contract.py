"""What torch expects of every optimizer: groups, state, checkpoints, hooks, schedulers, dtypes."""

import contextlib
import copy
import io
import pickle
import warnings

import pytest
import torch
from problems import RULES, Problem, assert_same
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

from lightning_soaa import SOAA, FixedRadius, PublishedRadius, RatioRadius
from lightning_soaa._state import PORTIONS


def through_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def twin_of(problem, rule, **options):
    """A problem at the same parameters and batch, with a fresh optimizer."""
    other = Problem(rule, dtype=problem.params[0].dtype, **options)
    other.batch = problem.batch
    with torch.no_grad():
        for mine, theirs in zip(other.params, problem.params, strict=True):
            mine.copy_(theirs)
    return other


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("keyword", [True, False])
def test_resume_equals_uninterrupted(rule, dtype, keyword):
    problem = Problem(rule, dtype=dtype, weight_decay=0.01).run(23)
    other = twin_of(problem, rule, weight_decay=0.01)
    state = through_file(problem.optimizer.state_dict())
    other.optimizer.load_state_dict(state_dict=state) if keyword else other.optimizer.load_state_dict(state)
    assert_same(problem.facts(), other.facts())
    assert_same(problem.run(20).facts(), other.run(20).facts())


def test_moments_of_bfloat16_parameters_are_float32_before_and_after_loading():
    problem = Problem("ratio", dtype=torch.bfloat16).run(5)
    other = twin_of(problem, "ratio")
    other.optimizer.load_state_dict(problem.optimizer.state_dict())
    for optimizer in (problem.optimizer, other.optimizer):
        assert {s[key].dtype for s in optimizer.state.values() for key in ("m", "v")} == {torch.float32}


def test_state_dict_holds_tensors_and_plain_values_only():
    state = Problem("ratio", grouped=True).run(9).optimizer.state_dict()
    for entry in state["state"].values():
        assert {key: type(value) for key, value in entry.items()} == {
            "step": int, "m": torch.Tensor, "v": torch.Tensor, **dict.fromkeys(PORTIONS, float),
        }  # fmt: skip
    for group in state["param_groups"]:
        for key, value in group.items():
            assert isinstance(value, int | float | str | bool | tuple | list | None), key


def test_loaded_state_is_not_shared_with_the_state_dict():
    problem = Problem("fixed").run(3)
    state = problem.optimizer.state_dict()
    other = twin_of(problem, "fixed")
    other.optimizer.load_state_dict(copy.deepcopy(state))
    kept = state["state"][0]["m"].clone()
    other.run(3)
    assert torch.equal(state["state"][0]["m"], kept)


def test_pre_hook_decides_what_is_loaded():
    problem = Problem("fixed", dtype=torch.bfloat16).run(3)
    other = twin_of(problem, "fixed")

    def double(_, state):
        state = copy.deepcopy(state)
        state["state"][0]["m"] *= 2
        return state

    other.optimizer.register_load_state_dict_pre_hook(double)
    other.optimizer.load_state_dict(problem.optimizer.state_dict())
    p, q = problem.params[0], other.params[0]
    assert torch.equal(other.optimizer.state[q]["m"], 2 * problem.optimizer.state[p]["m"])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("rule", RULES)
def test_copies_continue_alike(rule, clone):
    problem = Problem(rule).run(12)
    other = Problem(rule)
    other.params, other.optimizer = clone((problem.params, problem.optimizer))
    other.batch = problem.batch
    assert other.optimizer.radius_rule == problem.optimizer.radius_rule
    assert other.optimizer.fisher_rule == problem.optimizer.fisher_rule
    assert_same(problem.run(15).facts(), other.run(15).facts())


# Numbers of group 0 that were not there from the start.
NEWER = (
    *("unchecked_steps", "outlier_steps", "repeat_gap", "checked_slope", "fresh_slope", "gate", "gradient_rms"),
    *("rule_scale", "rule_steady", "rule_eaten_weight", "rule_fresh", "rule_fresh_weight"),
)


def test_older_state_dict_gets_the_numbers_it_lacks():
    problem = Problem("ratio").run(4)
    state = problem.optimizer.state_dict()
    for key in ("foreach", "fused", "maximize", "radius_rule", "base_lr", "group_radius", *NEWER):
        del state["param_groups"][0][key]
    other = twin_of(problem, "ratio")
    other.optimizer.load_state_dict(state)
    other.run(2)
    assert other.optimizer.radius > 0
    assert other.facts().keys() == problem.facts().keys()


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_distributed_checkpoint_round_trip_resumes(rule, flatten):
    class Holder(torch.nn.Module):
        def __init__(self, params):
            super().__init__()
            self.params = torch.nn.ParameterList(params)

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    problem = Problem(rule).run(12)
    problem.optimizer.zero_grad()
    state = through_file(get_optimizer_state_dict(Holder(problem.params), problem.optimizer, options=options))
    other = twin_of(problem, rule)
    set_optimizer_state_dict(Holder(other.params), other.optimizer, state, options=options)
    assert_same(problem.run(12).facts(), other.run(12).facts())


def test_groups_have_their_own_decay_and_betas():
    x, y = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizer = SOAA(
        [{"params": [x], "weight_decay": 0.5}, {"params": [y], "betas": (0.5, 0.6)}], lr=0.1, radius=FixedRadius(1e-9)
    )
    x.grad, y.grad = torch.ones_like(x), torch.ones_like(y)
    optimizer.step()
    torch.testing.assert_close(x.detach(), torch.full_like(x, 0.95), atol=1e-8, rtol=0)
    torch.testing.assert_close(y.detach(), torch.ones_like(y), atol=1e-8, rtol=0)
    assert optimizer.state[x]["m"][0].item() == pytest.approx(0.1)
    assert optimizer.state[y]["m"][0].item() == pytest.approx(0.5)


@pytest.mark.parametrize("rule", RULES)
def test_foreach_matches_for_loop_bitwise(rule):
    runs = [Problem(rule, foreach=foreach, weight_decay=0.1, grouped=True) for foreach in (True, False)]
    for step in range(7):
        for run in runs:

            def closure(run=run, step=step):
                loss = run.closure()
                if step == 3:
                    for p in run.params[::2]:
                        p.grad = None
                return loss

            run.optimizer.step(closure, loss_closure=run.loss_closure)
            run.batch += 1
        assert_same(*(run.facts() for run in runs), but=["foreach"])


@pytest.mark.parametrize("rule", RULES)
def test_maximize_is_minimising_the_negative(rule):
    down, up = Problem(rule), Problem(rule, maximize=True)
    up.spoil = -1.0
    assert_same(down.run(20).facts(), up.run(20).facts(), but=["maximize"])


def test_mixed_dtypes_shapes_and_integers_in_one_list():
    params = [
        torch.nn.Parameter(torch.ones(3, dtype=torch.float64)),
        torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float32)),
        torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)),
        torch.nn.Parameter(torch.ones(2, dtype=torch.float16)),
        torch.nn.Parameter(torch.ones((), dtype=torch.float32)),
        torch.nn.Parameter(torch.ones(0, dtype=torch.float32)),
        torch.nn.Parameter(torch.arange(3), requires_grad=False),
    ]
    optimizer = SOAA(params, lr=0.1, radius=FixedRadius(1.0))
    for p in params[:-1]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [p.dtype for p in params] == [
        torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.float32, torch.int64,
    ]  # fmt: skip
    for p in params[:-1]:
        assert bool((p < 1).all())
    assert optimizer.last_step.fisher_min > 0
    assert torch.equal(params[-1], torch.arange(3))


def test_only_empty_parameters_are_stepped_without_harm():
    x = torch.nn.Parameter(torch.ones(0))
    for rule in RULES.values():
        optimizer = SOAA([x], radius=rule)

        def closure():
            x.grad = torch.zeros(0)
            return torch.tensor(1.0)

        optimizer.step(closure, loss_closure=lambda: torch.tensor(1.0))
        assert optimizer.last_step.step == 1


@pytest.mark.parametrize("rule", RULES)
def test_autocast_does_not_leak_into_the_step(rule):
    plain, other = Problem(rule).run(6), Problem(rule)
    for _ in range(6):
        exact = torch.autocast("cpu", enabled=False)

        def closure(exact=exact):
            with exact:
                return other.closure()

        def loss_closure(exact=exact):
            with exact:
                return other.loss()

        with torch.autocast("cpu", dtype=torch.bfloat16):
            other.optimizer.step(closure, loss_closure=loss_closure)
        other.batch += 1
    assert_same(plain.facts(), other.facts())


@pytest.mark.parametrize("whole_loop", [False, True], ids=["around each step", "around the loop"])
def test_trials_inside_of_autocast_are_at_the_trial_point_not_at_copies_that_it_keeps_of_parameters(whole_loop):
    def run(around_step, around_loop):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        optimizer = SOAA(net.parameters(), radius=RatioRadius(interval=1))
        reports = []
        with around_loop:
            for _ in range(20):
                inputs = torch.randn(64, 8)

                def loss_closure(inputs=inputs):
                    return (net(inputs).float() - inputs.sum(1, keepdim=True)).square().mean()

                def closure(loss_closure=loss_closure):
                    optimizer.zero_grad()
                    loss = loss_closure()
                    loss.backward()
                    return loss

                with around_step:
                    optimizer.step(closure, loss_closure=loss_closure)
                reports.append(vars(optimizer.last_step).copy())
        return reports

    def autocast(**options):
        return torch.autocast("cpu", dtype=torch.bfloat16, **options)

    uncached = run(autocast(cache_enabled=False), contextlib.nullcontext())
    cached = run(*(contextlib.nullcontext(), autocast()) if whole_loop else (autocast(), contextlib.nullcontext()))
    assert uncached == cached
    assert sum(report["accepted"] for report in cached) > 10


@pytest.mark.parametrize("rule", RULES)
def test_tensor_lr_equals_float_lr(rule):
    plain, other = Problem(rule, lr=0.25).run(8), Problem(rule, lr=torch.tensor(0.25)).run(8)
    assert_same(plain.facts(), other.facts(), but=["lr"])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_either_way(rule, set_to_none):
    problem, plain = Problem(rule), Problem(rule).run(5)

    def closure():
        problem.optimizer.zero_grad(set_to_none=set_to_none)
        loss = problem.loss()
        loss.backward()
        return loss

    for _ in range(5):
        problem.optimizer.step(closure, loss_closure=problem.loss_closure)
        problem.batch += 1
    assert_same(plain.facts(), problem.facts())


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.5**t),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.StepLR(o, 2)], [3]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_multiplies_the_bound_of_the_step_and_not_the_radius(name):
    problem = Problem("ratio", lr=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # SequentialLR steps its parts before the optimizer
        scheduler = SCHEDULERS[name](problem.optimizer)
    group = problem.optimizer.param_groups[0]
    peak = 0.1 if name == "OneCycleLR" else 0.02
    for _ in range(8):
        factor, radius = group["lr"] / peak, problem.optimizer.radius
        problem.step()
        if problem.optimizer.last_step.trials <= 1:
            assert group["group_radius"] == pytest.approx(factor * radius, rel=1e-12)
        scheduler.step()


def test_plateau_scheduler_multiplies_the_bound_too():
    problem = Problem("ratio", lr=0.02)
    scheduler = lr_scheduler.ReduceLROnPlateau(problem.optimizer, factor=0.1, patience=0)
    problem.run(3)
    scheduler.step(1.0)
    scheduler.step(2.0)
    radius = problem.optimizer.radius
    problem.step()
    assert problem.optimizer.param_groups[0]["group_radius"] == pytest.approx(0.1 * radius, rel=1e-12)


@pytest.mark.parametrize(
    ("rule", "given", "betas"),
    [
        ("fixed", None, (0.9, 0.999)),
        ("published", None, (0.9, 0.999)),
        ("ratio", None, (0.9, 0.99)),
        ("ratio", (0.8, 0.95), (0.8, 0.95)),
    ],
)
def test_defaults_are_what_callbacks_read(rule, given, betas):
    optimizer = Problem(rule, lr=0.02, weight_decay=0.3, betas=given).optimizer
    assert optimizer.defaults["betas"] == betas
    for group in optimizer.param_groups:
        assert (group["lr"], group["weight_decay"], group["betas"]) == (0.02, 0.3, betas)


def test_named_parameters_are_accepted_and_saved():
    problem = Problem("fixed")
    named = SOAA([(f"layer{i}", p) for i, p in enumerate(problem.params)], radius=FixedRadius())
    problem.optimizer = named
    problem.run(2)
    assert named.state_dict()["param_groups"][0]["param_names"] == [f"layer{i}" for i in range(4)]


@pytest.mark.parametrize(
    ("saved", "into"), [(PublishedRadius(9), RatioRadius()), (RatioRadius(), FixedRadius())], ids=["ratio", "fixed"]
)
def test_state_dict_of_another_rule_is_refused_and_changes_nothing(saved, into):
    state = Problem(saved).run(3).optimizer.state_dict()
    problem = Problem(into).run(2)
    before = problem.facts()
    text = f"SOAA: `state_dict` must be of radius rule {type(into).__name__}, got '{type(saved).__name__}'"
    with pytest.raises(ValueError, match=f"^{text}$".replace("(", r"\(")):
        problem.optimizer.load_state_dict(state)
    assert_same(before, problem.facts())


@pytest.mark.parametrize("radius", [float("nan"), float("inf"), -1.0])
def test_state_dict_without_a_usable_radius_is_refused_and_changes_nothing(radius):
    state = copy.deepcopy(Problem("ratio").run(3).optimizer.state_dict())
    state["param_groups"][0]["radius"] = radius
    problem = Problem("ratio").run(2)
    before = problem.facts()
    with pytest.raises(ValueError, match=r"SOAA: `state_dict.*radius.*` must be (finite|>= 0), got"):
        problem.optimizer.load_state_dict(state)
    assert_same(before, problem.facts())


def test_state_dict_of_adamw_is_refused():
    x = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="SOAA: `state_dict` must be SOAA's own, with `radius` in its first group"):
        SOAA([x]).load_state_dict(torch.optim.AdamW([x]).state_dict())


@pytest.mark.parametrize("how", ["keyword", "bound"])
@pytest.mark.parametrize("rule", RULES)
def test_gradient_scaler_that_passes_no_closure_changes_nothing(rule, how):
    plain, scaled = Problem(rule), Problem(rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(12):
        scaled.optimizer.zero_grad()
        loss = scaled.loss()
        scaler.scale(loss).backward()
        if step == 5:  # the scaler skips this step by itself
            scaled.params[0].grad.fill_(float("inf"))
        else:
            plain.step()
        scaled.optimizer.bind_loss_closure(scaled.loss_closure, base_loss=loss)
        if how == "keyword" and rule == "ratio":
            scaler.step(scaled.optimizer, loss_closure=scaled.loss_closure)
        else:
            scaler.step(scaled.optimizer)
        scaler.update()
        plain.batch, scaled.batch = step + 1, step + 1
    assert_same(plain.facts(), scaled.facts(), but=["trials"])
