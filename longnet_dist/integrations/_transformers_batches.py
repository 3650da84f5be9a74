"""Batches of transformers: this rank's part of them, their documents, and why a batch is refused."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from longnet_dist.distributed.digest import digest
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.models.loss import next_token_labels, within_documents
from longnet_dist.nn.rotary import positions_in_documents
from longnet_dist.plan.pattern import Pattern

PADDED_BEFORE = "attention_mask has padding before tokens, which would be attended: use padding_side='right'"
OFFSETS = "cu_seq_lens_q"
"""transformers' name for the offsets of packed documents."""
PACKING = {OFFSETS, "cu_seq_lens_k", "max_length_q", "max_length_k"}
"""What transformers' collators add to a batch of packed documents."""


def split_batch(batch: dict[str, Any], mesh: SequenceMesh | None) -> dict[str, Any]:
    """Return this rank's part of a batch that every rank holds whole. Collective.

    Args:
        batch: `input_ids` (B, N), and optionally `labels` and `attention_mask` (B, N), as transformers' data
            collators make them. The labels are *not* shifted. Documents that are packed into sequences are described
            by `position_ids` that begin anew, or by `cu_seq_lens_q`.
        mesh: The ranks that hold each sequence; None for one process.

    Returns:
        `input_ids`, global `position_ids`, shifted `labels` and `shift_labels`, and `attention_mask`: (B, L) each.
        With packed documents, `position_ids` begin anew, labels do not cross documents, and `cu_seq_lens_q` has the
        global offsets.

    Raises:
        ValueError: If the batch does not have the mesh's length, or its documents or padding cannot be attended. Also
            if it differs between ranks, which a data loader for data parallelism would cause. Every rank raises.
    """
    problem = problem_of_batch(batch, mesh)
    if mesh is not None:
        mesh.agree({"the batch (by a digest)": digest(batch)}, problem, always=True)
    elif problem:
        raise ValueError(problem)
    return split_checked_batch(batch, mesh)


def split_checked_batch(batch: dict[str, Any], mesh: SequenceMesh | None) -> dict[str, Any]:
    """Split a batch as `split_batch` does, without checking and comparing it again."""
    whole = {name: x for name, x in batch.items() if name not in PACKING}
    tokens = whole["input_ids"]
    offsets = offsets_of(batch)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    if "labels" in whole:
        labels = next_token_labels(whole["labels"])
        whole["labels"] = whole["shift_labels"] = within_documents(labels, cu_seqlens=offsets)
    if offsets is not None:
        positions = positions_in_documents(positions, offsets)
    whole["position_ids"] = positions[None].expand_as(tokens)
    part = whole if mesh is None else {name: mesh.split(x) for name, x in whole.items()}
    return part if offsets is None else part | {OFFSETS: offsets}


def offsets_of(batch: dict[str, Any]) -> Tensor | None:
    """Return the offsets of the documents that are packed into the sequences of a whole batch; None if none are.

    They are given, or derived from position_ids, which begin anew with each document.
    """
    if batch.get(OFFSETS) is not None:
        return batch[OFFSETS]
    positions = batch.get("position_ids")
    if positions is None or not positions.shape[1]:
        return None
    starts = (positions[0] == 0).nonzero()[:, 0]
    if starts.tolist() in ([0], []):
        return None
    end = torch.tensor([positions.shape[1]], device=starts.device)
    return torch.cat([starts, end]).to(torch.int32)


def problem_of_positions(positions: Tensor, offsets: Tensor | None) -> str | None:
    """Return why position_ids (B, N) are not those of the documents; None if they are."""
    expected = torch.arange(positions.shape[1], device=positions.device)
    if offsets is not None:
        expected = positions_in_documents(expected, offsets)
    if torch.equal(positions, expected.to(positions).expand_as(positions)):
        return None
    return (
        "position_ids must count from 0, and begin anew with each packed document, in all sequences of a batch at the "
        "same places: leave them out, or pack into one sequence (B = 1)"
    )


def problem_of_batch(batch: dict[str, Any], mesh: SequenceMesh | None) -> str | None:
    """Return why a whole batch cannot be split, or asks for attention that is not supported; None if neither."""
    if "input_ids" not in batch:
        return f"the batch has {', '.join(batch)}; it must have input_ids"
    if "seq_idx" in batch:
        return "the batch has seq_idx, which is not supported: describe packed documents by cu_seq_lens_q"
    tokens = batch["input_ids"]
    for name, x in batch.items():
        if name in PACKING:
            continue
        if not isinstance(x, Tensor) or tuple(x.shape[:2]) != tuple(tokens.shape[:2]) or x.dim() < 2:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            return f"{name} is {shape}, and input_ids {tuple(tokens.shape)}; each must be a tensor, (B, N)"
    if mesh is not None and tokens.shape[1] != mesh.seq_len:
        return (
            f"the batch is of {tokens.shape[1]} tokens, and the mesh of seq_len = {mesh.seq_len}: pad "
            f"(padding='max_length', max_length={mesh.seq_len}, padding_side='right') or pack to it, and pass it whole"
        )
    offsets = offsets_of(batch)
    if problem := problem_of_offsets(batch, offsets, tokens.shape[1]):
        return problem
    if "attention_mask" in batch and pads_before_tokens(batch["attention_mask"]):
        return PADDED_BEFORE
    positions = batch.get("position_ids")
    return None if positions is None else problem_of_positions(positions, offsets)


