"""What the monitor says is wrong with a run: when, once, in which words; and that it says nothing of a healthy one.

Each kind is provoked in a Trainer.
"""

import warnings
from math import inf, nan

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning_models import QUIET, manual_step
from problems import Believing, rounded
from test_host_syncs import CountReads
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soaa import SOAA, FixedRadius, PublishedRadius, RatioRadius, SOAAMixin, StepReport, TrustRegionWarning
from lightning_soaa._watch import FIRST_LOSSES, LAST_LOSSES, WINDOW, Watch
from lightning_soaa.advice import PINNED_CHECKS, STUCK_CHECKS, advise
from lightning_soaa.monitor import TrustRegionMonitor

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")]


# ----------------------------------------------------------------------------------------------------------------------
# Plain numbers in, text out


def after(checks=(), **head):
    """Return a Watch that has seen one step for each of `checks`: (accepted, predicted, actual)."""
    watch, counts = Watch(), {"radius": 0.1, "checks": 0, "accepted_checks": 0, "skipped_steps": 0, **head}
    watch.see_numbers(counts)
    for accepted, predicted, actual in checks:
        counts["checks"] += 1
        counts["accepted_checks"] += accepted
        watch.see_numbers({**counts, "predicted_reduction": predicted, "actual_reduction": actual})
    return watch


def report(step=1, skipped_steps=0, **values):
    values |= {"step": step, "skipped_steps": skipped_steps}
    return StepReport(radius=0.1, checked=True, accepted=True, skipped=False, trials=1, **values)


def kinds(watch):
    return [advice.kind for advice in advise(watch)]


def text(watch):
    (advice,) = advise(watch)
    return advice.text


GOOD, BAD = (True, 0.1, 0.08), (False, 0.1, -0.2)


def test_nothing_is_said_of_nothing():
    assert advise(Watch()) == advise(after()) == []


def test_a_watch_needs_the_four_numbers_only():
    watch = Watch()
    for checks in range(30):
        watch.see_numbers({"radius": 0.1, "checks": checks, "accepted_checks": checks, "skipped_steps": 9})
    assert advise(watch) == []


@pytest.mark.parametrize(
    ("radius", "expected"),
    [
        (1e-8, ["radius_floor"]),
        (1.009e-8, ["radius_floor"]),
        (1.02e-8, []),
        (0.5, []),
        (9.8, []),
        (9.91, ["radius_ceiling"]),
        (12.0, ["radius_ceiling"]),
    ],
)
def test_radius_is_at_a_bound_within_a_hundredth(radius, expected):
    bounds = {"radius_low": 1e-8, "radius_high": 10.0}
    assert kinds(after(PINNED_CHECKS * [GOOD], radius=radius, **bounds)) == expected
    assert kinds(after((PINNED_CHECKS - 1) * [GOOD], radius=radius, **bounds)) == []


def test_radius_that_left_its_bound_for_one_check_was_not_held_there():
    watch, head = Watch(), {"radius_low": 0.1, "accepted_checks": 0, "skipped_steps": 0}
    for check in range(40):
        radius = 0.2 if check in {0, 19, 38} else 0.1
        watch.see_numbers({**head, "radius": radius, "checks": check, "accepted_checks": check})
    assert advise(watch) == []


def test_radius_texts():
    floor = after(PINNED_CHECKS * [GOOD], radius=1e-8, radius_low=1e-8)
    assert text(floor) == (
        "the radius is at its floor, 1e-08, for 20 checks or more: even the smallest step looks too large. Make sure "
        "that the loss closure computes the loss that the gradients are of: the same batch, dropout masks, reduction "
        "and sign. If it does, keep parameters in float32, as precision='bf16-mixed' does, since the floor is not "
        "below their resolution; or lower the prior of the radius, as in RatioRadius(relative=0.02)."
    )
    ceiling = after(PINNED_CHECKS * [GOOD], radius=10, radius_high=10.0)
    assert text(ceiling) == (
        "the radius is at its ceiling, 10, for 20 checks or more: no step looks too large, so the ceiling decides, not "
        "the checks. If training is slow, raise the prior of the radius, as in RatioRadius(relative=2.0): the ceiling "
        "is 10 times that."
    )


