"""A failure here means: dilated attention on one device is not the oracle's, or keeps or hides more than it says."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from longnet_dist import Pattern, T5Bias, dense_reference, dilated_attention
from longnet_dist.attention.arguments import Options
from longnet_dist.attention.bias import PositionBias
from tests.drawn import Case, cases

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
PAPER = Pattern((16, 32, 64), (1, 3, 6))  # r does not divide w, as (16384, 6) and (32768, 12) of the paper


def ours(case: Case, dtype: torch.dtype = torch.float64, **options):
    inputs = case.tensors(dtype)
    out = dilated_attention(**case.arguments(inputs), **options)
    return [out, *torch.autograd.grad(out, list(inputs.values()), case.dout(dtype))]


@settings(max_examples=250, deadline=None)
@given(cases(), st.sampled_from(["auto", "eager"]))
def test_out_and_gradients_are_the_oracles(case, kernel):
    for mine, expected in zip(ours(case, kernel=kernel), case.oracle(), strict=True):
        assert_close(mine, expected, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_uninitialised_memory_changes_nothing(case):
    before = ours(case)
    torch.use_deterministic_algorithms(True)  # Fills every torch.empty with NaN.
    try:
        poisoned = ours(case)
    finally:
        torch.use_deterministic_algorithms(False)
    for mine, expected in zip(poisoned, before, strict=True):
        assert_close(mine, expected, rtol=0, atol=1e-14)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_lse_and_its_gradient(case):
    def both(function):
        inputs = case.tensors()
        out, lse = function(**case.arguments(inputs), return_lse=True)
        assert lse.shape == out.shape[:-1]
        loss = (out * case.dout()).sum() + (lse.masked_fill(lse == -torch.inf, 0) * case.dout()[..., 0]).sum()
        return [lse, *torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)]

    for mine, expected in zip(both(dilated_attention), both(dense_reference), strict=True):
        assert_close(mine, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["torch", "eager"])
@pytest.mark.parametrize("causal", [True, False])
def test_low_precision(dtype, kernel, causal):
    """Within twice the error of the oracle run in that precision, and its rounding: derived, not chosen."""
    case = Case(PAPER, N=200, H=4, G=2, B=2, D=16, causal=causal)
    rounded = {name: x.detach().to(dtype).double().requires_grad_() for name, x in case.tensors().items()}
    exact = case.oracle(inputs=rounded)
    independent = case.oracle(dtype)
    for mine, low, right in zip(ours(case, dtype, kernel=kernel), independent, exact, strict=True):
        rounding = torch.finfo(dtype).eps * right.abs().max()
        allowed = 2 * ((low.double() - right).abs().max() + rounding)
        assert mine.dtype == dtype
        assert_close(mine.double(), right, rtol=0, atol=allowed.item())


@pytest.mark.parametrize("kernel", ["torch", "eager"])
def test_gradcheck(kernel):
    case = Case(Pattern((4, 6), (1, 2)), N=11, H=2, G=1, B=1, D=2, causal=True, biased=kernel == "eager")

    def function(*inputs):
        named = dict(zip(case.tensors(), inputs, strict=True))
        return dilated_attention(**case.arguments(named), kernel=kernel, return_lse=True)

    def without_uncovered(*inputs):
        out, lse = function(*inputs)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(without_uncovered, list(case.tensors().values()))


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 9])
def test_tiny_lengths(num_tokens):
    case = Case(Pattern((8, 3), (1, 2)), N=num_tokens, H=2, G=2, B=2, D=4, causal=False)
    for mine, expected in zip(ours(case), case.oracle(), strict=True):
        assert_close(mine, expected, rtol=0, atol=1e-12)


def test_the_last_token_alone_is_its_own_value():
    """torchscale gives 0.067 v here: its tail is padded with zero keys that are attended."""
    q, k, v = torch.randn(3, 1, 9, 2, 4, dtype=torch.float64).unbind()
    assert_close(dilated_attention(q, k, v, Pattern((8,), (1,)))[:, 8], v[:, 8], rtol=0, atol=1e-15)


def test_rows_that_no_branch_covers_are_zero():
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
def test_strided_inputs(case):
    """Transposed, sliced, expanded: what comes out of a projection in another layout."""
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
    # The gradient of a sum is one number, expanded.
    grads = torch.autograd.grad(out.sum(), list(strided.values()))
    dense = dense_reference(**case.arguments(inputs)).sum()
    for mine, right in zip(grads, torch.autograd.grad(dense, list(inputs.values())), strict=True):
        assert_close(mine, right, rtol=0, atol=1e-12)


@dataclass(frozen=True, eq=False)
class Slopes(PositionBias):
    """ALiBi with learned slopes: -slope * |distance|, one slope per head. Nothing outside this class knows of it."""

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
def test_a_position_bias_is_one_class(case):
    """A bias that the library does not know: out and all gradients are the oracle's."""
    results = []
    for function in (dilated_attention, dense_reference):
        inputs = case.tensors()
        q, k, v = (inputs[name] for name in "qkv")
        slopes = torch.linspace(0.1, 1, case.H, dtype=torch.float64)[None].requires_grad_()
        out = function(q, k, v, case.pattern, causal=case.causal, bias=Slopes(slopes, power=0.5))
        results.append([out, *torch.autograd.grad(out, (q, k, v, slopes), case.dout())])
    for mine, expected in zip(*results, strict=True):
        assert_close(mine, expected, rtol=0, atol=1e-11)


