"""The mixin against stock automatic optimization of the same optimizer: every flag that is carried, bit for bit."""

import datetime

import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning_models import ACCEPT, QUIET, Mixed, Net, assert_same, fit, loader, make_trainer, seed, train
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader

from lightning_soaa import FixedRadius
from lightning_soaa.module import SOAAMixin

pytestmark = QUIET


def make(rule=None, **kwargs):
    """Return three modules to be trained alike: stock, mixin without and with a check on every step."""
    return [
        lambda: Net(FixedRadius(), **kwargs),
        lambda: Mixed(FixedRadius(), **kwargs),
        lambda: Mixed(ACCEPT, **kwargs),
    ]


def scheduled(scheduler, **options):
    """Return keywords of Net that put `scheduler(optimizer)` into its configuration."""
    return {"schedule": lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": scheduler(o), **options}}}


def step_lr(optimizer):
    return schedulers.StepLR(optimizer, 1, 0.7)


def plateau(optimizer):
    return schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)


def sequential(optimizer):
    first = schedulers.LinearLR(optimizer, 0.1, total_iters=3)
    return schedulers.SequentialLR(optimizer, [first, schedulers.CosineAnnealingLR(optimizer, 10)], [3])


def one_cycle(optimizer):
    return schedulers.OneCycleLR(optimizer, 0.1, total_steps=24)


WITH_SCHEDULER = {
    "StepLR each second step": scheduled(step_lr, interval="step", frequency=2),
    "StepLR each epoch": scheduled(step_lr),
    "OneCycleLR": scheduled(one_cycle, interval="step"),
    "SequentialLR": scheduled(sequential, interval="step"),
    "plateau each epoch": scheduled(plateau, monitor="loss_epoch"),
    "plateau each third step": scheduled(plateau, monitor="loss_step", interval="step", frequency=3),
    "plateau, monitor missing": scheduled(plateau, monitor="nothing", strict=False),
    "two lists": {"schedule": lambda o: ([o], [step_lr(o), {"scheduler": one_cycle(o), "interval": "step"}])},
}

WITH_FLAGS = {
    "plain": {},
    "validation": {"validate": True},
    "accumulate, short last window": {"accumulate_grad_batches": 3},
    "accumulate more than there is": {"accumulate_grad_batches": 100},
    "clip by norm": {"gradient_clip_val": 0.05},
    "clip by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulate and clip": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-mixed, accumulate, clip": {
        "precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.05,
    },
    "bf16-true": {"precision": "bf16-true"},
    "16-true": {"precision": "16-true"},
    "64-true": {"precision": "64-true"},
    "max_steps": {"max_steps": 11},
    "max_steps, accumulate": {"max_steps": 5, "accumulate_grad_batches": 2},
    "overfit_batches": {"overfit_batches": 2, "validate": True},
    "limit_train_batches": {"limit_train_batches": 3},
    "detect_anomaly": {"detect_anomaly": True},
    "val_check_interval": {"val_check_interval": 3, "validate": True},
    "check_val_every_n_epoch": {"check_val_every_n_epoch": None, "val_check_interval": 5, "validate": True},
    "fast_dev_run": {"fast_dev_run": 3, "validate": True},
    "log_every_n_steps": {"log_every_n_steps": 3, "accumulate_grad_batches": 2},
    "profiler": {"profiler": "simple"},
    "reload_dataloaders": {"reload_dataloaders_every_n_epochs": 1},
    "EarlyStopping": {"callbacks": lambda: [EarlyStopping("loss_epoch", patience=0, mode="max")], "max_epochs": 4},
    "EarlyStopping on a step": {
        "callbacks": lambda: [EarlyStopping("val_loss", stopping_threshold=10.0)], "validate": True, "max_epochs": 4,
    },
    "GradientAccumulationScheduler": {
        "callbacks": lambda: [GradientAccumulationScheduler({0: 1, 1: 3})], "max_epochs": 3,
    },
}  # fmt: skip
if hasattr(callbacks, "WeightAveraging"):  # since 2.6
    WITH_FLAGS["WeightAveraging"] = {"callbacks": lambda: [callbacks.WeightAveraging()]}


def assert_all_same(runs):
    reference = runs[0].facts()
    for run in runs[1:]:
        assert_same(reference, run.facts())


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric")
@pytest.mark.parametrize("name", WITH_SCHEDULER)
def test_scheduler_equals_automatic(name):
    runs = [train(module, max_epochs=3) for module in make(**WITH_SCHEDULER[name])]
    assert_all_same(runs)
    assert len({tuple(lr) for lr in runs[0].module.lrs}) > 1 or "missing" in name


