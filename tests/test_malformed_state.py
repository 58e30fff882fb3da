"""State dicts that are not what SOAA saved: refused by name, and nothing of them is loaded."""

import re

import pytest
import torch
from problems import Problem, assert_same

from lightning_soaa import SOAA, FixedRadius, KroneckerFisher

WITHIN = "state_dict['param_groups'][0]"


def head(state, **numbers):
    state["param_groups"][0].update(numbers)


def entry(state, **values):
    state["state"][1].update(values)


def moments_of(dtype):
    return lambda state: entry(state, m=torch.ones(8, dtype=dtype))


def adamw():
    problem = Problem("fixed")
    optimizer = torch.optim.AdamW(problem.params)
    problem.loss().backward()
    optimizer.step()
    return optimizer.state_dict()


def other(*args, groups=1, take=4, **options):
    """Return the state of another SOAA after a step."""
    problem = Problem(*args, **options)
    parts = [problem.params[:take]] if groups == 1 else [problem.params[:2], problem.params[2:]]
    rule, fisher = problem.optimizer.radius_rule, problem.optimizer.fisher_rule
    problem.optimizer = SOAA([{"params": part} for part in parts], radius=rule, fisher=fisher)
    return problem.run(2).optimizer.state_dict()


def turned(state):
    for each in state["state"].values():
        for name in ("m", "v"):
            each[name] = each[name].T if each[name].ndim == 2 else each[name]


