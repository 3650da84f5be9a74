"""Block-sparse dilated attention: a caller's mask drops blocks of keys for blocks of queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longnet_dist.attention.experimental.masks import DROPPED, MaskBias, masked_attention
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.plan.pattern import Pattern


@dataclass(frozen=True, eq=False)
class BlockBias(MaskBias):
    """The mask of blocks: 0 for those that are seen.

    Args:
        parameters: (query blocks * key blocks, H), 0 or `DROPPED`.
        block_size: tokens in a block.
    """

    parameters: Tensor
    block_size: int = 1
    name: ClassVar[str] = "blocks"
    by_distance: ClassVar[bool] = False

    @property
    def settings(self) -> tuple[int, ...]:
        """The tuple (block_size,)."""
        return (self.block_size,)

    def between(self, parameters: Tensor, queries: Tensor, keys: Tensor, shift: Tensor, causal: bool) -> Tensor:
        """Look up the block of each pair: (b, H, I, J)."""
        num_blocks = round(parameters.shape[-1] ** 0.5)
        of_queries, of_keys = ((x + shift[:, None]) // self.block_size for x in (queries, keys))
        block = of_queries[:, :, None] * num_blocks + of_keys[:, None, :]
        num_heads = parameters.shape[1]
        return parameters.gather(2, block.flatten(1)[:, None].expand(-1, num_heads, -1)).unflatten(2, block.shape[1:])


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    block_mask: Tensor,
    *,
    block_size: int,
    causal: bool = False,
    scale: float | None = None,
    mesh: SequenceMesh | None = None,
) -> Tensor:
    """Compute dilated attention in which a query sees only the keys of some blocks of the sequence. Exact.

    Blocks are of `block_size` tokens each, by global position; in branches with r > 1 a block has the kept keys among
    them. All scores are computed, also those of dropped blocks. Over a mesh, every rank passes the whole mask.

    Args:
        q, k, v, pattern, causal, scale, mesh: see `dilated_attention`.
        block_mask: (n, n) or (H, n, n), bool, n = ceil(N / block_size): true where the queries of a block see the keys
            of another, in the segments and rows of the pattern.
        block_size: tokens in a block.

    Returns:
        A tensor of q's shape and dtype; 0 for queries that see no key.

    Raises:
        ValueError: as `dilated_attention` does, and for a mask of another shape or dtype.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 4, 8).unbind()
        >>> near = torch.eye(7, dtype=torch.bool)
        >>> block_sparse_attention(q, k, v, Pattern((64,), (1,)), near, block_size=16).shape
        torch.Size([1, 100, 4, 8])
    """
    if q.dim() != 4 or block_size < 1:
        refuse(f"q is {tuple(q.shape)} and block_size {block_size}; they must be (B, N, H, D), and 1 or more", mesh)
    num_heads = q.shape[2]
    n = -(-(q.shape[1] if mesh is None else mesh.seq_len) // block_size)
    if block_mask.dtype != torch.bool or block_mask.shape not in ((n, n), (num_heads, n, n)):
        refuse(
            f"block_mask is {block_mask.dtype} of shape {tuple(block_mask.shape)}; it must be bool, ({n}, {n}) or "
            f"({num_heads}, {n}, {n})",
            mesh,
        )
    dtype = torch.promote_types(q.dtype, torch.float32)
    mask = block_mask.to(q.device).expand(num_heads, n, n).flatten(1).T
    terms = torch.zeros(mask.shape, dtype=dtype, device=q.device).masked_fill(~mask, DROPPED)
    return masked_attention(q, k, v, pattern, BlockBias(terms, block_size), mesh, causal=causal, scale=scale)
