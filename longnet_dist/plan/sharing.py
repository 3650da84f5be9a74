"""Whether collectives between the same ranks become one: what that saves, by the planner's model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from longnet_dist.plan.cost import BranchModel, LayerSize, model_branch
from longnet_dist.plan.hardware import Hardware
from longnet_dist.plan.pattern import Pattern
from longnet_dist.plan.shard import Shard


def saved_latency(
    pattern: Pattern,
    strategies: Sequence[str],
    shard: Shard,
    layer: LayerSize,
    hardware: Hardware,
    keep_kv: bool | None = None,
) -> float:
    """Return the seconds that joint collectives save in a forward and backward; 0 if separate ones are better.

    A joint collective arrives when all of it has arrived, so less of the transfer hides behind computation. Collectives
    become one only if their latencies take longer than all that they transfer. The result is the same on every rank.

    Args:
        pattern: the branches.
        strategies: the strategy of each branch.
        shard: the rows of any rank.
        layer: the sizes of the layer.
        hardware: the speed of a rank.
        keep_kv: see `SequenceMesh`.
    """
    groups: dict[tuple[str, int], list[BranchModel]] = defaultdict(list)
    for branch, strategy in zip(pattern.branches, strategies, strict=True):
        model = model_branch(branch, strategy, shard, layer, hardware, keep_kv)
        if model.collectives:
            # The collectives of "exchange" are between all ranks, and others between those of a segment.
            segment = 0 if strategy == "exchange" else min(branch.segment_length, shard.seq_len)
            groups[strategy, segment].append(model)
    saved, transfer = 0, 0.0
    for (strategy, _), models in groups.items():
        most = max(model.collectives for model in models)
        # Queries go together with keys and values, and so do their gradients.
        joint = most // 2 + 1 if strategy == "all_to_all" else most
        saved += sum(model.collectives for model in models) - joint
        if len(models) > 1 or joint < most:
            transfer += sum(model.received for model in models) / hardware.bandwidth
    seconds = saved * hardware.latency
    return seconds if seconds > transfer else 0.0
