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
from functools import cached_property, lru_cache

from longnet_dist.plan.exchange import SharedSegment
from longnet_dist.plan.pattern import Branch, Pattern
from longnet_dist.plan.shard import Shard, Span, documents_of, is_shared, shared_segments, whole_segments


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

    @property
    def table(self) -> tuple[tuple[int, ...], ...]:
        """The heads of each phase: F rows of M numbers."""
        heads = range(self.first, self.first + self.per_phase * self.step, self.step)
        return tuple(tuple(head + phase * self.phase_step for head in heads) for phase in range(self.phases))


@dataclass(frozen=True)
class Rows:
    """Kept rows of a run of phases: row(s, f, i) = first + s segment_step + f phase_step + i step.

    s < segments counts segments, f the phases of the run, and i < count the kept rows of one phase.
    A row is an index into this rank's chunk. `position` is the global position of row(0, 0, 0), and
    consecutive kept rows are `rate` tokens apart.
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
    """A rectangle of rows of this chunk that attend one another (causally, if the attention is causal).

    `branch` is the number of the branch in the pattern.
    """

    branch: int
    heads: Heads
    rows: Rows


@dataclass(frozen=True)
class RemoteBlock:
    """A rectangle of rows of this chunk that attend keys of other ranks.

    `key_rows` holds one or two runs of kept rows of the segment: those before this rank's part of it,
    and those after. Their positions alone matter; an exchange knows where the rows arrive.
    """

    heads: Heads
    rows: Rows
    key_rows: tuple[Rows, ...]


@dataclass(frozen=True)
class SharedPart:
    """This rank's part of a shared segment.

    `own` blocks attend the rank's own rows, `remote` blocks those of other ranks. If queries are sent, to
    trade heads for rows, there is no remote block, and `own` is what the rank sends.
    """

    segment: SharedSegment
    own: tuple[OwnBlock, ...]
    remote: tuple[RemoteBlock, ...]


@dataclass(frozen=True)
class SharedBranch:
    """The exchange of one branch by one strategy: collective over the mesh, or over the ranks of its one part.

    With the strategy "exchange", every rank of the mesh takes part, with no, one or two parts.
    """

    number: int
    branch: Branch
    strategy: str
    parts: tuple[SharedPart, ...]

    @property
    def arriving_rows(self) -> tuple[int, int]:
        """The number of rows of queries, and of keys, in the buffers that arrive on this rank."""
        counts = [part.segment.arriving_rows for part in self.parts]
        return sum(queries for queries, _ in counts), sum(keys for _, keys in counts)


@dataclass(frozen=True, eq=False)
class BlockGroup:
    """Own blocks of a branch with the same number of heads per phase: one call of a kernel for variable lengths."""

    branch: int
    blocks: tuple[OwnBlock, ...]


@dataclass(frozen=True)
class Plan:
    """What one rank computes.

    `local` blocks are whole segments, `own` blocks this rank's part of shared segments, both without
    another rank. `shared` holds the exchanges, which every rank starts in this order.
    """

    local: tuple[OwnBlock, ...]
    own: tuple[OwnBlock, ...]
    shared: tuple[SharedBranch, ...]

    @property
    def first_shared(self) -> int:
        """The number of the first branch with an exchange; a large number if there is none."""
        return min((shared.number for shared in self.shared), default=1 << 30)

    @cached_property
    def groups(self) -> tuple[BlockGroup, ...]:
        """The `local` and `own` blocks by branch and number of heads per phase."""
        blocks: dict[tuple[int, int], list[OwnBlock]] = {}
        for block in (*self.local, *self.own):
            blocks.setdefault((block.branch, block.heads.per_phase), []).append(block)
        return tuple(BlockGroup(branch, tuple(of_group)) for (branch, _), of_group in blocks.items())


def make_plan(
    pattern: Pattern,
    shard: Shard,
    num_kv_heads: int,
    causal: bool,
    first_kv_head: int = 0,
    total_kv_heads: int = 0,
    strategies: tuple[str, ...] = (),
    documents: tuple[int, ...] = (),
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
        strategies: the strategy of each branch, by which shared segments are exchanged; by default
            "all_gather". With documents it is "exchange": other strategies need groups of ranks that are known before.
        documents: where each document begins, and the last one ends, in global rows; rows after that belong to none.
            Without any, the sequence is one document. Segments and phases begin anew with each document, and nothing
            is seen across.

    Returns:
        The plan. Equal arguments give the same, cached object.
    """
    arguments = pattern, shard, num_kv_heads, causal, first_kv_head, total_kv_heads
    if documents:
        return _plan_of_documents(*arguments, ("exchange",) * len(pattern.branches), documents)
    return _plan_of_sequence(*arguments, strategies, ())


