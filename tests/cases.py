"""Cases of dilated attention with the oracle's results, and the Hypothesis strategies that draw them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longnet_dist import Pattern, T5Bias, dense_reference, dilated_attention
from longnet_dist.plan.hardware import Hardware

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
SLOW_STARTS, NO_LATENCY = Hardware("slow starts", 1e12, 1e12, 1.0), Hardware("no latency", 1e12, 1e6, 1e-12)
"""With the first, a mesh joins all collectives between the same ranks; with the second none."""
CPU_KERNELS = "torch", "eager"
"""The kernels that serve a CPU."""


def _no_interpreter() -> str | None:
    """Return why Triton's kernels cannot be interpreted here; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "no triton"
    triton, numpy = ([int(part) for part in metadata.version(name).split(".")[:2]] for name in ("triton", "numpy"))
    old = triton < [3, 9] and numpy >= [2, 4]
    return "the interpreter of this triton cannot loop with this NumPy" if old else None


NO_INTERPRETER = _no_interpreter()
PAPER = Pattern((16, 32, 64), (1, 3, 6))  # r does not divide w, as in the paper's (16384, 6) and (32768, 12).


@dataclass(frozen=True)
class Case:
    """The shapes and options of one call. Its tensors depend on the seed alone, so every rank has the same."""

    pattern: Pattern
    N: int
    H: int
    G: int
    B: int
    D: int
    causal: bool
    biased: bool = False
    seed: int = 0

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Return q, k, v and, if `biased`, the table of a T5 bias; all require gradients."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = {"q": (self.B, self.N, self.H, self.D)}
        shapes |= dict.fromkeys(("k", "v"), (self.B, self.N, self.G, self.D))
        if self.biased:
            shapes["table"] = (8, self.H)
        tensors = {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}
        return {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}

    def dout(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return a gradient of the output."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.B, self.N, self.H, self.D, dtype=torch.float64, generator=generator).to(dtype)

    def arguments(self, inputs: dict[str, Tensor]) -> dict[str, object]:
        """Return the keyword arguments for `dilated_attention` and `dense_reference`."""
        q_k_v = {name: x for name, x in inputs.items() if name != "table"}
        bias = {"bias": T5Bias(inputs["table"], max_distance=20)} if "table" in inputs else {}
        return {"pattern": self.pattern, "causal": self.causal} | q_k_v | bias

    def oracle(self, dtype: torch.dtype = torch.float64, inputs: dict[str, Tensor] | None = None) -> list[Tensor]:
        """Return the output and the gradient of every input, as `dense_reference` computes them."""
        inputs = inputs or self.tensors(dtype)
        out = dense_reference(**self.arguments(inputs))
        return [out, *torch.autograd.grad(out, list(inputs.values()), self.dout(dtype))]


def output_and_gradients(case: Case, dtype: torch.dtype = torch.float64, **options: object) -> list[Tensor]:
    """Return the output of `dilated_attention` and the gradient of every input."""
    inputs = case.tensors(dtype)
    out = dilated_attention(**case.arguments(inputs), **options)
    return [out, *torch.autograd.grad(out, list(inputs.values()), case.dout(dtype))]


def drawn(strategy: st.SearchStrategy, count: int) -> list:
    """Draw examples, the same in every run, to send them to other processes."""
    examples = []

    @settings(
        max_examples=count, deadline=None, phases=[Phase.generate], derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def collect(example):
        examples.append(example)

    collect()
    return examples


@st.composite
def patterns(draw: st.DrawFn, longest: int = 24) -> Pattern:
    """Draw a pattern of one to four branches, with any segment lengths and dilation rates."""
    branches = draw(
        st.lists(
            st.integers(1, longest).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, min(w, 7)))),
            min_size=1,
            max_size=4,
        )
    )
    return Pattern(*zip(*branches, strict=True), draw(st.sampled_from(["interleaved", "blocked"])))


@st.composite
def cases(draw: st.DrawFn, longest: int = 40) -> Case:
    """Draw a case of any pattern, N (0 included), H, G, B and D."""
    G = draw(st.integers(1, 5))
    return Case(
        pattern=draw(patterns()),
        N=draw(st.integers(0, longest)),
        H=G * draw(st.integers(1, 3)),
        G=G,
        B=draw(st.integers(1, 2)),
        D=draw(st.sampled_from([1, 3, 8])),
        causal=draw(st.booleans()),
        biased=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
