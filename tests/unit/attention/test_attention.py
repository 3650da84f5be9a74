"""A failure here means: on one device, dilated attention differs from the oracle, or a bad argument passes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from longnet_dist import Pattern, T5Bias, dense_reference, dilated_attention
from longnet_dist.attention.bias import PositionBias
from longnet_dist.attention.kernels import KERNELS, KernelRequest
from tests.cases import CPU_KERNELS, DEVICES, PAPER, Case, cases, output_and_gradients


def usable_kernels(**needs):
    """Return the names of the kernels that serve a float64 request on the CPU with these needs."""
    request = KernelRequest(torch.device("cpu"), torch.float64, head_dim=8, **needs)
    return [name for name, kernel in KERNELS.items() if not kernel.unsupported(request)]


@settings(max_examples=250, deadline=None)
@given(cases(), st.sampled_from(["auto", *CPU_KERNELS]))
def test_output_and_gradients_equal_the_oracles(case, kernel):
    assume(kernel in ("auto", *usable_kernels(bias=case.biased)))
    for actual, expected in zip(output_and_gradients(case, kernel=kernel), case.oracle(), strict=True):
        assert_close(actual, expected, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_uninitialized_memory_does_not_change_results(case):
    expected = output_and_gradients(case)
    torch.use_deterministic_algorithms(True)  # Fills every torch.empty with NaN.
    try:
        poisoned = output_and_gradients(case)
    finally:
        torch.use_deterministic_algorithms(False)
    for pair in zip(poisoned, expected, strict=True):
        assert_close(*pair, rtol=0, atol=1e-14)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_lse_and_its_gradient_equal_the_oracles(case):
    def lse_and_gradients(function):
        inputs = case.tensors()
        out, lse = function(**case.arguments(inputs), return_lse=True)
        assert lse.shape == out.shape[:-1]
        loss = (out * case.dout()).sum() + (lse.masked_fill(lse == -torch.inf, 0) * case.dout()[..., 0]).sum()
        return [lse, *torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)]

    results = [lse_and_gradients(function) for function in (dilated_attention, dense_reference)]
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", usable_kernels())
@pytest.mark.parametrize("causal", [True, False])
def test_low_precision_is_as_accurate_as_the_oracle_in_it(dtype, kernel, causal):
    """The tolerance is derived: twice the sum of the oracle's error in this precision and one rounding."""
    case = Case(PAPER, N=200, H=4, G=2, B=2, D=16, causal=causal)
    rounded = {name: x.detach().to(dtype).double().requires_grad_() for name, x in case.tensors().items()}
    exact = case.oracle(inputs=rounded)
    rounded_oracle = case.oracle(dtype)
    actual = output_and_gradients(case, dtype, kernel=kernel)
    for x, low, expected in zip(actual, rounded_oracle, exact, strict=True):
        rounding = torch.finfo(dtype).eps * expected.abs().max()
        tolerance = 2 * ((low.double() - expected).abs().max() + rounding)
        assert x.dtype == dtype
        assert_close(x.double(), expected, rtol=0, atol=tolerance.item())


@pytest.mark.parametrize("kernel", usable_kernels())
def test_gradcheck(kernel):
    case = Case(
        Pattern((4, 6), (1, 2)), N=11, H=2, G=1, B=1, D=2, causal=True, biased=kernel in usable_kernels(bias=True)
    )

    def function(*inputs):
        named = dict(zip(case.tensors(), inputs, strict=True))
        return dilated_attention(**case.arguments(named), kernel=kernel, return_lse=True)

    def finite(*inputs):
        out, lse = function(*inputs)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(finite, list(case.tensors().values()))


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 9])
def test_the_shortest_sequences_equal_the_oracle(num_tokens):
    case = Case(Pattern((8, 3), (1, 2)), N=num_tokens, H=2, G=2, B=2, D=4, causal=False)
    for actual, expected in zip(output_and_gradients(case), case.oracle(), strict=True):
        assert_close(actual, expected, rtol=0, atol=1e-12)


def test_a_token_alone_in_its_segment_attends_to_itself():
    """torchscale returns 0.067 v here, because it pads the last segment with zero keys and attends to them."""
    q, k, v = torch.randn(3, 1, 9, 2, 4, dtype=torch.float64).unbind()
    assert_close(dilated_attention(q, k, v, Pattern((8,), (1,)))[:, 8], v[:, 8], rtol=0, atol=1e-15)


def test_rows_outside_every_branch_are_zero():
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 12, 1, 4).unbind())
    out, lse = dilated_attention(q, k, v, Pattern((4,), (2,)), return_lse=True)
    assert out[:, 1::2].abs().max() == 0
    assert (lse[:, 1::2] == -torch.inf).all()
    assert lse[:, ::2].isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), (q, k, v)))


def test_large_scores_stay_finite():
    q, k, v = torch.randn(3, 1, 64, 2, 8).unbind()
    out = dilated_attention(q * 1e4, k * 1e4, v, PAPER, causal=True)
    expected = dense_reference(*(x.double() for x in (q * 1e4, k * 1e4, v)), PAPER, causal=True)
    assert out.isfinite().all()
    assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(cases())
