"""A failure here means: a sequence is split wrongly, meshes disturb each other, or ranks do not equal one process."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import threading
import warnings
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
from longnet_dist.models.loss import linear_token_loss

PATTERN = Pattern((8, 16, 64), (1, 2, 4))


def split_and_join(group, num_tokens):
    """Check split, join and their gradients, and return the range of this rank's rows."""
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
    ("options", "message"),
    [
        ({"pattern": (8, 1)}, "must be a longnet_dist.Pattern"),
        ({"seq_len": -1}, "it must be the global number of tokens"),
        ({"seq_len": 1.5}, "it must be the global number of tokens"),
        ({"chunk": 99}, "at least 100"),
        ({"group": "world"}, "must be a ProcessGroup"),
    ],
)
def test_bad_arguments_raise_errors_that_name_the_rule(options, message):
    with pytest.raises(ValueError, match=message):
        SequenceMesh(**({"group": None, "pattern": PATTERN, "seq_len": 100} | options))


def compare_derivatives(group, keep_kv):
    """Compare torch.func's derivatives of split, attention and join, and second derivatives of split and join."""
    mesh = SequenceMesh(group, PATTERN, 61, keep_kv=keep_kv)
    x = torch.randn(1, 61, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def loss_of_sequence(x):
        local = mesh.split(x)
        return mesh.join(dilated_attention(local, local, local, PATTERN, mesh=mesh)).square().sum()

    expected = torch.func.grad(lambda x: dense_reference(x, x, x, PATTERN).square().sum())(x)
    assert_close(torch.func.grad(loss_of_sequence)(x), expected, rtol=0, atol=1e-12)
    local = torch.stack([mesh.split(x), 2 * mesh.split(x)])

    def loss_of_rows(local):
        return dilated_attention(local, local, local, PATTERN, mesh=mesh).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss_of_rows))(local)
    assert_close(grads[0], mesh.split(expected), rtol=0, atol=1e-12)
    assert_close(grads[1], torch.func.grad(loss_of_rows)(local[1]), rtol=0, atol=1e-12)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(mesh.join(mesh.split(x)).pow(3).sum(), x, create_graph=True)
    assert_close(torch.autograd.grad(grad.sum(), x)[0], 6 * x.detach())
    for call in (mesh.split, lambda x: mesh.join(mesh.split(x.detach()) * x[:, :1]), mesh.sum, mesh.token_mean):
        with torch.autograd.forward_ad.dual_level(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Warnings from torch itself.
            dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
            with pytest.raises(NotImplementedError, match="jvp"):
                call(dual)


@pytest.mark.parametrize(("world", "keep_kv"), [(1, False), (4, False), (4, True)])
def test_derivatives_pass_through_the_mesh(pool, world, keep_kv):
    pool.run(world, compare_derivatives, keep_kv)


def copy_and_pickle(group):
    mesh = SequenceMesh(group, PATTERN, 64)
    holder = torch.nn.Linear(2, 2)
    holder.mesh = mesh
    assert copy.copy(mesh) is copy.deepcopy(mesh) is copy.deepcopy(holder).mesh is mesh
    for save in (pickle.dumps, lambda x: torch.save(x, io.BytesIO())):
        for value in (mesh, holder):
            with pytest.raises(TypeError, match=r"cannot be pickled.*state_dict.*construct SequenceMesh"):
                save(value)


@pytest.mark.parametrize("world", [1, 2])
def test_copies_are_the_same_mesh_and_pickling_raises(pool, world):
    pool.run(world, copy_and_pickle)


def compare_losses(group, num_tokens):
    """Compare the loss and a parameter's gradient with one process; chunks are uneven, and some labels ignored."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(11, (2, num_tokens), generator=generator)
    labels = next_token_labels(tokens)
    labels[:, : num_tokens // 3] = -100
    logits = torch.randn(2, num_tokens, 11, dtype=torch.float64, generator=generator)
    results = []
    for mesh in (None, SequenceMesh(group, PATTERN, num_tokens)):
        weight = torch.ones(11, dtype=torch.float64, requires_grad=True)
        split = (lambda x: x) if mesh is None else mesh.split
        loss = token_loss(split(logits) * weight, split(labels), mesh)
        (grad,) = torch.autograd.grad(loss, weight)
        in_parts = linear_token_loss(split(logits), weight.diag(), split(labels), mesh)
        (grad_in_parts,) = torch.autograd.grad(in_parts, weight)
        assert_close((in_parts, grad_in_parts), (loss, grad), rtol=0, atol=1e-12)
        results.append((loss.detach(), grad if mesh is None else mesh.sum(grad)))
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("world", "num_tokens"), [(1, 20), (2, 63), (4, 61), (8, 5)])
def test_the_loss_weighs_every_token_equally(pool, world, num_tokens):
    pool.run(world, compare_losses, num_tokens)


def test_masked_values_have_no_weight_and_may_be_nan():
    values = torch.tensor([1.0, torch.nan, 3.0, 5.0], requires_grad=True)
    mean = SequenceMesh(None, PATTERN, 4).token_mean(values, torch.tensor([True, False, True, False]))
    mean.backward()
    assert mean.item() == 2
    assert values.grad.tolist() == [0.5, 0, 0.5, 0]


def train_on_other_tokens(group, what):
    """Return the error that this rank gets if rank 1 has another batch, or targets are not what they must be."""
    model = LongNetConfig(d_model=8, num_layers=1, num_heads=2, segment_lengths=(8, 64), dilation_rates=(1, 4)).build()
    mesh = SequenceMesh(group, model.config.pattern, 61)
    torch.manual_seed(1 if what.startswith("another batch") and mesh.rank == 1 else 0)
    tokens = torch.randint(257, (2, 61))
    rows, whole = slice(mesh.shard.start, mesh.shard.stop), next_token_labels(tokens)
    if what == "another batch, split by hand":
        local, targets = tokens[:, rows], whole[:, rows]
    else:
        local, targets = mesh.split(tokens), mesh.split(whole)
    if what == "shifted after the split":
        targets = next_token_labels(local).clamp(min=0)
    elif what == "not shifted":
        targets = local.clone()
    elif what == "not split" or (what == "not split on rank 1" and mesh.rank == 1):
        targets = whole
    try:
        if "by token_loss" in what or "not split" in what:
            token_loss(model(local, mesh=mesh), targets, mesh)
        if "by token_loss" not in what:
            model(local, mesh=mesh, targets=targets)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("another batch", "the batch given to mesh.split (by a digest): "),
        ("another batch, by token_loss", "the batch given to mesh.split (by a digest): "),
        ("another batch, split by hand", "all ranks of a mesh need parts of the same sequences"),
        ("shifted after the split", "shifted before they were split"),
        ("not shifted", "the tokens themselves"),
        ("not split", "each row of logits needs one target: with a mesh, pass mesh.split(next_token_labels(tokens))"),
        ("not split on rank 1", "rank 1: targets is (2, 61) and logits (2, 16, 257)"),
        ("nothing wrong", "no error"),
        ("nothing wrong, by token_loss", "no error"),
    ],
)
def test_ranks_with_other_tokens_or_targets_are_refused_on_every_rank(pool, what, message):
    errors = pool.run(4, train_on_other_tokens, what)
    assert len(set(errors)) == 1
    assert message in errors[0]


def split_ahead(group):
    """Split the next batch in another thread, on rank 0 only, as a prefetcher that is ahead; then agree."""
    mesh = SequenceMesh(group, PATTERN, 40)
    mesh.split(torch.zeros(1, 40, dtype=torch.int64))
    if mesh.rank == 0:
        thread = threading.Thread(target=mesh.split, args=(torch.ones(1, 40, dtype=torch.int64),))
        thread.start()
        thread.join()
    return mesh.token_mean(torch.ones(3)).item()


def test_a_batch_that_is_split_ahead_in_another_thread_is_not_compared(pool):
    assert pool.run(2, split_ahead) == [1.0, 1.0]


def test_no_group_among_several_processes_is_an_error(monkeypatch):
    """dist.group.WORLD is None before init_process_group: each process would train alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"one of 2 processes .*: call torch.distributed.init_process_group\(\) first"):
        SequenceMesh(dist.group.WORLD, PATTERN, 64)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert SequenceMesh(dist.group.WORLD, PATTERN, 64).size == 1


