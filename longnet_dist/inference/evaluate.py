"""How well a model predicts held-out data, by how much context a token has."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from longnet_dist.data.shards import TokenStream
from longnet_dist.models.decoder import LongNet
from longnet_dist.models.loss import linear_token_losses


@torch.no_grad()
def bits_by_position(
    model: LongNet, stream: TokenStream, seq_len: int, num_sequences: int, edges: Sequence[int]
) -> list[tuple[int, int, float]]:
    """Bits per byte of the tokens that have `first` to `last` tokens before them, in windows of `seq_len`.

    Args:
        model: in eval mode.
        stream: held-out tokens; its first `num_sequences` windows are read.
        seq_len: N.
        num_sequences: how many windows, at most.
        edges: where one bucket of positions ends and the next begins, rising; those at or beyond N are dropped.

    Returns:
        (first, last, bits per byte) of each bucket, last exclusive.

    Raises:
        ValueError: where the data holds no whole window.
    """
    count = min(num_sequences, stream.num_windows(seq_len))
    if count == 0:
        raise ValueError(
            f"the held-out data holds no sequence of {seq_len} tokens; give a shorter seq_len or more data"
        )
    nats, device = torch.zeros(seq_len, dtype=torch.float64), model.output.weight.device
    for window in range(count):
        tokens, labels = stream.read(window, seq_len, 0, seq_len)
        losses = linear_token_losses(
            model.features(tokens[None].to(device)), model.output.weight, labels[None].to(device)
        )[0]
        nats += losses.double().cpu() / count
    inner = [edge for edge in edges if 0 < edge < seq_len]
    buckets = zip([0, *inner], [*inner, seq_len], strict=True)
    return [(a, b, nats[a:b].mean().item() / math.log(2) * stream.index.tokens_per_byte) for a, b in buckets]