def test_inputs_may_have_any_strides(case):
    """Views that projections in other layouts give: transposed, sliced, heads first; and an expanded gradient."""
    inputs = case.tensors()
    expected = dilated_attention(**case.arguments(inputs))
    transposed = {name: x.detach().mT.contiguous().mT for name, x in inputs.items()}
    heads_first = {
        name: x.detach().transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x.detach()
        for name, x in inputs.items()
    }
    sliced = {name: torch.cat((x.detach(), x.detach()), -1)[..., : x.shape[-1]] for name, x in inputs.items()}
    for strided in (transposed, heads_first, sliced):
        strided = {name: x.requires_grad_() for name, x in strided.items()}
        out = dilated_attention(**case.arguments(strided))
        assert_close(out, expected, rtol=0, atol=1e-12)
    # The gradient of a sum is a single number, expanded.
    grads = torch.autograd.grad(out.sum(), list(strided.values()))
    reference = dense_reference(**case.arguments(inputs)).sum()
    for actual, expected in zip(grads, torch.autograd.grad(reference, list(inputs.values())), strict=True):
        assert_close(actual, expected, rtol=0, atol=1e-12)


@dataclass(frozen=True, eq=False)
class Slopes(PositionBias):
    """ALiBi with one learned slope per head: -slope * |distance| ** power. The library does not know this class."""

    parameters: torch.Tensor
    power: float = 1.0
    name = "slopes"

    @property
    def settings(self):
        return (self.power,)

    def problem(self, num_heads, causal):
        return None if self.parameters.shape == (1, num_heads) else "one slope per head"

    def values(self, parameters, distance, causal):
        return -parameters[..., None] * distance.abs() ** self.power

    def accumulate_(self, grad_parameters, grad_scores, distance, causal):
        grad_parameters -= (grad_scores * distance.abs() ** self.power).sum((-1, -2))[..., None]


@settings(max_examples=30, deadline=None)
@given(cases())
def test_a_new_position_bias_needs_one_class(case):
    """The output and all gradients equal the oracle's, although the library does not know the bias."""
    results = []
    for function in (dilated_attention, dense_reference):
        inputs = case.tensors()
        q, k, v = (inputs[name] for name in "qkv")
        slopes = torch.linspace(0.1, 1, case.H, dtype=torch.float64)[None].requires_grad_()
        out = function(q, k, v, case.pattern, causal=case.causal, bias=Slopes(slopes, power=0.5))
        results.append([out, *torch.autograd.grad(out, (q, k, v, slopes), case.dout())])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_inputs_may_start_at_any_address(device, offset):
    """Inputs are views into a larger buffer. CUDA's flash kernels load 16 bytes at once, which torch does not check."""
    dtype = torch.bfloat16
    fused = torch.randn(64 * (3 * 2 * 16 + 3) + offset, dtype=dtype, device=device)[offset:].view(1, 64, -1)
    views = fused[..., : 3 * 2 * 16].unflatten(-1, (3, 2, 16)).unbind(2)
    results = []
    for inputs in (views, [x.clone(memory_format=torch.contiguous_format) for x in views]):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = dilated_attention(*leaves, PAPER, causal=True)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 8, 2)}, r"q is \(1, 8, 2\); it must be \(B, N, H, D\)"),
        ({"v": torch.zeros(1, 8, 1, 4)}, "k and v must have the same shape"),
        ({"q": torch.zeros(1, 9, 2, 4)}, "the same B, N and D"),
        ({"q": torch.zeros(1, 8, 3, 4)}, "3 query heads cannot share 2"),
        ({"q": torch.zeros(1, 8, 2, 4, dtype=torch.float64)}, "one dtype"),
        ({"pattern": (8, 1)}, "must be a longnet_dist.Pattern"),
        ({"kernel": "warp"}, "'warp'; it must be one of auto, flash, torch, triton, eager, cudnn"),
        ({"kernel": "torch", "bias": T5Bias(torch.zeros(8, 2))}, "torch: it has no gradient for a position bias"),
        ({"bias": T5Bias(torch.zeros(8, 3))}, "with H = 2"),
        ({"bias": T5Bias(torch.zeros(7, 2))}, "7 buckets"),
        ({x: torch.zeros(1, 8, 2, 4, dtype=torch.int64) for x in "qkv"}, "not a floating dtype"),
    ],
)
def test_bad_arguments_raise_errors_that_name_the_rule(change, message):
    arguments = dict.fromkeys("qkv", torch.zeros(1, 8, 2, 4)) | {"pattern": Pattern((8,), (1,))} | change
    with pytest.raises(ValueError, match=message):
        dilated_attention(**arguments)


def test_a_named_kernel_never_falls_back(monkeypatch):
    from longnet_dist.attention.kernels import eager

    monkeypatch.setattr(eager, "forward", lambda *a, **k: pytest.fail("fell back to eager"))
    dilated_attention(*torch.zeros(3, 1, 8, 2, 4).unbind(), Pattern((8,), (1,)), kernel="torch")
