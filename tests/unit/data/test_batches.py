"""A failure here means: different batches on two ranks pass for equal, or equal batches for different."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from longnet_dist.distributed.digest import digest

Pair = namedtuple("Pair", "tokens name")


@dataclass
class Sample:
    tokens: torch.Tensor
    name: str = "a"


TOKENS = torch.arange(6).view(2, 3)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": TOKENS, "b": 1}, {"b": 1, "a": TOKENS.clone()}),
        (TOKENS.t().contiguous(), TOKENS.t()),
        (torch.arange(3), torch.arange(6)[::2] // 2),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")])),
        ([object(), TOKENS], [object(), TOKENS]),
        (UserDict(a=TOKENS), {"a": TOKENS}),
        (torch.zeros(2, dtype=torch.bfloat16, requires_grad=True), torch.zeros(2, dtype=torch.bfloat16)),
    ],
    ids=["order of names", "strides of a matrix", "strides of a vector", "NaN", "objects", "mappings", "gradients"],
)
def test_equal_batches_have_equal_digests(first, second):
    assert digest(first) == digest(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (TOKENS, TOKENS + 1),
        (TOKENS, TOKENS.int()),
        (TOKENS, TOKENS.view(3, 2)),
        ({"a": TOKENS}, {"b": TOKENS}),
        ([["a"], "b"], [["a", "b"]]),
        (["ab", "c"], ["a", "bc"]),
        ([TOKENS, TOKENS[0]], [TOKENS[0], TOKENS]),
        (Sample(TOKENS), Sample(TOKENS + 1)),
        (Pair(TOKENS, "a"), Pair(TOKENS, "b")),
        ({"a": [{"b": 1}]}, {"a": [{"b": 1.5}]}),
        (torch.tensor(0.0), torch.tensor(-0.0)),
    ],
    ids=["values", "dtype", "shape", "names", "nesting", "borders", "order", "dataclass", "tuple", "numbers", "0-dim"],
)
def test_different_batches_have_different_digests(first, second):
    assert digest(first) != digest(second)


def test_a_digest_fits_into_an_int64():
    assert all(0 <= digest(seed) < 2**56 for seed in range(100))
