"""Drawn cases of dilated attention, and what the oracle says of them; shared by all layers of tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from longnet_dist import Pattern, T5Bias, dense_reference


@dataclass(frozen=True)
class Case:
    """The shape of one call; tensors are made from its seed, the same on every rank."""

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
        """q, k, v, maybe the table of a T5 bias, all requiring gradients."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = {"q": (self.B, self.N, self.H, self.D)}
        shapes |= dict.fromkeys(("k", "v"), (self.B, self.N, self.G, self.D))
        if self.biased:
            shapes["table"] = (8, self.H)
        made = {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}
        return {name: x.to(dtype).requires_grad_() for name, x in made.items()}

    def dout(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """A gradient of the output."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.B, self.N, self.H, self.D, dtype=torch.float64, generator=generator).to(dtype)

    def arguments(self, inputs: dict[str, Tensor]) -> dict[str, object]:
        """The keyword arguments of both functions for these tensors."""
        q_k_v = {name: x for name, x in inputs.items() if name != "table"}
        bias = {"bias": T5Bias(inputs["table"], max_distance=20)} if "table" in inputs else {}
        return {"pattern": self.pattern, "causal": self.causal} | q_k_v | bias

    def oracle(self, dtype: torch.dtype = torch.float64, inputs: dict[str, Tensor] | None = None) -> list[Tensor]:
        """out and the gradients of every input, by `dense_reference`."""
        inputs = inputs or self.tensors(dtype)
        out = dense_reference(**self.arguments(inputs))
        return [out, *torch.autograd.grad(out, list(inputs.values()), self.dout(dtype))]


@st.composite
def patterns(draw: st.DrawFn, longest: int = 24) -> Pattern:
    """One to four branches of any lengths and rates, aligned or not."""
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
    """Any pattern, N (0 included), H, G, B, D."""
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
