"""The rectangles of rows that one rank attends, and the rows that it sends: integers only.

Attention is computed on rectangles: some rows as queries, some as keys, and every query attends
every key (up to causality). A phase keeps every r-th row of a segment, and the next phase keeps the
rows one further. So the kept rows of consecutive phases are one strided view.

A phase may keep one row more than another, if w, the tail or a chunk is no multiple of r. Rectangles
are therefore made for runs: consecutive phases that keep equally many rows. No padding is attended.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from longnet_dist.plan.pattern import Branch, Pattern
from longnet_dist.plan.shard import Shard, shared_segments, whole_segments


@dataclass(frozen=True)
class Heads:
    """Key/value heads of a run of phases: head(f, m) = first + f phase_step + m step.

    f < phases counts the phases of the run, and m < per_phase the heads of one phase.
    """

    first: int
    phases: int
    phase_step: int
    per_phase: int
    step: int


@dataclass(frozen=True)
class Rows:
    """Kept rows of a run of phases: row(s, f, i) = first + s segment_step + f phase_step + i step.

    s < segments counts segments, f the phases of the run, and i < count the kept rows of one phase.
    A row is an index into this rank's chunk, or into a buffer that ranks exchange. `position` is the
    global position of row(0, 0, 0), and consecutive kept rows are `rate` tokens apart.
    """

    first: int
    phase_step: int
    step: int
    count: int
    position: int
    rate: int
    segments: int = 1
    segment_step: int = 0


@dataclass(frozen=True)
class OwnBlock:
    """A rectangle of rows of this chunk that attend one another (causally, if the attention is causal)."""

    heads: Heads
    rows: Rows


@dataclass(frozen=True)
class RemoteBlock:
    """A rectangle of rows of this chunk that attend keys of other ranks.

    `keys` holds a pair (peer, packed rows) for each peer that has keys for it. A peer is a number
    among the ranks of the segment, and its packed rows are those of the buffer that it sends.
    """

    heads: Heads
    rows: Rows
    keys: tuple[tuple[int, Rows], ...]

    @property
    def key_rows(self) -> list[Rows]:
        """The packed rows of every peer, in the peers' order."""
        return [rows for _, rows in self.keys]


@dataclass(frozen=True)
class Packing:
    """Kept rows of the chunk, and the rows at the front of the send buffer to which they are copied."""

    heads: Heads
    rows: Rows
    packed: Rows


@dataclass(frozen=True)
class SharedSegment:
    """This rank's part of a segment that the ranks [first_rank, last_rank] hold together.

    `sent_rows` is the number of rows in the buffer that each of these ranks sends.
    """

    branch: Branch
    first_rank: int
    last_rank: int
    sent_rows: int
    packing: tuple[Packing, ...]
    own: tuple[OwnBlock, ...]
    remote: tuple[RemoteBlock, ...]

    @property
    def num_ranks(self) -> int:
        """The number of ranks that hold rows of this segment."""
        return self.last_rank - self.first_rank + 1


@dataclass(frozen=True)
class Plan:
    """What one rank computes: `local` blocks need no other rank, and `shared` segments need some."""

    local: tuple[OwnBlock, ...]
    shared: tuple[SharedSegment, ...]


@lru_cache(maxsize=1024)
def make_plan(
    pattern: Pattern, shard: Shard, num_kv_heads: int, causal: bool, first_kv_head: int = 0, total_kv_heads: int = 0
) -> Plan:
    """Make the plan of one rank. Every rank can compute the plan of every other.

    Args:
        pattern: the branches.
        shard: the rows of the rank.
        num_kv_heads: the number of key/value heads on the rank.
        causal: whether a query sees only keys at or before it.
        first_kv_head: the first key/value head on the rank, if tensor parallelism shards heads.
        total_kv_heads: the number of key/value heads on all such ranks; 0 if this rank has all of them.
            The phase of a head depends on its number among all heads.

    Returns:
        The plan. Equal arguments give the same, cached object.
    """
    local: list[OwnBlock] = []
    shared: list[SharedSegment] = []
    for branch in pattern.branches:
        head_runs = _HeadRuns(pattern, branch, num_kv_heads, first_kv_head, total_kv_heads or num_kv_heads)
        for lo, hi, segments in whole_segments(branch, shard):
            local += _own_blocks(head_runs, shard, lo, lo, hi, segments)
        for lo, hi in shared_segments(branch, shard):
            shared.append(_shared_segment(head_runs, shard, lo, hi, causal))
    return Plan(tuple(local), tuple(shared))


