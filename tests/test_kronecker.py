"""KroneckerFisher: what it is in full matrices, where it is the diagonal, and what a rotation of the problem does."""

import copy
import math

import numpy as np
import pytest
import torch
from problems import Problem, assert_same, drive
from torch import nn

from lightning_soaa import SOAA, DiagonalFisher, FixedRadius, KroneckerFisher, PublishedRadius, RatioRadius
from lightning_soaa._bases import (
    RIDGE,
    due,
    first_bases,
    offsets,
    refreshed,
    rotate,
    rotate_back,
    rotated_sides,
    unit_factor,
)
from lightning_soaa._state import numbers_of

RULES = {"fixed": FixedRadius(0.5), "published": PublishedRadius(50), "ratio": RatioRadius()}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def orthogonal(size, seed):
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[
        0
    ]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def losses_of(optimizer, loss_at, steps):
    """Take `steps` steps and return the losses before them."""
    return [drive(optimizer, loss_at) for _ in range(steps)]


class FullMatrices:
    """One parameter under FixedRadius, the Kronecker product of its bases formed in full. Slow, never optimised."""

    def __init__(self, x, *, lr, betas, eps, radius, decay, refresh_every):
        self.turns = (3, 2) if x.shape[0] >= x.shape[1] else (2, 3)  # the longer side has the last step's turn
        self.x, self.lr, self.betas, self.eps, self.radius = x.copy(), lr, betas, eps, radius
        self.decay, self.refresh_every, self.t = decay, refresh_every, 0
        self.m, self.v = np.zeros(x.size), np.zeros(x.size)

    def step(self, g):
        self.t += 1
        b1, b2 = self.betas
        products = [g @ g.T, g.T @ g]
        if self.t == 1:
            self.factors = products
            self.bases = [np.linalg.eigh(self.unit(f))[1][:, ::-1] for f in products]
        both = np.kron(*self.bases)  # of row-major entries: P' G Q is kron(P, Q)' vec(G)
        self.m = b1 * self.m + (1 - b1) * g.ravel()
        self.v = b2 * self.v + (1 - b2) * (both.T @ g.ravel()) ** 2
        mh, vh = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        fisher = (1 + np.sum(mh**2) / np.sum(vh + self.eps)) * vh
        u = self.radius * (both.T @ mh) / (np.maximum(self.radius * fisher, np.sqrt(vh)) + self.eps)
        if self.t > 1:
            self.x = self.x - self.lr * (both @ np.clip(u, -self.radius, self.radius)).reshape(self.x.shape)
            keep = self.decay
            self.factors = [keep * f + (1 - keep) * p for f, p in zip(self.factors, products, strict=True)]
            for side in (0, 1):
                if self.t % self.refresh_every == self.turns[side]:
                    self.refresh(side)

    def refresh(self, side):
        turned = self.unit(self.factors[side]) @ self.bases[side]
        order = np.argsort(-np.sum(self.bases[side] * turned, axis=0), kind="stable")
        self.bases[side] = np.linalg.qr(turned[:, order])[0]
        self.v = np.take(self.v.reshape(self.x.shape), order, axis=side).ravel()

    @staticmethod
    def unit(factor):
        return factor / np.trace(factor) + 1e-6 * np.eye(len(factor))


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (2, 2)])
@pytest.mark.parametrize("radius", [0.3, 30.0])
def test_steps_are_those_of_the_full_kronecker_product(shape, radius):
    start = noise(*shape, seed=1)
    x = nn.Parameter(start.clone())
    options = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-8}
    fisher = KroneckerFisher(refresh_every=4, decay=0.8)
    optimizer = SOAA([x], radius=FixedRadius(radius), fisher=fisher, **options)
    twin = FullMatrices(start.numpy(), radius=radius, decay=0.8, refresh_every=4, **options)
    for step in range(25):
        g = noise(*shape, seed=10 + step) + x.detach()
        x.grad = g
        twin.step(g.numpy())
        optimizer.step()
        np.testing.assert_allclose(x.detach().numpy(), twin.x, atol=1e-10, rtol=1e-10)
    assert not np.allclose(twin.x, start.numpy())


