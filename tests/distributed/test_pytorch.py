"""A failure here means: attention by `parallelize_module` is not the oracle's, or a mistake passes in silence."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing import assert_close

from longnet_dist import DilatedAttention, Pattern, SequenceMesh, dilated_attention
from longnet_dist.integrations.pytorch import SequenceParallelAttention
from tests.drawn import Case

PATTERN = Pattern((8, 24, 64), (1, 3, 5))


class Attend(nn.Module):
    def forward(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v)


def spread_heads(group, phases):
    """Two of four heads, or three of six, a rank; the sequence over four: out and gradients of the oracle."""
    grid = DeviceMesh("cpu", torch.arange(8).view(4, 2), mesh_dim_names=("sp", "tp"))
    pattern = Pattern(PATTERN.segment_lengths, PATTERN.dilation_rates, phases)
    for H, G in ((4, 4), (6, 6), (12, 6)):
        case = Case(pattern, N=61, H=H, G=G, B=2, D=8, causal=True)
        mesh = SequenceMesh(grid["sp"], pattern, case.N)
        tp, here = grid["tp"], grid["tp"].get_local_rank()
        local = {name: mesh.split(x).detach().chunk(2, 2)[here] for name, x in case.tensors().items()}
        dout = mesh.split(case.dout())
        exact = [mesh.split(x.detach()).chunk(2, 2)[here] for x in case.oracle()]
        # DTensors, sharded by head.
        inputs = [DTensor.from_local(x, tp, [Shard(2)]).requires_grad_() for x in local.values()]
        out = dilated_attention(*inputs, pattern, causal=True, mesh=mesh)
        assert isinstance(out, DTensor)
        found = [out, *torch.autograd.grad(out, inputs, DTensor.from_local(dout.chunk(2, 2)[here], tp, [Shard(2)]))]
        for mine, right in zip(found, exact, strict=True):
            assert_close(mine.to_local(), right, rtol=0, atol=1e-12)
        # Plain tensors, as ColwiseParallel gives them, in the layout of torch's own attention.
        attend = parallelize_module(Attend(), grid["sp"], SequenceParallelAttention(mesh, causal=True, head_mesh=tp))
        plain = attend(*(x.transpose(1, 2) for x in local.values())).transpose(1, 2)
        assert_close(plain, exact[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("phases", ["interleaved", "blocked"])
def test_heads_over_ranks_beside_the_sequence(pool, phases):
    pool.run(8, spread_heads, phases)


def refusals(group):
    grid = DeviceMesh("cpu", torch.arange(8).view(4, 2), mesh_dim_names=("sp", "tp"))
    mesh = SequenceMesh(grid["sp"], PATTERN, 64)
    style = SequenceParallelAttention(mesh, causal=True)
    attend = parallelize_module(Attend(), grid["sp"], style)
    q = torch.randn(1, 4, mesh.shard.num_rows, 8)
    whole = torch.randn(1, 4, 64, 8)
    cases = [
        (lambda: attend(whole, whole, whole), "pass mesh.split"),
        (lambda: attend(q, q, q, torch.ones(1, 1, 16, 64)), "attn_mask must be None"),
        (lambda: attend(q, q, q, dropout_p=0.1), "probabilities cannot be dropped"),
        (lambda: attend(q, q, q, is_causal=False), "is_causal=False, and the style says True"),
        (lambda: attend(q), "called without keys or values"),
        (lambda: parallelize_module(Attend(), grid["tp"], style), "the sequence is held by ranks"),
        (lambda: parallelize_module(nn.Linear(2, 2), grid["sp"], style), "has parameters"),
        (lambda: parallelize_module(DilatedAttention(8, 2, 1, 8), grid["sp"], style), "the layer's pattern is"),
        (lambda: dilated_attention(*[DTensor.from_local(q, grid["tp"], [Shard(1)])] * 3, PATTERN), "heads .* may be"),
        (lambda: dilated_attention(DTensor.from_local(q, grid["tp"], [Replicate()]), q, q, PATTERN), "or none"),
    ]
    for call, said in cases:
        with pytest.raises(ValueError, match=said):
            call()


def test_what_would_be_silently_wrong_is_refused_on_every_rank(pool):
    pool.run(8, refusals)


def compiled(group):
    """Our own layer, compiled whole, over three steps: the eager numbers, and no recompilation."""
    mesh = SequenceMesh(group, PATTERN, 61)
    torch.manual_seed(0)
    layer = DilatedAttention(16, 4, (1, 3, 5), (8, 24, 64), causal=True, use_rotary=True).double()
    inputs = torch.randn(3, 2, 61, 16, dtype=torch.float64)
    expected = [mesh.split(layer(x)) for x in inputs]
    device_mesh = DeviceMesh.from_group(group, "cpu")
    parallelize_module(layer, device_mesh, SequenceParallelAttention(mesh))
    layer.compile(fullgraph=True, backend="aot_eager")
    for step, x in enumerate(inputs):
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            out = layer(mesh.split(x))
        assert_close(out, expected[step], rtol=0, atol=1e-12)


def test_our_layer_compiled_is_not_compiled_again(pool):
    pool.run(2, compiled, limit=200)
