"""What the mixin settles before the first batch: layouts of a class, the optimizer, the monitor, refusals."""

import inspect
import logging
import os
import pickle
from copy import deepcopy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning_models import ACCEPT, QUIET, Mixed, Net, assert_same, loader, make_trainer, seed, train
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.optim import lr_scheduler as schedulers

from lightning_soaa import SOAA, FixedRadius, RatioRadius
from lightning_soaa._compat import is_lightning
from lightning_soaa._setup import refuse_unsupported
from lightning_soaa.module import SOAAMixin
from lightning_soaa.monitor import TrustRegionMonitor

pytestmark = QUIET


# Layouts


class InBody(SOAAMixin, LightningModule):
    """Everything in one class, hooks without super()."""

    def __init__(self, rule=FixedRadius()):  # noqa: B008  (frozen)
        super().__init__()
        self.layer, self.rule, self.calls = torch.nn.Linear(4, 2), rule, []

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        self.calls.append("configure_optimizers")
        return SOAA(self.parameters(), lr=0.1, radius=self.rule)

    def configure_callbacks(self):
        self.calls.append("configure_callbacks")
        return TrustRegionMonitor(console=False)

    def on_train_batch_start(self, batch, batch_idx):
        self.calls.append(f"on_train_batch_start {batch_idx}")

    def on_before_optimizer_step(self, optimizer):
        self.calls.append(f"gradient {self.layer.weight.grad.norm().item()}")


class Derived(InBody):
    """Overrides of overrides: only the outermost one trains."""

    def training_step(self, batch, batch_idx):
        self.calls.append(f"derived {batch_idx}")
        return super().training_step(batch)

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        self.calls.append("derived start")

    def configure_optimizers(self):
        return {"optimizer": super().configure_optimizers()}


class Behind(SOAAMixin, BoringModel):
    """A module of somebody else's behind the mixin."""


def run(module, **kwargs):
    trainer, _ = make_trainer(max_epochs=1, **kwargs)
    trainer.fit(module, loader())
    return trainer


def seeded(make):
    seed()
    return make()


