"""The curves of one or several runs in one picture, or in one page with a table of how they ended."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CURVES = {
    "loss": "loss, nats a token",
    "validation_bits_per_byte": "validation, bits per byte",
    "tokens_per_second": "tokens a second",
    "grad_norm": "gradient norm",
}
ENDINGS = (".png", ".svg", ".pdf", ".html")
_TABLE = ("step", "tokens", "loss", "validation_bits_per_byte", "tokens_per_second", "mfu", "peak_memory_bytes")


def report(out: Path, runs: Sequence[Path]) -> Path:
    """Draw the metrics of `runs` against tokens into a PNG, SVG or PDF, or an HTML page that holds all it needs.

    Raises:
        ValueError: where a folder is not a run's, or the ending is none that can be written.
    """
    if out.suffix.lower() not in ENDINGS:
        raise ValueError(f"cannot draw into {out}; use a name that ends in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    if not runs:
        raise ValueError("no runs to report on; give the folders of runs, for example runs/*")
    measured = {run: _metrics(run) for run in runs}
    figure = _draw(measured)
    if out.suffix.lower() != ".html":
        figure.savefig(out, dpi=150)
        return out
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    svg = picture.getvalue()
    out.write_text(_page(measured, svg[svg.index("<svg") :]), encoding="utf-8")
    return out


def _draw(measured: dict[Path, list[dict[str, Any]]]) -> Any:
    from matplotlib.figure import Figure

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
    return figure


def _page(measured: dict[Path, list[dict[str, Any]]], svg: str) -> str:
    rows = []
    for run, steps in measured.items():
        # A validation is not of every step: the last known figure of each.
        last: dict[str, Any] = {}
        for step in steps:
            last |= {name: value for name, value in step.items() if value is not None}
        cells = "".join(f"<td>{last[name]:.6g}</td>" if name in last else "<td></td>" for name in _TABLE)
        rows.append(f"<tr><td>{html.escape(str(run))}</td>{cells}</tr>")
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in ("run", *_TABLE))
    style = "body{font-family:sans-serif}td,th{padding:.2em .8em;text-align:right}svg{max-width:100%;height:auto}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Runs</title><style>{style}</style>'
        f"<table><tr>{head}</tr>{''.join(rows)}</table>{svg}</html>\n"
    )


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{run} holds no metrics.jsonl; give the folders of runs, for example runs/*")
    lines = path.read_text().splitlines(keepends=True)
    try:
        # The last line of a run that was killed, or is being written, may be half of one.
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
