"""Dilated attention with torchscale's zero rows: what its published weights were trained with, by arithmetic.

torchscale cuts a sequence into segments of w' = min(w, N) rows. It fills the last segment up to w', and every segment
up to a multiple of r, with zero rows, which are attended. A key of zeros has a score of 0 and a value of 0: z of them
add z to the softmax's denominator, and nothing to its numerator. So no zero row is ever computed with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longnet_dist.attention.api import as_autocast, dilated_attention
from longnet_dist.attention.documents import to_offsets
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.plan.pattern import Branch, Pattern

_NOT_COVERED = -1e8
"""torchscale's lse of a row that a branch does not cover. It gives it to a row whose true lse is 0, too."""


def zero_row_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    causal: bool = False,
    mesh: SequenceMesh | None = None,
    kernel: str = "auto",
    lengths: Tensor | None = None,
) -> Tensor:
    """Compute what torchscale's DilatedAttention computes in float64, with gradients that are exact.

    (torchscale detaches the weights that mix the branches. Its gradients of q and k are therefore others.)

    Args:
        q, k, v: (B, N, H, D); with a mesh (B, L, H, D), this rank's rows.
        pattern: the branches; torchscale's weights need `head_phases="blocked"`.
        causal: whether a query sees only keys at or before it.
        mesh: the ranks that hold the sequence. A branch whose true lse is 0 then counts as covering its row.
        kernel: see `dilated_attention`.
        lengths: (B,), the number of tokens of each sequence; each is then computed as if it were alone.

    Returns:
        A tensor of q's shape and dtype; 0 for rows after a sequence's length.

    Raises:
        ValueError: if key/value heads are shared; over a mesh, if r does not divide a w that is below N.

    Example:
        >>> q, k, v = torch.randn(3, 1, 10, 4, 8).unbind()
        >>> zero_row_attention(q, k, v, Pattern((4, 8), (1, 2), "blocked")).shape
        torch.Size([1, 10, 4, 8])
    """
    q, k, v = as_autocast((q, k, v))
    if k.shape[2] != q.shape[2]:
        refuse(f"torchscale's padding needs as many key/value heads as query heads, not {k.shape[2]} of them", mesh)
    if mesh is not None:
        return _over_ranks(q, k, v, pattern, causal, mesh, kernel, lengths)
    if lengths is None:
        return _mixed(q, k, v, pattern, causal, kernel)
    to_offsets(None, lengths, len(q), q.shape[1], None)  # Checks them.
    alone = zip(q.split(1), k.split(1), v.split(1), lengths.tolist(), strict=True)
    rows = [_mixed(q_1[:, :n], k_1[:, :n], v_1[:, :n], pattern, causal, kernel) for q_1, k_1, v_1, n in alone]
    return torch.cat([torch.nn.functional.pad(x, (0, 0, 0, 0, 0, q.shape[1] - x.shape[1])) for x in rows])


def _mixed(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, causal: bool, kernel: str) -> Tensor:
    """Compute each branch of one unpadded batch, and mix them by their lse, as torchscale does."""
    if not q.shape[1]:
        return torch.zeros_like(v)
    parts = [_branch(q, k, v, pattern, branch, causal, kernel) for branch in pattern.branches]
    lse = torch.stack([part[1] for part in parts])
    weights = torch.where((lse == 0) | lse.isneginf(), _NOT_COVERED, lse).softmax(0)
    mixed = torch.zeros_like(parts[0][0])
    for weight in weights:
        # One branch at a time, because each is as large as the queries.
        mixed = torch.addcmul(mixed, weight[..., None].to(mixed.dtype), parts.pop(0)[0])
    return mixed


def _branch(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, branch: Branch, causal: bool, kernel: str
) -> tuple[Tensor, Tensor]:
    """Compute one branch with its zero rows: out, (B, N, H, D), and lse, (B, N, H)."""
    num_rows, num_heads = q.shape[1:3]
    w, r = min(branch.segment_length, num_rows), branch.dilation_rate
    single = Pattern((branch.segment_length,), (r,), pattern.head_phases)
    out, lse = dilated_attention(q, k, v, single, causal=causal, kernel=kernel, return_lse=True)
    positions = torch.arange(num_rows, device=q.device)
    phases = _phases(pattern, branch, num_heads, q.device)
    if not causal:  # A causal query sees no zero row, because all come after it.
        out, lse = _with_zero_keys(out, lse, _num_zero_keys(positions, num_rows, branch, phases))
    return (out, lse) if w % r == 0 or w == num_rows else _shifted(out, lse, v, w, r, phases)


