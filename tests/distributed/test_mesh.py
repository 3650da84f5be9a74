"""A failure here means: a sequence is split wrongly, meshes disturb each other, or disagreeing ranks hang."""

from __future__ import annotations

import itertools
import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from longnet_dist import (
    DilatedAttention,
    LongNetConfig,
    Pattern,
    SequenceMesh,
    dense_reference,
    dilated_attention,
    next_token_labels,
    token_loss,
)
from longnet_dist.distributed import collectives
from longnet_dist.models.loss import linear_token_loss
from longnet_dist.plan.cost import bytes_received

PATTERN = Pattern((8, 16, 64), (1, 2, 4))


def split_and_join(group, num_tokens):
    mesh = SequenceMesh(group, PATTERN, num_tokens)
    x = torch.arange(num_tokens * 6.0, dtype=torch.float64).view(2, num_tokens, 3).requires_grad_()
    local = mesh.split(x)
    assert_close(local, x[:, mesh.shard.start : mesh.shard.stop])
    assert mesh.positions().tolist() == list(range(mesh.shard.start, mesh.shard.stop))
    joined = mesh.join(local)
    assert_close(joined, x)
    weight = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    (joined.square() * weight).sum().backward()
    assert_close(x.grad, 2 * x.detach() * weight)
    last = x.movedim(1, -1)
    assert_close(mesh.join(mesh.split(last, dim=-1), dim=-1), last)
    return mesh.shard.start, mesh.shard.stop


@pytest.mark.parametrize(("world", "num_tokens"), [(1, 10), (2, 64), (4, 61), (8, 5), (8, 0)])
def test_split_and_join_are_inverse_and_differentiable(pool, world, num_tokens):
    shards = pool.run(world, split_and_join, num_tokens)
    assert shards[0][0] == 0
    assert shards[-1][1] == num_tokens
    assert all(a[1] == b[0] for a, b in itertools.pairwise(shards))


def test_one_process_needs_no_group():
    mesh = SequenceMesh(None, PATTERN, 100)
    x = torch.randn(2, 100, 3)
    assert_close(mesh.join(mesh.split(x)), x)
    with pytest.raises(ValueError, match="has 99 entries, not seq_len = 100"):
        mesh.split(x[:, :99])
    with pytest.raises(ValueError, match=r"not the 100 of rows \[0, 100\)"):
        mesh.join(x[:, :99])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pattern": (8, 1)}, "must be a longnet_dist.Pattern"),
        ({"seq_len": -1}, "it must be the global number of tokens"),
        ({"seq_len": 1.5}, "it must be the global number of tokens"),
        ({"chunk": 99}, "at least 100"),
        ({"group": "world"}, "must be a ProcessGroup"),
    ],
)
def test_bad_arguments(given, said):
    with pytest.raises(ValueError, match=said):
        SequenceMesh(**({"group": None, "pattern": PATTERN, "seq_len": 100} | given))


