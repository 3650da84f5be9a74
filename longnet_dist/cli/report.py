"""`longnet-dist report`: the curves of one or several runs as a picture, or as a page with a table of final values."""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from longnet_dist.checkpoints.storage import storage_path
from longnet_dist.cli.options import check_ending
from longnet_dist.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Metrics = list[dict[str, Any]]
"""The objects in a metrics.jsonl, one per step."""

CURVES = {
    "bits_per_byte": "training, bits per byte",
    "validation_bits_per_byte": "validation, bits per byte",
    "tokens_per_second": "tokens per second",
    "grad_norm": "gradient norm",
}
ENDINGS = (".png", ".svg", ".pdf", ".html")
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "step": ("step", "{:,}".format),
    "tokens": ("tokens", "{:,}".format),
    "loss": ("loss (nats per token)", "{:.4g}".format),
    "validation_bits_per_byte": ("validation (bits per byte)", "{:.4g}".format),
    "tokens_per_second": ("tokens per second", "{:,.0f}".format),
    "mfu": ("MFU", "{:.1%}".format),
    "peak_memory_bytes": ("peak memory", format_bytes),
}
"""The title and format of each column of the table, by the name of its metric."""


def run_report(
    runs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN...")]],
    out: Path = Path("report.png"),
    smoothing: float = 0.0,
) -> None:
    """Draw the curves of one or several runs into one picture or HTML page.

    Args:
        runs: Folders of the runs, or their URLs in an object store.
        out: File to write: .png, .svg or .pdf for a picture, .html for a page with tables of final values and options.
        smoothing: Weight of the past in each point of the training curves, from 0 for none to below 1.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"--smoothing is {smoothing}; it must be at least 0 and below 1")
    print(write_report(out, [storage_path(run) for run in runs], smoothing))


def write_report(out: Path, runs: Sequence[Path], smoothing: float = 0.0) -> Path:
    """Draw the metrics of runs against tokens, into a picture or a self-contained HTML page.

    Args:
        out: The file to write; its name ends in one of `ENDINGS`.
        runs: The folders of the runs.
        smoothing: The weight of the past in each point of the training curves.

    Returns:
        `out`.

    Raises:
        ValueError: If there are no runs, a folder has no metrics, or `out` has another ending.
    """
    check_ending(out, ENDINGS)
    if not runs:
        raise ValueError("no runs to report on; give the folders of runs, for example runs/*")
    metrics = {run: _read_metrics(run) for run in runs}
    figure = _draw_curves(metrics, smoothing)
    if out.suffix.lower() != ".html":
        figure.savefig(out, dpi=150)
        return out
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    svg = picture.getvalue()
    out.write_text(_page(metrics, svg[svg.index("<svg") :]), encoding="utf-8")
    return out


def _read_metrics(run: Path) -> Metrics:
    path = run / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{run} holds no metrics.jsonl; give the folders of runs, for example runs/*")
    try:
        lines = path.read_text().splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    # The last line may be incomplete: the run was killed, or is writing it.
    return [_read_line(f"{path}, line {n}", line) for n, line in enumerate(lines, start=1) if line.endswith("\n")]


def _read_line(place: str, line: str) -> dict[str, Any]:
    """Read a line of metrics, of which all that is drawn or listed must be finite numbers, or null."""
    try:
        metrics = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} cannot be read: {error}") from None
    if not isinstance(metrics, dict):
        raise ValueError(f"{place} is {type(metrics).__name__}; it must be an object with the metrics of a step")
    for name in {*CURVES, *_COLUMNS} & metrics.keys() | {"step", "tokens"}:
        value = metrics.get(name)
        required = name in ("step", "tokens")
        if not (value is None and not required) and not _is_number(value):
            problem = f"has {name} {value!r}" if name in metrics else f"has no {name}"
            raise ValueError(f"{place} {problem}; it must be a finite number{'' if required else ' or null'}")
    return metrics


def _is_number(value: object) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:
        return False


def _draw_curves(metrics: dict[Path, Metrics], smoothing: float) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(10, 7), layout="constrained")
    names = _distinct_names(list(metrics))
    for panel, (name, title) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        for run, steps in metrics.items():
            points = [step for step in steps if step.get(name) is not None]
            is_validation = name.startswith("validation")
            values = _smooth([s[name] for s in points], 0.0 if is_validation else smoothing)
            marker = "o" if is_validation else ""
            (line,) = panel.plot([s["tokens"] for s in points], values, marker=marker, label=names[run])
            unigram = next((s["unigram_bits_per_byte"] for s in points if s.get("unigram_bits_per_byte")), None)
            if is_validation and unigram is not None:
                panel.axhline(unigram, color=line.get_color(), linestyle=":", label=f"unigram model of {names[run]}")
        panel.set_title(title, size=10)
        panel.set_xlabel("tokens", size=8)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        if name == "tokens_per_second":
            panel.yaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.axes[1].legend(fontsize=8)
    return figure


def _smooth(values: list[float], smoothing: float) -> list[float]:
    """Return the moving averages of values, in which the past has the weight `smoothing`, without a bias to 0."""
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = smoothing * total + value, smoothing * weight + 1
        smoothed.append(total / weight)
    return smoothed


def _distinct_names(runs: Sequence[Path]) -> dict[Path, str]:
    """Name each run by the fewest last parts of its path that no other run has."""
    names = {}
    for run in runs:
        parts = run.parts
        others = [other.parts for other in runs if other != run]
        count = next((n for n in range(1, len(parts)) if all(p[-n:] != parts[-n:] for p in others)), len(parts))
        names[run] = "/".join(parts[-count:])
    return names


def _differing_options(runs: Sequence[Path]) -> dict[str, list[str]]:
    """Return the options in which runs differ, each with its value in every run."""
    options: list[dict[str, Any]] = []
    for run in runs:
        try:
            saved = json.loads((run / "config.json").read_text())
            options.append({**saved, **{f"model.{name}": value for name, value in saved.pop("model", {}).items()}})
        except (OSError, ValueError, AttributeError, TypeError):
            options.append({})
    names = dict.fromkeys(name for saved in options for name in saved if name not in ("run_folder", "model"))
    values = {name: [str(saved.get(name, "")) for saved in options] for name in names}
    return {name: texts for name, texts in values.items() if len(set(texts)) > 1}


def _page(metrics: dict[Path, Metrics], svg: str) -> str:
    rows = []
    for run, steps in metrics.items():
        # Most steps have no validation, so the last value of each metric may be of a different step.
        last: dict[str, Any] = {}
        for step in steps:
            last |= {name: value for name, value in step.items() if value is not None}
        cells = "".join(
            f"<td>{to_text(last[name]) if name in last else ''}</td>" for name, (_, to_text) in _COLUMNS.items()
        )
        rows.append(f"<tr><td>{html.escape(str(run))}</td>{cells}</tr>")
    head = "".join(f"<th>{title}</th>" for title in ("run", *(title for title, _ in _COLUMNS.values())))
    style = "body{font-family:sans-serif}td,th{padding:.2em .8em;text-align:right}svg{max-width:100%;height:auto}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Runs</title><style>{style}</style>'
        f"<table><tr>{head}</tr>{''.join(rows)}</table>{_options_table(list(metrics))}{svg}</html>\n"
    )


def _options_table(runs: Sequence[Path]) -> str:
    """Return a table of the options in which runs differ, side by side."""
    differing, names = _differing_options(runs), _distinct_names(runs)
    if not differing:
        return ""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in ("option", *(names[run] for run in runs)))
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in (name, *values)) + "</tr>"
        for name, values in differing.items()
    )
    return f"<table><tr>{head}</tr>{rows}</table>"
