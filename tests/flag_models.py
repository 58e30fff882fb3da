"""LightningModules and loaders for the table of Trainer flags: each has one thing that a flag, hook or loader needs."""

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.utilities import CombinedLoader
from lightning_models import Net, loader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_soaa import SOAA


class Overrides:
    """A user's own versions of the hooks that automatic optimization calls."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        self.calls.append(f"optimizer_step {epoch} {batch_idx} {self.global_step}")
        for group in optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.global_step + 1) / 5)
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        self.calls.append(f"optimizer_zero_grad {batch_idx}")
        optimizer.zero_grad(set_to_none=False)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.calls.append(f"clip {gradient_clip_val}")
        self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val or 0.05, gradient_clip_algorithm="norm")

    def lr_scheduler_step(self, scheduler, metric):
        self.calls.append(f"lr_scheduler_step {metric}")
        scheduler.step()

    def backward(self, loss):
        self.calls.append("backward")
        (2 * loss).backward()

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 6 else None

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 0.1, batch[1]]


def overriding(*names):
    """Return Net with some hooks overridden."""
    return type("Overriding", (Net,), {name: vars(Overrides)[name] for name in names})


class AllOverrides(Overrides, Net):
    pass


def sometimes(*pattern, extras=True):
    """Return Net whose training_step returns None on the batches in `pattern`, and a dict or a tensor on the others."""

    class Sometimes(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx in pattern:
                return None
            return {"loss": loss, "index": batch_idx, "logits": loss * 2} if extras else loss

    return Sometimes


class WithoutIndex(Net):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class Sized(Net):
    """Brings its loaders, with a batch size that a finder can change."""

    batch_size = 2

    def train_dataloader(self):
        return DataLoader(loader().dataset, batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(1, 2)


class Tuned(Net):
    """A backbone that is frozen at first, and a head."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.backbone = nn.Sequential(*self.net[:3])

    def configure_optimizers(self):
        return SOAA([p for p in self.parameters() if p.requires_grad], lr=self.lr, radius=self.rule)


class Stopping(Net):
    """Asks the Trainer to stop in the middle of an epoch, and brings a callback."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.trainer.should_stop = self.current_epoch == 1 and batch_idx == 2

    def configure_callbacks(self):
        return [EarlyStopping("loss_epoch", patience=5)]


class Several(Net):
    """Trains on batches from several loaders, of which one may have run out."""

    def training_step(self, batch, batch_idx):
        found = [part for part in (batch.values() if isinstance(batch, dict) else batch) if part is not None]
        return super().training_step([torch.cat(part) for part in zip(*found, strict=True)], batch_idx)


class Iterating(Net):
    def training_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class Evaluated(Net):
    """Tests and predicts; its test shares the training_step."""

    def test_step(self, batch, batch_idx):
        return self.training_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])


class Differentiating(Net):
    """Its loss holds a slope of the network."""

    def loss(self, batch):
        inputs = batch[0].detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.net(inputs).sum(), inputs, create_graph=True)
        return super().loss(batch) + slope.square().mean()


class Metered(Net):
    """Says what a batch costs, as ThroughputMonitor asks."""

    flops_per_batch = 100


class Prunable(Net):
    """Looks at gradients where pruning leaves them."""

    def on_before_optimizer_step(self, optimizer):
        pass


class Compilable(Net):
    """A training_step that the compiler can trace: no log, no metric, no numpy."""

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return nn.functional.cross_entropy(self.net(inputs), labels)

    def on_before_optimizer_step(self, optimizer):
        pass


class PartlyCompiled(Net):
    """The network in it is compiled."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        torch._dynamo.reset()
        self.net = torch.compile(self.net, backend="eager")

    def on_before_optimizer_step(self, optimizer):
        pass


class TwoOptimizers(Net):
    def configure_optimizers(self):
        return [SOAA(part.parameters(), radius=self.rule) for part in (self.net[0], self.net[4])]


class Endless(IterableDataset):
    """A stream of unknown length."""

    def __iter__(self):
        return iter(loader().dataset)


def stream():
    return DataLoader(Endless(), batch_size=6)


class Gaps:
    """A loader of which every third batch is None."""

    def __iter__(self):
        return (None if index % 3 == 1 else batch for index, batch in enumerate(loader()))

    def __len__(self):
        return len(loader())


def combined(mode):
    return CombinedLoader({"long": loader(), "short": loader(5, 3)}, mode)


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(1, 2)


class HookOrder(Callback):
    """Writes down every hook that a run calls on callbacks, with the step and the epoch."""

    def __init__(self):
        self.called = []

    def __getattribute__(self, name):
        hook = super().__getattribute__(name)
        if not name.startswith(("on_", "setup", "teardown")) or name == "on_save_checkpoint":
            return hook

        def noted(trainer, *args, **kwargs):
            self.called.append((name, trainer.global_step, trainer.current_epoch))
            return hook(trainer, *args, **kwargs)

        return noted

    def state_dict(self):
        return {"called": self.called}
