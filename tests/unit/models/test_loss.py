"""A failure here means: the loss is not the mean cross-entropy over tokens, or it holds all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from longnet_dist.models import loss
from longnet_dist.models.config import LongNetConfig
from longnet_dist.models.loss import linear_token_loss, linear_token_losses, next_token_labels, token_loss


def draw(rows, width, vocab, dtype=torch.float64, ignored=0.3):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(2, rows, width, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(vocab, width, dtype=dtype, generator=generator).requires_grad_()
    labels = torch.randint(vocab, (2, rows), generator=generator)
    return x, weight, labels.masked_fill(torch.rand(2, rows, generator=generator) < ignored, -100)


def test_labels_are_the_next_tokens():
    assert next_token_labels(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, -100]]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (lambda tokens: tokens, "the tokens themselves"),
        (lambda tokens: tokens.clone(), "the tokens themselves"),
        (lambda tokens: tokens[:, 1:], r"targets is \(1, 4\) and tokens \(1, 5\)"),
    ],
)
def test_targets_that_were_not_shifted_are_refused(targets, message):
    """A model of transformers shifts its labels, so its users would pass the tokens."""
    model = LongNetConfig(d_model=8, num_layers=1, num_heads=2).build()
    tokens = torch.tensor([[5, 6, 7, 5, 9]])
    with pytest.raises(ValueError, match=message):
        model(tokens, targets=targets(tokens))
    assert model(tokens, targets=next_token_labels(tokens)).isfinite()


def test_targets_and_logits_must_have_the_same_rows():
    with pytest.raises(ValueError, match=r"targets is \(1, 4\) and logits \(1, 3, 5\)"):
        token_loss(torch.zeros(1, 3, 5), torch.zeros(1, 4, dtype=torch.int64))
    for function in (linear_token_loss, linear_token_losses):
        with pytest.raises(ValueError, match=r"targets is \(1, 4\) and x \(1, 3, 5\)"):
            function(torch.zeros(1, 3, 5), torch.zeros(7, 5), torch.zeros(1, 4, dtype=torch.int64))


def test_loss_without_valid_labels_is_zero():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = token_loss(logits, torch.full((1, 3), -100))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize(("rows", "ignored"), [(1, 0.0), (7, 0.3), (8, 0.3), (33, 0.3), (9, 1.0), (0, 0.0)])
def test_linear_token_loss_is_token_loss_of_the_logits(rows, ignored, monkeypatch):
    """Loss, gradients and each token's loss, with row counts that the size of a part does and does not divide."""
    monkeypatch.setattr(loss, "_MAX_ROWS", 4)
    x, weight, labels = draw(rows, 6, 11, ignored=ignored)
    expected = token_loss(x @ weight.T, labels)
    actual = linear_token_loss(x, weight, labels)
    assert_close(actual, expected, rtol=0, atol=1e-13)
    for grad, expected_grad in zip(*(torch.autograd.grad(3 * v, (x, weight)) for v in (actual, expected)), strict=True):
        assert_close(grad, expected_grad, rtol=0, atol=1e-13)
    losses = linear_token_losses(x, weight, labels)
    expected_losses = torch.nn.functional.cross_entropy(
        (x @ weight.T).flatten(0, 1), labels.flatten(), reduction="none"
    )
    assert_close(losses, expected_losses.detach().view(2, rows), rtol=0, atol=1e-13)


def test_bfloat16_is_summed_in_float32():
    """The loss is in float32, and as close to the float64 loss as bfloat16 logits allow."""
    x, weight, labels = draw(5000, 32, 100, torch.bfloat16)
    exact = token_loss(x.double() @ weight.double().T, labels)
    actual = linear_token_loss(x, weight, labels)
    assert actual.dtype == torch.float32
    assert_close(actual.double(), exact, rtol=1e-3, atol=0)
    for grad, expected_grad in zip(*(torch.autograd.grad(v, (x, weight)) for v in (actual, exact)), strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad.double() - expected_grad.double()).norm() < 1e-2 * expected_grad.double().norm()


def test_logits_never_exist_as_a_whole():
    largest = 0

    class LargestTensor(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t))])
            return out

    x, weight, labels = draw(12_000, 4, 2000, torch.float32)
    with LargestTensor():
        linear_token_loss(x, weight, labels).backward()
    assert largest <= loss._MAX_LOGITS["cpu"] < 24_000 * 2000 / 2


def test_a_second_derivative_is_refused():
    """torch.autograd.grad of a sum would silently return the derivative of its other term alone."""
    x, labels = torch.randn(1, 6, 8, requires_grad=True), torch.randint(5, (1, 6))
    loss = linear_token_loss(x, torch.randn(5, 8), labels)
    with pytest.raises(ValueError, match=r"second derivative.*use token_loss"):
        torch.autograd.grad(loss.square() + x.pow(3).sum(), x, create_graph=True)