@each_rule
@pytest.mark.parametrize("foreach", [True, False])
def test_where_no_side_is_rotated_it_is_the_diagonal_bit_for_bit(rule, foreach):
    points = []
    for fisher in (DiagonalFisher(), KroneckerFisher(max_dim=1)):
        params = [nn.Parameter(noise(*shape, seed=len(shape))) for shape in ((3, 4), (5,), (), (2, 3, 2))]
        optimizer = SOAA(params, lr=0.03, radius=rule, fisher=fisher, foreach=foreach, weight_decay=0.1)
        losses = losses_of(
            optimizer, lambda params=params: sum(((p - 1).square() * 3).sum().cosh() for p in params), 40
        )
        points.append([*(p.detach() for p in params), torch.tensor(losses)])
    assert all(torch.equal(a, b) for a, b in zip(*points, strict=True))


def rotated_quadratic(left, right):
    """A quadratic in a 5 x 5 matrix, seen in coordinates that `left` and `right` turn."""
    slopes = torch.diag(torch.logspace(0, -2, 5, dtype=torch.float64))
    x = nn.Parameter(left @ noise(5, 5, seed=3) @ right.T)
    shift = noise(5, 5, seed=4)

    def loss_at():
        y = left.T @ x @ right - shift
        return (slopes @ y @ slopes * y).sum() / 2

    return x, loss_at


@pytest.mark.parametrize("rule", [FixedRadius(0.1), RatioRadius()], ids=["fixed", "ratio"])
def test_a_rotated_problem_gives_the_rotated_trajectory(rule):
    """Turning rows and columns of the problem turns every step with it, checks and masks included."""
    left, right = orthogonal(5, 5), orthogonal(5, 6)
    results = []
    for p, q in ((torch.eye(5, dtype=torch.float64),) * 2, (left, right)):
        x, loss_at = rotated_quadratic(p, q)
        losses = losses_of(SOAA([x], radius=rule, fisher=KroneckerFisher(refresh_every=3)), loss_at, 30)
        results.append((p.T @ x.detach() @ q, torch.tensor(losses)))
    for plain, turned in zip(*results, strict=True):
        torch.testing.assert_close(plain, turned, atol=1e-8, rtol=1e-6)


