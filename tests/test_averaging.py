"""The polynomial-decay average: its formula, and the two places that take it."""

import math
import pickle
import re

import pytest
import torch
from lightning.pytorch import callbacks
from lightning_models import QUIET, Net, assert_same, fit, seed
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_soaa import SOAA, RatioRadius, SOAAMixin, get_polynomial_avg_fn

pytestmark = QUIET


def averaged(values, eta):
    """The average of a sequence of tensors, as AveragedModel forms it."""
    average, form = values[0], get_polynomial_avg_fn(eta)
    for count, value in enumerate(values[1:], start=1):
        average = form(average, value, count)
    return average


@pytest.mark.parametrize("eta", [0, 1, 3, 8])
def test_weights_count_as_the_rising_powers_of_their_step(eta):
    values = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([math.comb(step + eta - 1, eta) for step in range(1, 51)], dtype=torch.float64)
    torch.testing.assert_close(averaged(list(values), eta), counts / counts.sum() @ values, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("steps", [100, 10_000])
def test_most_of_the_average_are_the_last_ninth_of_the_steps_however_many_there_are(steps):
    late = [torch.tensor(float(step > steps * 8 / 9), dtype=torch.float64) for step in range(1, steps + 1)]
    assert 0.6 < float(averaged(late, 8.0)) < 0.7


def test_what_does_not_move_is_its_own_average():
    assert torch.equal(averaged([torch.tensor([1.3, -2.7])] * 1000, 8.0), torch.tensor([1.3, -2.7]))


def test_a_count_as_a_tensor_gives_the_bits_of_a_number():
    one, other, form = torch.randn(4), torch.randn(4), get_polynomial_avg_fn()
    assert torch.equal(form(one, other, torch.tensor(7)), form(one, other, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_average_has_the_dtype_of_the_weights(dtype):
    weights = torch.ones(3, dtype=dtype)
    assert get_polynomial_avg_fn()(weights, weights, torch.tensor(1)).dtype == dtype


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.tensor([5, 16777217]), torch.tensor([3, 16777217])),
        (torch.tensor([5], dtype=torch.uint8), torch.tensor([3], dtype=torch.uint8)),
        (torch.tensor([True, False]), torch.tensor([False, False])),
    ],
    ids=["int64", "uint8", "bool"],
)
def test_buffers_of_integers_and_bools_are_those_of_the_model(first, second):
    assert torch.equal(averaged([first, second], 8.0), second)


def test_infinities_that_stay_are_their_own_average():
    mask = torch.tensor([0.0, -math.inf])
    assert torch.equal(averaged([mask, mask, mask], 8.0), mask)


def test_a_model_with_masks_and_counts_as_buffers_can_be_averaged():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
    model.register_buffer("seen", torch.zeros(2, dtype=torch.bool))
    average = AveragedModel(model, avg_fn=get_polynomial_avg_fn(0), use_buffers=True)
    for value in (1.0, 2.0):
        model(torch.full((3, 2), value))
        model.seen.logical_not_()
        average.update_parameters(model)
    assert torch.equal(average.module.mask, model.mask)
    assert torch.equal(average.module.seen, model.seen)
    assert average.module[1].num_batches_tracked == 2
    assert not torch.equal(average.module[1].running_mean, model[1].running_mean)


def test_it_can_be_pickled():
    form = pickle.loads(pickle.dumps(get_polynomial_avg_fn(3.0)))
    assert form(torch.zeros(()), torch.ones(()), 4) == get_polynomial_avg_fn(3.0)(torch.zeros(()), torch.ones(()), 4)


