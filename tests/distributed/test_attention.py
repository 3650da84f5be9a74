"""A failure here means: the ranks together do not compute what one process does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from longnet_dist import Pattern, SequenceMesh, dilated_attention
from longnet_dist.attention.experimental.block_sparse import block_sparse_attention
from longnet_dist.attention.experimental.hashed import hashed_attention
from longnet_dist.distributed import collectives
from longnet_dist.plan.exchange import STRATEGIES
from tests.cases import NO_LATENCY, SLOW_STARTS, Case, cases, drawn, output_and_gradients
from tests.pool import WORLDS

ALIGNED = Pattern((8, 16, 64), (1, 2, 4))
UNALIGNED = Pattern((8, 24, 56), (1, 5, 3))


def distributed(
    group: dist.ProcessGroup, case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu", **mesh_options
) -> list[Tensor]:
    """Return the output and the gradient of every input, computed over the ranks of `group`, and whole on each rank."""
    mesh = SequenceMesh(group, case.pattern, case.N, **mesh_options)
    inputs = {name: x.detach().to(device).requires_grad_() for name, x in case.tensors(dtype).items()}
    local = {name: mesh.split(x) if name in ("q", "k", "v") else x for name, x in inputs.items()}
    out = mesh.join(dilated_attention(**case.arguments(local), mesh=mesh))
    grads = list(torch.autograd.grad(out, list(inputs.values()), case.dout(dtype).to(device)))
    if case.biased:  # As for any parameter, each rank has the part of its own queries.
        grads[3] = mesh.sum(grads[3])
    return [out.detach(), *grads]


def largest_errors(
    group, case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu", **mesh_options
) -> list[float]:
    """Return the largest difference of each result from the oracle's; NaN counts as infinity."""
    exact = case.oracle(dtype) if dtype == torch.float64 else case.oracle()
    pairs = zip(distributed(group, case, dtype, device, **mesh_options), exact, strict=True)
    return [
        (actual.double().cpu() - expected).abs().nan_to_num(torch.inf).max().item() if expected.numel() else 0
        for actual, expected in pairs
    ]


def check(group, cases_and_options, dtype=torch.float64):
    """Check that every case equals the oracle's on this rank, within 1e-12."""
    for case, mesh_options in cases_and_options:
        errors = largest_errors(group, case, dtype, **mesh_options)
        assert max(errors) <= 1e-12, (case, mesh_options, errors)


