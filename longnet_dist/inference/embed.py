"""Embed documents: a model's features after its final norm, pooled or for each token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.models.decoder import LongNet


@torch.no_grad()
def embeddings(
    model: LongNet,
    tokens: Tensor,
    mesh: SequenceMesh | None = None,
    pooling: Literal["mean", "last"] | None = "mean",
) -> Tensor:
    """Compute the features of documents after the model's final norm, pooled or for each token.

    Args:
        model: the model, in eval mode.
        tokens: (B, N), int64, whole documents; with a mesh (B, L), this rank's rows.
        mesh: the ranks that hold the documents; the call is then collective over the mesh's group.
        pooling: "mean" for the mean over all tokens, "last" for the features of the last token, None for those of
            each token.

    Returns:
        (B, d_model), the same on every rank; without pooling (B, N or L, d_model).

    Raises:
        ValueError: if `tokens` has a wrong shape, `pooling` is unknown, or the mesh has another pattern.

    Example:
        >>> model = LongNetConfig(d_model=32, num_layers=1).build().eval()
        >>> embeddings(model, torch.randint(257, (1, 100))).shape
        torch.Size([1, 32])
    """
    if pooling not in ("mean", "last", None):
        refuse(f"pooling is {pooling!r}; it must be 'mean', 'last' or None", mesh)
    features = model.features(tokens, mesh)
    if pooling is None:
        return features
    seq_len = tokens.shape[1] if mesh is None else mesh.seq_len
    if pooling == "last":
        holds_last = mesh is None or mesh.shard.stop == seq_len
        pooled_rows = features[:, -1:] if holds_last else features[:, :0]
    else:
        pooled_rows = features
    # A sum in at least float32: a long document has too many rows for bfloat16.
    total = pooled_rows.sum(1, dtype=torch.promote_types(features.dtype, torch.float32))
    if mesh is not None:
        total = mesh.sum(total)
    return (total / (seq_len if pooling == "mean" else 1)).to(features.dtype)
