"""The arrangement of ranks: dp_replicate x dp_shard x sp, one DeviceMesh with named axes, and FSDP2 over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("dp_replicate", "dp_shard", "sp")


@dataclass(frozen=True)
class ParallelConfig:
    """The number of ranks along each axis; their product is the number of all ranks."""

    dp_replicate: int = 1
    """Number of replicas of the parameters, each with sequences of its own."""
    dp_shard: int = 1
    """Number of groups, each with sequences of its own, over which one copy of the parameters is sharded (FSDP2)."""
    sp: int = 0
    """Number of ranks that hold one sequence, and over which parameters are sharded too; 0 for all remaining ranks."""

    def degrees(self, num_ranks: int) -> tuple[int, int, int]:
        """Return (dp_replicate, dp_shard, sp) for a number of ranks.

        Args:
            num_ranks: number of all ranks.

        Raises:
            ValueError: if their product cannot be the number of ranks.

        Example:
            >>> ParallelConfig(dp_shard=2).degrees(8)
            (1, 2, 4)
        """
        degrees = (self.dp_replicate, self.dp_shard, self.sp)
        if self.dp_replicate < 1 or self.dp_shard < 1 or self.sp < 0:
            axes = dict(zip(AXES, degrees, strict=True))
            raise ValueError(f"parallel axes {axes}: each must be at least 1 (sp: or 0)")
        data = self.dp_replicate * self.dp_shard
        sp = self.sp or num_ranks // data
        if data * sp != num_ranks:
            raise ValueError(
                f"dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard} x sp {self.sp or '(the rest)'} does not "
                f"make the {num_ranks} ranks of this job: start a multiple of {data * max(1, self.sp)} ranks, or leave "
                "sp at 0 for the rest"
            )
        return self.dp_replicate, self.dp_shard, sp

    def fitting(self, num_ranks: int, batch_size: int) -> ParallelConfig:
        """Return axes for another number of ranks, with every rank in use; the losses are the same.

        They are these if the data-parallel degree divides the number of ranks; only the number of ranks per sequence
        changes then. Otherwise the degree shrinks to the largest that divides both the number of ranks and the batch
        (docs/decisions/elastic-arrangement.md).

        Args:
            num_ranks: number of all ranks.
            batch_size: number of sequences per forward.

        Raises:
            ValueError: if `sp` is fixed and does not fit.

        Example:
            >>> ParallelConfig(dp_shard=2).fitting(num_ranks=3, batch_size=4)
            ParallelConfig(dp_replicate=1, dp_shard=1, sp=3)
        """
        data_degree = self.dp_replicate * self.dp_shard
        if num_ranks % data_degree == 0 or self.sp:
            self.degrees(num_ranks)
            return self
        candidates = range(1, min(data_degree, num_ranks) + 1)
        data_degree = max(n for n in candidates if num_ranks % n == 0 and batch_size % n == 0)
        return ParallelConfig(dp_replicate=1, dp_shard=data_degree, sp=num_ranks // data_degree)


def make_device_mesh(config: ParallelConfig, device_type: str) -> DeviceMesh | None:
    """Make the mesh of all ranks, with the axes `AXES`; None without a process group. Collective.

    Args:
        config: the number of ranks along each axis.
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: if the axes' product cannot be the number of ranks.
    """
    # Imported here because the options of `longnet-dist train --help` need no torch.
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    degrees = config.degrees(dist.get_world_size() if dist.is_initialized() else 1)
    return init_device_mesh(device_type, degrees, mesh_dim_names=AXES) if dist.is_initialized() else None


def shard_parameters(model: nn.Module, blocks: nn.ModuleList, mesh: DeviceMesh | None) -> None:
    """Apply FSDP2, in place: shard parameters, gradients and optimizer state over dp_shard x sp.

    They are replicated over dp_replicate. Gradients become the *mean* over all ranks, FSDP's default. Collective.

    Args:
        model: the model.
        blocks: its blocks, which are gathered one at a time.
        mesh: the mesh of all ranks; None leaves the model as it is.
    """
    if mesh is None:
        return
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    replicate, shard, sp = mesh.shape
    grid = init_device_mesh(mesh.device_type, (replicate, shard * sp), mesh_dim_names=("dp_replicate", "fsdp"))
    fsdp_mesh = grid if replicate > 1 else grid["fsdp"]
    # Gradients of low precision are summed over ranks, and over the forwards of a step, in float32.
    dtypes = {torch.promote_types(parameter.dtype, torch.float32) for parameter in model.parameters()}
    policy = MixedPrecisionPolicy(reduce_dtype=dtypes.pop() if len(dtypes) == 1 else None)
    for block in blocks:
        fully_shard(block, mesh=fsdp_mesh, mp_policy=policy)
    fully_shard(model, mesh=fsdp_mesh, mp_policy=policy)