class StockInBody(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return SOAA(self.parameters(), lr=0.1, radius=FixedRadius())


@pytest.mark.parametrize("make", [InBody, Derived, lambda: InBody(ACCEPT), lambda: Derived(ACCEPT)])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_hooks_in_the_same_class_body_need_no_super_and_batch_idx_is_optional(make, clip):
    reference, module = seeded(StockInBody), seeded(make)
    run(reference, gradient_clip_val=clip)
    trainer = run(module, gradient_clip_val=clip)
    assert_same(dict(reference.state_dict()), dict(module.state_dict()))
    assert trainer.global_step == 8
    for call in ("configure_optimizers", "configure_callbacks", "on_train_batch_start 7"):
        assert module.calls.count(call) == 1
    if isinstance(module, Derived):
        assert module.calls.count("derived start") == 8


def test_somebody_elses_module_is_trained_behind_the_mixin():
    module = Behind()
    trainer, _ = make_trainer(max_epochs=1, limit_train_batches=4, limit_val_batches=1)
    trainer.fit(module)
    assert trainer.global_step == 4
    assert isinstance(trainer.optimizers[0], SOAA)


def test_two_mixed_classes_in_one_hierarchy_train_once():
    class Half(SOAAMixin, Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)

    class Diamond(Half, Mixed):
        pass

    assert_same(train(Mixed, max_epochs=1).facts(), train(Diamond, max_epochs=1).facts())


def test_the_users_signatures_stay_visible():
    assert list(inspect.signature(InBody).parameters) == ["rule"]
    assert list(inspect.signature(InBody.training_step).parameters) == ["self", "batch"]
    assert list(inspect.signature(Mixed.training_step).parameters) == ["self", "batch", "batch_idx"]


def test_a_module_survives_deepcopy_and_pickle():
    module = train(lambda: Mixed(ACCEPT), max_epochs=1).module
    assert_same(dict(module.state_dict()), dict(deepcopy(module).state_dict()))
    fresh = seeded(Mixed)
    assert_same(dict(fresh.state_dict()), dict(pickle.loads(pickle.dumps(fresh)).state_dict()))


def test_a_step_that_validation_shares_does_not_train():
    class Shared(InBody):
        def validation_step(self, batch, batch_idx):
            assert not self.in_trial
            self.log("val_loss", self.training_step(batch))

    module, reference = seeded(lambda: Shared(ACCEPT)), seeded(StockInBody)
    trainer, _ = make_trainer(max_epochs=1)
    trainer.fit(module, loader(), loader(1))
    run(reference)
    assert_same(dict(reference.state_dict()), dict(module.state_dict()))
    assert trainer.global_step == 8


def test_mixin_behind_lightning_module_is_refused():
    with pytest.raises(TypeError) as error:
        type("Late", (LightningModule, SOAAMixin), {})
    assert str(error.value) == (
        "SOAAMixin: `Late` must name the mixin first among its bases, got LightningModule before it; "
        "write class Late(SOAAMixin, ...)"
    )


def test_module_without_training_step_gets_lightnings_own_error():
    module = type("Empty", (SOAAMixin, LightningModule), {})()
    module.layer = torch.nn.Linear(1, 1)
    with pytest.raises(Exception, match=r"No `training_step\(\)` method defined"):
        run(module)


# Modules that step by themselves


class OwnLoop(SOAAMixin, Net):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_before_optimizer_step(self, optimizer):
        pass


class OwnLoopByBody(OwnLoop):
    automatic_optimization = False


class OwnLoopByInit(OwnLoop):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Theirs(LightningModule):
    automatic_optimization = False
    layer = None


@pytest.mark.filterwarnings("ignore:SOAAMixin. `configure_optimizers` returns no SOAA, got SGD")
@pytest.mark.parametrize("make", [OwnLoopByBody, OwnLoopByInit])
def test_module_that_switches_automatic_optimization_off_is_left_alone(make):
    module = make()
    trainer, _ = make_trainer(callbacks=[])
    trainer.callbacks = []
    trainer.fit(module, loader())
    assert type(trainer.optimizers[0]) is torch.optim.SGD
    assert trainer.global_step == 16
    assert not any(isinstance(callback, TrustRegionMonitor) for callback in trainer.callbacks)
    assert module.automatic_optimization is False


def test_switch_in_the_body_of_a_module_behind_the_mixin_counts():
    assert type("Mixed", (SOAAMixin, Theirs), {})().automatic_optimization is False


# Optimizer


class Configured(SOAAMixin, Net):
    """An existing configure_optimizers whose result a test sets."""

    def __init__(self, configure, rule=FixedRadius()):  # noqa: B008  (frozen)
        super().__init__(rule)
        self.configure = configure

    def configure_optimizers(self):
        return self.configure(self)

    def configure_soaa(self, params):
        return SOAA(params, radius=self.rule)


def groups(module):
    return [
        {"params": list(module.net[0].parameters()), "weight_decay": 0.1, "name": "first"},
        {"params": list(module.net[1:].parameters()), "lr": 0.02},
    ]


def adamw(module):
    return torch.optim.AdamW(groups(module), lr=0.03, weight_decay=0.0, betas=(0.8, 0.99))


def soaa(module):
    return SOAA(groups(module), lr=0.03, betas=(0.8, 0.99), radius=module.rule)


def step_lr(optimizer):
    return schedulers.StepLR(optimizer, 3, 0.5)


def chained(optimizer):
    warm = schedulers.LinearLR(optimizer, 0.1, total_iters=4)
    sequence = schedulers.SequentialLR(optimizer, [warm, schedulers.ConstantLR(optimizer, 0.5, 2)], [5])
    return schedulers.ChainedScheduler([sequence, schedulers.ExponentialLR(optimizer, 0.95)], optimizer)


def by_step(scheduler):
    return {"scheduler": scheduler, "interval": "step"}


FORMS = {
    "optimizer": lambda o: o,
    "list": lambda o: [o],
    "tuple": lambda o: (o,),
    "two lists": lambda o: ([o], [step_lr(o)]),
    "two lists, dict": lambda o: ([o], [by_step(step_lr(o)), by_step(schedulers.ExponentialLR(o, 0.9))]),
    "two lists, one scheduler": lambda o: ([o], step_lr(o)),
    "dict": lambda o: {"optimizer": o},
    "dict, scheduler": lambda o: {"optimizer": o, "lr_scheduler": step_lr(o)},
    "dict, plateau": lambda o: {
        "optimizer": o, "lr_scheduler": schedulers.ReduceLROnPlateau(o, patience=0, threshold=9), "monitor": "loss",
    },
    "list of one dict": lambda o: [{"optimizer": o, "lr_scheduler": by_step(step_lr(o))}],
    "nested schedulers": lambda o: {"optimizer": o, "lr_scheduler": by_step(chained(o))},
    "one cycle": lambda o: {"optimizer": o, "lr_scheduler": by_step(schedulers.OneCycleLR(o, 0.1, 16))},
    "lambda over the old optimizer": lambda o: {
        "optimizer": o,
        "lr_scheduler": by_step(schedulers.LambdaLR(o, lambda step: 1 / (step + len(o.param_groups)))),
    },
}  # fmt: skip


@pytest.mark.parametrize("rule", [FixedRadius(), ACCEPT], ids=["fixed", "accept"])
@pytest.mark.parametrize("form", FORMS)
def test_replaced_optimizer_equals_the_same_soaa_written_by_hand(form, rule):
    stock = type("Stock", (Net,), {"configure_optimizers": lambda self: FORMS[form](soaa(self))})
    replaced = train(lambda: Configured(lambda module: FORMS[form](adamw(module)), rule))
    reference = train(stock).facts()
    facts = replaced.facts()
    for name in ("parameters and buffers", "moments", "learning rates", "losses", "global_step", "random"):
        assert_same(reference[name], facts[name], name)
    head, tail = replaced.trainer.optimizers[0].param_groups
    assert (head["name"], head["weight_decay"], tail["weight_decay"]) == ("first", 0.1, 0.0)
    assert "amsgrad" not in head
    assert all(
        config.scheduler.optimizer is replaced.trainer.optimizers[0] for config in replaced.trainer.lr_scheduler_configs
    )


def test_one_line_says_that_the_optimizer_is_replaced(caplog):
    caplog.set_level(logging.INFO)
    train(lambda: Configured(adamw), max_epochs=1)
    lines = [record.message for record in caplog.records if "SOAAMixin" in record.message]
    assert lines == [
        "SOAAMixin: AdamW of `configure_optimizers` is replaced by SOAA; parameter groups and learning-rate schedulers "
        "are kept."
    ]


def test_without_configure_optimizers_soaa_gets_the_parameters_that_require_gradients():
    class Bare(SOAAMixin, LightningModule):
        def __init__(self):
            super().__init__()
            self.frozen, self.net = torch.nn.Linear(4, 4).requires_grad_(False), torch.nn.Linear(4, 2)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.net(self.frozen(batch[0])), batch[1])

    module = Bare()
    optimizer = run(module).optimizers[0]
    assert [group["params"] for group in optimizer.param_groups] == [list(module.net.parameters())]
    assert isinstance(optimizer.radius_rule, RatioRadius)


