"""Compare LongNet, dense attention and local windows at equal steps and tokens: a small version of the paper's table 2.

    OMP_NUM_THREADS=2 python examples/quality.py --steps 400

Three models that differ only in their attention are trained on sequences of 16k bytes of the default corpus. They are
evaluated on its held-out part, in sequences of 2k, 4k, 8k and 16k. After an interruption, the same command resumes.
"""

from __future__ import annotations

from pathlib import Path

import tyro
from matplotlib.figure import Figure

from longnet_dist import LongNetConfig, TrainConfig, train
from longnet_dist.inference.evaluate import bits_by_position
from longnet_dist.training.job import load_corpus
from longnet_dist.training.state import load_model

LONGEST = 16384
LENGTHS = (2048, 4096, 8192, LONGEST)
PATTERNS = {
    "LongNet": ((2048, 4096, 8192, LONGEST), (1, 2, 4, 6)),  # The paper's branches up to 16k.
    "dense": ((LONGEST,), (1,)),
    "local windows": ((2048,), (1,)),
}


def main(
    steps: int = 400, d_model: int = 64, num_layers: int = 2, held_out: int = 16, runs: Path = Path("runs/quality")
) -> None:
    """Train and evaluate the models, and write a table and a picture.

    Args:
        steps: Optimizer steps per model.
        d_model: Width of the models.
        num_layers: Number of layers of the models.
        held_out: Number of held-out sequences of 16k bytes to evaluate.
        runs: Folder for the runs, the table and the picture.
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
            return  # A signal stopped the run.
        rows[name] = _bits_by_length(config, held_out * LONGEST)
    table = [f"| {'attention':13} | " + " | ".join(f"{length // 1024}k" for length in LENGTHS) + " |"]
    table += ["|---" * (len(LENGTHS) + 1) + "|"]
    table += [f"| {name:13} | " + " | ".join(f"{bits:.3f}" for bits in row) + " |" for name, row in rows.items()]
    (runs / "quality.md").write_text("\n".join(table) + "\n")
    print("held-out bits per byte, by the length of the context\n", *table, sep="\n")
    _draw(rows, runs / "quality.png")


def _bits_by_length(config: TrainConfig, num_tokens: int) -> list[float]:
    """Return the bits per byte of the same held-out tokens, cut into sequences of each length."""
    assert config.run_folder is not None
    model, stream = load_model(config.run_folder).eval(), load_corpus(config).validation
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
