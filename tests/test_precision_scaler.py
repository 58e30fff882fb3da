"""Precision 16-mixed with a gradient scaler, which calls the closure itself and passes none to the optimizer."""

from copy import deepcopy

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning_models import ACCEPT, QUIET, Automatic, Mixed, Net, Remember, Tape, assert_same, fit, loader, seed, train

from lightning_soaa import FixedRadius, PublishedRadius, RatioRadius

pytestmark = QUIET

MODES = {"manual mode": Mixed, "automatic mode": Automatic}
FLAGS = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 3},
    "clip": {"gradient_clip_val": 0.05},
    "accumulate and clip by value": {
        "accumulate_grad_batches": 2, "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value",
    },
}  # fmt: skip


def scaled(init_scale=128.0, growth_interval=3):
    """Return a Trainer's flag: 16-mixed as on a GPU; on the CPU Lightning would take bf16-mixed instead."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=growth_interval)
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}


@pytest.mark.parametrize("rule", [FixedRadius(), ACCEPT], ids=["fixed", "accept"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("flags", FLAGS)
def test_scaler_equals_automatic_bit_for_bit(flags, mode, rule):
    stock = train(lambda: Net(FixedRadius()), **scaled(), **FLAGS[flags])
    mixed = train(lambda: MODES[mode](rule), **scaled(), **FLAGS[flags])
    assert_same(stock.facts(), mixed.facts())
    assert_same(stock.trainer.precision_plugin.state_dict(), mixed.trainer.precision_plugin.state_dict())
    assert stock.trainer.precision_plugin.scaler.get_scale() > 128


class Overflowing:
    """Has gradients that overflow on some batches, with a loss that is finite; keeps all that a step may touch."""

    overflows = (2, 5)

    def on_fit_start(self):
        self.trace = []

    def loss(self, batch):
        loss = super().loss(batch)
        if loss.requires_grad and len(self.losses) in self.overflows:  # not in a trial
            loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        optimizer = deepcopy(self.trainer.optimizers[0].state_dict())
        self.trace.append({
            "parameters": {name: param.detach().clone() for name, param in self.named_parameters()},
            "moments": optimizer["state"],
            "numbers": optimizer["param_groups"][0],
        })  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_step_that_the_scaler_skips_touches_neither_parameters_moments_nor_radius(mode):
    kind = type("Case", (Overflowing, MODES[mode]), {})
    run = train(lambda: kind(RatioRadius(interval=1)), max_epochs=1, **scaled())
    trace = run.module.trace
    same = [index for index in range(1, 8) if trace[index]["parameters"]["net.0.weight"].equal(
        trace[index - 1]["parameters"]["net.0.weight"])]  # fmt: skip
    assert same == [2, 5]
    for index in same:
        assert_same(trace[index - 1], trace[index])
    assert trace[-1]["numbers"]["steps"] == 6
    assert trace[-1]["numbers"]["skipped_steps"] == 0
    assert run.trainer.global_step == 8


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_skipped_steps_equal_automatic(mode, accumulate):
    runs = [
        train(lambda: type("Case", (Overflowing, base), {})(rule), accumulate_grad_batches=accumulate, **scaled())  # noqa: B023
        for base, rule in ((Net, FixedRadius()), (MODES[mode], FixedRadius()), (MODES[mode], ACCEPT))
    ]
    for run in runs[1:]:
        assert_same(runs[0].facts(), run.facts())


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_trial_at_the_same_point_is_the_base_loss_unscaled_bit_for_bit(mode, accumulate):
    rule = Remember()
    run = train(lambda: MODES[mode](rule, lr=0.0), accumulate_grad_batches=accumulate, max_epochs=1, **scaled())
    assert len(rule.seen) == -(-8 // accumulate)
    for base, trial in rule.seen:
        assert base == trial
    losses = run.module.losses[:accumulate]
    assert rule.seen[0][0] == float(sum(loss / accumulate for loss in losses))


@pytest.mark.parametrize("mode", MODES)
def test_closure_runs_once_a_step_and_the_base_loss_costs_no_trial(mode):
    class Counting(MODES[mode]):
        def training_step(self, batch, batch_idx):
            counted["trial" if self.in_trial else "real"].append(batch_idx)
            return super().training_step(batch, batch_idx)

    counted = {"trial": Tape(), "real": Tape()}
    run = train(lambda: Counting(ACCEPT), max_epochs=1, **scaled())
    assert counted["real"] == list(range(8))
    assert counted["trial"] == [0, *range(8)]  # the first check repeats the base loss
    assert run.trainer.optimizers[0].last_step.total_trials == 9


@pytest.mark.parametrize("mode", MODES)
def test_published_radius_is_given_the_loss_though_it_makes_no_trial(mode):
    run = train(lambda: MODES[mode](PublishedRadius(total_steps=16), lr=1e-3), **scaled())
    stock = train(lambda: MODES[mode](PublishedRadius(total_steps=16), lr=1e-3), precision="bf16-mixed")
    report = run.trainer.optimizers[0].last_step
    assert report.total_trials == 0
    assert report.step == 16
    assert report.base_loss == float(run.module.losses[-1])
    assert abs(report.radius - stock.trainer.optimizers[0].last_step.radius) < 0.1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", [(0, 3, 7), (2, 3, 4, 5)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_that_return_none_equal_automatic(mode, pattern, accumulate):
    class Sometimes:
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in pattern else loss

    bases = [(Net, FixedRadius()), (MODES[mode], FixedRadius()), (MODES[mode], ACCEPT)]
    runs = [
        train(lambda: type("Case", (Sometimes, base), {})(rule), accumulate_grad_batches=accumulate, **scaled())  # noqa: B023
        for base, rule in bases
    ]
    for run in runs[1:]:
        assert_same(runs[0].facts(), run.facts())


def test_loss_that_is_not_finite_where_gradients_are_is_a_bad_step():
    class Poisoned(Mixed):
        def loss(self, batch):
            loss = super().loss(batch)
            return loss + (float("inf") if len(self.losses) == 4 and not self.in_trial else 0.0)

    run = train(lambda: Poisoned(RatioRadius(interval=1)), max_epochs=1, **scaled())
    report = run.trainer.optimizers[0].last_step
    assert (report.step, report.skipped_steps) == (8, 1)


def test_one_and_one_epochs_are_two(tmp_path):
    def quiet():
        seed()
        module = Mixed(RatioRadius(interval=1))
        module.net[3] = torch.nn.Identity()  # streams are not part of a checkpoint
        module.loss = lambda batch: torch.nn.functional.cross_entropy(module.net(batch[0]), batch[1])
        return module

    whole = fit(quiet(), data=loader(), **scaled())
    fit(quiet(), data=loader(), max_epochs=1, **scaled()).trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(quiet(), data=loader(), ckpt_path=tmp_path / "half.ckpt", **scaled())
    assert_same(whole.trainer.optimizers[0].state_dict(), resumed.trainer.optimizers[0].state_dict())
    assert_same(whole.module.state_dict(), resumed.module.state_dict())
    scales = [run.trainer.precision_plugin.state_dict() for run in (whole, resumed)]
    assert scales[0] == scales[1]
    assert scales[0]["scale"] > 128


@pytest.mark.parametrize("mode", MODES)
def test_a_scaler_that_is_disabled_scales_nothing(mode):
    flag = {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", enabled=False))}
    assert_same(train(lambda: Net(FixedRadius()), **flag).facts(), train(lambda: MODES[mode](ACCEPT), **flag).facts())
