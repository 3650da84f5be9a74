"""Rectangles of rows: views of them, their shapes in kernels, and the packing of many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longnet_dist.plan.blocks import BlockGroup, Heads, Rows


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


class Packing(NamedTuple):
    """Where the rows of a group's squares lie, for a kernel that takes variable lengths.

    Args:
        rows, heads: the row and the key/value head of each packed row and head, int64, (T, M): T rows of a sequence.
        offsets: where each square begins, over all sequences of the batch, and the last one ends: int32.
        longest: the most rows of a square.
        parts: the packed rows of each of the group's blocks: (first, end).
    """

    rows: Tensor
    heads: Tensor
    offsets: Tensor
    longest: int
    parts: tuple[tuple[int, int], ...]

    def pack(self, x_BLG: Tensor) -> Tensor:
        """Copy rows and heads: (B, L, G, ...) -> (B T, M, ...)."""
        return x_BLG[:, self.rows, self.heads].flatten(0, 1)


@lru_cache(maxsize=64)
def packing(group: BlockGroup, batch: int, device: torch.device) -> Packing:
    """Return the packing of a group of blocks, whose squares are the phases of segments."""
    rows_of_all, heads_of_all, sizes, parts = [], [], [], []
    end = 0
    for block in group.blocks:
        heads, rows = block.heads, block.rows
        by_phase = torch.tensor(heads.table, dtype=torch.int64)
        segments, phases, count = (torch.arange(n) for n in (rows.segments, heads.phases, rows.count))
        starts = rows.first + segments[:, None] * rows.segment_step + phases * rows.phase_step
        rows_of_all.append((starts[..., None] + count * rows.step).flatten())
        heads_of_all.append(by_phase[None, :, None].expand(rows.segments, -1, rows.count, -1).flatten(0, 2))
        sizes += [rows.count] * (rows.segments * heads.phases)
        parts.append((end, end := end + len(rows_of_all[-1])))
    offsets = torch.tensor([0, *sizes * batch]).cumsum(0)
    all_heads = torch.cat(heads_of_all)
    indices = torch.cat(rows_of_all)[:, None].expand_as(all_heads), all_heads
    row_table, head_table, cumulative = (x.to(device) for x in (*indices, offsets.to(torch.int32)))
    return Packing(row_table, head_table, cumulative, max(sizes), tuple(parts))


def uses_triton(x: Tensor) -> bool:
    """Return whether Triton's kernels merge and gather the rows of x, (..., D); elsewhere torch does."""
    return x.is_cuda and _has_triton() and x.shape[-1] <= 256


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which pieces are merged and summed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def own_memory(x: Tensor) -> Tensor:
    """Return x, copied if it is a part of larger memory, because an operator's results must not share any."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def is_whole(x_BLG: Tensor, heads: Heads, rows: Rows) -> bool:
    """Whether a rectangle holds every row and head of x in order, so that its elements are those of x."""
    every_row = rows.first == 0 and rows.step == 1 and rows.segments * rows.count == x_BLG.shape[1]
    return every_row and heads.phases == 1 and heads.step == 1 and heads.per_phase == x_BLG.shape[2]
