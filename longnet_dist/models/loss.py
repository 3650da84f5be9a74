"""Labels, losses and scores of a language model: means over the tokens of all ranks, also without whole logits.

docs/decisions/loss.md says why `linear_token_loss` exists, and what else was measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longnet_dist.distributed.mesh import SequenceMesh, refuse

if TYPE_CHECKING:
    from longnet_dist.models.decoder import LongNet

IGNORED = -100
"""The target of tokens that do not count."""
_MAX_ROWS = 4096
_MAX_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 27}
"""The largest part of the logits in memory at once: this many rows, and this many logits (but at least one row).

Each part reads and writes the gradient of the weight. On a GPU few rows would not hide that: with 131,072 ids, 2^24
logits are 128 rows, for which the matrix product takes less time than the gradient's memory.
"""


def next_token_labels(tokens: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Return the target of each token of whole sequences: the next token, and `ignore_index` for the last.

    Shift first, split after: the target of a chunk's last token is in the next rank's chunk.

    Args:
        tokens: (B, N), whole sequences.
        ignore_index: the target of the last token.

    Returns:
        The targets, (B, N).

    Example:
        >>> next_token_labels(torch.tensor([[5, 6, 7]]))
        tensor([[   6,    7, -100]])
    """
    return torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], ignore_index)), dim=1)


def within_documents(
    targets: Tensor, mesh: SequenceMesh | None = None, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """Return targets without those that are in another document than their token, or in padding.

    Args:
        targets: (B, N), the token after each token; with a mesh (B, L), those of this rank's rows.
        mesh: the ranks that hold the sequences.
        cu_seqlens, lengths: see `dilated_attention`.

    Returns:
        The targets, with `IGNORED` in place of the others.

    Example:
        >>> within_documents(torch.tensor([[1, 2, 3, 4]]), cu_seqlens=torch.tensor([0, 3, 4]))
        tensor([[   1,    2, -100,    4]])
    """
    device = targets.device
    positions = torch.arange(targets.shape[1], device=device) if mesh is None else mesh.positions(device)
    if cu_seqlens is not None:
        targets = targets.masked_fill(torch.isin(positions + 1, cu_seqlens[1:-1].to(device)), IGNORED)
    if lengths is not None:
        targets = targets.masked_fill(positions + 1 >= lengths.to(device)[:, None], IGNORED)
    return targets


def check_targets(tokens: Tensor, targets: Tensor, mesh: SequenceMesh | None = None) -> None:
    """Check that targets are the tokens that follow, and that the ranks of a mesh hold parts of the same sequences.

    Over a mesh, the last target of a rank must be the first token of the next rank. Groups on GPUs compare
    them only in the first call, because a comparison blocks the host.

    Args:
        tokens: (B, N); with a mesh (B, L), this rank's rows.
        targets: the same shape.
        mesh: the ranks that hold the sequences.

    Raises:
        ValueError: on every rank, if shapes differ, targets are the tokens themselves, or ranks do not fit.
    """
    problem = None
    if targets.shape != tokens.shape or tokens.dim() != 2:
        problem = f"targets is {tuple(targets.shape)} and tokens {tuple(tokens.shape)}; both must be (B, N or L)"
    elif targets is tokens or (not torch.compiler.is_compiling() and _is_unshifted(tokens, targets)):
        problem = "targets are the tokens themselves; they must be the tokens that follow: next_token_labels(tokens)"
    if mesh is None or torch.compiler.is_compiling():
        if problem:
            raise ValueError(problem)
        return
    facts = {"call": "targets", "batch": len(tokens), "device": tokens.device.type}
    if not mesh.agree(facts, problem) or mesh.everyone is None:
        return
    edges = torch.full((2, len(tokens)), IGNORED, dtype=torch.int64, device=tokens.device)
    if tokens.shape[1]:
        edges[0], edges[1] = tokens[:, 0], targets[:, -1]
    first, last = mesh.everyone.all_gather(edges, "comparing targets").wait().unbind(1)
    following, expected = first[1:], last[:-1]
    wrong = (following != expected) & (following != IGNORED) & (expected != IGNORED)
    if wrong.any():
        rank, row = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"the last target of rank {rank} is {expected[rank, row]}, and the first token of rank {rank + 1} is "
            f"{following[rank, row]}: all ranks of a mesh need parts of the same sequences, with targets that were "
            "shifted before they were split: mesh.split(next_token_labels(tokens))"
        )


