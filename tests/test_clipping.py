"""Predicted reductions are those of gradients before they are clipped."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, LambdaCallback
from lightning_models import QUIET, Automatic, Mixed, fit
from problems import Problem, assert_same

from lightning_soaa import SOAA, FixedRadius, RatioRadius
from lightning_soaa.module import SOAAMixin
from lightning_soaa.monitor import TrustRegionMonitor

pytestmark = QUIET


class Clipped(Problem):
    """A problem whose closure clips, and keeps the gradients as they were.

    Args:
        clip: takes parameters and clips their gradients; None for none.
        note: whether the optimizer is told.
    """

    def __init__(self, clip, *, note=True, scale=1.0):
        super().__init__("ratio")
        self.clip, self.note, self.scale = clip, note, scale

    def closure(self):
        loss = super().closure()
        self.whole = [p.grad.clone() for p in self.params]
        for p in self.params:
            p.grad *= self.scale
        if self.note:
            self.optimizer.before_clipping(scale=self.scale)
        for p in self.params:
            p.grad /= self.scale
        if self.clip is not None:
            self.clip(self.params)
        return loss

    def slope(self):
        """Take a step; return ``-(g . s)`` of the whole gradient and the step, and the report."""
        before = [p.detach().clone() for p in self.params]
        self.step()
        moves = [p.detach() - old for p, old in zip(self.params, before, strict=True)]
        return -sum((g * s).sum() for g, s in zip(self.whole, moves, strict=True)).item(), self.optimizer.last_step


def by_norm(params):
    torch.nn.utils.clip_grad_norm_(params, 0.01)


def by_value(params):
    torch.nn.utils.clip_grad_value_(params, 0.01)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_predicted_reduction_is_the_slope_along_the_step_of_gradients_that_were_clipped_by_norm(scale):
    problem, checked = Clipped(by_norm, scale=scale), 0
    for _ in range(60):
        head = problem.optimizer.param_groups[0]
        due, trials = problem.optimizer.check_due, head["total_trials"]
        slope, report = problem.slope()
        if due and report.accepted and head["total_trials"] == trials + 1 and head["steps"] > 1:
            assert report.predicted_reduction == pytest.approx(slope, rel=1e-9)
            checked += 1
    assert checked > 20


def test_a_fresh_slope_is_that_of_gradients_before_they_are_clipped():
    """With a constant gradient it is all of the slope that the step started from."""
    x = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    weights = torch.arange(1.0, 6, dtype=torch.float64)
    optimizer, clip = SOAA([x]), 1.0

    def closure():
        optimizer.zero_grad()
        loss = (weights * x).sum()
        loss.backward()
        optimizer.before_clipping()
        torch.nn.utils.clip_grad_norm_([x], clip)
        return loss

    for step in range(12):
        clip = 1.0 if step % 2 else 0.01
        optimizer.step(closure, loss_closure=lambda: (weights * x).sum())
        report = optimizer.last_step
        if step:
            assert report.acceptance_ratio == pytest.approx(1, rel=1e-9)
    assert optimizer.param_groups[0]["fresh_slope"] is None
    optimizer.param_groups[0]["rule_phase"] = 0
    clip = 0.3
    optimizer.step(closure, loss_closure=lambda: (weights * x).sum())
    optimizer.state_dict()
    assert optimizer.param_groups[0]["fresh_slope"] == pytest.approx(1, rel=0.05)


def test_values_cut_off_are_allowed_for_by_half_or_more():
    def error(note):
        problem, errors = Clipped(by_value, note=note), []
        for _ in range(40):
            due = problem.optimizer.check_due
            slope, report = problem.slope()
            if due and report.accepted and slope:
                errors.append(abs(report.predicted_reduction / slope - 1))
        return sum(errors) / len(errors)

    assert error(note=True) < 0.5 * error(note=False)


def test_noting_gradients_that_are_not_clipped_changes_no_bit():
    assert_same(Clipped(None, note=False).run(60).facts(), Clipped(None).run(60).facts())


@pytest.mark.parametrize("drop", ["none", "zero"])
def test_a_parameter_whose_gradient_is_dropped_after_noting_counts_as_left_out_not_as_clipped(drop):
    def run(note):
        problem = Clipped(None, note=note)

        def dropped(params):
            params[0].grad = None if drop == "none" else torch.zeros_like(params[0])

        problem.clip = dropped
        return problem.run(60).facts()

    assert_same(run(note=False), run(note=True))


def test_a_gradient_that_was_infinite_before_clipping_leaves_no_infinite_prediction():
    problem = Clipped(by_value).run(5)
    inner = problem.loss

    def loss():
        spike = problem.params[3] - problem.params[3].detach()
        return inner() + spike.sqrt()  # 0, with an infinite slope

    problem.loss = loss
    report = problem.run(1).optimizer.last_step
    assert not all(bool(grad.isfinite().all()) for grad in problem.whole)
    assert math.isfinite(report.predicted_reduction)
    assert math.isfinite(problem.optimizer.param_groups[0]["checked_slope"])


def test_a_gradient_of_zeros_is_noted_without_harm():
    problem = Clipped(None).run(5)
    problem.spoil = 0.0
    before = problem.run(1).facts()
    assert all(bool(value.isfinite().all()) for value in before.values() if isinstance(value, torch.Tensor))


def test_note_is_for_one_step_only():
    noted = Clipped(by_norm).run(5)
    plain = Clipped(by_norm).run(5)
    noted.optimizer.before_clipping()
    noted.optimizer.before_clipping(scale=3.0)
    assert_same(plain.run(5).facts(), noted.run(5).facts())


@pytest.mark.parametrize("kind", [Mixed, Automatic])
def test_clipping_by_a_trainer_flag_leaves_acceptance_ratios_below_one(kind):
    ratios = []

    class Watched(kind):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            report = self.optimizers().optimizer.last_step
            if report.step > 2 and report.accepted:
                ratios.append(report.acceptance_ratio)

    fit(Watched(RatioRadius()), gradient_clip_val=1e-3, max_epochs=2)
    assert len(ratios) >= 8
    assert max(ratios) < 1.2


class Linear(LightningModule):
    """A module that overrides no hook."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class Untouched(SOAAMixin, Linear):
    noted = 0

    def configure_soaa(self, params):
        return noting(SOAA(params, radius=FixedRadius()), self)


