"""Batches of transformers: this rank's part of them, and why a batch cannot be split."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longnet_dist.distributed.digest import digest
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.models.loss import next_token_labels

PADDED_BEFORE = "attention_mask has padding before tokens, which would be attended: use padding_side='right'"


def split_batch(batch: dict[str, Tensor], mesh: SequenceMesh | None) -> dict[str, Tensor]:
    """Return this rank's part of a batch that every rank holds whole. Collective.

    Args:
        batch: `input_ids` (B, N), and optionally `labels` and `attention_mask` (B, N), as transformers' data
            collators make them. The labels are *not* shifted.
        mesh: The ranks that hold each sequence; None for one process.

    Returns:
        `input_ids`, global `position_ids`, shifted `labels` and `shift_labels`, and `attention_mask`: (B, L) each.

    Raises:
        ValueError: If the batch does not have the mesh's length, or holds packed documents. Also if it differs between
            ranks, which a data loader for data parallelism would cause. Every rank raises.
    """
    problem = problem_of_batch(batch, mesh)
    if mesh is not None:
        mesh.agree({"the batch (by a digest)": digest(batch)}, problem, always=True)
    elif problem:
        raise ValueError(problem)
    return split_checked_batch(batch, mesh)


def split_checked_batch(batch: dict[str, Tensor], mesh: SequenceMesh | None) -> dict[str, Tensor]:
    """Split a batch as `split_batch` does, without checking and comparing it again."""
    whole = dict(batch)
    if "labels" in whole:
        whole["labels"] = whole["shift_labels"] = next_token_labels(whole["labels"])
    tokens = whole["input_ids"]
    whole["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device)[None].expand_as(tokens)
    return whole if mesh is None else {name: mesh.split(x) for name, x in whole.items()}


def problem_of_batch(batch: dict[str, Any], mesh: SequenceMesh | None) -> str | None:
    """Return why a whole batch cannot be split, or asks for attention that is not supported; None if neither."""
    if "input_ids" not in batch:
        return f"the batch has {', '.join(batch)}; it must have input_ids"
    packed = [name for name in batch if name == "seq_idx" or name.startswith(("cu_seq_lens", "max_length"))]
    if packed:
        return f"the batch has {', '.join(packed)}: packed documents are not supported"
    tokens = batch["input_ids"]
    for name, x in batch.items():
        if not isinstance(x, Tensor) or tuple(x.shape[:2]) != tuple(tokens.shape[:2]) or x.dim() < 2:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            return f"{name} is {shape}, and input_ids {tuple(tokens.shape)}; each must be a tensor, (B, N)"
    if mesh is not None and tokens.shape[1] != mesh.seq_len:
        return (
            f"the batch is of {tokens.shape[1]} tokens, and the mesh of seq_len = {mesh.seq_len}: pad "
            f"(padding='max_length', max_length={mesh.seq_len}, padding_side='right') or pack to it, and pass it whole"
        )
    if "attention_mask" in batch and pads_before_tokens(batch["attention_mask"]):
        return PADDED_BEFORE
    positions = batch.get("position_ids", torch.arange(tokens.shape[1]))
    if not torch.equal(positions, torch.arange(tokens.shape[1]).to(positions).expand_as(positions)):
        return "position_ids restart, or are not 0 to N - 1: packed documents are not supported; leave them out"
    return None


def pads_before_tokens(attention_mask: Tensor) -> bool:
    """Return whether any row has padding before a token."""
    return bool((attention_mask.to(torch.uint8).diff(dim=1) == 1).any())
