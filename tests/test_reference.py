"""The package against the numpy twin and against trajectories of an independent implementation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ReferenceSOAA

from lightning_soaa import SOAA, FixedRadius, PublishedRadius, RatioRadius

CASES = json.loads((Path(__file__).parent / "data" / "soaa_trajectories.json").read_text())["cases"]


def trajectory_loss(name):
    if name == "quadratic":
        k = torch.tensor([10.0 ** (i - 3) for i in range(7)], dtype=torch.float64)
        return lambda x: 0.5 * (k * x * x).sum()
    if name == "rosenbrock":
        return lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
    rows = [[math.sin(1.7 * i + 0.9 * j * j + 0.3) for j in range(5)] for i in range(24)]
    x_data = torch.tensor(rows, dtype=torch.float64)
    y = torch.tensor([1.0 if math.cos(0.8 * i) > 0 else -1.0 for i in range(24)], dtype=torch.float64)
    return lambda w: torch.log(1 + torch.exp(-y * (x_data @ w))).mean() + 0.005 * (w * w).sum()


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_published_radius_follows_the_independent_trajectory_to_1e_10(case, foreach):
    loss_at = trajectory_loss(case["function"])
    x = torch.nn.Parameter(torch.tensor(case["x0"], dtype=torch.float64))
    optimizer = SOAA(
        [x],
        lr=case["lr"],
        betas=tuple(case["betas"]),
        eps=case["eps"],
        weight_decay=case["weight_decay"],
        radius=PublishedRadius(case["total_steps"], case["gamma"], initial_radius=case["initial_radius"]),
        foreach=foreach,
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_at(x)
        loss.backward()
        return loss

    for expected in case["params"]:
        optimizer.step(closure)
        torch.testing.assert_close(x.detach(), torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=1e-10)


RATIO = {"relative": 0.2, "target": 0.6, "interval": 5, "max_trials": 4}
SHAPES = [(3,), (2, 4), (), (0,), (5, 1)]


@st.composite
def configurations(draw):
    """A problem of several groups, and the steps at which something is not finite."""
    log_uniform = lambda low, high: draw(st.floats(low, high).map(lambda e: 10.0**e))  # noqa: E731
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
        betas = (draw(st.sampled_from([0.0, 0.5, 0.9])), draw(st.sampled_from([0.5, 0.9, 0.999])))
        groups.append(
            {
                "shapes": shapes if any(math.prod(shape) for shape in shapes) else [*shapes, (3,)],
                "lr": log_uniform(-4, 0),
                "betas": betas,
                "eps": log_uniform(-10, -3),
                "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.3])),
            }
        )
    groups[0]["betas"] = (draw(st.sampled_from([0.5, 0.9])), 0.999)
    return {
        "groups": groups,
        "radius": log_uniform(-2, 1.5),
        "gamma": draw(st.sampled_from([0.1, 0.25, 0.6])),
        "interval": draw(st.integers(1, 4)),
        "steps": draw(st.integers(1, 14) | st.integers(15, 40)),
        "bad": draw(st.sets(st.integers(0, 39), max_size=5)),
        "bad_kind": draw(st.sampled_from(["loss", "gradient", "huge"])),
        "fade": draw(st.sampled_from([1.0, 0.97, 0.8])),
        "curvature": log_uniform(-3, 3),
        "followed": draw(st.sampled_from([1.0, 1.0, 0.4, -0.5])),  # how much of what gradients say the loss does
        "foreach": draw(st.booleans()),
        "seed": draw(st.integers(0, 10**6)),
    }


def build(config):
    """Return (initial arrays by group, curvature arrays by group, noise generator)."""
    rng = np.random.default_rng(config["seed"])
    start = [[rng.normal(size=shape) for shape in group["shapes"]] for group in config["groups"]]
    curvature = [
        [config["curvature"] * 10 ** rng.uniform(-2, 0, size=shape) for shape in group["shapes"]]
        for group in config["groups"]
    ]
    return start, curvature, rng


def torch_rule(rule, config):
    if rule == "fixed":
        return FixedRadius(config["radius"])
    if rule == "published":
        return PublishedRadius(20, config["gamma"], initial_radius=config["radius"])
    return RatioRadius(**{**RATIO, "interval": config["interval"]})


@pytest.mark.parametrize("rule", ["fixed", "published", "ratio"])
@settings(max_examples=200, deadline=None, derandomize=True)
@given(config=configurations())
def test_every_rule_agrees_with_the_numpy_twin(rule, config):
    start, curvature, rng = build(config)
    params = [[torch.nn.Parameter(torch.tensor(x)) for x in xs] for xs in start]
    scales = [[torch.tensor(k) for k in ks] for ks in curvature]
    options = [{k: v for k, v in group.items() if k != "shapes"} for group in config["groups"]]
    optimizer = SOAA(
        [{"params": ps, **o} for ps, o in zip(params, options, strict=True)],
        betas=options[0]["betas"],
        eps=options[0]["eps"],
        radius=torch_rule(rule, config),
        foreach=config["foreach"],
    )
    twin = ReferenceSOAA(
        [{"x": [x.copy() for x in xs], **o} for xs, o in zip(start, options, strict=True)],
        rule,
        total_steps=20,
        gamma=config["gamma"],
        radius=config["radius"],
        options={**RATIO, "interval": config["interval"]},
    )
    for step in range(config["steps"]):
        shift = rng.normal()
        bad = step in config["bad"]
        spoil = float("nan") if bad and config["bad_kind"] == "loss" else 0.0
        followed = config["followed"]

        def loss_closure(shift=shift, spoil=spoil):
            pairs = [(k, p) for ks, ps in zip(scales, params, strict=True) for k, p in zip(ks, ps, strict=True)]
            return sum((0.5 * k * (p - shift) ** 2 + torch.cos(p)).sum() for k, p in pairs) + spoil

        def closure(loss_closure=loss_closure, bad=bad):
            optimizer.zero_grad()
            loss = loss_closure()
            loss.backward()
            if bad and config["bad_kind"] == "gradient":
                for ps in params:
                    for p in ps:
                        p.grad.fill_(float("inf"))
            if bad and config["bad_kind"] == "huge":
                for ps in params:
                    for p in ps:
                        p.grad.mul_(1e6)
            return loss.detach()

        def twin_loss(shift=shift, spoil=spoil):
            pairs = [
                (k, x) for ks, g in zip(curvature, twin.groups, strict=True) for k, x in zip(ks, g["x"], strict=True)
            ]
            return sum(np.sum(0.5 * k * (x - shift) ** 2 + np.cos(x)) for k, x in pairs) + spoil

        twin_grads = [
            [k * (x - shift) - np.sin(x) for k, x in zip(ks, g["x"], strict=True)]
            for ks, g in zip(curvature, twin.groups, strict=True)
        ]
        if bad and config["bad_kind"] == "gradient":
            twin_grads = [[np.full_like(g, np.inf) for g in gs] for gs in twin_grads]
        if bad and config["bad_kind"] == "huge":
            twin_grads = [[g * 1e6 for g in gs] for gs in twin_grads]
        for group, mirror in zip(optimizer.param_groups, twin.groups, strict=True):
            group["lr"] = mirror["lr"] = mirror["lr"] * config["fade"]
        optimizer.step(lambda: followed * closure(), loss_closure=lambda: followed * loss_closure())  # noqa: B023
        twin.step(twin_grads, followed * twin_loss(), lambda: followed * twin_loss())  # noqa: B023
        for ps, group in zip(params, twin.groups, strict=True):
            for p, x in zip(ps, group["x"], strict=True):
                np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-9, atol=1e-10)
        assert optimizer.radius == pytest.approx(twin.d, rel=1e-9)
    report = optimizer.last_step
    assert (report.skipped_steps, report.outlier_steps) == (twin.skipped, twin.outliers)
    assert report.total_trials == twin.trials
