"""A failure here means: the results of branches are mixed wrongly, or in more memory than they should be."""

from __future__ import annotations

import importlib.util
import itertools
import math
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from longnet_dist import Pattern, dense_reference, dilated_attention
from longnet_dist.attention import merging
from longnet_dist.attention.merging import collected, merged_rows, summed_rows
from longnet_dist.attention.rows import pieces, rectangle
from longnet_dist.plan.blocks import Heads, Rows, make_plan
from longnet_dist.plan.shard import Shard
from tests.cases import NO_INTERPRETER, Case, cases

# The interpreter of Triton below 3.9 warns so with NumPy before 2.4.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
LOW = [torch.bfloat16, torch.float16]
Drawn = list[tuple[int, Heads, Rows, Tensor, Tensor]]


def draw_pieces(case: Case, dtype: torch.dtype) -> Drawn:
    """Return (branch, heads, rows, out, lse) of the rectangles of a case, in random memory layouts.

    Every other rectangle comes twice, as if its queries attended two sets of keys.
    """
    generator = torch.Generator().manual_seed(case.seed)
    drawn = []
    for number, block in enumerate(make_plan(case.pattern, Shard(case.N, max(1, case.N)), case.G, True).local):
        for heads, rows in list(pieces(block.heads, block.rows)) * (1 + number % 2):
            shape = case.B, rows.segments, heads.phases, rows.count, heads.per_phase, case.H // case.G
            out = torch.randn(*shape, case.D, generator=generator).to(dtype)
            lse = 20 * torch.randn(shape, generator=generator)
            if number % 3:  # Kernels may return heads before rows, and exchanges rows before sequences.
                out, lse = (x.transpose(0, 3).contiguous().transpose(0, 3) for x in (out, lse))
            drawn.append((block.branch, heads, rows, out, lse))
    return drawn


