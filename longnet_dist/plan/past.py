"""The rectangles of rows that come after a past, of which only the kept rows of current segments are known.

The past is one more source of rows. Queries of new rows see the kept keys of their segment that lie in it, as a rank's
queries see those of earlier ranks. A branch has one such segment: that of the first new row. So of each branch a cache
holds the kept rows of one segment: for each head the j-th in slot j, whatever its phase.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from longnet_dist.plan.blocks import HeadRuns, Heads, OwnBlock, Rows, own_blocks
from longnet_dist.plan.pattern import Branch, Pattern
from longnet_dist.plan.shard import Span, whole_segments


@dataclass(frozen=True)
class PastBlock:
    """A rectangle of new rows that attend keys in a cache, or that are copied to it.

    `slots` are their places among the slots of the branch; for keys, their positions too.
    """

    branch: int
    heads: Heads
    rows: Rows
    slots: Rows


def num_slots(branch: Branch) -> int:
    """The most rows that a head keeps of a segment."""
    return -(-branch.segment_length // branch.dilation_rate)


@lru_cache(maxsize=64)
def new_blocks(pattern: Pattern, num_kv_heads: int, start: int, stop: int) -> tuple[OwnBlock, ...]:
    """Return the rectangles of the rows [start, stop) that attend one another; rows count from `start`."""
    span = Span(start, stop)
    blocks: list[OwnBlock] = []
    for _, branch, runs in _branches(pattern, num_kv_heads):
        segment = _segment_of(start, branch)
        if segment < start:
            blocks += own_blocks(runs, span, segment, start, min(segment + branch.segment_length, stop))
        for lo, hi, segments in whole_segments(branch, span, 0, stop):
            blocks += own_blocks(runs, span, lo, lo, hi, segments)
    return tuple(blocks)


@lru_cache(maxsize=64)
def past_blocks(
    pattern: Pattern, num_kv_heads: int, start: int, end_of_past: int, lo: int, hi: int
) -> tuple[PastBlock, ...]:
    """Return the rectangles of the queries [lo, hi), which count from `lo`, and the keys in the cache.

    Args:
        pattern: the branches.
        num_kv_heads: the number of key/value heads.
        start: the first new row.
        end_of_past: the end of the rows in the cache: `start`, or one more if the one new row is there already.
        lo, hi: the new rows to attend; over ranks those of this rank.
    """
    blocks = []
    for number, branch, runs in _branches(pattern, num_kv_heads):
        segment, r = _segment_of(start, branch), branch.dilation_rate
        stop = min(hi, segment + branch.segment_length)
        if lo >= stop:
            continue
        for phase, heads in runs.split((lo - segment, stop - segment, end_of_past - segment)):
            first, count = branch.kept_rows(phase, lo - segment, stop - segment)
            first_key, num_keys = branch.kept_rows(phase, 0, end_of_past - segment)
            if count and num_keys:
                rows = Rows(segment + first - lo, 1, r, count, segment + first, r)
                blocks.append(PastBlock(number, heads, rows, Rows(0, 0, 1, num_keys, segment + first_key, r)))
    return tuple(blocks)


@lru_cache(maxsize=64)
def kept_blocks(pattern: Pattern, num_kv_heads: int, lo: int, hi: int, end: int) -> tuple[PastBlock, ...]:
    """Return those of the rows [lo, hi), which count from `lo`, that a cache keeps when it has seen `end` rows.

    They are those in the segment of the last row, end - 1. Slots that hold rows of an earlier segment are used again.
    """
    blocks = []
    for number, branch, runs in _branches(pattern, num_kv_heads):
        segment = _segment_of(end - 1, branch)
        if max(lo, segment) < hi:
            for block in own_blocks(runs, Span(lo, hi), segment, max(lo, segment), hi):
                slot = (block.rows.position - segment) // branch.dilation_rate
                blocks.append(PastBlock(number, block.heads, block.rows, Rows(slot, 0, 1, block.rows.count, 0, 1)))
    return tuple(blocks)


def misaligned_branch(pattern: Pattern, start: int, num_rows: int) -> Branch | None:
    """Return a branch of which the rows [start, start + num_rows) are cut otherwise than if they began a sequence.

    They are cut alike if they begin a segment, or lie in one at a multiple of its rate.
    """
    for branch in pattern.branches:
        offset = start % branch.segment_length
        if offset and (offset % branch.dilation_rate or offset + num_rows > branch.segment_length):
            return branch
    return None


def _segment_of(row: int, branch: Branch) -> int:
    return row // branch.segment_length * branch.segment_length


@lru_cache(maxsize=64)
def _head_runs(pattern: Pattern, num_kv_heads: int) -> tuple[HeadRuns, ...]:
    return tuple(HeadRuns(pattern, number, num_kv_heads, 0, num_kv_heads) for number in range(len(pattern.branches)))


def _branches(pattern: Pattern, num_kv_heads: int) -> Iterator[tuple[int, Branch, HeadRuns]]:
    for number, runs in enumerate(_head_runs(pattern, num_kv_heads)):
        yield number, runs.branch, runs