def test_a_quadratic_with_a_kronecker_hessian_takes_fewer_steps_than_under_the_diagonal():
    left, right = orthogonal(5, 5), orthogonal(5, 6)
    ends = []
    for fisher in (KroneckerFisher(), DiagonalFisher()):
        x, loss_at = rotated_quadratic(left, right)
        ends.append(min(losses_of(SOAA([x], fisher=fisher), loss_at, 150)))
    assert ends[0] < 0.1 * ends[1]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), (0, 0)),
        ((7,), (0, 0)),
        ((3, 4), (3, 4)),
        ((3, 2, 2), (3, 4)),
        ((9, 4), (0, 4)),
        ((3, 9), (3, 0)),
        ((9, 9), (0, 0)),
        ((1, 4), (0, 4)),
        ((4, 1), (4, 0)),
        ((0, 4), (0, 0)),
        ((8, 8), (8, 8)),
    ],
)
def test_sides_of_matrices_are_rotated_up_to_the_longest(shape, expected):
    assert rotated_sides(shape, 8) == expected


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 2, 2), (4, 3, 1)])
def test_rotating_back_undoes_a_rotation(shape):
    x = noise(*shape)
    left, right = (
        torch.stack([orthogonal(size, seed + side) for seed in range(0, 2 * len(x), 2)])
        for side, size in enumerate(shape[1:])
    )
    torch.testing.assert_close(rotate_back(rotate(x, left, right), left, right), x, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(rotate(x, left, right)[1], left[1].T @ x[1] @ right[1], atol=1e-13, rtol=1e-12)
    assert torch.equal(rotate(x, left[:, :0, :0], right[:, :0, :0]), x)


def test_the_first_gradient_makes_the_bases_and_moves_no_rotated_parameter():
    x, bias = nn.Parameter(noise(3, 4)), nn.Parameter(noise(4))
    before, before_bias = x.detach().clone(), bias.detach().clone()
    optimizer = SOAA([x, bias], lr=0.1, radius=FixedRadius(), fisher=KroneckerFisher())
    losses_of(optimizer, lambda: (x @ x.T).square().sum() + (bias**4).sum(), 1)
    assert torch.equal(x, before)
    assert not torch.equal(bias, before_bias)
    assert optimizer.last_step.step_norm == pytest.approx(float((bias.detach() - before_bias).norm()))
    state = optimizer.state[x]
    turned = state["left_basis"].T @ state["left"] @ state["left_basis"]
    torch.testing.assert_close(turned, torch.diag(turned.diagonal()), atol=1e-8, rtol=0)
    assert (turned.diagonal().diff() <= 0).all()


def test_a_first_gradient_that_is_not_finite_leaves_bases_that_later_ones_turn():
    x = nn.Parameter(noise(3, 4))
    optimizer = SOAA([x], lr=0.01, radius=FixedRadius(), fisher=KroneckerFisher(refresh_every=2))
    x.grad = torch.full_like(x, math.nan)
    optimizer.step()
    assert torch.equal(optimizer.state[x]["left_basis"], torch.eye(3, dtype=torch.float64))
    losses_of(optimizer, lambda: (x @ x.T).square().sum(), 30)
    assert all(value.isfinite().all() for value in optimizer.state[x].values() if isinstance(value, torch.Tensor))
    assert not torch.equal(optimizer.state[x]["left_basis"], torch.eye(3, dtype=torch.float64))


def test_columns_are_sorted_and_take_their_second_moments_along():
    basis = orthogonal(4, 7)
    factor = basis @ torch.diag(torch.tensor([1.0, 8.0, 2.0, 4.0], dtype=torch.float64)) @ basis.T
    new, order, turned = refreshed(factor[None], basis[None])
    assert order.tolist() == [[1, 3, 2, 0]]
    assert turned.tolist() == [[[True]]]
    torch.testing.assert_close(new[0].abs(), basis[:, order[0]].abs(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_basis_that_comes_out_not_finite_is_the_one_before(bad):
    basis = torch.stack([orthogonal(4, 7), orthogonal(4, 8)])
    factor = torch.stack([torch.full((4, 4), bad), torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))]).double()
    new, order, turned = refreshed(factor, basis)
    assert turned.flatten().tolist() == [False, True]
    assert torch.equal(new[0], basis[0])
    assert order[0].tolist() == [0, 1, 2, 3]
    assert new[1].isfinite().all()


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_bases_do_not_depend_on_the_unit_of_the_gradient(scale):
    g, unit = noise(5, 3).float(), torch.eye(5)[None]
    factor = ((g * scale) @ (g * scale).T)[None]
    for new in (first_bases(factor, unit), refreshed(factor, orthogonal(5, 1).float()[None])[0]):
        assert not torch.equal(new, unit)
        torch.testing.assert_close(new.mT @ new, unit, atol=2e-6, rtol=0)


def test_bases_hold_nothing_so_small_that_products_with_it_are_slow():
    factor = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))[None]
    factor[0, 0, 1:] = factor[0, 1:, 0] = torch.tensor([1e-20, 1e-12, 1e-3])
    raw = torch.linalg.qr(unit_factor(factor) + RIDGE * torch.eye(4))[0]
    new = refreshed(factor, torch.eye(4)[None])[0]
    assert ((raw != 0) & (raw.abs() < 1e-14)).any()
    assert torch.equal(new, torch.where(raw.abs() < 1e-14, 0.0, raw))


def test_bases_are_orthonormal_after_ten_thousand_steps_in_float32():
    fisher, generator = KroneckerFisher(), torch.Generator().manual_seed(0)
    x = nn.Parameter(torch.zeros(6, 3))
    optimizer = SOAA([x], radius=FixedRadius(1e-4), fisher=fisher)
    for step in range(10_000):
        x.grad = torch.randn(6, 3, generator=generator) * (1 + step % 7)
        optimizer.step()
    for name, size in (("left_basis", 6), ("right_basis", 3)):
        basis = optimizer.state[x][name]
        torch.testing.assert_close(basis.T @ basis, torch.eye(size), atol=1e-5, rtol=0)