def _make_plan(
    pattern: Pattern,
    shard: Shard,
    num_kv_heads: int,
    causal: bool,
    first_kv_head: int,
    total_kv_heads: int,
    strategies: tuple[str, ...],
    documents: tuple[int, ...],
) -> Plan:
    local: list[OwnBlock] = []
    shared: list[SharedBranch] = []
    total = total_kv_heads or num_kv_heads
    for number, branch in enumerate(pattern.branches):
        strategy = strategies[number] if strategies else "all_gather"
        head_runs = HeadRuns(pattern, number, num_kv_heads, first_kv_head, total)
        phases = tuple(pattern.phase(first_kv_head + head, total, branch) for head in range(num_kv_heads))
        parts = []
        for document in documents_of(shard, documents):
            for lo, hi, segments in whole_segments(branch, shard, *document):
                local += own_blocks(head_runs, shard, lo, lo, hi, segments)
            for lo, hi in shared_segments(branch, shard, *document):
                segment = SharedSegment(branch, number, strategy, lo, hi, shard.chunk, shard.rank, phases, causal)
                parts.append(_shared_part(head_runs, shard, segment))
        if strategy != "exchange":
            shared += [SharedBranch(number, branch, strategy, (part,)) for part in parts]
        elif is_shared(branch, shard, documents):
            shared.append(SharedBranch(number, branch, strategy, tuple(parts)))
    own = [block for s in shared if s.strategy != "all_to_all" for part in s.parts for block in part.own]
    return Plan(tuple(local), tuple(own), tuple(shared))


_plan_of_sequence = lru_cache(maxsize=1024)(_make_plan)
_plan_of_documents = lru_cache(maxsize=16)(_make_plan)  # Documents change in every step, and their plans are large.


class HeadRuns:
    """The heads of this rank by their phase in a branch, in runs of phases with equally many heads."""

    def __init__(self, pattern: Pattern, number: int, num_kv_heads: int, first: int, total: int) -> None:
        self.number = number
        self.branch = branch = pattern.branches[number]
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


def own_blocks(
    runs: HeadRuns, shard: Shard | Span, segment: int, lo: int, hi: int, segments: int = 1
) -> Iterable[OwnBlock]:
    """Yield the rectangles of the global rows [lo, hi), all in this chunk, of the segment that begins at `segment`."""
    r, w = runs.branch.dilation_rate, runs.branch.segment_length
    for phase, heads in runs.split((lo - segment, hi - segment)):
        first, count = runs.branch.kept_rows(phase, lo - segment, hi - segment)
        position = segment + first
        if count:
            yield OwnBlock(runs.number, heads, Rows(position - shard.start, 1, r, count, position, r, segments, w))


def _shared_part(runs: HeadRuns, shard: Shard, segment: SharedSegment) -> SharedPart:
    """Return this rank's part of a shared segment."""
    start = segment.start
    lo, hi = segment.rows_of(range(shard.rank, shard.rank + 1))
    own = tuple(own_blocks(runs, shard, start, lo, hi))
    trades_heads = segment.strategy == "all_to_all"
    return SharedPart(segment, own, () if trades_heads else tuple(_remote_blocks(runs, shard, segment, lo, hi)))


def _remote_blocks(runs: HeadRuns, shard: Shard, segment: SharedSegment, lo: int, hi: int) -> Iterable[RemoteBlock]:
    """Yield the rectangles of the rows [lo, hi) and the segment's other keys (the earlier ones if causal)."""
    branch, r, start = runs.branch, runs.branch.dilation_rate, segment.start
    edges = [(start, lo)] if segment.causal else [(start, lo), (hi, segment.stop)]
    for phase, heads in runs.split(edge - start for edge in (start, lo, hi, segment.stop)):
        first, count = branch.kept_rows(phase, lo - start, hi - start)
        keys = []
        for key_lo, key_hi in edges:
            key_first, key_count = branch.kept_rows(phase, key_lo - start, key_hi - start)
            if key_count:
                keys.append(Rows(0, 1, r, key_count, start + key_first, r))
        if count and keys:
            position = start + first
            yield RemoteBlock(heads, Rows(position - shard.start, 1, r, count, position, r), tuple(keys))
