"""Dilated attention with the arguments and the layout of `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

from torch import Tensor

from longnet_dist.attention.api import dilated_attention
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
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Compute `dilated_attention` with the names and the layout of `scaled_dot_product_attention`.

    Args:
        query: (B, H, N, D); with a mesh (B, H, L, D), this rank's rows.
        key, value: (B, H, N or L, D); with `enable_gqa`, (B, G, N or L, D) with H a multiple of G.
        pattern: the branches.
        attn_mask: must be None; the pattern decides which keys a query sees.
        dropout_p: must be 0; attention probabilities never exist as a whole.
        is_causal: whether a query sees only keys at or before it.
        scale: the factor of the scores; 1 / sqrt(D) by default.
        enable_gqa: whether there may be fewer key/value heads than query heads.
        mesh, kernel, cu_seqlens, lengths: as for `dilated_attention`.

    Returns:
        (B, H, N or L, D).

    Raises:
        ValueError: for a mask, dropout, fewer key/value heads without `enable_gqa`, and whatever
            `dilated_attention` rejects.

    Example:
        >>> q, k, v = torch.randn(3, 1, 4, 100, 8).unbind()
        >>> scaled_dot_product_dilated_attention(q, k, v, Pattern((16, 64), (1, 4)), is_causal=True).shape
        torch.Size([1, 4, 100, 8])
    """
    if attn_mask is not None:
        refuse(
            "attn_mask must be None: the pattern decides which keys a query sees. Padding at the end of causal "
            "sequences needs no mask, because no token sees what comes after it; `lengths` leaves padding out of any",
            mesh,
        )
    if dropout_p:
        refuse(
            f"dropout_p is {dropout_p}; probabilities cannot be dropped: use dropout on the output",
            mesh,
        )
    if any(x.dim() != 4 for x in (query, key, value)):
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        refuse(f"query, key and value are {shapes}; each must be (B, heads, N, D)", mesh)
    if not enable_gqa and key.shape[1] != query.shape[1]:
        refuse(f"there are {query.shape[1]} query heads and {key.shape[1]} key heads: pass enable_gqa=True", mesh)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out: Tensor = dilated_attention(
        q,
        k,
        v,
        pattern,
        causal=is_causal,
        scale=scale,
        mesh=mesh,
        kernel=kernel,
        cu_seqlens=cu_seqlens,
        lengths=lengths,
    )
    return out.transpose(1, 2)
