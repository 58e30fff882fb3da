"""A trial starts from what the batch started from, and leaves what the batch left: state that training_step carries."""

import random

import numpy as np
import pytest
import torch
from lightning_models import (
    ACCEPT,
    QUIET,
    Automatic,
    Mixed,
    OwnLoop,
    Remember,
    Tape,
    assert_same,
    make_trainer,
    seed,
    train,
)
from torch import nn

from lightning_soaa import SOAA, FixedRadius, RatioRadius, trial
from lightning_soaa._holdings import Attributes, edited_tensors

pytestmark = QUIET
MODES = {"default": Mixed, "automatic": Automatic, "own loop": OwnLoop}


class Carrying:
    """A module whose loss depends on what earlier batches left; `carry` reads it and moves it on."""

    def loss(self, batch):
        loss = super().loss(batch)
        return loss + self.carry(batch[0], self.net[0].weight)


class Hidden(Carrying):
    """Truncated backpropagation: the hidden state is replaced, a tuple of tensors."""

    hidden = None

    def carry(self, inputs, weight):
        h, c = self.hidden or (torch.zeros(8), [torch.zeros(8)])
        h = torch.tanh(inputs.mean(0) @ weight.T + h)
        self.hidden = (h.detach(), [c[0] + h.detach()])
        return (h + c[0]).square().mean()


class HiddenInAList(Carrying):
    """The same, in a list that is kept, and a dict."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.hidden, self.cells = [torch.zeros(8)], {}

    def carry(self, inputs, weight):
        h = torch.tanh(inputs.mean(0) @ weight.T + self.hidden.pop() + self.cells.get("c", 0.0))
        self.hidden.append(h.detach())
        self.cells["c"] = self.cells.get("c", 0.0) + h.detach()
        return h.square().mean()


class HiddenInPlace(Carrying):
    """The same, in a tensor that is no buffer and is written in place."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.hidden = torch.zeros(8)

    def carry(self, inputs, weight):
        h = torch.tanh(inputs.mean(0) @ weight.T + self.hidden.clone())
        self.hidden.copy_(h.detach())
        return h.square().mean()


class Counting(Carrying):
    """The loss depends on how many batches there were."""

    count = 0

    def carry(self, inputs, weight):
        self.count += 1
        return weight.square().sum() / self.count


class Codebook(Carrying):
    """A buffer that the loss reads and that the forward then moves by .data, as vector quantisation does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("codes", torch.zeros(4))

    def carry(self, inputs, weight):
        loss = (inputs @ weight.T).square().mean() * (1 + self.codes.square().sum())
        self.codes.data.mul_(0.9).add_(inputs.mean(0) + weight.detach().sum(0), alpha=0.1)
        return loss


class Spectral(Carrying):
    """Spectral normalisation: each forward goes on with the power iteration that the last one left."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bounded = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))

    def carry(self, inputs, weight):
        return self.bounded(inputs).square().mean()


class Teacher(Carrying):
    """A teacher that starts as a copy of the student and follows it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = nn.Linear(4, 8).requires_grad_(False)
        self.teacher.load_state_dict(self.net[0].state_dict())

    def carry(self, inputs, weight):
        with torch.no_grad():
            for mine, its in zip(self.net[0].parameters(), self.teacher.parameters(), strict=True):
                self.follow(its, mine)
        return (self.net[0](inputs) - self.teacher(inputs)).square().mean()

    def follow(self, its, mine):
        its.lerp_(mine, 0.1)


class TeacherByData(Teacher):
    def follow(self, its, mine):
        its.data.mul_(0.9).add_(mine.data, alpha=0.1)


class TeacherReplaced(Teacher):
    def follow(self, its, mine):
        its.data = its.data * 0.9 + mine.data * 0.1


class OwnGenerators(Carrying):
    """Noise from generators that the module owns."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.torch_rng, self.numpy_rng = torch.Generator().manual_seed(1), np.random.default_rng(2)
        self.python_rng, self.old_numpy_rng = random.Random(3), np.random.RandomState(4)

    def carry(self, inputs, weight):
        drawn = self.python_rng.random() + self.numpy_rng.random() + self.old_numpy_rng.rand()
        return (weight * torch.rand(8, 4, generator=self.torch_rng) * float(drawn)).square().sum()


CASES = [
    Hidden, HiddenInAList, HiddenInPlace, Counting, OwnGenerators, Codebook, Spectral, Teacher, TeacherByData,
    TeacherReplaced,
]  # fmt: skip


def holding(case, mode, *parts):
    return type(case.__name__, (*parts, case, MODES[mode]), {})


def pairs(mode):
    return [1, 3] if mode != "own loop" else [1]