class _HeadRuns:
    """The heads of this rank by their phase in a branch, in runs of phases with equally many heads."""

    def __init__(self, pattern: Pattern, branch: Branch, num_kv_heads: int, first: int, total: int) -> None:
        self.branch = branch
        self.first, self.stop = first, first + num_kv_heads
        r = branch.dilation_rate
        self.blocked = pattern.head_phases == "blocked"
        # A run ends at a phase with another number of heads, or whose heads are not one step further.
        if self.blocked:
            self.phase_step, self.step = -(-total // r), 1
            self.ends = {r} | {end for edge in (first, self.stop) for end in _quotients(edge, self.phase_step)}
        else:
            self.phase_step, self.step = 1, r
            self.ends = {r, first % r, self.stop % r}

    def split(self, offsets: Iterable[int]) -> Iterable[tuple[int, Heads]]:
        """Yield (first phase, heads) of each run. Runs are also cut at the phases of `offsets`, the edges of rows."""
        r = self.branch.dilation_rate
        ends = sorted({end for end in self.ends | {offset % r for offset in offsets} if 0 < end <= r})
        for first, end in zip([0, *ends], ends, strict=False):
            head, per_phase = self._of_phase(first)
            if per_phase > 0:
                yield first, Heads(head, end - first, self.phase_step, per_phase, self.step)

    def _of_phase(self, phase: int) -> tuple[int, int]:
        """The first head of this rank that has the phase, and the number of such heads."""
        if self.blocked:
            lo = max(self.first, phase * self.phase_step)
            return lo - self.first, min(self.stop, (phase + 1) * self.phase_step) - lo
        head = (phase - self.first) % self.step
        return head, -(-(self.stop - self.first - head) // self.step)


def _quotients(number: int, divisor: int) -> tuple[int, int]:
    """The quotient rounded down, and rounded up."""
    return number // divisor, -(-number // divisor)


def _kept_rows(branch: Branch, phase: int, lo: int, hi: int) -> tuple[int, int]:
    """The first row that a phase keeps among the offsets [lo, hi) of a segment, and the number of such rows."""
    r = branch.dilation_rate
    first = lo + (phase - lo) % r
    return first, max(0, -(-(hi - first) // r))


def _own_blocks(runs: _HeadRuns, shard: Shard, segment: int, lo: int, hi: int, segments: int = 1) -> Iterable[OwnBlock]:
    """Yield the rectangles of the global rows [lo, hi), all in this chunk, of the segment that begins at `segment`."""
    r, w = runs.branch.dilation_rate, runs.branch.segment_length
    for phase, heads in runs.split((lo - segment, hi - segment)):
        first, count = _kept_rows(runs.branch, phase, lo - segment, hi - segment)
        position = segment + first
        if count:
            yield OwnBlock(heads, Rows(position - shard.start, 1, r, count, position, r, segments, w))


def _shared_segment(runs: _HeadRuns, shard: Shard, lo: int, hi: int, causal: bool) -> SharedSegment:
    """This rank's part of the segment [lo, hi), with the number of rows that every rank sends."""
    branch, r = runs.branch, runs.branch.dilation_rate
    ranks = range(lo // shard.chunk, (hi - 1) // shard.chunk + 1)
    # The offsets, in the segment, of each rank's part of it.
    parts = [(max(lo, shard.of(c).start) - lo, min(hi, shard.of(c).stop) - lo) for c in ranks]
    me = shard.rank - ranks[0]
    own = tuple(_own_blocks(runs, shard, lo, lo + parts[me][0], lo + parts[me][1]))
    packing = tuple(
        Packing(block.heads, block.rows, Rows(0, 0, 1, block.rows.count, block.rows.position, r)) for block in own
    )
    remote = tuple(_remote_blocks(runs, shard, lo, parts, me, causal))
    sent_rows = max(-(-(stop - start) // r) for start, stop in parts)
    return SharedSegment(branch, ranks[0], ranks[-1], sent_rows, packing, own, remote)


def _remote_blocks(
    runs: _HeadRuns, shard: Shard, lo: int, parts: list[tuple[int, int]], me: int, causal: bool
) -> Iterable[RemoteBlock]:
    """Yield the rectangles of this rank's rows and the keys of the segment's other ranks (earlier ones if causal)."""
    branch, r = runs.branch, runs.branch.dilation_rate
    peers = [c for c in range(len(parts)) if (c < me if causal else c != me)]
    edges = [offset for c in [me, *peers] for offset in parts[c]]
    for phase, heads in runs.split(edges):
        first, count = _kept_rows(branch, phase, *parts[me])
        keys = []
        for c in peers:
            key_first, key_count = _kept_rows(branch, phase, *parts[c])
            if key_count:
                keys.append((c, Rows(0, 0, 1, key_count, lo + key_first, r)))
        if count and keys:
            position = lo + first
            yield RemoteBlock(heads, Rows(position - shard.start, 1, r, count, position, r), tuple(keys))