def _is_unshifted(tokens: Tensor, targets: Tensor) -> bool:
    """Return whether targets equal tokens, which are not all the same. Only on CPUs: elsewhere the host would wait."""
    on_cpu = tokens.device.type == targets.device.type == "cpu"
    return on_cpu and tokens.shape[1] > 1 and torch.equal(tokens, targets) and bool((tokens != tokens[:, :1]).any())


def _check_rows(name: str, x: Tensor, targets: Tensor, mesh: SequenceMesh | None = None) -> None:
    """Raise ValueError, on every rank if there is a mesh, unless each row of `x` has one target."""
    if x.shape[:-1] != targets.shape:
        refuse(
            f"targets is {tuple(targets.shape)} and {name} {tuple(x.shape)}; each row of {name} needs one target: with "
            "a mesh, pass mesh.split(next_token_labels(tokens))",
            mesh,
        )


def token_loss(
    logits: Tensor,
    targets: Tensor,
    mesh: SequenceMesh | None = None,
    ignore_index: int = IGNORED,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Compute the mean cross-entropy over the valid targets of all ranks, in nats.

    Each token has the same weight, whichever rank holds it.

    Args:
        logits: (B, L, vocab), the logits of this rank's rows.
        targets: (B, L), int64, shifted before they were split.
        mesh: the ranks that hold the sequence; chunks may be uneven or empty. `SequenceMesh.token_mean` says what
            the gradients of each rank are.
        ignore_index: the target of tokens that do not count.
        num_items: divisor of the sum, in place of the number of valid targets. With gradient accumulation, pass the
            number of valid targets in all calls of a step.

    Returns:
        A scalar, float32 (float64 for float64 logits), the same on every rank; 0 if no target is valid.

    Example:
        >>> round(token_loss(torch.zeros(1, 3, 5), torch.tensor([[1, 2, -100]])).item(), 4)
        1.6094
    """
    _check_rows("logits", logits, targets, mesh)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = nn.functional.cross_entropy(
        logits.flatten(0, -2).to(dtype), targets.flatten(), ignore_index=ignore_index, reduction="none"
    )
    if num_items is not None:
        total = losses.sum() if mesh is None else mesh.sum(losses.sum())
        return total / torch.as_tensor(num_items, device=total.device)
    mask = targets.flatten() != ignore_index
    if mesh is not None:
        return mesh.token_mean(losses, mask)
    return losses.sum() / mask.sum().clamp(min=1)


def linear_token_loss(
    x: Tensor, weight: Tensor, targets: Tensor, mesh: SequenceMesh | None = None, ignore_index: int = IGNORED
) -> Tensor:
    """Compute `token_loss(x @ weight.T, targets, ...)` without ever holding all logits.

    The forward computes the logits of a few thousand rows at a time, and the gradients with them. The
    result is differentiable once: a backward with `create_graph=True` raises ValueError.

    Args:
        x: (B, L, E), the features of this rank's rows.
        weight: (vocab, E), the weight of the output projection.
        targets, mesh, ignore_index: as for `token_loss`.

    Returns:
        A scalar, as `token_loss` returns.

    Example:
        >>> x, weight, targets = torch.randn(1, 6, 8), torch.randn(5, 8), torch.randint(5, (1, 6))
        >>> torch.allclose(linear_token_loss(x, weight, targets), token_loss(x @ weight.T, targets), atol=1e-5)
        True
    """
    _check_rows("x", x, targets, mesh)
    total, _ = _LinearLoss.apply(x.flatten(0, -2), weight, targets.flatten(), ignore_index, torch.is_grad_enabled())
    count = (targets != ignore_index).sum().double()
    if mesh is not None:
        total, count = mesh.sum(total), mesh.sum(count)
    return total / count.clamp(min=1).to(total.dtype)


@torch.no_grad()
def linear_token_losses(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Compute the cross-entropy of each token, in nats, without ever holding all logits; not differentiable.

    Args:
        x: (B, L, E), the features that the output projection takes.
        weight: (vocab, E), the weight of the output projection.
        targets: (B, L), int64.
        ignore_index: the target of tokens that do not count.

    Returns:
        The losses, (B, L), float32 (float64 for float64); 0 for tokens that do not count.

    Example:
        >>> linear_token_losses(torch.zeros(1, 2, 8), torch.zeros(4, 8), torch.tensor([[3, -100]]))
        tensor([[1.3863, 0.0000]])
    """
    _check_rows("x", x, targets)
    _, losses = _LinearLoss.apply(x.flatten(0, -2), weight, targets.flatten(), ignore_index, False)
    return losses.view(targets.shape)


class _LinearLoss(torch.autograd.Function):
    """The sum of the cross-entropies, and the cross-entropy of each token (without a gradient).

    forward:  for a part of the rows at a time, logits = x w' and p = softmax(logits) - onehot(target);
              dx = p w, dw += p' x
    backward: dx and dw, times the gradient of the sum
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        losses = torch.zeros(x.shape[0], dtype=dtype, device=x.device)
        dx = torch.zeros_like(x) if with_gradient else None
        dw = torch.zeros(weight.shape, dtype=dtype, device=x.device) if with_gradient else None
        max_logits = _MAX_LOGITS.get(x.device.type, _MAX_LOGITS["cpu"])
        rows = min(_MAX_ROWS, max(1, max_logits // weight.shape[0]))
        for first in range(0, x.shape[0], rows):
            part, target = x[first : first + rows], targets[first : first + rows]
            valid = target != ignore_index
            target = target.where(valid, 0)[:, None]
            log_p = nn.functional.linear(part, weight).to(dtype).log_softmax(-1)
            losses[first : first + rows] = torch.where(valid, -log_p.gather(1, target)[:, 0], 0)
            if dx is not None and dw is not None:
                p = log_p.exp_()
                p.scatter_add_(1, target, torch.full_like(target, -1, dtype=dtype))
                p = torch.where(valid[:, None], p, 0).to(weight.dtype)
                dx[first : first + rows] = p @ weight
                dw += p.T @ part
        ctx.mark_non_differentiable(losses)
        if dx is not None and dw is not None:
            ctx.save_for_backward(dx, dw.to(weight.dtype))
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        # torch.autograd.grad silently ignores `once_differentiable`.
        if torch.is_grad_enabled():
            raise ValueError(
                "linear_token_loss has no second derivative (create_graph=True): use token_loss(x @ weight.T, "
                "targets), which has one"
            )
        dx, dw = ctx.saved_tensors
        return (dx * grad).to(dx.dtype), (dw * grad).to(dw.dtype), None, None, None


@torch.no_grad()
def log_likelihoods(model: LongNet, tokens: Tensor, mesh: SequenceMesh | None = None) -> Tensor:
    """Compute the log-likelihood of each token given the tokens before it, in nats.

    Args:
        model: the model, in eval mode.
        tokens: (B, N), int64, whole documents. With a mesh, (B, L + 1): this rank's rows and the row after them, which
            the last of them predicts. (B, L) if no row follows.
        mesh: the ranks that hold the documents; the call is then collective over the mesh's group.

    Returns:
        The log-likelihoods of `tokens[:, 1:]`, float32 (float64 for a float64 model). Concatenated over ranks, they
        are those of the whole documents.

    Raises:
        ValueError: if `tokens` has a wrong shape, or the mesh has another pattern.

    Example:
        >>> model = LongNetConfig(d_model=32, num_layers=1).build().eval()
        >>> log_likelihoods(model, torch.randint(257, (1, 100))).shape
        torch.Size([1, 99])
    """
    num_rows = tokens.shape[-1]
    if mesh is not None:
        num_rows, following = mesh.shard.num_rows, int(mesh.shard.stop < mesh.seq_len)
        if tokens.dim() != 2 or tokens.shape[1] != num_rows + following:
            refuse(
                f"tokens is {tuple(tokens.shape)}; it must be (B, {num_rows + following}): the {num_rows} rows of this "
                f"rank, and {'the row after them' if following else 'none after them'}",
                mesh,
            )
    features, labels = model.features(tokens[..., :num_rows], mesh), tokens[:, 1:]
    return -linear_token_losses(features[:, : labels.shape[1]], model.output.weight, labels)
