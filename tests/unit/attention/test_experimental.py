"""A failure here means: a mask of blocks or buckets drops other keys than it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from longnet_dist import Pattern, dense_reference, dilated_attention
from longnet_dist.attention.experimental.block_sparse import block_sparse_attention
from longnet_dist.attention.experimental.hashed import hashed_attention
from longnet_dist.attention.experimental.masks import MaskBias
from tests.cases import Case, cases

MASKS = {}


class DenseMask(MaskBias):
    """A term of -inf for each pair that a mask (H, N, N) drops, for the oracle."""

    name = "dense mask of a test"

    def between(self, parameters, queries, keys, shift, causal):
        return torch.zeros(MASKS["seen"].shape, dtype=torch.float64).masked_fill(~MASKS["seen"], -torch.inf)


def oracle(case, inputs, seen):
    MASKS["seen"] = seen
    bias = DenseMask(torch.zeros(1, case.H, dtype=torch.float64))
    return dense_reference(**case.arguments(inputs), bias=bias)


def random_blocks(case, block_size):
    n = -(-case.N // block_size)
    return torch.rand(case.H, n, n, generator=torch.Generator().manual_seed(case.seed)) < 0.4


def assert_equal_with_gradients(case, inputs, actual, expected):
    results = [[out, *torch.autograd.grad(out, list(inputs.values()), case.dout())] for out in (actual, expected)]
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(cases().filter(lambda case: case.N > 0), st.integers(1, 9))
def test_blocks_equal_the_oracle(case, block_size):
    """Also where queries lose all keys of a branch, or of all."""
    case = Case(**{**vars(case), "biased": False})
    inputs, blocks = case.tensors(), random_blocks(case, block_size)
    whole = blocks.repeat_interleave(block_size, 1).repeat_interleave(block_size, 2)[:, : case.N, : case.N]
    actual = block_sparse_attention(*inputs.values(), case.pattern, blocks, block_size=block_size, causal=case.causal)
    assert_equal_with_gradients(case, inputs, actual, oracle(case, inputs, whole))


def seen_by_hash(case, inputs, bits, rounds):
    """Which query sees which key, pair by pair: (H, N, N), of the first sequence."""
    draws = torch.randn(
        rounds, case.G, case.D, bits, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )  # fmt: skip
    seen = torch.eye(case.N, dtype=torch.bool).expand(case.H, -1, -1).clone()
    for h in range(case.H):
        g = h // (case.H // case.G)
        for r in range(rounds):
            q, k = (x[0] @ draws[r, g] > 0 for x in (inputs["q"][:, :, h], inputs["k"][:, :, g]))
            seen[h] |= (q[:, None] == k[None]).all(-1)
    return seen


@settings(max_examples=30, deadline=None)
@given(cases().filter(lambda case: case.N > 0), st.integers(0, 3), st.integers(1, 3))
def test_buckets_equal_the_oracle(case, bits, rounds):
    case = Case(**{**vars(case), "biased": False, "B": 1})
    inputs = case.tensors()
    actual = hashed_attention(*inputs.values(), case.pattern, bits=bits, rounds=rounds, causal=case.causal)
    assert_equal_with_gradients(case, inputs, actual, oracle(case, inputs, seen_by_hash(case, inputs, bits, rounds)))


def test_no_bits_are_exact():
    q, k, v = torch.randn(3, 2, 40, 4, 8, dtype=torch.float64).unbind()
    pattern = Pattern((8, 32), (1, 4))
    assert_close(hashed_attention(q, k, v, pattern, bits=0), dilated_attention(q, k, v, pattern), rtol=0, atol=1e-13)


def test_mistakes_are_named():
    q = torch.randn(1, 20, 2, 4)
    for mask in (torch.ones(3, 3), torch.ones(2, 2, dtype=torch.bool), torch.ones(4, 3, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"it must be bool, \(3, 3\) or \(2, 3, 3\)"):
            block_sparse_attention(q, q, q, Pattern((8,), (1,)), mask, block_size=8)
    with pytest.raises(ValueError, match="bits must be 0 to 16"):
        hashed_attention(q, q, q, Pattern((8,), (1,)), bits=17)
