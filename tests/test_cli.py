"""LightningCLI: optimizer, rules and monitor by class path, and the file it writes."""

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning_models import QUIET, assert_same, loader

from lightning_soaa import SOAA, FixedRadius, PublishedRadius, RatioRadius, TrustRegionMonitor
from lightning_soaa.module import SOAAMixin

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:.*will be overridden by `LightningCLI.configure_optimizers`"),  # the mixin's
]

FLAGS = [
    "--seed_everything=3",
    "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture(autouse=True)
def only_our_warnings(monkeypatch):
    """Lightning calls its argument parser in ways that the parser's newer versions warn of."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


class Small(SOAAMixin, LightningModule):
    """A module of somebody's.

    Args:
        width: of the hidden layer.
    """

    def __init__(self, width: int = 8):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 2))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self):
        return loader()


class OnlyOptions(Small):
    def configure_soaa(self, params):
        return SOAA(params, eps=1e-6, radius=FixedRadius())


def run(*args, model=Small, flags=FLAGS):
    return LightningCLI(model, args=["fit", *flags, *args], save_config_callback=None)


def printed(capsys, *args, model=Small):
    """Return what the CLI prints before it exits."""
    with pytest.raises(SystemExit) as stopped:
        run(*args, model=model)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_without_arguments_the_mixins_optimizer_trains():
    trainer = run().trainer
    assert isinstance(trainer.optimizers[0].radius_rule, RatioRadius)
    assert trainer.global_step == 8


@pytest.mark.parametrize("name", ["SOAA", "lightning_soaa.SOAA"])
def test_optimizer_and_rule_go_by_name_and_take_their_options(name):
    options = ["--optimizer.lr=0.01", "--optimizer.betas=[0.8,0.9]", "--optimizer.weight_decay=0.1"]
    rule = ["--optimizer.radius=lightning_soaa.RatioRadius", "--optimizer.radius.relative=0.1"]
    optimizer = run(f"--optimizer={name}", *options, *rule).trainer.optimizers[0]
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.8, 0.9), 0.1)
    assert optimizer.radius_rule == RatioRadius(relative=0.1)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--optimizer.radius=FixedRadius"], FixedRadius()),
        (["--optimizer.radius=PublishedRadius", "--optimizer.radius.total_steps=8"], PublishedRadius(total_steps=8)),
    ],
)
def test_each_rule_trains(arguments, rule):
    trainer = run("--optimizer=SOAA", *arguments).trainer
    assert trainer.optimizers[0].radius_rule == rule
    assert trainer.global_step == 8


def test_scheduler_by_name_multiplies_the_step():
    scheduler = ["--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"]
    assert run("--optimizer=SOAA", *scheduler).trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)


def test_another_optimizer_by_name_is_replaced_as_one_in_the_code_is():
    for _ in range(2):  # not only in the first run
        cli = run("--optimizer=AdamW", "--optimizer.lr=0.02", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1",
                  model=OnlyOptions)  # fmt: skip
        optimizer = cli.trainer.optimizers[0]
        assert isinstance(optimizer, SOAA)
        assert (optimizer.param_groups[0]["eps"], optimizer.param_groups[0]["weight_decay"]) == (1e-8, 0.01)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.002)
        cli.trainer.fit_loop.max_epochs = 2
        cli.trainer.fit(cli.model)
        assert cli.trainer.global_step == 16
        assert isinstance(cli.trainer.optimizers[0], SOAA)


def test_monitor_by_name_takes_its_options_and_no_second_is_added():
    monitor = ["--trainer.callbacks=lightning_soaa.TrustRegionMonitor", "--trainer.callbacks.console=false"]
    found = [c for c in run(*monitor).trainer.callbacks if isinstance(c, TrustRegionMonitor)]
    assert [monitor.console for monitor in found] == [False]


def test_a_wrong_option_of_a_rule_is_said_by_name():
    with pytest.raises(ValueError, match=r"RatioRadius: `relative` must be > 0, got -1.0"):
        run("--optimizer=SOAA", "--optimizer.radius=RatioRadius", "--optimizer.radius.relative=-1")


def test_the_printed_configuration_read_again_is_the_same_run(capsys, tmp_path):
    arguments = ["--optimizer=SOAA", "--optimizer.radius=RatioRadius", "--optimizer.radius.interval=1",
                 "--trainer.callbacks=TrustRegionMonitor", "--model.width=5"]  # fmt: skip
    text = printed(capsys, *arguments, "--print_config")
    written = yaml.safe_load(text)
    assert written["optimizer"]["class_path"] == "lightning_soaa.SOAA"
    assert written["optimizer"]["init_args"]["radius"]["class_path"] == "lightning_soaa.RatioRadius"
    assert written["trainer"]["callbacks"]["class_path"] == "lightning_soaa.TrustRegionMonitor"
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert printed(capsys, f"--config={path}", "--print_config") == text
    first, again = run(*arguments), run(f"--config={path}", flags=[])
    assert_same(dict(first.model.state_dict()), dict(again.model.state_dict()))
    assert again.trainer.optimizers[0].last_step == first.trainer.optimizers[0].last_step
    assert again.model.hparams.width == 5


def test_help_shows_the_users_arguments_and_the_optimizers(capsys):
    shown = printed(capsys, "--help")
    assert "--model.width" in shown
    shown = printed(capsys, "--optimizer.help=SOAA")
    for option in ("lr", "betas", "eps", "weight_decay", "radius", "foreach", "fused", "maximize"):
        assert f"--optimizer.{option}" in shown
    assert "only the groups' proportions count" in " ".join(shown.split())
    shown = printed(capsys, "--trainer.callbacks.help=TrustRegionMonitor")
    assert "--trainer.callbacks.advice" in shown
