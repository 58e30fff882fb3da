"""The mixin in both modes: what the table of Trainer flags (test_trainer_flags.py) does not say."""

import pytest
import torch
from lightning_models import ACCEPT, QUIET, Automatic, Mixed, Net, assert_same, fit, seed, train
from trainer_flags import plateau, scheduled, step_lr

from lightning_soaa import FixedRadius

pytestmark = QUIET


def assert_all_same(runs):
    reference = runs[0].facts()
    for run in runs[1:]:
        assert_same(reference, run.facts())


BOTH = pytest.mark.parametrize("mixed", [Mixed, Automatic])


@BOTH
def test_missing_monitor_is_lightnings_own_error(mixed):
    with pytest.raises(Exception, match="ReduceLROnPlateau conditioned on metric nothing which is not available"):
        train(lambda: mixed(**scheduled(plateau, monitor="nothing")))


@BOTH
@pytest.mark.parametrize("rule", [FixedRadius(), ACCEPT], ids=["fixed", "accept"])
def test_one_and_one_epochs_are_two(rule, mixed, tmp_path):
    def quiet():
        module = mixed(rule, **scheduled(step_lr, interval="step"))
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
@BOTH
@pytest.mark.parametrize("accumulate", [1, 3])
def test_resuming_a_stock_runs_checkpoint_in_mid_epoch_equals_the_stock_run(accumulate, mixed, tmp_path):
    options = scheduled(step_lr, interval="step")
    begun = train(lambda: Net(FixedRadius(), **options), max_steps=4, accumulate_grad_batches=accumulate)
    begun.trainer.save_checkpoint(tmp_path / "begun.ckpt")
    runs = []
    for module in (Net(FixedRadius(), **options), mixed(FixedRadius(), **options)):
        seed()
        runs.append(fit(module, ckpt_path=tmp_path / "begun.ckpt", accumulate_grad_batches=accumulate, max_epochs=3))
    assert runs[0].module.steps[0] == 4  # read in training_step
    assert_all_same(runs)