def at_the_floor(checks):
    return after(checks, radius=1e-8, radius_low=1e-8)


def by_slopes(checks, doubts=3.0):
    return after(checks, rule_doubts=doubts)


def test_a_loss_that_does_not_follow_its_gradient_is_named_once_slopes_steer():
    assert kinds(by_slopes([GOOD], doubts=2.0)) == []
    assert kinds(by_slopes([GOOD])) == ["loss_unlike_gradient"]
    assert text(by_slopes([GOOD])) == (
        "the loss does not follow its gradient: by steps that are too short for curvature to matter it falls by less "
        "than the gradient promises, or rises. So acceptance ratios mean nothing; from now on the radius goes by the "
        "slopes that fresh gradients find, and a step is undone only if its loss is not finite. That is as it should "
        "be for detached targets or codes and for straight-through estimators. If there are none, make sure that the "
        "loss closure computes the loss that the gradients are of: the same batch, dropout masks, reduction and sign."
    )


def test_neither_a_bound_nor_scattered_ratios_are_named_beside_it():
    assert kinds(by_slopes(scattered(100))) == ["loss_unlike_gradient"]
    for bound in ("radius_low", "radius_high"):
        watch = after(PINNED_CHECKS * [GOOD], radius=0.1, rule_doubts=3.0, **{bound: 0.1})
        assert kinds(watch) == ["loss_unlike_gradient"]


def test_it_is_not_named_where_its_cause_is():
    watch = by_slopes(WINDOW * [(True, 1e-5, -1e-5)])
    watch.see_report(report(base_loss=2.0, predicted_reduction=1e-5, repeat_gap=0.5))
    assert kinds(watch) == ["repeat_gap"]
    assert kinds(by_slopes(STUCK_CHECKS * [STUCK])) == ["loss_unmoved"]


def test_a_floor_is_not_named_where_its_cause_is():
    assert kinds(at_the_floor(WINDOW * [(False, 1e-5, -inf)])) == ["acceptance_rate"]
    assert kinds(at_the_floor(WINDOW * [(True, 1e-5, 0.0)])) == ["loss_unmoved"]
    watch = at_the_floor(WINDOW * [(False, 1e-5, -2e-5)])
    assert kinds(watch) == ["acceptance_rate"]
    watch.see_report(report(base_loss=2.0, predicted_reduction=1e-5, repeat_gap=0.5))
    assert kinds(watch) == ["repeat_gap"]


@pytest.mark.parametrize(("predicted", "actual"), [(0.0, 0.0), (1e-7, 0.0), (1e-7, -1e-7), (nan, nan)])
def test_a_step_that_moves_the_loss_by_no_more_than_rounding_is_not_too_large(predicted, actual):
    """Nor are those around it: a run that has converged, or whose schedule has ended, may be at its floor."""
    watch = at_the_floor((WINDOW - 1) * [(True, 1e-5, -1e-5)] + [(True, predicted, actual)])
    watch.see_report(report(base_loss=1.0))
    assert kinds(watch) == []
    assert kinds(at_the_floor(WINDOW * [(True, 1e-5, -1e-5)])) == ["radius_floor"]


@pytest.mark.parametrize(
    ("accepted", "checks", "expected"),
    [(3, 12, ["acceptance_rate"]), (4, 12, []), (0, 11, []), (7, 24, ["acceptance_rate"]), (8, 24, [])],
)
def test_acceptance_rate_is_low_below_a_third_of_twelve_checks(accepted, checks, expected):
    assert kinds(after((checks - accepted) * [BAD] + accepted * [GOOD])) == expected


