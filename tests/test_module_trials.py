"""Trials through the mixin: how often they run, what they see, and that they leave no trace."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from lightning_models import (
    ACCEPT,
    QUIET,
    REJECT,
    Automatic,
    Mixed,
    Net,
    OwnLoop,
    Remember,
    Tape,
    assert_same,
    loader,
    train,
)
from torch import nn

from lightning_soaa import SOAA, FixedRadius, PublishedRadius, RatioRadius
from lightning_soaa.module import SOAAMixin

pytestmark = QUIET
both_modes = pytest.mark.parametrize("base", [Mixed, Automatic])


class Counting(Mixed):
    """Counts real and trial forwards, and lets a test act in either."""

    def __init__(self, *args, act=lambda module: None, **kwargs):
        super().__init__(*args, **kwargs)
        self.act, self.count = act, {"real": [], "trial": []}

    def training_step(self, batch, batch_idx):
        self.act(self)
        loss = super().training_step(batch, batch_idx)
        self.count["trial" if self.in_trial else "real"].append(batch_idx)
        return loss


def counting(*args, **kwargs):
    module = Counting(*args, **kwargs)
    module.count = {"real": Tape(), "trial": Tape()}
    return module


@pytest.mark.parametrize(
    ("rule", "accumulate", "real", "trials"),
    [
        (FixedRadius(), 1, 8, 0),
        (PublishedRadius(total_steps=8), 1, 8, 0),
        (ACCEPT, 1, 8, 8),  # one trial a step
        (REJECT, 1, 8, 8),
        (ACCEPT, 3, 8, 8),  # 3 steps, which replay 3 + 3 + 2 micro-batches
        (RatioRadius(relative=1.0, interval=1), 1, 8, 8),
    ],
)
def test_closure_called_once_per_step_and_loss_closure_once_per_check_and_repeated_in_the_first(
    rule, accumulate, real, trials
):
    run = train(lambda: counting(rule, lr=1e-3), max_epochs=1, accumulate_grad_batches=accumulate)
    assert run.module.count["real"] == list(range(real))
    assert run.module.count["trial"] == [*range(accumulate if trials else 0), *range(trials)]
    assert run.trainer.global_step == -(-8 // accumulate)
    assert run.trainer.optimizers[0].last_step.total_trials == (1 + run.trainer.global_step if trials else 0)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@both_modes
def test_trial_at_the_same_point_is_the_base_loss_bit_for_bit(base, precision, accumulate):
    rule = Remember()
    train(lambda: base(rule, lr=0.0), precision=precision, accumulate_grad_batches=accumulate)
    assert len(rule.seen) == 2 * -(-8 // accumulate)
    for loss, trial in rule.seen:
        assert loss == trial


def test_base_loss_is_the_windows_sum_of_losses_divided_by_their_number():
    rule = Remember()
    run = train(lambda: Mixed(rule), max_epochs=1, accumulate_grad_batches=4)
    expected = [float(sum(loss / 4 for loss in run.module.losses[i : i + 4])) for i in (0, 4)]
    assert [base for base, _ in rule.seen] == expected


def test_always_rejecting_leaves_parameters_buffers_streams_metrics_and_logs_untouched():
    # What a run looks like in which no step moves and none is checked: the learning rate is 0.
    still = train(lambda: Net(FixedRadius(), lr=0.0), accumulate_grad_batches=2)
    rejected = train(lambda: Mixed(REJECT, lr=0.05), accumulate_grad_batches=2)
    expected, facts = still.facts(), rejected.facts()
    for name in ("parameters and buffers", "metric", "losses", "outputs", "hooks", "global_step", "random"):
        assert_same(expected[name], facts[name], name)
    without_lr = lambda row: {key: value for key, value in row.items() if key != "lr-SOAA"}  # noqa: E731
    assert_same(without_lr(expected["metrics"]), without_lr(facts["metrics"]))
    for (step, row), (other_step, other_row) in zip(expected["rows"], facts["rows"], strict=True):
        assert step == other_step
        assert_same(without_lr(row), without_lr(other_row))
    report = rejected.trainer.optimizers[0].last_step
    assert (report.checks, report.accepted_checks) == (8, 0)


class SideEffects(nn.Module):
    """A layer that changes all that a trial puts back."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ema", torch.zeros(4))
        self.seen, self.outputs = 0, []

    def forward(self, x):
        self.ema = 0.9 * self.ema + 0.1 * x.detach().mean(0)
        self.seen += 1
        self.outputs.append(x.detach().mean())
        return x


