"""Where the rows of a shared segment lie in the buffers that ranks exchange: index tables, made once per plan.

A buffer holds, for each source rank, its kept rows of the first head, then of the second, and so on. With
these tables, packing and unpacking take one kernel each, however many ranks there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longnet_dist.attention.rows import as_keys, uses_triton
from longnet_dist.plan.blocks import Heads, Rows
from longnet_dist.plan.exchange import SharedSegment


class Layout:
    """The layout of a buffer of rows.

    Args:
        segment: the segment whose rows it holds.
        sources: the ranks whose rows it holds, in order.
        heads: the key/value heads whose rows it holds.
        rows_per_source: the size of each source's part; by default as many rows as the source keeps.
    """

    def __init__(
        self, segment: SharedSegment, sources: Sequence[int], heads: range, rows_per_source: int | None = None
    ) -> None:
        self.segment, self.heads = segment, heads
        ranks, r = torch.tensor(sources, dtype=torch.int64), segment.branch.dilation_rate
        phases = torch.tensor(segment.phases, dtype=torch.int64)[heads.start : heads.stop]
        start = (ranks * segment.chunk).clamp(min=segment.start)[:, None]
        end = ((ranks + 1) * segment.chunk).clamp(max=segment.stop)[:, None]
        self.first = start + (phases - (start - segment.start)) % r
        self.counts = ((end - self.first + r - 1) // r).clamp(min=0)
        counts = self.counts if rows_per_source else self.counts.view(1, -1)
        offsets = (counts.cumsum(1) - counts).view_as(self.counts)
        self.offsets = offsets + (torch.arange(len(ranks))[:, None] * (rows_per_source or 0))
        self.source_of = torch.full((segment.num_ranks,), -1)
        self.source_of[ranks - segment.first_rank] = torch.arange(len(ranks))

    def index(self, positions: Tensor, heads: Tensor) -> Tensor:
        """Return where the rows at these global positions lie, for these heads; both broadcast together."""
        source = self.source_of[positions // self.segment.chunk - self.segment.first_rank]
        heads = heads - self.heads.start
        return (
            self.offsets[source, heads] + (positions - self.first[source, heads]) // self.segment.branch.dilation_rate
        )


def sizes_by_rank(first_rank: int, num_ranks: int, *rows: tuple[Sequence[int], Sequence[int]]) -> list[int]:
    """Return the number of rows for each of consecutive ranks, from pairs of some ranks and their numbers of rows."""
    sizes = [0] * num_ranks
    for ranks, counts in rows:
        for rank, count in zip(ranks, counts, strict=True):
            sizes[rank - first_rank] += count
    return sizes


class KeptRows(NamedTuple):
    """The rows that a rank keeps of a segment, head by head, as they are packed to be sent.

    Args:
        rows: indices of rows in the rank's chunk, int64, (n,).
        heads: their key/value heads, int64, (n,).
    """

    rows: Tensor
    heads: Tensor

    def pack(self, x_BLG: Tensor) -> Tensor:
        """Copy the rows of a tensor: (B, L, G, ..., D) -> (n, ..., B, D)."""
        batch_inside = x_BLG.movedim(0, -2)
        return batch_inside[self.rows, self.heads]

    def pack_both(self, k: Tensor, v: Tensor) -> Tensor:
        """Copy the rows of keys and values: (B, L, G, D) each -> (n, 2, B, D)."""
        if not uses_triton(k):
            return torch.stack([self.pack(k), self.pack(v)], dim=1)
        from longnet_dist.attention.exchanges import triton_rows

        packed = k.new_empty(len(self.rows), 2, len(k), k.shape[-1])
        triton_rows.gather(packed, k, v, self.rows, self.heads)
        return packed


def unpack_both(buffer: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Copy rectangles of keys and values from a buffer, (n, 2, B, D), by an index, (F, I, M) -> (B F, I, M, D)."""
    if not uses_triton(buffer):
        k, v = (as_keys(x.movedim(-2, 0)[:, None]) for x in buffer[index].unbind(-3))
        return k, v
    from longnet_dist.attention.exchanges import triton_rows

    batch, dim = buffer.shape[2:]
    both = buffer.new_empty(2, batch, index.numel(), dim)
    k, v = (x.movedim(1, 0).unsqueeze(2) for x in buffer.unbind(1))
    triton_rows.gather(both.permute(2, 0, 1, 3), k, v, index.flatten(), None)
    k, v = both.unflatten(2, index.shape).flatten(1, 2)
    return k, v


@lru_cache(maxsize=64)
def kept_rows(segment: SharedSegment, device: torch.device) -> KeptRows:
    """Return the rows of this rank in the order in which they are packed."""
    layout = Layout(segment, [segment.rank], range(len(segment.phases)))
    counts = layout.counts[0]
    heads = torch.repeat_interleave(counts)
    number = torch.arange(len(heads)) - layout.offsets[0, heads]
    rows = layout.first[0, heads] + number * segment.branch.dilation_rate - segment.rank * segment.chunk
    return KeptRows(rows.to(device), heads.to(device))


@lru_cache(maxsize=64)
def packed_index(segment: SharedSegment, heads: Heads, rows: Rows, device: torch.device) -> Tensor:
    """Return where the rows of a rectangle of this rank lie among its packed rows: int64, (F, I, M)."""
    layout = Layout(segment, [segment.rank], range(len(segment.phases)))
    return layout.index(*positions_and_heads(heads, rows)).to(device)


def positions_and_heads(heads: Heads, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return the global positions (F, I, 1) and the heads (F, 1, M) of a rectangle in one segment."""
    phases, count, per_phase = (torch.arange(n) for n in (heads.phases, rows.count, heads.per_phase))
    positions = rows.position + phases[:, None, None] * rows.phase_step + count[None, :, None] * rows.rate
    return positions, heads.first + phases[:, None, None] * heads.phase_step + per_phase[None, None, :] * heads.step
