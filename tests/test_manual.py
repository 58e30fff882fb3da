"""Modules that run their own loop and step one or several SOAA by `soaa_step`."""

import re

import pytest
import torch
from lightning_models import (
    ACCEPT,
    FISHER,
    QUIET,
    REJECT,
    TRUST_REGION,
    Adversaries,
    Mixed,
    OwnLoop,
    ProtectedAdversaries,
    Remember,
    Tape,
    assert_same,
    fit,
    loader,
    make_trainer,
    seed,
    train,
)  # fmt: skip
from torch import nn

from lightning_soaa import SOAA, FixedRadius, RatioRadius, TrustRegionMonitor

pytestmark = QUIET


class ProtectedRaw(ProtectedAdversaries):
    """Hands over the optimizers themselves."""

    def step(self, optimizer, loss_fn):
        return self.soaa_step(optimizer.optimizer, loss_fn)


def facts(run):
    return {
        "parameters and buffers": run.module.state_dict(),
        "moments": [optimizer.state_dict()["state"] for optimizer in run.trainer.optimizers],
        "rows": run.rows,
        "losses and global steps": run.module.seen,
        "schedulers": [config.scheduler.state_dict() for config in run.trainer.lr_scheduler_configs],
        "random": run.random,
    }


BOTH = (ACCEPT, ACCEPT)
OPTIONS = {"plain": {}, "toggled": {"toggle": True}, "clipped": {"clip": 0.1}}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("name", OPTIONS)
def test_two_optimizers_stepped_by_soaa_step_equal_the_loop_written_by_hand(name, precision):
    reference = facts(train(lambda: Adversaries(**OPTIONS[name]), precision=precision))
    for make in (ProtectedAdversaries, ProtectedRaw):
        assert_same(reference, facts(train(lambda: make(**OPTIONS[name]), precision=precision)))  # noqa: B023
        assert_same(reference, facts(train(lambda: make(BOTH, **OPTIONS[name]), precision=precision)))  # noqa: B023
    assert reference["losses and global steps"][-1] == 32  # two steps a batch, 8 batches, 2 epochs


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_trial_at_the_same_point_is_the_loss_bit_for_bit(precision):
    rules = Remember(), Remember()
    train(lambda: ProtectedAdversaries(rules, lr=0.0), precision=precision)
    for rule in rules:
        assert len(rule.seen) == 16
        assert all(base == trial for base, trial in rule.seen)


def test_always_rejecting_leaves_all_but_the_moments_untouched():
    still, rejected = (
        facts(train(lambda: Adversaries(lr=0.0))),
        facts(train(lambda: ProtectedAdversaries((REJECT, REJECT)))),
    )
    for name in ("parameters and buffers", "losses and global steps", "rows", "random"):
        assert_same(*(drop_rates(found[name]) if name == "rows" else found[name] for found in (still, rejected)))


def drop_rates(rows):
    return [(step, {key: value for key, value in row.items() if not key.startswith("lr-")}) for step, row in rows]


@pytest.mark.parametrize("rule", [FixedRadius(), ACCEPT, RatioRadius(), RatioRadius(interval=1)])
def test_a_loop_of_one_optimizer_is_the_default_mode(rule):
    default, own = (train(lambda: make(rule)).facts() for make in (Mixed, OwnLoop))  # noqa: B023
    for name in ("parameters and buffers", "moments", "metric", "random", "learning rates", "outputs"):
        assert_same(default[name], own[name], name)


def test_each_optimizer_has_its_own_radius_and_names_in_the_log():
    rows = []

    class Listening(ProtectedAdversaries):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            rows.append([optimizer.optimizer.radius for optimizer in self.optimizers()])

    seed()
    trainer, _ = make_trainer()
    trainer.callbacks = [TrustRegionMonitor()]
    trainer.fit(Listening((RatioRadius(), RatioRadius(relative=0.01))), loader())
    logged = set(trainer.callback_metrics)
    for suffix in ("", "-1"):
        for key in TRUST_REGION | FISHER:
            prefix, name = key.split("/")
            assert f"{prefix}{suffix}/{name}" in logged
    first, second = rows[-1]
    assert first != second
    assert trainer.callback_metrics["trust_region/radius"] == first
    assert trainer.callback_metrics["trust_region-1/radius"] == second


def test_each_step_runs_its_loss_once_and_once_more_a_check_and_once_in_the_first():
    class Counting(ProtectedAdversaries):
        def generator_loss(self, batch):
            self.calls.append(self.in_trial)
            return super().generator_loss(batch)

    calls = Tape()
    for rules, trials in [((ACCEPT, FixedRadius()), 0), ((FixedRadius(), ACCEPT), 17)]:
        calls.clear()
        module = Counting(rules)
        module.calls = calls
        train(lambda: module)  # noqa: B023
        assert calls.count(False) == 16
        assert calls.count(True) == trials


