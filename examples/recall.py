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

from longnet_dist import LongNet, LongNetConfig, Pattern

KEYS, VALUES, PAIRS = 8, 16, 128
"""A byte from `PAIRS` on is a pair: PAIRS + VALUES key + value. The bytes below `KEYS` ask for a key."""
EDGES = (0, 16, 32, 48, 64, 96, 128)
"""Where intervals of distances begin, and the last one ends; also N."""
MODELS = {
    "dense": (Pattern((128,), (1,)), 4),
    "local windows, w = 16": (Pattern((16,), (1,)), 4),
    "LongNet, r up to 4, 4 heads": (Pattern((16, 32, 64, 128), (1, 2, 2, 4)), 4),
    "LongNet, r up to 8, 8 heads": (Pattern((16, 32, 64, 128), (1, 2, 4, 8)), 8),
    "LongNet, r up to 8, 4 heads": (Pattern((16, 32, 64, 128), (1, 2, 4, 8)), 4),
}
"""Patterns, and numbers of heads. With fewer heads than the largest r, no head keeps some tokens in that branch."""


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


def learn(model: LongNet, steps: int, batch_size: int) -> None:
    """Train on the answers alone."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        tokens, values, _ = draw(batch_size, EDGES[-1], generator)
        loss = cross_entropy(model(tokens)[:, -KEYS:].flatten(0, 1), values.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 250 == 0:
            print(f"  step {step}: {loss.item():.3f} nats an answer", flush=True)


@torch.no_grad()
def recalled(model: LongNet) -> list[float]:
    """Return the share of right answers in each interval of distances, over 2,048 new sequences."""
    tokens, values, distances = draw(2048, EDGES[-1], torch.Generator().manual_seed(2))
    right = (model(tokens)[:, -KEYS:].argmax(-1) == values).float()
    intervals = torch.bucketize(distances, torch.tensor(EDGES[1:-1]), right=True)
    return [right[intervals == i].mean().item() for i in range(len(EDGES) - 1)]


def main(
    steps: int = 3000, batch_size: int = 64, d_model: int = 64, num_layers: int = 2, out: Path = Path("runs/recall")
) -> None:
    """Train the models, and write a table and a picture of what they recall.

    Args:
        steps: Optimizer steps per model.
        batch_size: Sequences per step.
        d_model: Width of the models.
        num_layers: Number of layers of the models.
        out: Folder for the table and the picture.
    """
    shares = {}
    for name, (pattern, heads) in MODELS.items():
        print(name, flush=True)
        torch.manual_seed(0)
        w, r = pattern.segment_lengths, pattern.dilation_rates
        config = LongNetConfig(256, d_model, num_layers, heads, segment_lengths=w, dilation_rates=r)
        model = config.build()
        learn(model, steps, batch_size)
        shares[name] = recalled(model)
    labels = [f"{EDGES[i]} to {EDGES[i + 1] - 1}" for i in range(len(EDGES) - 1)]
    table = ["| distance | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
    table += [f"| {name} | " + " | ".join(f"{share:.2f}" for share in row) + " |" for name, row in shares.items()]
    out.mkdir(parents=True, exist_ok=True)
    (out / "recall.md").write_text("\n".join(table) + "\n")
    print(f"the share of answers that are right; {1 / VALUES:.2f} by chance\n", *table, sep="\n")
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for name, row in shares.items():
        panel.plot(labels, row, marker="o", label=name)
    panel.set_xlabel("distance of the question from the value, in tokens")
    panel.set_ylabel("share of right answers")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    figure.savefig(out / "recall.png", dpi=150)


if __name__ == "__main__":
    tyro.cli(main)
