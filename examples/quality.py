"""The paper's table 2 in small: LongNet, dense attention and local windows, at equal steps and tokens.

    OMP_NUM_THREADS=2 python examples/quality.py --steps 400

Three models, alike but for who sees whom, are trained on sequences of 16k bytes of the default corpus, and asked for
the held-out part in sequences of 2k, 4k, 8k and 16k. Started again, it goes on from the runs' checkpoints.
"""

from __future__ import annotations

from pathlib import Path

import tyro
from matplotlib.figure import Figure

from longnet_dist import LongNetConfig, TrainConfig, train
from longnet_dist.checkpoints.checkpoints import load_model
from longnet_dist.inference.evaluate import bits_by_position
from longnet_dist.training.job import corpus_of

LONGEST = 16384
LENGTHS = (2048, 4096, 8192, LONGEST)
PATTERNS = {
    "LongNet": ((2048, 4096, 8192, LONGEST), (1, 2, 4, 6)),  # The paper's, up to 16k.
    "dense": ((LONGEST,), (1,)),
    "local windows": ((2048,), (1,)),
}


def main(
    steps: int = 400, d_model: int = 64, num_layers: int = 2, held_out: int = 16, runs: Path = Path("runs/quality")
) -> None:
    """Train, evaluate, and write table and picture.

    Args:
        steps: Optimizer steps of each model.
        d_model: Width of the models.
        num_layers: Layers of the models.
        held_out: Sequences of 16k that are evaluated.
        runs: Where the runs, the table and the picture go.
    """
    rows = {}
    for name, (segment_lengths, dilation_rates) in PATTERNS.items():
        config = TrainConfig(
            seq_len=LONGEST,
            steps=steps,
            checkpoint_every=20,
            validate_every=0,
            run_folder=runs / name.replace(" ", "-"),
            model=LongNetConfig(
                d_model=d_model, num_layers=num_layers, segment_lengths=segment_lengths, dilation_rates=dilation_rates
            ),
        )
        if train(config).step < steps:
            return  # Stopped by a signal.
        rows[name] = _by_length(config, held_out * LONGEST)
    table = [f"| {'attention':13} | " + " | ".join(f"{length // 1024}k" for length in LENGTHS) + " |"]
    table += ["|---" * (len(LENGTHS) + 1) + "|"]
    table += [f"| {name:13} | " + " | ".join(f"{bits:.3f}" for bits in row) + " |" for name, row in rows.items()]
    (runs / "quality.md").write_text("\n".join(table) + "\n")
    print("held-out bits per byte, by the length of the context\n", *table, sep="\n")
    _draw(rows, runs / "quality.png")


def _by_length(config: TrainConfig, num_tokens: int) -> list[float]:
    """Bits per byte of the same held-out tokens, cut into sequences of each length."""
    assert config.run_folder is not None
    model, stream = load_model(config.run_folder).eval(), corpus_of(config).validation
    return [bits_by_position(model, stream, length, num_tokens // length, ())[0][2] for length in LENGTHS]


def _draw(rows: dict[str, list[float]], out: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for name, row in rows.items():
        panel.plot([f"{length // 1024}k" for length in LENGTHS], row, marker="o", label=name)
    panel.set_xlabel("tokens of context")
    panel.set_ylabel("held-out bits per byte")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    tyro.cli(main)