def test_acceptance_rate_is_that_of_the_last_checks():
    assert kinds(after(500 * [GOOD] + 16 * [BAD])) == []
    assert kinds(after(500 * [GOOD] + 17 * [BAD])) == ["acceptance_rate"]
    assert kinds(after(500 * [BAD] + 8 * [GOOD])) == []


def test_steps_that_share_a_batch_all_count():
    watch = Watch()
    watch.see_numbers({"radius": 1, "checks": 12, "accepted_checks": 3, "skipped_steps": 0})
    assert kinds(watch) == ["acceptance_rate"]


def test_watching_starts_at_the_counters_of_a_resumed_run():
    watch = Watch(checks_seen=1000, accepted_seen=0)
    watch.see_numbers({"radius": 1, "checks": 1001, "accepted_checks": 0, "skipped_steps": 0})
    watch.see_numbers({"radius": 1, "checks": 900, "accepted_checks": 0, "skipped_steps": 0})  # a state was loaded
    watch.see_numbers({"radius": 1, "checks": 902, "accepted_checks": 1, "skipped_steps": 0})
    assert [(check.checks, check.accepted) for check in watch.checks] == [(1, 0), (2, 1)]


def test_acceptance_rate_text():
    assert text(after(9 * [BAD] + 3 * [GOOD])) == (
        "the acceptance rate is 0.25: 3 of the last 12 checks were accepted, the others were rejects that cost trials "
        "and moved nothing. Make sure that the loss closure computes the loss that the gradients are of, the same "
        "batch, dropout masks, reduction and sign, and that it is finite. If it does, lower the prior of the radius, "
        "as in RatioRadius(relative=0.02)."
    )


@pytest.mark.parametrize(
    ("steps", "not_finite", "outliers", "said"),
    [(40, 3, 0, True), (40, 0, 3, True), (40, 1, 2, True), (40, 1, 1, False), (39, 39, 0, False), (1000, 40, 10, 0)],
)
def test_skipped_steps_are_many_above_a_twentieth_of_forty(steps, not_finite, outliers, said):
    watch = after(steps=steps, skipped_steps=not_finite, outlier_steps=outliers)
    assert kinds(watch) == ["skipped_steps"] * said


NOT_FINITE = (
    " Not finite: look for nan in the data, for log, sqrt and division near 0 in the loss, and for 16-bit overflow, "
    "which precision='bf16-mixed' avoids."
)
OUTLIERS = (
    " Far outside: look for broken or unscaled samples and shuffle the data; if such batches are what the data are "
    "like, use a larger batch or clip the gradients."
)


@pytest.mark.parametrize(
    ("not_finite", "outliers", "remedies"), [(7, 0, NOT_FINITE), (0, 7, OUTLIERS), (3, 4, NOT_FINITE + OUTLIERS)]
)
def test_skipped_steps_text_tells_the_causes_apart(not_finite, outliers, remedies):
    assert text(after(steps=100, skipped_steps=not_finite, outlier_steps=outliers)) == (
        f"7 of 100 steps were skipped: {not_finite} with a loss or gradient that was not finite, {outliers} with one "
        f"far outside the recent distribution.{remedies}"
    )


def scattered(width, predicted=0.01):
    """Checks whose ratios lie evenly between -width and width."""
    return [(True, predicted, predicted * width * (2 * (7 * i % WINDOW) / (WINDOW - 1) - 1)) for i in range(WINDOW)]


def test_ratios_are_noise_if_the_standard_error_of_their_mean_exceeds_1():
    assert kinds(after(scattered(6))) == []
    assert kinds(after(scattered(7))) == ["ratio_noise"]
    assert kinds(after(scattered(100)[:11])) == []
    assert kinds(after(scattered(100)[:12])) == ["ratio_noise"]


def test_a_few_ratios_far_off_are_not_scatter():
    checks = 19 * [GOOD] + [(True, 0.1, actual) for actual in (-20.0, 50.0, -300.0, -inf, nan)]
    assert kinds(after(checks)) == []


