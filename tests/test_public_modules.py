"""LightningModules of other people's packages, each with one line added: `class Ours(SOAAMixin, Theirs): pass`."""

from statistics import mean

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel
from lightning.pytorch.demos.lstm import LightningLSTM
from lightning.pytorch.demos.transformer import LightningTransformer
from lightning_models import ACCEPT, QUIET, Mute, Tape, assert_same, seed
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import public_modules
from lightning_soaa import SOAA, FixedRadius, RatioRadius
from lightning_soaa.module import SOAAMixin

pytestmark = QUIET


def words(batch_size=4, length=6, vocabulary=11):
    """Return sequences of which each word is the one before plus one."""
    starts = torch.arange(40).unsqueeze(1) % vocabulary
    inputs = (starts + torch.arange(length)) % vocabulary
    return DataLoader(TensorDataset(inputs, (inputs + 1) % vocabulary), batch_size=batch_size)


def vectors(width):
    return DataLoader(torch.randn(40, width, generator=torch.Generator().manual_seed(1)), batch_size=4)


class SmallLSTM(LightningLSTM):
    """Their module with a smaller network in it."""

    def __init__(self):
        super().__init__(vocab_size=11)
        self.model = type(self.model)(vocab_size=11, ninp=8, nhid=8, nlayers=2)


class SmallTransformer(LightningTransformer):
    def __init__(self):
        super().__init__(vocab_size=11)
        self.model = type(self.model)(vocab_size=11, ninp=8, nhead=2, nhid=8, nlayers=1)


def lightly_classifier():
    pytest.importorskip("lightly", reason="lightly is not installed")
    from lightly.utils.benchmarking import LinearClassifier

    class Classifier(LinearClassifier):
        def __init__(self):
            backbone = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.BatchNorm1d(8))
            super().__init__(backbone, 256, feature_dim=8, num_classes=5, topk=(1, 2))

    return Classifier


def images():
    inputs = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(inputs, (inputs * 2).argmax(1)), batch_size=6)


MODULES = {
    "lightning BoringModel": (lambda: BoringModel, lambda: vectors(32)),
    "lightning DemoModel": (lambda: DemoModel, lambda: vectors(32)),
    "lightning LightningLSTM": (lambda: SmallLSTM, words),
    "lightning LightningTransformer": (lambda: SmallTransformer, words),
    "lightly LinearClassifier": (lightly_classifier, images),
}


# Their loss has no minimum, or their scheduler stops the run after an epoch.
UNBOUNDED = {"lightning DemoModel", "lightning BoringModel"}


class NoDownload:
    """Their data would come from the net."""

    def prepare_data(self):
        pass


def run(make, data, package="lightning.pytorch", epochs=2):
    """Train; return the module, its optimizer, and the parameters, buffers and streams."""
    seed()
    module = make()
    trainer_class = __import__(package, fromlist=["Trainer"]).Trainer
    trainer = trainer_class(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[Mute()],
    )  # fmt: skip
    trainer.fit(module, data())
    return module, trainer.optimizers[0], {**module.state_dict(), "random": torch.get_rng_state()}


@pytest.mark.parametrize("name", MODULES)
def test_the_mixin_changes_no_bit_of_a_public_module_and_its_trials_leave_none(name):
    find, data = MODULES[name]
    theirs = type("Theirs", (NoDownload, find()), {})
    package = "pytorch_lightning" if name.startswith("lightly") else "lightning.pytorch"

    def by_hand(self):
        return SOAA([p for p in self.parameters() if p.requires_grad], lr=1e-2, radius=FixedRadius())

    def options(rule):
        return {"configure_optimizers": lambda self: SOAA(
            [p for p in self.parameters() if p.requires_grad], lr=1e-2, radius=rule
        )}  # fmt: skip

    stock = type("Stock", (theirs,), {"configure_optimizers": by_hand})
    *_, reference = run(stock, data, package)
    for automatic in ({}, {"automatic_optimization": True}):
        for rule in (FixedRadius(), ACCEPT):
            ours = type("Ours", (SOAAMixin, theirs), options(rule) | automatic)
            *_, facts = run(ours, data, package)
            assert_same(reference, facts)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in UNBOUNDED])
def test_a_public_module_with_the_mixin_before_it_learns_without_a_learning_rate(name):
    find, data = MODULES[name]
    package = "pytorch_lightning" if name.startswith("lightly") else "lightning.pytorch"
    losses = Tape()

    def note(self, outputs, batch, batch_idx):
        losses.append(float(outputs["loss"]))

    ours = type("Ours", (SOAAMixin, NoDownload, find()), {"on_train_batch_end": note})
    _, optimizer, _ = run(ours, data, package, epochs=8)
    report = optimizer.last_step
    assert isinstance(optimizer.radius_rule, RatioRadius)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert report.accepted_checks > 0.5 * report.checks > 0


def test_trials_start_from_the_hidden_state_that_the_batch_started_from():
    for name in ("lightning LightningLSTM", "lightning LightningTransformer"):
        find, data = MODULES[name]
        _, optimizer, _ = run(type("Ours", (SOAAMixin, NoDownload, find()), {}), data)
        assert optimizer.last_step.repeat_gap == 0.0, name


@pytest.mark.filterwarnings("ignore")
def test_a_forecaster_of_pytorch_forecasting_is_trained_and_its_trials_leave_no_bit():
    forecasting = pytest.importorskip("pytorch_forecasting", reason="pytorch-forecasting is not installed")
    pandas = pytest.importorskip("pandas")
    steps = list(range(120))
    frame = pandas.DataFrame({"time": steps, "series": "one", "y": torch.tensor(steps).div(5).sin().tolist()})
    dataset = forecasting.TimeSeriesDataSet(
        frame, time_idx="time", target="y", group_ids=["series"], max_encoder_length=12, max_prediction_length=4,
        time_varying_unknown_reals=["y"],
    )  # fmt: skip

    def forecast(rule):
        options = {"configure_soaa": lambda self, params: SOAA(params, radius=rule)}
        kind = type("Ours", (SOAAMixin, NoDownload, forecasting.NBeats), options)
        return run(
            lambda: kind.from_dataset(dataset, widths=[8, 8]),
            lambda: dataset.to_dataloader(train=True, batch_size=16, num_workers=0),
        )

    _, optimizer, fixed = forecast(FixedRadius())
    assert isinstance(optimizer, SOAA)  # their Adam is replaced
    assert_same(fixed, forecast(ACCEPT)[2])
    _, optimizer, _ = forecast(RatioRadius())
    assert optimizer.last_step.repeat_gap == 0.0


# Where their own optimizer is better: `python -m benchmarks.public_modules`.
BEHIND = {"NBeats"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in public_modules.MODULES if name not in BEHIND])
def test_a_public_module_ends_no_worse_than_with_the_optimizer_that_it_comes_with(name):
    package = public_modules.MODULES[name].package
    if not public_modules.MODULES[name].installed:
        pytest.skip(f"{package} is not installed")
    theirs, ours = (
        [public_modules.final_loss(name, seed, kind) for seed in range(3)]
        for kind in (public_modules.unchanged, public_modules.ours)
    )
    assert mean(ours) <= mean(theirs)