def make_a_mesh_of_this_process(group):
    """Make a mesh without a group, where a launcher's variables say that there are two processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        return SequenceMesh(None, PATTERN, 64).size


def test_no_group_means_whole_sequences_once_there_is_a_process_group(pool):
    assert pool.run(2, make_a_mesh_of_this_process) == [1, 1]


def use_three_meshes(group):
    """Use meshes with different patterns on one group, and a mesh on each half of it: data x sequence parallel."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    other = Pattern((16, 32), (2, 4))
    halves = [
        dist.new_group(list(range(h * world // 2, (h + 1) * world // 2)), timeout=timedelta(seconds=30)) for h in (0, 1)
    ]
    mine = halves[rank * 2 // world]
    # The two halves make different numbers of groups, and then one group together.
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
    pool.run(8, use_three_meshes)


def make_from_device_mesh(group):
    from torch.distributed.device_mesh import DeviceMesh

    grid = DeviceMesh("cpu", torch.arange(8).view(2, 4), mesh_dim_names=("dp", "sp"))
    mesh = SequenceMesh(grid["sp"], PATTERN, 64)
    with pytest.raises(ValueError, match=r'device_mesh\["sp"\]'):
        SequenceMesh(grid, PATTERN, 64)
    return mesh.rank, mesh.size


def test_a_mesh_is_made_from_one_axis_of_a_device_mesh(pool):
    assert pool.run(8, make_from_device_mesh) == [(rank % 4, 4) for rank in range(8)]


def compare_layer(group, num_tokens, options):
    """Compare the layer over ranks with the layer on one process, the gradients of its parameters included."""
    torch.manual_seed(1)
    layer = DilatedAttention(32, 4, (1, 3), (16, 40), dtype=torch.float64, **options)
    if layer.rel_pos_bias is not None:
        torch.nn.init.normal_(layer.rel_pos_bias)
    mesh = SequenceMesh(group, layer.pattern, num_tokens)
    x = torch.randn(2, num_tokens, 32, dtype=torch.float64)
    token_types = {"token_types": torch.rand(2, num_tokens) < 0.3} if layer.multiway else {}
    expected = layer(x, **token_types)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    out = mesh.join(layer(mesh.split(x), mesh=mesh, **{name: mesh.split(y) for name, y in token_types.items()}))
    assert_close(out, expected, rtol=0, atol=1e-11)
    grads = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(mesh.sum(grad), expected_grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"use_xpos": True, "causal": True},
        {"use_rel_pos_bias": True},
        {"use_rel_pos_bias": True, "causal": True, "use_rotary": True, "qk_norm": True, "num_kv_heads": 2},
        {"use_alibi": True, "qk_norm": "layer", "num_kv_heads": 1},
        {"multiway": True, "inner_norm": True, "use_rotary": True},
    ],
)
def test_positions_and_bias_are_global(pool, world, options):
    pool.run(world, compare_layer, 100, options)


def compare_model(group, checkpointing):
    """Compare the model over ranks with the model on one process, the gradients of its parameters included."""
    torch.manual_seed(1)
    config = LongNetConfig(
        d_model=16, num_layers=2, segment_lengths=(8, 32), dilation_rates=(1, 4), activation_checkpointing=checkpointing
    )
    model = config.build(dtype=torch.float64)
    mesh = SequenceMesh(group, config.pattern, 90)
    tokens = torch.randint(257, (1, 90))
    labels = next_token_labels(tokens)
    expected = token_loss(model(tokens), labels)
    expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    loss = model(mesh.split(tokens), mesh=mesh, targets=mesh.split(labels))
    assert_close(loss, expected, rtol=0, atol=1e-12)
    for grad, expected_grad in zip(torch.autograd.grad(loss, list(model.parameters())), expected_grads, strict=True):
        assert_close(mesh.sum(grad), expected_grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_the_model_does_not_depend_on_the_number_of_ranks(pool, checkpointing):
    pool.run(4, compare_model, checkpointing)
