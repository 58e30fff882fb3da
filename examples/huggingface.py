"""Train a small Llama from Hugging Face's transformers on characters, without choosing a learning rate.

python examples/huggingface.py         # about half a minute

The model is made from a configuration, with random weights: nothing is downloaded. One that is fine-tuned comes from
`AutoModelForCausalLM.from_pretrained(...)` instead, and is trained alike.
"""

import argparse
import os
import pydoc_data.topics
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_soaa import SOAA, KroneckerFisher, SOAAMixin

TEXT = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
CHARACTERS = sorted(set(TEXT))


class LanguageModel(SOAAMixin, L.LightningModule):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(config)

    def configure_soaa(self, params) -> SOAA:
        return SOAA(params, fisher=KroneckerFisher())

    def training_step(self, batch, batch_idx):
        (tokens,) = batch
        loss = self.model(input_ids=tokens, labels=tokens).loss  # it shifts the labels itself
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch, batch_idx):
        (tokens,) = batch
        self.log("test/loss", self.model(input_ids=tokens, labels=tokens).loss, prog_bar=True)


def loaders(length: int, batch_size: int) -> tuple[DataLoader, DataLoader]:
    code = {character: number for number, character in enumerate(CHARACTERS)}
    windows = torch.tensor([code[character] for character in TEXT]).unfold(0, length, length)
    train, test = windows[:-400], windows[-400:]
    return (
        DataLoader(TensorDataset(train), batch_size, shuffle=True, drop_last=True),
        DataLoader(TensorDataset(test), 100),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="20 steps, to see that it runs")
    args = parser.parse_args()

    L.seed_everything(args.seed)
    torch.set_num_threads(1)  # faster for a network this small
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec)")
    train, test = loaders(length=64, batch_size=16)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=20 if args.fast else args.steps,
        accelerator="cpu",
        logger=TensorBoardLogger("logs", name="huggingface"),
        log_every_n_steps=10,
    )
    model = LanguageModel(config)
    trainer.fit(model, train)
    (result,) = trainer.test(model, test, verbose=False)
    print(f"test loss: {result['test/loss']:.4f} nats a character")


if __name__ == "__main__":
    main()
