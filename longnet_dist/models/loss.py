"""Labels and losses of a language model: means over the tokens of all ranks, also without whole logits.

docs/decisions/loss.md says why `linear_token_loss` exists, and what else was measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longnet_dist.distributed.mesh import SequenceMesh

IGNORED = -100
"""The label of tokens that do not count."""
_MAX_ROWS, _MAX_LOGITS = 4096, 1 << 24
"""The largest part of the logits in memory at once: this many rows, and this many logits (but at least one row)."""


def next_token_labels(tokens: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Return the label of each token of whole sequences: the next token, and `ignore_index` for the last.

    Shift first, split after: the label of a chunk's last token is in the next rank's chunk.

    Args:
        tokens: (B, N), whole sequences.
        ignore_index: the label of the last token.

    Returns:
        The labels, (B, N).

    Example:
        >>> next_token_labels(torch.tensor([[5, 6, 7]]))
        tensor([[   6,    7, -100]])
    """
    return torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], ignore_index)), dim=1)


def token_loss(
    logits: Tensor,
    labels: Tensor,
    mesh: SequenceMesh | None = None,
    ignore_index: int = IGNORED,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Compute the mean cross-entropy over the valid labels of all ranks, in nats.

    Each token has the same weight, whichever rank holds it.

    Args:
        logits: (B, L, vocab), the logits of this rank's rows.
        labels: (B, L), int64, shifted before they were split.
        mesh: the ranks that hold the sequence; chunks may be uneven or empty. `SequenceMesh.token_mean` says what
            the gradients of each rank are.
        ignore_index: the label of tokens that do not count.
        num_items: divisor of the sum, in place of the number of valid labels. With gradient accumulation, pass the
            number of valid labels in all calls of a step.

    Returns:
        A scalar, float32 (float64 for float64 logits), the same on every rank; 0 if no label is valid.

    Example:
        >>> round(token_loss(torch.zeros(1, 3, 5), torch.tensor([[1, 2, -100]])).item(), 4)
        1.6094
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = nn.functional.cross_entropy(
        logits.flatten(0, -2).to(dtype), labels.flatten(), ignore_index=ignore_index, reduction="none"
    )
    if num_items is not None:
        total = losses.sum() if mesh is None else mesh.sum(losses.sum())
        return total / torch.as_tensor(num_items, device=total.device)
    mask = labels.flatten() != ignore_index
    if mesh is not None:
        return mesh.token_mean(losses, mask)
    return losses.sum() / mask.sum().clamp(min=1)


def linear_token_loss(
    x: Tensor, weight: Tensor, labels: Tensor, mesh: SequenceMesh | None = None, ignore_index: int = IGNORED
) -> Tensor:
    """Compute `token_loss(x @ weight.T, labels, ...)` without ever holding all logits.

    The forward computes the logits of a few thousand rows at a time, and the gradients with them. The
    result is differentiable once: a backward with `create_graph=True` raises ValueError.

    Args:
        x: (B, L, E), the features of this rank's rows.
        weight: (vocab, E), the weight of the output projection.
        labels, mesh, ignore_index: as for `token_loss`.

    Returns:
        A scalar, as `token_loss` returns.

    Example:
        >>> x, weight, labels = torch.randn(1, 6, 8), torch.randn(5, 8), torch.randint(5, (1, 6))
        >>> torch.allclose(linear_token_loss(x, weight, labels), token_loss(x @ weight.T, labels), atol=1e-5)
        True
    """
    total, _ = _LinearLoss.apply(x.flatten(0, -2), weight, labels.flatten(), ignore_index, torch.is_grad_enabled())
    count = (labels != ignore_index).sum().double()
    if mesh is not None:
        total, count = mesh.sum(total), mesh.sum(count)
    return total / count.clamp(min=1).to(total.dtype)


@torch.no_grad()
def linear_token_losses(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Compute the cross-entropy of each token, in nats, without ever holding all logits; not differentiable.

    Args:
        x: (B, L, E), the features that the output projection takes.
        weight: (vocab, E), the weight of the output projection.
        labels: (B, L), int64.
        ignore_index: the label of tokens that do not count.

    Returns:
        The losses, (B, L), float32 (float64 for float64); 0 for tokens that do not count.

    Example:
        >>> linear_token_losses(torch.zeros(1, 2, 8), torch.zeros(4, 8), torch.tensor([[3, -100]]))
        tensor([[1.3863, 0.0000]])
    """
    _, losses = _LinearLoss.apply(x.flatten(0, -2), weight, labels.flatten(), ignore_index, False)
    return losses.view(labels.shape)


class _LinearLoss(torch.autograd.Function):
    """The sum of the cross-entropies, and the cross-entropy of each token (without a gradient).

    forward:  for a part of the rows at a time, logits = x w' and p = softmax(logits) - onehot(label);
              dx = p w, dw += p' x
    backward: dx and dw, times the gradient of the sum
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        losses = torch.zeros(x.shape[0], dtype=dtype, device=x.device)
        dx = torch.zeros_like(x) if with_gradient else None
        dw = torch.zeros(weight.shape, dtype=dtype, device=x.device) if with_gradient else None
        rows = min(_MAX_ROWS, max(1, _MAX_LOGITS // weight.shape[0]))
        for first in range(0, x.shape[0], rows):
            part, label = x[first : first + rows], labels[first : first + rows]
            valid = label != ignore_index
            label = label.where(valid, 0)[:, None]
            log_p = nn.functional.linear(part, weight).to(dtype).log_softmax(-1)
            losses[first : first + rows] = torch.where(valid, -log_p.gather(1, label)[:, 0], 0)
            if dx is not None and dw is not None:
                p = log_p.exp_()
                p.scatter_add_(1, label, torch.full_like(label, -1, dtype=dtype))
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
                "linear_token_loss has no second derivative (create_graph=True): use token_loss(x @ weight.T, labels), "
                "which has every derivative"
            )
        dx, dw = ctx.saved_tensors
        return (dx * grad).to(dx.dtype), (dw * grad).to(dw.dtype), None, None, None
