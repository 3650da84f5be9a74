"""A failure here means: over ranks, results in low precision are merged otherwise than in one process."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.testing import assert_close

from longnet_dist import Pattern
from longnet_dist.attention import exchanges, merging
from longnet_dist.attention.exchanges import tables
from longnet_dist.attention.merging import collected
from longnet_dist.plan.exchange import STRATEGIES
from tests.cases import NO_INTERPRETER, Case, drawn, output_and_gradients
from tests.distributed.test_attention import UNALIGNED, cases_and_options, check_low_precision, distributed
from tests.unit.attention.test_merging import load_interpreted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_drawn_cases_over_two_ranks_are_as_near_the_oracle_as_one_process(pool, dtype):
    """Queries of shared segments have results over this rank's keys and over those of the other rank."""
    examples = drawn(cases_and_options(2), 40)
    pool.run(2, check_low_precision, examples, dtype)


def compare_bits(group, case, dtype):
    over_ranks = distributed(group, case, dtype, strategy="all_to_all")
    for actual, expected in zip(over_ranks, output_and_gradients(case, dtype), strict=True):
        assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trading_heads_gives_the_bits_of_one_process(pool, world, dtype):
    """Results of other ranks come last, and are merged in the order of their branches all the same."""
    for pattern, N in ((Pattern((64, 256, 512), (1, 4, 16)), 512), (Pattern((64, 192, 400), (1, 3, 5)), 387)):
        pool.run(world, compare_bits, Case(pattern, N, H=8, G=4, B=2, D=16, causal=True), dtype)


def check_interpreted(group, cases_and_options, dtype):
    merging.triton_kernel, exchanges.triton_rows = load_interpreted(), load_interpreted("exchanges.triton_rows")
    uses_triton = collected.uses_triton
    collected.uses_triton = tables.uses_triton = lambda x: True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Of Triton's interpreter below 3.9.
            check_low_precision(group, cases_and_options, dtype)
    finally:
        collected.uses_triton = tables.uses_triton = uses_triton
        del merging.triton_kernel, exchanges.triton_rows


def test_the_triton_kernels_pack_and_merge_what_travels_by_each_strategy(pool):
    if NO_INTERPRETER:
        pytest.skip(NO_INTERPRETER)
    case = Case(UNALIGNED, N=37, H=2, G=2, B=1, D=8, causal=True)
    pool.run(2, check_interpreted, [(case, {"strategy": strategy}) for strategy in STRATEGIES], torch.bfloat16)
