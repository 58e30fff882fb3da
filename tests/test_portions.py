"""Portions of the radius: the pure rule, the marks that slopes rest on, and both in SOAA."""

import copy
from math import inf, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, assert_same, drive
from torch import nn

from lightning_soaa import SOAA, DiagonalFisher, KroneckerFisher, RatioRadius
from lightning_soaa._moments import drop_unmarked, mark_moved
from lightning_soaa._state import PORTION
from lightning_soaa.portions import WIDEST, Portion, move_portions

slopes = st.lists(st.tuples(st.floats(1e-9, 1e9), st.floats(-1e9, 1e9)), min_size=1, max_size=6)


def after(checks, promised, left):
    """What is known of tensors after so many checks alike."""
    known = [Portion()] * len(promised)
    for _ in range(checks):
        known = move_portions(known, promised, left)
    return [each.portion for each in known]


@given(st.floats(1e-9, 1e9), st.floats(-1e9, 1e9))
def test_a_single_tensor_keeps_a_portion_of_exactly_one(promised, left):
    assert after(30, [promised], [left]) == [1.0]


def test_slopes_that_are_left_alike_move_no_portion():
    assert after(30, [1.0, 4.0, 0.5], [0.25, 1.0, 0.125]) == [1.0, 1.0, 1.0]


def test_a_tensor_whose_slope_is_left_grows_beside_one_whose_slope_has_turned():
    small, large = after(10, [1.0, 1.0], [-0.5, 0.5])
    assert small < 0.8 < 1.2 < large


def test_the_tensor_that_promises_nearly_all_keeps_its_portion():
    whole, rest = after(40, [1.0, 1e-6], [0.1, 0.9e-6])
    assert abs(whole - 1) < 1e-4
    assert rest > 2


def test_a_tensor_that_promises_next_to_nothing_may_grow_but_does_not_shrink():
    whole, turned, left = after(40, [1.0, 1e-5, 1e-5], [0.3, -2e-5, 0.9e-5])
    assert (whole, turned) == pytest.approx((1, 1), abs=0.02)
    assert left > 2


@settings(max_examples=200, deadline=None)
@given(slopes, st.integers(1, 60))
def test_portions_stay_within_their_bounds_whatever_is_found(pairs, checks):
    promised, left = zip(*pairs, strict=True)
    assert all(
        portion * (1 + 1e-12) >= 1 / WIDEST and portion <= WIDEST * (1 + 1e-12)
        for portion in after(checks, promised, left)
    )


@settings(max_examples=200, deadline=None)
@given(slopes, st.sampled_from([2.0**-14, 2.0**13]))
def test_the_unit_of_the_loss_changes_no_bit_of_a_portion(pairs, unit):
    promised, left = zip(*pairs, strict=True)
    assert after(9, promised, left) == after(9, [p * unit for p in promised], [q * unit for q in left])


def test_portions_drift_back_to_one_once_all_slopes_are_left_alike():
    known = [Portion()] * 2
    for _ in range(40):
        known = move_portions(known, [1.0, 1.0], [-0.5, 0.5])
    apart = known[1].portion / known[0].portion
    for _ in range(600):
        known = move_portions(known, [1.0, 1.0], [0.2, 0.2])
    assert known[1].portion / known[0].portion < 1.05 < apart


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_figures_that_are_not_finite_teach_nothing(bad):
    known = [Portion(2.0, 1.0, 0.5), Portion(0.5, 1.0, -0.5)]
    assert move_portions(known, [1.0, bad], [0.5, 0.5]) == known
    assert move_portions(known, [1.0, 1.0], [bad, 0.5]) == known


def test_promises_too_small_for_an_average_teach_nothing():
    assert after(3, [5e-324], [5e-324]) == [1.0]
    assert after(3, [5e-324, 1.0], [5e-324, 0.5])[1] == pytest.approx(1, abs=0.01)


def test_nothing_is_learned_of_a_tensor_that_has_promised_nothing():
    one, other, idle = after(20, [1.0, 1.0, 0.0], [0.5, -0.5, 0.3])
    assert one > 1.2
    assert other < 0.8
    assert idle == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_marks_say_which_coordinates_moved_and_change_the_second_moment_by_a_rounding(dtype):
    torch.manual_seed(0)
    m, g = torch.randn(1000, dtype=dtype), torch.randn(1000, dtype=dtype)
    v = torch.rand(1000, dtype=dtype)
    kept = v.clone()
    mark_moved([m], [v], [g])
    step = torch.ones(1000, dtype=dtype)
    drop_unmarked([step], [v])
    assert torch.equal(step.bool(), m * g > 0)
    assert torch.all((v - kept).abs() <= torch.finfo(dtype).eps * kept)
    mark_moved([m], [v], [-g])
    step.fill_(1.0)
    drop_unmarked([step], [v])
    assert torch.equal(step.bool(), m * g < 0)


class Layers(nn.Module):
    """Two tensors, of which one is a hundred times as curved."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.steep, self.flat = (nn.Parameter(torch.randn(20, dtype=torch.float64, generator=generator)) for _ in "ab")
        self.scales = torch.linspace(0.5, 1.5, 20, dtype=torch.float64)

    def loss(self):
        return 100 * (self.scales * self.steep**2).sum() + (self.scales * (self.flat - 3) ** 2).sum()


def test_soaa_gives_the_flatter_layer_the_larger_portion():
    layers = Layers()
    optimizer = SOAA(layers.parameters(), radius=RatioRadius(interval=1))
    drive(optimizer, layers.loss, 60)
    steep, flat = (optimizer.state[param][PORTION] for param in (layers.steep, layers.flat))
    assert steep < flat
    assert flat > 1.5


@pytest.mark.parametrize("fisher", [DiagonalFisher(), KroneckerFisher()])
def test_a_run_that_is_saved_between_a_check_and_the_next_gradient_goes_on_bit_for_bit(fisher):
    whole = Problem("ratio", fisher=fisher)
    for _ in range(25):
        other = Problem("ratio", fisher=fisher)
        for mine, theirs in zip(other.params, whole.params, strict=True):
            mine.data.copy_(theirs.data)
        other.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
        other.batch = whole.batch
        whole.step()
        other.step()
        whole.optimizer.state_dict(), other.optimizer.state_dict()  # what is unread is heard
        assert_same(whole.facts(), other.facts())


def test_a_parameter_that_is_frozen_for_a_while_keeps_its_portion():
    layers = Layers()
    optimizer = SOAA(layers.parameters(), radius=RatioRadius(interval=1))
    drive(optimizer, layers.loss, 40)
    kept = optimizer.state[layers.flat][PORTION]
    layers.flat.requires_grad_(False)
    layers.flat.grad = None
    drive(optimizer, layers.loss, 10)
    assert optimizer.state[layers.flat][PORTION] == kept != 1
