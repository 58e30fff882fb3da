"""The table of Trainer flags: a row is a flag, hook, callback or loader, and what the mixin makes of it in each mode.

`test_trainer_flags.py` holds every row against the stock run; `compatibility.py` writes the rows down.
"""

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import flag_models as models
import torch
from lightning.pytorch import Trainer, callbacks
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler
from lightning.pytorch.tuner.tuning import Tuner
from lightning_models import Net, loader, make_trainer, seed, train
from torch.optim import lr_scheduler as schedulers

from lightning_soaa import get_polynomial_avg_fn

SAME, REFUSED = "bit for bit", "refused"


def scheduled(scheduler, **options):
    """Return keywords of Net that put `scheduler(optimizer)` into its configuration."""
    return {"schedule": lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": scheduler(o), **options}}}


def step_lr(optimizer):
    return schedulers.StepLR(optimizer, 1, 0.7)


def plateau(optimizer):
    return schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.9)


def sequential(optimizer):
    first = schedulers.LinearLR(optimizer, 0.1, total_iters=3)
    return schedulers.SequentialLR(optimizer, [first, schedulers.CosineAnnealingLR(optimizer, 10)], [3])


def one_cycle(optimizer):
    return schedulers.OneCycleLR(optimizer, 0.1, total_steps=24)


EACH_STEP = scheduled(step_lr, interval="step")


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        flag: what it is called in the table.
        run: takes what makes a module, and a folder; trains and returns all facts that two runs are compared by.
        stock: the module without the mixin.
        options: keywords of the module.
        default: the outcome in the default mode, SAME or REFUSED.
        automatic: the outcome in automatic mode.
        apart: facts that differ from the stock run's in the default mode; `note` says why.
        apart_automatic: the same of automatic mode.
        note: what the table says of the row.
        checked: whether there is a step to check.
        needs: a callback that older versions of Lightning do not have.
    """

    flag: str
    run: Callable[[Callable[[], Any], Path], dict[str, Any]]
    stock: type = Net
    options: dict[str, Any] = field(default_factory=lambda: {"weight_decay": 0.1} | EACH_STEP)
    default: str = SAME
    automatic: str = SAME
    apart: tuple[str, ...] = ()
    apart_automatic: tuple[str, ...] = ()
    note: str = ""
    checked: bool = True
    needs: str = "Callback"

    @cache  # noqa: B019  (the rows live as long as the process)
    def mixed(self, automatic: bool) -> type:
        """Return the stock module behind the mixin."""
        from lightning_soaa.module import SOAAMixin

        return type("Mixed", (SOAAMixin, self.stock), {"automatic_optimization": True} if automatic else {})

    def __hash__(self) -> int:
        return hash(self.flag)


def relative(value, folder):
    """Return a callback's state without the folder of the run and the name of the radius rule."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key != "radius_rule"}
        return {relative(key, folder): relative(item, folder) for key, item in kept.items()}
    if isinstance(value, list | tuple):
        return [relative(item, folder) for item in value]
    return value.replace(str(folder), "") if isinstance(value, str) else value


def rows_without_measurements(rows):
    """Return a logger's rows with the values that a monitor of the machine measures left out, but not their names."""
    machine = ("DeviceStatsMonitor", "train/", "device/")
    return [(step, {k: None if k.startswith(machine) else v for k, v in row.items()}) for step, row in rows]


def files(folder):
    """Return what the checkpoints of a run hold, without the loops' progress, callbacks and optimizer's groups."""
    found = {}
    for path in sorted(folder.rglob("*.ckpt")):
        kept = torch.load(path, weights_only=False)
        kept["optimizer_states"] = [state["state"] for state in kept["optimizer_states"]]
        for key in ("loops", "callbacks", "hparams_name"):
            kept.pop(key, None)
        found[str(path.relative_to(folder))] = kept
    return found


