"""What ``self.log`` enters is what LightningModule's own enters, however often it is called with the same arguments."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import QUIET, Mixed, Net, assert_same, loader, train

from lightning_soaa import SOAAMixin
from lightning_soaa._log import log
from lightning_soaa._results import log_row

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")]

# Name: what is called with the loss of a batch.
CALLS = {
    "defaults": lambda self, loss, index: self.log("a", loss),
    "keywords": lambda self, loss, index: self.log(name="a", value=loss, prog_bar=True),
    "mean of the epoch": lambda self, loss, index: self.log("a", loss, on_step=False, on_epoch=True),
    "step and epoch": lambda self, loss, index: self.log("a", loss, on_step=True, on_epoch=True),
    "largest": lambda self, loss, index: self.log("a", loss, on_epoch=True, reduce_fx="max"),
    "smallest": lambda self, loss, index: self.log("a", loss, on_epoch=True, reduce_fx=min),
    "sum": lambda self, loss, index: self.log("a", loss, on_epoch=True, reduce_fx=torch.sum),
    "batch sizes": lambda self, loss, index: self.log("a", loss, on_epoch=True, batch_size=1 + index),
    "not in a logger": lambda self, loss, index: self.log("a", loss, logger=False),
    "in loggers": lambda self, loss, index: self.log("a", loss, logger=True),
    "float64": lambda self, loss, index: self.log("a", loss.double(), on_epoch=True),
    "one entry": lambda self, loss, index: self.log("a", loss.reshape(1, 1)),
    "float": lambda self, loss, index: self.log("a", loss.item(), on_epoch=True),
    "whole number": lambda self, loss, index: self.log("a", index, on_epoch=True),
    "dictionary": lambda self, loss, index: self.log_dict({"a": loss, "b": 2 * loss}, on_epoch=True),
    "twice in a batch": lambda self, loss, index: [self.log("a", loss + more, on_epoch=True) for more in (0, 1)],
    "only at times": lambda self, loss, index: self.log("a", loss, on_epoch=True) if index % 3 == 2 else None,
    "dtype that changes": lambda self, loss, index: self.log("a", loss if index % 2 else loss.double(), on_epoch=True),
    "with a graph": lambda self, loss, index: self.log("a", loss, enable_graph=True),
}


def logging(base, call):
    """Return a subclass of `base` that logs by `call`, in training and validation."""

    class Logging(base):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            call(self, loss, batch_idx)
            return loss

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)
            call(self, batch[0].mean(), batch_idx)

    return Logging


def recorded(base, call, **kwargs):
    run = train(logging(base, call), validate=True, max_epochs=3, **kwargs)
    return {**run.facts(), "logged": dict(run.trainer.logged_metrics), "bar": dict(run.trainer.progress_bar_metrics)}


@pytest.mark.parametrize("flags", [{}, {"log_every_n_steps": 3, "accumulate_grad_batches": 2}], ids=["all", "some"])
@pytest.mark.parametrize("call", CALLS)
def test_what_is_logged_is_what_is_logged_without_the_mixin(call, flags):
    assert_same(*(recorded(base, CALLS[call], **flags) for base in (Mixed, Net)))


def counted(monkeypatch, call):
    """Return how often Lightning's own `log` ran for key a, in a fit of 3 epochs."""
    count, own = [], LightningModule.log

    def counting(self, name, *args, **kwargs):
        count.append(name)
        own(self, name, *args, **kwargs)

    counting.__module__ = own.__module__
    monkeypatch.setattr(LightningModule, "log", counting)
    run = train(logging(Mixed, call), max_epochs=3)
    return count.count("a"), run.trainer.global_step


def test_a_call_that_was_made_before_is_not_worked_out_again(monkeypatch):
    found, steps = counted(monkeypatch, CALLS["defaults"])
    assert found == 1 < steps


def test_batch_sizes_are_no_other_call(monkeypatch):
    assert counted(monkeypatch, CALLS["batch sizes"])[0] == 1


def test_values_with_a_graph_and_arguments_that_have_no_hash_are_worked_out_each_time(monkeypatch):
    found, steps = counted(monkeypatch, CALLS["with a graph"])
    assert found == steps
    found, steps = counted(monkeypatch, lambda self, loss, index: self.log("a", loss, sync_dist_group=[0]))
    assert found == steps


@pytest.mark.parametrize("base", [Net, Mixed])
@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda self, loss, index: self.log("a", loss, on_epoch=index == 3),
            MisconfigurationException,
            "with different arguments",
        ),
        (lambda self, loss, index: self.log("a", loss.repeat(1 + index)), ValueError, "must have a single element"),
        (lambda self, loss, index: self.log("a", str(loss) if index else loss), ValueError, "cannot be logged"),
    ],
)
def test_what_lightning_refuses_is_refused_in_its_words(base, call, error, text):
    with pytest.raises(error, match=text):
        train(logging(base, call))


def test_a_log_of_the_users_own_sees_each_call():
    seen = []

    class Own(Net):
        def log(self, name, value, **kwargs):
            seen.append(name)
            super().log(f"own/{name}", value, **kwargs)

    class Both(SOAAMixin, Own):
        pass

    run = train(logging(Both, CALLS["defaults"]))
    assert seen.count("a") == run.trainer.global_step
    assert "own/a" in run.trainer.callback_metrics
    assert "a" not in run.trainer.callback_metrics


def test_several_validation_loaders_have_keys_of_their_own():
    def run(base):
        model = train(logging(base, CALLS["defaults"]), max_epochs=1).module
        return model.trainer.validate(model, [loader(1, 2), loader(2, 3)], verbose=False)

    assert_same(run(Mixed), run(Net))


def test_without_a_trainer_the_call_goes_to_lightning():
    with pytest.warns(UserWarning, match="reference is not registered"):
        Mixed().log("a", 1.0)


def test_a_positional_argument_is_passed_on():
    seen = []
    log(Mixed(), lambda *args, **kwargs: seen.append((args, kwargs)), ("a", 1.0, True), {"on_step": True})
    assert seen == [(("a", 1.0, True), {"on_step": True})]


def test_a_row_leaves_what_logging_its_values_one_by_one_would():
    class Twice(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            values = {"x": 0.1 + batch_idx, "y": float("nan")}
            log_row(trainer, module, {f"row/{key}": value for key, value in values.items()})
            alone = {f"alone/{key}": torch.tensor(value, dtype=torch.float64) for key, value in values.items()}
            module.log_dict(alone, on_step=True, on_epoch=False, batch_size=1)
            for key in values:
                row, one = (vars(trainer._results[f"on_train_batch_end.{kind}/{key}"]) for kind in ("row", "alone"))
                names = ("value", "_forward_cache", "_computed", "_update_count", "has_reset")
                assert_same({name: row[name] for name in names}, {name: one[name] for name in names})
                count.append(batch_idx)

    count = []
    run = train(Mixed, callbacks=lambda: [Twice()])
    assert len(count) == 2 * run.trainer.global_step
    logged = run.trainer.logged_metrics
    assert logged["row/x"] == logged["alone/x"]
