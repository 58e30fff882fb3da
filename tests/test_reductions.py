"""Where the method becomes a known one."""

import math

import pytest
import torch

from lightning_soaa import SOAA, DiagonalFisher, FixedRadius
from lightning_soaa.fisher import Bucket, box_direction, box_direction_foreach
from lightning_soaa.radius import Evidence, RatioRadius, falls_short


def small_problem(scale=1e-3):
    """A float64 net whose gradients are so small that the Fisher binds nowhere."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    x, y = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    return net, lambda: scale * torch.nn.functional.mse_loss(net(x), y)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("schedule", [None, "cosine"])
def test_fixed_radius_one_is_adamw_where_the_fisher_does_not_bind(foreach, weight_decay, schedule):
    trajectories = []
    for make in (
        lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=weight_decay),
        lambda p: SOAA(p, lr=3e-3, weight_decay=weight_decay, radius=FixedRadius(1.0), foreach=foreach),
    ):
        net, loss_at = small_problem()
        optimizer = make(net.parameters())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60) if schedule else None
        points = []
        for _ in range(60):
            optimizer.zero_grad()
            loss_at().backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
            points.append(torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone())
            if isinstance(optimizer, SOAA):
                assert optimizer.last_step.active_fraction == 0
        trajectories.append(torch.stack(points))
    torch.testing.assert_close(*trajectories, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("direction", [box_direction, box_direction_foreach])
def test_infinite_radius_equals_natural_gradient_step(direction):
    torch.manual_seed(0)
    m, v = torch.randn(50, dtype=torch.float64), torch.rand(50, dtype=torch.float64) + 0.1
    scale, ok = torch.tensor(1.7, dtype=torch.float64), torch.tensor(True)
    (u,) = direction([m], [v], scale, ok, radius=1e12, correction1=1.0, correction2=1.0, eps=1e-8)
    torch.testing.assert_close(u, m / (scale * v), atol=0, rtol=1e-9)


def test_direction_minimises_the_diagonal_model_in_the_box():
    """No point of the box, sampled at random, has a smaller model value than the direction."""
    torch.manual_seed(1)
    m, v = torch.randn(30, dtype=torch.float64), torch.rand(30, dtype=torch.float64) + 1e-3
    scale, radius = torch.tensor(2.0, dtype=torch.float64), 0.7
    (u,) = box_direction(
        [m], [v], scale, torch.tensor(True), radius=radius, correction1=1.0, correction2=1.0, eps=1e-300
    )
    fisher, half_width = scale * v, radius * m.abs() / v.sqrt()
    model = lambda s: (m * s + fisher * s * s / 2).sum(-1)  # noqa: E731
    others = (2 * torch.rand(20_000, 30, dtype=torch.float64) - 1) * half_width
    nearby = (-u + 1e-3 * torch.randn(20_000, 30, dtype=torch.float64)).clamp(-half_width, half_width)
    assert (-u).abs().le(half_width * (1 + 1e-12)).all()
    assert model(-u) <= torch.cat([model(others), model(nearby)]).min()


def test_fisher_sums_do_not_depend_on_how_parameters_are_split():
    torch.manual_seed(2)
    m, v = torch.randn(60, dtype=torch.float64), torch.rand(60, dtype=torch.float64)

    def bucket(*sizes):
        made = Bucket(0, 3, 0.9, 0.99, 1e-8, True)
        made.params, made.state = list(m.split(sizes)), {"m": list(m.split(sizes)), "v": list(v.split(sizes))}
        return DiagonalFisher().sums(made)

    torch.testing.assert_close(bucket(60), bucket(10, 20, 30), atol=0, rtol=1e-14)


def test_on_a_quadratic_one_minus_rho_is_half_step_over_line_minimiser():
    torch.manual_seed(3)
    hessian = torch.randn(6, 6, dtype=torch.float64)
    hessian = hessian @ hessian.T + torch.eye(6, dtype=torch.float64)
    x = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))
    optimizer = SOAA([x], lr=1.0)
    loss_closure = lambda: 0.5 * x @ hessian @ x  # noqa: E731

    def closure():
        optimizer.zero_grad()
        loss = loss_closure()
        loss.backward()
        return loss

    before = x.detach().clone()
    optimizer.step(closure, loss_closure=loss_closure)
    s, g = x.detach() - before, hessian @ before
    line_minimiser = -(g @ s) / (s @ hessian @ s)  # in units of s
    rho = optimizer.last_step.acceptance_ratio
    assert 1 - rho == pytest.approx(float(1 / (2 * line_minimiser)), rel=1e-6)


@pytest.mark.parametrize(
    ("base", "trial", "predicted", "noise", "wanted", "expected"),
    [
        (1.0, 0.5, 1.0, 0.0, 0.4, False),  # half of the prediction came true, 0.4 of it was wanted
        (1.0, 0.5, 1.0, 0.0, 0.6, True),
        (1.0, 1.1, 1.0, 0.0, 0.0, True),  # the loss rose
        (1.0, 1.0 + 1e-9, 1e-12, 1e-8, 0.0, False),  # it rose by less than rounding
        (1.0, 1.1, -0.1, 0.0, 0.0, False),  # an increase was predicted, and came
        (1.0, 1.3, -0.1, 0.0, 0.0, True),  # it was more than twice the predicted one
        (1.0, math.nan, 1.0, 9.0, 0.0, True),
        (1.0, math.inf, 1.0, 9.0, 0.0, True),
        (1.0, None, 1.0, 0.0, 0.0, True),
    ],
)
def test_a_step_falls_short_when_curvature_eats_more_than_its_share(base, trial, predicted, noise, wanted, expected):
    assert falls_short(Evidence(base=base, trial=trial, predicted=predicted, noise=noise), wanted) is expected


NAN = math.nan


@pytest.mark.parametrize(
    ("radius", "phase", "mean", "actual", "rms", "schedule", "new_radius", "new_phase", "accepted", "attempt", "retry"),
    [
        (1e-5, 2, 0.0, 1.0, 1.0, 1.0, 1.25e-5, 1, True, 1, False),  # first step: grow
        (1e-5, 2, 0.0, 0.4, 1.0, 1.0, 0.25e-5, 2, False, 1, True),  # the start was too large: shrink before moving
        (1e-5, 2, 0.0, 0.4, 1.0, 1.0, 0.25e-5, 2, False, 4, False),  # enough trials for one step
        (1e-2, 1, 0.4, 0.6, 1.0, 1.0, 1.25e-2, 1, True, 1, False),  # burn-in goes on below the prior
        (0.21, 1, 0.4, 0.6, 1.0, 1.0, 0.21, 0, True, 1, False),  # arrived at the prior
        (0.21, 1, 0.1, 0.9, 1.0, 1.0, 0.2625, 1, True, 1, False),  # arrived, but curvature eats little yet
        (0.04, 1, 0.6, 0.4, 1.0, 1.0, 0.016, 0, True, 1, False),  # curvature eats more than half: back off
        (0.04, 1, 0.0, -1.1, 1.0, 1.0, 0.02, 0, False, 1, True),  # the loss rose by more than it was to fall: undo
        (0.04, 0, 0.4, 0.6, 1.0, 1.0, 0.044, 0, True, 1, False),  # drift up to the prior
        (0.19, 0, 0.4, 0.6, 1.0, 1.0, 0.2, 0, True, 1, False),  # not beyond it
        (0.40, 0, 0.4, 0.6, 1.0, 1.0, 0.39, 0, True, 1, False),  # drift down to the prior
        (0.04, 0, 0.1, 0.9, 1.0, 1.0, 0.048, 0, True, 1, False),  # grow
        (0.40, 0, 0.1, 0.9, 1.0, 1.0, 0.48, 0, True, 1, False),  # also beyond the prior
        (0.40, 0, 0.1, 0.9, 1.0, 0.2, 0.39, 0, True, 1, False),  # but not against the schedule
        (0.04, 0, 0.6, 0.4, 1.0, 1.0, 0.034, 0, True, 1, False),  # shrink
        (0.04, 1, 0.0, -0.1, 1.0, 1.0, 0.016, 0, True, 1, False),  # it rose by less: back off, but keep the step
        (0.04, 0, 0.6, NAN, 1.0, 1.0, 0.02, 0, False, 1, True),  # not finite: undo and halve
        (
            1e-5,
            2,
            0.0,
            0.9,
            0.0,
            1.0,
            1.25e-5,
            1,
            True,
            1,
            False,
        ),  # parameters at zero have no scale: grow all the same
    ],
)
def test_ratio_radius_decides(
    radius, phase, mean, actual, rms, schedule, new_radius, new_phase, accepted, attempt, retry
):
    numbers = {"radius": radius, "phase": phase, "eaten": mean, "weight": 0.0 if phase == 2 else 1.0}
    evidence = Evidence(base=0.0, trial=-actual, predicted=1.0, attempt=attempt, parameter_rms=rms, schedule=schedule)
    decision = RatioRadius().update(numbers, evidence)
    assert decision.numbers["radius"] == pytest.approx(new_radius, rel=1e-12)
    assert decision.numbers["phase"] == new_phase
    assert (decision.accepted, decision.retry) == (accepted, retry)


def test_ratio_radius_learns_nothing_from_a_step_that_promises_nothing():
    numbers = {"radius": 0.1, "phase": 0, "eaten": 0.3, "weight": 1.0}
    decision = RatioRadius().update(numbers, Evidence(base=1.0, trial=1.0, predicted=0.0, parameter_rms=1.0))
    assert decision.numbers == numbers
    assert decision.accepted


def test_cautious_step_descends_on_every_coordinate():
    """The gradient turns from one step to the next, so that the momentum is behind it on some coordinates."""
    torch.manual_seed(4)
    x = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer, still = SOAA([x], lr=1.0), 0
    for _ in range(20):
        gradient, before = torch.randn(50, dtype=torch.float64), x.detach().clone()

        def closure(gradient=gradient):
            optimizer.zero_grad()
            loss = gradient @ x
            loss.backward()
            return loss

        optimizer.step(closure, loss_closure=lambda gradient=gradient: gradient @ x)
        moved = x.detach() - before
        assert (moved * gradient <= 0).all()
        still += int((moved == 0).sum())
    assert still > 100
