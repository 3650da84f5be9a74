"""A failure here means: the Triton kernel computes something else than the definition, or serves what it cannot.

Triton's interpreter runs the kernels on the CPU. It must be switched on before triton is imported, so they run in a
process of their own.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import random
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch.testing import assert_close

from longnet_dist import Pattern, T5Bias
from longnet_dist.attention.bias import BiasOfRectangle
from longnet_dist.attention.kernels import KernelRequest, eager, triton
from tests.cases import NO_INTERPRETER, Case, output_and_gradients
from tests.distributed.test_packed_documents import Packed

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")


interpreted = pytest.mark.skipif(NO_INTERPRETER is not None, reason=str(NO_INTERPRETER))
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11}


@dataclass(frozen=True)
class Rectangle:
    """The shapes and options of one call of a kernel."""

    b: int
    I: int  # noqa: E741
    J: int
    G: int
    R: int
    D: int
    causal: bool
    dtype: torch.dtype = torch.float32
    key_runs: tuple[tuple[int, int], ...] = ()
    transposed: bool = False

    def tensors(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return q, dout, k and v; if `transposed`, heads before rows, and with a gap after each row."""
        torch.manual_seed(0)
        shapes = [(self.b, self.I, self.G * self.R, self.D)] * 2 + [(self.b, self.J, self.G, self.D)] * 2
        tensors = [torch.randn(shape).to(self.dtype).to(dtype) for shape in shapes]
        if self.transposed:
            wide = [x.new_full((*x.transpose(1, 2).shape[:-1], self.D + 3), torch.nan) for x in tensors]
            tensors = [w.transpose(1, 2)[..., : self.D].copy_(x) for w, x in zip(wide, tensors, strict=True)]
        return tensors

    def bias(self) -> BiasOfRectangle | None:
        """Return a T5 bias whose table differs between even and odd rectangles, if there are runs of keys."""
        if not self.key_runs:
            return None
        generator = torch.Generator().manual_seed(1)
        parameters = torch.randn(2, self.G * self.R, 8, generator=generator).repeat(self.b // 2, 1, 1)
        positions = [first + 3 * torch.arange(count) for first, count in self.key_runs]
        query = self.key_runs[0][0] if self.causal else 60
        return BiasOfRectangle(
            T5Bias(parameters[0].t(), 40), parameters, query + 3 * torch.arange(self.I), torch.cat(positions),
            torch.zeros(self.b, dtype=torch.int64), self.causal, 2, 3, (query, self.I), self.key_runs,
        )  # fmt: skip


def results(case: Rectangle, kernel, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return out, lse and the gradients from an out and lse that are merged with something else."""
    q, dout, k, v = case.tensors(dtype)
    options = {"causal": case.causal, "scale": 0.3, "bias": case.bias()}
    out, lse = kernel.forward(q, k, v, **options)
    merged = (0.8 * eager.forward(q.double(), k.double(), v.double(), **options)[0] + 0.1).to(case.dtype).to(dtype)
    *grads, dbias = kernel.backward(dout, q, k, v, merged, lse + 0.2, **options)
    if dbias is not None:
        grads.append(dbias.unflatten(0, (-1, 2)).sum(0))
    return [out, lse, *grads]


def results_of_squares(kernel, dtype: torch.dtype, causal: bool, D: int) -> list[torch.Tensor]:
    """Return out, lse and the gradients of packed squares, from an out and lse that are merged with something else."""
    torch.manual_seed(0)
    offsets = torch.tensor([0, 40, 41, 43, 110], dtype=torch.int32)
    q, dout, k, v = (torch.randn(heads, 110, D).to(dtype).transpose(0, 1) for heads in (4, 4, 2, 2))
    if kernel is not triton:
        q, dout, k, v = (x.double() for x in (q, dout, k, v))
    options = {"causal": causal, "scale": 0.3}
    out, lse = kernel.forward_packed(q, k, v, offsets, 67, **options)
    exact, _ = Packed().forward_packed(q.double(), k.double(), v.double(), offsets, 67, **options)
    merged = (0.8 * exact + 0.1).to(dtype).to(q.dtype)
    return [out, lse, *kernel.backward_packed(dout, q, k, v, merged, lse + 0.2, offsets, 67, **options)]


def squares_in_triton(*options) -> list[torch.Tensor]:
    return results_of_squares(triton, *options)


def interpret() -> None:
    """Prepare the process in which kernels are interpreted."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    # Of the interpreter, where a row that is not stored overflows.
    warnings.filterwarnings("ignore", category=RuntimeWarning)


def results_of_triton(case: Rectangle) -> list[torch.Tensor]:
    return results(case, triton, case.dtype)


def dilated_attention_in_triton(case: Case) -> list[torch.Tensor]:
    return [x.detach() for x in output_and_gradients(case, torch.float32, kernel="triton")]


@pytest.fixture(scope="module")
def interpreter():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), interpret) as executor:
        yield executor


