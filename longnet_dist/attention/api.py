"""The function dilated_attention(): its signature, and the checks of its arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longnet_dist.attention.arguments import Options, problem
from longnet_dist.attention.autograd import attend
from longnet_dist.attention.bias import PositionBias
from longnet_dist.attention.cache import DilatedCache, attend_after, problem_of_cache
from longnet_dist.attention.documents import to_offsets
from longnet_dist.distributed.heads import head_shard
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.plan.pattern import Pattern


def as_autocast(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Cast tensors to autocast's dtype, as torch's own attention does; outside autocast, and float64, stay as they are.

    Rotary positions often leave queries and keys in float32, and values in bfloat16.
    """
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    causal: bool = False,
    mesh: SequenceMesh | None = None,
    scale: float | None = None,
    kernel: str = "auto",
    bias: PositionBias | None = None,
    return_lse: bool = False,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    cache: DilatedCache | None = None,
) -> Any:
    """Compute dilated attention exactly, on one device or over a mesh of ranks.

    See LongNet (arXiv 2307.02486), section 2.2. Differentiable once, in reverse mode.

    Args:
        q: (B, N, H, D); with a mesh (B, L, H, D), this rank's rows [mesh.shard.start, mesh.shard.stop).
        k, v: (B, N or L, G, D), of q's dtype (inside autocast all are cast to its dtype). H is a multiple of G:
            H / G consecutive query heads share a key/value head. q, k and v may also be DTensors of one placement,
            which shard the heads (tensor parallelism) or the batch.
        pattern: the branches; with a mesh, the pattern that the mesh was made for.
        causal: whether a query sees only keys at or before it.
        mesh: the ranks that hold the sequence; the call is then collective over the mesh's group.
        scale: the factor of the scores; 1 / sqrt(D) by default.
        kernel: "auto", or a name in `longnet_dist.attention.kernels.KERNELS`. A named kernel is never replaced.
        bias: a term added to the scores, such as `T5Bias`. Over a mesh, each rank computes the gradient of
            its parameters from its own queries: sum it over ranks, as for any parameter.
        return_lse: whether to return log(sum(exp(scores))) over all branches, too; natural log, differentiable.
        cu_seqlens: (documents + 1,), int32 or int64, the offsets of documents that each sequence of the batch holds one
            after the other: the first is 0, the last N. Or (B, documents + 1), for other documents in each
            sequence, which is then a call of its own; the last offset may be repeated. Each document is computed as if
            it were alone: segments and phases begin anew, and nothing is seen across. It may be empty, and with a mesh
            cross ranks. Best on the CPU: from a GPU the host waits for it.
        lengths: (B,), int32 or int64, the number of tokens of each sequence: rows after them are padding, which neither
            sees nor is seen. Each sequence is then a call of its own. Not together with `cu_seqlens`.
        cache: the past of the sequence, for inference: q, k and v hold the rows after `cache.length`, one or many, and
            are appended. With a mesh, they are this rank's rows of the new ones, `mesh.seq_len` in all, and every rank
            has the whole cache.

    Returns:
        out, with q's shape, dtype and placement; 0 for padding and for rows that no branch covers. With `return_lse`
        (out, lse): lse is (B, N or L, H) in float32 (float64 for float64), -inf for such rows.

    Raises:
        ValueError: for shapes, dtypes or a kernel that cannot work, and for forward-mode and second
            derivatives. Over a mesh, wrong or different arguments raise it on every rank.
        RuntimeError: if a rank of the mesh is gone, or does not come within the mesh's timeout.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 4, 8).unbind()
        >>> dilated_attention(q, k, v, Pattern((16, 64), (1, 4)), causal=True).shape
        torch.Size([1, 100, 4, 8])
    """
    if mesh is not None and not isinstance(mesh, SequenceMesh):
        raise ValueError(f"mesh is {mesh!r}; it must be a longnet_dist.SequenceMesh, or None")
    sharded = head_shard(q, k, v)
    if isinstance(sharded, str):
        refuse(sharded, mesh)
    if sharded is not None:
        q, k, v = (x.to_local() for x in (q, k, v))  # type: ignore[attr-defined]
    q, k, v = as_autocast((q, k, v))
    if not isinstance(pattern, Pattern):
        refuse(f"pattern is {pattern!r}; it must be a longnet_dist.Pattern", mesh)
    if bias is not None and not isinstance(bias, PositionBias):
        refuse(f"bias is a {type(bias).__name__}; it must be a PositionBias, for example T5Bias(table)", mesh)
    if q.dim() != 4:
        refuse(f"q is {tuple(q.shape)}; it must be (B, N, H, D)", mesh)
    options = Options(
        list(pattern.segment_lengths),
        list(pattern.dilation_rates),
        pattern.head_phases,
        causal,
        1 / math.sqrt(max(1, q.shape[-1])) if scale is None else float(scale),
        kernel,
        "" if bias is None else bias.spec,
        0 if sharded is None else sharded.first,
        0 if sharded is None else sharded.total,
        0 if mesh is None else mesh.handle,
    )
    num_tokens = q.shape[1] if mesh is None else mesh.seq_len
    offsets = to_offsets(cu_seqlens, lengths, len(q), num_tokens, mesh)
    # Over a mesh the operator checks, because there the ranks compare their arguments; with a cache, work precedes it.
    if (mesh is None or cache is not None) and (message := problem(q, k, v, bias, options)):
        refuse(message, mesh)
    parameters = None if bias is None else bias.parameters
    if cache is not None:
        if message := problem_of_cache(cache, q, k, v, bias, options, offsets is not None):
            refuse(message, mesh)
        out, lse = attend_after(q, k, v, bias, options, cache)
        return (out, lse) if return_lse else out
    if offsets is None or offsets.dim() == 1 or not len(q):
        out, lse = attend(q, k, v, parameters, None if len(q) == 0 else offsets, options)
    else:
        calls = zip(q.split(1), k.split(1), v.split(1), offsets.unbind(), strict=True)
        parts = [attend(q_1, k_1, v_1, parameters, of_sequence, options) for q_1, k_1, v_1, of_sequence in calls]
        out, lse = (torch.cat(results) for results in zip(*parts, strict=True))
    if sharded is not None:
        out, lse = sharded.whole(out), sharded.whole(lse)
    return (out, lse) if return_lse else out