def facts_of(run, given, folder):
    """Return all that a run is compared by; of a Timer's state only that it is there, since it holds a time."""
    facts = run.facts()
    facts["rows"] = rows_without_measurements(facts["rows"])
    states = [(type(c).__name__, None if isinstance(c, callbacks.Timer) else c.state_dict()) for c in given]
    return facts | {"callbacks": relative(states, folder), "files": files(folder)}


def fitted(with_callbacks=lambda folder: [], then=lambda run: None, **flags):
    """Return a `run` that fits once, with `flags` of the Trainer; `then` goes on with the finished run."""

    def run(make, folder):
        given = with_callbacks(folder)
        keep = flags | {"enable_checkpointing": any(isinstance(c, callbacks.ModelCheckpoint) for c in given)}
        done = train(make, callbacks=lambda: given, **{"default_root_dir": folder} | keep)
        then(done)
        return facts_of(done, given, folder)

    return run


def calling(*made, **flags):
    """Return a `run` with callbacks, each given as a function that makes one."""
    return fitted(lambda folder: [make() for make in made], **flags)


def saving(accumulate, **options):
    """Return a `run` with a ModelCheckpoint."""
    return fitted(
        lambda folder: [callbacks.ModelCheckpoint(folder, **options)], validate=True, accumulate_grad_batches=accumulate
    )


# Schedulers

three = partial(fitted, max_epochs=3)

SCHEDULERS = [
    Row("`interval: epoch`", three(), options=scheduled(step_lr)),
    Row("`interval: step`", three()),
    Row("`frequency: 2`", three(), options=scheduled(step_lr, interval="step", frequency=2)),
    Row("`frequency: 2`, epochs", three(), options=scheduled(step_lr, frequency=2)),
    Row("`interval: step`, accumulating", fitted(accumulate_grad_batches=2)),
    Row("`OneCycleLR`", three(), options=scheduled(one_cycle, interval="step")),
    Row("`SequentialLR`", three(), options=scheduled(sequential, interval="step")),
    Row(
        "two schedulers", three(),
        options={"schedule": lambda o: ([o], [step_lr(o), {"scheduler": one_cycle(o), "interval": "step"}])},
    ),
    Row("`ReduceLROnPlateau`, each epoch", three(), options=scheduled(plateau, monitor="loss_epoch")),
    Row("`ReduceLROnPlateau` on validation", three(validate=True), options=scheduled(plateau, monitor="val_loss")),
    Row(
        "`ReduceLROnPlateau`, each third step", three(validate=True),
        options=scheduled(plateau, monitor="loss_step", interval="step", frequency=3),
    ),
    Row(
        "`ReduceLROnPlateau`, steps, accumulating", fitted(accumulate_grad_batches=2, validate=True),
        options=scheduled(plateau, monitor="loss_step", interval="step", frequency=3),
    ),
    Row("`strict: False`, monitor missing", three(), options=scheduled(plateau, monitor="nothing", strict=False)),
    Row("user's `lr_scheduler_step`", three(), models.overriding("lr_scheduler_step")),
]  # fmt: skip

# Gradients

GRADIENTS = [
    Row("`accumulate_grad_batches=3`, short last window", fitted(accumulate_grad_batches=3)),
    Row("`accumulate_grad_batches` above the epoch's length", fitted(accumulate_grad_batches=100)),
    Row(
        "`GradientAccumulationScheduler`",
        calling(lambda: callbacks.GradientAccumulationScheduler({0: 1, 1: 3}), max_epochs=3),
    ),
    Row("`gradient_clip_val`, by norm", fitted(gradient_clip_val=0.05)),
    Row("`gradient_clip_val`, by value", fitted(gradient_clip_val=0.01, gradient_clip_algorithm="value")),
    Row("clipping and accumulation", fitted(accumulate_grad_batches=2, gradient_clip_val=0.05)),
    Row("user's `configure_gradient_clipping`", fitted(), models.overriding("configure_gradient_clipping")),
    Row("user's `backward`", fitted(), models.overriding("backward")),
    Row("user's `optimizer_zero_grad`", fitted(accumulate_grad_batches=3), models.overriding("optimizer_zero_grad")),
    Row("user's `optimizer_step`", fitted(), models.overriding("optimizer_step")),
    Row("user's `optimizer_step`, accumulating", fitted(accumulate_grad_batches=3),
        models.overriding("optimizer_step")),
    Row("all these hooks", fitted(accumulate_grad_batches=4, gradient_clip_val=0.1), models.AllOverrides),
    Row("`detect_anomaly=True`", fitted(detect_anomaly=True)),
]  # fmt: skip

