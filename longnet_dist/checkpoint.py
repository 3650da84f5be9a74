"""A model's and an optimizer's state on disk: whole, or not there."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path

import torch
from torch import nn

from longnet_dist.model import LongNet, LongNetConfig


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: LongNetConfig, step: int
) -> None:
    """Write under a temporary name, flush to the disk, rename: a crash leaves the last checkpoint as it was."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": dataclasses.asdict(config),
        "step": step,
    }
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as out:
        try:
            torch.save(state, out)
            out.flush()
            os.fsync(out.fileno())
        except BaseException:
            os.unlink(out.name)
            raise
    os.replace(out.name, path)


def load_model(path: Path | str) -> LongNet:
    """The model of a checkpoint, on the CPU.

    Raises:
        FileNotFoundError: where there is none.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    config = LongNetConfig(**state["config"])
    model = config.build(dtype=next(iter(state["model"].values())).dtype)
    model.load_state_dict(state["model"])
    return model
