"""A failure here means: a pattern does not mean what its numbers say, or a bad pattern raises no error."""

from __future__ import annotations

import numpy as np
import pytest

from longnet_dist import Branch, Pattern


def test_a_pattern_is_pairs_of_lengths_and_rates():
    pattern = Pattern(segment_lengths=(4, 8), dilation_rates=(1, 2))
    assert pattern.branches == (Branch(4, 1), Branch(8, 2))
    assert hash(pattern) == hash(Pattern([4, np.int64(8)], [1, 2]))
    assert all(type(n) is int for n in Pattern([np.int64(8)], [1]).segment_lengths)


@pytest.mark.parametrize(
    ("lengths", "rates", "message"),
    [
        ((), (), "segment_lengths is empty"),
        ((8,), (), "dilation_rates is empty"),
        ((8, 16), (1,), "2 entries.*1"),
        ((0,), (1,), "has 0 in"),
        ((8,), (0,), "has 0 in"),
        ((-8,), (1,), "has -8 in"),
        ((8.0,), (1,), r"has 8\.0 in"),
        ((8,), (1.5,), r"has 1\.5 in"),
        (("8",), (1,), "has '8' in"),
        ((True,), (1,), "has True in"),
        ((None,), (1,), "has None in"),
        (8, 1, "must be a sequence"),
        ("8", "1", "must be a sequence"),
        ((4,), (5,), "rate 5 is above its segment length 4.*at most 4"),
    ],
)
def test_bad_patterns_raise_errors_that_name_the_rule(lengths, rates, message):
    with pytest.raises(ValueError, match=message):
        Pattern(lengths, rates)


@pytest.mark.parametrize(("length", "rate"), [(0, 0), (2, 4), (2.5, 1), (8, "2"), (-8, 1)])
def test_bad_branches_raise(length, rate):
    with pytest.raises(ValueError, match=r"positive integer|above its segment length"):
        Branch(length, rate)


def test_unknown_head_phases_raise():
    with pytest.raises(ValueError, match=r"'spiral'.*interleaved, blocked"):
        Pattern((8,), (2,), "spiral")


def test_head_phases_are_interleaved_or_blocked():
    branch = Branch(16, 4)
    interleaved, blocked = (Pattern((16,), (4,), rule) for rule in ("interleaved", "blocked"))
    assert [interleaved.phase(h, 6, branch) for h in range(6)] == [0, 1, 2, 3, 0, 1]
    assert [blocked.phase(h, 6, branch) for h in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [blocked.phase(h, 3, branch) for h in range(3)] == [0, 1, 2]


def test_geometric_reaches_the_length_at_a_constant_ratio():
    pattern = Pattern.geometric(max_length=1 << 20, base=2048, growth=4)
    assert pattern.segment_lengths[0] == 2048
    assert pattern.segment_lengths[-1] >= 1 << 20 > pattern.segment_lengths[-2]
    assert {w // r for w, r in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True)} == {2048}
    assert Pattern.geometric(100, base=2048).segment_lengths == (2048,)
    with pytest.raises(ValueError, match="growth is 1"):
        Pattern.geometric(1 << 20, growth=1)
    with pytest.raises(ValueError, match="max_length has 0"):
        Pattern.geometric(0)