class Busy(Mixed):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.net.insert(0, SideEffects())

    def on_before_optimizer_step(self, optimizer):
        pass

    def training_step(self, batch, batch_idx):
        self.print("training")
        self.logger.log_metrics({"direct": 1.0})
        self.trainer.logger.log_metrics({"by the trainer": 1.0})
        return super().training_step(batch, batch_idx)


def test_trials_leave_no_trace_in_attributes_loggers_and_prints(capsys):
    run = train(lambda: Busy(ACCEPT), max_epochs=1)
    effects = run.module.net[0]
    assert effects.seen == len(effects.outputs) == 8
    assert sum("direct" in row for _, row in run.rows) == 8
    assert sum("by the trainer" in row for _, row in run.rows) == 8
    assert capsys.readouterr().out.count("training") == 8
    assert_same(train(lambda: Busy(FixedRadius()), max_epochs=1).facts(), run.facts())


class InterruptedTrialError(Exception):
    pass


def test_exception_in_a_trial_restores_everything():
    state = {}

    def photograph(module):
        return {
            "parameters": {k: v.detach().clone() for k, v in module.named_parameters()},
            "buffers": {k: v.clone() for k, v in module.named_buffers()},
            "metric": {k: v.clone() for k, v in module.accuracy.metric_state.items()},
            "gradients": [p.grad.clone() for p in module.parameters()],
            "moments": {k: {n: torch.as_tensor(v).clone() for n, v in s.items()}
                        for k, s in module.trainer.optimizers[0].state_dict()["state"].items()},
            "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()),
            "losses": list(module.losses),
            "loggers": module.trainer.loggers,
        }  # fmt: skip

    class Fragile(Mixed):
        def on_before_optimizer_step(self, optimizer):
            state.clear()
            state.update(photograph(self))

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.in_trial and batch_idx == 4:
                raise InterruptedTrialError
            return loss

    module = Fragile(ACCEPT)
    modules = []
    with pytest.raises(InterruptedTrialError):
        train(lambda: modules.append(module) or module)
    assert_same(state, photograph(module))
    assert module.training
    assert module.in_trial is False
    assert module.automatic_optimization is True
    assert module._soaa_window is None
    # The module is usable: the next fit starts afresh.
    assert train(lambda: module.__class__(FixedRadius()), max_epochs=1).trainer.global_step == 8


def test_a_step_that_returns_none_where_the_loss_is_not_finite_is_rejected():
    def shy(module, batch_idx):
        return module.in_trial and batch_idx % 2

    class Shy(Mixed):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if shy(self, batch_idx) else loss

    run = train(lambda: Shy(RatioRadius(interval=1, max_trials=1)), max_epochs=1)
    report = run.trainer.optimizers[0].last_step
    assert (report.checks, report.accepted_checks, report.skipped_steps) == (8, 4, 0)


@both_modes
def test_in_place_edits_of_the_batch_are_warned_of_once(base):
    class Editing(base):
        def training_step(self, batch, batch_idx):
            batch[0].mul_(0.5)
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="SOAAMixin: `training_step` edits its batch in place") as caught:
        train(lambda: Editing(ACCEPT))
    assert len([w for w in caught if "edits its batch" in str(w.message)]) == 1


def test_a_trial_finds_the_batch_that_the_real_forward_took_apart():
    class Popping(Mixed):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch.pop("y")), batch_idx)

    rule = Remember()
    data = [dict(zip("xy", batch, strict=True)) for batch in loader()]
    run = train(lambda: Popping(rule, lr=0.0), data=lambda: torch.utils.data.DataLoader(data, batch_size=None))
    assert run.trainer.global_step == 16
    assert all(base == trial for base, trial in rule.seen)