@pytest.mark.parametrize(("mode", "accumulate"), [(mode, n) for mode in MODES for n in pairs(mode)])
@pytest.mark.parametrize("case", CASES)
def test_trial_where_nothing_moved_is_the_base_loss_bit_for_bit(case, mode, accumulate):
    rule = Remember()
    run = train(lambda: holding(case, mode)(rule, lr=0.0), accumulate_grad_batches=accumulate)
    assert len(rule.seen) == run.trainer.global_step == 2 * -(-8 // accumulate)
    assert all(base == trial for base, trial in rule.seen)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_what_the_batch_left_is_there_again_after_a_trial(case, mode):
    facts = []
    for rule in (FixedRadius(), ACCEPT):
        run = train(lambda: holding(case, mode)(rule))  # noqa: B023
        kept = {name: getattr(run.module, name) for name in ("hidden", "cells", "count") if hasattr(run.module, name)}
        facts.append({"held": kept, "run": run.facts()})
    assert_same(*facts)


@pytest.mark.parametrize("mode", ["default", "automatic"])
def test_each_micro_batch_of_a_window_starts_from_the_attributes_that_it_started_from(mode):
    """A hook starts a new sequence in the middle of a window."""

    class Resetting:
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx % 4 == 2:
                self.hidden = None

    rule = Remember()
    train(lambda: holding(Hidden, mode, Resetting)(rule, lr=0.0), accumulate_grad_batches=4)
    assert len(rule.seen) == 4
    assert all(base == trial for base, trial in rule.seen)


@pytest.mark.parametrize("mode", MODES)
def test_steps_without_a_check_keep_and_copy_nothing(mode, monkeypatch):
    made = Tape()

    class Start(trial.Start):
        def __init__(self, module, *, replayed, contents=True):
            made.append(replayed)
            super().__init__(module, replayed=replayed, contents=contents)

    for name in ("_closures", "_automatic", "_manual"):
        monkeypatch.setattr(f"lightning_soaa.{name}.Start", Start)
    run = train(lambda: holding(Teacher, mode)(RatioRadius()), max_epochs=10)
    assert made.count(True) == run.trainer.optimizers[0].last_step.checks < run.trainer.global_step
    made.clear()
    train(lambda: holding(Teacher, mode)(FixedRadius()))
    assert made == []


class MostlyFrozen:
    """A large frozen part, and a teacher larger than what is trained."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for part in self.net[1:]:
            part.requires_grad_(False)
        self.backbone = nn.Linear(100, 100).requires_grad_(False)

    def configure_optimizers(self):
        return SOAA(self.net[0].parameters(), lr=self.lr, radius=self.rule)


def test_frozen_parameters_are_copied_up_to_the_memory_of_the_trained_ones():
    module = holding(Teacher, "default", MostlyFrozen)()
    copied, large = edited_tensors(Attributes(module))
    names = {id(param): name for name, param in module.named_parameters()}
    small = {"net.1.weight", "net.1.bias", "net.4.bias", "teacher.bias"}
    assert {names[id(param)] for param in copied if id(param) in names} == small
    assert [names[id(param)] for param in large] == [
        "net.4.weight", "teacher.weight", "backbone.bias", "backbone.weight"
    ]  # fmt: skip
    assert {id(buffer) for buffer in module.buffers()} <= {id(tensor) for tensor in copied}


def test_a_trained_parameter_that_two_layers_share_counts_once():
    tied = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    tied[1].weight = tied[0].weight
    tied.append(nn.Linear(4, 4, bias=False).requires_grad_(False))
    tied.append(nn.Linear(4, 4, bias=False).requires_grad_(False))
    copied, large = edited_tensors(Attributes(tied))
    assert (len(copied), len(large)) == (1, 1)


class Odd(Carrying):
    """Attributes that a copy could stumble over, and layers that take their shape from the first batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.late = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
        self.wide, self.sparse, self.table = torch.ones(1).expand(4, 3), torch.eye(3).to_sparse(), {"a": {"b": []}}

    def carry(self, inputs, weight):
        with torch.inference_mode():
            self.inferred = inputs.detach().mean()
        self.alias, self.row, self.graph = weight, weight.detach()[0], weight * 2
        self.half = torch.ones(2, dtype=torch.float16)
        return self.late(inputs).square().mean() + self.graph.sum() * 1e-3


@pytest.mark.filterwarnings("ignore:The total number of parameters detected", "ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("mode", MODES)
def test_tensors_that_cannot_be_copied_or_written_are_left_alone(mode):
    facts = [train(lambda: holding(Odd, mode)(rule)).facts() for rule in (FixedRadius(), ACCEPT)]  # noqa: B023
    assert_same(*facts)


@pytest.mark.parametrize("case", [Teacher, TeacherReplaced])
@pytest.mark.parametrize("mode", MODES)
def test_larger_frozen_parameters_that_training_step_moves_are_there_again_after_a_trial(case, mode):
    moving = holding(case, mode, MostlyFrozen)
    assert_same(*(train(lambda: moving(rule)).facts() for rule in (FixedRadius(), ACCEPT)))  # noqa: B023


def test_what_is_neither_copied_nor_seen_is_moved_by_a_trial():
    """An edit of .data, where frozen parameters outweigh the trained ones: ask `in_trial` there."""
    unseen = holding(TeacherByData, "default", MostlyFrozen)
    one, other = (train(lambda: unseen(rule)).module for rule in (FixedRadius(), ACCEPT))  # noqa: B023
    assert not torch.equal(one.teacher.weight, other.teacher.weight)

    class Asking(unseen):
        def follow(self, its, mine):
            if not self.in_trial:
                super().follow(its, mine)

    moved, still = (train(lambda: Asking(rule)).module for rule in (FixedRadius(), ACCEPT))  # noqa: B023
    assert_same(dict(moved.state_dict()), dict(still.state_dict()))


def test_trial_leaves_a_graph_that_a_later_backward_needs_as_it_was():
    """Two optimizers share one forward, whose graph holds a buffer and parameters frozen meanwhile."""

    class Sharing(Mixed):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.register_buffer("scale", torch.full((4,), 2.0))

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            made = self.frozen(self.first(batch[0]) * self.scale)
            self.soaa_step(second, lambda: self.second(made.detach() * self.scale).square().mean())
            made.sum().backward()
            self.soaa_step(first, lambda: self.frozen(self.first(batch[0])).square().mean())

        def configure_optimizers(self):
            return [SOAA(part.parameters(), radius=ACCEPT) for part in (self.first, self.second)]

    seed()
    trainer, _ = make_trainer(max_epochs=1)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), batch_size=4)
    trainer.fit(Sharing(), data)
    assert trainer.global_step == 4