def test_parameters_take_turns_to_refresh():
    params = [nn.Parameter(noise(3, 3, seed=i)) for i in range(5)]
    optimizer = SOAA(params, radius=FixedRadius(1e-3), fisher=KroneckerFisher(refresh_every=5))
    loss_at = lambda: sum((p @ p.T).square().sum() for p in params)  # noqa: E731
    losses_of(optimizer, loss_at, 1)
    turns = []
    for _ in range(10):
        before = [optimizer.state[p]["left_basis"].clone() for p in params]
        losses_of(optimizer, loss_at, 1)
        turned = [not torch.equal(optimizer.state[p]["left_basis"], b) for p, b in zip(params, before, strict=True)]
        turns.append(turned.index(True))
        assert sum(turned) == 1
    assert sorted(turns) == sorted([*range(5), *range(5)])


@each_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_run_resumes_bit_for_bit(rule, dtype, tmp_path):
    def start():
        params = [nn.Parameter(noise(3, 4).to(dtype)), nn.Parameter(noise(4, seed=1).to(dtype))]
        optimizer = SOAA(params, lr=0.01, radius=rule, fisher=KroneckerFisher(refresh_every=4))
        return params, optimizer, lambda: (params[0] @ params[0].T).square().sum() + (params[1] ** 4).sum()

    params, optimizer, loss_at = start()
    losses_of(optimizer, loss_at, 9)
    others, resumed, other_loss = start()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        for mine, theirs in zip(others, params, strict=True):
            mine.copy_(theirs)
    assert losses_of(resumed, other_loss, 9) == losses_of(optimizer, loss_at, 9)
    for mine, theirs in zip(others, params, strict=True):
        assert torch.equal(mine, theirs)
        assert_same(dict(resumed.state[mine]), dict(optimizer.state[theirs]))
        least = torch.promote_types(dtype, torch.float32)
        assert {value.dtype for value in resumed.state[mine].values() if isinstance(value, torch.Tensor)} == {least}


def test_state_of_another_fisher_is_refused_and_changes_nothing():
    x = nn.Parameter(noise(3, 4))
    diagonal = SOAA([x], radius=FixedRadius())
    losses_of(diagonal, lambda: x.square().sum(), 2)
    kronecker = SOAA([x], radius=FixedRadius(), fisher=KroneckerFisher())
    with pytest.raises(ValueError, match=r"SOAA: `state_dict\['state'\]\[0\]` must be one with `basis_age`, `left`, "):
        kronecker.load_state_dict(diagonal.state_dict())
    assert not kronecker.state


def test_a_rejected_check_leaves_every_bit_of_parameters_and_a_raise_every_bit_of_state():
    x = nn.Parameter(noise(3, 4))
    optimizer = SOAA([x], radius=RatioRadius(max_trials=1), fisher=KroneckerFisher(refresh_every=2))
    loss_at = lambda: (x @ x.T).square().sum()  # noqa: E731
    losses_of(optimizer, loss_at, 8)
    before = x.detach().clone()
    base = loss_at()
    x.grad = None
    base.backward()
    optimizer.step(lambda: base, loss_closure=lambda: 1e6)
    assert not optimizer.last_step.accepted
    assert torch.equal(x, before)
    head = optimizer.param_groups[0]
    while not optimizer.radius_rule.check_due(numbers_of(head), head["unchecked_steps"]):
        losses_of(optimizer, loss_at, 1)
    state = copy.deepcopy(dict(optimizer.state[x]))
    with pytest.raises(ZeroDivisionError):
        optimizer.step(loss_closure=lambda: 1 / 0)
    assert_same(state, dict(optimizer.state[x]))


def test_autocast_of_the_caller_changes_no_bit():
    ends = []
    for enabled in (False, True):
        x = nn.Parameter(noise(6, 5).float())
        optimizer = SOAA([x], radius=FixedRadius(0.1), fisher=KroneckerFisher(refresh_every=3))
        for step in range(12):
            x.grad = noise(6, 5, seed=step).float()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                optimizer.step()
        ends.append(x.detach())
    assert torch.equal(*ends)


