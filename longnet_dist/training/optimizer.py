"""AdamW's parameter groups, and the learning rate of a step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from longnet_dist.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step: a linear warmup, then a cosine.

    Args:
        config: the run's options.
        step: number of steps completed before it.
    """
    return config.learning_rate * _fraction_of_peak(config, step)


def _fraction_of_peak(config: TrainConfig, step: int) -> float:
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    return config.final_learning_rate + (1 - config.final_learning_rate) * (1 + math.cos(math.pi * progress)) / 2


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: matrices with weight decay, biases and norms without.

    Args:
        model: the model, before or after sharding.
        weight_decay: the weight decay of matrices.
    """
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
