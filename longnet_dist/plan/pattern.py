"""Which key a query sees: branches, patterns and head phases. Standard library only.

This file is the definition; `attention/reference.py` applies it, and `longnet-dist draw` draws it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

HEAD_PHASES = ("interleaved", "blocked")
MAX_SIZE = 1 << 48
"""The largest size of anything, far above all uses: products and sums of a few positions still fit in 64 bits."""


@dataclass(frozen=True)
class Branch:
    """One branch (w, r) of dilated attention: segments of w rows, of which one row in r is kept.

    See LongNet (arXiv 2307.02486), section 2.2, equations 3 to 5.

    Args:
        segment_length: w, in rows.
        dilation_rate: r, with 1 <= r <= w.

    Raises:
        ValueError: if a value is not a positive integer, or the rate is above the segment length.
    """

    segment_length: int
    dilation_rate: int

    def __post_init__(self) -> None:
        (w,) = _positive_integers("segment_length", (self.segment_length,))
        (r,) = _positive_integers("dilation_rate", (self.dilation_rate,))
        if r > w:
            raise ValueError(
                f"dilation rate {r} is above its segment length {w}, so some heads would keep no row at all; "
                f"use a rate of at most {w}, or a segment of at least {r}"
            )
        object.__setattr__(self, "segment_length", w)
        object.__setattr__(self, "dilation_rate", r)

    def keeps(self, position: int, phase: int) -> bool:
        """Return whether heads of this `phase` keep the row at global `position`."""
        return position % self.segment_length % self.dilation_rate == phase

    def kept_rows(self, phase: int, first: int, end: int) -> tuple[int, int]:
        """Return the first of a segment's offsets [first, end) that heads of this `phase` keep, and their number."""
        kept = first + (phase - first) % self.dilation_rate
        return kept, max(0, -(-(end - kept) // self.dilation_rate))

    def __str__(self) -> str:
        return f"(w={self.segment_length}, r={self.dilation_rate})"


@dataclass(frozen=True)
class Pattern:
    """The branches of a dilated attention, and the rule that gives each head its phase.

    Args:
        segment_lengths: w of each branch, in rows.
        dilation_rates: r of each branch, with 1 <= r <= w; one row in r is kept.
        head_phases: the rule for the phase of a head, which keeps the rows at offsets phase,
            phase + r, ... of a segment. "interleaved": phase = head mod r, as in the paper. "blocked":
            phase = head // ceil(heads / r), for torchscale's weights. Heads are key/value heads: with
            grouped-query attention a query head has the phase of its key/value head.

    Raises:
        ValueError: for an empty pattern, or unequal numbers of lengths and rates. Also for a value that
            is not a positive integer, a rate above its segment length, or an unknown phase rule.

    Example:
        >>> Pattern(segment_lengths=(4, 8), dilation_rates=(1, 2)).branches[1]
        Branch(segment_length=8, dilation_rate=2)
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_phases: str = "interleaved"

    def __post_init__(self) -> None:
        lengths = _positive_integers("segment_lengths", self.segment_lengths)
        rates = _positive_integers("dilation_rates", self.dilation_rates)
        if len(lengths) != len(rates):
            raise ValueError(
                f"segment_lengths has {len(lengths)} entries {lengths} and dilation_rates has {len(rates)} {rates}; "
                "each branch needs one of both, for example segment_lengths=(2048, 8192), dilation_rates=(1, 4)"
            )
        for w, r in zip(lengths, rates, strict=True):
            Branch(w, r)
        if self.head_phases not in HEAD_PHASES:
            raise ValueError(f"head_phases is {self.head_phases!r}; it must be one of {', '.join(HEAD_PHASES)}")
        object.__setattr__(self, "segment_lengths", lengths)
        object.__setattr__(self, "dilation_rates", rates)

    @classmethod
    def geometric(cls, max_length: int, base: int = 2048, growth: int = 4, head_phases: str = "interleaved") -> Pattern:
        """Make branches whose w and r both grow by `growth`, so that w / r is constant.

        Segment lengths are base, base * growth, ... up to the first that reaches `max_length`. So any
        two tokens of a sequence of that length share a segment (LongNet, section 2.2).

        Args:
            max_length: the length, in tokens, that the longest segment must reach.
            base: the shortest segment length, whose dilation rate is 1.
            growth: the factor between consecutive branches, at least 2.
            head_phases: see `Pattern`.

        Raises:
            ValueError: if an argument is not a positive integer, or `growth` is 1.

        Example:
            >>> Pattern.geometric(max_length=32768, base=2048, growth=4)
            Pattern(segment_lengths=(2048, 8192, 32768), dilation_rates=(1, 4, 16), head_phases='interleaved')
        """
        (max_length,) = _positive_integers("max_length", (max_length,))
        (base,) = _positive_integers("base", (base,))
        (growth,) = _positive_integers("growth", (growth,))
        if growth < 2:
            raise ValueError(f"growth is {growth}; segments must grow, so it must be at least 2, for example 4")
        lengths, rates = [base], [1]
        while lengths[-1] < max_length:
            lengths.append(lengths[-1] * growth)
            rates.append(rates[-1] * growth)
        return cls(tuple(lengths), tuple(rates), head_phases)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches, in the order of the arguments."""
        return tuple(map(Branch, self.segment_lengths, self.dilation_rates))

    def reach(self, seq_len: int) -> int:
        """Return how many tokens a token can see, itself included, in a sequence of `seq_len` tokens."""
        return min(seq_len, max(self.segment_lengths))

    def coverage(self, num_kv_heads: int) -> tuple[float, ...]:
        """Return, for each branch, the share of tokens that some key/value head keeps.

        It is 1 where the heads have every phase, and otherwise the number of their phases over r.

        Example:
            >>> Pattern((1024, 4096, 16384), (1, 4, 16)).coverage(num_kv_heads=4)
            (1.0, 1.0, 0.25)
        """
        return tuple(
            len({self.phase(head, num_kv_heads, branch) for head in range(num_kv_heads)}) / branch.dilation_rate
            for branch in self.branches
        )

    def phase(self, kv_head: int, num_kv_heads: int, branch: Branch) -> int:
        """Return the phase of a key/value head, and of its query heads, in `branch`: 0 <= phase < r."""
        if self.head_phases == "blocked":
            return kv_head // -(-num_kv_heads // branch.dilation_rate)
        return kv_head % branch.dilation_rate

    def __str__(self) -> str:
        return " ".join(map(str, self.branches)) + f" {self.head_phases}"


def _positive_integers(name: str, values: Iterable[int] | int) -> tuple[int, ...]:
    """Convert `values` to a tuple of positive ints, or raise ValueError; bool, float and str are not integers."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {values!r}; it must be a sequence of positive integers, for example (2048, 8192)")
    entries = tuple(values)
    if not entries:
        raise ValueError(f"{name} is empty; a pattern needs at least one branch, for example (2048,)")
    result = []
    for value in entries:
        try:
            integer = operator.index(value)
        except TypeError:
            integer = 0
        if integer < 1 or isinstance(value, bool):
            raise ValueError(f"{name} has {value!r} in {entries}; every entry must be a positive integer")
        if integer > MAX_SIZE:
            raise ValueError(f"{name} has {integer}; every entry must be at most {MAX_SIZE} (2^48)")
        result.append(integer)
    return tuple(result)