REFUSED = {
    "nothing": (lambda s: {}, ValueError, "SOAA: `state_dict` must be one with `state` and `param_groups`, got []"),
    "no groups": (
        lambda s: {"state": {}}, ValueError,
        "SOAA: `state_dict` must be one with `state` and `param_groups`, got ['state']",
    ),
    "an empty list of groups": (
        lambda s: {**s, "param_groups": []}, ValueError,
        "SOAA: `state_dict` must be SOAA's own, with `radius` in its first group, got []",
    ),
    "AdamW's": (
        lambda s: adamw(), ValueError,
        "SOAA: `state_dict` must be SOAA's own, with `radius` in its first group, "
        f"got {sorted(adamw()['param_groups'][0])}",
    ),
    "of another rule": (
        lambda s: other(FixedRadius()), ValueError,
        "SOAA: `state_dict` must be of radius rule RatioRadius, got 'FixedRadius'",
    ),
    "of two groups": (
        lambda s: other(groups=2), ValueError, "loaded state dict has a different number of parameter groups"
    ),
    "of fewer parameters": (
        lambda s: other(take=2), ValueError,
        "loaded state dict contains a parameter group that doesn't match the size of optimizer's group",
    ),
    "of other shapes": (
        turned, ValueError, "SOAA: `state_dict['state'][0]['m']` must be a tensor of shape (6, 8), got (8, 6)"
    ),
    "a radius that is nan": (
        lambda s: head(s, radius=float("nan")), ValueError, f"SOAA: `{WITHIN}['radius']` must be finite, got nan"
    ),
    "a negative radius": (
        lambda s: head(s, radius=-1.0), ValueError, f"SOAA: `{WITHIN}['radius']` must be >= 0, got -1.0"
    ),
    "a radius that is text": (
        lambda s: head(s, radius="1"), TypeError, f"SOAA: `{WITHIN}['radius']` must be a real number, got '1'"
    ),
    "moments that are numbers": (
        lambda s: entry(s, m=0.0), ValueError,
        "SOAA: `state_dict['state'][1]['m']` must be a tensor of shape (8,), got ()",
    ),
    "a parameter without age": (
        lambda s: s["state"][1].pop("step"), ValueError,
        "SOAA: `state_dict['state'][1]` must be one with `last_portion`, `left_over`, `left_over_mean`, `m`, "
        "`portion`, `promised`, `promised_mean`, `step`, `v`, got ['last_portion', 'left_over', 'left_over_mean', "
        "'m', 'portion', 'promised', 'promised_mean', 'v']",
    ),
    "text": (lambda s: "none", TypeError, "SOAA: `state_dict` must be a dict, got 'str'"),
    "a list": (lambda s: [s], TypeError, "SOAA: `state_dict` must be a dict, got 'list'"),
    "a list of states": (
        lambda s: {**s, "state": [s]}, TypeError, "SOAA: `state_dict['state']` must be a dict, got 'list'"
    ),
    "a dict of groups": (
        lambda s: {**s, "param_groups": {0: s}}, TypeError,
        "SOAA: `state_dict['param_groups']` must be a list of dicts, got 'dict'",
    ),
    "a group that is a number": (
        lambda s: {**s, "param_groups": [1]}, TypeError, f"SOAA: `{WITHIN}` must be a dict, got 'int'"
    ),
    "the state of a parameter is None": (
        lambda s: s["state"].update({1: None}), TypeError,
        "SOAA: `state_dict['state'][1]` must be a dict, got 'NoneType'",
    ),
    "the state of a parameter is a list": (
        lambda s: s["state"].update({1: [1]}), TypeError, "SOAA: `state_dict['state'][1]` must be a dict, got 'list'"
    ),
    "of another Fisher": (
        lambda s: other(fisher=KroneckerFisher()), ValueError,
        "SOAA: `state_dict['state'][0]` must be one with `last_portion`, `left_over`, `left_over_mean`, `m`, "
        "`portion`, `promised`, `promised_mean`, `step`, `v`, got ['basis_age', 'last_portion', 'left', 'left_basis', "
        "'left_over', 'left_over_mean', 'm', 'portion', 'promised', 'promised_mean', 'right', 'right_basis', 'step', "
        "'v']",
    ),
    "moments that are integers": (
        moments_of(torch.int64), ValueError,
        "SOAA: `state_dict['state'][1]['m']` must be a tensor of floating-point numbers, got torch.int64",
    ),
    "moments that are complex": (
        moments_of(torch.complex64), ValueError,
        "SOAA: `state_dict['state'][1]['m']` must be a tensor of floating-point numbers, got torch.complex64",
    ),
    "a negative age": (
        lambda s: entry(s, step=-3), ValueError, "SOAA: `state_dict['state'][1]['step']` must be >= 0, got -3"
    ),
    "an age that is text": (
        lambda s: entry(s, step="3"), TypeError, "SOAA: `state_dict['state'][1]['step']` must be an int, got '3'"
    ),
    "a counter that is text": (
        lambda s: head(s, steps="3"), TypeError, f"SOAA: `{WITHIN}['steps']` must be an int, got '3'"
    ),
    "a negative counter": (
        lambda s: head(s, checks=-1), ValueError, f"SOAA: `{WITHIN}['checks']` must be >= 0, got -1"
    ),
    "a negative root mean square": (
        lambda s: head(s, gradient_rms=-1.0), ValueError,
        f"SOAA: `{WITHIN}['gradient_rms']` must be >= 0, got -1.0",
    ),
    "a gate of two numbers": (
        lambda s: head(s, gate=(1.0, 2.0)), ValueError,
        f"SOAA: `{WITHIN}['gate']` must be empty or of 8 numbers, got (1.0, 2.0)",
    ),
    "a number of the rule is text": (
        lambda s: head(s, rule_eaten="1"), TypeError, f"SOAA: `{WITHIN}['rule_eaten']` must be a real number, got '1'"
    ),
    "an option out of range": (
        lambda s: head(s, betas=(2.0, 0.9)), ValueError, "SOAA: `betas[0]` must be in [0, 1), got 2.0"
    ),
    "an option of the wrong type": (
        lambda s: head(s, weight_decay=None), TypeError, "SOAA: `weight_decay` must be a real number, got None"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "kind", "text"), REFUSED.values(), ids=REFUSED)
def test_malformed_state_dict_is_refused_by_name_and_nothing_of_it_is_loaded(spoil, kind, text):
    problem = Problem().run(7)
    state = other()
    spoiled = spoil(state)  # another one, or nothing: the same, edited in place
    spoiled = spoiled if isinstance(spoiled, dict | list | str) else state
    before, report = problem.facts(), problem.optimizer.last_step
    with pytest.raises(kind, match=f"^{re.escape(text)}$"):
        problem.optimizer.load_state_dict(spoiled)
    assert_same(before, problem.facts())
    assert problem.optimizer.last_step == report
    expected = Problem().run(12).facts()
    assert_same(expected, problem.run(5).facts())
