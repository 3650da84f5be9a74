"""A failure here means: attention that continues from a cache differs from attention over the whole sequence."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from longnet_dist import DilatedCache, Pattern, T5Bias, dense_reference, dilated_attention
from tests.cases import Case, cases

EXACT = {"rtol": 0, "atol": 1e-12}


def new_cache(case, dtype=torch.float64):
    return DilatedCache(case.pattern, case.B, case.G, case.D, dtype=dtype)


@torch.no_grad()
def in_parts(case, sizes, cache=None):
    """Return (out, lse) of consecutive parts of these sizes, the last of which takes what is left."""
    arguments = case.arguments(case.tensors())
    cache = cache or new_cache(case)
    results, first = [], 0
    for size in [*sizes, case.N]:
        part = {name: arguments[name][:, first : first + size] for name in "qkv"}
        results.append(dilated_attention(**(arguments | part), cache=cache, return_lse=True))
        first += part["q"].shape[1]
        assert cache.length == first
        assert cache.num_bytes == cache.max_bytes()
    return [torch.cat(parts, dim=1) for parts in zip(*results, strict=True)]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(cases(longest=70), st.lists(st.integers(0, 40) | st.just(1), max_size=12))
def test_parts_of_any_size_equal_the_whole(case, sizes):
    """Whole segments and parts of them, single tokens and none, any pattern, with and without a T5 bias."""
    case = dataclasses.replace(case, causal=True)
    expected = dense_reference(**case.arguments(case.tensors()), return_lse=True)
    for actual, exact in zip(in_parts(case, sizes), expected, strict=True):
        assert_close(actual, exact.detach(), **EXACT)


@pytest.mark.parametrize("phases", ["interleaved", "blocked"])
def test_token_by_token(phases):
    """Also with more heads than rates, fewer, and rates that do not divide segments."""
    for w, r, G in (((5, 16, 40), (1, 3, 7), 3), ((8, 32), (1, 4), 8)):
        case = Case(Pattern(w, r, phases), N=90, H=2 * G, G=G, B=2, D=8, causal=True)
        out, _ = in_parts(case, [1] * case.N)
        assert_close(out, dense_reference(**case.arguments(case.tensors())).detach(), **EXACT)


def test_the_bytes_are_those_of_the_segments():
    pattern = Pattern((64, 1 << 20), (1, 1 << 14))
    cache = DilatedCache(pattern, batch_size=3, num_kv_heads=2, head_dim=8)
    assert cache.max_bytes() == cache.num_bytes == 2 * 3 * (64 + 64) * 2 * 8 * 4
    x = torch.randn(3, 3000, 2, 8)
    for _ in range(4):
        dilated_attention(x, x, x, pattern, causal=True, cache=cache)
    assert cache.num_bytes == cache.max_bytes()


def test_sequences_can_be_reordered_saved_and_forgotten():
    case = Case(Pattern((8, 32), (1, 3)), N=40, H=4, G=2, B=3, D=8, causal=True)
    q, k, v = (x.detach() for x in case.tensors().values())
    cache = new_cache(case)
    dilated_attention(q[:, :30], k[:, :30], v[:, :30], case.pattern, causal=True, cache=cache)
    saved = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in cache.state_dict().items()}
    order = torch.tensor([2, 0, 0, 1])
    cache.reorder(order)
    whole = [x[order] for x in (q, k, v)]
    out = dilated_attention(*(x[:, 30:] for x in whole), case.pattern, causal=True, cache=cache)
    assert_close(out, dense_reference(*whole, case.pattern, causal=True)[:, 30:], **EXACT)
    again = new_cache(case)
    again.load_state_dict(saved)
    out = dilated_attention(*(x[:, 30:] for x in (q, k, v)), case.pattern, causal=True, cache=again)
    assert_close(out, dense_reference(q, k, v, case.pattern, causal=True)[:, 30:], **EXACT)
    with pytest.raises(ValueError, match=r"the state is of a cache of .*, and this one is of"):
        DilatedCache(case.pattern, 1, case.G, case.D, dtype=torch.float64).load_state_dict(saved)
    again.reset()
    out = dilated_attention(q, k, v, case.pattern, causal=True, cache=again)
    assert_close(out, dense_reference(q, k, v, case.pattern, causal=True), **EXACT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"causal": False}, "attention must be causal"),
        ({"pattern": Pattern((8,), (1,))}, "is not the cache's"),
        ({"lengths": torch.tensor([3, 3])}, "use a cache for each document"),
        *(
            ({x: torch.zeros(2, 4, 4, 8, requires_grad=True)}, "without gradients: call under torch.no_grad")
            for x in "qkv"
        ),
        ({"bias": T5Bias(torch.zeros(8, 4, requires_grad=True))}, "without gradients: call under torch.no_grad"),
        (dict.fromkeys("qkv", torch.zeros(1, 4, 4, 8)), r"k is \(1, 4, 4, 8\).*\(2, L, 4, 8\)"),
        (dict.fromkeys("qkv", torch.zeros(2, 4, 4, 8).double()), "torch.float64 on cpu, and the cache is for"),
        ({"cache": {}}, "cache is a dict; it must be a longnet_dist.DilatedCache"),
    ],
)
def test_calls_that_cannot_continue_raise(change, message):
    pattern = Pattern((8, 32), (1, 4))
    x = torch.zeros(2, 4, 4, 8)
    arguments = {"q": x, "k": x, "v": x, "pattern": pattern, "causal": True, "cache": DilatedCache(pattern, 2, 4, 8)}
    with pytest.raises(ValueError, match=message):
        dilated_attention(**(arguments | change))
