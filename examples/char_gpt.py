"""Train a character GPT on Python's help, or if large on its library, without a learning rate, and let it write.

python examples/char_gpt.py                                   # 0.1 M parameters, about a minute
python examples/char_gpt.py --size 10M --minutes 60           # on a GPU if there is one
python examples/char_gpt.py --size 10M --minutes 60 --optimizer adamw --lr 1e-3   # only AdamW needs the rate

The curves are in logs/char_gpt/<size>-<optimizer>/version_0: TensorBoard's file, and csv/metrics.csv.
"""

import argparse
import math
import pydoc_data.topics
import sysconfig
import warnings
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soaa import SOAA, KroneckerFisher, SOAAMixin

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CODE = {character: number for number, character in enumerate(CHARACTERS)}
SIZES = {
    "0.1M": {"layers": 2, "heads": 4, "width": 64, "context": 64, "batch": 16, "steps": 1000},
    "10M": {"layers": 6, "heads": 6, "width": 384, "context": 256, "batch": 16, "steps": 4000},
    "25M": {"layers": 8, "heads": 8, "width": 512, "context": 256, "batch": 16, "steps": 4000},
}
OPTIMIZERS = {
    "soaa": lambda params, lr: SOAA(params),
    "kronecker": lambda params, lr: SOAA(params, fisher=KroneckerFisher(max_dim=512)),
    "adamw": lambda params, lr: torch.optim.AdamW(params, lr, betas=(0.9, 0.99), weight_decay=0.0),
}


class GPT(L.LightningModule):
    def __init__(self, size: str, optimizer: str, lr: float, steps: int, minutes: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers, heads, width, self.context, *_ = SIZES[size].values()
        self.token, self.place = nn.Embedding(len(CHARACTERS), width), nn.Embedding(self.context, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(CHARACTERS), bias=False)
        for embedding in (self.token, self.place):
            nn.init.normal_(embedding.weight, std=0.02)
        self.timer = Timer(timedelta(minutes=minutes))

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=self.device)
        states = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            states = block(states, mask, is_causal=True)
        return self.head(self.norm(states))

    def loss(self, batch):
        (windows,) = batch
        return nn.functional.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch), prog_bar=True)
        self.log("val/seconds", self.timer.time_elapsed())

    def configure_optimizers(self):
        optimizer = OPTIMIZERS[self.hparams.optimizer](self.parameters(), self.hparams.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def schedule(self, step: int) -> float:
        """Fall from 1 to 0 as a cosine over steps or minutes, whichever end first; AdamW has a warm-up before that."""
        done = max(step / self.hparams.steps, self.timer.time_elapsed() / 60 / self.hparams.minutes)
        warmup = min(1.0, done / 0.05) if self.hparams.optimizer == "adamw" else 1.0
        return warmup * (0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))

    @torch.no_grad()
    def write(self, prompt: str, count: int) -> str:
        self.eval()
        tokens = torch.tensor([[CODE[character] for character in prompt]], device=self.device)
        for _ in range(count):
            logits = self(tokens[:, -self.context :])[:, -1]
            tokens = torch.cat([tokens, torch.multinomial((logits / 0.8).softmax(-1), 1)], dim=1)
        return "".join(CHARACTERS[number] for number in tokens[0])


class GPTUnderSOAA(SOAAMixin, GPT):
    """The same, trained by SOAA."""


def loaders(size: str) -> tuple[DataLoader, DataLoader]:
    """Return windows of the first nine tenths of the text at random places, and 256 of the rest at even distances."""
    context, batch_size = SIZES[size]["context"], SIZES[size]["batch"]
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    if size != "0.1M":
        files, left_out = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")), {"site-packages", "test", "tests"}
        texts = [path.read_text("utf-8", errors="ignore") for path in files if not left_out & {*path.parts}]
    codes = torch.tensor([CODE[character] for character in "\n\n".join(texts) if character in CODE])
    train, rest = codes[: len(codes) * 9 // 10], codes[len(codes) * 9 // 10 :]
    return (
        DataLoader(TensorDataset(train.unfold(0, context + 1, 1)), batch_size, shuffle=True, drop_last=True),
        DataLoader(TensorDataset(rest.unfold(0, context + 1, max(context, len(rest) // 256))), 2 * batch_size),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.1M", help="number of parameters")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="kronecker")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW; SOAA has none")
    parser.add_argument("--steps", type=int, help="default: 1000, or 4000 of the larger sizes")
    parser.add_argument("--minutes", type=float, default=1e6, help="end after these, if the steps are not done before")
    parser.add_argument("--precision", default="32-true", help="bf16-mixed is faster on a GPU")
    parser.add_argument("--fast", action="store_true", help="60 steps, to see that it runs")
    args = parser.parse_args()

    L.seed_everything(0)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec)")
    steps = 60 if args.fast else args.steps or SIZES[args.size]["steps"]
    model = (GPT if args.optimizer == "adamw" else GPTUnderSOAA)(
        args.size, args.optimizer, args.lr, steps, args.minutes
    )
    logger = TensorBoardLogger("logs", f"char_gpt/{args.size}-{args.optimizer}")
    trainer = L.Trainer(
        max_steps=steps,
        callbacks=model.timer,
        val_check_interval=min(50, steps // 2),
        devices=1,
        precision=args.precision,
        logger=[logger, CSVLogger(logger.log_dir, name="", version="csv")],
        log_every_n_steps=10,
    )
    trainer.fit(model, *loaders(args.size))
    print(f"validation loss: {trainer.callback_metrics['val/loss']:.4f} nats a character")
    print(model.write("The ", 60 if args.fast else 400))


if __name__ == "__main__":
    main()
