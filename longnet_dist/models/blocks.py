"""The stack of transformer blocks of a model: how a configuration builds and runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from longnet_dist.attention.cache import DilatedCache
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.models.config import LongNetConfig
from longnet_dist.nn.attention import DilatedAttention
from longnet_dist.nn.block import Block
from longnet_dist.nn.rotary import Rotation, Yarn


def build_blocks(
    config: LongNetConfig,
    *,
    causal: bool,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.ModuleList:
    """Build the blocks of a model.

    Args:
        config: the architecture.
        causal: whether a token sees only itself and earlier tokens.
        device, dtype: device and dtype of the parameters.

    Raises:
        ValueError: if the sizes do not fit each other.
    """
    return nn.ModuleList(_block(config, causal, device, dtype) for _ in range(config.num_layers))


def _block(config: LongNetConfig, causal: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> Block:
    stretched = config.yarn_factor > 1
    attention = DilatedAttention.from_pattern(
        config.d_model,
        config.num_heads,
        config.pattern,
        dropout=config.dropout,
        causal=causal,
        use_xpos=config.position == "xpos",
        use_rotary=config.position == "rotary",
        use_rel_pos_bias=config.position == "t5",
        use_alibi=config.position == "alibi",
        rope_theta=config.rope_theta,
        yarn=Yarn(config.yarn_factor, config.original_max_position_embeddings) if stretched else None,
        num_kv_heads=config.num_kv_heads,
        qk_norm=config.qk_norm,
        inner_norm=config.sub_layernorm,
        multiway=config.multiway,
        kernel=config.kernel,
        padding=config.padding,
        device=device,
        dtype=dtype,
    )
    ffn_dim = config.ffn_dim or 4 * config.d_model
    return Block(attention, ffn_dim, config.dropout, device=device, dtype=dtype)


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    config: LongNetConfig,
    mesh: SequenceMesh | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    token_types: Tensor | None = None,
    cache: Sequence[DilatedCache] | None = None,
    observe: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Run the blocks in order, with the configured activation checkpointing and offloading.

    Args:
        blocks: the result of `build_blocks`.
        x: (B, N, d_model); with a mesh (B, L, d_model), this rank's rows.
        config: the architecture.
        mesh: the ranks that hold the sequence; the call is then collective over the mesh's group.
        cu_seqlens, lengths: see `dilated_attention`.
        token_types: the kind of each token; see `DilatedAttention.forward`.
        cache: the past of the sequence, for each block; see `dilated_attention`.
        observe: a function that is called with the output of each block, or None.

    Returns:
        The output of the last block, of x's shape.

    Raises:
        ValueError: if a shape is wrong, or the mesh has another pattern or length.
    """
    if cache is not None and (problem := _problem_of_caches(cache, len(blocks))):
        refuse(problem, mesh)
    rotation: Rotation | None = None
    with saved_tensors_hooks(_to_cpu, _from_cpu) if config.offload_activations else nullcontext():
        for block, past in zip(blocks, cache or repeat(None, len(blocks)), strict=True):
            assert isinstance(block, Block)
            where = x.shape[1], mesh, x.device, compute_dtype(x), cu_seqlens, past
            rotation = rotation or block.attention.rotation(*where)
            x = _with_checkpointing(block, config)(x, mesh, rotation, cu_seqlens, lengths, token_types, past)
            if observe is not None:
                observe(x)
    return x


def _problem_of_caches(cache: Sequence[DilatedCache], num_blocks: int) -> str | None:
    """Describe why caches are not those of the blocks after one sequence; None if they are."""
    if len(cache) != num_blocks:
        return f"there are {len(cache)} caches for {num_blocks} layers: model.new_cache() makes one for each"
    lengths = [past.length for past in cache]
    if len(set(lengths)) > 1:
        return (
            f"the layers' caches have seen {lengths} tokens: a call ended in between. Make new ones, or reset() each, "
            "and read the sequence again"
        )
    return None


def _with_checkpointing(block: Block, config: LongNetConfig) -> Callable[..., Tensor]:
    """Wrap a block in the configured activation checkpointing."""
    mode = config.activation_checkpointing
    if mode == "none" or not torch.is_grad_enabled():
        return block
    if mode == "full":
        return partial(checkpoint, block, use_reentrant=False)
    retained_ops = [torch.ops.longnet_dist.dilated_attention.default]
    contexts = partial(create_selective_checkpoint_contexts, retained_ops)
    return partial(checkpoint, block, use_reentrant=False, context_fn=contexts)


def _to_cpu(x: Tensor) -> Tensor | tuple[Tensor, torch.device]:
    """Copy a saved CUDA tensor to the CPU, but no parameter: it stays in the GPU's memory in any case."""
    if isinstance(x, nn.Parameter) or not x.is_cuda:
        return x
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return copy.copy_(x, non_blocking=True), x.device


def _from_cpu(saved: Tensor | tuple[Tensor, torch.device]) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved[0].to(saved[1], non_blocking=True)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the attention, whose range limits xPos: autocast's, or that of x."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
