"""A Fisher for each parameter group: what it steps as, where it is kept, what is refused."""

import copy
import pickle

import pytest
import torch
from problems import Problem, assert_same, drive
from torch import nn

from lightning_soaa import SOAA, DiagonalFisher, FixedRadius, KroneckerFisher, PublishedRadius, RatioRadius

RULES = {"fixed": FixedRadius(0.5), "published": PublishedRadius(50), "ratio": RatioRadius()}
KRONECKER = KroneckerFisher(refresh_every=3)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Pair:
    """Two matrices in a group each, the first with a Fisher of its own."""

    def __init__(self, first=KRONECKER, rule=None, **options):
        self.params = [nn.Parameter(noise(4, 3, seed=1)), nn.Parameter(noise(3, 5, seed=2))]
        groups = [{"params": [self.params[0]], "fisher": first}, {"params": [self.params[1]]}]
        self.optimizer = SOAA(groups, lr=0.01, radius=rule or RatioRadius(), **options)

    def loss(self):
        return (self.params[0] @ self.params[1]).square().sum() + (self.params[1] - 1).square().sum()

    def run(self, steps):
        return [drive(self.optimizer, self.loss) for _ in range(steps)]

    def state(self, index):
        return dict(self.optimizer.state[self.params[index]])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_where_all_groups_have_one_it_is_that_fisher_bit_for_bit(rule):
    groups = lambda: [nn.Parameter(noise(4, 3, seed=1)), nn.Parameter(noise(3, 5, seed=2))]  # noqa: E731
    ends = []
    for own, joint in ((KRONECKER, DiagonalFisher()), (None, KRONECKER)):
        params = groups()
        dicts = [{"params": [p], "fisher": own} if own else {"params": [p]} for p in params]
        optimizer = SOAA(dicts, lr=0.01, radius=rule, fisher=joint, weight_decay=0.1)
        losses = [drive(optimizer, lambda params=params: (params[0] @ params[1]).square().sum()) for _ in range(30)]
        ends.append([*(p.detach() for p in params), torch.tensor(losses)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_each_group_keeps_the_state_of_its_own_and_trains(rule):
    pair = Pair(rule=rule)
    losses = pair.run(40)
    assert "left_basis" in pair.state(0)
    assert "left_basis" not in pair.state(1)
    assert losses[-1] < losses[0]


def test_it_is_kept_out_of_param_groups_and_of_the_dict_that_the_user_gave():
    given = {"params": [nn.Parameter(noise(4, 3))], "fisher": KRONECKER}
    optimizer = SOAA([given], radius=FixedRadius())
    assert given["fisher"] is KRONECKER
    assert "fisher" not in optimizer.param_groups[0]
    assert all("fisher" not in group for group in optimizer.state_dict()["param_groups"])
    assert optimizer.rotates
    assert not SOAA(given["params"]).rotates


def test_a_run_resumes_bit_for_bit(tmp_path):
    pair, other = Pair(), Pair()
    pair.run(9)
    torch.save(pair.optimizer.state_dict(), tmp_path / "state.pt")
    other.optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        for mine, theirs in zip(other.params, pair.params, strict=True):
            mine.copy_(theirs)
    assert other.run(9) == pair.run(9)
    for index in (0, 1):
        assert_same(other.state(index), pair.state(index))


def test_state_that_the_fishers_of_the_groups_do_not_keep_is_refused():
    pair = Pair()
    pair.run(3)
    with pytest.raises(
        ValueError, match=r"`state_dict\['state'\]\[0\]` must be one with `last_portion`, .*`m`, .*`step`, `v`, got"
    ):
        Pair(first=None).optimizer.load_state_dict(pair.optimizer.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_alike(copied):
    pair = Pair()
    pair.run(5)
    other = copied(pair)
    assert other.run(6) == pair.run(6)
    assert other.optimizer.rotates


def test_a_group_that_is_added_brings_its_own():
    pair = Pair(first=None)
    pair.run(3)
    assert not pair.optimizer.rotates
    x = nn.Parameter(noise(2, 2))
    pair.optimizer.add_param_group({"params": [x], "fisher": KRONECKER})
    loss = lambda: pair.loss() + (x - 1).square().sum()  # noqa: E731
    for _ in range(5):
        drive(pair.optimizer, loss)
    assert "left_basis" in pair.optimizer.state[x]
    assert "left_basis" not in pair.state(0)
    assert pair.optimizer.last_step.rotated_fraction == 4 / (12 + 15 + 4)


def test_a_group_of_another_soaa_does_not_bring_its_own():
    optimizer = SOAA(Pair().optimizer.param_groups)
    assert not optimizer.rotates


def test_groups_of_one_fisher_step_as_they_do_in_one_group():
    """The sums of step 3 run over all groups, whatever Fisher they have."""
    ends = []
    for own in (None, DiagonalFisher()):
        problem = Problem("published", grouped=True)
        problem.optimizer._own_fishers = [own, None, None, None]
        ends.append(problem.run(20).facts())
    assert_same(*ends)


@pytest.mark.parametrize("wrong", ["kronecker", 0, KroneckerFisher])
def test_what_is_no_fisher_is_refused_by_name(wrong):
    with pytest.raises(TypeError) as caught:
        Pair(first=wrong)
    assert str(caught.value) == (f"SOAA: `fisher` must be a Fisher estimate such as DiagonalFisher(), got {wrong!r}")


def test_one_without_a_compiled_step_is_refused_by_name():
    with pytest.raises(ValueError) as caught:
        Pair(compile=True)
    assert str(caught.value) == "SOAA: `compile` must be False with KroneckerFisher, got True"
