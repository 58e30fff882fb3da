"""Every refusal, word for word, and that a refused call changes nothing."""

import math
import re

import numpy as np
import pytest
import torch
from problems import RULES, Problem, assert_same

from lightning_soaa import SOAA, FixedRadius, PublishedRadius, RatioRadius


def exactly(text):
    return f"^{re.escape(text)}$"


OPTIONS = [
    ({"lr": -1.0}, ValueError, "SOAA: `lr` must be >= 0, got -1.0"),
    ({"lr": math.nan}, ValueError, "SOAA: `lr` must be finite, got nan"),
    ({"lr": math.inf}, ValueError, "SOAA: `lr` must be finite, got inf"),
    ({"lr": "1"}, TypeError, "SOAA: `lr` must be a real number, got '1'"),
    ({"lr": True}, TypeError, "SOAA: `lr` must be a real number, got True"),
    ({"lr": None}, TypeError, "SOAA: `lr` must be a real number, got None"),
    ({"lr": torch.ones(2)}, ValueError, "SOAA: `lr` must be a number or a tensor of one element, got (2,)"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "SOAA: `lr` must be >= 0, got -1.0"),
    ({"betas": (1.0, 0.9)}, ValueError, "SOAA: `betas[0]` must be in [0, 1), got 1.0"),
    ({"betas": (0.9, -0.1)}, ValueError, "SOAA: `betas[1]` must be in [0, 1), got -0.1"),
    ({"betas": (0.9, math.nan)}, ValueError, "SOAA: `betas[1]` must be finite, got nan"),
    ({"betas": (0.9,)}, TypeError, "SOAA: `betas` must be a pair of numbers, got (0.9,)"),
    ({"betas": 0.9}, TypeError, "SOAA: `betas` must be a pair of numbers, got 0.9"),
    ({"betas": ("a", 0.9)}, TypeError, "SOAA: `betas[0]` must be a real number, got 'a'"),
    ({"eps": 0.0}, ValueError, "SOAA: `eps` must be > 0, got 0.0"),
    ({"eps": -1.0}, ValueError, "SOAA: `eps` must be > 0, got -1.0"),
    ({"eps": math.inf}, ValueError, "SOAA: `eps` must be finite, got inf"),
    (
        {"eps": 1e-38},
        ValueError,
        "SOAA: `eps` must be >= 1.1754943508222875e-38, the smallest normal float32, got 1e-38",
    ),
    ({"weight_decay": -0.1}, ValueError, "SOAA: `weight_decay` must be >= 0, got -0.1"),
    ({"weight_decay": None}, TypeError, "SOAA: `weight_decay` must be a real number, got None"),
    ({"foreach": 3}, TypeError, "SOAA: `foreach` must be None, True or False, got 3"),
    ({"foreach": 1}, TypeError, "SOAA: `foreach` must be None, True or False, got 1"),
    ({"foreach": []}, TypeError, "SOAA: `foreach` must be None, True or False, got []"),
    ({"fused": 1}, TypeError, "SOAA: `fused` must be None, True or False, got 1"),
    ({"maximize": 1}, TypeError, "SOAA: `maximize` must be a bool, got 1"),
]


@pytest.mark.parametrize(("options", "error", "text"), OPTIONS)
def test_invalid_option_is_refused_as_argument(options, error, text):
    with pytest.raises(error, match=exactly(text)):
        SOAA([torch.nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize(("options", "error", "text"), OPTIONS)
def test_invalid_option_is_refused_in_the_second_group(options, error, text):
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(3)]
    groups[1] |= options
    with pytest.raises(error, match=exactly(text)):
        SOAA(groups)


@pytest.mark.parametrize(("options", "error", "text"), OPTIONS)
def test_invalid_option_is_refused_in_a_group_added_later_and_nothing_changes(options, error, text):
    problem = Problem("ratio").run(2)
    before = problem.facts()
    with pytest.raises(error, match=exactly(text)):
        problem.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], **options})
    assert_same(before, problem.facts())
    assert len(problem.optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"radius": 1.0}, "SOAA: `radius` must be a radius rule such as RatioRadius(), got 1.0"),
        ({"radius": FixedRadius}, f"SOAA: `radius` must be a radius rule such as RatioRadius(), got {FixedRadius!r}"),
        ({"fisher": None}, "SOAA: `fisher` must be a Fisher estimate such as DiagonalFisher(), got None"),
    ],
)
def test_unknown_rule_object_is_refused(options, text):
    with pytest.raises(TypeError, match=exactly(text)):
        SOAA([torch.nn.Parameter(torch.ones(1))], **options)


