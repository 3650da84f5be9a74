"""Batches of transformers: this rank's part of them, their documents, and why a batch is refused."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from longnet_dist.attention.documents import offsets_of_begins, problem_of_offsets
from longnet_dist.distributed.digest import digest
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.models.loss import IGNORED, next_token_labels
from longnet_dist.nn.rotary import positions_in_documents
from longnet_dist.plan.pattern import Pattern

OFFSETS = "cu_seq_lens_q"
"""transformers' name for the offsets of packed documents."""
PACKING = {OFFSETS, "cu_seq_lens_k", "max_length_q", "max_length_k"}
"""What transformers' collators add to a batch of packed documents."""


def split_batch(batch: dict[str, Any], mesh: SequenceMesh | None) -> dict[str, Any]:
    """Return this rank's part of a batch that every rank holds whole. Collective.

    Args:
        batch: `input_ids` (B, N), and optionally `labels` and `attention_mask` (B, N), as transformers' data
            collators make them. The labels are *not* shifted. Documents that are packed into sequences are described
            by `position_ids` that begin anew, or by `cu_seq_lens_q`: (documents + 1,), or (B, documents + 1) if
            sequences hold other documents, where the last offset may be repeated.
        mesh: The ranks that hold each sequence; None for one process.

    Returns:
        `input_ids`, `position_ids`, shifted `labels` and `shift_labels`, and `attention_mask`: (B, L) each. Positions
        are global, and begin anew with each document and after padding. Labels neither cross documents nor are of
        padding. With documents or padding before tokens, `cu_seq_lens_q` has the global offsets, on the CPU.

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
    offsets = offsets_of(batch, tokens)
    positions = positions_of(torch.arange(tokens.shape[1], device=tokens.device), offsets)
    if "labels" in whole:
        labels = next_token_labels(whole["labels"])
        labels = labels.masked_fill(~has_target(positions, whole.get("attention_mask")), IGNORED)
        whole["labels"] = whole["shift_labels"] = labels
    whole["position_ids"] = positions.expand_as(tokens)
    part = whole if mesh is None else {name: mesh.split(x) for name, x in whole.items()}
    return part if offsets is None else part | {OFFSETS: offsets}


def offsets_of(batch: dict[str, Any], tokens: Tensor) -> Tensor | None:
    """Return the offsets of the documents of whole sequences.

    A document begins where `cu_seq_lens_q` says so, or else where position_ids are 0, and behind padding. Padding
    before tokens is thus a document of its own. Padding after them ends their document, as causal models do not see it.

    Args:
        batch: A batch without `problem_of_documents`.
        tokens: (B, N, ...), of the batch.

    Returns:
        (documents + 1,) if all sequences have the same; else (B, documents + 1), which end with empty documents. On the
        CPU. None if each sequence is one document.
    """
    undescribed = all(batch.get(name) is None for name in (OFFSETS, "position_ids", "attention_mask"))
    if undescribed or not tokens.shape[1] or not len(tokens):
        return None  # Without a copy to the CPU, for which the host would wait.
    return offsets_of_begins(_begins(batch, tokens))


def _begins(batch: dict[str, Any], tokens: Tensor) -> Tensor:
    """Return which rows begin a document: (B, N), bool."""
    begins = _begins_by_description(batch, tokens)
    if (mask := batch.get("attention_mask")) is not None:
        begins[:, 1:] |= _ends_padding(mask)
    return begins


def _begins_by_description(batch: dict[str, Any], tokens: Tensor) -> Tensor:
    begins = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    offsets, positions, mask = (batch.get(name) for name in (OFFSETS, "position_ids", "attention_mask"))
    if offsets is not None:
        for row, offsets_of_row in zip(begins, _for_each(offsets, len(begins)), strict=True):
            row[offsets_of_row[offsets_of_row < len(row)].to(row.device, torch.int64)] = True
    elif positions is not None:
        begins |= positions == 0
        if mask is not None:
            begins &= mask != 0  # Collators give any positions to padding.
    begins[:, 0] = True
    return begins


def _for_each(offsets: Tensor, batch: int) -> Tensor:
    return offsets.expand(batch, -1) if offsets.dim() == 1 else offsets


def _ends_padding(attention_mask: Tensor) -> Tensor:
    """Return which rows but the first are tokens behind padding: (B, N - 1), bool."""
    return (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] == 0)


def positions_of(rows: Tensor, offsets: Tensor | None) -> Tensor:
    """Return the positions of global rows, (L,), in their documents: (1 or B, L)."""
    return rows[None] if offsets is None else positions_in_documents(rows, _for_each(offsets, 1))


def has_target(positions: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return which tokens of whole sequences are followed by one of the same document: (1 or B, N), bool."""
    follows = positions[:, 1:] != 0
    if attention_mask is not None:
        follows = follows & (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
    return nn.functional.pad(follows, (0, 1))


def problem_of_positions(positions: Tensor, expected: Tensor, attention_mask: Tensor | None) -> str | None:
    """Return why position_ids are not those of the documents; None if they are. Those of padding may be any.

    Args:
        positions: (1 or B, L).
        expected: (1 or B, L), as `positions_of` returns.
        attention_mask: (B, L), or None.
    """
    wrong = positions != expected.to(positions)
    if attention_mask is not None:
        wrong = wrong & (attention_mask != 0)
    if not wrong.any():
        return None
    return (
        "position_ids must count from 0, and begin anew with each packed document and behind padding: leave them out, "
        "and they do. Across ranks they are those of split_batch, which are global"
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
            f"(padding='max_length', max_length={mesh.seq_len}) or pack to it, and pass it whole"
        )
    if problem := problem_of_documents(batch, tokens):
        return problem
    if (positions := batch.get("position_ids")) is None:
        return None
    expected = positions_of(torch.arange(tokens.shape[1], device=tokens.device), offsets_of(batch, tokens))
    return problem_of_positions(positions, expected, batch.get("attention_mask"))


def problem_of_documents(batch: dict[str, Any], tokens: Tensor) -> str | None:
    """Return why documents or padding cannot be those of whole sequences, (B, N, ...); None if they can."""
    offsets, mask = batch.get(OFFSETS), batch.get("attention_mask")
    if offsets is not None:
        if not isinstance(offsets, Tensor) or offsets.dim() not in (1, 2) or offsets.is_floating_point():
            return (
                f"{OFFSETS} must be the offsets of packed documents, a tensor of integers, (documents + 1,) or "
                "(B, documents + 1)"
            )
        if offsets.dim() == 2 and len(offsets) != len(tokens):
            return f"{OFFSETS} is {tuple(offsets.shape)}, and the batch has {len(tokens)} sequences: each needs a row"
        other = batch.get("cu_seq_lens_k")
        if other is not None and not torch.equal(other, offsets):
            return f"cu_seq_lens_k and {OFFSETS} differ; queries and keys must be of the same documents"
        for of_sequence in _for_each(offsets, 1).tolist():
            if problem := problem_of_offsets(OFFSETS, of_sequence, tokens.shape[1]):
                return problem
    if mask is None or not mask.numel():
        return None
    if ((mask != 0) & (mask != 1)).any():
        return "attention_mask must hold 1 for tokens and 0 for padding; describe packed documents by position_ids"
    after_a_token = (mask != 0).cumsum(1)[:, :-1] > 0
    if (_ends_padding(mask) & after_a_token & ~_begins_by_description(batch, tokens)[:, 1:]).any():
        return "attention_mask has padding between the tokens of a document: it must be before or after all of them"
    return None


class CheckInputs:
    """A hook before the model's forward, which adds positions and documents, and raises for silently wrong inputs."""

    def __init__(self, pattern: Pattern, mesh: SequenceMesh | None) -> None:
        self.pattern, self.mesh = pattern, mesh
        self.warned = False
        self.has_documents: bool | None = None
        """Whether the forward that runs has documents; None outside one, as when a layer is computed again."""
        self.past: Any = None
        """The cache of the forward that runs, a `DilatedPast`; None without one."""
        self.has_target: Tensor | None = None
        """`has_target` of the last batch, if it had documents or padding, and the model has no mesh."""

    def __call__(
        self, module: nn.Module, arguments: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.has_target = None
        tokens = inputs.get("input_ids", arguments[0] if arguments else None)
        rows = tokens if tokens is not None else inputs.get("inputs_embeds")
        if rows is None:
            return arguments, inputs
        past = inputs.get("cache", inputs.get("past_key_values"))
        self.past = past if hasattr(past, "of_layer") else None
        if self.past is not None:
            return arguments, self._continued(inputs, rows)
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
        mask = self._mask(inputs, rows)
        positions = inputs.get("position_ids")
        if rows.shape[1] == 1 and inputs.get(OFFSETS) is None:  # generate's position_ids count on.
            positions = None
        whole: dict[str, Any] = {name: inputs.get(name) for name in PACKING} | {"attention_mask": mask}
        whole_rows = rows
        if mesh is None:
            whole["position_ids"] = positions
        else:
            whole["attention_mask"] = None if mask is None else mesh.join(mask)
            whole_rows = rows[:, :1].expand(-1, mesh.seq_len, *rows.shape[2:])  # Only its shape is looked at.
        if problem := problem_of_documents(whole, whole_rows):
            refuse(problem, mesh)
        offsets = offsets_of(whole, whole_rows)
        self.has_documents = offsets is not None
        expected = torch.arange(rows.shape[1], device=rows.device) if mesh is None else mesh.positions(rows.device)
        expected = positions_of(expected, offsets)
        if mesh is None and (mask is not None or offsets is not None):
            self.has_target = has_target(expected, mask)
        if positions is not None and (problem := problem_of_positions(positions, expected, mask)):
            refuse(problem, mesh)
        if mesh is None and positions is None and offsets is None:
            return arguments, inputs
        inputs = inputs | {"position_ids": expected if positions is None else positions}
        if offsets is not None:
            # With a mask of padding, transformers does not look for documents itself, and make masks for them.
            inputs |= {OFFSETS: offsets, "attention_mask": torch.ones_like(rows[:, :, 0] if rows.dim() > 2 else rows)}
        return arguments, inputs

    def leave(self, *_: Any) -> None:
        """End the forward: a hook after it, which also runs if it raises."""
        self.has_documents = self.past = None

    def _continued(self, inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        """Return the inputs of rows that continue a past, with their positions."""
        mask = inputs.pop("attention_mask", None)
        seen = self.past.get_seq_length()
        positions = torch.arange(seen, seen + rows.shape[1], device=rows.device).expand(rows.shape[:2])
        given = inputs.get("position_ids")
        problem = None
        if self.mesh is not None:
            problem = "a model with a mesh cannot continue from a cache: call apply(model) without one first"
        elif inputs.get(OFFSETS) is not None or (mask is not None and (mask.dim() != 2 or not bool((mask == 1).all()))):
            problem = "a cache is for whole sequences without padding: call generate(..., use_cache=False)"
        elif given is not None and not bool((given == positions).all()):
            problem = f"position_ids must go on from the {seen} tokens of the cache: leave them out, and they do"
        if problem:
            refuse(problem, self.mesh)
        return inputs | {"position_ids": positions}

    def _mask(self, inputs: dict[str, Any], rows: Tensor) -> Tensor | None:
        """Take the mask of padding out of a forward's inputs: (B, L), uint8, 2 for what is neither 0 nor 1."""
        mask = inputs.pop("attention_mask", None)
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            refuse(
                "attention_mask must be (B, N), 1 for tokens and 0 for padding: the pattern says which keys a query "
                "sees",
                self.mesh,
            )
        if mask.shape[1] != rows.shape[1] or len(mask) not in (1, len(rows)):
            refuse(
                f"attention_mask is {tuple(mask.shape)}, and the new tokens {tuple(rows.shape[:2])}: decoding with a "
                "cache of past keys is not supported yet; call generate(..., use_cache=False), which is exact",
                self.mesh,
            )
        mask = mask.to(rows.device).expand(len(rows), -1)
        return torch.where((mask == 0) | (mask == 1), mask, 2).to(torch.uint8).contiguous()