@pytest.mark.parametrize("check", [(True, 0.0, 0.1), (True, 0.1, nan), (True, 0.1, -inf), (True, 1e-300, nan)])
def test_checks_that_promise_nothing_or_end_nowhere_have_no_ratio(check):
    assert kinds(after(WINDOW // 2 * [check, GOOD])) == []
    assert kinds(after(scattered(100)[:13] + 11 * [check])) == ["ratio_noise"]
    assert kinds(after(scattered(100)[:11] + 13 * [check])) == []


def test_ratios_of_rounding_errors_are_not_held_against_the_batch():
    watch = after(scattered(100, predicted=1e-9))
    assert kinds(watch) == ["ratio_noise"]
    watch.see_report(report(step=1, base_loss=2.0))
    watch.see_report(report(step=2, base_loss=1e-8))  # what goes into it rounds as before
    watch.see_report(report(step=3, base_loss=nan))
    assert kinds(watch) == []
    for predicted, width in ((1e-4, 100), (1e-9, 1e6)):
        watch = after(scattered(width, predicted))
        watch.see_report(report(base_loss=2.0))
        assert kinds(watch) == ["ratio_noise"]


def test_noise_is_not_named_where_its_cause_is():
    watch = after([(False, *check[1:]) for check in scattered(100)])
    assert kinds(watch) == ["acceptance_rate"]
    watch = after(scattered(100))
    watch.see_report(report(base_loss=2.0, predicted_reduction=0.01, repeat_gap=0.5))
    assert kinds(watch) == ["repeat_gap"]


def test_ratio_noise_text():
    assert text(after(scattered(12))) == (
        "the acceptance ratios of the last 24 checks scatter so widely, the middle half from -6.5 to 6.5, that their "
        "mean is known to +-2 only, and the radius follows noise. Make sure that the loss closure computes the loss "
        "that the gradients are of: the same batch, dropout masks, reduction and sign. If it does, the loss of a batch "
        "changes less by the step than by chance: use a larger batch or accumulate_grad_batches, or FixedRadius(), "
        "which makes no checks."
    )


@pytest.mark.parametrize(
    ("gap", "base", "predicted", "said"),
    [
        (nan, 2.0, 0.1, False),  # not measured
        (0.0, 2.0, 0.1, False),
        (0.0, 0.0, 0.0, False),
        (0.002, 2.0, 0.1, True),
        (-0.002, 2.0, 0.1, True),
        (0.0009, 2.0, 0.1, False),  # ratios feel nothing of it
        (1.9e-6, 2.0, 1e-5, False),  # rounding of the loss
        (2.1e-6, 2.0, 1e-5, True),
        (inf, 2.0, 0.1, True),
        (0.002, nan, 0.1, True),
        (0.002, 2.0, nan, False),  # no check has promised anything yet
    ],
)
def test_a_gap_counts_if_it_disturbs_ratios_and_is_more_than_rounding(gap, base, predicted, said):
    watch = Watch()
    watch.see_report(report(repeat_gap=gap, base_loss=base, predicted_reduction=predicted))
    assert kinds(watch) == ["repeat_gap"] * said


def test_repeat_gap_text():
    watch = Watch()
    watch.see_report(report(repeat_gap=-0.03, base_loss=2.0, predicted_reduction=0.01))
    assert text(watch) == (
        "the loss closure is not deterministic: at the same parameters it returned a loss that differs by 0.03 from "
        "the base loss, and the predicted reduction is 0.01. Make it compute the same loss twice: the same batch, "
        "dropout masks and augmentation, no statistics updated in between. SOAAMixin replays the random streams of "
        "torch, numpy and python; a generator of your own has to be seeded anew in training_step."
    )


STUCK = (True, 1e-3, 0.0)


def test_loss_is_unmoved_if_no_check_saw_it_change():
    assert kinds(after((STUCK_CHECKS - 1) * [STUCK])) == []
    assert kinds(after(STUCK_CHECKS * [STUCK])) == ["loss_unmoved"]
    assert kinds(after([(True, 0.0, 0.0)] + STUCK_CHECKS * [STUCK])) == ["loss_unmoved"]  # lr = 0 promises nothing
    assert kinds(after(100 * [(True, 0.0, 0.0)])) == []
    for other in (1e-9, -1e-9, nan):
        assert kinds(after(2 * [(True, 1e-3, other)] + 100 * [STUCK])) == []  # a run that has converged
        assert kinds(after(10 * [STUCK] + 2 * [(True, 1e-3, other)] + 10 * [STUCK])) == []


def test_loss_unmoved_text():
    assert text(after(22 * [STUCK])) == (
        "the actual reduction was exactly 0 in all 22 checks so far, although the gradients predict one. Either the "
        "loss closure does not use the parameters: make it run the model anew, not return a loss that was computed "
        "before. Or the steps are below the resolution of the loss or of the parameters: keep both in float32, as "
        "precision='bf16-mixed' does."
    )


def seen(*reports):
    watch = Watch()
    for item in reports:
        watch.see_report(item)
    return watch


def after_losses(first, last, checks=WINDOW * [GOOD], count=LAST_LOSSES, **head):
    """Return a Watch that has seen reports with these base losses, and checks."""
    watch = after(checks, **head)
    for step, loss in enumerate([*FIRST_LOSSES * [first], *count * [last]]):
        watch.see_report(report(step, base_loss=loss))
    return watch


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [
        (1.0, 2.0, False),
        (1.0, 2.001, True),
        (2.3, 0.1, False),
        (-1.0, 0.0, False),
        (-1.0, 0.001, True),
        (-1.0, -5.0, False),
        (0.0, 1e-9, True),
        (0.0, 0.0, False),
    ],
)
def test_a_loss_has_risen_if_it_is_worse_by_more_than_it_was(first, last, said):
    assert kinds(after_losses(first, last)) == ["loss_risen"] * said
    assert kinds(after_losses(-first, -last, maximize=True)) == ["loss_risen"] * said


def test_a_loss_has_not_risen_in_few_rows_without_checks_or_by_a_few_peaks():
    assert kinds(after_losses(1.0, 9.0, count=LAST_LOSSES - 1)) == []
    assert kinds(after_losses(1.0, 9.0, checks=())) == []
    watch = after_losses(1.0, 9.0, count=LAST_LOSSES // 2 - 1)
    for step in range(100, 100 + LAST_LOSSES):
        watch.see_report(report(step, base_loss=1.0 if step % 2 else 9e9))
    watch.see_report(report(200, base_loss=1.0))
    assert kinds(watch) == []


def test_losses_that_are_not_finite_or_not_known_are_left_out():
    assert kinds(after_losses(nan, inf)) == []
    assert len(after_losses(1.0, nan).last_losses) == 0


def test_a_rise_is_not_named_where_its_cause_is():
    assert kinds(after_losses(1.0, 9.0, checks=WINDOW * [BAD])) == ["acceptance_rate"]
    assert kinds(after_losses(1.0, 9.0, steps=100, skipped_steps=50)) == ["skipped_steps"]


def test_loss_risen_text():
    assert text(after_losses(2.31, 10.06)) == (
        "the loss has become worse, 10.1 in the median of the last rows after 2.31 in the first, although steps are "
        "accepted. A check sees the loss of its own batch only, so steps may do good to it and harm to all others: use "
        "a larger batch or accumulate_grad_batches, or lower the prior of the radius, as in "
        "RatioRadius(relative=0.02). Ignore this where the loss is not meant to improve, as with adversaries."
    )


def test_gradients_are_zero_if_three_reports_in_a_row_say_so():
    zero = [report(step, fisher_max=0.0) for step in (50, 100, 150)]
    assert kinds(seen(*zero)) == ["zero_gradients"]
    assert kinds(seen(*zero[:2], zero[1], None)) == []  # the row and the epoch's line read the same report
    assert kinds(seen(*zero[:2], report(120, fisher_max=1e-30), zero[2])) == []
    assert kinds(seen(*(report(step) for step in range(9)))) == []  # nan: no gradient yet
    assert kinds(seen(*(report(step, step, fisher_max=0.0) for step in range(9)))) == []  # all skipped


def test_zero_gradients_text():
    assert text(seen(*(report(step, fisher_max=0.0) for step in (50, 100, 150)))) == (
        "all gradients of all 150 steps so far are exactly 0, so nothing can move: the loss does not depend on the "
        "parameters. Look for detach(), no_grad(), argmax or rounding between parameters and loss, for a factor of 0, "
        "and for units that are all saturated."
    )


# ----------------------------------------------------------------------------------------------------------------------
# In a Trainer


def digits(count=60, batch=32):
    """Ten noisy clusters in 64 dimensions."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(10, 64, generator=generator)
    labels = torch.randint(10, (count * batch,), generator=generator)
    inputs = 0.5 * centers[labels] + torch.randn(count * batch, 64, generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size=batch)


class Digits(LightningModule):
    """A small classifier."""

    def __init__(self, dropout=0.0, **soaa):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 10))
        self.soaa = soaa

    def loss(self, batch):
        self.latest = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        return self.latest

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return SOAA(self.parameters(), **self.soaa)


class Mixed(SOAAMixin, Digits):
    pass


class Manual(Digits):
    """A loop of the user's own, whose loss closure is `trial`."""

    def __init__(self, trial, **options):
        super().__init__(**options)
        self.automatic_optimization, self.trial = False, trial

    def training_step(self, batch, batch_idx):
        manual_step(self, batch, lambda: self.trial(self, batch))


def noisy(module, batch):
    return module.loss(batch) + 0.05 * torch.randn(())


def summed(module, batch):
    return module.loss(batch) * len(batch[0])


def computed_before(module, batch):
    return module.latest


def never_finite(module, batch):
    return module.loss(batch) * inf


def turned_nan(module, batch):
    return module.loss(batch) * (nan if module.global_step > 20 else 1)


class Poisoned(Mixed):
    """Every tenth batch has a loss of nan."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (nan if batch_idx % 10 == 0 else 1)


class Spiky(Mixed):
    """Every twelfth batch is a hundred times as large as it should be."""

    def training_step(self, batch, batch_idx):
        return super().training_step([batch[0] * (100 if batch_idx % 12 == 11 else 1), batch[1]], batch_idx)


class Reversed(Mixed):
    """Its gradients are those of the negative loss."""

    def on_after_backward(self):
        for p in self.parameters():
            p.grad.neg_()


class StraightThrough(Mixed):
    """Its weights are rounded to eighths forward, not backward."""

    def training_step(self, batch, batch_idx):
        weights = {name: rounded(p) for name, p in self.named_parameters()}
        return torch.func.functional_call(self, weights, (batch,))

    def forward(self, batch):
        return self.loss(batch)


class Detached(Mixed):
    """A loss on which the parameters have no influence."""

    def training_step(self, batch, batch_idx):
        return 1 + 0 * super().training_step(batch, batch_idx)


def fit(module, path=None, *callbacks, monitor=None, data=None, ckpt_path=None, **options):
    """Train; return the trainer and what was said, as it is shown."""
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False if path is None else CSVLogger(path, name="csv", version=0),
        "log_every_n_steps": 10,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "callbacks": [monitor or TrustRegionMonitor(), *callbacks],
    }
    torch.manual_seed(0)
    trainer = Trainer(**{**defaults, **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TrustRegionWarning)
        trainer.fit(module, digits() if data is None else data, ckpt_path=ckpt_path)
    assert {warning.category for warning in caught} <= {TrustRegionWarning}
    return trainer, [str(warning.message).removeprefix("TrustRegionMonitor: ") for warning in caught]


# Fault: what provokes it, how the text begins with a logger, and without one, where no report is read.
FLOOR, CEILING = "the radius is at its floor, ", "the radius is at its ceiling, "
STUCK_TEXT = "the actual reduction was exactly 0 in all 20 checks so far, "
GAP = "the loss closure is not deterministic: at the same parameters it returned a loss that differs by "
UNLIKE = "the loss does not follow its gradient: "
RATE, NOISE = "the acceptance rate is 0.", "the acceptance ratios of the last "
FAULTS = {
    "noise in the loss closure": (lambda: Manual(noisy), GAP, NOISE),
    "another reduction in the loss closure": (lambda: Manual(summed), GAP, NOISE),
    "masks that are not replayed": (lambda: Manual(Manual.loss, dropout=0.5), GAP, NOISE),
    "trials that are never finite": (lambda: Manual(never_finite), GAP + "inf", "the acceptance rate is 0: 0 of "),
    "trials that turn nan": (lambda: Manual(turned_nan), RATE, RATE),
    "gradients of the wrong sign": (Reversed, UNLIKE, UNLIKE),
    "the same where ratios are believed": (lambda: Reversed(radius=Believing()), FLOOR, FLOOR),
    "a straight-through estimator": (StraightThrough, UNLIKE, UNLIKE),
    "a prior that is much too small": (lambda: Mixed(radius=RatioRadius(relative=1e-3)), CEILING, CEILING),
    "nan in the data": (Poisoned, "4 of 40 steps were skipped: 4 with a loss", "5 of 41 steps were skipped: 5 with a"),
    "batches far out": (Spiky, "3 of 40 steps were skipped: 0 with a loss", "3 of 42 steps were skipped: 0 with a"),
    "a loss closure without parameters": (lambda: Manual(computed_before), STUCK_TEXT, STUCK_TEXT),
}


@pytest.mark.parametrize("logged", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_once_in_one_way_with_a_logger_and_without(tmp_path, fault, logged):
    make, with_logger, without = FAULTS[fault]
    _, said = fit(make(), tmp_path if logged else None, max_epochs=4)
    assert [line[: len(with_logger if logged else without)] for line in said] == [with_logger if logged else without]


def test_a_fault_that_only_reports_show_is_told_from_rows(tmp_path):
    _, said = fit(Detached(), tmp_path)
    assert len(said) == 1
    assert said[0].startswith("all gradients of all 30 steps so far are exactly 0,")


def test_a_fault_that_only_reports_show_is_told_at_the_epochs_line():
    _, said = fit(Detached(), enable_progress_bar=True, max_epochs=4, data=digits(5))
    assert said[0].startswith("all gradients of all 15 steps so far are exactly 0,")
    assert len(said) == 1


@pytest.mark.parametrize("logged", [True, False])
@pytest.mark.parametrize("batch", [32, 1])
def test_nothing_is_said_of_a_healthy_run(tmp_path, logged, batch):
    trainer, said = fit(Mixed(dropout=0.2), tmp_path if logged else None, max_epochs=8, data=digits(75, batch))
    head = trainer.optimizers[0].param_groups[0]
    assert head["steps"] == 600
    assert head["checks"] > 100
    assert said == []


def test_nothing_is_said_of_a_run_that_has_converged(tmp_path):
    trainer, said = fit(Mixed(), tmp_path, max_epochs=400, data=digits(1, 64), log_every_n_steps=1)
    assert trainer.callback_metrics["trust_region/actual_reduction"].abs() < 1e-5
    assert said == []


@pytest.mark.parametrize("rule", [FixedRadius(), PublishedRadius(120)])
def test_nothing_is_said_under_rules_without_checks(tmp_path, rule):
    assert fit(Mixed(radius=rule), tmp_path)[1] == []


@pytest.mark.parametrize("rule", [FixedRadius(), PublishedRadius(120)])
def test_skipped_steps_are_told_under_rules_without_checks(tmp_path, rule):
    (line,) = fit(Poisoned(radius=rule), tmp_path)[1]
    assert line.startswith("4 of 40 steps were skipped: 4 with a loss")


def test_advice_can_be_switched_off(tmp_path):
    assert fit(Poisoned(), tmp_path, monitor=TrustRegionMonitor(advice=False))[1] == []


def test_a_warning_names_the_monitor_and_has_a_category_of_its_own():
    with pytest.warns(TrustRegionWarning, match="^TrustRegionMonitor: 5 of 41 steps were skipped: 5 with a loss"):
        Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        ).fit(Poisoned(), digits())


class Twins(Digits):
    """Two optimizers, each with a part, and a loss of nan on every tenth batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch) * (nan if batch_idx % 10 == 0 else 1))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [SOAA(self.net[part].parameters(), radius=FixedRadius()) for part in (0, 3)]


