"""The derivatives of dilated attention: the first, in reverse mode. Every other is an error, never a silent 0."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from longnet_dist import internals
from longnet_dist.attention.arguments import Options
from longnet_dist.attention.ops import backward_op, forward_op
from longnet_dist.distributed.mesh import mesh_of

_NO_FORWARD_MODE = (
    "dilated_attention has no forward-mode derivative, which torch.func.jvp, linearize, jacfwd, hessian and "
    "torch.autograd.forward_ad need: use torch.func.vjp, torch.func.jacrev or torch.autograd.grad, or "
    "dense_reference, which has every derivative and suits short sequences"
)
_NO_SECOND_DERIVATIVE = (
    "dilated_attention has no second derivative, which a gradient of its gradient, torch.autograd.functional.jvp and "
    "hvp need: use dense_reference, which has every derivative and suits short sequences"
)


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias_parameters: Tensor | None, cu_seqlens: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Call the forward operator, and return its (out, lse), differentiable once."""
    out, lse, _ = _differentiable(_Attention, forward_op, q, k, v, bias_parameters, cu_seqlens, *options)
    return out, lse


def _differentiable(function: type[torch.autograd.Function], operator: Any, *args: Any) -> Any:
    """Call an operator so that torch.func's transforms work, and missing derivatives raise.

    An operator with registered autograd does neither, but torch.compile traces no Function with a `jvp`.
    """
    if not torch.compiler.is_compiling():
        return function.apply(*args)
    if internals.is_in_forward_mode():
        raise ValueError(_NO_FORWARD_MODE)
    return operator(*args)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, bias_parameters, cu_seqlens, *ctx.options = inputs
    out, lse, retained = output
    ctx.set_materialize_grads(False)
    ctx.mesh = mesh_of(Options(*ctx.options).mesh)  # A reference, so that the handle stays valid in the backward.
    ctx.save_for_backward(q, k, v, out, lse, bias_parameters, cu_seqlens, *([] if ctx.mesh is None else [retained]))


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, bias_parameters, cu_seqlens, *retained = ctx.saved_tensors
    grads: list[Tensor] = []
    if dout is not None:
        args = (dout, q, k, v, out, lse, retained[0] if retained else None, bias_parameters, cu_seqlens, *ctx.options)
        grads += _differentiable(_AttentionBackward, backward_op, *args)
    if dlse is not None:
        # d lse / d score is the softmax weight p. Flash computes p (dout . v - dout . out), which is p dlse for v = 0,
        # dout a unit vector e, and out = -dlse e. What the forward retained is of no use, because v differs here.
        unit = torch.zeros_like(q)
        unit[..., 0] = 1
        minus_dlse = -dlse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1).to(q.dtype) * unit
        args = (unit, q, k, torch.zeros_like(v), minus_dlse, lse, None, bias_parameters, cu_seqlens, *ctx.options)
        dq, dk, dv, dbias = _differentiable(_AttentionBackward, backward_op, *args)
        lse_grads = [dq, dk, torch.zeros_like(dv), dbias]
        grads = [a + b for a, b in zip(grads, lse_grads, strict=True)] if grads else lse_grads
    no_gradient = [None] * len(ctx.options)
    if not grads:
        return None, None, None, None, None, *no_gradient
    dq, dk, dv, dbias = grads
    return dq, dk, dv, None if bias_parameters is None else dbias.to(bias_parameters.dtype), None, *no_gradient


class _ReverseOnly(torch.autograd.Function):
    """A function with derivatives in reverse mode alone."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise ValueError(_NO_FORWARD_MODE)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _loop(cls.apply, info, in_dims, *args)


class _Attention(_ReverseOnly):
    """The forward operator, differentiable once."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return forward_op(*args)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


class _AttentionBackward(_ReverseOnly):
    """The backward operator, which has no derivative."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return backward_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise ValueError(_NO_SECOND_DERIVATIVE)


def _loop(operator: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Implement torch.vmap by one call per entry.

    A single call on a larger batch would not do: the entries may share a bias, retained keys or a mesh.
    """
    calls = [
        operator(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
    return results, (0,) * len(results)


for _operator in (forward_op, backward_op):
    _operator.register_vmap(partial(_loop, _operator))
forward_op.register_autograd(_backward, setup_context=_setup_context)
