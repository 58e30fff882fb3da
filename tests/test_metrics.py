"""EpochFigures against plain arithmetic, alone and as one of several processes."""

from math import isnan

import pytest
import torch

from lightning_soaa.metrics import FIGURES, EpochFigures, figures_over


def figures(metric):
    return dict(zip(FIGURES, metric.compute().tolist(), strict=True))


def in_processes(*updates):
    """Return one metric per process, each of which gathers the sums of all, as torch.distributed would."""
    everyone = []

    def gather(tensor, group):
        return [other.sums.clone() for other in everyone]

    for counts in updates:
        metric = EpochFigures(dist_sync_fn=gather, distributed_available_fn=lambda: True)
        metric.update(**counts)
        everyone.append(metric)
    return everyone


@pytest.mark.parametrize("counts", [(0, 0, 0), (0, 0, 3), (7, 3, 2)])
def test_figures_of_one_process_are_the_same_without_a_sum_over_processes(counts):
    counts = dict(zip(("checks", "accepted_checks", "skipped_steps"), counts, strict=True))
    metric = EpochFigures()
    metric.update(checks=5, accepted_checks=4)  # of another time: it is filled anew
    alone, summed = figures_over(None, counts), figures_over(metric, counts)
    assert alone.keys() == summed.keys() == set(FIGURES)
    assert all(alone[name] == summed[name] or (isnan(alone[name]) and isnan(summed[name])) for name in FIGURES)


def test_rate_is_that_of_the_sums_not_a_mean_of_rates():
    metric = EpochFigures()
    for checks, accepted_checks, skipped_steps in [(1, 0, 0), (6, 5, 2), (0, 0, 1), (2, 2, 0)]:
        metric.update(checks=checks, accepted_checks=accepted_checks, skipped_steps=skipped_steps)
    assert figures(metric) == {"acceptance_rate": 7 / 9, "checks": 9, "rejects": 2, "skipped_steps": 3}


def test_rate_is_nan_before_the_first_check_and_counts_are_zero():
    metric = EpochFigures()
    metric.update(checks=0, accepted_checks=0, skipped_steps=4)
    rate, *counts = metric.compute().tolist()
    assert isnan(rate)
    assert counts == [0, 0, 4]


def test_two_processes_with_the_same_decisions_have_the_figures_of_one():
    both = in_processes(*2 * [{"checks": 7, "accepted_checks": 5, "skipped_steps": 1}])
    expected = {"acceptance_rate": 5 / 7, "checks": 7, "rejects": 2, "skipped_steps": 1}
    assert [figures(metric) for metric in both] == [expected, expected]


def test_processes_with_different_decisions_show_it_as_counts_that_are_not_whole():
    both = in_processes({"checks": 4, "accepted_checks": 4}, {"checks": 3, "accepted_checks": 1})
    expected = {"acceptance_rate": 5 / 7, "checks": 3.5, "rejects": 1, "skipped_steps": 0}
    assert [figures(metric) for metric in both] == [expected, expected]


def test_compute_leaves_the_counts_of_this_process_as_they_were():
    metric, _ = in_processes(*2 * [{"checks": 3, "accepted_checks": 2}])
    metric.compute()
    metric.update(checks=1, accepted_checks=1)
    assert metric.sums.tolist() == [1, 4, 3, 0]


def test_reset_starts_at_zero_and_counts_this_process_once():
    metric = EpochFigures()
    metric.update(checks=3, accepted_checks=1)
    metric.reset()
    metric.update(checks=2, accepted_checks=2)
    assert figures(metric) == {"acceptance_rate": 1, "checks": 2, "rejects": 0, "skipped_steps": 0}


def test_called_as_a_function_it_returns_the_figures_of_this_update_and_keeps_all():
    metric = EpochFigures()
    metric.update(checks=3, accepted_checks=1)
    assert metric(checks=2, accepted_checks=2).tolist() == [1, 2, 0, 0]
    assert figures(metric) == {"acceptance_rate": 3 / 5, "checks": 5, "rejects": 2, "skipped_steps": 0}


def test_figures_are_float64_on_the_host():
    metric = EpochFigures()
    metric.update(checks=3, accepted_checks=1)
    assert metric.compute().dtype == torch.float64
    assert metric.compute().device == torch.device("cpu")


@pytest.mark.parametrize(
    ("counts", "got"),
    [
        ({"checks": 1, "accepted_checks": 2}, "checks=1, accepted_checks=2, skipped_steps=0"),
        ({"checks": -1, "accepted_checks": -1}, "checks=-1, accepted_checks=-1, skipped_steps=0"),
        (
            {"checks": 1, "accepted_checks": 0, "skipped_steps": -1},
            "checks=1, accepted_checks=0, skipped_steps=-1",
        ),
    ],
)
def test_impossible_counts_are_refused(counts, got):
    with pytest.raises(ValueError) as error:
        EpochFigures().update(**counts)
    assert str(error.value) == f"EpochFigures: `accepted_checks` must be in [0, checks] and no count < 0, got {got}"