def test_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentum'"):
        SOAA([torch.nn.Parameter(torch.ones(1))], momentum=0.9)


@pytest.mark.parametrize("params", [[], (), iter(())])
def test_empty_parameter_list_is_refused(params):
    with pytest.raises(ValueError, match=exactly("SOAA: `params` must be a non-empty iterable of parameters, got []")):
        SOAA(params)


def test_torchs_own_refusals_of_parameters_stand():
    x = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an iterable"):
        SOAA(x)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        SOAA([{"params": [x]}, {"params": [x]}])
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        SOAA([x * 2])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        SOAA([x, x])


def test_groups_that_do_not_agree_on_maximize_are_refused():
    x, y = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    with pytest.raises(ValueError, match=exactly("SOAA: `maximize` must be the same in all groups, got True")):
        SOAA([{"params": [x]}, {"params": [y], "maximize": True}])


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: FixedRadius(0), ValueError, "FixedRadius: `radius` must be > 0, got 0.0"),
        (lambda: FixedRadius(math.inf), ValueError, "FixedRadius: `radius` must be finite, got inf"),
        (lambda: PublishedRadius(0), ValueError, "PublishedRadius: `total_steps` must be >= 1, got 0"),
        (lambda: PublishedRadius(1.5), TypeError, "PublishedRadius: `total_steps` must be an int, got 1.5"),
        (lambda: PublishedRadius(9, gamma=1), ValueError, "PublishedRadius: `gamma` must be in (0, 1), got 1.0"),
        (
            lambda: PublishedRadius(9, initial_radius=-1),
            ValueError,
            "PublishedRadius: `initial_radius` must be > 0, got -1.0",
        ),
        (lambda: RatioRadius(relative="x"), TypeError, "RatioRadius: `relative` must be a real number, got 'x'"),
        (lambda: RatioRadius(target=1.0), ValueError, "RatioRadius: `target` must be in (0, 1), got 1.0"),
        (lambda: RatioRadius(target=0.0), ValueError, "RatioRadius: `target` must be in (0, 1), got 0.0"),
        (lambda: RatioRadius(interval=0), ValueError, "RatioRadius: `interval` must be >= 1, got 0"),
        (lambda: RatioRadius(max_trials=True), TypeError, "RatioRadius: `max_trials` must be an int, got True"),
    ],
)
def test_invalid_rule_is_refused(make, error, text):
    with pytest.raises(error, match=exactly(text)):
        make()


NO_TRIAL = (
    "SOAA: `loss_closure` must be given under RatioRadius, got None; pass step(closure, loss_closure=...), a forward "
    "pass on the same batch, or choose FixedRadius()"
)


def test_ratio_radius_without_a_loss_closure_is_refused_before_the_closure_runs():
    problem = Problem("ratio").run(2)
    before, calls = problem.facts(), problem.calls["closure"]
    with pytest.raises(ValueError, match=exactly(NO_TRIAL)):
        problem.optimizer.step(problem.closure)
    with pytest.raises(ValueError, match=exactly(NO_TRIAL)):
        problem.optimizer.step()
    assert_same(before, problem.facts())
    assert problem.calls["closure"] == calls


LOSSES = [
    (torch.ones(3), "must return a scalar loss, got a tensor of shape (3,)"),
    (torch.ones(()) * 1j, "must return a real loss, got a tensor of torch.complex64"),
    (1j, "must return a real loss, got 1j"),
    ("loss", "must return a scalar loss, got 'loss'"),
    (np.complex64(1j), "must return a real loss, got a tensor of torch.complex64"),
    (np.ones(2), "must return a scalar loss, got array([1., 1.])"),
    ([1.0], "must return a scalar loss, got [1.0]"),
]


