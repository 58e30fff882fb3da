"""TrustRegionMonitor in Trainers on one process, with SOAA and with a stand-in that counts what is read of it."""

import csv
import inspect
import re
from math import isnan, nan

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning_models import FISHER, TRUST_REGION, manual_step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_soaa import SOAA, DiagonalFisher, FixedRadius, KroneckerFisher, StepReport
from lightning_soaa._rows import find_optimizers, group_names
from lightning_soaa.monitor import TrustRegionMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
]


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()


def batches(count, poisoned=(), by=nan):
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(count, 5, 3, generator=generator, dtype=torch.float64)
    for index in poisoned:
        data[index] *= by
    return DataLoader(data, batch_size=None)


class Automatic(LightningModule):
    """Stock automatic optimization, as most modules are; FixedRadius needs no loss closure."""

    def __init__(self, make=lambda module: SOAA(module.parameters(), lr=0.01, radius=FixedRadius(1.0))):
        super().__init__()
        self.net, self.make = net(), make

    def loss(self, batch):
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return self.make(self)


class Manual(Automatic):
    """Manual optimization with a loss closure, so that there are checks; remembers each step's report."""

    def __init__(self, make=lambda module: SOAA(module.parameters())):
        super().__init__(make)
        self.automatic_optimization = False
        self.reports = []

    def training_step(self, batch, batch_idx):
        self.log("loss", manual_step(self, batch, lambda: self.loss(batch)))
        self.reports.append(self.optimizers().optimizer.last_step)


class Counting(torch.optim.SGD):
    """A stand-in that keeps SOAA's numbers: a check on each step, of which every third is rejected."""

    def __init__(self, params):
        super().__init__(params, lr=0.01)
        self.param_groups[0] |= {"radius": 0.5, "steps": 0, "checks": 0, "accepted_checks": 0, "skipped_steps": 0}
        self.read_at = []

    def step(self, closure=None):
        loss = super().step(closure)
        head = self.param_groups[0]
        head["steps"] += 1
        head["checks"] += 1
        head["accepted_checks"] += head["steps"] % 3 != 0
        return loss

    @property
    def last_step(self):
        step = self.param_groups[0]["steps"]
        self.read_at.append(step)
        return StepReport(step=step, radius=0.5, checked=True, accepted=step % 3 != 0, skipped=False, trials=1)


def counting_module():
    return Automatic(lambda module: Counting(module.parameters()))


def trainer(path, *callbacks, monitor=None, **options):
    loggers = [CSVLogger(path, name="csv", version=0), TensorBoardLogger(path, name="tb", version=0)]
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": loggers,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    if options.get("barebones"):
        defaults = {"accelerator": "cpu", "max_epochs": 1}
    monitor = TrustRegionMonitor() if monitor is None else monitor
    return Trainer(callbacks=[monitor, *callbacks], **{**defaults, **options})