def test_one_and_one_epochs_are_two_with_two_optimizers(tmp_path):
    def quiet():
        module = ProtectedAdversaries((RatioRadius(interval=1), RatioRadius(relative=0.01)))
        module.discriminator[3] = nn.Identity()  # streams are not part of a checkpoint
        module.fake = lambda batch: module.generator(batch[0][:, :3])
        return module

    whole, half = train(quiet), train(quiet, max_epochs=1)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(quiet(), ckpt_path=tmp_path / "half.ckpt")
    for name in ("parameters and buffers", "moments", "schedulers"):
        assert_same(facts(whole)[name], facts(resumed)[name], name)
    for one, other in zip(whole.trainer.optimizers, resumed.trainer.optimizers, strict=True):
        assert one.radius == other.radius
    assert resumed.trainer.global_step == 32


class InterruptedTrialError(Exception):
    pass


def test_exception_in_a_trial_restores_parameters_and_buffers():
    class Fragile(ProtectedAdversaries):
        def on_before_optimizer_step(self, optimizer):
            self.before = {name: value.clone() for name, value in self.state_dict().items()}

        def generator_loss(self, batch):
            if self.in_trial and self.global_step > 4:
                raise InterruptedTrialError
            return super().generator_loss(batch)

    module, (trainer, _) = Fragile(BOTH), make_trainer()
    with pytest.raises(InterruptedTrialError):
        trainer.fit(module, loader())
    assert_same(module.before, dict(module.state_dict()))
    assert module.in_trial is False


def test_a_loop_of_its_own_without_a_soaa_is_warned_of_by_name():
    class Adams(ProtectedAdversaries):
        def step(self, optimizer, loss_fn):
            return Adversaries.step(self, optimizer, loss_fn)

        def configure_optimizers(self):
            parts = ([*self.discriminator.parameters(), *self.head.parameters()], self.generator.parameters())
            found = [torch.optim.Adam(part) for part in parts]
            return found, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in found]

    text = (
        "SOAAMixin: `configure_optimizers` returns no SOAA, got Adam, Adam; in a module that sets "
        "automatic_optimization = False the mixin replaces none: return SOAA(...) in their place, and step them by "
        "self.soaa_step(optimizer, loss_fn), or leave the mixin out."
    )
    seed()
    trainer, _ = make_trainer(max_epochs=1)
    trainer.callbacks = []
    with pytest.warns(UserWarning, match=f"^{re.escape(text)}$") as caught:
        trainer.fit(Adams(), loader())
    assert len([w for w in caught if str(w.message).startswith("SOAAMixin")]) == 1
    assert trainer.global_step == 16


def foreign(module):
    return SOAA(module.parameters())


MISUSES = {
    "another optimizer": (
        TypeError, lambda module: (torch.optim.SGD(module.parameters()), module.generator_loss),
        "SOAAMixin: `optimizer` must be one SOAA, or what self.optimizers() returns of it, got 'SGD'",
    ),
    "a list": (
        TypeError, lambda module: (module.optimizers(), module.generator_loss),
        "SOAAMixin: `optimizer` must be one SOAA, or what self.optimizers() returns of it, got 'list'",
    ),
    "a SOAA of its own": (
        ValueError, lambda module: (foreign(module), module.generator_loss),
        "SOAAMixin: `optimizer` must be one of those that configure_optimizers returned, got 'another SOAA'",
    ),
    "a loss": (
        TypeError, lambda module: (module.optimizers()[0], 0.5),
        "SOAAMixin: `loss_fn` must be callable, got 0.5",
    ),
    "no loss": (
        TypeError, lambda module: (module.optimizers()[0], lambda: None),
        "SOAAMixin: `loss_fn` must return a tensor of one element, got None",
    ),
    "several losses": (
        TypeError, lambda module: (module.optimizers()[0], lambda: module.head.weight),
        "SOAAMixin: `loss_fn` must return a tensor of one element, got a tensor of shape (1, 8)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_refused_by_name_and_moves_nothing(name):
    kind, arguments, message = MISUSES[name]

    class Wrong(ProtectedAdversaries):
        def training_step(self, batch, batch_idx):
            self.soaa_step(*arguments(self))

    seed()
    module, (trainer, _) = Wrong(BOTH), make_trainer()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(kind) as error:
        trainer.fit(module, loader())
    assert str(error.value) == message
    assert_same(before, dict(module.state_dict()))


@pytest.mark.parametrize("switch", [None, True])
def test_soaa_step_in_a_module_that_does_not_step_by_itself_is_refused(switch):
    class Wrong(Mixed):
        def training_step(self, batch, batch_idx):
            self.soaa_step(self.optimizers(), lambda: self.loss(batch))

    module = Wrong()
    module._soaa_choice = switch
    trainer, _ = make_trainer()
    with pytest.raises(ValueError) as error:
        trainer.fit(module, loader())
    assert str(error.value) == (
        f"SOAAMixin: `automatic_optimization` must be set to False by a module that calls soaa_step, got {switch}"
    )
