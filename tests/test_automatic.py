"""Automatic mode: the same trust region on Lightning's own closure, for a module that asks for it."""

import random

import pytest
import torch
from lightning_models import (
    ACCEPT,
    QUIET,
    REJECT,
    Automatic,
    Mixed,
    Net,
    Remember,
    Tape,
    assert_same,
    loader,
    make_trainer,
    seed,
    train,
)

from lightning_soaa import FixedRadius, PublishedRadius, RatioRadius
from lightning_soaa.module import SOAAMixin

pytestmark = QUIET


class Counted(Automatic):
    """Counts real and trial forwards."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.real, self.trials = Tape(), Tape()

    def training_step(self, batch, batch_idx):
        (self.trials if self.in_trial else self.real).append(batch_idx)
        return super().training_step(batch, batch_idx)


FLAGS = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 3},
    "accumulate, clip": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
}


@pytest.mark.parametrize("rule", [RatioRadius(interval=1), RatioRadius(), PublishedRadius(total_steps=16)])
@pytest.mark.parametrize("flags", FLAGS)
def test_every_rule_does_in_automatic_mode_what_it_does_in_the_default_mode(rule, flags):
    default, automatic = (train(lambda: make(rule), **FLAGS[flags]) for make in (Mixed, Automatic))  # noqa: B023
    assert_same(default.facts(), automatic.facts())
    assert default.trainer.optimizers[0].last_step == automatic.trainer.optimizers[0].last_step


@pytest.mark.parametrize(
    ("rule", "accumulate", "trials"), [(FixedRadius(), 1, 0), (ACCEPT, 1, 8), (REJECT, 1, 8), (ACCEPT, 3, 8)]
)
def test_one_forward_a_batch_and_one_trial_of_it_a_check_and_one_repetition_in_the_first(rule, accumulate, trials):
    run = train(lambda: Counted(rule, lr=1e-3), max_epochs=1, accumulate_grad_batches=accumulate)
    assert run.module.real == list(range(8))
    assert run.module.trials == [*range(accumulate if trials else 0), *range(trials)]
    assert run.trainer.global_step == -(-8 // accumulate)


def test_always_rejecting_leaves_parameters_buffers_streams_metrics_and_losses_untouched():
    still = train(lambda: Net(FixedRadius(), lr=0.0), accumulate_grad_batches=2).facts()
    facts = train(lambda: Automatic(REJECT), accumulate_grad_batches=2).facts()
    for name in ("parameters and buffers", "metric", "losses", "outputs", "hooks", "global_step", "random"):
        assert_same(still[name], facts[name], name)


@pytest.mark.parametrize("pattern", [(0, 3, 7), (2, 3, 4, 5), tuple(range(8))])
def test_a_micro_batch_without_a_loss_is_not_evaluated_again(pattern):
    class Sometimes(Counted):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in pattern else loss

    rule = Remember()
    run = train(lambda: Sometimes(rule, lr=0.0), accumulate_grad_batches=2, max_epochs=1)
    assert not set(run.module.trials) & set(pattern)
    assert all(base == trial for base, trial in rule.seen)
    windows = [{i, i + 1} - set(pattern) for i in range(0, 8, 2)]
    assert len(rule.seen) == sum(map(bool, windows))


class Drawing:
    """A user's own optimizer_step that draws from the random streams before the step, and skips every third."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        self.calls.append(f"optimizer_step {batch_idx} {torch.rand(1).item()} {random.random()}")
        if batch_idx % 3 == 2:
            optimizer_closure()
        else:
            optimizer.step(closure=optimizer_closure)


class StockDrawing(Drawing, Net):
    pass


class MixedDrawing(SOAAMixin, StockDrawing):
    pass


class AutomaticDrawing(MixedDrawing):
    automatic_optimization = True


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_users_own_optimizer_step_is_called_as_without_the_mixin(accumulate):
    reference = train(lambda: StockDrawing(FixedRadius()), accumulate_grad_batches=accumulate).facts()
    for make in (MixedDrawing, AutomaticDrawing):
        for rule in (FixedRadius(), ACCEPT):
            facts = train(lambda: make(rule), accumulate_grad_batches=accumulate).facts()  # noqa: B023
            assert_same(reference, facts)


def test_a_trial_replays_the_forward_not_what_a_users_optimizer_step_drew():
    rule = Remember()
    train(lambda: AutomaticDrawing(rule, lr=0.0))
    assert all(base == trial for base, trial in rule.seen)


class InterruptedTrialError(Exception):
    pass


def test_exception_in_a_trial_restores_parameters_and_forgets_the_window():
    class Fragile(Automatic):
        def on_before_optimizer_step(self, optimizer):
            self.before = {name: value.detach().clone() for name, value in self.named_parameters()}

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.in_trial and batch_idx == 4:
                raise InterruptedTrialError
            return loss

    seed()
    module, (trainer, _) = Fragile(ACCEPT), make_trainer()
    with pytest.raises(InterruptedTrialError):
        trainer.fit(module, loader())
    assert_same(module.before, {name: value.detach() for name, value in module.named_parameters()})
    assert module._soaa_window is None
    assert module.in_trial is False


# torch.compile


class Compilable(Net):
    """A training_step that the compiler can trace: no log, no numpy, no metric; `traced` counts how often it does."""

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(self.net(inputs), labels)

    def on_before_optimizer_step(self, optimizer):
        pass


class Shared(SOAAMixin, Compilable):
    automatic_optimization = True

    def validation_step(self, batch, batch_idx):
        assert not self.in_trial
        self.log("val_loss", self.training_step(batch, batch_idx))


def test_a_step_that_validation_shares_does_not_train():
    shared = train(lambda: Shared(ACCEPT), validate=True)
    assert shared.trainer.global_step == 16
    stock = train(lambda: Compilable(FixedRadius()), validate=True)
    assert_same(stock.facts()["moments"], shared.facts()["moments"])


class AutomaticCompilable(SOAAMixin, Compilable):
    automatic_optimization = True


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_module_compiled_as_a_whole_equals_the_stock_run_of_it(accumulate):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(make):
        torch._dynamo.reset()
        graphs.clear()
        facts = train(
            lambda: torch.compile(make(), backend=backend, fullgraph=True), accumulate_grad_batches=accumulate
        )
        return facts.module._orig_mod.state_dict(), facts.rows, facts.random, len(graphs)

    stock = run(lambda: Compilable(FixedRadius()))
    assert_same(stock, run(lambda: AutomaticCompilable(FixedRadius())))
    *facts, traced = run(lambda: AutomaticCompilable(ACCEPT))
    assert_same(list(stock[:3]), facts)
    assert traced == stock[3] + 1  # the trial, without gradients


def test_trials_of_a_compiled_module_run_the_compiled_step():
    rule = Remember()
    torch._dynamo.reset()
    module = train(lambda: torch.compile(AutomaticCompilable(rule, lr=0.0), backend="eager")).module
    assert len(rule.seen) == 16
    assert all(base == trial for base, trial in rule.seen)
    assert module._orig_mod.automatic_optimization is True