def test_complex_parameters_and_empty_ones_train():
    x = nn.Parameter(torch.view_as_complex(noise(3, 4, 2)))
    empty = nn.Parameter(torch.zeros(0, 4, dtype=torch.float64))
    optimizer = SOAA([x, empty], fisher=KroneckerFisher())
    losses = losses_of(optimizer, lambda: (x - 1).abs().square().sum() + empty.sum(), 80)
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_bytes_of_state_are_known_before_training(dtype):
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((3, 4), (5,), (2, 3, 4), (40, 2))]
    fisher = KroneckerFisher(max_dim=20)
    predicted = fisher.state_bytes(params)
    optimizer = SOAA(params, radius=FixedRadius(), fisher=fisher)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert predicted == sum(value.numel() * value.element_size() for value in kept)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_dim": 0}, ValueError, "KroneckerFisher: `max_dim` must be >= 1, got 0"),
        ({"max_dim": 2.0}, TypeError, "KroneckerFisher: `max_dim` must be an int, got 2.0"),
        ({"refresh_every": 0}, ValueError, "KroneckerFisher: `refresh_every` must be >= 1, got 0"),
        ({"decay": 1.0}, ValueError, "KroneckerFisher: `decay` must be in (0, 1), got 1.0"),
        ({"decay": 0}, ValueError, "KroneckerFisher: `decay` must be in (0, 1), got 0.0"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, error, message):
    with pytest.raises(error) as caught:
        KroneckerFisher(**options)
    assert str(caught.value) == message


def test_sharded_parameters_are_refused_by_name(monkeypatch):
    monkeypatch.setattr("lightning_soaa.kronecker.is_sharded", lambda tensor: True)
    x = nn.Parameter(noise(3, 4))
    x.grad = noise(3, 4)
    optimizer = SOAA([x], radius=FixedRadius(), fisher=KroneckerFisher())
    with pytest.raises(ValueError) as caught:
        optimizer.step()
    assert str(caught.value) == (
        "SOAA: `fisher` must be DiagonalFisher() where parameters are sharded, got KroneckerFisher; leave it out, or "
        "train with DDP"
    )


@pytest.mark.parametrize("rule", [RatioRadius(), PublishedRadius(200)], ids=["ratio", "published"])
def test_reports_hold_statistics_in_the_bases(rule):
    x = nn.Parameter(noise(4, 3))
    optimizer = SOAA([x], lr=0.01, radius=rule, fisher=KroneckerFisher())
    losses_of(optimizer, lambda: (x @ x.T).square().sum(), 20)
    report = optimizer.last_step
    second = optimizer.state[x]["v"] / (1 - optimizer.param_groups[0]["betas"][1] ** 20)
    assert report.fisher_min / report.fisher_max == pytest.approx(float(second.min() / second.max()), rel=1e-9)
    assert report.step_norm > 0


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_step_that_is_skipped_turns_nothing(request, accelerated):
    if accelerated:
        request.getfixturevalue("accelerator")
    problem = Problem(FixedRadius(0.01), fisher=KroneckerFisher(refresh_every=1)).run(5)
    before = {key: value for key, value in problem.facts().items() if isinstance(value, torch.Tensor)}
    problem.spoil = math.nan
    after = problem.run(3).facts()
    assert_same(before, {key: after[key] for key in before})


class Failing:
    """torch.linalg.eigh and torch.geqrf, which fail from some call on."""

    def __init__(self, monkeypatch, name, how):
        place = torch if name == "geqrf" else torch.linalg
        self.inner, self.how, self.fails, self.calls = getattr(place, name), how, False, 0
        monkeypatch.setattr(place, name, self)

    def __call__(self, matrix):
        self.calls += 1
        if not self.fails:
            return self.inner(matrix)
        if self.how == "raises":
            raise torch.linalg.LinAlgError("no convergence")
        return tuple(part * math.nan for part in self.inner(matrix))


