"""The polynomial-decay average: its formula, and the two places that take it."""

import copy
import math
import pickle
import re

import pytest
import torch
from lightning.pytorch import callbacks
from lightning_models import QUIET, Net, fit, seed
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_soaa import SOAA, SOAAMixin, get_polynomial_avg_fn

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


def test_a_count_on_a_device_gives_the_bits_of_a_number():
    one, other, form = torch.randn(4), torch.randn(4), get_polynomial_avg_fn()
    assert torch.equal(form(one, other, torch.tensor(7)), form(one, other, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_average_has_the_dtype_of_the_weights(dtype):
    weights = torch.ones(3, dtype=dtype)
    assert get_polynomial_avg_fn()(weights, weights, torch.tensor(1)).dtype == dtype


def test_buffers_of_whole_numbers_are_averaged_and_rounded_down():
    model = nn.BatchNorm1d(2)
    average = AveragedModel(model, avg_fn=get_polynomial_avg_fn(0), use_buffers=True)
    for count in (1, 2):
        model.num_batches_tracked.fill_(count)
        average.update_parameters(model)
    assert average.module.num_batches_tracked == 1


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


@pytest.mark.skipif(not hasattr(callbacks, "WeightAveraging"), reason="this Lightning has no WeightAveraging")
def test_under_the_trainer_the_averaged_weights_are_validated_and_saved_and_the_run_is_the_same(tmp_path):
    class Watched(SOAAMixin, Net):
        def on_validation_epoch_start(self):
            self.validated = copy.deepcopy([param.detach() for param in self.parameters()])

        def on_train_batch_end(self, *args):
            self.path = [*getattr(self, "path", []), [param.detach().clone() for param in self.parameters()]]

    def trained(*more):
        seed()
        run = fit(Watched(), more, validate=True)
        return run.module, run.trainer

    plain, _ = trained()
    model, trainer = trained(callbacks.WeightAveraging(avg_fn=get_polynomial_avg_fn()))
    expected = [averaged(list(each), 8.0) for each in zip(*model.path, strict=True)]
    for mine, theirs in zip(plain.path, model.path, strict=True):
        assert all(map(torch.equal, mine, theirs))
    torch.testing.assert_close(model.validated, expected)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close([saved[name] for name, _ in model.named_parameters()], expected)