def test_a_soaa_is_kept_as_it_is():
    made = []
    run_ = train(lambda: Configured(lambda module: made.append(soaa(module)) or made[0]), max_epochs=1)
    assert run_.trainer.optimizers[0] is made[0]


def test_parameter_groups_added_in_mid_training_equal_automatic():
    class Growing:
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.trainer.optimizers[0].add_param_group({"params": [self.extra], "lr": 0.5})

        def configure_optimizers(self):
            self.extra = torch.nn.Parameter(torch.zeros(2))
            return SOAA(self.net.parameters(), lr=0.05, radius=self.rule)

        def loss(self, batch):
            return super().loss(batch) + (self.extra - 1).square().sum()

    stock = type("Stock", (Growing, Net), {})
    mixed = type("Mixed", (SOAAMixin, stock), {})
    runs = [train(make, callbacks=lambda: ()) for make in (stock, mixed, lambda: mixed(ACCEPT))]
    for run_ in runs[1:]:
        assert_same(runs[0].facts(), run_.facts())


# Monitor


def monitors(trainer):
    return [callback for callback in trainer.callbacks if isinstance(callback, TrustRegionMonitor)]


def test_one_monitor_is_added_and_one_only():
    module = Mixed()
    trainer, _ = make_trainer(max_epochs=1)
    trainer.callbacks = []
    trainer.validate(module, loader(), verbose=False)
    assert monitors(trainer) == []
    trainer.fit(module, loader())
    assert len(monitors(trainer)) == 1
    trainer.fit(module, loader())
    assert len(monitors(trainer)) == 1


def test_a_monitor_of_the_trainers_or_the_modules_is_left_as_it_is():
    mine = TrustRegionMonitor(console=False)
    trainer, _ = make_trainer(max_epochs=1)
    trainer.callbacks = [mine]
    trainer.fit(Mixed(), loader())
    assert monitors(trainer) == [mine]

    own = type("Own", (Mixed,), {"configure_callbacks": lambda self: [mine]})
    trainer, _ = make_trainer(max_epochs=1)
    trainer.callbacks = []
    trainer.fit(own(), loader())
    assert monitors(trainer) == [mine]


# Refusals


def two_optimizers(module):
    return [torch.optim.SGD(module.net[0].parameters()), torch.optim.SGD(module.net[1].parameters())]


class Iterating(Mixed):
    def training_step(self, dataloader_iter):
        return self.loss(next(dataloader_iter)[0])


class CustomPrecision(Precision):
    pass


