"""What one rank does for each branch: which rectangles, with which ranks, how many bytes. Integers only.

A rank holds the rows [start, stop) of the sequence. Of each branch it holds

- whole segments: nothing is sent for them;
- at most two parts of segments that other ranks hold too ("shared"): the ranks of such a segment
  gather each other's kept keys and values.

        chunk 0         chunk 1         chunk 2         chunk 3
    |-------.-------|-------.-------|-------.-------|-------.--|      w = chunk / 2: all whole
    |---------------+---------------|---------------+----------|      w = 2 chunks: shared by {0,1}, {2,3}
    |-----------.---+-------.-------+---.-----------|-- ...           w = 3/4 chunk: whole and shared

Attention is then computed on rectangles: for a run of head phases whose kept rows number the same,
the rows of a phase are a regular stride, and those of the next phase lie one row further. Where w,
the tail, or a chunk is no multiple of r, phases differ by one kept row, and a run ends there. So no
padding is ever attended.

More than 300 lines, because the rectangles, the groups and the chunk are one reasoning about the same integers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import gcd, isqrt, lcm

from longnet_dist.plan.pattern import Branch, Pattern


@dataclass(frozen=True)
class Shard:
    """The rows [start, stop) of a sequence of `seq_len` that `rank` of `num_ranks` holds, in equal chunks."""

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
        """One past the last global row of this rank; equal to `start` where it holds none."""
        return min(self.start + self.chunk, self.seq_len)

    @property
    def num_rows(self) -> int:
        """How many rows this rank holds."""
        return self.stop - self.start

    def of(self, rank: int) -> Shard:
        """The shard of another rank of the same sequence."""
        return Shard(self.seq_len, self.chunk, rank, self.num_ranks)


@dataclass(frozen=True)
class Heads:
    """Key/value heads of a run of phases, `per_phase` of each: head(f, m) = first + f phase_step + m step."""

    first: int
    phases: int
    phase_step: int
    per_phase: int
    step: int


@dataclass(frozen=True)
class Rows:
    """Kept rows of a run of phases: row(s, f, i) = first + s segment_step + f phase_step + i step, i < count.

    `position` is the global position of row(0, 0, 0), and the next kept row is `rate` tokens on.
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
    """A rectangle of rows of this chunk that attend one another (causally, if causal)."""

    heads: Heads
    rows: Rows


@dataclass(frozen=True)
class RemoteBlock:
    """A rectangle of rows of this chunk that attend gathered keys: `keys` are (peer, its packed rows)."""

    heads: Heads
    rows: Rows
    keys: tuple[tuple[int, Rows], ...]

    @property
    def key_rows(self) -> list[Rows]:
        """The packed rows of every peer, one after the other."""
        return [rows for _, rows in self.keys]


@dataclass(frozen=True)
class Packing:
    """Kept rows of the chunk, and the same rows packed to the front of what this rank sends."""

    heads: Heads
    rows: Rows
    packed: Rows


@dataclass(frozen=True)
class SharedSegment:
    """This rank's part of a segment that ranks [first_rank, last_rank] hold together."""

    branch: Branch
    first_rank: int
    last_rank: int
    sent_rows: int
    packing: tuple[Packing, ...]
    own: tuple[OwnBlock, ...]
    remote: tuple[RemoteBlock, ...]

    @property
    def num_ranks(self) -> int:
        """How many ranks hold rows of this segment."""
        return self.last_rank - self.first_rank + 1


@dataclass(frozen=True)
class Plan:
    """What one rank computes and exchanges: `local` needs nobody, `shared` needs its segments' other ranks."""

    local: tuple[OwnBlock, ...]
    shared: tuple[SharedSegment, ...]