def loss_of_chunks(group, num_tokens):
    """Loss, and the sum over ranks of a parameter's gradient, of uneven and empty chunks, some labels ignored."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(11, (2, num_tokens), generator=generator)
    labels = next_token_labels(tokens)
    labels[:, : num_tokens // 3] = -100
    logits = torch.randn(2, num_tokens, 11, dtype=torch.float64, generator=generator)
    results = []
    for mesh in (None, SequenceMesh(group, PATTERN, num_tokens)):
        weight = torch.ones(11, dtype=torch.float64, requires_grad=True)
        cut = (lambda x: x) if mesh is None else mesh.split
        loss = token_loss(cut(logits) * weight, cut(labels), mesh)
        (grad,) = torch.autograd.grad(loss, weight)
        in_parts = linear_token_loss(cut(logits), weight.diag(), cut(labels), mesh)
        (grad_in_parts,) = torch.autograd.grad(in_parts, weight)
        assert_close((in_parts, grad_in_parts), (loss, grad), rtol=0, atol=1e-12)
        results.append((loss.detach(), grad if mesh is None else mesh.sum(grad)))
    for mine, right in zip(*results, strict=True):
        assert_close(mine, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("world", "num_tokens"), [(1, 20), (2, 63), (4, 61), (8, 5)])
def test_loss_weighs_every_token_the_same(pool, world, num_tokens):
    pool.run(world, loss_of_chunks, num_tokens)


def test_a_masked_value_weighs_nothing_and_may_be_nan():
    values = torch.tensor([1.0, torch.nan, 3.0, 5.0], requires_grad=True)
    mean = SequenceMesh(None, PATTERN, 4).token_mean(values, torch.tensor([True, False, True, False]))
    mean.backward()
    assert mean.item() == 2
    assert values.grad.tolist() == [0.5, 0, 0.5, 0]


def two_meshes(group):
    """Different patterns on one group, and one mesh a half of the world: data x sequence parallel."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    other = Pattern((16, 32), (2, 4))
    halves = [
        dist.new_group(list(range(h * world // 2, (h + 1) * world // 2)), timeout=timedelta(seconds=30)) for h in (0, 1)
    ]
    mine = halves[rank * 2 // world]
    # The halves' ranks make another number of groups each, and then make one together.
    meshes = [SequenceMesh(mine, PATTERN if rank * 2 < world else other, 60 + rank * 2 // world)]
    meshes += [SequenceMesh(group, PATTERN, 64), SequenceMesh(group, other, 61)]
    q = torch.randn(1, 64, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        for mesh in meshes:
            x = q[:, : mesh.seq_len]
            local = mesh.split(x)
            out = mesh.join(dilated_attention(local, local, local, mesh.pattern, mesh=mesh))
            assert_close(out, dense_reference(x, x, x, mesh.pattern), rtol=0, atol=1e-12)


def test_meshes_work_side_by_side(pool):
    pool.run(8, two_meshes)


def from_device_mesh(group):
    from torch.distributed.device_mesh import DeviceMesh

    grid = DeviceMesh("cpu", torch.arange(8).view(2, 4), mesh_dim_names=("dp", "sp"))
    mesh = SequenceMesh(grid["sp"], PATTERN, 64)
    with pytest.raises(ValueError, match=r'device_mesh\["sp"\]'):
        SequenceMesh(grid, PATTERN, 64)
    return mesh.rank, mesh.size


def test_one_axis_of_a_device_mesh(pool):
    assert pool.run(8, from_device_mesh) == [(rank % 4, 4) for rank in range(8)]


def disagree(group, what):
    """The error each rank gets, and how long it took."""
    rank = dist.get_rank(group)
    odd = rank == 1
    began = time.monotonic()
    try:
        pattern = Pattern((8,), (1,)) if what == "pattern" and odd else PATTERN
        mesh = SequenceMesh(group, pattern, 65 if what == "seq_len" and odd else 64)
        shape = [1, mesh.shard.num_rows, 4, 8]
        dtype = torch.float64 if what == "dtype" and odd else torch.float32
        if odd and what in ("rows", "batch", "heads"):
            shape[["batch", "rows", "heads"].index(what)] += 1
        if odd and what == "dimensions":
            shape = shape[1:]
        q = torch.zeros(shape, dtype=dtype)
        other = Pattern((8, 16, 64), (1, 2, 2)) if what == "call pattern" and odd else PATTERN
        dilated_attention(q, q, q, other, mesh=mesh, causal=what == "causal" and odd)
    except ValueError as error:
        return str(error), time.monotonic() - began
    return "no error", time.monotonic() - began


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("pattern", "pattern: .* on ranks 0, 2-3, .* on rank 1"),
        ("seq_len", "seq_len: 64 on ranks 0, 2-3, 65 on rank 1"),
        ("dtype", "torch.float32 on ranks 0, 2-3, torch.float64 on rank 1"),
        ("rows", "rank 1: q has 17 rows, and this rank holds 16"),
        ("batch", r"\[2, 4, 8\] on rank 1"),
        ("heads", r"\[1, 5, 8\] on rank 1"),
        ("dimensions", r"rank 1: q is .*; it must be \(B, N, H, D\)"),
        ("call pattern", "rank 1: the pattern .* is not the mesh's"),
        ("causal", "causal: False on ranks 0, 2-3, True on rank 1"),
    ],
)
def test_ranks_that_disagree_all_get_the_same_error_at_once(pool, what, said):
    answers = pool.run(4, disagree, what)
    assert len({text for text, _ in answers}) == 1
    assert re.search(said, answers[0][0]), answers[0][0]
    assert all(seconds < 20 for _, seconds in answers)


def disagree_in_the_layer(group, what):
    """The error each rank gets from the layer or the model, where rank 1 is given something else."""
    odd = dist.get_rank(group) == 1
    config = LongNetConfig(d_model=16, num_layers=1, num_heads=2, segment_lengths=(8, 64), dilation_rates=(1, 4))
    mesh = SequenceMesh(group, config.pattern, 64)
    rows = mesh.shard.num_rows
    try:
        if what.startswith("layer"):
            layer = DilatedAttention(16, 2, (1, 4), (8, 64), use_rotary=True, causal=True)
            layer(
                torch.zeros(1, rows + (odd and what == "layer rows"), 16 + (odd and what == "layer width")), mesh=mesh
            )
        elif what.startswith("model"):
            tokens = torch.zeros(1, rows + (odd and what == "model rows"), dtype=torch.int64)
            config.build()(tokens[0] if odd and what == "model dimensions" else tokens, mesh=mesh)
        else:
            q = torch.zeros(1, rows, 2, 8)
            for size in (1, 2):  # Every rank has seen both by then.
                dilated_attention(*[q.expand(size, -1, -1, -1)] * 3, config.pattern, mesh=mesh)
            given = "none" if odd and what == "call pattern type" else config.pattern
            q = q.expand(1 + (odd and what == "later batch"), -1, -1, -1)
            dilated_attention(q, q, q, given, mesh=mesh)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("layer rows", "rank 1: x has 17 rows"),
        ("layer width", "rank 1: x is .* with d_model = 16"),
        ("model rows", "rank 1: x has 17 rows"),
        ("model dimensions", r"rank 1: tokens is \(16,\)"),
        ("call pattern type", "rank 1: pattern is 'none'"),
        ("later batch", r"\[1, 2, 8\] on ranks 0, 2-3, \[2, 2, 8\] on rank 1"),
    ],
)
def test_what_one_rank_gets_wrong_every_rank_is_told(pool, what, said):
    """From the layer, the model, and in a later call too: none of the others waits for a time limit."""
    answers = pool.run(4, disagree_in_the_layer, what, limit=30)
    assert len(set(answers)) == 1
    assert re.search(said, answers[0]), answers[0]


def one_rank_stays_away(group):
    """What the others say when rank 3 does not call."""
    mesh = SequenceMesh(group, PATTERN, 64, timeout=timedelta(seconds=2))
    q = torch.zeros(1, mesh.shard.num_rows, 4, 8)
    dilated_attention(q, q, q, PATTERN, mesh=mesh)
    if mesh.rank == 3:
        return "", ""
    with pytest.raises(RuntimeError) as caught:
        dilated_attention(q, q, q, PATTERN, mesh=mesh)
    mesh.agree = lambda *given: None  # As with NCCL, which compares arguments on the first call alone.
    with pytest.raises(RuntimeError) as later:
        dilated_attention(q, q, q, PATTERN, mesh=mesh)
    return str(caught.value), str(later.value)


def test_a_missing_rank_is_an_attributed_error_within_the_time_limit():
    """In a pool of its own: the groups are of no use afterwards."""
    from tests.pool import Pool

    pool = Pool()
    try:
        answers = pool.run(4, one_rank_stays_away, limit=60)
    finally:
        pool.close()
    first, later = answers[2]
    assert "rank 2 of the sequence failed while comparing the ranks' arguments" in first
    assert "rank 2 of the sequence failed while gathering the keys and values of branch (w=64, r=4)" in later
    assert "time limit 2 s" in later


def count_bytes(group, pattern, num_tokens, keep_kv, dtype, reduce_dtype):
    """Bytes that this rank receives in each collective of a forward and backward, and the formula's."""
    mesh = SequenceMesh(group, pattern, num_tokens, keep_kv=keep_kv, reduce_dtype=reduce_dtype)
    reduce_size = reduce_dtype.itemsize
    q, k, v = (torch.randn(1, mesh.shard.num_rows, 4, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    dilated_attention(q, k, v, pattern, mesh=mesh)  # The first call also compares arguments.
    received = []

    def counted(collective):
        def call(output, given, *args, **kwargs):
            # Both ways, what is a rank's own is not received.
            received.append(abs(output.numel() - given.numel()) * given.element_size())
            return collective(output, given, *args, **kwargs)

        return call

    originals = collectives._all_gather_single, collectives._reduce_scatter_single
    collectives._all_gather_single, collectives._reduce_scatter_single = map(counted, originals)
    try:
        dilated_attention(q, k, v, pattern, mesh=mesh).sum().backward()
    finally:
        collectives._all_gather_single, collectives._reduce_scatter_single = originals
    return received, bytes_received(pattern, mesh.shard, 4, 8, dtype.itemsize, keep_kv, reduce_size), mesh.shard.chunk


@pytest.mark.parametrize("keep_kv", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_moved_are_designs_formula(pool, keep_kv, dtype):
    """And flat: with twice the ranks and twice N, each branch moves the same."""
    by_branch = {}
    for world in (2, 4, 8):
        pattern = Pattern.geometric(world * 16, base=16, growth=2)
        for received, formula, chunk in pool.run(world, count_bytes, pattern, world * 16, keep_kv, dtype, dtype):
            assert sum(received) == sum(formula)
            collectives_each = 2 if keep_kv else 3
            assert len(received) == collectives_each * sum(w > chunk for w in pattern.segment_lengths)
            factor = 4 if keep_kv else 6
            for branch, count in zip(pattern.branches, formula, strict=True):
                w, r = branch.segment_length, branch.dilation_rate
                assert count == factor * (w - chunk) // r * 4 * 8 * dtype.itemsize
                assert by_branch.setdefault(branch, count) == count


def test_bytes_of_bfloat16_at_the_meshs_defaults(pool):
    """Keys and values twice in bfloat16, their gradients in float32."""
    pattern = Pattern.geometric(64, base=16, growth=2)
    for received, formula, _ in pool.run(4, count_bytes, pattern, 64, False, torch.bfloat16, torch.float32):
        assert sum(received) == sum(formula) == sum(16 * (w - 16) // r * 4 * 8 for w, r in ((32, 2), (64, 4)))


def layer_over_ranks(group, num_tokens, options):
    """The layer is the same function on any number of ranks, its parameters' gradients summed."""
    torch.manual_seed(1)
    layer = DilatedAttention(32, 4, (1, 3), (16, 40), dtype=torch.float64, **options)
    if layer.rel_pos_bias is not None:
        torch.nn.init.normal_(layer.rel_pos_bias)
    mesh = SequenceMesh(group, layer.pattern, num_tokens)
    x = torch.randn(2, num_tokens, 32, dtype=torch.float64)
    expected = layer(x)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    out = mesh.join(layer(mesh.split(x), mesh=mesh))
    assert_close(out, expected, rtol=0, atol=1e-11)
    grads = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
    for mine, right in zip(grads, expected_grads, strict=True):
        assert_close(mesh.sum(mine), right, rtol=0, atol=1e-9)


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"use_xpos": True, "causal": True},
        {"use_rel_pos_bias": True},
        {"use_rel_pos_bias": True, "causal": True, "use_rotary": True, "qk_norm": True, "num_kv_heads": 2},
    ],
)
def test_positions_and_bias_are_global(pool, world, options):
    pool.run(world, layer_over_ranks, 100, options)


def model_over_ranks(group, checkpointing):
    torch.manual_seed(1)
    config = LongNetConfig(
        d_model=16, num_layers=2, segment_lengths=(8, 32), dilation_rates=(1, 4), activation_checkpointing=checkpointing
    )
    model = config.build(dtype=torch.float64)
    mesh = SequenceMesh(group, config.pattern, 90)
    tokens = torch.randint(257, (1, 90))
    labels = next_token_labels(tokens)
    expected = token_loss(model(tokens), labels)
    right = torch.autograd.grad(expected, list(model.parameters()))
    loss = model(mesh.split(tokens), mesh=mesh, labels=mesh.split(labels))
    assert_close(loss, expected, rtol=0, atol=1e-12)
    for mine, whole in zip(torch.autograd.grad(loss, list(model.parameters())), right, strict=True):
        assert_close(mesh.sum(mine), whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_model_is_the_same_over_ranks(pool, checkpointing):
    pool.run(4, model_over_ranks, checkpointing)
