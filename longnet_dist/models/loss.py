"""The loss of a language model: labels, the mean over the tokens of all ranks, and a head whose logits are never whole.

Why the head is ours, and what else was measured: docs/decisions/loss.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longnet_dist.distributed.mesh import SequenceMesh

IGNORED = -100
"""The label of a token that is not counted."""
_MOST_ROWS, _MOST_LOGITS = 4096, 1 << 24


def next_token_labels(tokens: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """The labels of whole sequences, (B, N) -> (B, N): the next token, and none for the last.

    Shift first, split after: the label of a chunk's last token is in the next rank's chunk.

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
    """Mean cross-entropy over the valid labels of all ranks, in nats; each token weighs the same.

    Args:
        logits: (B, L, vocab), of this rank's rows.
        labels: (B, L), int64, shifted before they were split; `ignore_index` is not counted.
        mesh: the ranks that hold the sequence, uneven or empty chunks included; see
            `SequenceMesh.token_mean` for what the gradients of its ranks are.
        num_items: what to divide the sum by, in place of the valid labels of this call: those of all calls of a step,
            where gradients are accumulated over several.

    Returns:
        One number, float32 (float64 for float64), the same on every rank; 0 where no label is valid.

    Example:
        >>> round(token_loss(torch.zeros(1, 3, 5), torch.tensor([[1, 2, -100]])).item(), 4)
        1.6094
    """
    kind = torch.promote_types(logits.dtype, torch.float32)
    losses = nn.functional.cross_entropy(
        logits.flatten(0, -2).to(kind), labels.flatten(), ignore_index=ignore_index, reduction="none"
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
    """`token_loss(x @ weight.T, labels, ...)`, with logits of a few thousand rows at a time, in the forward alone.

    Differentiable once: a backward with `create_graph=True` raises ValueError.

    Args:
        x: (B, L, E), what the output projection takes.
        weight: (vocab, E), of the output projection.
        labels, mesh, ignore_index: as for `token_loss`.

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
    """The cross-entropy of each token, (B, L, E) and (vocab, E) -> (B, L), in nats, float32; 0 where it is ignored.

    Not differentiable; no more than a few thousand rows of logits are there at a time.
    """
    _, losses = _LinearLoss.apply(x.flatten(0, -2), weight, labels.flatten(), ignore_index, False)
    return losses.view(labels.shape)


class _LinearLoss(torch.autograd.Function):
    """Sum of cross-entropies, and each of them (without a gradient).

    forward:  logits = x w', rows at a time; with p = softmax(logits) - onehot(label): dx = p w, dw += p' x.
    backward: dx and dw times the gradient of the sum.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        kind = torch.promote_types(x.dtype, torch.float32)
        losses = torch.zeros(x.shape[0], dtype=kind, device=x.device)
        dx = torch.zeros_like(x) if with_gradient else None
        dw = torch.zeros(weight.shape, dtype=kind, device=x.device) if with_gradient else None
        rows = min(_MOST_ROWS, max(1, _MOST_LOGITS // weight.shape[0]))
        for first in range(0, x.shape[0], rows):
            part, label = x[first : first + rows], labels[first : first + rows]
            counted = label != ignore_index
            label = label.where(counted, 0)[:, None]
            log_p = nn.functional.linear(part, weight).to(kind).log_softmax(-1)
            losses[first : first + rows] = torch.where(counted, -log_p.gather(1, label)[:, 0], 0)
            if dx is not None and dw is not None:
                p = log_p.exp_()
                p.scatter_add_(1, label, torch.full_like(label, -1, dtype=kind))
                p = torch.where(counted[:, None], p, 0).to(weight.dtype)
                dx[first : first + rows] = p @ weight
                dw += p.T @ part
        ctx.mark_non_differentiable(losses)
        if dx is not None and dw is not None:
            ctx.save_for_backward(dx, dw.to(weight.dtype))
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        if torch.is_grad_enabled():  # As `once_differentiable`, which torch.autograd.grad passes by in silence.
            raise ValueError(
                "a second derivative of linear_token_loss was asked for (create_graph=True), and it has only first "
                "ones: use token_loss(x @ weight.T, labels), which has every derivative"
            )
        dx, dw = ctx.saved_tensors
        return (dx * grad).to(dx.dtype), (dw * grad).to(dw.dtype), None, None, None
