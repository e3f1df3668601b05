"""Swap a CLIP loss in a LightningModule.

    python examples/clip_lightning.py

With several processes (Trainer(devices=2, strategy="ddp")) the same module uses the pairs of all ranks as negatives:
mk.distributed.clip_loss is mk.clip_loss where there is one process.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset
from toy_pairs import Encoders, pairs, retrieval

import mi_kernels as mk


class Clip(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = Encoders()

    def training_step(self, batch, batch_idx):
        image, text, scale = self.encoders(*batch)
        loss = mk.distributed.clip_loss(image, text, scale)  # the line that changes
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=512)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # the data is in memory
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    lightning.seed_everything(0, verbose=False)
    loader = DataLoader(TensorDataset(*pairs(options.rows, seed=0)), options.batch, shuffle=True, drop_last=True)
    trainer = lightning.Trainer(
        max_epochs=options.epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    module = Clip()
    trainer.fit(module, loader)
    loss = trainer.callback_metrics["loss"].item()
    print(f"loss {loss:.4f}; {retrieval(module.encoders):.0%} of 500 unseen images find their text")


if __name__ == "__main__":
    main()