@st.composite
def cases_and_options(draw, world: int):
    """Draw a case and options of its mesh; half of the cases have one of the fixed patterns."""
    case = draw(cases(longest=60))
    if draw(st.booleans()):
        case = dataclasses.replace(case, pattern=draw(st.sampled_from([ALIGNED, UNALIGNED])))
    chunk = draw(st.none() | st.integers(0, 5).map(lambda extra: max(1, -(-case.N // world)) + extra))
    names = st.sampled_from(STRATEGIES)
    strategy = draw(names | st.lists(names, min_size=(n := len(case.pattern.branches)), max_size=n))
    options = {"chunk": chunk, "keep_kv": draw(st.none() | st.booleans()), "strategy": strategy}
    return case, options | {"hardware": draw(st.sampled_from([SLOW_STARTS, NO_LATENCY]))}


@pytest.mark.parametrize("world", WORLDS)
def test_drawn_cases_equal_the_oracle(pool, world):
    """Cases have any pattern, N and chunk, so some ranks have fewer rows than others, or none."""
    examples = drawn(cases_and_options(world), 100)
    pool.run(world, check, examples)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("pattern", [ALIGNED, UNALIGNED])
@pytest.mark.parametrize("num_tokens", [128, 125, 65, 5])
def test_even_and_uneven_lengths_equal_the_oracle(pool, world, pattern, num_tokens):
    examples = [
        (Case(pattern, N=num_tokens, H=4, G=2, B=2, D=8, causal=causal), {"keep_kv": keep})
        for causal in (True, False)
        for keep in (True, False)
    ]
    pool.run(world, check, examples)


def check_low_precision(group, cases_and_options, dtype):
    """Check that errors are at most four times those of one process, and a few times the rounding."""
    rounding = torch.finfo(dtype).eps
    for case, mesh_options in cases_and_options:
        exact = case.oracle()
        one = output_and_gradients(case, dtype)
        ranks = distributed(group, case, dtype, **mesh_options)
        for alone, together, expected in zip(one, ranks, exact, strict=True):
            if not expected.numel():
                continue
            limit = 4 * (alone.double() - expected).abs().max() + 8 * rounding * expected.abs().max().clamp(min=1)
            error = (together.double() - expected).abs().max()
            assert error <= limit, (case, mesh_options, error, limit)  # A NaN fails, too.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_drawn_cases_in_low_precision_are_as_near_the_oracle_as_one_process(pool, dtype):
    examples = drawn(cases_and_options(4), 60)
    pool.run(4, check_low_precision, examples, dtype)


def errors_without_exchanges(group, case, strategy, broken):
    """Return the errors of out, dq, dk and dv if what other ranks send arrives as zeros in the `broken` passes."""
    wait = collectives.Pending.wait

    def wait_and_erase(self):
        return wait(self).mul_(0 if "of branch" in self.what else 1)

    def erased(broken):
        collectives.Pending.wait = wait_and_erase if broken else wait

    mesh = SequenceMesh(group, case.pattern, case.N, strategy=strategy, keep_kv=False)
    inputs = case.tensors()
    local = {name: mesh.split(x).detach().requires_grad_() for name, x in inputs.items()}
    try:
        erased("forward" in broken)
        out = dilated_attention(**case.arguments(local), mesh=mesh)
        erased("backward" in broken)
        grads = torch.autograd.grad(out, list(local.values()), mesh.split(case.dout()))
    finally:
        erased(False)
    return [
        (actual - mesh.split(expected)).abs().max().item()
        for actual, expected in zip([out, *grads], case.oracle(), strict=True)
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_results_depend_on_each_exchange(pool, strategy):
    """Without the other ranks' rows the results are wrong, so the tests of this module can fail."""
    case = Case(ALIGNED, N=128, H=4, G=4, B=1, D=8, causal=False)
    for broken, right, wrong in (((), (0, 1, 2, 3), ()), (("forward",), (), (0,)), (("backward",), (0,), (1, 2, 3))):
        for errors in pool.run(4, errors_without_exchanges, case, strategy, broken):
            assert all(errors[i] <= 1e-12 for i in right), errors
            assert all(errors[i] > 1e-2 for i in wrong), errors


def errors_with_poisoned_memory(group, case):
    torch.use_deterministic_algorithms(True)  # Fills every torch.empty with NaN.
    try:
        return largest_errors(group, case)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("pattern", [ALIGNED, UNALIGNED])
def test_uninitialized_memory_does_not_change_results(pool, pattern):
    for errors in pool.run(4, errors_with_poisoned_memory, Case(pattern, N=125, H=3, G=3, B=1, D=8, causal=True)):
        assert max(errors) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_error_does_not_grow_with_ranks(pool, dtype):
    """Gradients are summed in float32, so the error of eight ranks is at most twice that of one."""
    case = Case(ALIGNED, N=128, H=4, G=2, B=1, D=8, causal=True)
    one, eight = (pool.run(world, largest_errors, case, dtype)[0] for world in (1, 8))
    rounding = torch.finfo(dtype).eps
    for error_of_one, error_of_eight in zip(one, eight, strict=True):
        assert error_of_eight <= 2 * error_of_one + 4 * rounding


def compare_compiled_with_eager(group, case, keep_kv):
    """Compare with several batch sizes, of which torch.compile makes a symbol."""
    mesh = SequenceMesh(group, case.pattern, case.N, keep_kv=keep_kv)

    def call(q, k, v):
        return dilated_attention(**case.arguments({"q": q, "k": k, "v": v}), mesh=mesh) * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for batch in (1, 2, 3):
        results = []
        for function in (call, compiled):
            tensors = dataclasses.replace(case, B=batch).tensors()
            inputs = {name: mesh.split(x).detach().requires_grad_() for name, x in tensors.items()}
            out = function(*inputs.values())
            results.append([out, *torch.autograd.grad(out.square().sum(), list(inputs.values()))])
        assert_close(*results, rtol=0, atol=1e-13)


@pytest.mark.parametrize("keep_kv", [True, False])
def test_compiles_over_a_mesh(pool, keep_kv):
    pool.run(2, compare_compiled_with_eager, Case(ALIGNED, N=64, H=4, G=4, B=1, D=8, causal=True), keep_kv, limit=200)


def sparse_over_ranks(group, strategy):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 90, 4, 8, dtype=torch.float64).requires_grad_() for _ in range(3))
    blocks = torch.rand(4, 12, 12) < 0.5
    mesh = SequenceMesh(group, UNALIGNED, 90, strategy=strategy)
    local = [mesh.split(x) for x in (q, k, v)]
    for expected, part in (
        (
            block_sparse_attention(q, k, v, UNALIGNED, blocks, block_size=8, causal=True),
            block_sparse_attention(*local, UNALIGNED, blocks, block_size=8, causal=True, mesh=mesh),
        ),
        (hashed_attention(q, k, v, UNALIGNED), hashed_attention(*local, UNALIGNED, mesh=mesh)),
    ):
        out = mesh.join(part)
        assert_close(out, expected, rtol=0, atol=1e-12)
        grads = [torch.autograd.grad(x.square().sum(), [q, k, v], retain_graph=True) for x in (out, expected)]
        assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize("strategy", ["all_gather", "exchange"])
def test_sparser_attention_over_ranks(pool, strategy):
    pool.run(2, sparse_over_ranks, strategy)


def sparse_with_traded_heads(group):
    q, blocks = torch.zeros(1, 45, 2, 4), torch.ones(5, 5, dtype=torch.bool)
    mesh = SequenceMesh(group, UNALIGNED, 90)
    with pytest.raises(ValueError, match="masks cannot know where a head's rows lie"):
        block_sparse_attention(q, q, q, UNALIGNED, blocks, block_size=18, mesh=mesh)


def test_sparser_attention_refuses_to_trade_heads(pool):
    pool.run(2, sparse_with_traded_heads)
