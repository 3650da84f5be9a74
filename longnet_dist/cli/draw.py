"""A picture of a pattern: who sees whom, by head phase, and what of it crosses ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longnet_dist.attention.reference import branch_counts
from longnet_dist.plan.pattern import Branch, Pattern
from longnet_dist.plan.shard import Shard, choose_chunk

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_TOKENS = 1024
_OWN, _GATHERED = "#1f77b4", "#e8710a"


def draw_pattern(
    path: Path, pattern: Pattern, seq_len: int, num_heads: int, num_ranks: int = 1, causal: bool = True
) -> Path:
    """Draw which keys (columns) each query (row) sees, a panel for each kind of head, into a PNG, SVG or PDF.

    Blue keys are on the query's own rank, orange ones are gathered from another; the darker, the
    more branches hold the pair. Lines are the ranks' boundaries.

    Raises:
        ValueError: for more than 1,024 tokens, which no picture shows, or an ending matplotlib cannot write.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not 1 <= seq_len <= _MOST_TOKENS:
        raise ValueError(
            f"seq_len is {seq_len}; a picture shows 1 to {_MOST_TOKENS} tokens. Scale the pattern down with it: "
            "segments of 16, 64 and 256 look as 2048, 8192 and 32768 do"
        )
    chunk = choose_chunk(pattern, seq_len, num_ranks)
    counts = branch_counts(pattern, seq_len, num_heads, causal)
    kinds: dict[tuple[int, ...], list[int]] = {}
    for head in range(num_heads):
        phases = tuple(pattern.phase(head, num_heads, branch) for branch in pattern.branches)
        kinds.setdefault(phases, []).append(head)
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.5 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, (phases, heads) in zip(panels, kinds.items(), strict=False):
        _panel(panel, counts[heads[0]], chunk, num_ranks)
        kept = ", ".join(map(_kept, pattern.branches, phases))
        panel.set_title(f"{_named('head', heads)}\nkept rows: {kept}", size=8)
    for panel in list(panels)[len(kinds) :]:
        panel.set_axis_off()
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks of {chunk} rows"
    figure.suptitle(f"{pattern}, {'causal' if causal else 'not causal'}, N = {seq_len}, {ranks}", size=10)
    names = {"key on the query's own rank": _OWN, "key gathered from another rank": _GATHERED}
    swatches = [Patch(color=color, label=name) for name, color in names.items()][: 1 if num_ranks == 1 else 2]
    figure.legend(handles=swatches, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"cannot draw into {path}; use a name that ends in .png, .svg or .pdf")
    figure.savefig(path, dpi=150)
    return path


def _panel(panel: Axes, counts: torch.Tensor, chunk: int, num_ranks: int) -> None:
    from matplotlib.colors import to_rgb

    seq_len = len(counts)
    rank = torch.arange(seq_len) // chunk
    same = rank[:, None] == rank[None, :]
    color = torch.where(same[..., None], torch.tensor(to_rgb(_OWN)), torch.tensor(to_rgb(_GATHERED)))
    strength = (0.35 + 0.65 * counts / counts.max().clamp(min=1)) * (counts > 0)
    panel.imshow((1 - strength[..., None] * (1 - color)).numpy(), interpolation="nearest")
    for c in range(1, num_ranks):
        if c * chunk < seq_len:
            panel.axhline(Shard(seq_len, chunk, c, num_ranks).start - 0.5, color="black", linewidth=0.6)
            panel.axvline(Shard(seq_len, chunk, c, num_ranks).start - 0.5, color="black", linewidth=0.6)
    panel.set_xlabel("key", size=8)
    panel.set_ylabel("query", size=8)
    panel.tick_params(labelsize=7)


def _kept(branch: Branch, phase: int) -> str:
    return "all" if branch.dilation_rate == 1 else f"{phase} mod {branch.dilation_rate}"


def _named(noun: str, numbers: list[int]) -> str:
    return f"{noun}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
