"""Where the method becomes a known one."""

import math

import pytest
import torch

from lightning_soaa import SOAA, DiagonalFisher, FixedRadius
from lightning_soaa._bucket import Bucket
from lightning_soaa._moments import box_direction, box_direction_foreach
from lightning_soaa._ratios import falls_short
from lightning_soaa.radius import Evidence
from lightning_soaa.ratio import RatioRadius


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


# Parameters of root mean square 1, unless a row says otherwise: the floor is 2e-4, the prior 0.2, the ceiling 2. Each
# check promises 1; `eaten` and `slope` are the means so far, `actual` and `fresh` what this check saw.
LOW, PRIOR, HIGH = 2e-4, 0.2, 2.0
NAN, BF16 = math.nan, 2.0**-7
STAYS = {"accepted": True, "retry": False}
GROWS, CREEPS, RETRY = {"factor": 1.35, **STAYS}, {"factor": 1.1, **STAYS}, {"accepted": False, "retry": True}

DECISIONS = {
    # The first step
    "the first trial moves nothing and finds the floor": (
        {"radius": 0.0, "weight": 0},
        {"actual": 0.0, "predicted": 0.0},
        {**RETRY, "radius": LOW, "phase": 1},
    ),
    "whatever its loss": ({"radius": 0.0, "weight": 0}, {"actual": NAN, "predicted": 0.0}, {**RETRY, "radius": LOW}),
    "and is no trial of the step": (
        {"radius": 0.0, "weight": 0},
        {"actual": 0.0, "predicted": 0.0, "attempt": 4},
        {**RETRY, "radius": LOW},
    ),
    "nor of the noise": ({"radius": 0.0, "weight": 0}, {"actual": 9.0, "predicted": 0.0}, {**RETRY, "noise": 0.0}),
    "the step at the floor is taken": ({"radius": LOW, "weight": 0}, {"actual": -9.0}, {**GROWS, "phase": 1}),
    "and not tried again if it is not finite": (
        {"radius": LOW, "weight": 0},
        {"actual": NAN},
        {"accepted": False, "retry": False, "radius": LOW, "phase": 1},
    ),
    "one below the floor is lifted": ({"radius": 1e-8, "weight": 0}, {}, {"radius": LOW, "phase": 1}),
    "parameters at zero count as of size 1/1000": (
        {"radius": 0.0, "weight": 0},
        {"rms": 0.0, "predicted": 0.0},
        {**RETRY, "radius": 2e-7},
    ),
    "parameters that are infinite count as of size 1": (
        {"radius": 0.0, "weight": 0},
        {"rms": math.inf, "predicted": 0.0},
        {**RETRY, "radius": LOW},
    ),
    # Burn-in
    "growth goes on below the prior": ({"phase": 1, "radius": 0.01}, {}, GROWS),
    "slowly where curvature eats a fifth and more": (
        {"phase": 1, "radius": 0.01, "eaten": 0.3},
        {"actual": 0.7},
        CREEPS,
    ),
    "what is eaten is a mean of half the last one": (
        {"phase": 1, "radius": 0.01, "eaten": 0.34},
        {"actual": 0.9},
        {**STAYS, "factor": 1.1, "mean": 0.22},
    ),
    "the floor does not count as evidence of a long step": (
        {"phase": 1, "radius": LOW, "eaten": 0.0},
        {"actual": -9.0, "fresh": 1.0},
        {**GROWS, "mean": 0.0, "phase": 1},
    ),
    "arrival at the prior, where curvature eats enough": (
        {"phase": 1, "radius": 0.21, "eaten": 0.4},
        {"actual": 0.6},
        {**STAYS, "factor": 1.0, "phase": 0, "scale": 1.0},
    ),
    "one on the way there goes on": ({"phase": 1, "radius": 0.19, "eaten": 0.4}, {"actual": 0.6}, CREEPS),
    "arrived, but curvature eats little": ({"phase": 1, "radius": 0.21}, {}, {**GROWS, "phase": 1, "scale": 0.0}),
    "arrived, and nothing is known": (
        {"phase": 1, "radius": 0.21},
        {"noise": 1.0},
        {**STAYS, "factor": 1.0, "phase": 1, "steady": 1},
    ),
    "nor for 20 checks": (
        {"phase": 1, "radius": 0.21, "steady": 20},
        {"noise": 1.0},
        {**STAYS, "factor": 1.0, "phase": 0, "scale": 1.0},
    ),
    "checks of short steps count as little": (
        {"phase": 1, "radius": 0.21, "steady": 20},
        {"noise": 1.0, "schedule": 0.0},
        {**STAYS, "factor": 1.0, "phase": 1, "steady": 20},
    ),
    "growth ends at the ceiling": ({"phase": 1, "radius": 1.9}, {}, {**STAYS, "radius": HIGH, "phase": 1}),
    "not arrived, and nothing is known": ({"phase": 1, "radius": 0.1}, {"noise": 1.0}, GROWS),
    "curvature eats too much and no slope is left": (
        {"phase": 1, "radius": 0.04, "eaten": 0.6},
        {"actual": 0.4},
        {**STAYS, "factor": 0.4, "phase": 0, "scale": 1.0},
    ),
    "curvature eats too much, but a slope is left": (
        {"phase": 1, "radius": 0.04, "eaten": 0.6, "slope": -0.3},
        {"actual": 0.4, "fresh": -0.3},
        {**CREEPS, "phase": 1},
    ),
    "the slope counts as much as curvature": (
        {"phase": 1, "radius": 0.04, "eaten": 0.6, "slope": -0.1},
        {"actual": 0.4, "fresh": -0.1},
        {**STAYS, "factor": 0.4, "phase": 0},
    ),
    "a loss that rises by less than it was to fall stays": (
        {"phase": 1, "radius": 0.04},
        {"actual": -0.9},
        {**STAYS, "factor": 0.4, "phase": 0},
    ),
    "one that rises by more is undone and ends it": (
        {"phase": 1, "radius": 0.04},
        {"actual": -1.1},
        {**RETRY, "factor": 0.5, "phase": 0, "scale": 1.0},
    ),
    "not finite is undone and ends it": (
        {"phase": 1, "radius": 0.04},
        {"actual": NAN, "rms": 0.5},
        {**RETRY, "factor": 0.5, "phase": 0, "scale": 0.5},
    ),
    "burn-in is held at the ceiling": (
        {"phase": 1, "radius": HIGH},
        {},
        {**STAYS, "factor": 1.0, "phase": 1, "steady": 1},
    ),
    "for 20 checks": (
        {"phase": 1, "radius": HIGH, "steady": 19},
        {},
        {**STAYS, "factor": 1.0, "phase": 1, "steady": 20},
    ),
    "and no longer": (
        {"phase": 1, "radius": HIGH, "steady": 20},
        {},
        {**STAYS, "factor": 1.0, "phase": 0, "steady": 0, "scale": 1.0},
    ),
    "below it that count starts anew": ({"phase": 1, "radius": 1.0, "steady": 20}, {}, {**GROWS, "steady": 0}),
    "below half of the schedule's peak the prior is the ceiling": (
        {"phase": 1, "radius": PRIOR},
        {"schedule": 0.49},
        {**STAYS, "factor": 1.0, "phase": 1, "steady": 0.49},
    ),
    "growth ends there": ({"phase": 1, "radius": 0.19}, {"schedule": 0.49}, {**STAYS, "radius": PRIOR, "phase": 1}),
    "from half of it on it does not": (
        {"phase": 1, "radius": PRIOR, "steady": 9.0},
        {"schedule": 0.5},
        {**GROWS, "phase": 1, "steady": 0},
    ),
    "below the prior it grows at any time": ({"phase": 1, "radius": 0.1}, {"schedule": 0.04}, GROWS),
    "early in a warm-up an eaten share of the schedule's is the target": (
        {"phase": 1, "radius": 0.25, "eaten": 0.05},
        {"actual": 0.95, "schedule": 0.1},
        {**STAYS, "factor": 1.0, "phase": 0},
    ),
    # After burn-in
    "drift up to the prior": ({"phase": 0, "radius": 0.04, "eaten": 0.4}, {"actual": 0.6}, {**CREEPS, "steady": 1}),
    "not beyond it": ({"phase": 0, "radius": 0.19, "eaten": 0.4}, {"actual": 0.6}, {"radius": PRIOR}),
    "drift down to the prior": ({"phase": 0, "radius": 0.4, "eaten": 0.4}, {"actual": 0.6}, {"factor": 0.975}),
    "not below it": ({"phase": 0, "radius": 0.201, "eaten": 0.4}, {"actual": 0.6}, {"radius": PRIOR}),
    "steady checks are counted": (
        {"phase": 0, "radius": PRIOR, "eaten": 0.4, "steady": 30},
        {"actual": 0.6},
        {"radius": PRIOR, "steady": 31},
    ),
    "growth": ({"phase": 0, "radius": 0.04, "steady": 7}, {}, {"factor": 1.2, "steady": 0}),
    "growth beyond the prior": ({"phase": 0, "radius": 0.4}, {}, {"factor": 1.2}),
    "growth up to 3 times the prior": ({"phase": 0, "radius": 0.55, "steady": 7}, {}, {"radius": 0.6, "steady": 0}),
    "no growth beyond": ({"phase": 0, "radius": 0.601, "steady": 7}, {}, {"factor": 0.975, "steady": 8}),
    "but where a slope is left": ({"phase": 0, "radius": 0.601, "slope": 0.01}, {}, {"factor": 1.2, "steady": 0}),
    "growth up to the ceiling": ({"phase": 0, "radius": 1.9, "slope": 0.5}, {}, {"radius": HIGH, "steady": 0}),
    "what is above it stays there": ({"phase": 0, "radius": 2.1, "slope": 0.5}, {}, {"radius": 2.1}),
    "one check is a fifth of the mean": (
        {"phase": 0, "radius": 0.4, "eaten": 0.3},
        {"actual": 0.4},
        {"factor": 1.2, "mean": 0.36},
    ),
    "no growth against the schedule": (
        {"phase": 0, "radius": 0.4, "eaten": 0.1},
        {"actual": 0.9, "schedule": 0.2},
        {"factor": 0.975, "steady": 1},
    ),
    "growth where curvature eats less than the schedule leaves": (
        {"phase": 0, "radius": 0.4, "eaten": 0.07},
        {"actual": 0.93, "schedule": 0.2},
        {"factor": 1.2},
    ),
    "a schedule above 1 asks for no more": (
        {"phase": 0, "radius": 0.4, "eaten": 0.45, "slope": -0.2},
        {"actual": 0.55, "fresh": -0.2, "schedule": 3.0},
        {"factor": 0.975},
    ),
    "no growth late in the schedule": ({"phase": 0, "radius": 0.04}, {"schedule": 0.05}, {"factor": 1.1, "steady": 1}),
    "where it ends it grows": ({"phase": 0, "radius": 0.04}, {"schedule": 0.051}, {"factor": 1.2, "steady": 0}),
    "late in the schedule a long step is one all the same": (
        {"phase": 0, "radius": 0.4, "eaten": 0.6},
        {"actual": 0.4, "schedule": 0.01},
        {"factor": 0.7},
    ),
    "shrinking": (
        {"phase": 0, "radius": 0.04, "eaten": 0.6, "steady": 9},
        {"actual": 0.4},
        {"factor": 0.7, "steady": 0},
    ),
    "a slope that is left keeps it from shrinking": (
        {"phase": 0, "radius": 0.04, "eaten": 0.6, "slope": -0.3, "steady": 9},
        {"actual": 0.4, "fresh": -0.3},
        {"factor": 1.1, "steady": 10},
    ),
    "one new slope is a fifth of the mean": (
        {"phase": 0, "radius": 0.04, "eaten": 0.6, "slope": -0.1},
        {"actual": 0.4, "fresh": -0.7},
        {"factor": 1.1, "slope_mean": -0.22},
    ),
    "a slope is worth no more than twice that of the start": (
        {"phase": 0, "radius": 0.04, "eaten": 0.6, "slope": 0.3},
        {"actual": 0.4, "fresh": -50.0},
        {"factor": 0.7, "slope_mean": -0.16},
    ),
    "without a new slope the mean stays": (
        {"phase": 0, "radius": 0.04, "eaten": 0.6, "slope": -0.3},
        {"actual": 0.4},
        {"factor": 1.1, "slope_mean": -0.3},
    ),
    "shrinking ends at the floor": ({"phase": 0, "radius": 2.5e-4, "eaten": 0.6}, {"actual": 0.4}, {"radius": LOW}),
    "a loss that rises by more than it was to fall is undone": (
        {"phase": 0, "radius": 0.04, "steady": 9},
        {"actual": -1.1},
        {**RETRY, "factor": 0.5, "steady": 0, "mean": 0.0},
    ),
    "a gain of more than twice the promise was noise": (
        {"phase": 0, "radius": 0.04, "eaten": 0.4},
        {"actual": 2.8},
        {"accepted": True, "noise": 0.8, "factor": 1.2},
    ),
    "which is forgiven": (
        {"phase": 0, "radius": 0.04, "eaten": 0.4, "noise": 0.9},
        {"actual": -1.8},
        {"accepted": True, "noise": 0.81},
    ),
    "but no more": ({"phase": 0, "radius": 0.04, "noise": 0.9}, {"actual": -1.82}, {**RETRY, "factor": 0.5}),
    "where it exceeds the promise nothing is known": (
        {"phase": 0, "radius": 0.04, "eaten": 0.6, "noise": 2.0},
        {"actual": 0.0},
        {"factor": 1.1, "mean": 0.6},
    ),
    "rounding is forgiven": (
        {"phase": 0, "radius": 0.04, "eaten": 0.4},
        {"actual": -1.1, "noise": 0.2},
        {"accepted": True},
    ),
    "not finite is undone": ({"phase": 0, "radius": 0.04}, {"actual": NAN}, {**RETRY, "factor": 0.5}),
    "minus infinity is not finite": ({"phase": 0, "radius": 0.04}, {"actual": math.inf}, {**RETRY, "factor": 0.5}),
    "after the last trial it is given up": (
        {"phase": 0, "radius": 0.04},
        {"actual": NAN, "attempt": 4},
        {"accepted": False, "retry": False, "factor": 0.5},
    ),
    "what is undone goes no lower than the floor": (
        {"phase": 0, "radius": 3e-4},
        {"actual": -2.0},
        {**RETRY, "radius": LOW},
    ),
    "at the floor every finite loss is taken": (
        {"phase": 0, "radius": LOW, "eaten": 0.4},
        {"actual": -9.0},
        {**STAYS, "radius": LOW, "mean": 0.72},
    ),
    "and no other": ({"phase": 0, "radius": LOW}, {"actual": NAN}, {"accepted": False, "retry": False, "radius": LOW}),
    "and the radius leaves it for the prior": (
        {"phase": 0, "radius": LOW, "eaten": 0.4},
        {"actual": 0.6},
        {"factor": 1.1},
    ),
    "where nothing is known it drifts": ({"phase": 0, "radius": 0.04}, {"noise": 1.0}, {"factor": 1.1, "mean": 0.0}),
    "the floor is not below the parameters' resolution": (
        {"phase": 0, "radius": 1e-4, "eaten": 0.4},
        {"actual": -9.0, "resolution": BF16, "rms": 2.0},
        {**STAYS, "radius": 2 * BF16},
    ),
    "the prior follows parameters that shrink": (
        {"phase": 0, "radius": 0.101, "eaten": 0.4, "scale": 1.0},
        {"actual": 0.6, "rms": 0.5},
        {"radius": 0.1},
    ),
    "and not those that grow": (
        {"phase": 0, "radius": 0.201, "eaten": 0.4, "scale": 1.0},
        {"actual": 0.6, "rms": 50.0},
        {"radius": PRIOR, "scale": 1.0},
    ),
    # Far below the prior
    "where curvature eats next to nothing burn-in is taken up again": (
        {"phase": 0, "radius": 0.0019},
        {},
        {"factor": 1.2, "phase": 1},
    ),
    "not from a hundredth of the prior on": ({"phase": 0, "radius": 0.0021}, {}, {"factor": 1.2, "phase": 0}),
    "nor where curvature eats a fifth": (
        {"phase": 0, "radius": 0.0019, "eaten": 0.21},
        {"actual": 0.79},
        {"factor": 1.2, "phase": 0},
    ),
    "or as much of it as the schedule leaves": (
        {"phase": 0, "radius": 0.0019, "eaten": 0.11},
        {"actual": 0.89, "schedule": 0.5},
        {"factor": 1.2, "phase": 0},
    ),
    "nor where nothing is known": ({"phase": 0, "radius": 0.0019}, {"noise": 1.0}, {"factor": 1.1, "phase": 0}),
    "what was taken up again goes to the prior": (
        {"phase": 1, "radius": 0.19, "scale": 1.0},
        {},
        {**STAYS, "radius": PRIOR, "phase": 1},
    ),
    "and ends there": (
        {"phase": 1, "radius": PRIOR, "scale": 1.0},
        {},
        {**STAYS, "radius": PRIOR, "phase": 0, "scale": 1.0},
    ),
    "or where a step is long, at the scale that it had": (
        {"phase": 1, "radius": 0.04, "eaten": 0.6, "scale": 1.0},
        {"actual": 0.4, "rms": 0.5},
        {**STAYS, "factor": 0.4, "phase": 0, "scale": 1.0},
    ),
    "or undone": (
        {"phase": 1, "radius": 0.04, "scale": 1.0},
        {"actual": -1.1, "rms": 0.5},
        {**RETRY, "factor": 0.5, "phase": 0, "scale": 1.0},
    ),
    # A loss that does not follow its gradient
    "at the floor it is doubted": (
        {"phase": 0, "radius": LOW, "eaten": 0.5},
        {"actual": 0.5},
        {"radius": LOW, "doubts": 1},
    ),
    "also in burn-in": ({"phase": 1, "radius": LOW}, {"actual": 0.5}, {**GROWS, "doubts": 1}),
    "and up to 3 times the floor": (
        {"phase": 0, "radius": 2.9 * LOW, "eaten": 0.5, "doubts": 1},
        {"actual": 0.5},
        {"factor": 0.7, "doubts": 2},
    ),
    "not where it follows": (
        {"phase": 0, "radius": LOW, "eaten": 0.5, "doubts": 2},
        {"actual": 0.61},
        {"doubts": 1},
    ),
    "where there is no doubt none is taken away": (
        {"phase": 0, "radius": LOW, "eaten": 0.5},
        {"actual": 0.61},
        {"doubts": 0},
    ),
    "nor further off the floor": (
        {"phase": 0, "radius": 3.1 * LOW, "eaten": 0.5, "doubts": 2},
        {"actual": 0.5},
        {"factor": 0.7, "doubts": 1},
    ),
    "nor at one that is the parameters' resolution": (
        {"phase": 0, "radius": BF16, "eaten": 0.5, "doubts": 2},
        {"actual": 0.5, "resolution": BF16},
        {"radius": BF16, "doubts": 0},
    ),
    "what is not known changes nothing": (
        {"phase": 0, "radius": LOW, "doubts": 2},
        {"actual": 0.5, "noise": 1.0},
        {"doubts": 2},
    ),
    "far below the prior, where a slope is left beyond what curvature leaves": (
        {"phase": 0, "radius": 0.0066, "eaten": 0.4, "slope": 0.8},
        {"actual": 0.6, "fresh": 0.8},
        {"doubts": 1, "mean": 0.4},
    ),
    "and in burn-in": (
        {"phase": 1, "radius": 0.006, "eaten": 0.4, "slope": 0.8, "doubts": 1},
        {"actual": 0.6, "fresh": 0.8},
        {**CREEPS, "doubts": 2},
    ),
    "not nearer to it": (
        {"phase": 0, "radius": 0.0067, "eaten": 0.4, "slope": 0.8, "doubts": 2},
        {"actual": 0.6, "fresh": 0.8},
        {"doubts": 0},
    ),
    "nor where less than 0.6 of the slope is left": (
        {"phase": 0, "radius": 0.0066, "eaten": 0.6, "slope": 0.59, "doubts": 2},
        {"actual": 0.4, "fresh": 0.59},
        {"factor": 0.7, "doubts": 1},
    ),
    "nor where curvature may have taken what is missing": (
        {"phase": 0, "radius": 0.0066, "eaten": 0.3, "slope": 0.89, "doubts": 2},
        {"actual": 0.7, "fresh": 0.89},
        {"factor": 1.2, "doubts": 1},
    ),
    "nor by a mean that this check does not bear out": (
        {"phase": 0, "radius": 0.0066, "eaten": 0.6, "slope": 0.9, "doubts": 2},
        {"actual": 0.81, "fresh": 0.9},
        {"doubts": 1},
    ),
    "nor does a promise that the loss's rounding may hide": (
        {"phase": 0, "radius": LOW, "doubts": 2, "largest": 1e6},
        {"actual": 0.5},
        {"doubts": 2, "largest": 1e6},
    ),
    "one that it may not does": (
        {"phase": 0, "radius": LOW, "doubts": 1, "largest": 0.99e6},
        {"actual": 0.5},
        {"doubts": 2},
    ),
    "the third check begins anew by slopes": (
        {"phase": 0, "radius": LOW, "eaten": 0.5, "slope": 0.3, "doubts": 2},
        {"actual": 0.5},
        {"radius": PRIOR / 30, "phase": 1, "doubts": 3, "mean": 0.0, "eaten_weight": 0.0, "slope_mean": 0.3},
    ),
    "far below the prior as well": (
        {"phase": 0, "radius": 0.0066, "eaten": 0.4, "slope": 0.8, "doubts": 2},
        {"actual": 0.6, "fresh": 0.8},
        {"radius": 0.0066 * 1.1, "phase": 1, "doubts": 3, "mean": 0.0},
    ),
    "and that for good": ({"phase": 0, "radius": LOW, "doubts": 3}, {"actual": 1.0, "fresh": 1.0}, {"doubts": 3}),
    "by slopes burn-in grows": (
        {"phase": 1, "radius": 0.04, "scale": 1.0, "eaten": 0.1, "doubts": 3},
        {"actual": -9.0, "fresh": 0.8},
        {**GROWS, "phase": 1, "mean": 0.1},
    ),
    "half of what is lost of a slope counts as eaten": (
        {"phase": 0, "radius": 0.04, "eaten": 0.5, "doubts": 3},
        {"actual": -9.0, "fresh": 0.6},
        {"factor": 1.1, "mean": 0.44},
    ),
    "a slope that is left lets it grow": (
        {"phase": 0, "radius": 0.04, "eaten": 0.2, "doubts": 3},
        {"actual": -9.0, "fresh": 0.6},
        {"factor": 1.2, "mean": 0.2},
    ),
    "one that grows counts as nothing eaten": (
        {"phase": 0, "radius": 0.04, "eaten": 0.2, "doubts": 3},
        {"fresh": 1.8},
        {"factor": 1.2, "mean": 0.16},
    ),
    "one that has turned as far as it was does not let it shrink": (
        {"phase": 0, "radius": 0.04, "eaten": 1.0, "doubts": 3},
        {"fresh": -1.0},
        {"factor": 1.1, "mean": 1.0},
    ),
    "one that has turned further does": (
        {"phase": 0, "radius": 0.04, "eaten": 1.0, "doubts": 3},
        {"fresh": -9.0},
        {"factor": 0.7, "mean": 1.1},
    ),
    "without a slope it drifts": (
        {"phase": 0, "radius": 0.04, "eaten": 1.2, "doubts": 3},
        {"actual": 0.0},
        {"factor": 1.1, "mean": 1.2},
    ),
    "a loss that is not finite is still undone": (
        {"phase": 0, "radius": 0.04, "doubts": 3},
        {"actual": NAN, "fresh": 1.0},
        {**RETRY, "factor": 0.5},
    ),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_ratio_radius_decides(name):
    before, check, after = DECISIONS[name]
    phase, weight = before.get("phase", 1), before.get("weight", 1.0)
    eaten, slope = before.get("eaten", 0.0), before.get("slope", 0.0)
    numbers = {
        **{"radius": before["radius"], "phase": phase, "steady": before.get("steady", 0)},
        **{"eaten": eaten, "eaten_weight": weight, "fresh": slope, "fresh_weight": weight},
        "scale": before.get("scale", 0.0 if phase else 1.0),
        "noise": before.get("noise", 0.0),
        "annealing": 1.0,
        "doubts": before.get("doubts", 0.0),
        "largest": before.get("largest", 0.0),
    }
    check = {"actual": 1.0, "rms": 1.0, "predicted": 1.0, **check}
    actual, rms = check.pop("actual"), check.pop("rms")
    evidence = Evidence(base=0.0, trial=-actual, parameter_rms=rms, **check)
    given = dict(numbers)
    decision = RatioRadius().update(numbers, evidence)
    assert numbers == given
    new = decision.numbers
    seen = {"accepted": decision.accepted, "retry": decision.retry}
    seen |= {
        "factor": new["radius"] / (before["radius"] or math.nan) / new["annealing"],
        "mean": new["eaten"],
        "slope_mean": new["fresh"],
        **new,
    }
    expected = {"scale": numbers["scale"], **STAYS, **after} if phase == 0 else after
    for what, value in expected.items():
        assert seen[what] == pytest.approx(value, rel=1e-12, abs=1e-15), what
    assert new.keys() == numbers.keys() | {"radius_low", "radius_high"}


# Name: share eaten and slope left before a check that finds the same, what differs; what is left of the prior after it.
ANNEALING = {
    "a slope that has turned without curvature anneals": (0.4, -0.5, {}, math.exp(-0.1)),
    "one that curvature explains does not": (0.9, -0.8, {}, 1.0),
    "beyond what it explains it does": (0.6, -0.7, {}, math.exp(-0.1)),
    "never more than a fifth of the logarithm": (0.2, -1.9, {}, math.exp(-0.2)),
    "in proportion to what is known": (0.4, -0.5, {"weight": 0.5}, math.exp(-0.2 * 0.5 * 0.6)),
    "a slope that is left leads back": (0.4, 0.25, {"annealing": 0.5}, 0.5 * math.exp(0.05)),
    "to the prior and no further": (0.4, 1.0, {"annealing": 0.9}, 1.0),
    "a hundredth is left at least": (0.4, -0.5, {"annealing": 0.0101}, 0.01),
    "a schedule that has set in anneals, not the radius": (0.4, -0.5, {"annealing": 0.5, "schedule": 0.99}, 0.5),
    "where nothing is known nothing moves": (0.4, -0.5, {"annealing": 0.5, "noise": 1.0}, 0.5),
    "nor in burn-in": (0.4, -0.5, {"phase": 1}, 1.0),
    "nor by a step that is undone": (0.4, -0.5, {"annealing": 0.5, "actual": NAN}, 0.5),
}


def after_annealing(eaten, slope, *, phase=0, weight=1.0, annealing=1.0, radius=0.04, **check):
    """Return the decision on a check that finds what is known already."""
    numbers = {"radius": radius, "phase": phase, "steady": 0.0, "scale": 0.0 if phase else 1.0, "noise": 0.0}
    numbers |= {"doubts": 0.0, "largest": 0.0}
    numbers |= {"eaten": eaten * weight, "eaten_weight": weight, "fresh": slope * weight, "fresh_weight": weight}
    check = {"actual": 1 - eaten, "fresh": slope, "parameter_rms": 1.0, "predicted": 1.0, **check}
    evidence = Evidence(base=0.0, trial=-check.pop("actual"), **check)
    return RatioRadius().update({**numbers, "annealing": annealing}, evidence)


@pytest.mark.parametrize("name", ANNEALING)
def test_ratio_radius_anneals(name):
    eaten, slope, what, expected = ANNEALING[name]
    assert after_annealing(eaten, slope, **what).numbers["annealing"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "annealing", "prior"),
    [(1.0, 1.0, 0.2), (1.0, 0.5, 0.1), (0.8, 0.4, 0.1), (0.5, 0.5, 0.2), (0.1, 0.5, 0.2), (3.0, 0.5, 0.1)],
)
def test_annealing_lowers_the_prior_by_what_the_schedule_has_not_taken(schedule, annealing, prior):
    evidence = Evidence(base=0.0, trial=0.0, predicted=1.0, parameter_rms=1.0, schedule=schedule)
    low, found, high = RatioRadius().bounds({"scale": 1.0, "annealing": annealing}, evidence)
    assert found == pytest.approx(prior, rel=1e-12)
    assert (low, high) == (LOW, 2.0)