@pytest.mark.parametrize("name", ["StepLR each second step", "plateau each third step", "OneCycleLR"])
def test_scheduler_equals_automatic_when_accumulating(name):
    assert_all_same([train(m, accumulate_grad_batches=2, validate=True) for m in make(**WITH_SCHEDULER[name])])


@pytest.mark.parametrize("name", WITH_FLAGS)
def test_flag_equals_automatic(name):
    options = {"weight_decay": 0.1} | scheduled(step_lr, interval="step")
    assert_all_same([train(module, **WITH_FLAGS[name]) for module in make(**options)])


def test_missing_monitor_is_lightnings_own_error():
    with pytest.raises(Exception, match="ReduceLROnPlateau conditioned on metric nothing which is not available"):
        train(lambda: Mixed(**scheduled(plateau, monitor="nothing")))


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
@pytest.mark.parametrize("options", [{}, scheduled(step_lr)], ids=["no scheduler", "scheduler"])
def test_stochastic_weight_averaging_equals_automatic_but_for_its_stray_step(options):
    swa = lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)]  # noqa: E731
    runs = [train(module, callbacks=swa, validate=True, max_epochs=3) for module in make(**options)]
    reference, *others = [run.facts() for run in runs]
    for facts in others:
        # In its statistics epoch automatic optimization calls optimizer.step once, with no gradients here.
        assert (reference["global_step"][0], facts["global_step"][0]) == (25, 24)
        for name in ("parameters and buffers", "moments", "metric", "learning rates", "losses", "random"):
            assert_same(reference[name], facts[name], name)


def test_learning_rate_finder_equals_automatic(tmp_path):
    def sweep(module):
        finder = LearningRateFinder(num_training_steps=12, early_stop_threshold=None)
        run = train(module, callbacks=lambda: [finder], default_root_dir=tmp_path, validate=True)
        return run, finder.optimal_lr.results

    (stock, reference), *others = [sweep(module) for module in make()]
    for run, results in others:
        assert_same(reference, results)
        assert_same(stock.facts(), run.facts())
    assert reference["lr"][0] < 1e-6
    assert reference["lr"][-1] > 0.1