@pytest.mark.parametrize(
    ("eta", "error", "text"),
    [
        (-1.0, ValueError, "get_polynomial_avg_fn: `eta` must be >= 0, got -1.0"),
        (math.nan, ValueError, "get_polynomial_avg_fn: `eta` must be finite, got nan"),
        ("8", TypeError, "get_polynomial_avg_fn: `eta` must be a real number, got '8'"),
    ],
)
def test_what_is_no_eta_is_refused(eta, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        get_polynomial_avg_fn(eta)


def test_the_average_is_nearer_the_least_than_the_weights_where_gradients_are_noisy_and_no_schedule_is_given():
    def distances(seed):
        noise = torch.Generator().manual_seed(seed)
        model = nn.Linear(20, 1, bias=False).double()
        target = torch.ones(1, 20, dtype=torch.float64)
        optimizer, average = SOAA(model.parameters()), AveragedModel(model, avg_fn=get_polynomial_avg_fn())
        for _ in range(400):
            inputs = torch.randn(8, 20, dtype=torch.float64, generator=noise)
            outputs = inputs @ target.T + torch.randn(8, 1, dtype=torch.float64, generator=noise)

            def loss_closure(inputs=inputs, outputs=outputs):
                return (model(inputs) - outputs).square().mean()

            def closure(loss_closure=loss_closure):
                optimizer.zero_grad()
                loss = loss_closure()
                loss.backward()
                return loss

            optimizer.step(closure, loss_closure=loss_closure)
            average.update_parameters(model)
        return [float((net.weight.detach() - target).norm()) for net in (model, average.module)]

    torch.manual_seed(0)
    pairs = [distances(seed) for seed in range(3)]
    assert all(of_average < of_weights for of_weights, of_average in pairs)
    assert sum(pair[1] for pair in pairs) < 0.8 * sum(pair[0] for pair in pairs)


WEIGHT_AVERAGING = pytest.mark.skipif(not hasattr(callbacks, "WeightAveraging"), reason="not in this Lightning")


class Watched(SOAAMixin, Net):
    """Keeps its weights after each batch, and what is validated."""

    def on_validation_epoch_start(self):
        self.validated = weights(self)

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        self.path = [*getattr(self, "path", []), weights(self)]


def weights(module):
    return [param.detach().clone() for param in module.parameters()]


def trained(*more):
    seed()
    return fit(Watched(RatioRadius()), more, validate=True)


@WEIGHT_AVERAGING
def test_under_the_trainer_the_average_is_validated_and_the_module_has_it_after_the_run():
    model = trained(callbacks.WeightAveraging(avg_fn=get_polynomial_avg_fn())).module
    expected = [averaged(list(each), 8.0) for each in zip(*model.path, strict=True)]
    assert not any(map(torch.equal, expected, model.path[-1]))
    torch.testing.assert_close(model.validated, expected)
    torch.testing.assert_close(weights(model), expected)


@WEIGHT_AVERAGING
def test_under_the_trainer_a_run_that_is_averaged_is_the_same_run():
    plain, other = trained(), trained(callbacks.WeightAveraging(avg_fn=get_polynomial_avg_fn()))
    assert plain.trainer.optimizers[0].param_groups[0]["checks"] > 3
    for mine, theirs in zip(plain.module.path, other.module.path, strict=True):
        assert all(map(torch.equal, mine, theirs))
    mine, theirs = ([(step, {**row, "val_loss": 0.0}) for step, row in run.rows] for run in (plain, other))
    assert_same(mine, theirs)
    assert_same(*(run.trainer.optimizers[0].state_dict() for run in (plain, other)))


@WEIGHT_AVERAGING
def test_a_checkpoint_of_a_run_that_is_averaged_holds_the_average_and_the_weights_of_training(tmp_path):
    saving = callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    average = callbacks.WeightAveraging(avg_fn=get_polynomial_avg_fn())
    seed()
    model = fit(Watched(RatioRadius()), [average, saving], enable_checkpointing=True).module
    saved = torch.load(next(tmp_path.glob("*step=4*")), weights_only=True)
    expected = [averaged(list(each), 8.0) for each in zip(*model.path[:4], strict=True)]
    names = [name for name, _ in model.named_parameters()]
    torch.testing.assert_close([saved["state_dict"][name] for name in names], expected)
    assert all(map(torch.equal, [saved["current_model_state"][name] for name in names], model.path[3]))