REFUSED = {
    "model averaging": (
        Mixed, {"strategy": DDPStrategy(model_averaging_period=4)},
        "SOAAMixin: `DDPStrategy(model_averaging_period=...)` must be left out, got 4; parameters that differ between "
        "processes have no common radius: leave it out",
    ),
    "local SGD": (
        Mixed, {"strategy": DDPStrategy(ddp_comm_state=PostLocalSGDState(None, None, 1))},
        "SOAAMixin: `DDPStrategy(ddp_comm_state=...)` must be left out, got PostLocalSGDState; parameters that differ "
        "between processes have no common radius: leave it out",
    ),
    "precision plugin": (
        Mixed, {"plugins": CustomPrecision()},
        "SOAAMixin: `Trainer(precision=...)` must be 32-true, 64-true, 16-true, bf16-true, bf16-mixed or "
        "16-mixed, got CustomPrecision; not supported yet: use one of these",
    ),
    "compiled": (
        lambda: torch.compile(Mixed(), backend="eager"), {},
        "SOAAMixin: `torch.compile` must be applied to parts of the LightningModule, got the whole module; set "
        "automatic_optimization = True, or compile a part, as in self.net = torch.compile(self.net)",
    ),
    "dataloader_iter": (
        Iterating, {},
        "SOAAMixin: `training_step` must be a function of the batch, got the signature with dataloader_iter; a trial "
        "needs the batch again: use training_step(self, batch, batch_idx)",
    ),
    "two optimizers": (
        lambda: Configured(two_optimizers), {},
        "SOAAMixin: `configure_optimizers` must be one that returns one optimizer, or left out, got 2 optimizers; to "
        "step several, set automatic_optimization = False and call self.soaa_step(optimizer, loss_fn) for each",
    ),
    "no optimizer": (
        lambda: Configured(lambda module: None), {},
        "SOAAMixin: `configure_optimizers` must be one that returns one optimizer, or left out, got 0 optimizers; to "
        "step several, set automatic_optimization = False and call self.soaa_step(optimizer, loss_fn) for each",
    ),
    "configure_soaa": (
        type("Other", (Configured,), {"__init__": lambda self: Configured.__init__(self, adamw),
                                      "configure_soaa": lambda self, params: torch.optim.SGD(params)}), {},
        "SOAAMixin: `configure_soaa` must be a function that returns a SOAA, got SGD; return SOAA(params, ...)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_carried_is_refused_at_fit_start_by_flag_and_remedy(name):
    make, flags, message = REFUSED[name]
    trainer, _ = make_trainer(**flags)
    module = make()
    # A launcher of processes sets variables and the number of threads before the module is asked.
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}), pytest.raises(ValueError) as error:
        trainer.fit(module, loader())
    assert str(error.value) == message
    assert trainer.global_step == 0


REMEDIES = {
    "DeepSpeedStrategy": "its engine steps the optimizer and passes no loss closure on: use strategy='ddp'",
    "SingleDeviceXLAStrategy": "not supported yet: use devices=1 or strategy='ddp'",
}


@pytest.mark.parametrize("kind", REMEDIES)
def test_every_other_strategy_is_refused(kind):
    strategy = type(kind, (), {"__module__": "lightning.pytorch.strategies"})()
    module, trainer = SimpleNamespace(_soaa_choice=None), SimpleNamespace(strategy=strategy)
    with pytest.raises(ValueError) as error:
        refuse_unsupported(module, trainer)
    assert str(error.value) == (
        f"SOAAMixin: `Trainer(strategy=...)` must be on a single device, DDP, FSDP2 or FSDP1, got {kind}; "
        f"{REMEDIES[kind]}"
    )


def test_a_subclass_of_a_known_plugin_is_not_a_known_plugin():
    assert is_lightning(Precision(), frozenset({"Precision"}))
    assert not is_lightning(CustomPrecision(), frozenset({"Precision", "CustomPrecision"}))


def test_an_optimizer_put_into_the_trainer_by_hand_is_refused():
    class ByHand(Mixed):
        def on_fit_start(self):
            self.trainer.strategy.optimizers = [torch.optim.SGD(self.parameters(), lr=0.1)]

    trainer, _ = make_trainer()
    trainer.callbacks = []
    with pytest.raises(TypeError) as error:
        trainer.fit(ByHand(), loader())
    assert str(error.value) == (
        "SOAAMixin: `trainer.optimizers[0]` must be a SOAA, got SGD; return SOAA(...) where it was set, or leave "
        "`configure_optimizers` to the mixin"
    )


def test_refusals_do_not_concern_validate():
    trainer, _ = make_trainer(plugins=CustomPrecision())
    trainer.validate(Mixed(), loader(), verbose=False)


def test_compiled_part_equals_automatic():
    def compiled(base):
        def make():
            module = base()
            module.net = torch.compile(module.net, backend="eager")
            return module

        return make

    class Quiet:
        def on_before_optimizer_step(self, optimizer):
            pass

    stock = type("Stock", (Quiet, Net), {})
    mixed = type("Mixed", (SOAAMixin, stock), {})
    runs = [train(compiled(make), max_epochs=1) for make in (stock, mixed, lambda: mixed(ACCEPT))]
    for run_ in runs[1:]:
        assert_same(runs[0].facts(), run_.facts())