def test_default_dtype_and_autocast_are_lightnings_own_in_backward_hooks_and_trials():
    seen = Tape()

    class Watching(Mixed):
        def note(self, where):
            seen.append((where, torch.get_default_dtype(), torch.is_autocast_enabled("cpu")))

        def training_step(self, batch, batch_idx):
            self.note("trial" if self.in_trial else "forward")
            return super().training_step(batch, batch_idx)

        def on_before_backward(self, loss):
            self.note("backward")

        def on_before_optimizer_step(self, optimizer):
            self.note("step")

    train(lambda: Watching(ACCEPT), max_steps=1, precision="bf16-true")
    train(lambda: Watching(ACCEPT), max_steps=1, precision="bf16-mixed")
    single, half = torch.float32, torch.bfloat16
    assert seen == [
        ("forward", half, False), ("backward", single, False), ("step", single, False), *[("trial", half, False)] * 2,
        ("forward", single, True), ("backward", single, False), ("step", single, False), *[("trial", single, True)] * 2,
    ]  # fmt: skip
    assert torch.get_default_dtype() is torch.float32


def test_manual_optimization_is_what_training_step_sees_and_nobody_else():
    seen = Tape()

    class Looking(Mixed):
        def look(self):
            seen.append(self.automatic_optimization)

        def on_train_start(self):
            self.look()

        def training_step(self, batch, batch_idx):
            self.look()
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.look()

    train(lambda: Looking(ACCEPT), max_steps=1)
    # on_train_start, real forward, trial and its repetition, on_train_batch_end
    assert seen == [True, False, False, False, True]


@both_modes
def test_memory_of_batches_is_dropped_with_the_step_and_never_taken_without_trials(base):
    held = Tape()

    class Holding(base):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            held.append(0 if self._soaa_window is None else len(self._soaa_window.replays))

    train(lambda: Holding(ACCEPT), max_epochs=1, accumulate_grad_batches=3)
    train(lambda: Holding(FixedRadius()), max_epochs=1, accumulate_grad_batches=3)
    assert held == [1, 2, 0, 1, 2, 0, 1, 0] + [0] * 8


def test_default_rule_trains_and_its_checks_accept():
    class Plain(SOAAMixin, Net):
        def configure_soaa(self, params):
            return SOAA(params, weight_decay=0.01)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    run = train(Plain, max_epochs=10)
    report = run.trainer.optimizers[0].last_step
    assert sum(run.module.losses[-8:]) < 0.8 * sum(run.module.losses[:8])
    assert report.accepted_checks > 0.5 * report.checks > 10


class Differentiating:
    """Its loss holds the slope of the network's output, as physics-informed networks and gradient penalties do."""

    def loss(self, batch):
        inputs = batch[0].detach().requires_grad_()
        logits = self.net(inputs)
        (slope,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
        return nn.functional.cross_entropy(logits, batch[1]) + slope.square().mean()


class Hooking:
    """Notes the gradients of its logits, and keeps them."""

    def loss(self, batch):
        logits = self.net(batch[0])
        logits.register_hook(lambda grad: grad.clamp(-1, 1))
        logits.retain_grad()
        return nn.functional.cross_entropy(logits, batch[1])


@pytest.mark.parametrize("what", [Differentiating, Hooking])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", [Mixed, Automatic, OwnLoop])
def test_a_training_step_that_needs_gradients_is_trained_and_its_trials_leave_no_bit(kind, accumulate, what):
    flags = {} if kind is OwnLoop else {"accumulate_grad_batches": accumulate}
    make = type("NeedsGradients", (what, kind), {})
    remember = Remember()
    still, checked = (train(partial(make, rule), **flags) for rule in (FixedRadius(), ACCEPT))
    assert_same(still.facts(), checked.facts())
    train(partial(make, remember, lr=0.0), **flags)
    assert all(base == trial for base, trial in remember.seen)
    assert len(remember.seen) == checked.trainer.global_step
    assert not torch.equal(still.module.net[0].weight, make().net[0].weight)
    assert torch.is_grad_enabled()


def test_another_error_in_a_trial_is_not_taken_for_one():
    class Failing(Mixed):
        def loss(self, batch):
            if self.in_trial:
                raise RuntimeError("something else")
            return super().loss(batch)

    with pytest.raises(RuntimeError, match="something else"):
        train(partial(Failing, ACCEPT))