# Modules and loaders


def fitted_twice(make, folder):
    """Fit, go on with the same Trainer, and fit the module again with a new one."""
    seed()
    module = make()
    first, _ = make_trainer(accumulate_grad_batches=3)
    first.fit(module, loader())
    first.fit_loop.max_epochs = 4
    first.fit(module, loader())
    again = train(lambda: module, gradient_clip_val=0.1)
    return again.facts() | {"first global_step": first.global_step}


def fitted_from(source, **flags):
    """Return a `run` whose loaders come from `source(module)`, given to fit by keyword."""

    def run(make, folder):
        seed()
        module = make()
        trainer, rows = make_trainer(**flags)
        trainer.fit(module, **source())
        return {"parameters": dict(module.state_dict()), "rows": rows.rows, "steps": module.steps, "lrs": module.lrs}

    return run


def evaluated(make, folder):
    """Validate, test and predict without a fit."""
    seed()
    module = make()
    trainer, rows = make_trainer(callbacks=[])
    trainer.validate(module, loader(), verbose=False)
    trainer.test(module, loader(), verbose=False)
    predicted = trainer.predict(module, loader())
    return {"parameters": dict(module.state_dict()), "rows": rows.rows, "predicted": predicted}


def evaluated_in_between(make, folder):
    """Fit, validate with the same Trainer, fit on."""
    seed()
    module = make()
    trainer, rows = make_trainer(max_epochs=1)
    trainer.fit(module, loader())
    trainer.validate(module, loader(1, 2), verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    return {"parameters": dict(module.state_dict()), "rows": rows.rows, "steps": module.steps}


def compiled(accumulate):
    """Return a `run` of the module compiled as a whole."""

    def run(make, folder):
        torch._dynamo.reset()
        done = train(lambda: torch.compile(make(), backend="eager"), accumulate_grad_batches=accumulate)
        steps = done.trainer.global_step
        return {"parameters": done.module._orig_mod.state_dict(), "rows": done.rows, "global_step": steps}

    return run


LOADERS = [
    Row("`training_step` without `batch_idx`", fitted(), models.WithoutIndex),
    Row("`training_step` returns a dict with extras", fitted(), models.sometimes()),
    Row("`training_step` returns None, at times", fitted(), models.sometimes(0, 3, 7)),
    Row("None and accumulation", fitted(accumulate_grad_batches=3), models.sometimes(2, 3, 4, 5, extras=False)),
    Row("None for a whole window", fitted(accumulate_grad_batches=2), models.sometimes(2, 3, 4, 5)),
    Row("None and dicts, accumulating", fitted(accumulate_grad_batches=3), models.sometimes(0, 3, 7)),
    Row("`training_step` always returns None", fitted(), models.sometimes(*range(8)), checked=False),
    Row("`training_step` that differentiates itself", fitted(), models.Differentiating),
    Row("`training_step(dataloader_iter)`", fitted(), models.Iterating, default=REFUSED, automatic=REFUSED,
        note="a trial needs the batch again"),
    Row("loader without a length", fitted(data=models.stream)),
    Row("loader without a length, accumulating", fitted(data=models.stream, accumulate_grad_batches=3)),
    Row("loader that yields None", fitted(data=models.Gaps)),
    Row("loader that yields None, accumulating", fitted(data=models.Gaps, accumulate_grad_batches=3)),
    Row("dict of loaders", fitted(data=lambda: {"a": loader(), "b": loader(5, 3)}), models.Several),
    Row("list of loaders", fitted(data=lambda: [loader(), loader(5, 3)]), models.Several),
    Row("`CombinedLoader`, max_size", fitted(data=lambda: models.combined("max_size")), models.Several),
    Row("`CombinedLoader`, min_size", fitted(data=lambda: models.combined("min_size")), models.Several),
    Row("shuffled loader", fitted(data=partial(loader, shuffle=True))),
    Row("`train_dataloader` of the module", fitted_from(dict), models.Sized),
    Row("`LightningDataModule`", fitted_from(lambda: {"datamodule": models.Data()})),
    Row("user's `on_after_batch_transfer`", fitted(), models.overriding("on_after_batch_transfer")),
    Row("`on_train_batch_start` returns -1", fitted(accumulate_grad_batches=4),
        models.overriding("on_train_batch_start")),
    Row("two fits, and a third with another Trainer", fitted_twice, options=scheduled(step_lr)),
    Row("validate, test and predict without a fit", evaluated, models.Evaluated, checked=False),
    Row("validate between two fits", evaluated_in_between),
    Row("a compiled part of the module", fitted(max_epochs=1), models.PartlyCompiled),
    Row("`torch.compile` of the whole module", compiled(1), models.Compilable, default=REFUSED,
        note="set `automatic_optimization = True`"),
    Row("the same, accumulating", compiled(3), models.Compilable, default=REFUSED),
    Row("several optimizers", fitted(), models.TwoOptimizers, default=REFUSED, automatic=REFUSED,
        note="set `automatic_optimization = False` and call `soaa_step`"),
]  # fmt: skip

# Callbacks


def lr_sweep(with_tuner):
    """Return a `run` of the learning rate finder, by callback or by the Tuner."""

    def run(make, folder):
        if with_tuner:
            seed()
            module = make()
            trainer, _ = make_trainer(default_root_dir=folder)
            options = {"num_training": 12, "early_stop_threshold": None}
            found = Tuner(trainer).lr_find(module, loader(), attr_name="lr", **options)
            return {"sweep": found.results, "lr": module.lr, "parameters": dict(module.state_dict())}
        finder = callbacks.LearningRateFinder(num_training_steps=12, early_stop_threshold=None, attr_name="lr")
        done = train(make, callbacks=lambda: [finder], default_root_dir=folder, validate=True)
        return done.facts() | {"sweep": finder.optimal_lr.results}

    return run


def batch_size(with_tuner):
    """Return a `run` of the batch size finder, by callback or by the Tuner."""

    def run(make, folder):
        seed()
        module = make()
        finders = [] if with_tuner else [callbacks.BatchSizeFinder(max_trials=2, steps_per_trial=2)]
        trainer, _ = make_trainer(finders, default_root_dir=folder)
        if with_tuner:
            Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=2)
        trainer.fit(module)
        return {"size": module.batch_size, "parameters": dict(module.state_dict()), "steps": module.steps}

    return run


