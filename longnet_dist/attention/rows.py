"""Rectangles of rows: views of them, sums of them, and merges of (out, lse) over the same rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from longnet_dist.plan.blocks import Heads, Rows

_NEVER = 1 << 30
"""Above the number of any branch."""


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


def pieces(heads: Heads, rows: Rows, in_place: bool = False) -> Iterator[tuple[Heads, Rows]]:
    """Cut a rectangle into parts that kernels can attend without copies, because one stride serves each dimension.

    Segments and phases have different strides. So a rectangle of several of both is cut along the smaller number, and
    into at least about four parts, because the results of a part take memory beside those of all. If the kernel attends
    rectangles `in_place`, they stay whole.
    """
    if in_place or 1 in (rows.segments, heads.phases):
        yield heads, rows
        return
    by_phase = heads.phases <= rows.segments
    segments = -(-rows.segments // max(1, 4 // heads.phases)) if by_phase else 1
    for f in range(heads.phases if by_phase else 1):
        part_heads = replace(heads, first=heads.first + f * heads.phase_step, phases=1) if by_phase else heads
        for s in range(0, rows.segments, segments):
            start = f * rows.phase_step + s * rows.segment_step
            position, count = rows.position + start, min(segments, rows.segments - s)
            yield part_heads, replace(rows, first=rows.first + start, position=position, segments=count)


def as_keys(x_BSFJMD: Tensor, in_place: bool = False) -> Tensor:
    """Reshape K or V of a rectangle for a kernel, (B, S, F, J, M, D) -> (b = B S F, J, M, D).

    The result is a view if strides allow it, else a copy. A kernel that attends rectangles `in_place` gets them as
    they are.
    """
    return x_BSFJMD if in_place else x_BSFJMD.flatten(0, 2)


def as_queries(x_BSFIMR: Tensor, in_place: bool = False) -> Tensor:
    """Reshape a tensor with query heads for a kernel, (B, S, F, I, M, R, ...) -> (b = B S F, I, M R, ...)."""
    return x_BSFIMR if in_place else x_BSFIMR.flatten(0, 2).flatten(2, 3)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which pieces are merged and summed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class SummedRows:
    """A sum of rectangles with the shape of `like`, (B, L, G, ...); rows to which nothing was added are 0.

    Rectangles are added in the order of their branches, so that the sum has the same bits however they were
    computed. Those of branches before `first_shared` are added at once, and others wait for `result`.
    """

    def __init__(self, like: Tensor, first_shared: int) -> None:
        self.like = like
        self.first_shared = first_shared
        self.dtype = accumulation_dtype(like.dtype)
        self.total: Tensor | None = None
        self.waiting: list[tuple[int, Heads, Rows, Tensor]] = []

    def add(self, branch: int, heads: Heads, rows: Rows, part: Tensor) -> None:
        """Add `part`, which has as many elements as the rectangle. Its memory may become that of the sum."""
        if branch >= self.first_shared:
            self.waiting.append((branch, heads, rows, part))
        elif self.total is None and _is_whole(self.like, heads, rows):
            self.total = _own_memory(part.reshape(self.like.shape).to(self.dtype))
        else:
            target = rectangle(self._total(), heads, rows)
            target += part.reshape(target.shape)

    def result(self) -> Tensor:
        """The sum, in the accumulation dtype."""
        waiting, self.waiting = sorted(self.waiting, key=lambda entry: entry[0]), []
        self.first_shared = _NEVER
        for entry in waiting:
            self.add(*entry)
        return self._total()

    def _total(self) -> Tensor:
        if self.total is None:
            self.total = torch.zeros(self.like.shape, dtype=self.dtype, device=self.like.device)
        return self.total


class MergedRows:
    """Attention results of all queries, merged over more and more keys by an online softmax on (out, lse).

    A row that has seen no key yet has out 0 and lse -inf. The order of merges is that of `SummedRows`.

    Args:
        like: a tensor with the shape of the queries, (B, L, G, H / G, D).
        first_shared: the number of the first branch whose results wait.
    """

    def __init__(self, like: Tensor, first_shared: int) -> None:
        self.like = like
        self.first_shared = first_shared
        self.out: Tensor | None = None
        self.lse: Tensor | None = None
        self.waiting: list[tuple[int, Heads, Rows, Tensor, Tensor]] = []

    def merge(self, branch: int, heads: Heads, rows: Rows, out: Tensor, lse: Tensor) -> None:
        """Merge the results of a rectangle over other keys: `out` and a finite `lse`, in the rectangle's order."""
        if branch >= self.first_shared:
            self.waiting.append((branch, heads, rows, out, lse))
            return
        if self.out is None and _is_whole(self.like, heads, rows):
            self.out = _own_memory(out.reshape(self.like.shape).to(accumulation_dtype(self.like.dtype)))
            self.lse = _own_memory(lse.reshape(self.like.shape[:-1]))
            return
        merged_out, merged_lse = (rectangle(x, heads, rows) for x in self._merged())
        _merge_into(merged_out, merged_lse, out.reshape(merged_out.shape), lse.reshape(merged_lse.shape))

    def result(self) -> tuple[Tensor, Tensor]:
        """The merged (out, lse), in the accumulation dtype."""
        waiting, self.waiting = sorted(self.waiting, key=lambda entry: entry[0]), []
        self.first_shared = _NEVER
        for entry in waiting:
            self.merge(*entry)
        return self._merged()

    def _merged(self) -> tuple[Tensor, Tensor]:
        if self.out is None or self.lse is None:
            dtype, device = accumulation_dtype(self.like.dtype), self.like.device
            self.out = torch.zeros(self.like.shape, dtype=dtype, device=device)
            self.lse = torch.full(self.like.shape[:-1], -torch.inf, dtype=dtype, device=device)
        return self.out, self.lse


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the results of the same queries over two sets of keys; returns (out, lse) in the accumulation dtype."""
    out, lse = out.to(accumulation_dtype(out.dtype), copy=True), lse.clone()
    _merge_into(out, lse, other_out, other_lse)
    return out, lse


def _merge_into(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    # On CPUs in float64: in float32 the bits of an exp depend on whether it falls into a vector or a loop's remainder.
    ours, others = (x.double() if x.device.type == "cpu" else x for x in (lse, other_lse))
    # An lse of -inf gives the other side all the weight: a row's first merge is a copy.
    weight = torch.sigmoid(others - ours).to(out.dtype)
    out.lerp_(other_out.to(out.dtype), weight.unsqueeze(-1))
    lse.copy_(torch.logaddexp(ours, others))


def _own_memory(x: Tensor) -> Tensor:
    """Return x, copied if it is a part of larger memory, because an operator's results must not share any."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def _is_whole(x_BLG: Tensor, heads: Heads, rows: Rows) -> bool:
    """Whether a rectangle holds every row and head of x in order, so that its elements are those of x."""
    every_row = rows.first == 0 and rows.step == 1 and rows.segments * rows.count == x_BLG.shape[1]
    return every_row and heads.phases == 1 and heads.step == 1 and heads.per_phase == x_BLG.shape[2]
