"""What a person sees of a fit: bars, lines and the summary, and nothing where there is no bar."""

import re

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar, TQDMProgressBar
from test_monitor import Automatic, Manual, batches, counting_module, trainer

from lightning_soaa import SOAA, RatioRadius
from lightning_soaa._compat import shadow_bar, unshadow_bar
from lightning_soaa.monitor import TrustRegionMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
]
BARS = [TQDMProgressBar, RichProgressBar]
SUMMARY = [
    "Trust region: 8 steps, 8 checks, 2 rejects, 0 skipped steps, 0 outliers",
    "  radius 0.5 to 0.5, at the end 0.5",
]


def sent(capsys):
    """Return the lines that a terminal was sent, without what moves the cursor."""
    return [line.rstrip() for line in capsys.readouterr().out.replace("\r", "\n").splitlines()]


def fit(tmp_path, *callbacks, module=None, count=4, **options):
    run = trainer(tmp_path, *callbacks, **{"enable_progress_bar": True, "max_epochs": 2, "logger": False, **options})
    run.fit(counting_module() if module is None else module, batches(count))
    return run


@pytest.mark.parametrize("bar", BARS)
def test_the_end_of_a_fit_has_a_summary(tmp_path, capsys, bar):
    fit(tmp_path, bar())
    lines = sent(capsys)
    assert [line for line in lines if line in SUMMARY] == SUMMARY


@pytest.mark.parametrize("bar", BARS)
def test_the_summary_is_there_whichever_callback_comes_first(tmp_path, capsys, bar):
    fit(tmp_path, TrustRegionMonitor(), monitor=bar())  # the first of the Trainer's callbacks
    assert [line for line in sent(capsys) if line in SUMMARY] == SUMMARY


@pytest.mark.parametrize("bar", BARS)
def test_a_small_radius_is_legible_in_the_bar(tmp_path, capsys, bar):
    module = Manual(lambda module: SOAA(module.parameters(), lr=1e-6, radius=RatioRadius()))
    fit(tmp_path, bar(), module=module, count=3, max_epochs=1)
    text = "\n".join(sent(capsys))
    shown = [match.split("radius")[1].lstrip("=: ") for match in re.findall(r"radius[=:] *\S+", text)]
    assert any(re.match(r"\d\.\d\de-0\d", value) for value in shown)
    assert not any(re.match(r"0\.0+\b", value) for value in shown)
    assert re.search(r"accepted[=:] *1\b", text)


def test_the_bar_shows_the_modules_own_metrics_too(tmp_path, capsys):
    class Shown(Automatic):
        def training_step(self, batch, batch_idx):
            self.log("shown", 3.0, prog_bar=True)
            return self.loss(batch)

    fit(tmp_path, TQDMProgressBar(), module=Shown())
    assert re.search(r"shown=3\.\d+, radius=1, accepted=-", "\n".join(sent(capsys)))


@pytest.mark.parametrize(
    "options",
    [
        {"enable_progress_bar": False},
        {"barebones": True, "enable_progress_bar": False},
        {"monitor": TrustRegionMonitor(console=False)},
    ],
)
def test_nothing_is_said_without_a_bar_or_where_it_is_not_wanted(tmp_path, capsys, options):
    module = counting_module()
    module.log = lambda *args: None  # Lightning warns of the module's own metric
    fit(tmp_path, module=module, **options)
    text = "\n".join(sent(capsys))
    assert "Trust region" not in text
    assert "radius" not in text


@pytest.mark.parametrize("bar", BARS)
def test_nothing_is_said_where_the_bar_is_off(tmp_path, capsys, bar):
    fit(tmp_path, bar(refresh_rate=0))
    assert "Trust region" not in "\n".join(sent(capsys))


def test_text_for_a_file_is_plain(tmp_path, capsys):
    fit(tmp_path, TQDMProgressBar(), module=Automatic(), count=4)
    lines = [line for line in sent(capsys) if line.startswith(("Trust region", "  radius"))]
    assert lines
    assert not any("\x1b" in line for line in lines)


class Failing(Automatic):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("bar", BARS)
def test_the_bar_is_as_it_was_after_a_fit(tmp_path, bar):
    done = bar()
    fit(tmp_path, done)
    assert "get_metrics" not in vars(done)
    failed = bar()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, failed, module=Failing())
    assert "get_metrics" not in vars(failed)


def test_a_bars_own_metrics_come_back_also_where_the_instance_had_them():
    bar = ProgressBar()
    own = bar.get_metrics = lambda trainer, module: {"own": 1}
    shadow_bar(bar, lambda shown: {**shown, "first": 2})
    shadow_bar(bar, lambda shown: {**shown, "second": 3})
    assert bar.get_metrics(None, None) == {"own": 1, "second": 3}
    unshadow_bar(bar)
    assert bar.get_metrics is own
    unshadow_bar(bar)
    assert bar.get_metrics is own


def test_the_summary_leaves_out_the_radius_before_there_was_a_step(tmp_path, capsys):
    class Late(Manual):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx else None

    module = Late(lambda module: SOAA(module.parameters(), radius=RatioRadius()))
    fit(tmp_path, TQDMProgressBar(), module=module, max_epochs=1)
    (line,) = [line for line in sent(capsys) if line.startswith("  radius")]
    assert not line.startswith("  radius 0 to")


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_that_goes_on_at_the_end_of_an_epoch_says_its_radius(tmp_path, capsys):
    """A checkpoint of the end of validation has the epoch's last hooks run once more, before there is a step."""

    class Validated(Manual):
        def validation_step(self, batch, batch_idx):
            pass

    def run(epochs, **options):
        module = Validated(lambda module: SOAA(module.parameters(), radius=RatioRadius()))
        saving = ModelCheckpoint(tmp_path, filename="saved", save_on_train_epoch_end=False)
        flags = {"enable_progress_bar": True, "enable_checkpointing": True, "logger": False, "max_epochs": epochs}
        trainer(tmp_path, TQDMProgressBar(), saving, **flags).fit(module, batches(4), batches(2), **options)
        return [line for line in sent(capsys) if line.startswith("Epoch 0: radius")]

    (line,) = run(1)
    assert "nan" not in line
    assert run(2, ckpt_path=tmp_path / "saved.ckpt") == [line]
