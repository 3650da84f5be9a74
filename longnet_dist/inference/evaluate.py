"""Evaluate a model on held-out data, by the length of a token's context."""

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
    """Compute the bits per byte of the tokens in each range of positions.

    At position p of a window, the next token is predicted from the p + 1 tokens so far.

    Args:
        model: the model, in eval mode.
        stream: held-out tokens; its first windows are read.
        seq_len: N, the length of a window in tokens.
        num_sequences: the largest number of windows to read.
        edges: positions at which one range ends and the next begins, in increasing order. Those outside (0, N) are
            dropped.

    Returns:
        (first, last, bits per byte) of each range of positions [first, last).

    Raises:
        ValueError: if the data is shorter than one window.
    """
    count = min(num_sequences, stream.num_windows(seq_len))
    if count == 0:
        raise ValueError(f"the held-out data has no sequence of {seq_len} tokens; use a smaller seq_len or more data")
    nats, device = torch.zeros(seq_len, dtype=torch.float64), model.output.weight.device
    for window in range(count):
        tokens, labels = stream.read(window, seq_len, 0, seq_len)
        features = model.features(tokens[None].to(device))
        losses = linear_token_losses(features, model.output.weight, labels[None].to(device))[0]
        nats += losses.double().cpu() / count
    inner = [edge for edge in edges if 0 < edge < seq_len]
    ranges = zip([0, *inner], [*inner, seq_len], strict=True)
    return [(a, b, nats[a:b].mean().item() / math.log(2) * stream.index.tokens_per_byte) for a, b in ranges]