@lru_cache(maxsize=1024)
def make_plan(
    pattern: Pattern, shard: Shard, num_kv_heads: int, causal: bool, first_kv_head: int = 0, total_kv_heads: int = 0
) -> Plan:
    """The plan of one rank; every rank can compute that of every other.

    Where heads are spread over ranks too (tensor parallelism), it is of the `num_kv_heads` from `first_kv_head` on,
    of `total_kv_heads`: a head has the phase that it has among all.
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


def whole_segments(branch: Branch, shard: Shard) -> Iterable[tuple[int, int, int]]:
    """(first row, end of the first segment, how many): the full segments, then the sequence's ragged tail."""
    w, start, stop = branch.segment_length, shard.start, shard.stop
    lo = -(-start // w) * w
    full = max(0, (stop - lo) // w)
    if full:
        yield lo, lo + w, full
    lo += full * w
    if lo < stop == shard.seq_len:
        yield lo, stop, 1


def shared_segments(branch: Branch, shard: Shard) -> Iterable[tuple[int, int]]:
    """The segments [lo, hi) of which this rank holds some rows and other ranks the rest: at most two."""
    if shard.num_rows == 0:
        return
    w = branch.segment_length
    for n in sorted({shard.start // w, (shard.stop - 1) // w}):
        lo, hi = n * w, min((n + 1) * w, shard.seq_len)
        if lo < shard.start or hi > shard.stop:
            yield lo, hi


def rank_groups(pattern: Pattern, shard: Shard) -> list[list[tuple[int, int]]]:
    """The groups of ranks (first, last) that some segment needs, of all ranks, in rounds of disjoint groups.

    The same on every rank, from integers alone. Every rank takes part in at most one group a round.
    """
    found = {
        (lo // shard.chunk, (hi - 1) // shard.chunk)
        for branch in dict.fromkeys(pattern.branches)
        for rank in range(shard.num_ranks)
        for lo, hi in shared_segments(branch, shard.of(rank))
    }
    rounds: list[list[tuple[int, int]]] = []
    for first, last in sorted(found, key=lambda group: (group[1] - group[0], group)):
        for groups in rounds:
            size = groups[-1][1] - groups[-1][0]
            if size == last - first and groups[-1][1] < first:
                groups.append((first, last))
                break
        else:
            rounds.append([(first, last)])
    return rounds


def choose_chunk(pattern: Pattern, seq_len: int, num_ranks: int) -> int:
    """Rows a rank: the fewest with which every branch aligns, unless that idles more than a quarter.

    A branch aligns where its segment length divides the chunk (nothing is sent) or is a multiple of
    it (equal parts). Where no chunk of at most 5/4 of an even split aligns all, the one that aligns
    most branches; the rest are exact too, only with more ranks to a gather.
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


def bytes_received(
    pattern: Pattern,
    shard: Shard,
    num_kv_heads: int,
    head_dim: int,
    element_size: int,
    keep_kv: bool = False,
    reduce_size: int = 4,
) -> tuple[int, ...]:
    """Bytes that this rank receives for each branch of a layer, forward and backward; defaults are the mesh's.

    K and V are gathered in `element_size`, again in the backward unless they are kept, and dK and dV
    reduce-scattered in `reduce_size` or more. Where branches align, K and V are kept, and all have b
    bytes, that is 4 (w - chunk) / r G D b.
    """
    each = (2 if keep_kv else 4) * element_size + 2 * max(element_size, reduce_size)
    totals = []
    for branch in pattern.branches:
        one = Pattern((branch.segment_length,), (branch.dilation_rate,), pattern.head_phases)
        rows = sum((s.num_ranks - 1) * s.sent_rows for s in make_plan(one, shard, num_kv_heads, False).shared)
        totals.append(each * rows * num_kv_heads * head_dim)
    return tuple(totals)


def attention_flops(
    pattern: Pattern, seq_len: int, num_heads: int, head_dim: int, causal: bool, num_kv_heads: int | None = None
) -> int:
    """Floating point operations of one forward over the whole sequence: 4 D a visible (query, key) pair and head.

    With w / r whole and not causal this is 4 N D sum(w / r^2) a head: the paper's 2 N d sum(w / r^2)
    (section 2.3) counts a multiply-add as one. A backward is 2.5 times as much.
    """
    num_kv_heads = num_kv_heads or num_heads
    pairs = 0
    for block in make_plan(pattern, Shard(seq_len, max(seq_len, 1)), num_kv_heads, causal).local:
        n = block.rows.count
        rectangles = block.heads.phases * block.heads.per_phase * block.rows.segments
        pairs += rectangles * (n * (n + 1) // 2 if causal else n * n)
    return 4 * head_dim * pairs * (num_heads // num_kv_heads)


class _HeadRuns:
    """The heads of each phase of a branch among those that are here, and the runs of phases that are alike."""

    def __init__(self, pattern: Pattern, branch: Branch, num_kv_heads: int, first: int, total: int) -> None:
        self.branch = branch
        self.first, self.stop = first, first + num_kv_heads
        r = branch.dilation_rate
        self.blocked = pattern.head_phases == "blocked"
        # Phases at which the number of heads changes, or the next phase's heads are not one step further.
        if self.blocked:
            self.phase_step, self.step = -(-total // r), 1
            self.ends = {r} | {end for edge in (first, self.stop) for end in _around(edge, self.phase_step)}
        else:
            self.phase_step, self.step = 1, r
            self.ends = {r, first % r, self.stop % r}

    def split(self, offsets: Iterable[int]) -> Iterable[tuple[int, Heads]]:
        """(first phase, heads) of each run of phases that `offsets` do not tell apart."""
        r = self.branch.dilation_rate
        ends = sorted({end for end in self.ends | {offset % r for offset in offsets} if 0 < end <= r})
        for first, end in zip([0, *ends], ends, strict=False):
            head, per_phase = self._of_phase(first)
            if per_phase > 0:
                yield first, Heads(head, end - first, self.phase_step, per_phase, self.step)

    def _of_phase(self, phase: int) -> tuple[int, int]:
        """(the first of those here that have this phase, how many have it)."""
        if self.blocked:
            lo = max(self.first, phase * self.phase_step)
            return lo - self.first, min(self.stop, (phase + 1) * self.phase_step) - lo
        head = (phase - self.first) % self.step
        return head, -(-(self.stop - self.first - head) // self.step)


def _around(number: int, step: int) -> tuple[int, int]:
    """`number` / `step`, rounded down and up."""
    return number // step, -(-number // step)


def _kept(branch: Branch, phase: int, lo: int, hi: int) -> tuple[int, int]:
    """(offset of the first kept row, how many) of a phase among the offsets [lo, hi) of a segment."""
    r = branch.dilation_rate
    first = lo + (phase - lo) % r
    return first, max(0, -(-(hi - first) // r))


def _own_blocks(runs: _HeadRuns, shard: Shard, segment: int, lo: int, hi: int, segments: int = 1) -> Iterable[OwnBlock]:
    """The rectangles of the global rows [lo, hi), all in this chunk, of the segment that begins at `segment`."""
    r, w = runs.branch.dilation_rate, runs.branch.segment_length
    for phase, heads in runs.split((lo - segment, hi - segment)):
        first, count = _kept(runs.branch, phase, lo - segment, hi - segment)
        position = segment + first
        if count:
            yield OwnBlock(heads, Rows(position - shard.start, 1, r, count, position, r, segments, w))


def _shared_segment(runs: _HeadRuns, shard: Shard, lo: int, hi: int, causal: bool) -> SharedSegment:
    branch, r = runs.branch, runs.branch.dilation_rate
    ranks = range(lo // shard.chunk, (hi - 1) // shard.chunk + 1)
    # The offsets, in the segment, of each rank's part of it.
    parts = [(max(lo, shard.of(c).start) - lo, min(hi, shard.of(c).stop) - lo) for c in ranks]
    mine = shard.rank - ranks[0]
    packing, remote = [], []
    own = tuple(_own_blocks(runs, shard, lo, lo + parts[mine][0], lo + parts[mine][1]))
    for block in own:
        rows = block.rows
        packing.append(Packing(block.heads, rows, Rows(0, 0, 1, rows.count, rows.position, r)))
    peers = [c for c in range(len(ranks)) if (c < mine if causal else c != mine)]
    edges = [offset for c in [mine, *peers] for offset in parts[c]]
    for phase, heads in runs.split(edges):
        first, count = _kept(branch, phase, *parts[mine])
        keys = []
        for c in peers:
            key_first, key_count = _kept(branch, phase, *parts[c])
            if key_count:
                keys.append((c, Rows(0, 0, 1, key_count, lo + key_first, r)))
        if count and keys:
            position = lo + first
            remote.append(RemoteBlock(heads, Rows(position - shard.start, 1, r, count, position, r), tuple(keys)))
    sent = max(-(-(stop - start) // r) for start, stop in parts)
    return SharedSegment(branch, ranks[0], ranks[-1], sent, tuple(packing), own, tuple(remote))


def _divisors(number: int) -> Iterable[int]:
    """The divisors of a number; none of 0."""
    for d in range(1, isqrt(number) + 1):
        if number % d == 0:
            yield d
            yield number // d
