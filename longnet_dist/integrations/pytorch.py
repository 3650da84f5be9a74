"""Plain PyTorch: a `ParallelStyle` for `torch.distributed.tensor.parallel.parallelize_module`.

    mesh = SequenceMesh(device_mesh["sp"], pattern, seq_len=N)
    plan = {"layers.*.inner_attention": SequenceParallelAttention(mesh, causal=True)}
    parallelize_module(model, device_mesh["sp"], plan)
    logits = model(mesh.split(tokens), mesh.positions())

The rest of the model works on each row alone, so it needs no style. Modules that use positions must receive global
ones, from `mesh.positions()`. The style works with FSDP2, torch.compile, and tensor parallelism, which spreads heads.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle

from longnet_dist.distributed.heads import heads_of
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.functional import scaled_dot_product_dilated_attention
from longnet_dist.nn.attention import DilatedAttention


class SequenceParallelAttention(ParallelStyle):
    """A style under which a module computes dilated attention across the ranks that hold a sequence.

    The module can be:

    - a `longnet_dist.DilatedAttention` of the mesh's pattern;
    - a module without parameters that is called as `scaled_dot_product_attention` is, with (B, heads, L, D). Its
      forward is replaced by dilated attention.

    Args:
        mesh: The ranks that hold each sequence, made from the DeviceMesh that `parallelize_module` gets.
        causal: Whether a query sees only keys at or before it. A `DilatedAttention` keeps its own setting.
        head_mesh: The axis over whose ranks heads are spread, in order, if the projections return plain tensors, as
            `ColwiseParallel` does. None for whole heads, and for DTensors, which know how their heads are sharded.

    Raises:
        ValueError: If the module or a mesh does not fit. A call of the module raises for masks, for dropout, and for
            another number of rows than this rank's.
    """

    def __init__(self, mesh: SequenceMesh, *, causal: bool = False, head_mesh: DeviceMesh | None = None) -> None:
        if not isinstance(mesh, SequenceMesh):
            raise ValueError(f"mesh is {mesh!r}; it must be a longnet_dist.SequenceMesh")
        if head_mesh is not None and head_mesh.ndim != 1:
            raise ValueError(f"head_mesh has {head_mesh.ndim} axes; give that of the heads, device_mesh['tp']")
        self.mesh, self.causal, self.head_mesh = mesh, causal, head_mesh

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Change a module in place; `parallelize_module` calls this."""
        mesh_ranks = [0] if self.mesh.group is None else dist.get_process_group_ranks(self.mesh.group)
        device_ranks = device_mesh.mesh.flatten().tolist()
        if self.mesh.group is not None and mesh_ranks != device_ranks:
            raise ValueError(
                f"the sequence is held by ranks {mesh_ranks}, and parallelize_module is given ranks {device_ranks}: "
                "give it the DeviceMesh of which the SequenceMesh was made"
            )
        if isinstance(module, DilatedAttention):
            self._parallelize_layer(module)
        elif any(True for _ in module.parameters()):
            raise ValueError(
                f"{type(module).__name__} has parameters, so it does more than attend: name the module in it that is "
                "called with queries, keys and values"
            )
        else:
            module.forward = _Attention(self)
        return module

    def _parallelize_layer(self, module: DilatedAttention) -> None:
        if module.pattern != self.mesh.pattern:
            raise ValueError(f"the layer's pattern is {module.pattern}, and the mesh's {self.mesh.pattern}")
        # On a part of the heads, these would compute other statistics or gradients.
        norms = {"inner_norm": module.inner_norm, "qk_norm": module.q_norm}
        across_heads = [name for name, norm in norms.items() if not isinstance(norm, nn.Identity)]
        biases = {"use_rel_pos_bias": module.rel_pos_bias is not None, "use_alibi": module.use_alibi}
        across_heads += [name for name, used in biases.items() if used]
        if self.head_mesh is not None and across_heads:
            raise ValueError(
                f"heads cannot be spread over ranks in a layer with {' and '.join(across_heads)}: leave it out"
            )
        module.head_mesh = self.head_mesh
        module.register_forward_pre_hook(_mesh_hook(self.mesh), with_kwargs=True)


def _mesh_hook(mesh: SequenceMesh) -> Any:
    """Make a hook that passes the mesh to a layer, unless the caller passes one as a positional argument."""

    def hook(
        _: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return arguments, options | ({} if len(arguments) > 1 else {"mesh": mesh})

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
        """Compute dilated attention: (B, H, L, D), (B, G, L, D) -> (B, H, L, D)."""
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