class UntouchedAutomatic(Untouched):
    automatic_optimization = True


class UntouchedOwnLoop(Untouched):
    automatic_optimization = False

    def configure_optimizers(self):
        return self.configure_soaa(self.parameters())

    def training_step(self, batch, batch_idx):
        self.soaa_step(self.optimizers(), lambda: super(UntouchedOwnLoop, self).training_step(batch, batch_idx))


def noting(optimizer, module):
    """Count in `module` how often gradients are noted."""
    inner = optimizer.before_clipping

    def before_clipping(**kwargs):
        module.noted += 1
        inner(**kwargs)

    optimizer.before_clipping = before_clipping
    return optimizer


MODES = [Untouched, UntouchedAutomatic, UntouchedOwnLoop]


@pytest.mark.parametrize("kind", MODES)
def test_gradients_that_nothing_can_edit_are_not_noted(kind):
    module = kind()
    fit(module, [TrustRegionMonitor(layers=1, histograms=True)])
    assert (module.noted, module.global_step) == (0, 16)


def hook(self, *args, **kwargs):
    """Do nothing."""


def clip_by_hand(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
    self.clip_gradients(optimizer, 0.1, "norm")


def step_by_hand(self, epoch, batch_idx, optimizer, optimizer_closure=None):
    optimizer.step(closure=optimizer_closure)


class Stepping(SOAA):
    def step(self, closure=None, **kwargs):
        return super().step(closure, **kwargs)


EDITORS = {
    "a hook of the module's": (lambda kind: type("Own", (kind,), {"on_before_optimizer_step": hook}), {}),
    "a hook of a callback's": (None, {"callbacks": [type("Own", (Callback,), {"on_before_optimizer_step": hook})()]}),
    "a hook of the user's monitor": (
        None,
        {"callbacks": [type("Own", (TrustRegionMonitor,), {"on_before_optimizer_step": hook})()]},
    ),
    "a function that is a hook": (
        None,
        {"callbacks": [LambdaCallback(on_before_optimizer_step=lambda *args: None)]},
    ),
    "an optimizer of the user's": (
        lambda kind: type(
            "Own",
            (kind,),
            {"configure_soaa": lambda self, params: noting(Stepping(params, radius=FixedRadius()), self)},
        ),
        {},
    ),
}
# Lightning allows none of these where the module runs a loop of its own, or calls them for none.
AUTOMATIC_EDITORS = {
    "the flag": (None, {"gradient_clip_val": 0.1}),
    "clipping of the module's": (lambda kind: type("Own", (kind,), {"configure_gradient_clipping": clip_by_hand}), {}),
    "the module's own step": (lambda kind: type("Own", (kind,), {"optimizer_step": step_by_hand}), {}),
    "the module's clip_gradients": (lambda kind: type("Own", (kind,), {"clip_gradients": hook}), {}),
}
CASES = [(kind, name) for kind in MODES for name in EDITORS]
CASES += [(kind, name) for kind in MODES[:2] for name in AUTOMATIC_EDITORS]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_gradients_that_something_may_edit_before_the_step_are_noted_on_each(kind, name):
    make, flags = {**EDITORS, **AUTOMATIC_EDITORS}[name]
    module = (make or (lambda same: same))(kind)()
    fit(module, flags.get("callbacks", ()), **{key: value for key, value in flags.items() if key != "callbacks"})
    assert module.noted == module.global_step == 16
