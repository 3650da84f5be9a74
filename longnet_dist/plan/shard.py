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


def whole_segments(branch: Branch, shard: Shard) -> Iterable[tuple[int, int, int]]:
    """Yield the segments that lie within the shard: the full ones as one item, then the sequence's ragged tail.

    Each item is (first row, end of the first segment, number of consecutive segments).
    """
    w, start, stop = branch.segment_length, shard.start, shard.stop
    lo = -(-start // w) * w
    full = max(0, (stop - lo) // w)
    if full:
        yield lo, lo + w, full
    lo += full * w
    if lo < stop == shard.seq_len:
        yield lo, stop, 1


def shared_segments(branch: Branch, shard: Shard) -> Iterable[tuple[int, int]]:
    """Yield the segments [lo, hi) of which this rank holds some rows and other ranks the rest: at most two."""
    if shard.num_rows == 0:
        return
    w = branch.segment_length
    for n in sorted({shard.start // w, (shard.stop - 1) // w}):
        lo, hi = n * w, min((n + 1) * w, shard.seq_len)
        if lo < shard.start or hi > shard.stop:
            yield lo, hi


def is_shared(branch: Branch, shard: Shard) -> bool:
    """Return whether any segment of the branch is shared; the same on every rank."""
    return shard.chunk < shard.seq_len and shard.chunk % branch.segment_length != 0


def rank_groups(pattern: Pattern, shard: Shard) -> list[list[tuple[int, int]]]:
    """Return the groups of ranks, (first, last), that share a segment, in rounds of disjoint groups.

    The result is the same on every rank, because it does not depend on `shard.rank`. A rank belongs
    to at most one group per round.
    """
    groups_needed = {
        (lo // shard.chunk, (hi - 1) // shard.chunk)
        for branch in dict.fromkeys(pattern.branches)
        for rank in range(shard.num_ranks)
        for lo, hi in shared_segments(branch, shard.of(rank))
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