def test_saves_q_k_v_out_lse_and_nothing_more():
    q, k, v = (torch.randn(1, 64, 4, 8, requires_grad=True) for _ in range(3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        out, lse = dilated_attention(q, k, v, PAPER, causal=True, return_lse=True)
    storages = {x.untyped_storage().data_ptr() for x in saved}
    assert storages == {x.untyped_storage().data_ptr() for x in (q, k, v, out, lse)}
    assert sum(x.numel() for x in saved) == sum(x.numel() for x in (q, k, v, out, lse))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Those of Inductor in torch 2.11.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=DEVICES[1].marks)])
def test_compiles_without_a_graph_break(backend):
    def function(q, k, v):
        out, lse = dilated_attention(q, k, v, PAPER, causal=True, return_lse=True)
        return out.square() + lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)

    case = Case(PAPER, N=50, H=4, G=2, B=1, D=8, causal=True)
    on_gpu = backend == "inductor"
    where = {"device": "cuda", "dtype": torch.bfloat16} if on_gpu else {"dtype": torch.float64}
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend=backend)):
        # Heads before tokens in memory, as many models have them.
        given = [x.detach().to(**where).transpose(1, 2).contiguous() for x in case.tensors().values()]
        inputs = [x.transpose(1, 2).requires_grad_() for x in given]
        out = call(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, case.dout().to(**where))])
    for compiled, eager in zip(results[1], results[0], strict=True):
        assert_close(compiled, eager, **({} if on_gpu else {"rtol": 0, "atol": 1e-14}))


@pytest.mark.parametrize("has_bias", [False, True])
def test_no_value_is_read_back(has_bias):
    """What a CUDA graph, or an asynchronous device, needs of both operators: the host decides nothing by a tensor."""
    case = Case(PAPER, N=100, H=6, G=6, B=2, D=8, causal=True)
    bias = {"bias": T5Bias(torch.zeros(8, 6, dtype=torch.float64, requires_grad=True))} if has_bias else {}
    with torch.profiler.profile(acc_events=True) as seen:
        ours(case, **bias)
    names = {event.key for event in seen.key_averages()}
    assert "longnet_dist::dilated_attention_backward" in names
    assert not names & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kernel", ["torch", "eager"])
