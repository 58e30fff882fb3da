"""Around the Trainer: the other name of the package, checkpoints of other optimizers, and Fabric's own loop."""

import warnings

import lightning as L
import pytest
import torch
from lightning_models import ACCEPT, QUIET, Automatic, Mixed, Net, Remember, assert_same, fit, loader, seed
from problems import drive
from torch import nn

from lightning_soaa import SOAA, FixedRadius, RatioRadius, TrustRegionMonitor
from lightning_soaa.module import SOAAMixin

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_lightning as pl

pytestmark = QUIET


# pytorch_lightning


class TheirNet(pl.LightningModule):
    def __init__(self, rule):
        super().__init__()
        self.rule = rule
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return SOAA(self.parameters(), lr=0.05, radius=self.rule)


class OurNet(SOAAMixin, TheirNet):
    pass


class OurAutomaticNet(OurNet):
    automatic_optimization = True


@pytest.mark.parametrize("make", [OurNet, OurAutomaticNet])
@pytest.mark.parametrize("rule", [FixedRadius(), ACCEPT])
def test_a_module_and_trainer_of_pytorch_lightning_equal_its_stock_run(make, rule):
    def run(module_class, rule):
        seed()
        module = module_class(rule)
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accumulate_grad_batches=3, gradient_clip_val=0.1,
        )  # fmt: skip
        trainer.fit(module, loader())
        return trainer, {**module.state_dict(), "steps": trainer.global_step, "random": torch.get_rng_state()}

    _, stock = run(TheirNet, FixedRadius())
    trainer, facts = run(make, rule)
    assert_same(stock, facts)
    assert sum(isinstance(callback, TrustRegionMonitor) for callback in trainer.callbacks) == 1


# Checkpoints of another optimizer

QUIETLY = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Adam(Net):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


@pytest.fixture(scope="module")
def adamw(tmp_path_factory):
    """Return a trained module and the checkpoint of its run."""
    path = tmp_path_factory.mktemp("adamw") / "adamw.ckpt"
    module, trainer = Adam(), L.Trainer(**QUIETLY)
    trainer.fit(module, loader())
    trainer.save_checkpoint(path)
    return module, path


@pytest.mark.parametrize("make", [Mixed, Automatic])
def test_the_checkpoint_of_an_adamw_run_is_refused_before_anything_is_loaded(make, adamw):
    _, path = adamw
    module = make(RatioRadius())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError) as error:
        fit(module, ckpt_path=path)
    (state,) = torch.load(path, weights_only=False)["optimizer_states"]
    options = sorted(state["param_groups"][0].keys() - {"params"})
    assert str(error.value) == (
        "SOAAMixin: `fit(ckpt_path=...)` must be a checkpoint of a run with SOAA, got one of another optimizer with "
        f"{', '.join(options)}; to start from its weights, load them with load_from_checkpoint and leave ckpt_path out"
    )
    assert_same(before, dict(module.state_dict()))


def test_the_remedy_starts_from_the_weights_of_an_adamw_run(adamw):
    old, path = adamw
    module = Mixed.load_from_checkpoint(path)
    assert_same(dict(old.state_dict()), dict(module.state_dict()))
    assert fit(module, max_epochs=1).trainer.global_step == 8


def test_validate_takes_a_checkpoint_of_any_optimizer(adamw):
    old, path = adamw
    module = Mixed()
    L.Trainer(**QUIETLY).validate(module, loader(), ckpt_path=path, verbose=False)
    assert_same(dict(old.state_dict()), dict(module.state_dict()))


# Fabric


def network():
    seed()
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))


def plain_loop(rule):
    model = network()
    optimizer = SOAA(model.parameters(), lr=0.05, radius=rule)
    for inputs, labels in [*loader(), *loader()]:
        drive(optimizer, lambda: nn.functional.cross_entropy(model(inputs), labels))  # noqa: B023
    return dict(model.state_dict()), optimizer.last_step


def fabric_loop(rule, precision="32-true"):
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision)
    model = network()
    model, optimizer = fabric.setup(model, SOAA(model.parameters(), lr=0.05, radius=rule))
    for inputs, labels in [*loader(), *loader()]:

        def loss_closure():
            return nn.functional.cross_entropy(model(inputs), labels)  # noqa: B023

        def closure():
            optimizer.zero_grad()
            loss = loss_closure()
            fabric.backward(loss)
            return loss

        optimizer.optimizer.bind_loss_closure(loss_closure)
        optimizer.step(closure)
    return dict(model.state_dict()), optimizer.optimizer.last_step


@pytest.mark.parametrize("rule", [FixedRadius(), ACCEPT, RatioRadius(), RatioRadius(interval=1)])
def test_fabrics_loop_equals_the_plain_loop(rule):
    for plain, fabric in zip(plain_loop(rule), fabric_loop(rule), strict=True):
        assert_same(plain, fabric)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_trial_at_an_unmoved_point_is_fabrics_own_loss(precision):
    rule = Remember()
    _, report = fabric_loop(rule, precision)
    assert len(rule.seen) == 16
    assert report.repeat_gap == 0.0
