"""Train a GAN on scikit-learn's handwritten digits with two SOAA optimizers, without a learning rate for either.

python examples/gan.py                 # about a minute; shows digits that the generator has drawn

A module that sets `automatic_optimization = False` runs its own loop. `soaa_step` zeroes gradients, runs backward,
steps and checks, for the optimizer that it is given: each has a radius of its own.
"""

import argparse
import warnings

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import softplus
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset

from lightning_soaa import SOAA, RatioRadius, SOAAMixin, TrustRegionMonitor

SHADES = " .:-=+*#%@"


class GAN(SOAAMixin, L.LightningModule):
    def __init__(self, noise: int = 16) -> None:
        super().__init__()
        self.noise = noise
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(noise, 256), nn.BatchNorm1d(256), nn.ReLU(),
            nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(),
            nn.Linear(256, 64),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            spectral_norm(nn.Linear(64, 256)), nn.LeakyReLU(0.2),
            spectral_norm(nn.Linear(256, 256)), nn.LeakyReLU(0.2),
            spectral_norm(nn.Linear(256, 1)),
        )  # fmt: skip

    def configure_optimizers(self):
        # A check holds the other network fixed, so that hardly any step looks too large to it: the radius is bound by
        # its ceiling, which goes with `relative`, here a tenth of the default. There is no momentum, as usual in GANs.
        return [
            SOAA(part.parameters(), betas=(0.0, 0.99), radius=RatioRadius(relative=0.02))
            for part in (self.generator, self.discriminator)
        ]

    def forward(self, count: int):
        return self.generator(torch.randn(count, self.noise, device=self.device))

    def discriminator_loss(self, images):
        """Real images are to score higher than the generator's."""
        loss = softplus(self.discriminator(self(len(images)).detach()) - self.discriminator(images)).mean()
        self.log("discriminator/loss", loss)
        return loss

    def generator_loss(self, images):
        loss = softplus(self.discriminator(images).detach() - self.discriminator(self(len(images)))).mean()
        self.log("generator/loss", loss)
        return loss

    def training_step(self, batch, batch_idx):
        (images,) = batch
        generator, discriminator = self.optimizers()
        self.soaa_step(discriminator, lambda: self.discriminator_loss(images))
        self.soaa_step(generator, lambda: self.generator_loss(images))


def drawn(images: torch.Tensor) -> str:
    """Return images (n, 64) as text, side by side."""
    rows = (images.clamp(0, 1).unflatten(1, (8, 8)) * (len(SHADES) - 1)).round().long().transpose(0, 1)
    return "\n".join("  ".join("".join(SHADES[pixel] * 2 for pixel in line) for line in row) for row in rows.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="three epochs, to see that it runs")
    args = parser.parse_args()

    L.seed_everything(args.seed)
    torch.set_num_threads(1)  # faster for networks this small
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec)")
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    trainer = L.Trainer(
        max_epochs=3 if args.fast else args.epochs,
        accelerator="cpu",
        # The mixin adds no monitor where the loop is the module's own. Its advice would be about the ceiling.
        callbacks=TrustRegionMonitor(advice=False),
        logger=TensorBoardLogger("logs", name="gan"),
        log_every_n_steps=10,
    )
    model = GAN()
    trainer.fit(model, DataLoader(TensorDataset(images), 64, shuffle=True, drop_last=True))
    with torch.no_grad():
        print(drawn(model.eval()(6)))


if __name__ == "__main__":
    main()
