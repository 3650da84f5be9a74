"""Which rows a rank holds, which segments it shares with other ranks, and which groups of ranks communicate.

The sequence is cut into chunks of equal size, and a rank holds the rows [start, stop) of one chunk.
Of each branch it holds

- whole segments, for which nothing is sent;
- parts of at most two "shared" segments, whose other rows are on other ranks.

        chunk 0         chunk 1         chunk 2         chunk 3
    |-------.-------|-------.-------|-------.-------|-------.--|      w = chunk / 2: all whole
    |---------------+---------------|---------------+----------|      w = 2 chunks: shared by {0,1}, {2,3}
    |-----------.---+-------.-------+---.-----------|-- ...           w = 3/4 chunk: whole and shared
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd, isqrt, lcm

from longnet_dist.plan.pattern import Branch, Pattern


@dataclass(frozen=True)
class Shard:
    """The rows [start, stop) that `rank` holds of a sequence, which is cut into equal chunks.

    Args:
        seq_len: N, the length of the whole sequence.
        chunk: rows per rank; the last rank that holds any may hold fewer.
        rank: this rank, within the group.
        num_ranks: the size of the group.
    """

    seq_len: int
    chunk: int
    rank: int = 0
    num_ranks: int = 1

    @property
    def start(self) -> int:
        """The first global row of this rank."""
        return min(self.rank * self.chunk, self.seq_len)

    @property
    def stop(self) -> int:
        """One past the last global row of this rank; equal to `start` if the rank holds no rows."""
        return min(self.start + self.chunk, self.seq_len)

    @property
    def num_rows(self) -> int:
        """The number of rows on this rank."""
        return self.stop - self.start

    def of(self, rank: int) -> Shard:
        """The shard of another rank of the same sequence."""
        return Shard(self.seq_len, self.chunk, rank, self.num_ranks)


@dataclass(frozen=True)
class Span:
    """The rows [start, stop), as a part of a sequence."""

    start: int
    stop: int


def documents_of(shard: Shard, offsets: tuple[int, ...]) -> Iterable[tuple[int, int]]:
    """Yield the documents [first, end) of which this rank holds rows, in global rows.

    Args:
        shard: the rows of the rank.
        offsets: where each document begins, and the last one ends. Without any, the sequence is one document.
    """
    if not offsets:
        offsets = (0, shard.seq_len)
    for number in range(max(0, bisect_right(offsets, shard.start) - 1), len(offsets) - 1):
        first, end = offsets[number : number + 2]
        if first >= shard.stop:
            return
        if max(first, shard.start) < min(end, shard.stop):
            yield first, end


def whole_segments(branch: Branch, shard: Shard | Span, first: int, end: int) -> Iterable[tuple[int, int, int]]:
    """Yield the segments of a document [first, end) that lie within the shard: the full ones, then its ragged tail.

    Each item is (first row, end of the first segment, number of consecutive segments).
    """
    w, start, stop = branch.segment_length, max(shard.start, first), min(shard.stop, end)
    lo = first + -(-(start - first) // w) * w
    full = max(0, (stop - lo) // w)
    if full:
        yield lo, lo + w, full
    lo += full * w
    if lo < stop == end:
        yield lo, stop, 1


def shared_segments(branch: Branch, shard: Shard, first: int, end: int) -> Iterable[tuple[int, int]]:
    """Yield the segments [lo, hi) of a document of which this rank holds some rows and other ranks the rest.

    There are at most two, over all documents: one with rows before this rank's, and one with rows after them.
    """
    start, stop = max(shard.start, first), min(shard.stop, end)
    if start >= stop:
        return
    w = branch.segment_length
    for n in sorted({(start - first) // w, (stop - 1 - first) // w}):
        lo, hi = first + n * w, min(first + (n + 1) * w, end)
        if lo < shard.start or hi > shard.stop:
            yield lo, hi


def is_shared(branch: Branch, shard: Shard, offsets: tuple[int, ...] = ()) -> bool:
    """Return whether any segment of the branch is shared; the same on every rank. For `offsets`, see `documents_of`."""
    w = branch.segment_length
    if not offsets:
        return shard.chunk < shard.seq_len and shard.chunk % w != 0
    for edge in range(shard.chunk, min(shard.seq_len, offsets[-1]), shard.chunk):
        if (edge - offsets[bisect_right(offsets, edge) - 1]) % w:
            return True
    return False


def rank_groups(pattern: Pattern, shard: Shard) -> list[list[tuple[int, int]]]:
    """Return the groups of ranks, (first, last), that share a segment, in rounds of disjoint groups.

    The result is the same on every rank, because it does not depend on `shard.rank`. A rank belongs
    to at most one group per round.
    """
    groups_needed = {
        (lo // shard.chunk, (hi - 1) // shard.chunk)
        for branch in dict.fromkeys(pattern.branches)
        for rank in range(shard.num_ranks)
        for lo, hi in shared_segments(branch, shard.of(rank), 0, shard.seq_len)
    }
    rounds: list[list[tuple[int, int]]] = []
    for first, last in sorted(groups_needed, key=lambda group: (group[1] - group[0], group)):
        for groups in rounds:
            size = groups[-1][1] - groups[-1][0]
            if size == last - first and groups[-1][1] < first:
                groups.append((first, last))
                break
        else:
            rounds.append([(first, last)])
    return rounds


def choose_chunk(pattern: Pattern, seq_len: int, num_ranks: int) -> int:
    """Return the number of rows per rank that aligns most branches, at most 5/4 of an even split.

    A branch is aligned if its segment length divides the chunk (nothing is sent) or is a multiple of
    it (all ranks hold equal parts). Other branches stay exact, with more communication. Among equally
    good numbers the smallest is chosen (docs/decisions/chunk-alignment.md).

    Args:
        pattern: the branches.
        seq_len: N, the length of the whole sequence.
        num_ranks: the size of the group.
    """
    even = max(1, -(-seq_len // num_ranks))
    lengths = sorted({w for w in pattern.segment_lengths if w < seq_len})
    candidates = {even}
    for cut in range(len(lengths) + 1):
        below = lcm(*lengths[:cut])
        candidates.add(-(-even // below) * below)
        above = gcd(*lengths[cut:])
        candidates |= {d for d in _divisors(above) if d >= even}
    allowed = [c for c in candidates if even <= c <= max(even, even * 5 // 4)]

    def misaligned(chunk: int) -> int:
        return sum(bool(chunk % w and w % chunk) for w in lengths)

    return min(allowed, key=lambda chunk: (misaligned(chunk), chunk))


def _divisors(number: int) -> Iterable[int]:
    """Yield the divisors of a number; none for 0."""
    for d in range(1, isqrt(number) + 1):
        if number % d == 0:
            yield d
            yield number // d
