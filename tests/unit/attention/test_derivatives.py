"""A failure here means: an unsupported derivative of dilated attention is silently 0, or a supported one is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from longnet_dist import Pattern, dense_reference, dilated_attention
from tests.cases import Case

TINY = Case(Pattern((4, 8), (1, 2)), N=10, H=2, G=1, B=2, D=4, causal=True)


def with_fixed_keys(function, case=TINY):
    """Return `function` as a function of the queries alone, and the queries."""
    fixed = {name: x.detach() for name, x in case.tensors().items()}
    return lambda q: function(**case.arguments(fixed | {"q": q})), fixed["q"]


def dual(function, q):
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)))


def dual_gradient(function, q):
    """Run the forward without a tangent, and its backward with one."""
    q = q.clone().requires_grad_()
    out = function(q)
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.grad(out, q, torch.autograd.forward_ad.make_dual(out.detach(), torch.ones_like(out)))


def jvp(function, q):
    return torch.func.jvp(function, (q,), (torch.ones_like(q),))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is", "ignore:Attempted to insert")  # Warnings from torch itself.
@pytest.mark.parametrize(
    "derivative",
    [
        jvp,
        dual,
        dual_gradient,
        torch.func.linearize,
        lambda function, q: torch.func.jacfwd(function)(q),
        lambda function, q: torch.func.hessian(lambda q: function(q).sum())(q),
        lambda function, q: torch.func.vmap(lambda q: jvp(function, q))(torch.stack([q, q])),
        lambda function, q: jvp(torch.func.vmap(function), torch.stack([q, q])),
        lambda function, q: torch.autograd.functional.jacobian(function, q, strategy="forward-mode", vectorize=True),
        lambda function, q: torch.compile(lambda q: jvp(function, q), backend="aot_eager")(q),
        lambda function, q: dual(torch.compile(function, backend="aot_eager"), q),
    ],
)
def test_forward_mode_raises(derivative):
    """A tangent of zero would be silently wrong."""
    with pytest.raises(ValueError, match=r"forward-mode derivative.*torch\.func\.vjp.*dense_reference"):
        derivative(*with_fixed_keys(dilated_attention))


def second_gradient(function, q):
    q = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad((function(q) + q).square().sum(), q, create_graph=True)
    return torch.autograd.grad(grad.sum(), q)


@pytest.mark.parametrize(
    "derivative",
    [
        second_gradient,
        lambda function, q: torch.autograd.functional.jvp(function, q, torch.ones_like(q)),
        lambda function, q: torch.autograd.functional.hvp(lambda q: function(q).square().sum(), q, torch.ones_like(q)),
        lambda function, q: torch.func.grad(lambda q: torch.func.grad(lambda q: function(q).square().sum())(q).sum())(
            q
        ),
    ],
)
def test_second_derivatives_raise(derivative):
    with pytest.raises(ValueError, match=r"second derivative.*dense_reference"):
        derivative(*with_fixed_keys(dilated_attention))


@pytest.mark.parametrize(
    "transform",
    [
        lambda function, q: torch.func.vjp(function, q)[1](q)[0],
        lambda function, q: torch.func.grad(lambda q: function(q).square().sum())(q),
        lambda function, q: torch.func.jacrev(function)(q),
        lambda function, q: torch.func.vmap(function)(torch.stack([q, 2 * q])),
        lambda function, q: torch.func.vmap(torch.func.grad(lambda q: function(q).square().sum()))(
            torch.stack([q, 2 * q])
        ),
        lambda function, q: torch.func.grad(lambda q: torch.func.vmap(function)(torch.stack([q, 2 * q])).sum())(q),
        lambda function, q: torch.autograd.functional.jacobian(function, q),
        lambda function, q: torch.autograd.functional.jacobian(function, q, vectorize=True),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_reverse_mode_transforms_and_vmap_equal_the_oracles(transform, biased):
    case = dataclasses.replace(TINY, biased=biased)
    actual, expected = (transform(*with_fixed_keys(f, case)) for f in (dilated_attention, dense_reference))
    assert_close(actual, expected, rtol=0, atol=1e-12)


def test_inputs_without_a_tangent_are_accepted_within_a_dual_level():
    function, q = with_fixed_keys(dilated_attention)
    with torch.autograd.forward_ad.dual_level():
        assert_close(function(q), function(q))
