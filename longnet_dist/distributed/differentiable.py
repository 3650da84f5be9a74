"""The steps of a mesh: taking a rank's rows, joining them, and summing over ranks, all differentiable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from longnet_dist.distributed.mesh import SequenceMesh


class Split(torch.autograd.Function):
    """Forward: take this rank's rows. Backward: gather the rows of all ranks, which is `Join`."""

    @staticmethod
    def forward(x: Tensor, mesh: SequenceMesh, dim: int) -> Tensor:
        """Copy the rows of this rank."""
        return x.narrow(dim, mesh.shard.start, mesh.shard.num_rows).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the mesh and the dimension; no tensor."""
        _, ctx.mesh, ctx.dim = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Join the gradients of all ranks' rows."""
        return Join.apply(grad, ctx.mesh, ctx.dim), None, None


class Join(torch.autograd.Function):
    """Forward: gather the rows of all ranks. Backward: take this rank's rows, which is `Split`."""

    @staticmethod
    def forward(x: Tensor, mesh: SequenceMesh, dim: int) -> Tensor:
        """Return the rows of all ranks, in order."""
        return _gather(x, mesh, dim)

    setup_context = Split.setup_context

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Take the gradient of this rank's rows."""
        return Split.apply(grad, ctx.mesh, ctx.dim), None, None


class Sum(torch.autograd.Function):
    """Forward: all-reduce. Backward: the identity, so that a rank's gradient is its own part."""

    @staticmethod
    def forward(x: Tensor, mesh: SequenceMesh) -> Tensor:
        """Return the sum, the same on every rank."""
        mesh.agree({"call": "sum", "shape": [*x.shape], "dtype": str(x.dtype), "device": x.device.type})
        assert mesh.everyone is not None
        return mesh.everyone.all_reduce(x.clone(), "summing over the sequence's ranks")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient unchanged."""
        return grad, None


def _gather(x: Tensor, mesh: SequenceMesh, dim: int) -> Tensor:
    chunk, shard = mesh.shard.chunk, mesh.shard
    problem, others = None, list(x.shape)
    if not -x.dim() <= dim < x.dim():
        problem = f"mesh.join takes a tensor with a dimension of the sequence: {tuple(x.shape)} has no dim {dim}"
    elif others.pop(dim) != shard.num_rows:
        problem = (
            f"mesh.join takes this rank's chunk: dim {dim} of {tuple(x.shape)} has {x.shape[dim]} entries, "
            f"not the {shard.num_rows} of rows [{shard.start}, {shard.stop})"
        )
    facts = {"call": "join", "dim": dim % max(1, x.dim()), "sizes": others, "dtype": str(x.dtype)}
    mesh.agree(facts | {"device": x.device.type}, problem)
    if mesh.everyone is None:
        return x.clone()
    padded = x.new_zeros(chunk, *x.movedim(dim, 0).shape[1:])
    padded[: shard.num_rows] = x.movedim(dim, 0)
    parts = mesh.everyone.all_gather(padded, "joining the chunks of a sequence").wait()
    return parts.flatten(0, 1)[: shard.seq_len].movedim(0, dim)


def holds_ids(x: Tensor) -> bool:
    """Return whether a tensor has integers or booleans that can be read, as tokens, labels and masks have."""
    is_plain = type(x) is Tensor and not x.is_meta and not torch.compiler.is_compiling()
    return is_plain and not x.is_floating_point() and not x.is_complex()
