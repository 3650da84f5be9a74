"""Does far context help where it is needed? Values planted far back, asked for at the end, by distance and pattern.

    OMP_NUM_THREADS=2 python examples/recall.py

A sequence holds eight pairs of a key and a value, one byte each, at random places between other bytes. The last eight
bytes ask for the value of each key. Models that differ only in which keys a query sees are trained on drawn sequences.
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy

from longnet_dist import LongNet, LongNetConfig

KEYS, VALUES, PAIRS = 8, 16, 128
"""A byte from `PAIRS` on is a pair: PAIRS + VALUES key + value. The bytes below `KEYS` ask for a key."""


def draw(batch_size: int, seq_len: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw sequences: tokens (B, N), and of the last `KEYS` tokens the values and the distances, (B, KEYS)."""
    asked_at = seq_len - KEYS
    tokens = torch.randint(KEYS, PAIRS, (batch_size, seq_len), generator=generator)
    values = torch.randint(VALUES, (batch_size, KEYS), generator=generator)
    places = torch.rand(batch_size, asked_at, generator=generator).argsort(1)[:, :KEYS]
    tokens.scatter_(1, places, PAIRS + VALUES * torch.arange(KEYS) + values)
    order = torch.rand(batch_size, KEYS, generator=generator).argsort(1)
    tokens[:, asked_at:] = order
    return tokens, values.gather(1, order), torch.arange(asked_at, seq_len) - places.gather(1, order)


def learn(model: LongNet, steps: int, batch_size: int, seq_len: int, lr: float) -> None:
    """Train on the answers alone."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        tokens, values, _ = draw(batch_size, seq_len, generator)
        loss = cross_entropy(model(tokens)[:, -KEYS:].flatten(0, 1), values.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"  step {step}: {loss.item():.3f} nats", flush=True)