def like(case: Case, dtype: torch.dtype) -> Tensor:
    return torch.empty(case.B, case.N, case.G, case.H // case.G, case.D, dtype=dtype)


def merge_in_float64(case: Case, drawn: Drawn) -> tuple[Tensor, Tensor, Tensor]:
    """Return the softmax-weighted mean, the lse and the plain sum of the pieces, by the definitions."""
    shape = like(case, torch.float64).shape
    # Shift each row by its largest lse, so that nothing overflows.
    top = torch.full(shape[:-1], -torch.inf, dtype=torch.float64)
    for _, heads, rows, _, lse in drawn:
        target = rectangle(top, heads, rows)
        target.copy_(torch.maximum(target, lse.double()))
    weighted, plain = torch.zeros(2, *shape, dtype=torch.float64).unbind()
    denominator = torch.zeros_like(top)
    for _, heads, rows, out, lse in drawn:
        weight = (lse.double() - rectangle(top, heads, rows)).exp()
        rectangle(denominator, heads, rows).add_(weight)
        rectangle(weighted, heads, rows).add_(weight.unsqueeze(-1) * out.double())
        rectangle(plain, heads, rows).add_(out.double())
    return weighted / denominator.clamp(min=1).unsqueeze(-1), top + denominator.log(), plain


def merge(case: Case, dtype: torch.dtype, drawn: Drawn) -> tuple[Tensor, Tensor, Tensor]:
    """Merge and sum the pieces in low precision; returns out, lse and sum."""
    merged, summed = (make(like(case, dtype), 1 << 30) for make in (merged_rows, summed_rows))
    for branch, heads, rows, out, lse in drawn:
        merged.merge(branch, heads, rows, out.clone(), lse)
        summed.add(branch, heads, rows, out.clone())
    return *merged.result(), summed.result()


def check(case: Case, dtype: torch.dtype) -> None:
    """Compare with the definitions: one rounding to the dtype is allowed, and a few in float32."""
    drawn = draw_pieces(case, dtype)
    results, expected = merge(case, dtype, drawn), merge_in_float64(case, drawn)
    assert [x.dtype for x in results] == [dtype, torch.float32, dtype]
    eps = torch.finfo(dtype).eps
    for actual, exact, rtol, atol in zip(results, expected, (eps, 1e-6, eps), (1e-6, 1e-5, 1e-5), strict=True):
        assert_close(actual.double(), exact, rtol=rtol, atol=atol)


@pytest.fixture
def small_chunks(monkeypatch):
    """Merge one head and few columns at a time, as for large tensors."""
    monkeypatch.setattr(collected, "_CHUNK", 0)
    monkeypatch.setattr(collected, "_COLUMNS", 3)


def load_interpreted(name: str = "merging.triton_kernel") -> ModuleType:
    """Return a second copy of a Triton kernel's module, which is interpreted on the CPU."""
    importlib.import_module("triton")  # It must not be imported for the interpreter alone.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.find_spec(f"longnet_dist.attention.{name}")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def triton_kernel() -> ModuleType:
    if NO_INTERPRETER:
        pytest.skip(NO_INTERPRETER)
    return load_interpreted()


@pytest.fixture
def interpreted(triton_kernel, monkeypatch):
    """Merge by the interpreted Triton kernel on the CPU, as on a GPU."""
    monkeypatch.setattr(merging, "triton_kernel", triton_kernel, raising=False)
    monkeypatch.setattr(collected, "uses_triton", lambda out: True)
    return triton_kernel


DRAWN = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("dtype", LOW)
@settings(DRAWN, max_examples=50)
@given(case=cases())
def test_drawn_pieces_merge_as_defined(dtype, case):
    check(case, dtype)


@settings(DRAWN, max_examples=50)
@given(case=cases())
def test_drawn_pieces_merge_head_by_head_as_defined(small_chunks, case):
    check(case, torch.bfloat16)


@pytest.mark.parametrize("dtype", LOW)
@settings(DRAWN, max_examples=8)
@given(case=cases(longest=24))
def test_drawn_pieces_merge_by_triton_as_defined(interpreted, dtype, case):
    check(case, dtype)


@pytest.mark.parametrize(("head_dim", "num_tokens"), [(1, 300), (80, 300), (256, 140)])
def test_triton_merges_several_tiles_of_rows(interpreted, head_dim, num_tokens):
    """A tile has 128 rows, and pieces reach only some of the tiles."""
    pattern = Pattern((64, 100, 300), (1, 3, 7))
    check(Case(pattern, N=num_tokens, H=2, G=2, B=1, D=head_dim, causal=True), torch.float16)


def test_triton_takes_more_addresses_than_one_launch_writes(interpreted, monkeypatch):
    case = Case(Pattern((8, 9, 16, 40), (1, 5, 4, 7)), N=43, H=5, G=5, B=1, D=8, causal=True)
    assert len(draw_pieces(case, torch.float16)) > interpreted._ADDRESSES
    for many in (interpreted._MANY, 1):
        monkeypatch.setattr(interpreted, "_MANY", many)
        check(case, torch.float16)


@pytest.mark.parametrize("by", ["torch", "triton"])
def test_the_bits_do_not_depend_on_the_order_in_which_branches_come(by, request):
    """Sums are (large + small) - large, so that float32 loses the small number in the order of branches alone."""
    if by == "triton":
        request.getfixturevalue("interpreted")
    case = Case(Pattern((16,), (1,)), N=16, H=1, G=1, B=1, D=8, causal=True)
    ((_, heads, rows, out, lse),) = draw_pieces(case, torch.bfloat16)
    values = 2.0**30, 1.0, -(2.0**30)
    drawn = [(n, heads, rows, torch.full_like(out, x), torch.zeros_like(lse)) for n, x in enumerate(values)]
    for order in itertools.permutations(drawn):
        out, _, total = merge(case, torch.bfloat16, list(order))
        assert (out == 0).all()
        assert (total == 0).all()


@pytest.mark.parametrize("by", ["torch", "triton"])
def test_the_result_of_every_row_becomes_the_result(by, request):
    """Its memory is used again, unless it is a part of larger memory."""
    if by == "triton":
        request.getfixturevalue("interpreted")
    case = Case(Pattern((16, 64), (1, 4)), N=128, H=4, G=4, B=1, D=8, causal=True)
    drawn = draw_pieces(case, torch.bfloat16)
    drawn = [(*piece[:3], piece[3].contiguous(), piece[4]) for piece in drawn]
    expected = merge(case, torch.bfloat16, drawn)
    whole = next(n for n, piece in enumerate(drawn) if piece[3].numel() == math.prod(like(case, torch.bfloat16).shape))
    for larger in (False, True):
        out = torch.stack([drawn[whole][3]] * (1 + larger))[0]
        merged = merged_rows(like(case, torch.bfloat16), 1 << 30)
        for n, (branch, heads, rows, part, lse) in enumerate(drawn):
            merged.merge(branch, heads, rows, out if n == whole else part, lse)
        result, lse = merged.result()
        assert (result.data_ptr() == out.data_ptr()) != larger
        assert_close((result, lse), expected[:2], rtol=0, atol=0)


class Float32Sizes(TorchDispatchMode):
    """Records the largest float32 or float64 tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype in (torch.float32, torch.float64):
            self.largest = max(self.largest, result.numel())
        return result


def test_no_float32_tensor_is_as_large_as_the_result():
    case = Case(Pattern((1024, 2048, 8192), (1, 2, 8)), N=8192, H=4, G=2, B=2, D=64, causal=True)
    drawn = draw_pieces(case, torch.bfloat16)
    with Float32Sizes() as sizes:
        merge(case, torch.bfloat16, drawn)
    assert sizes.largest <= case.N * collected._COLUMNS == case.B * case.N * case.H * case.D // 16


def check_against_oracle(case: Case, dtype: torch.dtype) -> None:
    """Allow at most twice the error of dense attention in the same dtype, and of one rounding."""
    rounded = {name: x.detach().to(dtype).double().requires_grad_() for name, x in case.tensors().items()}
    low = {name: x.detach().to(dtype).requires_grad_() for name, x in rounded.items()}
    out = dilated_attention(**case.arguments(low))
    actual = [out, *torch.autograd.grad(out, list(low.values()), case.dout(dtype))]
    exact_out = dense_reference(**case.arguments(rounded))
    exact = [exact_out, *torch.autograd.grad(exact_out, list(rounded.values()), case.dout(dtype).double())]
    for x, dense, expected in zip(actual, case.oracle(dtype, low), exact, strict=True):
        if expected.numel():
            rounding = torch.finfo(dtype).eps * expected.abs().max().clamp(min=1)
            limit = 2 * ((dense.double() - expected).abs().max() + rounding)
            assert_close(x.double(), expected, rtol=0, atol=limit.item())


@pytest.mark.parametrize("dtype", LOW)
@settings(DRAWN, max_examples=40)
@given(case=cases())
def test_drawn_cases_are_as_near_the_oracle_as_dense_attention(dtype, case):
    check_against_oracle(case, dtype)


@pytest.mark.parametrize("phases", ["interleaved", "blocked"])
def test_attention_merged_by_triton_is_as_near_the_oracle_as_dense_attention(interpreted, phases):
    """The first pattern leaves some rows to nobody, and in the second, r does not divide w."""
    for pattern in (Pattern((7, 15), (7, 2), phases), Pattern((8, 24), (1, 5), phases)):
        case = Case(pattern, N=35, H=6, G=3, B=2, D=8, causal=True)
        check_against_oracle(case, torch.bfloat16)


def test_rows_that_nobody_covers_are_zero_with_no_keys():
    q = torch.randn(1, 20, 2, 8, dtype=torch.bfloat16)
    out, lse = dilated_attention(q, q, q, Pattern((7,), (7,)), return_lse=True)
    covered = torch.zeros(20, 2, dtype=torch.bool)
    covered[0::7, 0] = covered[1::7, 1] = True
    assert (out[0][~covered] == 0).all()
    assert (lse[0][~covered] == -torch.inf).all()
    assert_close(out[0][covered], q[0][covered])  # Such a row sees only itself.
    assert lse[0][covered].isfinite().all()


@pytest.mark.parametrize("by", ["torch", "triton"])
def test_a_result_over_no_keys_has_no_weight(by, request):
    """Its lse is -inf, as that of a row that nobody covers."""
    if by == "triton":
        request.getfixturevalue("interpreted")
    case = Case(Pattern((4, 4), (1, 1)), N=4, H=1, G=1, B=1, D=8, causal=True)
    (_, heads, rows, out, lse), *_ = draw_pieces(case, torch.bfloat16)
    empty = lse.clone()
    empty[0, 0, 0, :2] = -torch.inf
    nothing = torch.full_like(lse, -torch.inf)
    merged, merged_lse, _ = merge(case, torch.bfloat16, [(0, heads, rows, out, empty), (1, heads, rows, -out, nothing)])
    assert_close(merged.flatten(0, 3)[2:], out.flatten(0, 5)[2:])
    assert_close(merged_lse.flatten()[2:], lse.flatten()[2:])
    assert (merged.flatten(0, 3)[:2] == 0).all()
    assert (merged_lse.flatten()[:2] == -torch.inf).all()
