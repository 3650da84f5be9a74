"""Who sends which rows to whom, for a segment that several ranks share. Integers only.

Queries of a shared segment need keys of other ranks. There are three ways to bring them together, the
strategies of exchange. In each of them the ranks of the segment form *teams* of consecutive ranks.
The members of a team share its heads: a member attends some of the key/value heads (and their query
heads), for the kept rows of the whole team.

    team of 1        a rank attends all heads, for its own rows; nobody sends queries   all_gather, exchange
    team of g <= G   a rank attends 1 / g of the heads, for all rows of the segment     all_to_all
    g > G            teams of about G ranks, which also get the keys of other teams     all_to_all

Rows are sent by key/value head: a row of a head is the keys, values or query heads of that key/value
head. A rank's buffer holds its kept rows of the first head, then of the second, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from longnet_dist.plan.pattern import Branch

STRATEGIES = ("all_gather", "all_to_all", "exchange")


@dataclass(frozen=True)
class SharedSegment:
    """The global rows [start, stop) of a segment that several ranks hold, as one of these ranks sees it.

    Args:
        branch: the branch.
        number: the number of the branch in the pattern.
        strategy: one of `STRATEGIES`.
        start, stop: the segment's global rows.
        chunk: rows per rank.
        rank: this rank, among the ranks of the sequence.
        phases: the phase of each key/value head on this rank.
        causal: whether a query sees only keys at or before it.
    """

    branch: Branch
    number: int
    strategy: str
    start: int
    stop: int
    chunk: int
    rank: int
    phases: tuple[int, ...]
    causal: bool

    def __str__(self) -> str:
        return f"branch {self.branch} over ranks {self.first_rank} to {self.last_rank}"

    @property
    def first_rank(self) -> int:
        """The first rank that holds rows of the segment."""
        return self.start // self.chunk

    @property
    def last_rank(self) -> int:
        """The last rank that holds rows of the segment."""
        return (self.stop - 1) // self.chunk

    @property
    def num_ranks(self) -> int:
        """The number of ranks that hold rows of the segment."""
        return self.last_rank - self.first_rank + 1

    @property
    def num_teams(self) -> int:
        """The number of teams."""
        largest = min(self.num_ranks, len(self.phases)) if self.strategy == "all_to_all" else 1
        return -(-self.num_ranks // largest)

    def team_of(self, rank: int) -> range:
        """Return the ranks of a rank's team."""
        ranks, teams = self.num_ranks, self.num_teams
        team = ((rank - self.first_rank + 1) * teams - 1) // ranks
        return range(self.first_rank + team * ranks // teams, self.first_rank + (team + 1) * ranks // teams)

    def heads_of(self, rank: int) -> range:
        """Return the key/value heads that a rank attends."""
        team = self.team_of(rank)
        member, heads = rank - team.start, len(self.phases)
        return range(member * heads // len(team), (member + 1) * heads // len(team))

    def rows_of(self, ranks: range) -> tuple[int, int]:
        """Return the global rows [first, end) of the segment that consecutive ranks hold."""
        return max(self.start, ranks.start * self.chunk), min(self.stop, ranks.stop * self.chunk)

    def kept(self, head: int, first: int, end: int) -> tuple[int, int]:
        """Return the first row of [first, end) that a head keeps, and the number of such rows."""
        offset, count = self.branch.kept_rows(self.phases[head], first - self.start, end - self.start)
        return self.start + offset, count

    def num_kept(self, rank: int, heads: range) -> int:
        """Return the number of rows that a rank holds of some heads, over all these heads."""
        rows = self.rows_of(range(rank, rank + 1))
        return sum(self.kept(head, *rows)[1] for head in heads)

    @cached_property
    def key_sources(self) -> list[int]:
        """The ranks from which this rank gets keys: of its team, and of earlier teams (all teams if not causal)."""
        team = self.team_of(self.rank)
        return self._without_self(range(self.first_rank, team.stop if self.causal else self.last_rank + 1))

    @cached_property
    def key_targets(self) -> list[int]:
        """The ranks to which this rank sends keys."""
        team = self.team_of(self.rank)
        return self._without_self(range(team.start if self.causal else self.first_rank, self.last_rank + 1))

    @cached_property
    def sent_keys(self) -> list[int]:
        """The number of rows of keys that go to each rank of `key_targets`."""
        return [self.num_kept(self.rank, self.heads_of(rank)) for rank in self.key_targets]

    @cached_property
    def received_keys(self) -> list[int]:
        """The number of rows of keys that come from each rank of `key_sources`."""
        heads = self.heads_of(self.rank)
        return [self.num_kept(rank, heads) for rank in self.key_sources]

    @cached_property
    def sent_queries(self) -> list[int]:
        """The number of rows of queries that go to each member of the team."""
        return [self.num_kept(self.rank, self.heads_of(rank)) for rank in self.team_of(self.rank)]

    @cached_property
    def received_queries(self) -> list[int]:
        """The number of rows of queries that come from each member of the team."""
        heads = self.heads_of(self.rank)
        return [self.num_kept(rank, heads) for rank in self.team_of(self.rank)]

    @cached_property
    def num_own(self) -> int:
        """The number of rows that this rank keeps, over all heads."""
        return self.num_kept(self.rank, range(len(self.phases)))

    @cached_property
    def arriving_rows(self) -> tuple[int, int]:
        """The number of rows of queries, and of keys, in the buffers that arrive on this rank."""
        if self.strategy == "all_gather":
            return 0, self.num_ranks * self.gathered_rows
        return sum(self.received_queries) if self.strategy == "all_to_all" else 0, sum(self.received_keys)

    @cached_property
    def gathered_rows(self) -> int:
        """The most rows that a rank holds over all heads: what each rank sends to an all-gather."""
        heads = range(len(self.phases))
        return max(self.num_kept(rank, heads) for rank in range(self.first_rank, self.last_rank + 1))

    def _without_self(self, ranks: range) -> list[int]:
        """Leave this rank out where teams have one member, because it attends its own keys in place."""
        return [rank for rank in ranks if self.strategy == "all_to_all" or rank != self.rank]
