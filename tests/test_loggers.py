"""Every kind of logger gets the same keys, at the same steps, with the same numbers."""

import json
import struct
import time
import zipfile
from math import inf, isnan

import pytest
import torch
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning_models import FISHER, QUIET, TRUST_REGION, Mixed, loader
from test_monitor import trainer

from lightning_soaa import RatioRadius, TrustRegionMonitor
from lightning_soaa._runs import read_csv, read_events

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:::(wandb|mlflow|comet_ml|pydantic|google).*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
KEYS = TRUST_REGION | FISHER


class Own(Logger):
    """A user's own logger, the least that Lightning asks for; as LitLogger, it takes nothing but numbers."""

    name, version = "own", 0

    def __init__(self):
        super().__init__()
        self.points = {}

    def log_metrics(self, metrics, step=None):
        for key, value in metrics.items():
            assert type(value) is float or key == "epoch"
            self.points.setdefault(key, []).append((step, value))

    def log_hyperparams(self, *args, **kwargs):
        pass


class Namespaced(Own):
    """A logger that keeps keys as Neptune does: in folders, so that no key is a folder; no empty part; steps rise."""

    def log_metrics(self, metrics, step=None):
        for key in metrics:
            parts = key.split("/")
            assert all(part.strip() == part != "" for part in parts), f"a part of {key!r} is empty"
            assert len(key.encode()) <= 1024
            folders = {"/".join(parts[:depth]) for depth in range(1, len(parts))}
            assert not folders & self.points.keys(), f"{key!r} is in a folder that is a key"
            assert not [other for other in self.points if other.startswith(f"{key}/")], f"{key!r} is a folder"
            assert all(last < step for last, _ in self.points.get(key, [])[-1:]), f"{key!r} goes back to step {step}"
        super().log_metrics(metrics, step)


def own(path):
    logger = Own()
    return logger, lambda: logger.points


def namespaced(path):
    logger = Namespaced()
    return logger, lambda: logger.points


def tensorboard(path):
    return TensorBoardLogger(path, name="tb", version=0), lambda: read_events(path / "tb" / "version_0")


def csv(path):
    return CSVLogger(path, name="csv", version=0), lambda: read_csv(path / "csv" / "version_0" / "metrics.csv")[0]


def wandb(path):
    pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=path, offline=True, project="test")

    def read():
        points = {}
        for row in wandb_rows(logger, path):
            for key, value in row.items():
                points.setdefault(key, []).append((row.get("trainer/global_step"), float(value)))
        return points

    return logger, read


def wandb_rows(logger, path):
    """Return the rows of an offline run; its file is written by another process, which ends it with a record."""
    logger.experiment.finish()
    deadline = time.monotonic() + 60
    while True:
        (file,) = path.glob("wandb/offline-run-*/*.wandb")
        records = list(wandb_records(file.read_bytes()))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        assert time.monotonic() < deadline, "the run has no end"
        time.sleep(0.1)
    history = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in history]


def wandb_records(content):
    """Yield the whole records of an offline run: a log in blocks of 32 KiB whose parts say whether more follow."""
    from wandb.proto import wandb_internal_pb2

    place, data = 7, b""
    while place + 7 <= len(content):
        if place % 32768 > 32768 - 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        if place + 7 + length > len(content):
            return  # still being written
        data, place = data + content[place + 7 : place + 7 + length], place + 7 + length
        if kind in {1, 4}:  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(data)
            data = b""


def mlflow(path):
    pytest.importorskip("mlflow")
    logger = MLFlowLogger(tracking_uri=f"file:{path / 'mlruns'}")

    def read():
        client, points = logger.experiment, {}
        for key in client.get_run(logger.run_id).data.metrics:
            points[key] = [(metric.step, metric.value) for metric in client.get_metric_history(logger.run_id, key)]
        return points

    return logger, read


