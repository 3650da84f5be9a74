"""`longnet-dist draw`: a picture of which keys each query sees, per head phase, and which keys cross ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from longnet_dist.cli.options import check_ending, check_positive
from longnet_dist.plan.pattern import Branch, Pattern
from longnet_dist.plan.shard import choose_chunk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

ENDINGS = (".png", ".svg", ".pdf")
_MAX_TOKENS = 1024
_OWN_COLOR, _GATHERED_COLOR = "#1f77b4", "#e8710a"


def run_draw(
    out: Path = Path("pattern.png"),
    segment_lengths: tuple[int, ...] = (16, 32, 64),
    dilation_rates: tuple[int, ...] = (1, 2, 4),
    head_phases: Literal["interleaved", "blocked"] = "interleaved",
    seq_len: int = 64,
    heads: int = 4,
    ranks: int = 1,
    causal: bool = True,
) -> None:
    """Draw a pattern: which keys each query sees, per head, and which of them come from other ranks.

    Args:
        out: File to write, a picture: .png, .svg or .pdf.
        segment_lengths: Segment length of each branch, in tokens.
        dilation_rates: Dilation rate of each branch.
        head_phases: Rule for the rows that each head keeps: the paper's (interleaved) or torchscale's (blocked).
        seq_len: Number of tokens of the whole sequence.
        heads: Number of key/value heads.
        ranks: Number of ranks over which the sequence is split.
        causal: Whether a query sees only keys at or before its own position.
    """
    check_positive({"seq-len": seq_len, "ranks": ranks, "heads": heads})
    pattern = Pattern(segment_lengths, dilation_rates, head_phases)
    print(draw_pattern(out, pattern, seq_len, heads, ranks, causal))


def draw_pattern(
    out: Path, pattern: Pattern, seq_len: int, num_heads: int, num_ranks: int = 1, causal: bool = True
) -> Path:
    """Draw which keys (columns) each query (row) sees, with one panel per group of heads that have the same phases.

    Blue keys are on the query's own rank, and orange keys are gathered from other ranks. A darker key is in more
    branches. Lines are the boundaries between ranks.

    Args:
        out: The picture to write; its name ends in one of `ENDINGS`.
        pattern: The branches to draw.
        seq_len: N, at most 1,024 tokens.
        num_heads: G, the number of key/value heads.
        num_ranks: Number of ranks over which the sequence is split.
        causal: Whether a query sees only keys at or before its own position.

    Returns:
        `out`.

    Raises:
        ValueError: If there are more tokens than a picture can show, or `out` has another ending.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from longnet_dist.attention.reference import branch_counts

    check_ending(out, ENDINGS)
    if not 1 <= seq_len <= _MAX_TOKENS:
        raise ValueError(
            f"seq_len is {seq_len}; a picture shows 1 to {_MAX_TOKENS} tokens. Scale the pattern down too: segments "
            "of 16, 64 and 256 look like segments of 2048, 8192 and 32768"
        )
    if num_heads > _MAX_TOKENS or num_ranks > _MAX_TOKENS:
        raise ValueError(f"{num_heads} heads on {num_ranks} ranks: a picture shows at most {_MAX_TOKENS} of either")
    chunk = choose_chunk(pattern, seq_len, num_ranks)
    counts = branch_counts(pattern, seq_len, num_heads, causal)
    heads_of: dict[tuple[int, ...], list[int]] = {}
    for head in range(num_heads):
        phases = tuple(pattern.phase(head, num_heads, branch) for branch in pattern.branches)
        heads_of.setdefault(phases, []).append(head)
    columns = min(4, len(heads_of))
    rows = -(-len(heads_of) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.5 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, (phases, heads) in zip(panels, heads_of.items(), strict=False):
        _draw_panel(panel, counts[heads[0]], chunk, num_ranks)
        kept_rows = ", ".join(map(_kept_rows, pattern.branches, phases))
        panel.set_title(f"head{'s' * (len(heads) > 1)} {', '.join(map(str, heads))}\nkept rows: {kept_rows}", size=8)
    for panel in list(panels)[len(heads_of) :]:
        panel.set_axis_off()
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks of {chunk} rows"
    figure.suptitle(f"{pattern}, {'causal' if causal else 'not causal'}, N = {seq_len}, {ranks}", size=10)
    swatches = [Patch(color=_OWN_COLOR, label="key on the query's own rank")]
    if num_ranks > 1:
        swatches.append(Patch(color=_GATHERED_COLOR, label="key gathered from another rank"))
    figure.legend(handles=swatches, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(out, dpi=150)
    return out


def _draw_panel(panel: Axes, counts: Tensor, chunk: int, num_ranks: int) -> None:
    """Draw one head, from the (N, N) numbers of branches in which each query sees each key."""
    import torch
    from matplotlib.colors import to_rgb

    seq_len = len(counts)
    rank = torch.arange(seq_len) // chunk
    own = rank[:, None] == rank[None, :]
    color = torch.where(own[..., None], torch.tensor(to_rgb(_OWN_COLOR)), torch.tensor(to_rgb(_GATHERED_COLOR)))
    strength = (0.35 + 0.65 * counts / counts.max().clamp(min=1)) * (counts > 0)
    panel.imshow((1 - strength[..., None] * (1 - color)).numpy(), interpolation="nearest")
    for start in range(chunk, min(seq_len, num_ranks * chunk), chunk):
        panel.axhline(start - 0.5, color="black", linewidth=0.6)
        panel.axvline(start - 0.5, color="black", linewidth=0.6)
    panel.set_xlabel("key", size=8)
    panel.set_ylabel("query", size=8)
    panel.tick_params(labelsize=7)


def _kept_rows(branch: Branch, phase: int) -> str:
    return "all" if branch.dilation_rate == 1 else f"{phase} mod {branch.dilation_rate}"
