"""A failure here means: cuDNN's attention is called with what torch's operators do not accept, or taken unasked.

It runs on GPUs only. So a stand-in takes its place, which binds its arguments to the operators' own schemas, checks
them, and computes with the eager kernel.
"""

from __future__ import annotations

import types

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.testing import assert_close

from longnet_dist import dilated_attention, internals
from longnet_dist.attention.kernels import KERNELS, KernelRequest, choose_kernel, cudnn, eager, torch_flash
from tests.cases import PAPER, Case, cases, output_and_gradients


def bound(operator, args, options):
    """Return the arguments of a call by name, as torch's dispatcher binds them."""
    parameters = operator.default._schema.arguments
    positional = [parameter for parameter in parameters if not parameter.kwarg_only]
    given = dict(zip((parameter.name for parameter in positional), args, strict=False)) | options
    assert len(args) <= len(positional)
    assert given.keys() <= {parameter.name for parameter in parameters}
    assert all(parameter.has_default_value() or parameter.name in given for parameter in parameters)
    return given


def heads_last(given, *names):
    return [given[name].transpose(1, 2) for name in names]


@pytest.fixture(params=[0, 1])
def stand_in(request, monkeypatch):
    """Serve CPUs with the kernel, and a cuDNN whose lse has `request.param` sizes of 1 at the end."""
    ones = (1,) * request.param

    def forward(*args, **options):
        given = bound(torch.ops.aten._cudnn_attention_forward, args, options)
        q, k, v = heads_last(given, "query", "key", "value")
        check(q, k, v)
        assert given["compute_log_sumexp"]
        assert (given["max_q"], given["max_k"]) == (q.shape[1], k.shape[1])
        out, lse = eager.forward(q, k, v, causal=given["is_causal"], scale=given["scale"])
        return out.transpose(1, 2), lse.view(*lse.shape, *ones), None, None, 0, 0, None, None, None

    def backward(*args, **options):
        given = bound(torch.ops.aten._cudnn_attention_backward, args, options)
        dout, q, k, v, out = heads_last(given, "grad_out", "query", "key", "value", "out")
        check(dout, q, k, v, out)
        lse = given["logsumexp"]
        assert lse.is_contiguous()
        assert lse.shape == (len(q), q.shape[2], q.shape[1], *ones)
        grads = eager.backward(
            dout, q, k, v, out, lse.view(lse.shape[:3]), causal=given["is_causal"], scale=given["scale"]
        )
        return [grad.transpose(1, 2) for grad in grads[:3]]

    def check(q, *others):
        assert all(x.stride(-1) == 1 and x.data_ptr() % 16 == 0 for x in (q, *others))
        assert others[0].shape[1] > 1, "cuDNN takes no single key"

    monkeypatch.setattr(internals, "cudnn_attention", forward)
    monkeypatch.setattr(internals, "cudnn_attention_backward", backward)
    cudnn._extra_sizes.cache_clear()
    kernel = types.SimpleNamespace(
        forward=cudnn.forward, backward=cudnn.backward, unsupported=lambda request: ["it has no bias"] * request.bias
    )
    monkeypatch.setitem(KERNELS, "stand-in", kernel)
    yield
    cudnn._extra_sizes.cache_clear()


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases().map(lambda case: Case(case.pattern, case.N, case.H, case.G, case.B, 8, case.causal, seed=case.seed)))
def test_it_equals_the_oracle(stand_in, case):
    for actual, expected in zip(output_and_gradients(case, kernel="stand-in"), case.oracle(), strict=True):
        assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_views_that_are_not_aligned_are_copied(stand_in):
    case = Case(PAPER, N=66, H=6, G=3, B=1, D=8, causal=True)
    moved = [torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x) for x in case.tensors().values()]
    leaves = dict(zip(("q", "k", "v"), (x.requires_grad_() for x in moved), strict=True))
    out = dilated_attention(**case.arguments(leaves), kernel="stand-in")
    grads = torch.autograd.grad(out, list(leaves.values()), case.dout())
    assert_close([out, *grads], case.oracle(), rtol=1e-10, atol=1e-10)


def request_for(capability=(9, 0), head_dim=128, dtype=torch.bfloat16, **needs):
    return KernelRequest(torch.device("cuda"), dtype, head_dim, capability=capability, **needs)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (KernelRequest(torch.device("cpu"), torch.bfloat16, 64), "it runs on CUDA, not on cpu"),
        (request_for(head_dim=136), "multiples of 8 up to 128, not 136"),
        (request_for(dtype=torch.float32), "not torch.float32"),
        (request_for(bias=True), "no gradient for a position bias"),
        (request_for(variable_lengths=True), "rectangles of one size"),
        (request_for((7, 5)), "compute capability 8.0 or above"),
    ],
)
def test_what_it_cannot_serve_is_refused_with_the_reason(request_, reason):
    assert reason in "; ".join(cudnn.unsupported(request_))


@pytest.mark.parametrize(("version", "served"), [(90_100, True), (89_000, False), (None, False)])
def test_it_needs_cudnn_9(version, served, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert (cudnn.unsupported(request_for()) == []) == served
    assert choose_kernel("auto", request_for()) is torch_flash  # It is taken by name only.
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in "; ".join(cudnn.unsupported(request_for()))
    finally:
        torch.use_deterministic_algorithms(False)
