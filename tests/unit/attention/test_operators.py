"""A failure here means: the operators break a rule of torch that compilation, CUDA graphs or checkpointing rely on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from longnet_dist import Pattern, T5Bias, dilated_attention
from longnet_dist.attention.arguments import Options
from longnet_dist.attention.kernels import KERNELS, KernelRequest, torch_flash
from longnet_dist.functional import scaled_dot_product_dilated_attention
from tests.cases import CPU_KERNELS, DEVICES, PAPER, Case, output_and_gradients

LAYOUTS = {
    "contiguous": lambda x: x,
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded heads": lambda x: x[:, :, :1].expand(-1, -1, x.shape[2], -1),
    "expanded batch": lambda x: x[:1].expand(len(x), -1, -1, -1),
    "expanded everywhere": lambda x: x[:1, :1, :1, :1].expand_as(x),
    "sliced": lambda x: torch.cat([x, x], -1)[..., 8:],
    "every other token": lambda x: torch.cat([x, x], 1)[:, ::2],
    "last dimension strided": lambda x: torch.stack([x, x], -1)[..., 0],
}
"""Functions that give a tensor (B, N, H, D), with D = 8, other strides."""


def test_only_q_k_v_out_and_lse_are_saved_for_the_backward():
    q, k, v = (torch.randn(1, 64, 4, 8, requires_grad=True) for _ in range(3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        out, lse = dilated_attention(q, k, v, PAPER, causal=True, return_lse=True)
    storages = {x.untyped_storage().data_ptr() for x in saved}
    assert storages == {x.untyped_storage().data_ptr() for x in (q, k, v, out, lse)}
    assert sum(x.numel() for x in saved) == sum(x.numel() for x in (q, k, v, out, lse))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor raises some in torch 2.11.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=DEVICES[1].marks)])
def test_compiles_without_graph_breaks(backend):
    def function(q, k, v):
        out, lse = dilated_attention(q, k, v, PAPER, causal=True, return_lse=True)
        return out.to(lse.dtype).square() + lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)

    case = Case(PAPER, N=50, H=4, G=2, B=1, D=8, causal=True)
    on_gpu = backend == "inductor"
    options = {"device": "cuda", "dtype": torch.bfloat16} if on_gpu else {"dtype": torch.float64}
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend=backend)):
        # Heads come before tokens in memory, as in many models.
        heads_first = [x.detach().to(**options).transpose(1, 2).contiguous() for x in case.tensors().values()]
        inputs = [x.transpose(1, 2).requires_grad_() for x in heads_first]
        out = call(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, case.dout().to(**options))])
    for compiled, eager in zip(results[1], results[0], strict=True):
        assert_close(compiled, eager, **({} if on_gpu else {"rtol": 0, "atol": 1e-14}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("layout", ["heads first", "expanded heads"])
@pytest.mark.parametrize("door", ["dilated_attention", "functional"])
def test_inductor_on_a_cpu_takes_the_strides_that_the_fakes_promise(layout, door):
    pattern = Pattern((16, 64), (1, 4))

    def function(q):
        if door == "dilated_attention":
            return dilated_attention(q, q, q, pattern, causal=True) * 1.5
        return scaled_dot_product_dilated_attention(q, q, q, pattern, is_causal=True) * 1.5

    q = LAYOUTS[layout](torch.randn(1, 64, 4, 8))
    q = (q if door == "dilated_attention" else q.transpose(1, 2)).requires_grad_()
    torch.compiler.reset()
    out, compiled = function(q), torch.compile(function, fullgraph=True)(q)
    assert_close(compiled, out)
    dout = torch.randn_like(out)
    assert_close(torch.autograd.grad(compiled, q, dout), torch.autograd.grad(out, q, dout))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_compiled_graph_serves_all_lengths_and_batches(backend):
    torch.compiler.reset()
    call = torch.compile(lambda q, k, v: dilated_attention(q, k, v, PAPER, causal=True) * 1.5, dynamic=True,
                         fullgraph=True, backend=backend)  # fmt: skip
    for number, (B, N) in enumerate([(2, 50), (3, 64), (2, 131), (5, 37)]):
        inputs = torch.randn(3, B, N, 4, 8, dtype=torch.float64).unbind()
        inputs = [x.requires_grad_() for x in inputs]
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            compiled = call(*inputs)
        out = dilated_attention(*inputs, PAPER, causal=True) * 1.5
        assert_close(compiled, out)
        grads = (torch.autograd.grad(x.sum(), inputs) for x in (compiled, out))
        assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cpu_computes_in_the_faster_dtype(dtype):
    """For float16 that is float32 on every CPU; for bfloat16 it depends on the CPU."""
    dtypes = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "flash_attention" in str(function):
                dtypes.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    inputs = torch.randn(4, 2, 30, 3, 8).to(dtype).unbind()
    with Record():
        out, lse = torch_flash.forward(*inputs[1:], causal=True, scale=0.3)
        grads = torch_flash.backward(*inputs, out, lse, causal=True, scale=0.3)[:3]
    native = dtype == torch.bfloat16 and "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    assert dtypes == [dtype if native else torch.float32] * 2
    assert all(x.dtype == dtype for x in (out, *grads))
    exact = [x.double() for x in inputs[1:]]
    expected = torch_flash.forward(*exact, causal=True, scale=0.3)
    expected_grads = torch_flash.backward(inputs[0].double(), *exact, *expected, causal=True, scale=0.3)[:3]
    for actual, reference in zip((out, *grads), (expected[0], *expected_grads), strict=True):
        assert_close(actual.double(), reference, rtol=0, atol=8 * torch.finfo(dtype).eps * reference.abs().max().item())


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_host_reads_no_tensor_value(has_bias):
    """CUDA graphs and asynchronous devices require it of the forward and the backward operator."""
    case = Case(PAPER, N=100, H=6, G=6, B=2, D=8, causal=True)
    bias = {"bias": T5Bias(torch.zeros(8, 6, dtype=torch.float64, requires_grad=True))} if has_bias else {}
    with torch.profiler.profile(acc_events=True) as profile:
        output_and_gradients(case, **bias)
    names = {event.key for event in profile.key_averages()}
    assert "longnet_dist::dilated_attention_backward" in names
    assert not names & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pattern", [PAPER, Pattern((64,), (1,))])
@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_pass_torchs_opcheck(device, pattern, kernel, layout):
    """This includes strides: Inductor's code fails if the fake operator promises other strides than the real one."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float64
    if KERNELS[kernel].unsupported(KernelRequest(torch.device(device), dtype, 8)):
        pytest.skip(f"{kernel} does not serve {device}")
    inputs = torch.randn(3, 2, 20, 2, 8, dtype=dtype, device=device).unbind()
    q, k, v = (LAYOUTS[layout](x).detach().requires_grad_() for x in inputs)
    branches = [list(pattern.segment_lengths), list(pattern.dilation_rates)]
    options = Options(*branches, "interleaved", True, 0.5, kernel, "", 0, 0, 0)
    operators = torch.ops.longnet_dist
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(operators.dilated_attention.default, (q, k, v, None, None, *options), test_utils=tests)
    with torch.no_grad():
        out, lse, kept_kv = operators.dilated_attention(q, k, v, None, None, *options)
        tensors = (LAYOUTS[layout](torch.randn_like(q)), q, k, v, out, lse, kept_kv, None, None)
        arguments = (*(x if x is None else x.detach() for x in tensors), *options)
    torch.library.opcheck(
        operators.dilated_attention_backward.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_fake_tensors_give_fake_results():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.empty(2, 1000, 8, 64, dtype=torch.bfloat16), torch.empty(2, 1000, 2, 64, dtype=torch.bfloat16)
        out, lse = dilated_attention(q, k, k, PAPER, return_lse=True)
    assert out.shape == q.shape
    assert out.dtype == torch.bfloat16
    assert lse.shape == q.shape[:-1]
    assert lse.dtype == torch.float32


def test_selective_checkpointing_does_not_recompute_the_attention():
    from functools import partial

    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    op = torch.ops.longnet_dist.dilated_attention.default
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    q = torch.randn(1, 64, 4, 8, requires_grad=True)
    with Count():
        contexts = partial(create_selective_checkpoint_contexts, [op])
        out = checkpoint(
            lambda x: dilated_attention(x * 2, x, x, PAPER).square(), q, use_reentrant=False, context_fn=contexts
        )
        out.sum().backward()
    assert calls.count(op) == 1
