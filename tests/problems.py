"""Small problems that several test files step on."""

import torch

from lightning_soaa import SOAA, FixedRadius, PublishedRadius, RatioRadius

RULES = {"fixed": FixedRadius(0.5), "published": PublishedRadius(50), "ratio": RatioRadius()}


class Believing(RatioRadius):
    """Goes by ratios whatever they say, as RatioRadius does where the floor is the parameters' resolution."""

    doubts = False


def rounded(weight):
    """Straight-through: rounded to eighths forward, as it is backward."""
    return weight + ((weight * 8).round() / 8 - weight).detach()


class Problem:
    """A float64 regression whose optimizer can be stepped one batch at a time.

    Args:
        rule: name in RULES, or a rule.
        dtype: dtype of the parameters.
        options: keywords of SOAA.
        grouped: one parameter group for each layer instead of a single one.
    """

    def __init__(self, rule="ratio", *, dtype=torch.float64, seed=0, grouped=False, **options):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.x, self.y = draw(12, 24, 6).to(dtype), draw(12, 24, 2).to(dtype)
        shapes = [(6, 8), (8,), (8, 2), ()]
        self.params = [torch.nn.Parameter((draw(*shape) / 3).to(dtype)) for shape in shapes]
        groups = [{"params": [p]} for p in self.params] if grouped else self.params
        self.optimizer = SOAA(groups, radius=RULES.get(rule, rule), **options)
        self.calls, self.batch, self.spoil = {"closure": 0, "loss": 0}, 0, 1.0

    def loss(self):
        first, bias, second, scale = self.params
        out = torch.tanh(self.x[self.batch % 12] @ first + bias) @ second * (1 + scale)
        return (out - self.y[self.batch % 12]).square().mean() * self.spoil

    def closure(self):
        self.calls["closure"] += 1
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def loss_closure(self):
        self.calls["loss"] += 1
        return self.loss()

    def step(self):
        returned = self.optimizer.step(self.closure, loss_closure=self.loss_closure)
        self.batch += 1
        return returned

    def run(self, steps):
        for _ in range(steps):
            self.step()
        return self

    def facts(self):
        """Everything that a step may change, as a flat dict of copies."""
        facts = {f"param {i}": p.detach().clone() for i, p in enumerate(self.params)}
        for i, p in enumerate(self.params):
            for key, value in self.optimizer.state.get(p, {}).items():
                facts[f"state {i} {key}"] = value.clone() if isinstance(value, torch.Tensor) else value
        for i, group in enumerate(self.optimizer.param_groups):
            facts |= {f"group {i} {key}": value for key, value in group.items() if key != "params"}
        return facts


def drive(optimizer, loss, steps=1):
    """Step `optimizer` on `loss`, a function of nothing; return the last loss before a step."""

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(steps):
        value = optimizer.step(closure, loss_closure=loss)
    return value.item()


def assert_same(left, right, *, but=()):
    """Equal keys, equal bits."""
    assert left.keys() == right.keys()
    for key, value in left.items():
        if any(part in key for part in but):
            continue
        if isinstance(value, torch.Tensor):
            assert value.dtype == right[key].dtype, key
            assert torch.equal(value, right[key]), key
        else:
            assert value == right[key] or (value != value and right[key] != right[key]), key