@pytest.mark.parametrize(("value", "text"), LOSSES)
@pytest.mark.parametrize("rule", RULES)
def test_closure_that_returns_no_real_scalar_is_refused(rule, value, text):
    problem = Problem(rule).run(2)
    before = problem.facts()

    def closure():
        problem.closure()
        return value

    with pytest.raises(TypeError, match=exactly(f"SOAA: `closure` {text}")):
        problem.optimizer.step(closure, loss_closure=problem.loss_closure)
    assert_same(before, problem.facts())


@pytest.mark.parametrize(("value", "text"), [*LOSSES, (None, "must return a scalar loss, got None")])
def test_loss_closure_that_returns_no_real_scalar_is_refused(value, text):
    problem = Problem("ratio").run(2)
    before = problem.facts()
    with pytest.raises(TypeError, match=exactly(f"SOAA: `loss_closure` {text}")):
        problem.optimizer.step(problem.closure, loss_closure=lambda: value)
    assert_same(before, problem.facts())


def test_missing_loss_is_refused_under_the_published_rule():
    problem = Problem("published").run(2)
    before = problem.facts()
    text = exactly("SOAA: `closure` must return the loss under PublishedRadius, got None")
    with pytest.raises(ValueError, match=text):
        problem.optimizer.step(lambda: problem.closure() and None)
    with pytest.raises(ValueError, match=text):
        problem.optimizer.step()
    assert_same(before, problem.facts())


def test_loss_closure_to_bind_must_be_callable():
    with pytest.raises(TypeError, match=exactly("SOAA: `loss_closure` must be callable, got 1.0")):
        Problem("ratio").optimizer.bind_loss_closure(1.0)


@pytest.mark.parametrize("name", ["closure", "loss_closure"])
@pytest.mark.parametrize("value", [5, torch.tensor(1.0)])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_callable_is_refused_on_every_step(rule, value, name):
    problem = Problem(rule).run(2)
    problem.optimizer.param_groups[0].update({"rule_phase": 0, "unchecked_steps": 0} if rule == "ratio" else {})
    problem.closure()
    before = problem.facts()
    given = {"loss_closure": problem.loss_closure, name: value}
    with pytest.raises(TypeError, match=exactly(f"SOAA: `{name}` must be callable, got {value!r}")):
        problem.optimizer.step(**given)
    assert_same(before, problem.facts())


@pytest.mark.parametrize(
    ("group", "error", "text"),
    [
        ([torch.ones(1)], TypeError, "SOAA: `param_group` must be a dict with `params`, got 'list'"),
        (torch.ones(1), TypeError, "SOAA: `param_group` must be a dict with `params`, got 'Tensor'"),
        ({"lr": 1.0}, ValueError, "SOAA: `param_group` must be a dict with `params`, got ['lr']"),
    ],
)
def test_what_is_no_parameter_group_is_refused_and_nothing_changes(group, error, text):
    problem = Problem("ratio").run(2)
    before = problem.facts()
    with pytest.raises(error, match=exactly(text)):
        problem.optimizer.add_param_group(group)
    assert_same(before, problem.facts())
    assert len(problem.optimizer.param_groups) == 1


def without(mapping, key):
    return {k: v for k, v in mapping.items() if k != key}


def with_entry(state, change):
    """The state dict with its parameter 1 changed."""
    return {**state, "state": {**state["state"], 1: change(state["state"][1])}}