def rows(path):
    """Return the rows of the CSV file, numbers as floats, empty fields left out."""
    with open(path / "csv" / "version_0" / "metrics.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def tensorboard(path):
    """Return {key: [(step, value), ...]} of the event file."""
    events = EventAccumulator(str(path / "tb" / "version_0"), size_guidance={"scalars": 0}).Reload()
    return {key: [(point.step, point.value) for point in events.Scalars(key)] for key in events.Tags()["scalars"]}


@pytest.fixture
def fixed_header(monkeypatch):
    """Fail where the CSV file is rewritten because a key came late."""

    def refuse(self, fieldnames):
        raise AssertionError(f"header rewritten: {fieldnames}")

    monkeypatch.setattr("lightning.fabric.loggers.csv_logs._ExperimentWriter._rewrite_with_new_header", refuse)


@pytest.mark.usefixtures("fixed_header")
@pytest.mark.parametrize("module", [Automatic, Manual])
def test_all_keys_are_in_every_row_from_the_first_on(tmp_path, module):
    trainer(tmp_path, max_epochs=2).fit(module(), batches(4))
    assert [row.keys() for row in rows(tmp_path)] == 8 * [TRUST_REGION | FISHER | {"loss", "epoch", "step"}]
    points = tensorboard(tmp_path)
    assert points.keys() == TRUST_REGION | FISHER | {"loss", "epoch"}
    assert {key: len(values) for key, values in points.items()} == dict.fromkeys(points, 8)


def test_values_are_those_of_the_report_of_the_same_step(tmp_path):
    module = Manual()
    trainer(tmp_path).fit(module, batches(12))
    assert sum(report.checked for report in module.reports) == 12
    for row, report in zip(rows(tmp_path), module.reports, strict=True):
        assert row["trust_region/radius"] == report.radius
        assert row["trust_region/acceptance_ratio"] == report.acceptance_ratio
        assert row["trust_region/acceptance_rate"] == report.accepted_checks / report.checks
        assert row["trust_region/predicted_reduction"] == report.predicted_reduction
        assert row["trust_region/actual_reduction"] == report.actual_reduction
        assert row["trust_region/step_norm"] == report.step_norm
        assert row["trust_region/trials"] == report.trials
        assert row["trust_region/skipped_steps"] == 0
        assert row["fisher/mean"] == report.fisher_mean
        assert row["fisher/min"] == report.fisher_min
        assert row["fisher/max"] == report.fisher_max
        assert row["fisher/trace"] == report.fisher_trace
        assert row["fisher/active_fraction"] == report.active_fraction


def test_quantities_of_a_check_are_nan_where_the_rule_never_checks(tmp_path):
    trainer(tmp_path).fit(Automatic(), batches(2))
    missing = {"acceptance_ratio", "acceptance_rate", "predicted_reduction", "actual_reduction"}
    for row in rows(tmp_path):
        assert {key for key, value in row.items() if isnan(value)} == {f"trust_region/{name}" for name in missing}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every", [1, 2, 50])
def test_x_axis_is_that_of_the_modules_own_metric(tmp_path, every, accumulate):
    options = {"log_every_n_steps": every, "accumulate_grad_batches": accumulate}
    trainer(tmp_path, max_epochs=2, **options).fit(Automatic(), batches(52))
    expected = [step for step in range(104 // accumulate) if (step + 1) % every == 0]
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == expected
    assert [row["step"] for row in rows(tmp_path) if "trust_region/radius" in row] == expected
    points = tensorboard(tmp_path)
    assert [step for step, _ in points["loss"]] == expected
    assert [step for step, _ in points["trust_region/radius"]] == expected


def test_nothing_is_read_on_batches_without_a_row(tmp_path):
    module = counting_module()
    trainer(tmp_path, max_epochs=2, log_every_n_steps=4).fit(module, batches(10))
    assert module.optimizers().optimizer.read_at == [4, 8, 12, 16, 20]


def test_the_epoch_line_costs_one_read_an_epoch(tmp_path):
    module = counting_module()
    trainer(tmp_path, max_epochs=2, logger=False, enable_progress_bar=True).fit(module, batches(10))
    assert module.optimizers().optimizer.read_at == [10, 20]


@pytest.mark.parametrize("options", [{"logger": False}, {"barebones": True}])
def test_without_a_logger_nothing_is_read_and_nothing_said(tmp_path, options):
    module = counting_module()
    module.log = lambda *args: None  # Lightning warns of the module's own metric
    trainer(tmp_path, **options).fit(module, batches(4))
    assert module.optimizers().optimizer.read_at == []


def test_fast_dev_run_takes_the_whole_path(tmp_path):
    module = counting_module()
    trainer(tmp_path, fast_dev_run=2).fit(module, batches(4))
    assert module.optimizers().optimizer.read_at == [1, 2]


def test_keys_are_made_once_and_given_values_from_then_on(tmp_path, monkeypatch):
    calls, log_dict = [], LightningModule.log_dict
    monkeypatch.setattr(LightningModule, "log_dict", lambda *args, **kw: calls.append(args) or log_dict(*args, **kw))
    module = Manual()
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, batches(4))
    assert len(calls) == 1
    radii = [report.radius for report in module.reports]
    assert [row["trust_region/radius"] for row in rows(tmp_path)] == radii
    assert run.callback_metrics["trust_region/radius"] == run.logged_metrics["trust_region/radius"] == radii[-1]


def test_between_rows_nothing_goes_through_the_values(tmp_path, monkeypatch):
    looked, get_cache = [], _ResultCollection._get_cache
    look = lambda metric, on_step: looked.append(metric.meta.name) or get_cache(metric, on_step)  # noqa: E731
    monkeypatch.setattr(_ResultCollection, "_get_cache", staticmethod(look))
    run = trainer(tmp_path, log_every_n_steps=4)
    run.fit(Manual(), batches(13))
    # For each of three rows: at the end of the batch, and to write it.
    assert {name: looked.count(name) for name in looked if "/" in name} == dict.fromkeys(TRUST_REGION | FISHER, 6)
    assert run.callback_metrics.keys() >= TRUST_REGION | FISHER


def test_advice_is_looked_for_only_where_there_is_news(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("lightning_soaa.monitor.advise", lambda watch: asked.append(watch.steps) or [])
    module = Manual()
    trainer(tmp_path, log_every_n_steps=50).fit(module, batches(120))
    head = module.optimizers().optimizer.param_groups[0]
    checked = [report.step for report in module.reports if report.checked]
    assert len(checked) == head["checks"] < 100
    assert asked == sorted({*checked, 50, 100})  # no other step, and not twice where a check has a row


def test_acceptance_rate_starts_anew_with_each_epoch(tmp_path):
    trainer(tmp_path, max_epochs=2).fit(counting_module(), batches(4))
    rates = [row["trust_region/acceptance_rate"] for row in rows(tmp_path)]
    assert rates == [1 / 1, 2 / 2, 2 / 3, 3 / 4, 1 / 1, 1 / 2, 2 / 3, 3 / 4]  # steps 3 and 6 are rejected


class Stop(Callback):
    def __init__(self, after):
        self.after = after

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.after:
            trainer.save_checkpoint(trainer.default_root_dir + "/stopped.ckpt")
            trainer.should_stop = True


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("after", [7, 9])
def test_a_run_resumed_in_mid_epoch_has_the_figures_of_one_that_was_not_stopped(tmp_path, after):
    trainer(tmp_path / "whole", max_epochs=3).fit(counting_module(), batches(5))
    keys = ("trust_region/acceptance_rate", "trust_region/rejects")
    whole = {row["step"]: [row[key] for key in keys] for row in rows(tmp_path / "whole")}
    first = {"max_epochs": 3, "log_every_n_steps": 2, "default_root_dir": str(tmp_path)}
    trainer(tmp_path / "first", Stop(after), **first).fit(counting_module(), batches(5))
    fit = trainer(tmp_path / "second", max_epochs=3).fit
    known = inspect.signature(fit).parameters  # Lightning 2.5 has no such argument
    only = {"weights_only": True} if "weights_only" in known else {}
    fit(counting_module(), batches(5), ckpt_path=tmp_path / "stopped.ckpt", **only)
    resumed = {row["step"]: [row[key] for key in keys] for row in rows(tmp_path / "second")}
    assert list(resumed) == list(range(after, 15))
    assert resumed == {step: whole[step] for step in range(after, 15)}


def test_its_state_is_plain_numbers_and_comes_back(tmp_path):
    monitor, module = TrustRegionMonitor(), counting_module()
    trainer(tmp_path, monitor=monitor, max_epochs=2).fit(module, batches(4))
    state = monitor.state_dict()
    assert state == {"epoch_start": {"": {"checks": 4, "accepted_checks": 3, "skipped_steps": 0}}, "said": {}}
    torch.save(state, tmp_path / "state.pt")
    other = TrustRegionMonitor()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.state_dict() == state


def test_a_nan_batch_shows_as_a_skipped_step(tmp_path):
    trainer(tmp_path).fit(Automatic(), batches(4, poisoned=[1]))
    assert [row["trust_region/skipped_steps"] for row in rows(tmp_path)] == [0, 1, 1, 1]
    assert [row["trust_region/step_norm"] == 0 for row in rows(tmp_path)] == [False, True, False, False]
    assert [row["trust_region/outlier_steps"] for row in rows(tmp_path)] == [0, 0, 0, 0]


def test_rejects_between_two_rows_are_not_lost(tmp_path):
    trainer(tmp_path, max_epochs=2, log_every_n_steps=4).fit(counting_module(), batches(4))
    assert [row["trust_region/rejects"] for row in rows(tmp_path)] == [1, 2]  # steps 3 and 6


def test_a_batch_far_out_shows_as_an_outlier_step(tmp_path):
    trainer(tmp_path).fit(Manual(), batches(24, poisoned=[20], by=100))
    assert [row["trust_region/outlier_steps"] for row in rows(tmp_path)] == 20 * [0] + 4 * [1]
    assert [row["trust_region/skipped_steps"] for row in rows(tmp_path)] == 24 * [0]
    assert [row["trust_region/step_norm"] == 0 for row in rows(tmp_path)] == [step == 20 for step in range(24)]


def test_callbacks_can_monitor_a_key(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="trust_region/acceptance_rate", mode="max")
    options = {"max_epochs": 2, "log_every_n_steps": 2, "enable_checkpointing": True}
    trainer(tmp_path, checkpoint, **options).fit(counting_module(), batches(5))
    # The last rows of the epochs are those of steps 4 and 10: 3 of 4 accepted, 3 of 5.
    assert checkpoint.best_model_score == 3 / 4


class LateManual(Automatic):
    """Accumulates by itself, where the Trainer believes in manual optimization from the start of training only."""

    def on_train_start(self):
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = self.loss(batch)
        self.log("loss", loss)
        self.manual_backward(loss)
        if not self.trainer.fit_loop._should_accumulate():
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.usefixtures("fixed_header")
def test_rows_of_batches_that_only_accumulate_hold_all_keys_and_no_report(tmp_path):
    module = LateManual(lambda module: Counting(module.parameters()))
    trainer(tmp_path, accumulate_grad_batches=2).fit(module, batches(4))
    assert [row.keys() for row in rows(tmp_path)] == 4 * [TRUST_REGION | FISHER | {"loss", "epoch", "step"}]
    assert [row["trust_region/radius"] for row in rows(tmp_path)] == 4 * [0.5]
    assert [isnan(row["trust_region/trials"]) for row in rows(tmp_path)] == [True, False, True, False]
    assert module.optimizers().optimizer.read_at == [1, 2]


class Adversaries(LightningModule):
    """Two SOAA optimizers and one of another kind between them."""

    def __init__(self, groups):
        super().__init__()
        self.automatic_optimization = False
        self.groups = groups
        self.nets = torch.nn.ModuleList([net(), net(), net()])

    def training_step(self, batch, batch_idx):
        for optimizer, module in zip(self.optimizers(), self.nets, strict=True):
            optimizer.zero_grad()
            self.manual_backward(module(batch).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        first, second, third = self.nets
        groups = [{"params": layer.parameters(), **group} for layer, group in zip(third[::2], self.groups, strict=True)]
        return [
            SOAA(first.parameters(), radius=FixedRadius(1.0)),
            torch.optim.SGD(second.parameters(), lr=0.1),
            SOAA(groups, radius=FixedRadius(2.0)),
        ]


@pytest.mark.usefixtures("fixed_header")
@pytest.mark.parametrize(
    ("groups", "names"),
    [(({}, {}), ("pg1", "pg2")), (({"name": "body", "lr": 0.1}, {"name": "head", "lr": 0.3}), ("body", "head"))],
)
def test_optimizers_and_groups_are_named_as_learning_rate_monitor_does(tmp_path, groups, names):
    module = Adversaries(groups)
    trainer(tmp_path).fit(module, batches(2))
    keys = TRUST_REGION | FISHER
    keys |= {key.replace("trust_region/", "trust_region-1/").replace("fisher/", "fisher-1/") for key in keys}
    keys |= {f"trust_region-1/group_radius/{name}" for name in names}
    assert [row.keys() for row in rows(tmp_path)] == 2 * [keys | {"epoch", "step"}]
    for row in rows(tmp_path):
        assert row["trust_region/radius"] == 1
        assert row["trust_region-1/radius"] == 2
        for name, group in zip(names, module.optimizers()[2].param_groups, strict=True):
            assert row[f"trust_region-1/group_radius/{name}"] == group["group_radius"] == 2 * group["lr"]


def test_no_key_is_the_beginning_of_another(tmp_path):
    # Loggers that keep a file for each key cannot have a folder of the same name.
    trainer(tmp_path).fit(Adversaries([{}, {}]), batches(1))
    keys = rows(tmp_path)[0].keys()
    assert not [(key, other) for key in keys for other in keys if other.startswith(key + "/")]


def test_wrapped_optimizers_are_found_and_others_are_not():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    def parameter():
        return [torch.nn.Parameter(torch.zeros(1))]

    first, other, second = SOAA(parameter()), torch.optim.AdamW(parameter()), SOAA(parameter())
    assert find_optimizers([Wrapper(first), other, second]) == {"": first, "-1": second}


def test_parameter_groups_with_one_name_are_refused(tmp_path):
    text = "TrustRegionMonitor: `name` must be unique among the parameter groups of an optimizer, got "
    with pytest.raises(ValueError) as error:
        trainer(tmp_path).fit(Adversaries(({"name": "a"}, {"name": "a"})), batches(1))
    assert str(error.value) == text + "['a', 'a']"
    with pytest.raises(ValueError) as error:
        group_names([{}, {"name": "pg1"}])
    assert str(error.value) == text + "['pg1', 'pg1']"


def test_a_run_without_soaa_is_refused_with_the_remedy(tmp_path):
    module = Automatic(lambda module: torch.optim.AdamW(module.parameters()))
    with pytest.raises(ValueError) as error:
        trainer(tmp_path).fit(module, batches(1))
    assert str(error.value) == (
        "TrustRegionMonitor: `optimizers` must be one SOAA at least, got ['AdamW']; add SOAAMixin to the "
        "LightningModule, return SOAA(...) from configure_optimizers, or leave the monitor out"
    )


@pytest.mark.parametrize("name", ["console", "advice", "histograms", "check_time", "layout"])
def test_switches_must_be_bools(name):
    with pytest.raises(TypeError) as error:
        TrustRegionMonitor(**{name: 3})
    assert str(error.value) == f"TrustRegionMonitor: `{name}` must be a bool, got 3"


LINES = [
    "Epoch 0: radius 0.5, acceptance rate 0.75, 4 checks, 1 reject",
    "Epoch 1: radius 0.5, acceptance rate 0.75, 4 checks, 1 reject",
]


def epoch_lines_of(output):
    """Return the epochs' lines of what a terminal was sent."""
    lines = output.replace("\r", "\n").splitlines()
    return [line.rstrip() for line in lines if re.match(r"Epoch \d+: radius", line)]


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_each_epoch_has_a_line_of_its_own_beside_the_bar(tmp_path, capsys, bar):
    trainer(tmp_path, bar(), enable_progress_bar=True, max_epochs=2).fit(counting_module(), batches(4))
    assert epoch_lines_of(capsys.readouterr().out) == LINES


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_there_is_no_line_where_the_bar_is_off(tmp_path, capsys, bar):
    trainer(tmp_path, bar(refresh_rate=0), enable_progress_bar=True).fit(counting_module(), batches(4))
    assert "radius" not in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"enable_progress_bar": False}, {"monitor": TrustRegionMonitor(console=False)}])
def test_there_is_no_line_without_a_bar_or_where_it_is_not_wanted(tmp_path, capsys, options):
    trainer(tmp_path, **{"enable_progress_bar": True, **options}).fit(counting_module(), batches(4))
    assert "radius" not in capsys.readouterr().out


def test_a_step_skipped_between_rows_is_in_the_line_of_its_epoch(tmp_path, capsys):
    bar = TQDMProgressBar()
    trainer(tmp_path, bar, logger=False, enable_progress_bar=True, max_epochs=2).fit(
        Automatic(), batches(4, poisoned=[2])
    )
    assert epoch_lines_of(capsys.readouterr().out) == [
        "Epoch 0: radius 1, no checks, 1 skipped step",
        "Epoch 1: radius 1, no checks, 1 skipped step",
    ]


def steps_and_rates(path):
    return [(row["step"], row["trust_region/acceptance_rate"]) for row in rows(path)]


def test_the_last_row_of_a_stopped_run_is_that_of_the_last_step(tmp_path):
    options = {"log_every_n_steps": 2, "default_root_dir": str(tmp_path)}
    trainer(tmp_path, TrustRegionMonitor(), monitor=Stop(3), **options).fit(counting_module(), batches(5))
    assert steps_and_rates(tmp_path) == [(1, 1), (2, 2 / 3)]


def test_a_row_for_a_stop_after_the_monitor_has_seen_the_batch_repeats_the_row_before(tmp_path):
    options = {"log_every_n_steps": 2, "default_root_dir": str(tmp_path)}
    trainer(tmp_path, Stop(3), **options).fit(counting_module(), batches(5))
    assert steps_and_rates(tmp_path) == [(1, 1), (2, 1)]


@pytest.mark.parametrize("fisher", [KroneckerFisher(refresh_every=3), DiagonalFisher()])
def test_bases_have_a_share_and_an_age_in_all_rows_where_there_are_any(tmp_path, fisher):
    module = Automatic(lambda module: SOAA(module.parameters(), lr=0.01, radius=FixedRadius(1.0), fisher=fisher))
    trainer(tmp_path).fit(module, batches(5))
    with open(tmp_path / "csv" / "version_0" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("trust_region/radius")]
    keys = {"fisher/rotated_fraction", "fisher/basis_age"}
    assert rows[0].keys() & keys == (keys if fisher.rotates else set())
    if fisher.rotates:
        assert [float(row["fisher/rotated_fraction"]) for row in rows] == pytest.approx([16 / 21] * 5)
        assert [float(row["fisher/basis_age"]) for row in rows] == [0, 1, 2, 2, 2]
