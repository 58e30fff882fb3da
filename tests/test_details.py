"""What TrustRegionMonitor logs on request: layers, distributions, the time of checks, TensorBoard's layout."""

from math import isnan, nan

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_models import FISHER, TRUST_REGION
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from test_monitor import Adversaries, Automatic, Manual, batches, counting_module, rows, trainer

from lightning_soaa import _details
from lightning_soaa._details import flat, layers_of
from lightning_soaa.monitor import TrustRegionMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
]
LAYERS = ("net.0", "net.2")  # of 3*4+4 and 4+1 parameters


def layer_keys(*layers):
    return {f"{head}/{name}" for name in layers for head in ("fisher/layer_trace", "trust_region/layer_step")}


class Watched(Manual):
    """Keeps what the monitor should have seen of each step: parameters before and after, second moments."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def training_step(self, batch, batch_idx):
        before = {name: param.detach().clone() for name, param in self.named_parameters()}
        super().training_step(batch, batch_idx)
        state = self.optimizers().optimizer.state
        self.seen.append(
            {
                name: (before[name], param.detach().clone(), state[param]["v"] / (1 - 0.99 ** state[param]["step"]))
                for name, param in self.named_parameters()
            }
        )


@pytest.mark.parametrize(
    ("wanted", "layers"), [(2, LAYERS), (5, LAYERS), (1, LAYERS[:1]), (["net.2"], LAYERS[1:]), (LAYERS, LAYERS)]
)
def test_layers_are_the_largest_or_those_named_in_every_row(tmp_path, wanted, layers):
    trainer(tmp_path, monitor=TrustRegionMonitor(layers=wanted), max_epochs=2).fit(Manual(), batches(4))
    keys = TRUST_REGION | FISHER | {"loss", "epoch", "step"} | layer_keys(*layers)
    assert [row.keys() for row in rows(tmp_path)] == 8 * [keys]


def test_values_of_a_layer_are_its_share_of_the_fisher_and_its_relative_step(tmp_path):
    module = Watched()
    trainer(tmp_path, monitor=TrustRegionMonitor(layers=2)).fit(module, batches(6))
    for row, seen, report in zip(rows(tmp_path), module.seen, module.reports, strict=True):
        total = sum(float(square.sum()) for _, _, square in seen.values())
        for layer in LAYERS:
            own = [value for name, value in seen.items() if name.startswith(layer)]
            square = sum(float(square.sum()) for _, _, square in own)
            moved = sum(float((after - before).square().sum()) for before, after, _ in own) ** 0.5
            size = sum(float(before.square().sum()) for before, _, _ in own) ** 0.5
            assert row[f"fisher/layer_trace/{layer}"] == pytest.approx(report.fisher_trace * square / total, rel=1e-12)
            assert row[f"trust_region/layer_step/{layer}"] == pytest.approx(moved / size, rel=1e-12)


def test_traces_of_all_layers_add_up_to_the_trace(tmp_path):
    trainer(tmp_path, monitor=TrustRegionMonitor(layers=2)).fit(Automatic(), batches(3))
    for row in rows(tmp_path):
        parts = sum(row[f"fisher/layer_trace/{layer}"] for layer in LAYERS)
        assert parts == pytest.approx(row["fisher/trace"], rel=1e-12)


def test_a_layer_of_an_optimizer_that_keeps_no_second_moment_is_nan(tmp_path):
    trainer(tmp_path, monitor=TrustRegionMonitor(layers=1)).fit(counting_module(), batches(2))
    assert all(isnan(row[key]) for row in rows(tmp_path) for key in layer_keys("net.0"))


def test_layers_are_logged_under_the_optimizer_that_owns_them(tmp_path):
    trainer(tmp_path, monitor=TrustRegionMonitor(layers=9)).fit(Adversaries(({}, {})), batches(1))
    keys = {key for key in rows(tmp_path)[0] if "layer" in key}
    first = {f"{head}/nets.0.{index}" for head in ("fisher/layer_trace", "trust_region/layer_step") for index in (0, 2)}
    third = {
        f"{head}/nets.2.{index}" for head in ("fisher-1/layer_trace", "trust_region-1/layer_step") for index in (0, 2)
    }
    assert keys == first | third


def test_parameters_are_copied_for_rows_only_and_dropped_after(tmp_path, monkeypatch):
    copies = []
    remember = _details.Details.remember
    monkeypatch.setattr(_details.Details, "remember", lambda self: (copies.append(1), remember(self)))
    monitor = TrustRegionMonitor(layers=1)
    trainer(tmp_path, monitor=monitor, log_every_n_steps=4).fit(Manual(), batches(10))
    assert len(copies) == 2
    assert monitor._details[""].before == {}


def test_by_default_no_parameter_is_copied_and_no_state_is_looked_at(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("looked at details")

    for name in ("remember", "values", "distributions"):
        monkeypatch.setattr(_details.Details, name, refuse)
    trainer(tmp_path).fit(Manual(), batches(3))


def events(path):
    return EventAccumulator(str(path / "tb" / "version_0"), size_guidance={"histograms": 0, "tensors": 0}).Reload()


@pytest.mark.parametrize(("layers", "names"), [(0, ["all"]), (1, ["net.0"])])
def test_histograms_are_at_the_steps_of_the_rows(tmp_path, layers, names):
    monitor = TrustRegionMonitor(layers=layers, histograms=True)
    trainer(tmp_path, monitor=monitor, log_every_n_steps=2).fit(Manual(), batches(6))
    log = events(tmp_path)
    expected = {f"{head}/{name}" for name in names for head in ("fisher/histogram", "trust_region/step_histogram")}
    assert set(log.Tags()["histograms"]) == expected
    for key in expected:
        assert [point.step for point in log.Histograms(key)] == [1, 3, 5]


def test_a_histogram_holds_all_entries_of_a_small_model(tmp_path):
    module = Watched()
    trainer(tmp_path, monitor=TrustRegionMonitor(histograms=True)).fit(module, batches(2))
    (_, last) = (point.histogram_value for point in events(tmp_path).Histograms("trust_region/step_histogram/all"))
    moved = torch.cat([(after - before).reshape(-1) for before, after, _ in module.seen[-1].values()])
    assert last.num == moved.numel() == 21
    assert last.sum == pytest.approx(float(moved.float().sum()), rel=1e-4, abs=1e-9)


def test_distributions_of_a_large_layer_are_thinned_out_evenly(monkeypatch):
    monkeypatch.setattr(_details, "ENTRIES", 10)
    assert flat([torch.arange(40.0)]).tolist() == list(range(0, 40, 4))
    assert flat([torch.arange(5.0), torch.arange(3.0)]).tolist() == [0, 1, 2, 3, 4, 0, 1, 2]


def test_histograms_leave_loggers_without_a_place_for_them_alone(tmp_path):
    logger = CSVLogger(tmp_path, name="csv", version=0)
    trainer(tmp_path, monitor=TrustRegionMonitor(histograms=True), logger=logger).fit(Manual(), batches(2))
    assert [row.keys() for row in rows(tmp_path)] == 2 * [TRUST_REGION | FISHER | {"loss", "epoch", "step"}]


def test_the_time_of_checks_is_in_every_row_if_it_is_asked_for(tmp_path):
    trainer(tmp_path, monitor=TrustRegionMonitor(check_time=True)).fit(Automatic(), batches(12))
    shares = [row["trust_region/check_time_share"] for row in rows(tmp_path)]
    assert all(isnan(share) for share in shares[:5])
    assert shares[6:] == 6 * [0.0]  # FixedRadius makes no checks


def layout_of(path):
    (event,) = events(path).Tensors("custom_scalars__config__")
    return layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])


def test_tensorboard_gets_one_page_whose_charts_find_the_keys(tmp_path):
    import re

    trainer(tmp_path).fit(Adversaries(({}, {})), batches(1))
    (page,) = layout_of(tmp_path).category
    assert page.title == "Trust region"
    assert [chart.title for chart in page.chart] == [
        *("Radius", "Acceptance", "Predicted and actual reduction", "Rejects, skipped steps and outliers, so far"),
        *("Step norm", "Fisher, trace", "Fisher, largest entry"),
    ]
    keys = events(tmp_path).Tags()["scalars"]
    found = [[key for key in keys if any(re.search(tag, key) for tag in chart.multiline.tag)] for chart in page.chart]
    assert [len(shown) for shown in found] == [4, 4, 4, 6, 2, 2, 2]  # two optimizers, and two groups in the second


def test_the_page_is_not_written_where_it_is_not_wanted(tmp_path):
    trainer(tmp_path, monitor=TrustRegionMonitor(layout=False)).fit(Manual(), batches(1))
    assert "custom_scalars__config__" not in events(tmp_path).Tags()["tensors"]


def test_hyper_parameters_of_the_run_are_as_without_the_page(tmp_path):
    class Hyper(Manual):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"width": 4})

    tags = []
    for name, layout in (("with", True), ("without", False)):
        logger = TensorBoardLogger(tmp_path / name, name="tb", version=0)
        trainer(tmp_path, monitor=TrustRegionMonitor(layout=layout), logger=logger).fit(Hyper(), batches(1))
        tags.append(set(events(tmp_path / name).Tags()["tensors"]))
        assert (tmp_path / name / "tb" / "version_0" / "hparams.yaml").read_text() == "width: 4\n"
    assert tags[0] - tags[1] == {"custom_scalars__config__"}


def test_layers_go_by_the_module_that_owns_them():
    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(2))
            self.part = torch.nn.Linear(1, 1)

    assert list(layers_of(Root().named_parameters())) == ["scale", "part"]


@pytest.mark.parametrize(
    ("layers", "error", "text"),
    [
        (-1, ValueError, "`layers` must be >= 0, got -1"),
        (True, TypeError, "`layers` must be a whole number or names of modules, got True"),
        ("net", TypeError, "`layers` must be a whole number or names of modules, got 'net'"),
        ([1], TypeError, "`layers` must be a whole number or names of modules, got [1]"),
        (1.5, TypeError, "`layers` must be a whole number or names of modules, got 1.5"),
    ],
)
def test_layers_must_be_a_number_or_names(layers, error, text):
    with pytest.raises(error) as refused:
        TrustRegionMonitor(layers=layers)
    assert str(refused.value) == f"TrustRegionMonitor: {text}"


def test_a_layer_that_is_not_there_is_refused_at_fit_start(tmp_path):
    with pytest.raises(ValueError) as error:
        trainer(tmp_path, monitor=TrustRegionMonitor(layers=["nett"])).fit(Manual(), batches(1))
    assert str(error.value) == (
        "TrustRegionMonitor: `layers` must be names of modules with parameters, of ['net.0', 'net.2'], got 'nett'"
    )


def test_a_skipped_step_moves_no_layer(tmp_path):
    trainer(tmp_path, monitor=TrustRegionMonitor(layers=2)).fit(Automatic(), batches(3, poisoned=[1], by=nan))
    assert [row["trust_region/layer_step/net.0"] == 0 for row in rows(tmp_path)] == [False, True, False]
    assert np.isfinite([row["fisher/layer_trace/net.0"] for row in rows(tmp_path)]).all()
