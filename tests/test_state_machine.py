"""SOAA against the numpy twin under any order of steps, copies, state dicts, new groups and changed options."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from reference import ReferenceSOAA

from lightning_soaa import SOAA, FixedRadius, PublishedRadius, RatioRadius

RATIO = {"relative": 0.2, "target": 0.6, "interval": 3, "max_trials": 4}
SHAPES = [(3,), (2, 3), (), (4, 1)]
RULES = {
    "fixed": (FixedRadius(0.7), {"radius": 0.7}),
    "published": (PublishedRadius(20, 0.25), {"total_steps": 20, "gamma": 0.25}),
    "ratio": (RatioRadius(**RATIO), {"options": RATIO}),
}
SPOILED = ["nothing", "loss", "gradient", "huge gradient", "trial rises", "trial is nan"]


@st.composite
def groups(draw):
    """Options and shapes of one parameter group."""
    power = lambda low, high: 10.0 ** draw(st.floats(low, high))  # noqa: E731
    return {
        "shapes": draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=2)),
        "lr": power(-3, -0.5),
        "betas": (draw(st.sampled_from([0.5, 0.9])), draw(st.sampled_from([0.9, 0.999]))),
        "eps": power(-9, -4),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
    }


class Twins(RuleBasedStateMachine):
    """A run of SOAA and one of the twin, that are given the same."""

    name = ""

    @initialize(first=groups(), foreach=st.booleans(), seed=st.integers(0, 1000), before=st.sampled_from([0, 40, 60]))
    def begin(self, first, foreach, seed, before):
        """Start both, `before` steps ahead: burn-in takes about forty."""
        self.rng, self.curvature, self.stepped = np.random.default_rng(seed), [], False
        group, mirror = self.make(first)
        self.foreach, options = foreach, {name: first[name] for name in ("betas", "eps")}
        self.defaults = options | {"foreach": foreach, "radius": RULES[self.name][0]}
        self.optimizer = SOAA([group], **self.defaults)
        self.twin = ReferenceSOAA([mirror], self.name, **RULES[self.name][1])
        self.steps(before)

    def make(self, drawn):
        """Return a group of parameters, and its mirror."""
        start = [self.rng.normal(size=shape) for shape in drawn["shapes"]]
        self.curvature.append([10 ** self.rng.uniform(-2, 1, size=x.shape) for x in start])
        options = {name: value for name, value in drawn.items() if name != "shapes"}
        group = {"params": [torch.nn.Parameter(torch.tensor(x)) for x in start], **options}
        return group, {"x": [x.copy() for x in start], **options}

    def params(self):
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def arrays(self):
        return [x for group in self.twin.groups for x in group["x"]]

    @rule(spoiled=st.sampled_from([*SPOILED, *["nothing"] * 6]))
    def step(self, spoiled):
        shift = self.rng.normal()
        flat = [k for ks in self.curvature for k in ks]
        tensors = [torch.tensor(k) for k in flat]
        start, origin = [p.detach().clone() for p in self.params()], [x.copy() for x in self.arrays()]
        base = math.nan if spoiled == "loss" else 0.0
        high = {"trial rises": 1e3, "trial is nan": math.nan}.get(spoiled, 0.0)
        blow = {"gradient": math.inf, "huge gradient": 1e6}.get(spoiled, 1.0)

        def loss_closure():
            params = self.params()
            moved = not all(torch.equal(p, x) for p, x in zip(params, start, strict=True))
            pairs = zip(tensors, params, strict=True)
            loss = sum((0.5 * k * (p - shift) ** 2 + torch.cos(p)).sum() for k, p in pairs)
            return loss + base + (high if moved else 0.0)

        def closure():
            self.optimizer.zero_grad()
            loss = loss_closure()
            loss.backward()
            for p in self.params():
                p.grad.mul_(blow)
            return loss.detach()

        def twin_loss():
            arrays = self.arrays()
            moved = not all(np.array_equal(x, y) for x, y in zip(arrays, origin, strict=True))
            loss = sum(np.sum(0.5 * k * (x - shift) ** 2 + np.cos(x)) for k, x in zip(flat, arrays, strict=True))
            return loss + base + (high if moved else 0.0)

        with np.errstate(invalid="ignore"):
            grads = [
                [(k * (x - shift) - np.sin(x)) * blow for k, x in zip(ks, group["x"], strict=True)]
                for ks, group in zip(self.curvature, self.twin.groups, strict=True)
            ]
            self.optimizer.step(closure, loss_closure=loss_closure)
            self.twin.step(grads, twin_loss(), twin_loss)
        self.stepped = True
        self.parameters_and_radius_are_the_twins()
        # From the same point again: where a run is chaotic, roundings would grow beyond any tolerance.
        params = iter(self.params())
        for group in self.twin.groups:
            group["x"] = [next(params).detach().numpy().copy() for _ in group["x"]]

    @rule(steps=st.integers(2, 20))
    def steps(self, steps):
        for _ in range(steps):
            self.step("nothing")

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none):
        self.optimizer.zero_grad(set_to_none=to_none)

    @rule()
    def step_without_gradients(self):
        self.optimizer.zero_grad()
        self.optimizer.step()

    @rule()
    def deepcopy(self):
        self.optimizer = copy.deepcopy(self.optimizer)

    @rule(weights_only=st.booleans())
    def load_state_dict(self, weights_only):
        """Go on with fresh parameters of the same values and a fresh optimizer, as a resumed run does."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        fresh = [
            {"params": [torch.nn.Parameter(p.detach().clone()) for p in group["params"]], "lr": 0.5}
            for group in self.optimizer.param_groups
        ]
        self.optimizer = SOAA(fresh, **self.defaults)
        self.optimizer.load_state_dict(torch.load(file, weights_only=weights_only))

    @precondition(lambda self: len(self.twin.groups) < 3)
    @rule(drawn=groups())
    def add_param_group(self, drawn):
        group, mirror = self.make(drawn)
        self.optimizer.add_param_group(group)
        self.twin.begin(mirror)
        self.twin.groups.append(mirror)
        self.twin.initial_lrs.append(mirror["lr"])
        if not self.stepped:
            self.twin.lr_unit = max(self.twin.initial_lrs)

    @rule(factor=st.sampled_from([1.0, 0.9, 0.5, 0.02]))
    def schedule(self, factor):
        pairs = zip(self.optimizer.param_groups, self.twin.groups, self.twin.initial_lrs, strict=True)
        for group, mirror, initial in pairs:
            group["lr"] = mirror["lr"] = initial * factor

    @rule(weight_decay=st.sampled_from([0.0, 0.01, 0.3]), which=st.integers(0, 2))
    def change_weight_decay(self, weight_decay, which):
        which %= len(self.twin.groups)
        self.optimizer.param_groups[which]["weight_decay"] = self.twin.groups[which]["weight_decay"] = weight_decay

    @rule()
    def read_report(self):
        report = self.optimizer.last_step
        if report is not None:
            counted = (report.skipped_steps, report.outlier_steps, report.total_trials)
            assert counted == (self.twin.skipped, self.twin.outliers, self.twin.trials)

    @invariant()
    def parameters_and_radius_are_the_twins(self):
        for p, x in zip(self.params(), self.arrays(), strict=True):
            np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-10, atol=1e-10)
        assert self.optimizer.radius == pytest.approx(self.twin.d, rel=1e-9)

    def teardown(self):
        head = self.optimizer.state_dict()["param_groups"][0]
        assert (head["skipped_steps"], head["outlier_steps"]) == (self.twin.skipped, self.twin.outliers)
        assert head["total_trials"] == self.twin.trials


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
@pytest.mark.parametrize("name", RULES)
def test_any_order_of_actions_leaves_the_twins_equal(name, device, request):
    if device == "accelerator":
        request.getfixturevalue("accelerator")
    machine = type("Machine", (Twins,), {"name": name})
    options = settings(max_examples=20, stateful_step_count=25, deadline=None, derandomize=True, database=None)
    run_state_machine_as_test(machine, settings=options)