@pytest.mark.parametrize("how", ["raises", "nan"])
@pytest.mark.parametrize("name", ["eigh", "geqrf"])
def test_a_decomposition_that_fails_leaves_the_bases_and_training_goes_on(monkeypatch, name, how):
    failing = Failing(monkeypatch, name, how)
    x = nn.Parameter(noise(4, 3))
    optimizer = SOAA([x], radius=FixedRadius(0.01), fisher=KroneckerFisher(refresh_every=1))
    loss_at = lambda: (x @ x.T).square().sum()  # noqa: E731
    if name == "geqrf":
        losses_of(optimizer, loss_at, 3)
    failing.fails, before = True, failing.calls
    sizes = {"left_basis": 4, "right_basis": 3}
    bases = {key: optimizer.state[x].get(key, torch.eye(size).double()).clone() for key, size in sizes.items()}
    first = losses_of(optimizer, loss_at, 1 if name == "eigh" else 20)[0]
    assert failing.calls > before
    assert all(torch.equal(optimizer.state[x][key], kept) for key, kept in bases.items())
    assert float(optimizer.state[x]["basis_age"].max()) == (0 if name == "eigh" else 20)
    failing.fails = False
    losses = losses_of(optimizer, loss_at, 20)
    assert losses[-1] < first
    assert not any(torch.equal(optimizer.state[x][key], kept) for key, kept in bases.items())
    assert float(optimizer.state[x]["basis_age"].max()) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_of_16_bits_keep_factors_and_bases_of_32(dtype):
    x = nn.Parameter(noise(4, 3).to(dtype))
    optimizer = SOAA([x], fisher=KroneckerFisher(refresh_every=2))
    losses = losses_of(optimizer, lambda: (x.float() - 1).square().sum(), 60)
    assert losses[-1] < 0.1 * losses[0]
    kept = {key: value for key, value in optimizer.state[x].items() if isinstance(value, torch.Tensor)}
    assert {value.dtype for value in kept.values()} == {torch.float32}
    basis = kept["left_basis"]
    torch.testing.assert_close(basis.T @ basis, torch.eye(4), atol=1e-5, rtol=0)


@each_rule
def test_stacked_parameters_step_as_they_do_in_groups_of_their_own(rule):
    """Up to rounding, where all bases have a turn on each step."""
    ends = []
    for grouped in (False, True):
        params = [nn.Parameter(noise(4, 3, seed=i)) for i in range(3)]
        groups = [{"params": [p]} for p in params] if grouped else params
        optimizer = SOAA(groups, lr=0.01, radius=rule, fisher=KroneckerFisher(refresh_every=1))
        losses = losses_of(optimizer, lambda params=params: sum((p @ p.T).square().sum() for p in params), 15)
        ends.append(torch.cat([torch.stack([p.detach() for p in params]).flatten(), torch.tensor(losses)]))
    torch.testing.assert_close(*ends, atol=1e-10, rtol=1e-10)


@each_rule
def test_a_stack_of_copies_steps_as_one_in_one_memory_bit_for_bit(rule):
    together = [nn.Parameter(noise(4, 3, seed=i)) for i in range(3)]
    loss_at = lambda params: sum((p @ p.T).square().sum() for p in params)  # noqa: E731
    optimizer = SOAA(together, lr=0.01, radius=rule, fisher=KroneckerFisher(refresh_every=3))
    losses_of(optimizer, lambda: loss_at(together), 12)
    storages = {optimizer.state[p]["left"].untyped_storage().data_ptr() for p in together}
    assert len(storages) == 1
    apart = [nn.Parameter(noise(4, 3, seed=i)) for i in range(3)]
    other = SOAA(apart, lr=0.01, radius=rule, fisher=KroneckerFisher(refresh_every=3))
    losses_of(other, lambda: loss_at(apart), 1)
    for p in apart:  # nowhere side by side any more
        other.state[p].update({k: v.clone() for k, v in other.state[p].items() if isinstance(v, torch.Tensor)})
    losses_of(other, lambda: loss_at(apart), 11)
    for mine, theirs in zip(together, apart, strict=True):
        assert torch.equal(mine, theirs)
        assert_same(dict(optimizer.state[mine]), dict(other.state[theirs]))


