"""A failure here means: attention by `parallelize_module` differs from the oracle, or a mistake passes in silence."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from examples.parallelize import PATTERN as EXAMPLE_PATTERN
from examples.parallelize import SEQ_LEN, Model
from longnet_dist import (
    DilatedAttention,
    Pattern,
    SequenceMesh,
    dense_reference,
    dilated_attention,
    next_token_labels,
    token_loss,
)
from longnet_dist.integrations.pytorch import SequenceParallelAttention
from tests.cases import Case

PATTERN = Pattern((8, 24, 64), (1, 3, 5))


class Attend(nn.Module):
    def forward(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v)


def spread_heads(group, phases):
    """Compare with the oracle: each rank has half of the heads, two or three, and each sequence is over four ranks."""
    grid = DeviceMesh("cpu", torch.arange(8).view(4, 2), mesh_dim_names=("sp", "tp"))
    pattern = Pattern(PATTERN.segment_lengths, PATTERN.dilation_rates, phases)
    for H, G in ((4, 4), (6, 6), (12, 6)):
        case = Case(pattern, N=61, H=H, G=G, B=2, D=8, causal=True)
        mesh = SequenceMesh(grid["sp"], pattern, case.N)
        tp, tp_rank = grid["tp"], grid["tp"].get_local_rank()
        local = {name: mesh.split(x).detach().chunk(2, 2)[tp_rank] for name, x in case.tensors().items()}
        dout = mesh.split(case.dout())
        expected = [mesh.split(x.detach()).chunk(2, 2)[tp_rank] for x in case.oracle()]
        # DTensors, sharded by head.
        inputs = [DTensor.from_local(x, tp, [Shard(2)]).requires_grad_() for x in local.values()]
        out = dilated_attention(*inputs, pattern, causal=True, mesh=mesh)
        assert isinstance(out, DTensor)
        local_dout = DTensor.from_local(dout.chunk(2, 2)[tp_rank], tp, [Shard(2)])
        results = [out, *torch.autograd.grad(out, inputs, local_dout)]
        for actual, reference in zip(results, expected, strict=True):
            assert_close(actual.to_local(), reference, rtol=0, atol=1e-12)
        # Plain tensors, as ColwiseParallel returns them, in the layout of torch's own attention.
        attend = parallelize_module(Attend(), grid["sp"], SequenceParallelAttention(mesh, causal=True, head_mesh=tp))
        plain = attend(*(x.transpose(1, 2) for x in local.values())).transpose(1, 2)
        assert_close(plain, expected[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("phases", ["interleaved", "blocked"])
def test_heads_spread_over_ranks_match_the_oracle(pool, phases):
    pool.run(8, spread_heads, phases)


def errors(group):
    """Check that each wrong use raises on every rank, even if only one rank is wrong."""
    grid = DeviceMesh("cpu", torch.arange(8).view(4, 2), mesh_dim_names=("sp", "tp"))
    mesh = SequenceMesh(grid["sp"], PATTERN, 64)
    style = SequenceParallelAttention(mesh, causal=True)
    spread = SequenceParallelAttention(mesh, causal=True, head_mesh=grid["tp"])
    attend = parallelize_module(Attend(), grid["sp"], style)
    q = torch.randn(1, 4, mesh.shard.num_rows, 8)
    whole = torch.randn(1, 4, 64, 8)
    normed = DilatedAttention(8, 2, PATTERN.dilation_rates, PATTERN.segment_lengths, qk_norm=True)
    wrong_on_one_rank = {"attn_mask": torch.ones(1, 1, 16, 64)} if mesh.rank == 0 else {}
    cases = [
        (lambda: attend(q, q, q, **wrong_on_one_rank), "attn_mask must be None"),
        (lambda: parallelize_module(normed, grid["sp"], spread), "heads cannot be spread .* with qk_norm"),
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
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_what_would_be_silently_wrong_raises_on_every_rank(pool):
    pool.run(8, errors)


def compile_layer(group):
    """Compile our own layer as a whole, and check that three steps have the eager results and do not recompile it."""
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


def test_our_layer_is_compiled_once(pool):
    pool.run(2, compile_layer, limit=200)


def reference_of(model, tokens):
    """Return the loss and the gradients by name of the example's model with the oracle, on one process."""

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return dense_reference(q, k, v, EXAMPLE_PATTERN, causal=True).transpose(1, 2)

    for layer in model.layers:
        layer.attend.forward = attend
    loss = token_loss(model(tokens, torch.arange(SEQ_LEN)), next_token_labels(tokens))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


GRIDS = {}


def make_grid(group, shape):
    """Make a DeviceMesh; all ranks of the pool must take part, as its groups are made over all of them."""
    GRIDS[shape] = DeviceMesh("cpu", torch.arange(math.prod(shape)).view(shape), mesh_dim_names=("dp", "sp", "tp"))


def train_step(group, shape, checkpointed, compiled):
    """Compare the gradients of a global batch over (dp, sp, tp) ranks, by DDP or, if heads are spread, by FSDP2."""
    grid = GRIDS[shape]
    dp, _, tp = shape
    mesh = SequenceMesh(grid["sp"], EXAMPLE_PATTERN, SEQ_LEN)
    torch.manual_seed(0)
    tokens = torch.randint(256, (2 * dp, SEQ_LEN))
    model = Model().double()
    expected_loss, expected = reference_of(copy.deepcopy(model), tokens)
    attention = SequenceParallelAttention(mesh, causal=True, head_mesh=grid["tp"] if tp > 1 else None)
    for number, layer in enumerate(model.layers):
        if tp > 1:
            projections = {name: ColwiseParallel() for name in "qkv"} | {"out": RowwiseParallel()}
            parallelize_module(layer, grid["tp"], projections)
        parallelize_module(layer, grid["sp"], {"attend": attention})
        if checkpointed:
            model.layers[number] = layer = checkpoint_wrapper(layer)
        if compiled:
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # Dynamo looks at it.
            layer.compile(fullgraph=True, backend="aot_eager")
        if tp > 1:
            fully_shard(layer, mesh=grid["dp", "sp"])
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # A linear layer returns a view.
    if tp > 1:
        fully_shard(model, mesh=grid["dp", "sp"])
        wrapped = model
    else:
        wrapped = DistributedDataParallel(model, process_group=group)
    local_tokens = tokens.chunk(dp)[grid["dp"].get_local_rank()]
    labels = mesh.split(next_token_labels(local_tokens))
    for step in range(2):  # The second step uses what the first has cached.
        model.zero_grad()
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            loss = token_loss(wrapped(mesh.split(local_tokens), mesh.positions()), labels, mesh)
            (loss * mesh.size).backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=group)
    assert_close(total / group.size(), expected_loss, rtol=0, atol=1e-12)
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        assert_close(grad, expected[name.replace("_checkpoint_wrapped_module.", "")], rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("shape", "checkpointed", "compiled"),
    [((2, 4, 1), False, False), ((2, 2, 1), True, True), ((2, 2, 2), True, False), ((1, 2, 2), False, True)],
    ids=["DDP", "DDP, checkpointing, compile", "HSDP x TP, checkpointing", "FSDP x TP, compile"],
)
def test_it_works_together_with_data_and_tensor_parallelism(pool, shape, checkpointed, compiled):
    """The example in tests/launch also compiles with the real compiler, as users do."""
    pool.run(8, make_grid, shape)
    pool.run(math.prod(shape), train_step, shape, checkpointed, compiled, limit=200)
