"""The guards that make a second forward free of side effects, one by one, on plain torch modules."""

import random
from collections import OrderedDict, deque
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning_models import assert_same
from torch import nn
from torchmetrics import CatMetric, MeanMetric, MetricCollection, MinMaxMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision

from lightning_soaa.trial import (
    Silence,
    capture_random,
    own_containers,
    preserved_module,
    preserved_random,
    set_random,
    silenced,
    trial,
    versions,
)

CPU = torch.device("cpu")


class BodyError(Exception):
    pass


def draw():
    return torch.rand(2).tolist(), random.random(), float(np.random.rand())


def _enter_and_fail(guard, body):
    with guard:
        body()
        raise BodyError


def enter(guard, body, interrupt):
    """Run `body` inside of `guard`; let it end with an exception if asked to."""
    if not interrupt:
        with guard:
            body()
        return
    with pytest.raises(BodyError):
        _enter_and_fail(guard, body)


def test_set_random_replays_all_three_streams():
    state = capture_random(CPU)
    first = draw()
    draw()
    set_random(state, CPU)
    assert draw() == first


@pytest.mark.parametrize("interrupt", [False, True])
def test_preserved_random_leaves_the_streams_where_they_were(interrupt):
    state = capture_random(CPU)
    expected = draw()
    set_random(state, CPU)
    enter(preserved_random(CPU), draw, interrupt)
    assert draw() == expected


def test_capture_random_does_not_import_numpy(monkeypatch):
    monkeypatch.delitem(__import__("sys").modules, "numpy")
    state = capture_random(CPU)
    assert state.numpy is None
    set_random(state, CPU)


@pytest.mark.parametrize("interrupt", [False, True])
def test_preserved_module_restores_batch_norm_in_place(interrupt):
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(4, 3))
    objects, before = list(norm.buffers()), {k: v.clone() for k, v in norm.state_dict().items()}
    enter(preserved_module(norm), lambda: norm(torch.randn(4, 3)), interrupt)
    assert_same(dict(norm.state_dict()), before)
    assert all(one is other for one, other in zip(norm.buffers(), objects, strict=True))


def test_preserved_module_leaves_out_expanded_buffers_which_cannot_be_written():
    module = nn.Module()
    module.register_buffer("mask", torch.ones(1).expand(3, 3))
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    with preserved_module(module):
        pass
    assert torch.equal(module.sparse.to_dense(), torch.eye(3))


class Messy(nn.Module):
    """Writes attributes of every kind a forward might."""

    def __init__(self):
        super().__init__()
        self.count, self.outputs, self.queue = 0, [1.0], deque([1], maxlen=2)
        self.table, self.seen, self.order = {"a": 1}, {1}, OrderedDict(a=1)
        self.register_buffer("ema", torch.zeros(2))
        self.register_buffer("late", None)
        self.child = nn.Linear(1, 1)

    def forward(self):
        self.count += 1
        self.outputs.append(2.0)
        self.queue.extend([2, 3])
        self.table.update(a=2, b=3)
        self.seen.add(2)
        self.order.clear()
        self.ema = self.ema + 1
        self.late = torch.ones(1)
        self.child.cache = "new"
        self.new = 1
        self.eval()


@pytest.mark.parametrize("interrupt", [False, True])
def test_preserved_module_restores_counters_containers_and_replaced_buffers(interrupt):
    module, ema = Messy(), None
    ema, outputs = module.ema, module.outputs
    enter(preserved_module(module), module, interrupt)
    assert module.count == 0
    assert module.outputs is outputs
    assert outputs == [1.0]
    assert module.queue == deque([1])
    assert module.queue.maxlen == 2
    assert (module.table, module.seen, module.order) == ({"a": 1}, {1}, {"a": 1})
    assert module.ema is ema
    assert module.late is None
    assert "new" not in vars(module)
    assert "cache" not in vars(module.child)
    assert module.training
    assert module.child.training


