"""The curves of one or several runs in one picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

CURVES = {
    "loss": "loss, nats a token",
    "validation_bits_per_byte": "validation, bits per byte",
    "tokens_per_second": "tokens a second",
    "grad_norm": "gradient norm",
}


def report(out: Path, runs: Sequence[Path]) -> Path:
    """Draw the metrics of `runs` against tokens into a PNG, SVG or PDF.

    Raises:
        ValueError: where a folder is not a run's, or the ending is none that can be written.
    """
    from matplotlib.figure import Figure

    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"cannot draw into {out}; use a name that ends in .png, .svg or .pdf")
    measured = {run: _metrics(run) for run in runs}
    figure = Figure(figsize=(10, 7), layout="constrained")
    for panel, (name, title) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        for run, steps in measured.items():
            known = [step for step in steps if step.get(name) is not None]
            marker = "o" if name.startswith("validation") else ""
            panel.plot([s["tokens"] for s in known], [s[name] for s in known], marker=marker, label=run.name)
        panel.set_title(title, size=10)
        panel.set_xlabel("tokens", size=8)
        panel.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(out, dpi=150)
    return out


def _metrics(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{run} holds no metrics.jsonl; give the folders of runs, for example runs/*")
    return [json.loads(line) for line in path.read_text().splitlines()]
