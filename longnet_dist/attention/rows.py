"""Rectangles of rows: views of them, sums of them, and merges of (out, lse) over the same rows."""

from __future__ import annotations

import torch
from torch import Tensor

from longnet_dist.plan.blocks import Heads, Rows


def rectangle(x_BLG: Tensor, heads: Heads, rows: Rows) -> Tensor:
    """View the rows and heads of a plan: (B, L, G, ...) -> (B, S, F, I, M, ...), S segments, F phases.

    Each dimension has one stride. That holds for F because the next phase's rows and heads lie `rows.phase_step` rows
    and `heads.phase_step` heads further on. Nothing is copied; writing to the view writes to `x`.
    """
    batch, row, head, *rest = x_BLG.stride()
    return x_BLG.as_strided(
        (len(x_BLG), rows.segments, heads.phases, rows.count, heads.per_phase, *x_BLG.shape[3:]),
        (
            batch,
            rows.segment_step * row,
            rows.phase_step * row + heads.phase_step * head,
            rows.step * row,
            heads.step * head,
            *rest,
        ),
        x_BLG.storage_offset() + rows.first * row + heads.first * head,
    )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which pieces are merged and summed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class SummedRows:
    """A sum of rectangles with the shape of `like`, (B, L, G, ...); rows to which nothing was added are 0."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.dtype = accumulation_dtype(like.dtype)
        self.total: Tensor | None = None

    def add(self, heads: Heads, rows: Rows, part: Tensor) -> None:
        """Add `part`, which has as many elements as the rectangle. Its memory may become that of the sum."""
        if self.total is None and _is_whole(self.like, heads, rows):
            self.total = part.reshape(self.like.shape).to(self.dtype)
            return
        target = rectangle(self.result(), heads, rows)
        target += part.reshape(target.shape)

    def result(self) -> Tensor:
        """The sum so far, in the accumulation dtype."""
        if self.total is None:
            self.total = torch.zeros(self.like.shape, dtype=self.dtype, device=self.like.device)
        return self.total


class MergedRows:
    """Attention results of all queries, merged over more and more keys by an online softmax on (out, lse).

    A row that has seen no key yet has out 0 and lse -inf.

    Args:
        like: a tensor with the shape of the queries, (B, L, G, H / G, D).
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def merge(self, heads: Heads, rows: Rows, out: Tensor, lse: Tensor) -> None:
        """Merge the results of a rectangle over other keys: `out` and a finite `lse`, in the rectangle's order."""
        if self.out is None and _is_whole(self.like, heads, rows):
            self.out = out.reshape(self.like.shape).to(accumulation_dtype(self.like.dtype))
            self.lse = lse.reshape(self.like.shape[:-1])
            return
        merged_out, merged_lse = (rectangle(x, heads, rows) for x in self.result())
        out, lse = out.reshape(merged_out.shape), lse.reshape(merged_lse.shape)
        # An lse of -inf gives the other side all the weight: a row's first merge is a copy.
        weight = torch.sigmoid(lse - merged_lse)
        merged_out.lerp_(out.to(merged_out.dtype), weight.unsqueeze(-1))
        merged_lse.copy_(torch.logaddexp(merged_lse, lse))

    def result(self) -> tuple[Tensor, Tensor]:
        """The (out, lse) so far, in the accumulation dtype; later merges write to it."""
        if self.out is None or self.lse is None:
            dtype, device = accumulation_dtype(self.like.dtype), self.like.device
            self.out = torch.zeros(self.like.shape, dtype=dtype, device=device)
            self.lse = torch.full(self.like.shape[:-1], -torch.inf, dtype=dtype, device=device)
        return self.out, self.lse


def _is_whole(x_BLG: Tensor, heads: Heads, rows: Rows) -> bool:
    """Whether a rectangle holds every row and head of x in order, so that its elements are those of x."""
    every_row = rows.first == 0 and rows.step == 1 and rows.segments * rows.count == x_BLG.shape[1]
    return every_row and heads.phases == 1 and heads.step == 1 and heads.per_phase == x_BLG.shape[2]