def comet(path):
    comet_ml = pytest.importorskip("comet_ml")
    logger = CometLogger(online=False, api_key="none", offline_directory=str(path))  # Lightning disables it
    quiet = {"log_code": False, "log_git_metadata": False, "log_env_details": False, "auto_output_logging": False}
    logger._experiment = comet_ml.OfflineExperiment(api_key="none", offline_directory=str(path), **quiet)

    def read():
        logger.experiment.end()
        (file,) = path.glob("*.zip")
        points = {}
        for line in zipfile.ZipFile(file).read("messages.json").decode().splitlines():
            if (message := json.loads(line))["type"] == "metric_msg":
                metric = message["payload"]["metric"]
                points.setdefault(metric["metricName"], []).append((metric["step"], float(metric["metricValue"])))
        return points

    return logger, read


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Keep loggers from looking for a server, and from their folders at home."""
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
    for name, value in {**settings, "COMET_DISABLE_AUTO_LOGGING": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("make", [own, namespaced, tensorboard, csv, wandb, mlflow, comet])
def test_a_logger_has_the_same_keys_steps_and_numbers_as_any_other(tmp_path, make):
    torch.manual_seed(0)
    reference = Own()
    logger, read = make(tmp_path)
    monitor = TrustRegionMonitor(layers=1, check_time=False)
    run = trainer(tmp_path, monitor=monitor, logger=[reference, logger], max_epochs=2, log_every_n_steps=3)
    run.fit(Mixed(RatioRadius()), loader())
    layers = {"fisher/layer_trace/net.0", "trust_region/layer_step/net.0"}
    expected = {key: points for key, points in reference.points.items() if key in KEYS | layers}
    assert expected.keys() == KEYS | layers
    found = read()
    assert expected.keys() <= found.keys()
    for key, points in expected.items():
        assert [step for step, _ in points] == [2, 5, 8, 11, 14]
        assert [step for step, _ in found[key]] == [2, 5, 8, 11, 14]
        for (_, value), (_, logged) in zip(points, found[key], strict=True):
            assert logged == pytest.approx(value, rel=1e-6, nan_ok=True), key


@pytest.mark.parametrize("make", [own, namespaced, tensorboard, csv, wandb, mlflow, comet])
def test_a_logger_takes_what_is_not_finite(tmp_path, make):
    logger, read = make(tmp_path)
    logger.log_metrics({"trust_region/acceptance_ratio": -inf, "trust_region/acceptance_rate": float("nan")}, step=4)
    logger.save()
    found = read()
    assert [step for step, _ in found["trust_region/acceptance_ratio"]] == [4]
    ((_, ratio),), ((_, rate),) = found["trust_region/acceptance_ratio"], found["trust_region/acceptance_rate"]
    assert isnan(rate)
    assert ratio == -inf


def test_wandb_gets_histograms_at_the_steps_of_the_rows(tmp_path):
    logger, _ = wandb(tmp_path)
    run = trainer(tmp_path, monitor=TrustRegionMonitor(histograms=True), logger=logger, log_every_n_steps=4)
    run.fit(Mixed(RatioRadius()), loader())
    steps = []
    for row in wandb_rows(logger, tmp_path):
        if "fisher/histogram/all/values" in row:
            steps.append(row["trainer/global_step"])
            for key in ("fisher/histogram/all", "trust_region/step_histogram/all"):
                assert len(row[f"{key}/values"]) == 64
                assert row[f"{key}/_type"] == "histogram"
    assert steps == [3, 7]


def test_one_run_writes_the_same_to_tensorboard_csv_wandb_and_mlflow(tmp_path):
    made = {make.__name__: make(tmp_path) for make in (tensorboard, csv, wandb, mlflow)}
    torch.manual_seed(0)
    loggers = [logger for logger, _ in made.values()]
    run = trainer(tmp_path, logger=loggers, max_epochs=2, log_every_n_steps=3)
    run.fit(Mixed(RatioRadius()), loader())
    found = {name: read() for name, (_, read) in made.items()}
    for key in KEYS:
        steps, values = zip(*found["csv"][key], strict=True)
        assert steps == (2, 5, 8, 11, 14)
        for name in ("tensorboard", "wandb", "mlflow"):
            assert tuple(step for step, _ in found[name][key]) == steps, (name, key)
            logged = [value for _, value in found[name][key]]
            assert logged == pytest.approx(values, rel=1e-6, nan_ok=True), (name, key)
