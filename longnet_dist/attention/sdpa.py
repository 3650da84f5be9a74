"""Dilated attention for people who think in `torch.nn.functional.scaled_dot_product_attention`: (B, H, N, D)."""

from __future__ import annotations

from torch import Tensor

from longnet_dist.attention.ops import dilated_attention
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.plan.pattern import Pattern


def scaled_dot_product_dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    mesh: SequenceMesh | None = None,
    kernel: str = "auto",
) -> Tensor:
    """`dilated_attention` with the names and the layout of `scaled_dot_product_attention`.

    Args:
        query: (B, H, N, D); with a mesh (B, H, L, D), this rank's rows.
        key, value: (B, H, N or L, D); with `enable_gqa`, (B, G, N or L, D) with H a multiple of G.
        pattern: the branches.
        attn_mask: None: who sees whom is the pattern's.
        dropout_p: 0: probabilities are never all in one place.
        is_causal, scale: as there.
        enable_gqa: allow fewer heads of keys than of queries.
        mesh, kernel: as for `dilated_attention`.

    Returns:
        (B, H, N or L, D).

    Raises:
        ValueError: for a mask or dropout, and as `dilated_attention`.

    Example:
        >>> q, k, v = torch.randn(3, 1, 4, 100, 8).unbind()
        >>> scaled_dot_product_dilated_attention(q, k, v, Pattern((16, 64), (1, 4)), is_causal=True).shape
        torch.Size([1, 4, 100, 8])
    """
    if attn_mask is not None:
        refuse(
            "attn_mask must be None: the pattern says who sees whom. Padding at the end of causal sequences needs "
            "none, as no token sees what comes after it; leave it out of the loss",
            mesh,
        )
    if dropout_p:
        refuse(f"dropout_p is {dropout_p}; probabilities cannot be dropped: use dropout on the output", mesh)
    if any(x.dim() != 4 for x in (query, key, value)):
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        refuse(f"query, key and value are {shapes}; each must be (B, heads, N, D)", mesh)
    if not enable_gqa and key.shape[1] != query.shape[1]:
        refuse(f"{query.shape[1]} heads of queries and {key.shape[1]} of keys: pass enable_gqa=True", mesh)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out: Tensor = dilated_attention(q, k, v, pattern, causal=is_causal, scale=scale, mesh=mesh, kernel=kernel)
    return out.transpose(1, 2)