def test_a_parameter_without_a_gradient_leaves_its_stack_and_comes_back():
    params = [nn.Parameter(noise(4, 3, seed=i)) for i in range(3)]
    optimizer = SOAA(params, radius=FixedRadius(0.01), fisher=KroneckerFisher(refresh_every=2))
    loss_at = lambda some: sum((p @ p.T).square().sum() for p in some)  # noqa: E731
    drive(optimizer, lambda: loss_at(params), 4)
    kept = copy.deepcopy(dict(optimizer.state[params[1]]))
    drive(optimizer, lambda: loss_at(params[::2]), 4)
    assert_same(kept, dict(optimizer.state[params[1]]))
    before = [p.detach().clone() for p in params]
    drive(optimizer, lambda: loss_at(params), 4)
    assert [optimizer.state[p]["step"] for p in params] == [12, 8, 12]
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_a_stack_larger_than_a_block_is_worked_on_in_parts(monkeypatch):
    ends = []
    for size in (2**18, 24):
        monkeypatch.setattr("lightning_soaa._bucket.CACHED", size)
        params = [nn.Parameter(noise(4, 3, seed=i)) for i in range(5)]
        optimizer = SOAA(params, lr=0.01, radius=FixedRadius(0.1), fisher=KroneckerFisher(refresh_every=100))
        losses_of(optimizer, lambda params=params: sum((p @ p.T).square().sum() for p in params), 12)
        ends.append(torch.stack([p.detach() for p in params]))
    torch.testing.assert_close(*ends, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("sides", "every"),
    [(((1, 256), (1, 64)), 10), (((2, 64), (2, 256), (3, 64), (1, 97), (1, 192)), 10), (((200, 50), (200, 50)), 10)],
)
def test_no_step_bears_much_more_than_its_share_of_the_refreshes(sides, every):
    chosen = offsets(sides, every)
    turns = [
        [due(step, offset, count, every) for offset, (count, _) in zip(chosen, sides, strict=True)]
        for step in range(every)
    ]
    for index, (count, _) in enumerate(sides):
        assert sorted(row for turn in turns for row in range(count)[turn[index]]) == list(range(count))
    loads = [sum(length**3 * len(range(n)[turn]) for turn, (n, length) in zip(t, sides, strict=True)) for t in turns]
    largest = max(length**3 for _, length in sides)
    assert max(loads) <= max(largest, 1.2 * sum(loads) / every)


def test_a_schedule_of_rare_refreshes_takes_no_time_to_make():
    assert offsets(((1, 8), (1, 8)), 10**9) != (0, 0)


def test_the_age_of_a_basis_is_the_steps_since_it_was_refreshed():
    x, tall, bias = nn.Parameter(noise(4, 3)), nn.Parameter(noise(30, 3)), nn.Parameter(noise(3))
    optimizer = SOAA([x, tall, bias], radius=FixedRadius(1e-3), fisher=KroneckerFisher(max_dim=8, refresh_every=4))
    loss_at = lambda: (x @ x.T).square().sum() + (tall @ bias).square().sum() + tall.square().sum()  # noqa: E731
    ages = []
    for _ in range(12):
        drive(optimizer, loss_at)
        ages.append(optimizer.last_step.basis_age)
        assert optimizer.last_step.rotated_fraction == (12 + 90) / (12 + 90 + 3)
    assert ages[0] == 0
    assert max(ages) == 3
    assert optimizer.state[tall]["basis_age"].tolist()[0] == 0  # that side is not rotated
    assert not optimizer.state[bias]["basis_age"].numel()


def test_the_diagonal_reports_no_bases():
    optimizer = SOAA([x := nn.Parameter(noise(3))], radius=FixedRadius(1e-3))
    drive(optimizer, lambda: x.square().sum())
    assert math.isnan(optimizer.last_step.basis_age)
    assert math.isnan(optimizer.last_step.rotated_fraction)


def test_a_check_copies_no_factor_and_leaves_the_state_until_it_is_decided():
    x = nn.Parameter(noise(3, 4))
    optimizer = SOAA([x], fisher=KroneckerFisher(refresh_every=1))
    loss_at, seen = (lambda: (x @ x.T).square().sum()), []
    losses_of(optimizer, loss_at, 4)
    before = copy.deepcopy(dict(optimizer.state[x]))
    loss = loss_at()
    x.grad = None
    loss.backward()
    optimizer.step(lambda: loss, loss_closure=lambda: seen.append(copy.deepcopy(dict(optimizer.state[x]))) or loss_at())
    assert seen
    for each in seen:
        assert_same(before, each, but=("step",))
    assert not torch.equal(before["left_basis"], optimizer.state[x]["left_basis"])
