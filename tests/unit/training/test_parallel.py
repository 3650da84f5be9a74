"""A failure here means: a run over another number of ranks leaves ranks idle, or does not start."""

from __future__ import annotations

import pytest

from longnet_dist.training.parallel import ParallelConfig


@pytest.mark.parametrize(
    ("axes", "batch_size", "ranks", "expected"),
    [
        ((1, 1, 0), 1, 3, (1, 1, 0)),  # Any number of ranks can hold a sequence.
        ((1, 2, 0), 4, 6, (1, 2, 0)),
        ((1, 2, 0), 4, 3, (1, 1, 3)),
        ((2, 2, 0), 4, 6, (1, 2, 3)),
        ((1, 4, 0), 4, 6, (1, 2, 3)),
        ((1, 3, 0), 3, 4, (1, 1, 4)),
        ((4, 1, 0), 4, 1, (1, 1, 1)),
    ],
)
def test_every_rank_is_in_use_when_there_are_fewer(axes, batch_size, ranks, expected):
    parallel = ParallelConfig(*axes).fitting(ranks, batch_size)
    assert parallel == ParallelConfig(*expected)
    replicate, shard, sp = parallel.degrees(ranks)
    assert replicate * shard * sp == ranks
    assert batch_size % (replicate * shard) == 0


def test_a_fixed_degree_that_does_not_fit_raises():
    with pytest.raises(ValueError, match="does not make the 3 ranks"):
        ParallelConfig(sp=2).fitting(3, 1)