def test_several_optimizers_are_told_apart(tmp_path):
    _, said = fit(Twins(), tmp_path)
    assert [line[:33] for line in said] == ["trust_region: 4 of 40 steps were ", "trust_region-1: 4 of 40 steps wer"]


def test_batches_that_only_accumulate_are_no_steps(tmp_path):
    _, said = fit(Poisoned(), tmp_path, accumulate_grad_batches=2)
    assert said[0].startswith("8 of 40 steps were skipped")


class OtherProcess(Callback):
    def on_train_start(self, trainer, pl_module):
        self.rank, rank_zero_only.rank = rank_zero_only.rank, 1

    def on_train_end(self, trainer, pl_module):
        rank_zero_only.rank = self.rank


def test_only_the_first_process_speaks_and_all_know_what_was_said(tmp_path):
    monitor = TrustRegionMonitor()
    assert fit(Poisoned(), tmp_path, OtherProcess(), monitor=monitor)[1] == []
    assert monitor.state_dict()["said"] == {"": ["skipped_steps"]}


def test_a_resumed_run_does_not_repeat_and_a_new_one_does(tmp_path):
    monitor = TrustRegionMonitor()
    trainer, said = fit(Poisoned(), tmp_path / "first", monitor=monitor, max_epochs=1)
    assert [line[:29] for line in said] == ["4 of 40 steps were skipped: 4"]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for name, again in {"same": monitor, "other": TrustRegionMonitor()}.items():
        options = {"max_epochs": 2, "monitor": again, "ckpt_path": tmp_path / "last.ckpt"}
        assert fit(Poisoned(), tmp_path / name, **options)[1] == []
    assert fit(Poisoned(), tmp_path / "third", monitor=monitor)[1] == said


