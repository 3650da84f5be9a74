"""Train a LongNet with Lightning, each sequence split across all ranks.

python examples/lightning_train.py --devices 1    # one process
python examples/lightning_train.py --devices 2    # two processes, with the same losses; Lightning starts the second
torchrun --standalone --nproc-per-node 2 examples/lightning_train.py --devices 2    # two, both started by torchrun
"""

from __future__ import annotations

import argparse
import os

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from longnet_dist import LongNet, LongNetConfig, next_token_labels
from longnet_dist.integrations.lightning import SequenceParallelStrategy, sequence_mesh

SEQ_LEN, STEPS = 500, 5
CONFIG = LongNetConfig(vocab_size=256, d_model=32, num_layers=2, segment_lengths=(64, 512), dilation_rates=(1, 4))


class Language(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model: LongNet | None = None

    def configure_model(self) -> None:
        if self.model is None:  # Lightning may call this again, for example before a test.
            self.mesh = sequence_mesh(self, CONFIG.pattern, SEQ_LEN)
            self.model = CONFIG.build(dtype=torch.float64)
            for part in (*self.model.blocks, self.model):
                fully_shard(part, mesh=self.device_mesh)

    def training_step(self, tokens: torch.Tensor, index: int) -> dict[str, torch.Tensor]:
        targets = next_token_labels(tokens)  # Shift the targets before they are split.
        loss = self.model(self.mesh.split(tokens), self.mesh, self.mesh.split(targets))
        self.print(f"step {index + 1}  loss {loss.item():.9f}")
        return {"loss": loss, "tokens": (targets != -100).sum()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # torchrun's
    devices = parser.parse_args().devices
    seed_everything(0)  # Every rank makes the same model.
    sequences = (torch.randint(16, (2 * STEPS, 1)) + torch.arange(SEQ_LEN) * 7) % 256
    trainer = Trainer(
        accelerator="auto" if torch.cuda.is_available() else "cpu", devices=devices,
        strategy=SequenceParallelStrategy(), max_epochs=1, gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Language(), DataLoader(sequences, batch_size=2))


if __name__ == "__main__":
    main()