stop_early = partial(callbacks.EarlyStopping, patience=0)
SWA = partial(callbacks.StochasticWeightAveraging, swa_lrs=0.01, swa_epoch_start=2)
STRAY = {
    "apart": ("global_step", "hooks", "rows", "metrics"),
    "apart_automatic": ("hooks", "rows", "metrics"),
    "note": "without the optimizer step that a stock run takes at the end of SWA's statistics epoch",
}
MICROSECOND = datetime.timedelta(microseconds=1)

CALLBACKS = [
    Row("`ModelCheckpoint`, each step", saving(1, every_n_train_steps=1, save_top_k=-1)),
    Row("`ModelCheckpoint`, each third step, last", saving(1, every_n_train_steps=3, save_top_k=-1, save_last=True)),
    Row("the same, accumulating", saving(3, every_n_train_steps=1, save_top_k=-1)),
    Row("`ModelCheckpoint`, best of a step's metric", saving(
        1, monitor="loss_step", every_n_train_steps=1, save_top_k=2)),
    Row("`ModelCheckpoint`, steps, best of validation", saving(
        1, monitor="val_loss", every_n_train_steps=1, save_top_k=-1)),
    Row("`ModelCheckpoint`, epochs, after a plateau scheduler",
        saving(1, monitor="loss_epoch", save_on_train_epoch_end=True, save_top_k=-1),
        options=scheduled(plateau, monitor="loss_epoch")),
    Row("`ModelCheckpoint`, best of validation", saving(1, monitor="val_loss", save_top_k=1)),
    Row("`ModelCheckpoint(train_time_interval)`", saving(1, train_time_interval=MICROSECOND, save_top_k=-1)),
    Row("the same, accumulating, by time", saving(3, train_time_interval=MICROSECOND, save_top_k=-1)),
    Row("`EarlyStopping` on epochs", calling(lambda: stop_early("loss_epoch", mode="max"), max_epochs=4)),
    Row("`EarlyStopping` on validation", calling(
        lambda: stop_early("val_loss", mode="max"), max_epochs=4, validate=True)),
    Row("`EarlyStopping` on a threshold", calling(
        lambda: callbacks.EarlyStopping("val_loss", stopping_threshold=10.0), max_epochs=4, validate=True)),
    Row("`Timer` that stops", calling(lambda: callbacks.Timer(MICROSECOND))),
    Row("`Timer` that stops between epochs", calling(lambda: callbacks.Timer(MICROSECOND, interval="epoch"))),
    Row("`StochasticWeightAveraging` with batch normalisation",
        calling(SWA, max_epochs=3, validate=True), **STRAY),
    Row("the same with a scheduler", calling(SWA, max_epochs=3, validate=True),
        options=scheduled(step_lr), **STRAY),
    Row("`WeightAveraging`", calling(lambda: callbacks.WeightAveraging()), needs="WeightAveraging"),
    Row("`EMAWeightAveraging`", calling(lambda: callbacks.EMAWeightAveraging(decay=0.9), validate=True),
        needs="EMAWeightAveraging"),
    Row("`EMAWeightAveraging`, accumulating", calling(
        lambda: callbacks.EMAWeightAveraging(), accumulate_grad_batches=3), needs="EMAWeightAveraging"),
    Row("`WeightAveraging(avg_fn=get_polynomial_avg_fn())`", calling(
        lambda: callbacks.WeightAveraging(avg_fn=get_polynomial_avg_fn()), validate=True), needs="WeightAveraging"),
    Row("`LearningRateMonitor`, momentum and decay", calling(
        lambda: callbacks.LearningRateMonitor("step", log_momentum=True, log_weight_decay=True),
        callbacks.LearningRateMonitor)),
    Row("`LearningRateFinder`", lr_sweep(False)),
    Row("`Tuner.lr_find`", lr_sweep(True)),
    Row("`BatchSizeFinder`", batch_size(False), models.Sized),
    Row("`Tuner.scale_batch_size`", batch_size(True), models.Sized),
    Row("`BackboneFinetuning`, groups added in mid-training", calling(
        lambda: callbacks.BackboneFinetuning(1, backbone_initial_ratio_lr=0.5), max_epochs=3), models.Tuned),
    Row("`ModelPruning`", calling(
        lambda: callbacks.ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.2)), models.Prunable),
    Row("`DeviceStatsMonitor`", calling(lambda: callbacks.DeviceStatsMonitor(cpu_stats=True))),
    Row("`ThroughputMonitor`", calling(
        lambda: callbacks.ThroughputMonitor(lambda batch: len(batch[0]))), models.Metered),
    Row("`RichProgressBar`", calling(callbacks.RichProgressBar, max_epochs=1, enable_progress_bar=True)),
    Row("`TQDMProgressBar`", calling(callbacks.TQDMProgressBar, max_epochs=1, enable_progress_bar=True)),
    Row("`RichModelSummary`", calling(callbacks.RichModelSummary, max_epochs=1, enable_model_summary=True)),
    Row("order of all callback hooks", calling(models.HookOrder, validate=True, accumulate_grad_batches=3)),
    Row("`trainer.should_stop`, and a callback of the module", fitted(max_epochs=4), models.Stopping),
]  # fmt: skip

