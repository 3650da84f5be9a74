"""Evaluate a model on held-out data, by the number of tokens that it has seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from longnet_dist.data.shards import TokenStream
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.models.decoder import LongNet
from longnet_dist.models.loss import linear_token_losses


@torch.no_grad()
def bits_by_position(
    model: LongNet,
    stream: TokenStream,
    seq_len: int,
    num_sequences: int,
    edges: Sequence[int],
    mesh: SequenceMesh | None = None,
) -> list[tuple[int, int, float]]:
    """Compute the bits per byte of the tokens in each range of positions.

    At position p of a window, the next token is predicted from the p + 1 tokens so far.

    Args:
        model: the model, in eval mode.
        stream: held-out tokens; its first windows are read.
        seq_len: N, the length of a window in tokens.
        num_sequences: the largest number of windows to read.
        edges: positions at which one range ends and the next begins, in increasing order. Those outside (0, N) are
            dropped.
        mesh: the ranks that share a window, made for N tokens; the call is then collective.

    Returns:
        (first, last, bits per byte) of each range of positions [first, last), the same on every rank.

    Raises:
        ValueError: if the data is shorter than one window.
    """
    count = min(num_sequences, stream.num_windows(seq_len))
    if count == 0:
        raise ValueError(f"the held-out data has no sequence of {seq_len} tokens; use a smaller seq_len or more data")
    first, last = (0, seq_len) if mesh is None else (mesh.shard.start, mesh.shard.stop)
    device = model.output.weight.device
    nats = torch.zeros(last - first, dtype=torch.float64, device=device)
    for window in range(count):
        tokens, targets = stream.read(window, seq_len, first, last)
        features = model.features(tokens[None].to(device), mesh)
        nats += linear_token_losses(features, model.output.weight, targets[None].to(device))[0].double() / count
    if mesh is not None:
        nats = mesh.join(nats, dim=0)
    nats = nats.cpu()
    inner = [edge for edge in edges if 0 < edge < seq_len]
    ranges = zip([0, *inner], [*inner, seq_len], strict=True)
    return [(a, b, nats[a:b].mean().item() / math.log(2) * stream.index.tokens_per_byte) for a, b in ranges]
