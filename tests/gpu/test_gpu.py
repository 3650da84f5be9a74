"""A failure here means: on a GPU, attention, loss or training is wrong, or takes more memory than it should."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.testing import assert_close

import longnet_dist
from longnet_dist import Pattern, T5Bias, dilated_attention
from longnet_dist.attention.kernels import KERNELS, KernelRequest, choose_kernel
from longnet_dist.attention.merging import collected
from longnet_dist.models.loss import linear_token_loss, token_loss
from longnet_dist.plan.blocks import make_plan
from longnet_dist.plan.shard import Shard
from tests.cases import PAPER, Case
from tests.gpu.test_kernels import largest_errors
from tests.unit.attention.test_merging import draw_pieces
from tests.unit.conftest import config  # noqa: F401

EPS = torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 192, 200, 208, 224, 256])
@pytest.mark.parametrize("G", [4, 1])
def test_every_head_dim_equals_the_oracle(head_dim, G):
    """Torch refuses to train with 193 to 224 on some GPUs; another kernel takes their place there."""
    case = Case(Pattern((64, 100, 300), (1, 3, 5)), N=300, H=4, G=G, B=2, D=head_dim, causal=True)
    errors = largest_errors(case)
    assert all(error < 4 * EPS for error in errors), errors  # Fails for NaN, too.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 40, 64, 96, 100, 128, 256])
@pytest.mark.parametrize(
    ("causal", "biased", "G"), [(True, False, 4), (False, False, 1), (True, True, 2), (False, True, 4)]
)
def test_triton_equals_the_oracle(dtype, head_dim, causal, biased, G):
    case = Case(Pattern((64, 100, 300), (1, 3, 5)), N=300, H=4, G=G, B=2, D=head_dim, causal=causal, biased=biased)
    inputs = {name: x.detach().to(dtype).cuda().requires_grad_() for name, x in case.tensors().items()}
    out = dilated_attention(**case.arguments(inputs), kernel="triton")
    results = [out, *torch.autograd.grad(out, list(inputs.values()), case.dout(dtype).cuda())]
    exact = {name: x.detach().double().cpu().requires_grad_() for name, x in inputs.items()}
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for actual, expected in zip(results, case.oracle(inputs=exact), strict=True):
        size = expected.abs().max().clamp(min=1)
        assert_close(actual.double().cpu() / size, expected / size, rtol=0, atol=tolerance)


@pytest.mark.parametrize("causal", [True, False])
def test_triton_equals_eager_where_its_blocks_are_large(causal):
    q, k, v, dout = torch.randn(4, 2, 700, 4, 64, device="cuda").unbind()
    k, v = k[:, :, :2], v[:, :, :2]
    actual, expected = [], []
    for kernel, results in (("triton", actual), ("eager", expected)):
        table = torch.linspace(-1, 1, 128, device="cuda").view(32, 4).requires_grad_()
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        bias = T5Bias(table, max_distance=500)
        out = dilated_attention(*inputs, Pattern((700, 512), (1, 2)), causal=causal, bias=bias, kernel=kernel)
        results += [out, *torch.autograd.grad(out, [*inputs, table], dout)]
    for a, b in zip(actual, expected, strict=True):
        size = b.abs().max().clamp(min=1)
        assert_close(a / size, b / size, rtol=0, atol=1e-5)


def test_triton_gives_equal_bits_twice():
    q = torch.randn(1, 4096, 4, 64, device="cuda", dtype=torch.bfloat16)
    results = []
    for _ in range(2):
        leaf = q.clone().requires_grad_()
        out = dilated_attention(leaf, leaf, leaf, Pattern((1024, 4096), (1, 4)), causal=True, kernel="triton")
        results.append((out, *torch.autograd.grad(out.sum(), leaf)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_triton_attends_many_short_rectangles():
    q = torch.randn(1, 140_000, 2, 16, device="cuda", requires_grad=True)
    out = dilated_attention(q, q, q, Pattern((2,), (1,)), causal=True, kernel="triton")
    out.sum().backward()
    assert_close(out[:, ::2], q[:, ::2])  # The first token of a segment sees only itself.
    assert q.grad.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "head_dim", "biased"),
    [(torch.float32, 64, False), (torch.bfloat16, 64, True), (torch.bfloat16, 40, True), (torch.bfloat16, 12, False)],
)
def test_what_flash_attention_refuses_is_computed_in_triton(dtype, head_dim, biased):
    chosen = choose_kernel("auto", KernelRequest(torch.device("cuda"), dtype, head_dim, bias=biased))
    assert chosen is KERNELS["triton"]


def test_float32_says_that_it_is_slow():
    from longnet_dist.attention.call import _warn_of_float32

    _warn_of_float32.cache_clear()
    q = torch.randn(1, 16, 2, 16, device="cuda")
    with pytest.warns(UserWarning, match="attention in float32 on a GPU is slow"):
        dilated_attention(q, q, q, Pattern((16,), (1,)))


def test_the_loss_of_a_large_vocabulary_reads_the_weights_gradient_few_times():
    """It is right, and never holds all logits."""
    torch.cuda.empty_cache()
    x = torch.randn(1, 8192, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(131_072, 256, device="cuda") / 16).bfloat16().requires_grad_()
    targets = torch.randint(131_072, (1, 8192), device="cuda")
    expected = token_loss(x[:, :512].float() @ weight.float().T, targets[:, :512])
    assert_close(linear_token_loss(x[:, :512], weight, targets[:, :512]).float(), expected, rtol=1e-3, atol=1e-3)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_token_loss(x, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < 3 * 2**30 < 8192 * 131_072 * 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute of a Tensor")
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"compile": True}])
def test_a_run_learns_and_resumes(config, options):  # noqa: F811
    """Autocast is the default for float32 parameters."""
    model = dataclasses.replace(config.model, num_heads=2, d_model=32)
    config = dataclasses.replace(config, steps=20, checkpoint_every=10, model=model, **options)
    whole = longnet_dist.train(config)
    assert whole.losses[-1] < 0.8 * whole.losses[0]
    saved = json.loads((config.run_folder / "config.json").read_text())
    assert saved["autocast"] == (config.dtype == "float32")
    for path in sorted((config.run_folder / "checkpoints").glob("step-*20")):
        path.rename(path.with_name("later"))
    resumed = longnet_dist.train(config)
    assert len(resumed.losses) == 10
    assert resumed.losses == pytest.approx(whole.losses[10:], rel=2e-2)


@pytest.mark.parametrize("causal", [True, False])
def test_memory_of_the_forward(causal):
    """Beside the inputs: the results of all branches, 4/3 of the output, lse, and the copied rows of one branch."""
    q, k, v = torch.randn(3, 1, 65_536, 16, 128, device="cuda", dtype=torch.bfloat16).unbind()
    pattern = Pattern.geometric(65_536, base=2048, growth=4)
    dilated_attention(q, k, v, pattern, causal=causal)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    dilated_attention(q, k, v, pattern, causal=causal)
    assert torch.cuda.max_memory_allocated() - before < 2 * q.nbytes


def drawn_pieces(case: Case, dtype: torch.dtype) -> list[collected.Piece]:
    """Return results of the rectangles of a case, by `draw_pieces`, on the GPU, in layouts that kernels return."""
    drawn = []
    for _, heads, rows, out, lse in draw_pieces(case, dtype):
        out, lse = (x.transpose(0, 3).contiguous().cuda().transpose(0, 3) for x in (out, lse))
        drawn.append(collected.Piece(heads, rows, out, lse))
    return drawn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [1, 3, 16, 80, 128, 256])
@pytest.mark.parametrize(
    "pattern", [PAPER, Pattern((64, 100, 300), (1, 3, 7), "blocked"), Pattern((7, 50), (7, 10))], ids=str
)
def test_the_triton_kernel_merges_as_torch_does(pattern, head_dim, dtype):
    """Both compute in float32 and round once, so they differ by one unit in the last place at most."""
    pytest.importorskip("triton")
    from longnet_dist.attention.merging import triton_kernel

    drawn = drawn_pieces(Case(pattern, N=333, H=6, G=3, B=2, D=head_dim, causal=True), dtype)
    for weighted in (True, False):
        results = []
        for combine in (triton_kernel.combine, triton_kernel.combine, collected.combine_by_torch):
            out = torch.full((2, 333, 3, 2, head_dim), torch.nan, dtype=dtype, device="cuda")
            lse = torch.full(out.shape[:-1], torch.nan, device="cuda") if weighted else None
            combine(drawn, out, lse)
            results.append([out] if lse is None else [out, lse])
        triton, again, by_torch = results
        assert_close(again, triton, rtol=0, atol=0)
        assert_close(triton[0], by_torch[0], rtol=torch.finfo(dtype).eps, atol=1e-5)
        if weighted:
            assert_close(triton[1], by_torch[1], rtol=1e-6, atol=1e-5)


def test_one_launch_merges_all_branches():
    """And one launch sums each of dq, dk and dv."""
    pytest.importorskip("triton")
    inputs = [torch.randn(1, 1024, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    pattern = Pattern((128, 512, 1024), (1, 2, 4))
    dilated_attention(*inputs, pattern, causal=True).sum().backward()  # Compiles the kernels.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        dilated_attention(*inputs, pattern, causal=True).sum().backward()
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["_combine"] == 4, counts


def test_merging_takes_no_more_than_it_must():
    """A copy of the results, and of the output, would be seen in the peak memory."""
    shape = 1, 65_536, 16, 1, 128
    like = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
    merged = collected.CollectedResults(like)
    for number, (w, r) in enumerate(((2048, 1), (8192, 4), (32_768, 16))):
        for block in make_plan(Pattern((w,), (r,)), Shard(65_536, 65_536), 16, True).local:
            heads, rows = block.heads, block.rows
            size = rows.segments, heads.phases, rows.count, heads.per_phase
            out = torch.randn(1, *size, 1, 128, device="cuda", dtype=torch.bfloat16)
            merged.merge(number, heads, rows, out, torch.randn(1, *size, 1, device="cuda"))
            del out
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, lse = merged.result()
    assert torch.cuda.max_memory_allocated() - before < like.nbytes / 8
    assert lse.isfinite().all()
    assert out.isfinite().all()
