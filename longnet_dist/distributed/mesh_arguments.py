"""What a SequenceMesh can be made of: its group, and what is wrong with its other arguments."""

from __future__ import annotations

import numbers
import os

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from longnet_dist.plan.exchange import STRATEGIES
from longnet_dist.plan.pattern import Pattern


def process_group(group: ProcessGroup | DeviceMesh | None) -> ProcessGroup | None:
    """Return the process group of a mesh; see `SequenceMesh`.

    Raises:
        ValueError: for what cannot be a group of ranks.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"the DeviceMesh has {group.ndim} axes {group.mesh_dim_names or ''}, and a sequence is split over one: "
                'pass that one, for example device_mesh["sp"]'
            )
        return group.get_group()
    if group is not None and not isinstance(group, ProcessGroup):
        raise ValueError(
            f"group is {group!r}; it must be a ProcessGroup of which this rank is a member, a one-dimensional "
            "DeviceMesh, or None for one process"
        )
    if group is None and not dist.is_initialized() and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise ValueError(
            f"the group is None, and this is one of {os.environ['WORLD_SIZE']} processes (WORLD_SIZE): call "
            "torch.distributed.init_process_group() first, and pass a group such as torch.distributed.group.WORLD. "
            "With a process group initialised, None means that this process holds whole sequences"
        )
    return group


def problem(
    pattern: Pattern, seq_len: int, chunk: int | None, num_ranks: int, strategy: str | tuple[str, ...]
) -> str | None:
    """Describe what is wrong with the arguments of a mesh; None if nothing is."""
    if not isinstance(pattern, Pattern):
        return f"pattern is {pattern!r}; it must be a longnet_dist.Pattern"
    if not isinstance(seq_len, numbers.Integral) or isinstance(seq_len, bool) or seq_len < 0:
        return f"seq_len is {seq_len!r}; it must be the global number of tokens, 0 or more"
    if chunk is not None and (type(chunk) is not int or chunk < 1 or chunk * num_ranks < seq_len):
        return (
            f"chunk is {chunk!r}; {num_ranks} ranks must hold {seq_len} tokens, so it must be at least "
            f"{max(1, -(-seq_len // num_ranks))}"
        )
    names = (strategy,) if isinstance(strategy, str) else strategy
    if not isinstance(strategy, str) and len(strategy) != len(pattern.branches):
        return (
            f"strategy has {len(strategy)} entries, and the pattern {len(pattern.branches)} branches: give one for each"
        )
    if unknown := [name for name in names if name not in ("auto", *STRATEGIES)]:
        return f"strategy is {unknown[0]!r}; it must be auto, {', '.join(STRATEGIES)}, or one of them for each branch"
    return None
