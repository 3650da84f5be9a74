"""The oracle: dilated attention as one dense softmax. Nothing else defines correctness.

Dilated attention is one softmax over a multiset of keys: a query sees a key once for each branch that
keeps both in one segment. The oracle takes memory for N x N scores per head; it is for tests and for
reading.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longnet_dist.attention.bias import PositionBias
from longnet_dist.plan.pattern import Pattern


def branch_counts(pattern: Pattern, seq_len: int, num_kv_heads: int, causal: bool) -> Tensor:
    """Count the branches in which each query sees each key: int64, (G, N queries, N keys)."""
    position = torch.arange(seq_len)
    counts = torch.zeros(num_kv_heads, seq_len, seq_len, dtype=torch.int64)
    for branch in pattern.branches:
        segment = position // branch.segment_length
        together = segment[:, None] == segment[None, :]
        for head in range(num_kv_heads):
            phase = pattern.phase(head, num_kv_heads, branch)
            kept = position % branch.segment_length % branch.dilation_rate == phase
            counts[head] += together & kept[:, None] & kept[None, :]
    return counts.tril() if causal else counts


def dense_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    causal: bool = False,
    scale: float | None = None,
    bias: PositionBias | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute dilated attention by its definition, densely in the dtype of `q`; differentiable by autograd.

    Args:
        q: (B, N, H, D), any floating dtype; the tests use float64.
        k, v: (B, N, G, D), H a multiple of G.
        pattern: the branches; see `Pattern`.
        causal: whether a query sees only keys at or before it.
        scale: the factor of the scores; 1 / sqrt(D) by default.
        bias: a term added to the scores; see `T5Bias`.
        return_lse: whether to return log(sum(exp(scores))) over the multiset, too: (B, N, H), natural log.

    Returns:
        out, (B, N, H, D), 0 for rows that no branch covers; with `return_lse` (out, lse), -inf for such rows.

    Raises:
        ValueError: if the shapes do not fit each other.

    Example:
        >>> q = torch.randn(1, 16, 2, 4, dtype=torch.float64)
        >>> dense_reference(q, q, q, Pattern((4, 16), (1, 4)), causal=True).shape
        torch.Size([1, 16, 2, 4])
    """
    same = q.dim() == 4 and k.shape == v.shape and k.shape[:2] + k.shape[3:] == q.shape[:2] + q.shape[3:]
    if not same or q.shape[2] % k.shape[2]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{shapes}: q must be (B, N, H, D), k and v (B, N, G, D), and H a multiple of G")
    _, N, H, D = q.shape
    G = k.shape[2]
    counts = branch_counts(pattern, N, G, causal).to(q.device).repeat_interleave(H // G, dim=0)
    k_BNHD, v_BNHD = (x.repeat_interleave(H // G, dim=2) for x in (k, v))
    scores_BHNN = torch.einsum("bihd,bjhd->bhij", q, k_BNHD) * (1 / math.sqrt(D) if scale is None else scale)
    if bias is not None:
        position = torch.arange(N, device=q.device)
        parameters, shift = bias.parameters.to(q.dtype).t()[None], position.new_zeros(1)
        scores_BHNN = scores_BHNN + bias.between(parameters, position, position, shift, causal)
    scores_BHNN = scores_BHNN.masked_fill(counts == 0, -math.inf)
    top = scores_BHNN.detach().amax(-1, keepdim=True) if N else scores_BHNN.new_zeros(*scores_BHNN.shape[:-1], 1)
    top = top.masked_fill(top == -math.inf, 0)
    weights = counts * torch.exp(scores_BHNN - top)
    total = weights.sum(-1, keepdim=True)
    seen = total > 0
    out = torch.einsum("bhij,bjhd->bihd", weights / total.masked_fill(~seen, 1), v_BNHD)
    if not return_lse:
        return out
    lse = (top + total.masked_fill(~seen, 1).log()).masked_fill(~seen, -math.inf)
    return out, lse.squeeze(-1).transpose(1, 2)
