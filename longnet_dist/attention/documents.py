"""Documents that share a sequence, and padding: the offsets by which callers describe them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from longnet_dist.distributed.digest import digest
from longnet_dist.distributed.mesh import SequenceMesh, refuse

_DTYPES = (torch.int32, torch.int64)


def to_offsets(
    cu_seqlens: Tensor | None, lengths: Tensor | None, batch: int, num_tokens: int, mesh: SequenceMesh | None
) -> Tensor | None:
    """Return the offsets of documents as the operators take them: int64, on the CPU; None without documents.

    Args:
        cu_seqlens, lengths: see `dilated_attention`.
        batch: B.
        num_tokens: N, over all ranks.
        mesh: the ranks that hold the sequence.

    Returns:
        (documents + 1,) or (B, documents + 1), as `cu_seqlens`; (B, 2) for `lengths`, one document for each sequence.

    Raises:
        ValueError: on every rank, if the offsets or lengths cannot be those of such sequences.
    """
    if problem := _problem(cu_seqlens, lengths, batch, num_tokens):
        refuse(problem, mesh)
    if mesh is not None and lengths is not None and not torch.compiler.is_compiling():
        mesh.agree({"call": "lengths", "lengths (a digest)": digest(lengths), "device": lengths.device.type})
    if cu_seqlens is not None:
        return cu_seqlens.to("cpu", torch.int64)
    if lengths is not None:
        return torch.stack([torch.zeros_like(lengths), lengths], dim=1).to("cpu", torch.int64)
    return None


def _problem(cu_seqlens: Tensor | None, lengths: Tensor | None, batch: int, num_tokens: int) -> str | None:
    if cu_seqlens is not None and lengths is not None:
        return "cu_seqlens and lengths do not go together: give each sequence's documents in a call of its own"
    if cu_seqlens is not None:
        return _problem_of_cu_seqlens(cu_seqlens, batch, num_tokens)
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor) or lengths.shape != (batch,) or lengths.dtype not in _DTYPES:
        return f"lengths is {_describe(lengths)}; it must be int32 or int64, of shape (B,) = ({batch},)"
    if torch.compiler.is_compiling() or all(0 <= length <= num_tokens for length in lengths.tolist()):
        return None
    return f"lengths is {lengths.tolist()}; each must be between 0 and N = {num_tokens}"


def _problem_of_cu_seqlens(cu_seqlens: Tensor, batch: int, num_tokens: int) -> str | None:
    described = isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype in _DTYPES
    if not described or not (cu_seqlens.dim() == 1 or (cu_seqlens.dim() == 2 and len(cu_seqlens) == batch)):
        shapes = f"(documents + 1,), or (B, documents + 1) with B = {batch}"
        return f"cu_seqlens is {_describe(cu_seqlens)}; it must be int32 or int64, of shape {shapes}"
    if torch.compiler.is_compiling():
        return None
    sequences = cu_seqlens.tolist() if cu_seqlens.dim() == 2 else [cu_seqlens.tolist()]
    problems = (problem_of_offsets("cu_seqlens", offsets, num_tokens) for offsets in sequences)
    return next(filter(None, problems), None)


def problem_of_offsets(name: str, offsets: list[int], num_tokens: int, *, may_end_before: bool = False) -> str | None:
    """Describe why offsets cannot be those of documents that fill a sequence; None if they can.

    Args:
        name: what the caller calls the offsets, for the error.
        offsets: where each document begins, and the last one ends.
        num_tokens: N.
        may_end_before: whether the last document may end before the sequence does.
    """
    if not offsets or offsets[0] != 0 or offsets[-1] > num_tokens or (offsets[-1] < num_tokens and not may_end_before):
        found = f"begins with {offsets[0]} and ends with {offsets[-1]}" if offsets else "is empty"
        end = "its last one at most" if may_end_before else "its last one"
        return f"{name} {found}; its first offset must be 0, and {end} N = {num_tokens}"
    for a, b in itertools.pairwise(offsets):
        if a > b:
            return f"{name} has {b} after {a}; no document may end before it begins"
    return None


def offsets_of_begins(begins: Tensor) -> Tensor | None:
    """Return the offsets of documents from their first tokens.

    Args:
        begins: (B, N), bool: which tokens begin a document; the first of each sequence does.

    Returns:
        int32, on the CPU: (documents + 1,) if all sequences have the same; else (B, documents + 1), where sequences of
        fewer documents end with empty ones. None if each sequence is one document.
    """
    begins = begins.cpu()
    counts = begins.sum(1)
    if int(counts.max()) == 1:
        return None
    if bool((begins == begins[0]).all()):
        begins, counts = begins[:1], counts[:1]
    offsets = torch.full((len(begins), int(counts.max()) + 1), begins.shape[1], dtype=torch.int32)
    for row, offsets_of_row in zip(begins, offsets, strict=True):
        starts = row.nonzero()[:, 0]
        offsets_of_row[: len(starts)] = starts
    return offsets[0] if len(offsets) == 1 else offsets


def _describe(x: object) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