def metrics():
    holder = nn.Module()
    holder.mean, holder.cat, holder.minmax = MeanMetric(), CatMetric(), MinMaxMetric(MeanMetric())
    holder.pair = MetricCollection([MulticlassAccuracy(2), MulticlassPrecision(2)])
    return holder


def use(holder, value):
    holder.mean.update(value)
    holder.mean(value)
    holder.cat(value)
    holder.minmax(value)
    holder.pair(torch.tensor([0, 1, 1]), torch.tensor([0, 1, int(value) % 2]))


@pytest.mark.parametrize("interrupt", [False, True])
def test_metrics_go_on_as_if_a_trial_had_not_been(interrupt):
    guarded, plain = metrics(), metrics()
    for value in (1.0, 2.0):
        use(guarded, value)
        use(plain, value)
        enter(preserved_module(guarded), lambda: None, interrupt)
        with preserved_module(guarded):
            use(guarded, 7.0)
            guarded.mean.compute()
    for name in ("mean", "cat", "minmax", "pair"):
        assert_same(getattr(guarded, name).compute(), getattr(plain, name).compute())
    assert guarded.mean._update_count == plain.mean._update_count


def test_silence_does_nothing_and_passes_plain_values_on():
    logger = SimpleNamespace(log_dir="runs", version=3, experiment=SimpleNamespace(path=Path("a"), calls=[]))
    logger.experiment.add = logger.experiment.calls.append
    silence = Silence(logger)
    assert (silence.log_dir, silence.version, silence.experiment.path) == ("runs", 3, Path("a"))
    silence.experiment.add(1)
    silence.experiment.calls["a"]["b"] = 1
    with silence.experiment.add("run") as run:
        run.log({})
    assert list(silence.experiment.calls) == []
    assert logger.experiment.calls == []
    with pytest.raises(AttributeError):
        _ = silence.no_such_thing
    assert isinstance(deepcopy(Silence()), Silence)


@pytest.mark.parametrize("interrupt", [False, True])
def test_silenced_gives_the_loggers_back(interrupt):
    logger = object()
    module, trainer = SimpleNamespace(_soaa_in_trial=False), SimpleNamespace(loggers=[logger])
    seen = []
    enter(silenced(module, trainer), lambda: seen.extend([module._soaa_in_trial, *trainer.loggers]), interrupt)
    assert seen[0] is True
    assert isinstance(seen[1], Silence)
    assert trainer.loggers == [logger]
    assert module._soaa_in_trial is False


@pytest.mark.parametrize("interrupt", [False, True])
def test_trial_records_no_gradient_and_restores_everything_at_once(interrupt):
    module, trainer = Messy(), SimpleNamespace(loggers=[])
    trainer.strategy = SimpleNamespace(model=module)
    module.device = CPU
    module.child.weight.grad = torch.ones(1, 1)
    state = capture_random(CPU)
    expected = draw()
    set_random(state, CPU)

    def body():
        draw()
        module()
        assert not (module.child.weight * 2).requires_grad

    enter(trial(module, trainer), body, interrupt)
    assert module.count == 0
    assert draw() == expected
    assert torch.equal(module.child.weight.grad, torch.ones(1, 1))
    assert torch.is_grad_enabled()


def test_own_containers_copies_lists_and_dicts_and_shares_their_tensors():
    tensor = torch.ones(1)
    batch = {"x": tensor}
    (own, index) = own_containers((batch, 3))
    batch.pop("x")
    assert own["x"] is tensor
    assert index == 3


def test_versions_rise_with_an_edit_in_place_anywhere_in_a_batch():
    tensor = torch.ones(2)
    with torch.inference_mode():
        frozen = torch.ones(1)
    batch = {"x": [tensor, (torch.ones(1), "text")], "frozen": frozen}
    before = versions(batch)
    assert before == versions(batch)
    assert len(before) == 2
    tensor.div_(2)
    assert versions(batch) != before
