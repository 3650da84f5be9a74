"""How the results and gradients of rectangles become those of all rows (docs/decisions/merging.md).

Branches, and the parts of a branch, overlap: a row has as many results as rectangles cover it. In float32 and
float64 they are merged as they come (`online`). In lower precision they are collected, and merged once
(`collected`): on CUDA by one Triton kernel (`triton_kernel`), elsewhere by torch.
"""

from __future__ import annotations

from torch import Tensor

from longnet_dist.attention.merging.collected import CollectedResults, CollectedSums
from longnet_dist.attention.merging.online import MergedRows, SummedRows, merge
from longnet_dist.attention.rows import accumulation_dtype

__all__ = ["merge", "merged_rows", "summed_rows"]


def merged_rows(like: Tensor, first_shared: int) -> MergedRows | CollectedResults:
    """Return an empty merge of attention results.

    Args:
        like: a tensor with the shape and dtype of the queries, (B, L, G, H / G, D).
        first_shared: the number of the first branch whose results may arrive out of order.
    """
    return MergedRows(like, first_shared) if _is_exact(like) else CollectedResults(like)


def summed_rows(like: Tensor, first_shared: int) -> SummedRows | CollectedSums:
    """Return an empty sum of gradients.

    Args:
        like: a tensor with the shape and dtype of the sum, (B, L, G, ...).
        first_shared: the number of the first branch whose gradients may arrive out of order.
    """
    return SummedRows(like, first_shared) if _is_exact(like) else CollectedSums(like)


def _is_exact(x: Tensor) -> bool:
    """Return whether the results of kernels have the dtype in which they are merged."""
    return accumulation_dtype(x.dtype) == x.dtype