class Sized:
    """Has a batch size that a finder can change."""

    batch_size = 2

    def train_dataloader(self):
        return DataLoader(loader().dataset, batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(1, 2)


class StockSized(Sized, Net):
    pass


class MixedSized(SOAAMixin, StockSized):
    pass


def test_batch_size_finder_equals_automatic(tmp_path):
    def find(make_module):
        seed()
        module = make_module()
        trainer, _ = make_trainer([BatchSizeFinder(max_trials=2, steps_per_trial=2)], default_root_dir=tmp_path)
        trainer.fit(module)
        return module.batch_size, dict(module.state_dict()), trainer.global_step, module.steps

    assert_same(find(StockSized), find(lambda: MixedSized(ACCEPT)))


class Overrides:
    """A user's own versions of the hooks that automatic optimization calls."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        self.calls.append(f"optimizer_step {epoch} {batch_idx} {self.global_step}")
        for group in optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.global_step + 1) / 5)
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        self.calls.append(f"optimizer_zero_grad {batch_idx}")
        optimizer.zero_grad(set_to_none=False)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.calls.append(f"clip {gradient_clip_val}")
        self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm="norm")

    def lr_scheduler_step(self, scheduler, metric):
        self.calls.append(f"lr_scheduler_step {metric}")
        scheduler.step()

    def backward(self, loss):
        self.calls.append("backward")
        loss.backward()

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 6 else None


class StockOverrides(Overrides, Net):
    pass


class MixedOverrides(SOAAMixin, StockOverrides):
    pass


@pytest.mark.parametrize("accumulate", [1, 4])
def test_overridden_hooks_are_called_as_under_automatic(accumulate):
    options = scheduled(step_lr, interval="step")
    modules = [
        lambda: StockOverrides(**options),
        lambda: MixedOverrides(**options),
        lambda: MixedOverrides(ACCEPT, **options),
    ]
    runs = [train(module, accumulate_grad_batches=accumulate, gradient_clip_val=0.1) for module in modules]
    assert_all_same(runs)
    assert any("optimizer_step" in call for call in runs[0].module.calls)


class Sometimes:
    """Returns a dict, or nothing on some batches."""

    pattern = ()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx in self.pattern:
            return None
        return {"loss": loss, "index": batch_idx, "logits": loss * 2}


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("pattern", [(), (0, 3, 7), (2, 3, 4, 5), tuple(range(8))])
def test_dicts_and_none_equal_automatic(pattern, accumulate):
    stock = type("Stock", (Sometimes, Net), {"pattern": pattern})
    mixed = type("Mixed", (SOAAMixin, stock), {})
    runs = [train(m, accumulate_grad_batches=accumulate) for m in (stock, mixed, lambda: mixed(ACCEPT))]
    assert_all_same(runs)


def checkpoints(run, folder):
    """Return what the files of a run hold, without the loops' progress and the folder's name."""
    found = {}
    for path in sorted(folder.rglob("*.ckpt")):
        kept = torch.load(path, weights_only=False)
        kept["optimizer_states"] = [state["state"] for state in kept["optimizer_states"]]
        for key in ("loops", "callbacks", "hparams_name"):
            kept.pop(key, None)
        found[path.name] = kept
    return found


CHECKPOINTS = {
    "every step": {"every_n_train_steps": 1, "save_top_k": -1},
    "every third step": {"every_n_train_steps": 3, "save_top_k": -1, "save_last": True},
    "monitor, each step": {"monitor": "loss_step", "every_n_train_steps": 1, "save_top_k": 2},
    "monitor val_loss, every step": {"monitor": "val_loss", "every_n_train_steps": 1, "save_top_k": -1},
    "monitor, epoch end": {"monitor": "loss_epoch", "save_on_train_epoch_end": True, "save_top_k": -1},
    "time": {"train_time_interval": datetime.timedelta(microseconds=1), "save_top_k": -1},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_checkpoints_equal_automatic(name, accumulate, tmp_path):
    files = []
    for index, module in enumerate(make(**scheduled(plateau, monitor="loss_epoch"))):
        folder = tmp_path / str(index)
        saver = lambda: [ModelCheckpoint(folder, **CHECKPOINTS[name])]  # noqa: E731, B023
        run = train(
            module, callbacks=saver, validate=True, enable_checkpointing=True, accumulate_grad_batches=accumulate
        )
        files.append(checkpoints(run, folder))
    assert files[0]
    for other in files[1:]:
        assert_same(files[0], other)


@pytest.mark.parametrize("rule", [FixedRadius(), ACCEPT], ids=["fixed", "accept"])
def test_one_and_one_epochs_are_two(rule, tmp_path):
    def quiet():
        module = Mixed(rule, **scheduled(step_lr, interval="step"))
        module.net[3] = torch.nn.Identity()  # streams are not part of a checkpoint
        module.loss = lambda batch: torch.nn.functional.cross_entropy(module.net(batch[0]), batch[1])
        return module

    whole = train(quiet, max_epochs=2)
    half = train(quiet, max_epochs=1)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(quiet(), max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.trainer.global_step == whole.trainer.global_step == 16
    assert resumed.module.steps == whole.module.steps[16:]
    for name in ("parameters and buffers", "moments", "schedulers"):
        assert_same(whole.facts()[name], resumed.facts()[name])
    assert_same(whole.trainer.optimizers[0].param_groups[0]["steps"], 16)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_resuming_automatic_optimizations_own_checkpoint_in_mid_epoch_equals_automatic(accumulate, tmp_path):
    options = scheduled(step_lr, interval="step")
    begun = train(lambda: Net(FixedRadius(), **options), max_steps=4, accumulate_grad_batches=accumulate)
    begun.trainer.save_checkpoint(tmp_path / "begun.ckpt")
    runs = []
    for module in (Net(FixedRadius(), **options), Mixed(FixedRadius(), **options)):
        seed()
        runs.append(fit(module, ckpt_path=tmp_path / "begun.ckpt", accumulate_grad_batches=accumulate, max_epochs=3))
    assert runs[0].module.steps[0] == 4  # read in training_step
    assert_all_same(runs)


def test_a_second_fit_of_the_same_module_and_trainer_equals_automatic():
    def twice(module):
        run = train(module, accumulate_grad_batches=3)
        run.trainer.fit_loop.max_epochs = 4
        run.trainer.fit(run.module, loader())
        again = fit(run.module, gradient_clip_val=0.1)
        return [run, again]

    for runs in zip(*[twice(module) for module in make(**scheduled(step_lr))], strict=True):
        assert_all_same(runs)


def test_validate_test_and_predict_work_without_a_fit():
    class Tested(Mixed):
        def test_step(self, batch, batch_idx):
            return self.training_step(batch, batch_idx)

        def predict_step(self, batch, batch_idx):
            return self.net(batch[0])

    module = Tested()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    trainer, _ = make_trainer(
        callbacks=[],
    )
    trainer.validate(module, loader(), verbose=False)
    trainer.predict(module, loader())
    trainer.test(module, loader(), verbose=False)
    assert_same(before, dict(module.state_dict()))
    assert module.automatic_optimization
