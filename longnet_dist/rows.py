"""Rows of a tensor as rectangles: keep them, place them, and merge two (out, lse) of the same rows."""

from __future__ import annotations

import torch
from torch import Tensor

from longnet_dist.plan import Heads, Rows


def rectangle(x_BLG: Tensor, heads: Heads, rows: Rows) -> Tensor:
    """The rows and heads of a plan as a view: (B, L, G, ...) -> (B, S, F, I, M, ...), S segments, F phases.

    One stride each, because the kept rows of the next phase lie `rows.phase_step` rows, and its heads
    `heads.phase_step` heads, further on. No copy; writing to the view writes to `x`.
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


def merge_(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Merge attention over other keys into `out` (..., D) and `lse` (...), in place: online softmax.

    `other_lse` is finite: a rectangle has at least one key. An `lse` of -inf (no key seen yet) gives
    the other all the weight, so a row's first merge is a copy.
    """
    weight = torch.sigmoid(other_lse - lse)
    out.lerp_(other_out.to(out.dtype), weight.unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, other_lse))