class TakenUp(Mixed):
    """Its optimizer comes from a run of which 1000 checks in a row were rejected."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.param_groups[0]["checks"] = 1000
        return optimizer


def test_checks_of_a_run_that_is_taken_up_again_are_not_held_against_it(tmp_path):
    assert fit(TakenUp(), tmp_path)[1] == []


def test_state_of_a_monitor_without_advice_can_be_loaded():
    monitor = TrustRegionMonitor()
    monitor.load_state_dict({"epoch_start": {}})
    assert monitor.state_dict() == {"epoch_start": {}, "said": {}}


class CountsReads(TrustRegionMonitor):
    """Counts what the host waits for within the monitor, batch by batch."""

    def __init__(self):
        super().__init__()
        self.reads, self.waited = 0, []

    def on_train_batch_end(self, *args):
        before = self.reads
        with CountReads() as counter:
            super().on_train_batch_end(*args)
        self.waited.append(counter.scalars + self.reads - before)


@pytest.mark.parametrize("logged", [True, False])
@pytest.mark.parametrize("rule", [{}, {"radius": FixedRadius()}])
def test_watching_waits_for_no_device(tmp_path, monkeypatch, rule, logged):
    monitor = CountsReads()

    def counted(inner):
        def read(tensor, *args):
            monitor.reads += 1
            return inner(tensor, *args)

        return read

    for name in ("tolist", "item", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    fit(Mixed(**rule), tmp_path if logged else None, monitor=monitor)
    assert len(monitor.waited) == 120
    rows = set(range(9, 120, 10)) if logged else set()
    assert {step for step, count in enumerate(monitor.waited) if count} == rows