# Trainer


def bare(**flags):
    """Return a `run` with nothing around the loop but what `flags` say."""

    def run(make, folder):
        seed()
        module = make()
        Trainer(max_epochs=2, accelerator="cpu", **flags).fit(module, loader())
        return {"parameters": dict(module.state_dict()), "steps": module.steps, "lrs": module.lrs}

    return run


def to_csv(make, folder):
    """Fit with a logger that writes files."""
    seed()
    trainer, _ = make_trainer(logger=CSVLogger(folder), log_every_n_steps=3)
    trainer.fit(make(), loader(), loader(1, 2))
    lines = [line.split(",") for line in (Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines()]
    kept = [i for i, name in enumerate(lines[0]) if not name.startswith(("trust_region", "fisher"))]
    return {"lines": [[line[i] for i in kept] for line in lines]}


def profiled(profiler):
    return fitted(max_steps=4, profiler=profiler)


def torch_profiled(make, folder):
    profiler = PyTorchProfiler(dirpath=folder, filename="profile", export_to_chrome=False)
    return fitted(max_steps=4, profiler=profiler)(make, folder)


TRAINER = [
    Row("no flag", fitted(), options={}),
    Row("validation", fitted(validate=True)),
    Row("`max_steps`", fitted(max_steps=11)),
    Row("`max_steps`, accumulating", fitted(max_steps=5, accumulate_grad_batches=2)),
    Row("`max_time`", fitted(max_time=MICROSECOND)),
    Row("`min_steps` against an early stop", calling(
        lambda: stop_early("loss_epoch", mode="max"), max_epochs=4, min_steps=20)),
    Row("`overfit_batches`", fitted(overfit_batches=2, validate=True)),
    Row("`limit_train_batches`, `limit_val_batches`", fitted(
        limit_train_batches=3, limit_val_batches=1, validate=True)),
    Row("`val_check_interval=3`", fitted(val_check_interval=3, validate=True)),
    Row("`val_check_interval=0.5`", fitted(val_check_interval=0.5, validate=True, accumulate_grad_batches=3)),
    Row("`check_val_every_n_epoch=None`", fitted(check_val_every_n_epoch=None, val_check_interval=5, validate=True)),
    Row("`num_sanity_val_steps=0`", fitted(num_sanity_val_steps=0, validate=True)),
    Row("`fast_dev_run=3`", fitted(fast_dev_run=3, validate=True)),
    Row("`barebones=True`", bare(barebones=True)),
    Row("`log_every_n_steps`, accumulating", fitted(log_every_n_steps=3, accumulate_grad_batches=2)),
    Row("`logger=False`", bare(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)),
    Row("`CSVLogger`", to_csv),
    Row("`profiler=\"simple\"`", profiled("simple")),
    Row("`AdvancedProfiler`", profiled(AdvancedProfiler())),
    Row("`PyTorchProfiler`", torch_profiled),
    Row("`reload_dataloaders_every_n_epochs`", fitted(reload_dataloaders_every_n_epochs=1)),
    Row("`deterministic=True`", fitted(deterministic=True)),
    Row("`inference_mode=False`", fitted(inference_mode=False, validate=True)),
    Row("`sync_batchnorm=True`, one process", fitted(sync_batchnorm=True)),
    Row("`precision=\"bf16-mixed\"`", fitted(precision="bf16-mixed")),
    Row("`bf16-mixed`, accumulating, clipping", fitted(
        precision="bf16-mixed", accumulate_grad_batches=2, gradient_clip_val=0.05)),
    Row("`precision=\"bf16-true\"`", fitted(precision="bf16-true")),
    Row("`precision=\"16-true\"`", fitted(precision="16-true")),
    Row("`precision=\"64-true\"`", fitted(precision="64-true")),
    Row("`precision=\"16-mixed\"`, GradScaler", lambda make, folder: fitted(
        plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=128.0)))(make, folder)),
]  # fmt: skip

TABLE = {
    "Trainer": TRAINER,
    "Gradients": GRADIENTS,
    "Learning-rate schedulers": SCHEDULERS,
    "Callbacks": CALLBACKS,
    "Modules and loaders": LOADERS,
}
