"""Score documents: the log-likelihood of each token given the tokens before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.models.loss import linear_token_losses

if TYPE_CHECKING:
    from longnet_dist.models.decoder import LongNet


@torch.no_grad()
def log_likelihoods(model: LongNet, tokens: Tensor, mesh: SequenceMesh | None = None) -> Tensor:
    """Compute the log-likelihood of each token given the tokens before it, in nats.

    Args:
        model: the model, in eval mode.
        tokens: (B, N), int64, whole documents. With a mesh, (B, L + 1): this rank's rows and the row after them, which
            the last of them predicts. (B, L) if no row follows.
        mesh: the ranks that hold the documents; the call is then collective over the mesh's group.

    Returns:
        The log-likelihoods of `tokens[:, 1:]`, float32 (float64 for a float64 model). Concatenated over ranks, they
        are those of the whole documents.

    Raises:
        ValueError: if `tokens` has a wrong shape, or the mesh has another pattern.

    Example:
        >>> model = LongNetConfig(d_model=32, num_layers=1).build().eval()
        >>> log_likelihoods(model, torch.randint(257, (1, 100))).shape
        torch.Size([1, 99])
    """
    num_rows = tokens.shape[-1]
    if mesh is not None:
        num_rows, following = mesh.shard.num_rows, int(mesh.shard.stop < mesh.seq_len)
        if tokens.dim() != 2 or tokens.shape[1] != num_rows + following:
            refuse(
                f"tokens is {tuple(tokens.shape)}; it must be (B, {num_rows + following}): the {num_rows} rows of this "
                f"rank, and {'the row after them' if following else 'none after them'}",
                mesh,
            )
    features, labels = model.features(tokens[..., :num_rows], mesh), tokens[:, 1:]
    return -linear_token_losses(features[:, : labels.shape[1]], model.output.weight, labels)