def drawn(seed: int) -> Rectangle:
    """Draw a rectangle; every seed has another head dim or dtype."""
    draw = random.Random(seed)
    causal, biased = draw.random() < 0.5, draw.random() < 0.5
    num_queries = draw.randint(1, 70)
    num_keys = num_queries if causal else draw.randint(1, 70)
    G, R = draw.choice([(1, 1), (1, 2), (2, 1)])
    start = draw.randint(0, 4) * 3
    runs = ((start, num_keys),)
    if not causal and num_keys > 1:
        first = draw.randint(1, num_keys - 1)
        runs = ((start, first), (start + 3 * (first + draw.randint(0, 9)), num_keys - first))
    D, dtype = [(16, torch.float32), (40, torch.bfloat16), (64, torch.float32), (96, torch.float16)][seed % 4]
    runs = runs if biased else ()
    return Rectangle(2 if biased else 1, num_queries, num_keys, G, R, D, causal, dtype, runs, draw.random() < 0.5)


NAMED = [
    Rectangle(1, 70, 70, 1, 2, 16, True),
    Rectangle(2, 67, 67, 1, 1, 16, True, key_runs=((0, 67),)),
    Rectangle(2, 40, 70, 1, 1, 16, False, key_runs=((3, 33), (201, 37)), transposed=True),
    Rectangle(1, 1, 1, 1, 1, 128, True, torch.bfloat16),
    Rectangle(1, 20, 3, 1, 1, 256, False),
]


@interpreted
@pytest.mark.parametrize("case", [*NAMED, *map(drawn, range(8))], ids=str)
def test_rectangles_equal_eager_in_float64(interpreter, case):
    actual = interpreter.submit(results_of_triton, case).result()
    expected = results(case, eager, torch.float64)
    assert actual[0].dtype == case.dtype
    assert actual[1].dtype == torch.float32
    for a, b in zip(actual, expected, strict=True):
        size = max(1, b.abs().max().item())
        assert_close(a.double() / size, b.double() / size, rtol=0, atol=ROUNDING[case.dtype])


@interpreted
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("dtype", "D"), [(torch.float32, 16), (torch.bfloat16, 24)])
def test_packed_squares_equal_eager_in_float64(interpreter, dtype, D, causal):
    actual = interpreter.submit(squares_in_triton, dtype, causal, D).result()
    expected = results_of_squares(Packed(), dtype, causal, D)
    assert actual[0].dtype == dtype
    for a, b in zip(actual, expected, strict=True):
        size = max(1, b.abs().max().item())
        assert_close(a.double() / size, b.double() / size, rtol=0, atol=ROUNDING[dtype])


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        Case(Pattern((8, 16), (1, 2)), N=17, H=4, G=2, B=1, D=8, causal=True, biased=True),
        Case(Pattern((10, 20), (2, 5), "blocked"), N=23, H=2, G=2, B=1, D=16, causal=False, biased=True),
    ],
    ids=["causal", "full"],
)
def test_dilated_attention_equals_the_oracle(interpreter, case):
    actual = interpreter.submit(dilated_attention_in_triton, case).result()
    for a, b in zip(actual, case.oracle(), strict=True):
        assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_the_table_by_distance_has_every_bias_and_its_gradient(causal):
    runs = ((0, 12),) if causal else ((6, 5), (30, 7))
    bias = Rectangle(4, 12, 12, 2, 1, 8, causal, key_runs=runs).bias()
    values, indices = bias.by_distance()
    first_keys = [first for first, _ in indices] + [12]
    i = torch.arange(12)[:, None]
    places = torch.cat(
        [
            index + i - torch.arange(first, end)
            for (first, index), end in zip(indices, first_keys[1:], strict=True)
        ],
        dim=1,
    )  # fmt: skip
    assert places.min() >= 0
    assert_close(values[..., places].repeat(2, 1, 1, 1), bias.of(slice(0, 12)))
    dscores = torch.randn(4, 2, 12, 12)
    expected = bias.parameters.new_zeros(bias.parameters.shape)
    bias.accumulate_(expected, dscores, slice(0, 12))
    grad_values = torch.zeros_like(values)
    grad_values.index_add_(-1, places.flatten(), dscores.unflatten(0, (2, 2)).sum(0).flatten(-2))
    assert_close(bias.gradient_of_distances(grad_values), expected.unflatten(0, (2, 2)).sum(0))


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (KernelRequest(torch.device("cpu"), torch.float32, 16), "it runs on CUDA; on a CPU it is only interpreted"),
        (KernelRequest(torch.device("meta"), torch.float32, 16), "it runs on CUDA, not on meta"),
        (KernelRequest(torch.device("cuda"), torch.float64, 16), "not torch.float64"),
        (KernelRequest(torch.device("cuda"), torch.float32, 257), "head dims up to 256, not 257"),
        (
            KernelRequest(torch.device("cuda"), torch.float32, 16, bias=True, variable_lengths=True),
            "with a position bias it takes rectangles of one size",
        ),
    ],
)
def test_what_it_refuses(request_, reason):
    assert any(reason in given for given in triton.unsupported(request_))


def test_without_the_package_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    request = KernelRequest(torch.device("cuda"), torch.float32, 16, bias=True)
    assert "the package triton is not installed: pip install triton" in triton.unsupported(request)


@needs_triton
def test_a_gpu_is_served():
    assert triton.unsupported(KernelRequest(torch.device("cuda"), torch.float32, 40, bias=True)) == []