def test_in_a_cuda_graph(kernel):
    inputs = [torch.randn(1, 100, 4, 16, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

    def step():
        # Leaves of this stream: torch warns of those that were made on another.
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = dilated_attention(*leaves, PAPER, causal=True, kernel=kernel)
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for x in inputs:
        x.copy_(torch.randn_like(x))
    graph.replay()
    for mine, expected in zip(found, step(), strict=True):
        assert_close(mine, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_inputs_at_any_address(device, offset):
    """Views into a larger buffer: CUDA's flash kernels load 16 bytes at once, and torch does not check for that."""
    dtype = torch.bfloat16
    fused = torch.randn(64 * (3 * 2 * 16 + 3) + offset, dtype=dtype, device=device)[offset:].view(1, 64, -1)
    views = fused[..., : 3 * 2 * 16].unflatten(-1, (3, 2, 16)).unbind(2)
    results = []
    for inputs in (views, [x.clone(memory_format=torch.contiguous_format) for x in views]):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = dilated_attention(*leaves, PAPER, causal=True)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for mine, expected in zip(*results, strict=True):
        assert_close(mine, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pattern", [PAPER, Pattern((64,), (1,))])
@pytest.mark.parametrize("kernel", ["torch", "eager"])
@pytest.mark.parametrize("heads_first", [False, True])
def test_operators_keep_torchs_rules(device, pattern, kernel, heads_first):
    """Also of strides: a fake that promises others than the real operator gives fails in code that Inductor made."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float64
    inputs = torch.randn(3, 2, 20, 2, 8, dtype=dtype, device=device).unbind()
    if heads_first:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    branches = [list(pattern.segment_lengths), list(pattern.dilation_rates)]
    options = Options(*branches, "interleaved", True, 0.5, kernel, "", 0, 0, 0)
    operators = torch.ops.longnet_dist
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(operators.dilated_attention.default, (q, k, v, None, *options), test_utils=tests)
    with torch.no_grad():
        out, lse, kept = operators.dilated_attention(q, k, v, None, *options)
        given = (torch.randn_like(q), q, k, v, out, lse, kept, None)
        arguments = (*(x if x is None else x.detach() for x in given), *options)
    torch.library.opcheck(
        operators.dilated_attention_backward.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_fake_tensors_pass_through():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.empty(2, 1000, 8, 64, dtype=torch.bfloat16), torch.empty(2, 1000, 2, 64, dtype=torch.bfloat16)
        out, lse = dilated_attention(q, k, k, PAPER, return_lse=True)
    assert out.shape == q.shape
    assert out.dtype == torch.bfloat16
    assert lse.shape == q.shape[:-1]
    assert lse.dtype == torch.float32


def test_selective_checkpointing_saves_the_attention():
    from functools import partial

    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    op = torch.ops.longnet_dist.dilated_attention.default
    ran = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ran.append(function)
            return function(*args, **(kwargs or {}))

    q = torch.randn(1, 64, 4, 8, requires_grad=True)
    with Count():
        contexts = partial(create_selective_checkpoint_contexts, [op])
        out = checkpoint(
            lambda x: dilated_attention(x * 2, x, x, PAPER).square(), q, use_reentrant=False, context_fn=contexts
        )
        out.sum().backward()
    assert ran.count(op) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q": torch.zeros(1, 8, 2)}, r"q is \(1, 8, 2\); it must be \(B, N, H, D\)"),
        ({"v": torch.zeros(1, 8, 1, 4)}, "k and v must have the same shape"),
        ({"q": torch.zeros(1, 9, 2, 4)}, "the same B, N and D"),
        ({"q": torch.zeros(1, 8, 3, 4)}, "3 query heads cannot share 2"),
        ({"q": torch.zeros(1, 8, 2, 4, dtype=torch.float64)}, "one dtype"),
        ({"pattern": (8, 1)}, "must be a longnet_dist.Pattern"),
        ({"kernel": "warp"}, "'warp'; it must be one of auto, torch, eager"),
        ({"kernel": "torch", "bias": T5Bias(torch.zeros(8, 2))}, "torch: it has no gradient for a position bias"),
        ({"bias": T5Bias(torch.zeros(8, 3))}, "with H = 2"),
        ({"bias": T5Bias(torch.zeros(7, 2))}, "7 buckets"),
        ({x: torch.zeros(1, 8, 2, 4, dtype=torch.int64) for x in "qkv"}, "not a floating dtype"),
    ],
)
def test_bad_arguments_say_what_would_work(change, said):
    given = dict.fromkeys("qkv", torch.zeros(1, 8, 2, 4)) | {"pattern": Pattern((8,), (1,))} | change
    with pytest.raises(ValueError, match=said):
        dilated_attention(**given)


def test_a_named_kernel_never_falls_back(monkeypatch):
    from longnet_dist.attention.kernels import eager

    monkeypatch.setattr(eager, "forward", lambda *a, **k: pytest.fail("fell back to eager"))
    dilated_attention(*torch.zeros(3, 1, 8, 2, 4).unbind(), Pattern((8,), (1,)), kernel="torch")
