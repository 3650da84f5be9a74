"""Dynamic sparse dilated attention: a query sees only the keys that a random hash puts into its own bucket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longnet_dist.attention.experimental.masks import DROPPED, MaskBias, masked_attention
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.plan.pattern import Pattern


@dataclass(frozen=True, eq=False)
class BucketBias(MaskBias):
    """The mask of one sequence's buckets.

    Args:
        parameters: (2 * rounds * N, H): the buckets of queries in each round, and then those of keys.
        rounds: the number of hashes.
    """

    parameters: Tensor
    rounds: int = 1
    name: ClassVar[str] = "buckets"
    by_distance: ClassVar[bool] = False

    @property
    def settings(self) -> tuple[int, ...]:
        """The tuple (rounds,)."""
        return (self.rounds,)

    def between(self, parameters: Tensor, queries: Tensor, keys: Tensor, shift: Tensor, causal: bool) -> Tensor:
        """Compare the buckets of each pair: (b, H, I, J)."""
        b, num_heads, _ = parameters.shape
        of_queries, of_keys = (
            table.gather(-1, (rows + shift[:, None])[:, None, None].expand(b, num_heads, self.rounds, -1))
            for table, rows in zip(
                parameters.unflatten(-1, (2, self.rounds, -1)).unbind(2), (queries, keys), strict=True
            )
        )
        same = of_queries[..., :, None] == of_keys[..., None, :]
        seen = same.any(2) | (queries[:, None] == keys[None, :])
        return torch.where(seen, 0, DROPPED).to(parameters.dtype)


def hashed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    bits: int = 2,
    rounds: int = 4,
    seed: int = 0,
    causal: bool = False,
    scale: float | None = None,
    mesh: SequenceMesh | None = None,
) -> Tensor:
    """Approximate dilated attention by the keys whose hash is the query's, and its own. An experiment.

    A hash is the signs of random projections, the same for queries and keys of a head, so that vectors in like
    directions tend to share a bucket (Charikar 2002; Reformer, arXiv 2001.04451). All scores are computed, also those
    of dropped keys. Over a mesh the result is that of one process: ranks tell each other the buckets of their rows.
    docs/guides/encoders.md has the measured error.

    Args:
        q, k, v, pattern, causal, scale, mesh: see `dilated_attention`.
        bits: projections in a hash: there are 2^bits buckets. With 0, attention is exact.
        rounds: hashes; a key is seen if it shares the query's bucket in any of them.
        seed: seed of the projections.

    Returns:
        A tensor of q's shape and dtype.

    Raises:
        ValueError: as `dilated_attention` does, and for numbers out of range.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 4, 8).unbind()
        >>> hashed_attention(q, k, v, Pattern((64,), (1,))).shape
        torch.Size([1, 100, 4, 8])
    """
    if q.dim() != 4 or k.dim() != 4 or not 0 <= bits <= 16 or rounds < 1:
        refuse(
            f"bits is {bits} and rounds {rounds}; bits must be 0 to 16, rounds 1 or more, q and k (B, N, H, D)", mesh
        )
    num_heads, num_kv_heads, dim = q.shape[2], k.shape[2], q.shape[3]
    generator = torch.Generator().manual_seed(seed)
    projections = torch.randn(rounds, num_kv_heads, dim, bits, generator=generator, dtype=torch.float64).to(q.device)
    queries, keys = _buckets(q, projections), _buckets(k, projections).repeat_interleave(num_heads // num_kv_heads, 2)
    if mesh is not None:
        queries, keys = mesh.join(queries), mesh.join(keys)
    both = torch.stack([queries, keys]).permute(1, 0, 4, 2, 3)  # (B, 2, rounds, N, H)
    tables = both.flatten(1, 3).to(torch.promote_types(q.dtype, torch.float32))
    parts = zip(q.split(1), k.split(1), v.split(1), tables, strict=True)
    return torch.cat(
        [
            masked_attention(q_1, k_1, v_1, pattern, BucketBias(table, rounds), mesh, causal=causal, scale=scale)
            for q_1, k_1, v_1, table in parts
        ]
    )


@torch.no_grad()
def _buckets(x: Tensor, projections: Tensor) -> Tensor:
    """Hash each row of each head, (B, L, H, D) -> (B, L, H, rounds), int64."""
    per_head = projections.repeat_interleave(x.shape[2] // projections.shape[1], 1)
    signs = torch.einsum("blhd,rhdk->blhrk", x.double(), per_head) > 0
    return (signs * 2 ** torch.arange(projections.shape[-1], device=x.device)).sum(-1)
