"""A failure here means: many documents in one call of a kernel differ from each document alone, or take many calls."""

from __future__ import annotations

import itertools

import pytest
import torch

from longnet_dist import Pattern, dilated_attention
from longnet_dist.attention.kernels import KERNELS, KernelRequest, eager
from tests.cases import Case, drawn
from tests.distributed.test_documents import check, documents, results


class Packed:
    """The eager kernel, which also takes variable lengths: it checks what it gets, and attends square by square."""

    forward, backward = staticmethod(eager.forward), staticmethod(eager.backward)

    def __init__(self):
        self.calls = 0

    def unsupported(self, request):
        return ["it has no bias"] if request.bias and request.variable_lengths else []

    def forward_packed(self, q, k, v, offsets, longest, *, causal, scale):
        parts = self._squares(offsets, longest, q, k, v)
        outs, lses = zip(*(eager.forward(*part, causal=causal, scale=scale) for part in parts), strict=True)
        return torch.cat([x[0] for x in outs]), torch.cat([x[0].t() for x in lses])

    def backward_packed(self, dout, q, k, v, out, lse, offsets, longest, *, causal, scale):
        assert lse.shape == q.shape[:2]
        grads = []
        for *part, of_lse in self._squares(offsets, longest, dout, q, k, v, out, lse):
            of_square = eager.backward(*part, of_lse.transpose(1, 2), causal=causal, scale=scale)
            grads.append([x[0] for x in of_square[:3]])
        return tuple(torch.cat(parts) for parts in zip(*grads, strict=True))

    def _squares(self, offsets, longest, *tensors):
        self.calls += 1
        ends = offsets.tolist()
        assert offsets.dtype == torch.int32
        assert (ends[0], ends[-1]) == (0, len(tensors[0]))
        assert longest == max(b - a for a, b in itertools.pairwise(ends))
        return [[x[None, a:b] for x in tensors] for a, b in itertools.pairwise(ends)]


def check_packed(group, examples):
    KERNELS["torch"], before = Packed(), KERNELS["torch"]  # The kernel that "auto" takes.
    try:
        check(group, examples)
        if group is None or group.rank() == 0:
            assert KERNELS["torch"].calls
    finally:
        KERNELS["torch"] = before


@pytest.mark.parametrize("world", [0, 2, 4])
def test_packed_documents_equal_each_document_alone(pool, world):
    examples = drawn(documents(max(1, world)), 25)
    if world:
        pool.run(world, check_packed, examples)
    else:
        check_packed(None, examples)


@pytest.mark.parametrize("length", [4, 5])
def test_a_thousand_documents_take_one_call_a_branch(length):
    """Of 5 rows of a document phase 0 keeps two, and the others one; of 4 each keeps one."""
    case = Case(Pattern((4, 16), (1, 4)), N=4000, H=4, G=4, B=2, D=4, causal=True)
    KERNELS["packed"] = packed = Packed()
    try:
        q, k, v = (x.detach() for x in case.tensors().values())
        offsets = torch.arange(0, 4001, length)
        dilated_attention(q, k, v, case.pattern, causal=True, kernel="packed", cu_seqlens=offsets)
    finally:
        del KERNELS["packed"]
    assert packed.calls == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_documents_on_a_gpu(kernel, causal):
    """Most kernels take the same squares as one call, in bfloat16."""
    if KERNELS[kernel].unsupported(KernelRequest(torch.device("cuda"), torch.bfloat16, 64)):
        pytest.skip(f"no {kernel}")
    case = Case(Pattern((64, 256), (1, 4)), N=3000, H=8, G=4, B=2, D=64, causal=causal)
    offsets = torch.tensor([0, 1, 1, 700, 1300, 3000])
    inputs = {name: x.detach().bfloat16().cuda().requires_grad_() for name, x in case.tensors().items()}
    out = dilated_attention(**case.arguments(inputs), cu_seqlens=offsets, kernel=kernel)
    grads = torch.autograd.grad(out, list(inputs.values()), case.dout(torch.bfloat16).cuda())
    expected, _, *expected_grads = results(case, cu_seqlens=offsets)
    for actual, exact in zip((out, *grads), (expected, *expected_grads), strict=True):
        error = (actual.double().cpu() - exact).abs().max() / exact.abs().max()
        assert error < 4 * torch.finfo(torch.bfloat16).eps