def test_the_radius_takes_its_loss_of_the_prior_along():
    """From a radius at its prior, with shares that move nothing else."""
    numbers = after_annealing(0.4, -0.5, annealing=0.5, radius=0.1).numbers
    assert numbers["radius"] == pytest.approx(0.1 * math.exp(-0.1), rel=1e-12)


def test_the_radius_is_given_nothing_back_but_drifts_to_the_prior():
    assert after_annealing(0.4, 0.25, annealing=0.5, radius=0.1).numbers["radius"] == 0.1


def test_ratio_radius_holds_the_eaten_share_of_two_checks_before_it_calls_a_step_long():
    """The first check has half of the weight, so that no single batch ends burn-in."""
    rule = RatioRadius()
    numbers = {**rule.init(1.0), "radius": 1e-3}
    for expected, phase in ((1.1e-3, 1), (0.4 * 1.1e-3, 0)):
        numbers = rule.update(numbers, Evidence(base=0.0, trial=-0.55, predicted=1.0, parameter_rms=1.0)).numbers
        assert numbers["radius"] == pytest.approx(expected, rel=1e-12)
        assert numbers["phase"] == phase


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"phase": 1, "steady": 20}, 1),
        ({"phase": 0, "steady": 0}, 5),
        ({"phase": 0, "steady": 3}, 5),
        ({"phase": 0, "steady": 4}, 10),
        ({"phase": 0, "steady": 8}, 15),
        ({"phase": 0, "steady": 11}, 15),
        ({"phase": 0, "steady": 12}, 20),
        ({"phase": 0, "steady": 10**6}, 20),
        ({"phase": 0, "steady": 12, "doubts": 1}, 1),
        ({"phase": 0, "steady": 12, "doubts": 2}, 1),
        ({"phase": 0, "steady": 12, "doubts": 3}, 20),
    ],
)
def test_ratio_radius_checks_every_step_of_burn_in_and_in_doubt_and_then_the_less_often_the_steadier(numbers, expected):
    due = [RatioRadius(interval=5).check_due({"doubts": 0, **numbers}, unchecked) for unchecked in range(30)]
    assert due == [unchecked + 1 >= expected for unchecked in range(30)]


@pytest.mark.parametrize("phase", [1, 0])
def test_ratio_radius_learns_nothing_from_a_step_that_promises_nothing(phase):
    numbers = {"radius": 0.1, "phase": phase, "scale": 1.0, "steady": 3, "annealing": 0.5, "doubts": 0.0}
    numbers |= {"eaten": 0.3, "eaten_weight": 1.0, "fresh": 0.1, "fresh_weight": 1.0, "largest": 2.0}
    for trial in (1.0, 9.0, math.nan):
        evidence = Evidence(base=1.0, trial=trial, predicted=0.0, parameter_rms=1.0, fresh=1.0)
        decision = RatioRadius().update(numbers, evidence)
        assert decision.numbers == {**numbers, "radius_low": LOW, "radius_high": HIGH}
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
