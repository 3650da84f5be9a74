"""A failure here means: a version of flash-attn is called with what it does not accept, or the wrong one is taken.

No version runs without a GPU. So stand-ins take their places: functions with the parameters of the real ones, which
check what they get as the real ones do, and compute with the eager kernel.
"""

from __future__ import annotations

import sys
import types
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.testing import assert_close

from longnet_dist import Pattern, dense_reference, dilated_attention, internals
from longnet_dist.attention.kernels import KERNELS, KernelRequest, choose_kernel, eager, flash
from tests.cases import PAPER, Case, cases, output_and_gradients
from tests.unit.attention.flash_signatures import PARAMETERS, signature

IDLE_OPTIONS = {"dropout_p": 0.0, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0}
IDLE_OPTIONS |= {"alibi_slopes": None, "return_softmax": False, "deterministic": False, "return_lse": True}
BFLOAT16 = 4 * torch.finfo(torch.bfloat16).eps


class StandIn:
    """The functions of one version; `calls` counts them by name."""

    def __init__(self, version: tuple[int, str]) -> None:
        self.number = version[0]
        self.calls: Counter[str] = Counter()
        self.module = types.ModuleType(internals.FLASH_ATTN[self.number])
        for name, parameters in PARAMETERS[version].items():
            setattr(self.module, name, self.function(name, parameters))

    def function(self, name, parameters):
        def called(*args, **options):
            self.calls[name] += 1
            given = signature(parameters).bind(*args, **options).arguments
            given = {key: value for key, value in given.items() if value is not None}
            tensors = {key: given.pop(key) for key in ("dout", "q", "k", "v", "out") if key in given}
            results = [given.pop(key) for key in ("dq", "dk", "dv") if key in given]
            lse = given.pop("softmax_lse", given.pop("lse", None))
            causal = given.pop("causal", given.pop("is_causal", None))
            scale = given.pop("softmax_scale")
            sizes = [given.pop(key, None) for key in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")]
            for key, value in given.items():
                assert IDLE_OPTIONS[key] == value, key
            check_tensors(tensors, results, lse)
            assert isinstance(causal, bool)
            assert isinstance(scale, float)
            computed = attend(tensors, lse, sizes, causal, scale)
            if len(tensors) == 3:
                return computed if self.number == 3 else (*computed, None, None)
            if self.number == 4:
                return computed
            assert len(results) == 3
            for result, grad in zip(results, computed, strict=True):
                result.copy_(grad)
            return lse

        return called


def check_tensors(tensors, results, lse):
    """Check what all versions demand; float64 is allowed, so that results can be compared exactly."""
    for x in tensors.values():
        assert x.dtype in (torch.bfloat16, torch.float16, torch.float64)
        assert x.stride(-1) == 1
        assert x.data_ptr() % 16 == 0
        assert all(stride * x.itemsize % 16 == 0 for n, stride in zip(x.shape, x.stride()[:-1], strict=False) if n > 1)
    for result, name in zip(results, "qkv", strict=False):
        assert result.is_contiguous()
        assert result.shape == tensors[name].shape
    if lse is not None:
        assert lse.is_contiguous()
        assert lse.dtype == torch.promote_types(tensors["q"].dtype, torch.float32)
        rows_last = tensors["q"].shape[:-1]
        assert lse.shape == (*rows_last[:-2], rows_last[-1], rows_last[-2])


def attend(tensors, lse, sizes, causal, scale):
    """Compute out and lse, or the gradients, of rectangles or of packed squares."""
    offsets, also, longest, also_longest = sizes
    if offsets is None:
        return compute(tensors, lse, causal, scale)
    assert offsets is also
    assert longest == also_longest == offsets.diff().max()
    assert offsets.dtype == torch.int32
    parts = []
    for first, end in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        square = {name: x[None, first:end] for name, x in tensors.items()}
        parts.append(compute(square, None if lse is None else lse[None, :, first:end], causal, scale))
    columns = [[x[0] for x in column] for column in zip(*parts, strict=True)]
    return tuple(torch.cat(column, dim=1 if column[0].dim() == 2 else 0) for column in columns)


def compute(tensors, lse, causal, scale):
    if lse is None:
        return eager.forward(**tensors, causal=causal, scale=scale)
    return eager.backward(**tensors, lse=lse, causal=causal, scale=scale)[:3]


@pytest.fixture(params=PARAMETERS, ids=lambda version: f"{version[0]}: {version[1]}")
def stand_in(request, monkeypatch):
    """Let a stand-in be the flash-attn of this process, and serve tensors on CPUs under the name "stand-in"."""
    module = StandIn(request.param)
    monkeypatch.setitem(sys.modules, module.module.__name__, module.module)
    monkeypatch.setattr(flash, "_calls", lambda q: flash._VERSIONS[module.number].calls)
    kernel = types.SimpleNamespace(**{name: getattr(flash, name) for name in dir(flash) if not name.startswith("_")})
    kernel.unsupported = lambda request: ["it has no bias"] * request.bias
    monkeypatch.setitem(KERNELS, "stand-in", kernel)
    return module


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases().map(lambda case: replace(case, biased=False, D=8)))
def test_every_version_equals_the_oracle(stand_in, case):
    for actual, expected in zip(output_and_gradients(case, kernel="stand-in"), case.oracle(), strict=True):
        assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_every_version_attends_documents_in_one_call_per_branch(stand_in):
    case = Case(PAPER, N=66, H=12, G=6, B=1, D=8, causal=True)
    offsets = torch.tensor([0, 20, 21, 50, 66])
    inputs = case.tensors()
    out = dilated_attention(**case.arguments(inputs), cu_seqlens=offsets, kernel="stand-in")
    grads = torch.autograd.grad(out, list(inputs.values()), case.dout())
    assert sum(stand_in.calls.values()) == 2 * len(PAPER.segment_lengths)
    alone = list(case.tensors().values())
    parts = zip(*(x.split(offsets.diff().tolist(), dim=1) for x in alone), strict=True)
    out_alone = torch.cat([dense_reference(*part, PAPER, causal=True) for part in parts], dim=1)
    expected = torch.autograd.grad(out_alone, alone, case.dout())
    assert_close([out, *grads], [out_alone, *expected], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("offset", [0, 1])
def test_every_version_takes_bfloat16_and_views_that_are_not_aligned(stand_in, offset):
    case = Case(Pattern((16, 64, 256), (1, 4, 16)), N=300, H=4, G=2, B=1, D=16, causal=False)
    rounded = [x.detach().to(torch.bfloat16) for x in (*case.tensors().values(), case.dout())]
    moved = [torch.empty(x.numel() + offset, dtype=x.dtype)[offset:].view(x.shape).copy_(x) for x in rounded]
    *leaves, dout = [x.requires_grad_(number < 3) for number, x in enumerate(moved)]
    out = dilated_attention(*leaves, case.pattern, kernel="stand-in")
    grads = torch.autograd.grad(out, leaves, dout)
    exact = [x.double().requires_grad_() for x in rounded[:3]]
    expected = dense_reference(*exact, case.pattern)
    expected_grads = torch.autograd.grad(expected, exact, rounded[3].double())
    for a, b in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert (a.double() - b).abs().max() < BFLOAT16 * b.abs().max().clamp(min=1)


def test_a_call_of_four_branches_makes_few_calls_of_flash_attention(stand_in):
    for N in (2048, 4096):
        stand_in.calls.clear()
        pattern = Pattern((N // 64, N // 16, N // 4, N), (1, 4, 16, 64))
        q = torch.randn(1, N, 16, 8, dtype=torch.bfloat16, requires_grad=True)
        dilated_attention(q, q, q, pattern, causal=True, kernel="stand-in").sum().backward()
        assert sum(stand_in.calls.values()) == 20, stand_in.calls  # 10 in each direction.


def request_for(capability, head_dim=128, **needs):
    dtype = needs.pop("dtype", torch.bfloat16)
    return KernelRequest(torch.device("cuda"), dtype, head_dim, capability=capability, **needs)


@pytest.mark.parametrize(
    ("capability", "installed", "head_dim", "chosen"),
    [
        ((9, 0), (2, 3, 4), 128, 3),
        ((9, 0), (2, 4), 128, 4),
        ((9, 0), (2,), 128, 2),
        ((10, 0), (2, 3, 4), 128, 4),
        ((10, 0), (2, 4), 192, 2),  # flash-attn-4 stops at 128 there, except for 256.
        ((10, 0), (2, 4), 256, 4),
        ((8, 0), (2, 3, 4), 128, 2),
        ((8, 0), (4,), 128, None),
        ((8, 6), (2,), 200, None),
        ((12, 0), (2, 4), 64, 2),
        ((9, 0), (), 128, None),
        ((7, 5), (2, 3, 4), 128, None),
    ],
)
def test_the_fastest_version_that_is_installed_is_taken(capability, installed, head_dim, chosen, monkeypatch):
    missing = {number: None if number in installed else "is not installed" for number in (2, 3, 4)}
    monkeypatch.setattr(internals, "problem_of_flash_attn", missing.get)
    request = request_for(capability, head_dim)
    assert flash.version(request) == chosen
    assert (flash.unsupported(request) == []) == (chosen is not None)
    if capability >= (8, 0) and chosen is not None:
        assert choose_kernel("auto", request) is flash


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (KernelRequest(torch.device("cpu"), torch.bfloat16, 64), "it runs on CUDA, not on cpu"),
        (request_for((9, 0), dtype=torch.float32), "bfloat16 and float16, not torch.float32"),
        (request_for((9, 0), 264), "multiples of 8 up to 256, not 264"),
        (request_for((9, 0), 12), "multiples of 8 up to 256, not 12"),
        (request_for((9, 0), bias=True), "no gradient for a position bias"),
        (request_for((7, 5)), "compute capability 8.0 or above"),
        (request_for((9, 0)), "flash-attn-4 is not installed; flash-attn>=2.7.4 is not installed"),
    ],
)
def test_what_flash_attention_cannot_serve_is_refused_with_the_reason(request_, reason, monkeypatch):
    monkeypatch.setattr(internals, "problem_of_flash_attn", lambda number: "is not installed")
    with pytest.raises(ValueError, match="no kernel for"):
        choose_kernel("flash", request_)
    assert reason in "; ".join(flash.unsupported(request_))


def test_an_installation_that_does_not_import_is_a_reason_and_no_crash(tmp_path, monkeypatch):
    """As a wheel for another torch is."""
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('undefined symbol: _ZN3c104cuda')")
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("import flash_attn_2_cuda")
    monkeypatch.syspath_prepend(tmp_path)
    problem = internals.problem_of_flash_attn.__wrapped__
    assert problem(2) == problem(4) == "does not import: No module named 'flash_attn_2_cuda'"
    assert problem(3) == "does not import: OSError: undefined symbol: _ZN3c104cuda"
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    assert problem(2) == "is not installed"