GROUP = ["base_lr", "betas", "eps", "foreach", "fused", "group_radius", "lr", "maximize", "weight_decay"]
LOADED = [
    (lambda s: {}, "SOAA: `state_dict` must be one with `state` and `param_groups`, got []"),
    (
        lambda s: without(s, "state"),
        "SOAA: `state_dict` must be one with `state` and `param_groups`, got ['param_groups']",
    ),
    (
        lambda s: {**s, "param_groups": []},
        "SOAA: `state_dict` must be SOAA's own, with `radius` in its first group, got []",
    ),
    (
        lambda s: {**s, "param_groups": [s["param_groups"][0], without(s["param_groups"][1], "lr")]},
        "SOAA: `state_dict['param_groups'][1]` must be a group with `lr` and `params`, "
        f"got {sorted({*GROUP, 'params'} - {'lr'})}",
    ),
    (
        lambda s: {**s, "param_groups": [s["param_groups"][0], without(s["param_groups"][1], "params")]},
        f"SOAA: `state_dict['param_groups'][1]` must be a group with `lr` and `params`, got {GROUP}",
    ),
    (
        lambda s: with_entry(s, lambda entry: {**entry, "m": entry["m"][:3]}),
        "SOAA: `state_dict['state'][1]['m']` must be a tensor of shape (8,), got (3,)",
    ),
    (
        lambda s: with_entry(s, lambda entry: {**entry, "v": entry["v"].reshape(2, 4)}),
        "SOAA: `state_dict['state'][1]['v']` must be a tensor of shape (8,), got (2, 4)",
    ),
    (
        lambda s: with_entry(s, lambda entry: {**entry, "v": 0.0}),
        "SOAA: `state_dict['state'][1]['v']` must be a tensor of shape (8,), got ()",
    ),
    (
        lambda s: with_entry(s, lambda entry: without(entry, "m")),
        "SOAA: `state_dict['state'][1]` must be one with `last_portion`, `left_over`, `left_over_mean`, `m`, "
        "`portion`, `promised`, `promised_mean`, `step`, `v`, got ['last_portion', 'left_over', 'left_over_mean', "
        "'portion', 'promised', 'promised_mean', 'step', 'v']",
    ),
    (
        lambda s: with_entry(s, lambda entry: without(entry, "step")),
        "SOAA: `state_dict['state'][1]` must be one with `last_portion`, `left_over`, `left_over_mean`, `m`, "
        "`portion`, `promised`, `promised_mean`, `step`, `v`, got ['last_portion', 'left_over', 'left_over_mean', "
        "'m', 'portion', 'promised', 'promised_mean', 'v']",
    ),
    (
        lambda s: {**s, "param_groups": [{**s["param_groups"][0], "lr_unit": -1.0}, s["param_groups"][1]]},
        "SOAA: `state_dict['param_groups'][0]['lr_unit']` must be >= 0, got -1.0",
    ),
]


@pytest.mark.parametrize(("spoil", "text"), LOADED)
def test_state_dict_that_does_not_fit_is_refused_before_anything_changes(spoil, text):
    problem = Problem("ratio")
    problem.optimizer = SOAA([{"params": problem.params[:2]}, {"params": problem.params[2:]}])
    state = spoil(problem.run(3).optimizer.state_dict())
    problem.run(2)
    before, report = problem.facts(), problem.optimizer.last_step
    with pytest.raises(ValueError, match=exactly(text)):
        problem.optimizer.load_state_dict(state)
    assert_same(before, problem.facts())
    assert problem.optimizer.last_step == report
    problem.run(2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
@pytest.mark.parametrize("rule", RULES)
def test_state_dict_of_an_optimizer_at_lr_zero_loads(rule, dtype):
    x = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer, other = (SOAA([x], lr=0.0, radius=RULES[rule]) for _ in range(2))
    for _ in range(2):
        x.grad = torch.ones_like(x)
        optimizer.step(lambda: 1.0, loss_closure=lambda: 1.0)
    other.load_state_dict(optimizer.state_dict())
    assert other.radius == optimizer.radius
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("named", [True, False])
def test_sparse_gradient_is_refused_by_name(named):
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = SOAA(table.named_parameters() if named else table.parameters(), radius=FixedRadius())
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    who = "weight" if named else "0 of group 0"
    text = f"SOAA: `params` must be given dense gradients, got 'a torch.sparse_coo of parameter {who}'"
    with pytest.raises(TypeError, match=exactly(text)):
        optimizer.step()
    assert torch.equal(before, table.weight)
    assert not optimizer.state
