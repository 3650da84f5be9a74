"""A failure here means: the oracle itself is wrong, and no other test can be trusted."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from torch.testing import assert_close

from longnet_dist import Pattern, dense_reference
from tests.cases import Case, cases


def mixture_of_branches(case: Case):
    """Compute the paper's definition in loops: attention per branch, mixed by the softmax denominators."""
    tensors = case.tensors()
    q, k, v = (tensors[name].detach() for name in "qkv")
    out, total = torch.zeros_like(q), torch.zeros(q.shape[:-1], dtype=q.dtype)
    for b in range(case.B):
        for h in range(case.H):
            g = h // (case.H // case.G)
            for branch in case.pattern.branches:
                phase = case.pattern.phase(g, case.G, branch)
                for i in range(case.N):
                    if not branch.keeps(i, phase):
                        continue
                    last = i + 1 if case.causal else case.N
                    keys = [
                        j
                        for j in range(last)
                        if branch.keeps(j, phase) and i // branch.segment_length == j // branch.segment_length
                    ]
                    scores = torch.stack([q[b, i, h] @ k[b, j, g] / math.sqrt(case.D) for j in keys]).exp()
                    total[b, i, h] += scores.sum()
                    out[b, i, h] += scores @ v[b, keys, g]
    covered = total > 0
    return out / total.masked_fill(~covered, 1)[..., None], total.log()


@settings(max_examples=25, deadline=None)
@given(cases(longest=14))
def test_the_oracle_is_the_mixture_of_its_branches(case):
    case = Case(**{**vars(case), "biased": False})
    out, lse = dense_reference(
        *(x.detach() for x in case.tensors().values()), case.pattern, causal=case.causal, return_lse=True
    )
    expected_out, expected_lse = mixture_of_branches(case)
    assert_close(out, expected_out, rtol=0, atol=1e-12)
    assert_close(lse, expected_lse, rtol=0, atol=1e-12)


def test_one_dense_branch_is_torchs_attention():
    q, k, v = torch.randn(3, 2, 20, 4, 8, dtype=torch.float64).unbind()
    out = dense_reference(q, k, v, Pattern((20,), (1,)), causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-12)


def test_a_token_alone_in_its_segment_attends_to_itself():
    """With N = 9 and w = 8, the output of the last token is its own value."""
    q, k, v = torch.randn(3, 1, 9, 2, 4, dtype=torch.float64).unbind()
    assert_close(dense_reference(q, k, v, Pattern((8,), (1,)))[:, 8], v[:, 8], rtol=0, atol=1e-15)