def _phases(pattern: Pattern, branch: Branch, num_heads: int, device: torch.device) -> Tensor:
    return torch.tensor([pattern.phase(head, num_heads, branch) for head in range(num_heads)], device=device)


def _num_zero_keys(positions: Tensor, num_rows: int, branch: Branch, phases: Tensor) -> Tensor:
    """Return the number of zero rows among the kept keys of each row's segment and each head: int64, (L, H)."""
    w, r = min(branch.segment_length, num_rows), branch.dilation_rate
    size = (num_rows - positions // w * w).clamp(max=w)
    num_real = ((size[:, None] - phases + r - 1) // r).clamp(min=0)
    return -(-w // r) - num_real


def _with_zero_keys(out: Tensor, lse: Tensor, num_zero_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Add the softmax's denominators of zero keys, (L, H), to out, (B, L, H, D), and lse, (B, L, H)."""
    covered = ~lse.isneginf()
    finite = torch.where(covered, lse, 0)  # The gradient of -inf would be NaN.
    with_zeros = torch.logaddexp(finite, num_zero_keys.to(lse.dtype).log())
    return out * (finite - with_zeros).exp()[..., None].to(out.dtype), torch.where(covered, with_zeros, lse)


def _shifted(out: Tensor, lse: Tensor, v: Tensor, w: int, r: int, phases: Tensor) -> tuple[Tensor, Tensor]:
    """Move rows as torchscale does where r does not divide w: a segment's results take up w rows, rounded up to r.

    So they come -w % r rows later for each segment before it. Between segments are the results of queries of zeros:
    all scores are 0, so the lse is log(ceil(w / r)), and the output is the mean of the values, zeros included.
    """
    num_rows, kept = v.shape[1], -(-w // r)
    positions = torch.arange(num_rows, device=v.device)
    segment, offset = positions // (kept * r), positions % (kept * r)
    source = (segment * w + offset.clamp(max=w - 1)).clamp(max=num_rows - 1)
    whole = v[:, : num_rows // w * w].unflatten(1, (-1, w))
    keeps = (torch.arange(w, device=v.device)[:, None] % r == phases).to(v.dtype)
    means = torch.einsum("bswhd,wh->bshd", whole, keeps) / kept
    is_zero = (offset >= w)[:, None]
    keeps_zero = offset[:, None] % r == phases
    zero_lse = torch.where(keeps_zero, lse.new_tensor(math.log(kept)), lse.new_tensor(-math.inf))
    zero_out = means[:, segment.clamp(max=means.shape[1] - 1)] * keeps_zero[..., None]
    zero_out = zero_out.to(out.dtype)
    return torch.where(is_zero[..., None], zero_out, out[:, source]), torch.where(is_zero, zero_lse, lse[:, source])


def _over_ranks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    causal: bool,
    mesh: SequenceMesh,
    kernel: str,
    lengths: Tensor | None,
) -> Tensor:
    """Compute over ranks: denominators of branches add, so those of zero keys are added once, after mixing."""
    num_tokens = mesh.seq_len if lengths is None or not len(lengths) else int(lengths.max())
    for branch in pattern.branches:
        if branch.segment_length < num_tokens and branch.segment_length % branch.dilation_rate:
            refuse(
                f"branch {branch}: r does not divide w, so torchscale's padding moves rows to other ranks; use one "
                "process, sequences of at most w tokens, or padding='none'",
                mesh,
            )
    out, lse = dilated_attention(
        q, k, v, pattern, causal=causal, mesh=mesh, kernel=kernel, return_lse=True, lengths=lengths
    )
    if causal:
        return out
    positions, num_heads = mesh.positions(q.device), q.shape[2]
    results = []
    for i, length in enumerate([mesh.seq_len] * len(q) if lengths is None else lengths.tolist()):
        total = torch.zeros(len(positions), num_heads, dtype=torch.int64, device=q.device)
        for branch in pattern.branches if length else ():
            phases = _phases(pattern, branch, num_heads, q.device)
            w, r = min(branch.segment_length, length), branch.dilation_rate
            covers = (positions % w % r)[:, None] == phases
            total += torch.where(covers, _num_zero_keys(positions, length, branch, phases), 0)
        results.append(_with_zero_keys(out[i : i + 1], lse[i : i + 1], total)[0])
    return torch.cat(results) if results else out
