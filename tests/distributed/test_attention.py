"""A failure here means: ranks together do not compute what one process does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from longnet_dist import Pattern, SequenceMesh, dilated_attention
from longnet_dist.distributed import collectives
from tests.drawn import Case, cases
from tests.pool import WORLDS

ALIGNED = Pattern((8, 16, 64), (1, 2, 4))
UNALIGNED = Pattern((8, 24, 56), (1, 5, 3))


def distributed(
    group: dist.ProcessGroup, case: Case, dtype: torch.dtype = torch.float64, **mesh_options
) -> list[Tensor]:
    """out and the gradients of every input, by the ranks of `group`, joined on each."""
    mesh = SequenceMesh(group, case.pattern, case.N, **mesh_options)
    inputs = case.tensors(dtype)
    local = {name: mesh.split(x) if name in ("q", "k", "v") else x for name, x in inputs.items()}
    out = mesh.join(dilated_attention(**case.arguments(local), mesh=mesh))
    grads = list(torch.autograd.grad(out, list(inputs.values()), case.dout(dtype)))
    if case.biased:  # As any parameter's: each rank has its queries' part.
        grads[3] = mesh.sum(grads[3])
    return [out.detach(), *grads]


def worst(group, case: Case, dtype: torch.dtype = torch.float64, **mesh_options) -> list[float]:
    """How far `distributed` is from the oracle, NaN included."""
    exact = case.oracle(dtype) if dtype == torch.float64 else case.oracle()
    pairs = zip(distributed(group, case, dtype, **mesh_options), exact, strict=True)
    return [
        (mine.double() - right).abs().nan_to_num(torch.inf).max().item() if right.numel() else 0
        for mine, right in pairs
    ]


def check(group, drawn, dtype=torch.float64):
    """Every drawn case on this rank, to 1e-12."""
    for case, mesh_options in drawn:
        errors = worst(group, case, dtype, **mesh_options)
        assert max(errors) <= 1e-12, (case, mesh_options, errors)


@st.composite
def drawn(draw, world: int):
    case = draw(cases(longest=60))
    if draw(st.booleans()):
        case = dataclasses.replace(case, pattern=draw(st.sampled_from([ALIGNED, UNALIGNED])))
    chunk = draw(st.none() | st.integers(0, 5).map(lambda extra: max(1, -(-case.N // world)) + extra))
    return case, {"chunk": chunk, "keep_kv": draw(st.booleans())}


@pytest.mark.parametrize("world", WORLDS)
def test_drawn_cases_are_the_oracles(pool, world):
    """Any pattern, N, chunk; even, uneven and empty ranks."""
    found = []

    @settings(
        max_examples=60, deadline=None, phases=[Phase.generate], derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(drawn(world))
    def collect(one):
        found.append(one)

    collect()
    pool.run(world, check, found)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("pattern", [ALIGNED, UNALIGNED])
@pytest.mark.parametrize("num_tokens", [128, 125, 65, 5])
def test_even_and_uneven_lengths(pool, world, pattern, num_tokens):
    drawn = [
        (Case(pattern, N=num_tokens, H=4, G=2, B=2, D=8, causal=causal), {"keep_kv": keep})
        for causal in (True, False)
        for keep in (True, False)
    ]
    pool.run(world, check, drawn)


def without_gather(group, case):
    """The largest error where the gather brings each rank its own rows in place of the others'."""

    def own_rows(self, x, what):
        return collectives.Pending(self, what, x.expand(self.size, *x.shape).contiguous())

    original = collectives.Communicator.all_gather
    mesh = SequenceMesh(group, case.pattern, case.N)
    inputs = {name: x.detach() for name, x in case.tensors().items()}
    local = {name: mesh.split(x) for name, x in inputs.items()}
    exact = mesh.split(case.oracle()[0].detach())
    right = dilated_attention(**case.arguments(local), mesh=mesh)
    collectives.Communicator.all_gather = own_rows
    try:
        wrong = dilated_attention(**case.arguments(local), mesh=mesh)
    finally:
        collectives.Communicator.all_gather = original
    return (right - exact).abs().max().item(), (wrong - exact).abs().max().item()


def test_the_gather_matters(pool):
    """These tests can fail: without the others' rows the answer is another."""
    case = Case(ALIGNED, N=128, H=4, G=4, B=1, D=8, causal=False)
    for right, wrong in pool.run(4, without_gather, case):
        assert right <= 1e-12
        assert wrong > 1e-2


def poisoned(group, case):
    torch.use_deterministic_algorithms(True)  # Fills every torch.empty with NaN.
    try:
        return worst(group, case)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("pattern", [ALIGNED, UNALIGNED])
def test_uninitialised_memory_changes_nothing(pool, pattern):
    for errors in pool.run(4, poisoned, Case(pattern, N=125, H=3, G=3, B=1, D=8, causal=True)):
        assert max(errors) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_error_does_not_grow_with_ranks(pool, dtype):
    """Gradients are summed in float32: eight ranks are at most twice as far off as one."""
    case = Case(ALIGNED, N=128, H=4, G=2, B=1, D=8, causal=True)
    one, eight = (pool.run(world, worst, case, dtype)[0] for world in (1, 8))
    rounding = torch.finfo(dtype).eps
    for alone, together in zip(one, eight, strict=True):
        assert together <= 2 * alone + 4 * rounding


def compiled(group, case):
    mesh = SequenceMesh(group, case.pattern, case.N)
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        inputs = {name: mesh.split(x).detach().requires_grad_() for name, x in case.tensors().items()}
        call = wrap(lambda q, k, v: dilated_attention(**case.arguments({"q": q, "k": k, "v": v}), mesh=mesh))
        out = call(*inputs.values())
        results.append([out, *torch.autograd.grad(out.square().sum(), list(inputs.values()))])
    for mine, right in zip(*results, strict=True):
        assert_close(mine, right, rtol=0, atol=1e-13)


def test_compiles_over_a_mesh(pool):
    pool.run(2, compiled, Case(ALIGNED, N=64, H=4, G=4, B=1, D=8, causal=True), limit=200)
