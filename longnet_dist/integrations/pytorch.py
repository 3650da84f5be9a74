"""Plain PyTorch: a `ParallelStyle` for `torch.distributed.tensor.parallel.parallelize_module`.

    mesh = SequenceMesh(device_mesh["sp"], pattern, seq_len=N)
    plan = {"layers.*.inner_attention": SequenceParallelAttention(mesh, causal=True)}
    parallelize_module(model, device_mesh["sp"], plan)
    logits = model(mesh.split(tokens), mesh.positions())

The rest of the model works on its rows alone, so it needs no style; what it knows of positions must be global. It goes
with FSDP2, torch.compile, and tensor parallelism, which spreads heads over other ranks.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle

from longnet_dist.attention.sdpa import scaled_dot_product_dilated_attention
from longnet_dist.distributed.heads import heads_of
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.nn.attention import DilatedAttention


class SequenceParallelAttention(ParallelStyle):
    """Dilated attention over the ranks that hold a sequence.

    The module that it is given to is a `longnet_dist.DilatedAttention`, or one without parameters that is called as
    `scaled_dot_product_attention` is, with (B, heads, L, D): from then on it attends by the mesh's pattern.

    Args:
        mesh: of the ranks of the DeviceMesh that `parallelize_module` is given.
        causal: whether a query sees only keys at or before it; a `DilatedAttention` has its own.
        head_mesh: one axis, over whose ranks heads are spread in order, where the projections are parallel
            (`ColwiseParallel` with its plain output). DTensors that are sharded by head need none.

    Raises:
        ValueError: for a module or a mesh that does not fit; in its calls, for masks, dropout, or rows of other ranks.
    """

    def __init__(self, mesh: SequenceMesh, *, causal: bool = False, head_mesh: DeviceMesh | None = None) -> None:
        if not isinstance(mesh, SequenceMesh):
            raise ValueError(f"mesh is {mesh!r}; it must be a longnet_dist.SequenceMesh")
        if head_mesh is not None and head_mesh.ndim != 1:
            raise ValueError(f"head_mesh has {head_mesh.ndim} axes; give that of the heads, device_mesh['tp']")
        self.mesh, self.causal, self.head_mesh = mesh, causal, head_mesh

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Called by `parallelize_module`."""
        ours = [0] if self.mesh.group is None else dist.get_process_group_ranks(self.mesh.group)
        given = device_mesh.mesh.flatten().tolist()
        if self.mesh.group is not None and ours != given:
            raise ValueError(
                f"the sequence is held by ranks {ours}, and parallelize_module is given ranks {given}: give it "
                "the DeviceMesh of which the SequenceMesh was made"
            )
        if isinstance(module, DilatedAttention):
            self._give_mesh(module)
        elif any(True for _ in module.parameters()):
            raise ValueError(
                f"{type(module).__name__} has parameters, so it does more than attend: name the module in it that is "
                "called with queries, keys and values"
            )
        else:
            module.forward = _Attention(self)
        return module

    def _give_mesh(self, module: DilatedAttention) -> None:
        if module.pattern != self.mesh.pattern:
            raise ValueError(f"the layer's pattern is {module.pattern}, and the mesh's {self.mesh.pattern}")
        # Their statistics, or gradients, would be of a part of the heads.
        over_heads = {"inner_norm": module.inner_norm, "qk_norm": module.q_norm}
        kept = [name for name, norm in over_heads.items() if not isinstance(norm, nn.Identity)]
        kept += [] if module.rel_pos_bias is None else ["use_rel_pos_bias"]
        if self.head_mesh is not None and kept:
            raise ValueError(f"heads cannot be spread over ranks in a layer with {' and '.join(kept)}: leave it out")
        module.head_mesh = self.head_mesh
        module.register_forward_pre_hook(_with_mesh(self.mesh), with_kwargs=True)


def _with_mesh(mesh: SequenceMesh) -> Any:
    def hook(_: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return arguments, given | ({} if len(arguments) > 1 else {"mesh": mesh})

    return hook


class _Attention:
    """The forward of a module that is called as `scaled_dot_product_attention` is."""

    def __init__(self, style: SequenceParallelAttention) -> None:
        self.style = style

    def __call__(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool | None = None,
        scale: float | None = None,
        enable_gqa: bool = True,
    ) -> Tensor:
        """(B, H, L, D), (B, G, L, D) -> (B, H, L, D)."""
        style = self.style
        if key is None or value is None:
            refuse(
                "the module is called without keys or values; the style is for one called with all three", style.mesh
            )
        if is_causal is not None and is_causal != style.causal:
            refuse(f"the module is called with is_causal={is_causal}, and the style says {style.causal}", style.mesh)
        q, k, v = query, key, value
        if style.head_mesh is not None and not isinstance(q, DTensor):
            q, k, v = (heads_of(x, style.head_mesh, 1) for x in (q, k, v))
        out = scaled_dot_product_dilated_attention(
            q, k, v, style.mesh.pattern, attn_mask, dropout_p, style.causal, scale, enable_gqa, mesh=style.mesh
        )
        return out.to_local() if isinstance(out, DTensor) and not isinstance(query, DTensor) else out