def problem_of_offsets(batch: dict[str, Any], offsets: Any, num_tokens: int) -> str | None:
    """Return why the offsets of packed documents cannot be those of sequences of this length; None if they can."""
    if offsets is None:
        return None
    if not isinstance(offsets, Tensor) or offsets.dim() != 1 or offsets.is_floating_point() or not len(offsets):
        return f"{OFFSETS} must be the offsets of packed documents, a tensor of integers, (documents + 1,)"
    other = batch.get("cu_seq_lens_k")
    if other is not None and not torch.equal(other, offsets):
        return f"cu_seq_lens_k and {OFFSETS} differ; queries and keys must be of the same documents"
    found = offsets.tolist()
    if found[0] != 0 or found[-1] != num_tokens or found != sorted(found):
        return f"{OFFSETS} must rise from 0 to the {num_tokens} tokens of a sequence, and is {found[:8]}"
    return None


def pads_before_tokens(attention_mask: Tensor) -> bool:
    """Return whether any row has padding before a token."""
    return bool((attention_mask.to(torch.uint8).diff(dim=1) == 1).any())


class CheckInputs:
    """A hook before the model's forward, which adds global positions and raises for silently wrong inputs."""

    def __init__(self, pattern: Pattern, mesh: SequenceMesh | None) -> None:
        self.pattern, self.mesh = pattern, mesh
        self.warned = False
        self.packed = False
        """Whether the last batch had packed documents."""

    def __call__(
        self, module: nn.Module, arguments: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = inputs.get("input_ids", arguments[0] if arguments else None)
        rows = tokens if tokens is not None else inputs.get("inputs_embeds")
        if rows is None:
            return arguments, inputs
        mesh, reach = self.mesh, self.pattern.reach(rows.shape[1])
        if mesh is None and reach < rows.shape[1] and not self.warned:  # A mesh has warned when it was made.
            self.warned = True
            warnings.warn(
                f"no token sees further than {reach:,} tokens, and sequences have {rows.shape[1]:,}: give apply a "
                "pattern with a longer segment",
                stacklevel=2,
            )
        if mesh is not None and rows.shape[1] != mesh.shard.num_rows:
            refuse(mesh.wrong_rows("the batch", rows.shape[1]) + " (split_batch does)", mesh)
        self._check_padding(inputs)
        one_row = rows.shape[1] == 1 and inputs.get(OFFSETS) is None  # generate's position_ids count on.
        offsets = inputs.get(OFFSETS) if mesh is not None or one_row else offsets_of(inputs)
        num_tokens = rows.shape[1] if mesh is None else mesh.seq_len
        if problem := problem_of_offsets(inputs, offsets, num_tokens):
            refuse(problem, mesh)
        self.packed = offsets is not None
        positions = inputs.get("position_ids")
        if mesh is None and (positions is None or one_row) and offsets is None:
            return arguments, inputs
        expected = torch.arange(num_tokens, device=rows.device) if mesh is None else mesh.positions(rows.device)
        if offsets is not None:
            expected = positions_in_documents(expected, offsets)
        if positions is not None and not torch.equal(positions, expected.to(positions).expand_as(positions)):
            refuse(
                "position_ids must be those of split_batch: global, or if documents are packed (cu_seq_lens_q), anew "
                "in each document and at the same places in all sequences of a batch. Leave them out, and they are",
                mesh,
            )
        inputs = inputs | {"position_ids": expected[None] if positions is None else positions}
        if offsets is not None:
            # With a mask of padding, transformers does not look for documents itself, and make masks for them.
            inputs |= {OFFSETS: offsets, "attention_mask": torch.ones_like(rows[:, :, 0] if rows.dim() > 2 else rows)}
        return arguments, inputs

    def _check_padding(self, inputs: dict[str, Any]) -> None:
        """Remove a mask of padding at the end, which no token sees; raise for padding elsewhere."""
        mask = inputs.get("attention_mask")
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            refuse(
                "attention_mask must be (B, N), 1 for tokens and 0 for padding: the pattern says which keys a query "
                "sees",
                self.mesh,
            )
        whole = mask.to(torch.uint8) if self.mesh is None else self.mesh.join(mask.to(torch.uint8).contiguous())
        if pads_before_tokens(whole):
            raise ValueError(PADDED_BEFORE)
        inputs["attention_mask"] = None
