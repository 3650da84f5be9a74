"""T5's relative position bias: one learned number a head for each bucket of distances."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relative_bucket(distance: Tensor, num_buckets: int, max_distance: int, causal: bool) -> Tensor:
    """The bucket of a token distance (query position minus key position), int64, the shape of `distance`.

    Small distances have a bucket each, larger ones share buckets that grow geometrically up to
    `max_distance` tokens; beyond, all share the last (Raffel et al. 2020, arXiv 1910.10683,
    section 2.1). Not causal: the first half of the buckets is for keys at or before the query, the
    second half for keys after it.
    """
    offset = torch.zeros_like(distance)
    if not causal:
        num_buckets //= 2
        offset = num_buckets * (distance < 0)
    distance = distance.clamp(min=0) if causal else distance.abs()
    exact = num_buckets // 2
    # float64, because in float32 a distance near a bucket's edge may fall on either side of it.
    growth = torch.log(distance.clamp(min=1).double() / exact) / math.log(max_distance / exact)
    large = exact + (growth * (num_buckets - exact)).long()
    return offset + torch.where(distance < exact, distance, large.clamp(max=num_buckets - 1))


def check_relative_bias(num_buckets: int, max_distance: int, causal: bool) -> list[str]:
    """Why these numbers make no buckets; empty where they do."""
    least = 2 if causal else 4
    if num_buckets < least or num_buckets % least:
        return [f"the relative bias has {num_buckets} buckets; it needs a multiple of {least}, for example 32"]
    exact = num_buckets // least
    if max_distance <= exact:
        return [f"max_distance is {max_distance}; with {num_buckets} buckets it must be above {exact}"]
    return []
