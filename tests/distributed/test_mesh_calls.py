"""A failure here means: ranks that pass different meshes or tensors hang, crash or compute; or a derivative is lost."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from longnet_dist import DilatedAttention, Pattern, SequenceMesh, dense_reference, dilated_attention

PATTERN = Pattern((8, 16, 64), (1, 2, 4))
FACTS = {"seq_len": 63, "chunk": 17, "keep_kv": True, "reduce_dtype": torch.float64, "timeout": 61}


def another_mesh(group, what, rows):
    """The errors each rank gets in one call after another, where rank 1 passes another mesh of the same group."""
    facts = {"seq_len": 64, "timeout": 60}
    meshes = [SequenceMesh(group, PATTERN, **facts | change) for change in ({}, {what: FACTS[what]})]
    mesh = meshes[dist.get_rank(group) == 1]
    q = torch.zeros(1, (mesh if rows == "its own" else meshes[0]).shard.num_rows, 2, 8)
    layer = DilatedAttention(16, 2, PATTERN.dilation_rates, PATTERN.segment_lengths)
    calls = {
        "dilated_attention": lambda: dilated_attention(q, q, q, PATTERN, mesh=mesh),
        "layer": lambda: layer(q.flatten(2), mesh),
        "join": lambda: mesh.join(q),
        "sum": lambda: mesh.sum(q[0, 0]),
        "token_mean": lambda: mesh.token_mean(q[0, 0]),
    }
    said = {}
    for name, call in calls.items():
        with pytest.raises(ValueError, match="the ranks of one sequence disagree") as caught:
            call()
        said[name] = str(caught.value)
    return said


@pytest.mark.parametrize("what", FACTS)
def test_another_mesh_of_the_same_group_is_noticed(pool, what):
    answers = pool.run(4, another_mesh, what, "its own", limit=30)
    for call, said in answers[0].items():
        assert all(answer[call] == said for answer in answers)
        assert re.search(rf"the mesh's {what}: .* on ranks 0, 2-3, .* on rank 1", said), (call, said)


def test_rows_of_one_mesh_with_another_mesh_are_told_apart(pool):
    answers = pool.run(4, another_mesh, "chunk", "of the others", limit=30)
    for call in ("dilated_attention", "join"):
        assert len({answer[call] for answer in answers}) == 1
        assert "the mesh's chunk: 16 on ranks 0, 2-3, 17 on rank 1" in answers[0][call]
        assert "rank 1: " in answers[0][call]


def meshes_alike(group):
    """Ranks may pass different meshes of the same arguments, and the default chunk is one like another."""
    meshes = [SequenceMesh(group, PATTERN, 64, chunk=chunk) for chunk in (None, 32)]
    mesh = meshes[dist.get_rank(group)]
    q = torch.randn(1, 64, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    local = mesh.split(q)
    out = mesh.join(dilated_attention(local, local, local, PATTERN, mesh=mesh))
    assert_close(out, dense_reference(q, q, q, PATTERN), rtol=0, atol=1e-12)
    assert mesh.sum(torch.ones(())).item() == mesh.size


def test_meshes_of_the_same_arguments_are_alike(pool):
    pool.run(2, meshes_alike)


def collectives_of_different_tensors(group):
    """The errors of each collective where rank 1 passes another tensor."""
    mesh = SequenceMesh(group, PATTERN, 64)
    odd = mesh.rank == 1
    rows = mesh.shard.num_rows
    wide = torch.zeros(1, 64, 3 + odd, requires_grad=True)
    calls = {
        "sum shape": lambda: mesh.sum(torch.zeros(3 + odd)),
        "sum dtype": lambda: mesh.sum(torch.zeros(3, dtype=torch.float64 if odd else torch.float32)),
        "mean dtype": lambda: mesh.token_mean(torch.zeros(rows, dtype=torch.float64 if odd else torch.float32)),
        "mean mask": lambda: mesh.token_mean(torch.zeros(rows), torch.ones(rows - odd, dtype=torch.bool)),
        "mean mask dtype": lambda: mesh.token_mean(torch.zeros(rows), torch.ones(rows, dtype=torch.int64)),
        "join dim": lambda: mesh.join(torch.zeros(rows), dim=int(odd)),
        "join scalar": lambda: mesh.join(torch.zeros(()) if odd else torch.zeros(rows), dim=0),
        "split backward": lambda: mesh.split(wide).sum().backward(),
        "mean": lambda: mesh.token_mean(torch.ones(rows - odd)),  # Chunks may be uneven.
    }
    said = {}
    for name, call in calls.items():
        try:
            said[name] = call()
        except ValueError as error:
            said[name] = str(error)
    return said


def test_collectives_of_different_tensors_are_the_same_error_on_every_rank(pool):
    answers = pool.run(2, collectives_of_different_tensors, limit=30)
    assert answers[0] == answers[1]
    expected = {
        "sum shape": r"shape: \[3\] on rank 0, \[4\] on rank 1",
        "sum dtype": "dtype: torch.float32 on rank 0, torch.float64 on rank 1",
        "mean dtype": "dtype: torch.float32 on rank 0, torch.float64 on rank 1",
        "mean mask": r"rank 1: mask is torch.bool of shape \(31,\); it must be bool, of the shape of values, \(32,\)",
        "mean mask dtype": "rank 0: mask is torch.int64 .*; rank 1: mask is torch.int64",
        "join dim": r"rank 1: .* \(32,\) has no dim 1",
        "join scalar": r"rank 1: .* \(\) has no dim 0",
        "split backward": r"sizes: \[1, 3\] on rank 0, \[1, 4\] on rank 1",
    }
    for name, said in expected.items():
        assert re.search(said, answers[0][name]), answers[0]
    assert answers[0]["mean"].item() == 1


def derivatives_through_the_mesh(group, keep_kv):
    """Of split, attention and join by torch.func, also of several inputs, and second ones of split and join."""
    mesh = SequenceMesh(group, PATTERN, 61, keep_kv=keep_kv)
    x = torch.randn(1, 61, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def attended(x):
        local = mesh.split(x)
        return mesh.join(dilated_attention(local, local, local, PATTERN, mesh=mesh)).square().sum()

    expected = torch.func.grad(lambda x: dense_reference(x, x, x, PATTERN).square().sum())(x)
    assert_close(torch.func.grad(attended)(x), expected, rtol=0, atol=1e-12)
    local = torch.stack([mesh.split(x), 2 * mesh.split(x)])

    def attended_rows(local):
        return dilated_attention(local, local, local, PATTERN, mesh=mesh).square().sum()

    grads = torch.func.vmap(torch.func.grad(attended_rows))(local)
    assert_close(grads[0], mesh.split(expected), rtol=0, atol=1e-12)
    assert_close(grads[1], torch.func.grad(attended_rows)(local[1]), rtol=0, atol=1e-12)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(mesh.join(mesh.split(x)).pow(3).sum(), x, create_graph=True)
    assert_close(torch.autograd.grad(grad.sum(), x)[0], 6 * x.detach())
    for call in (mesh.split, lambda x: mesh.join(mesh.split(x.detach()) * x[:, :1]), mesh.sum, mesh.token_mean):
        with torch.autograd.forward_ad.dual_level(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of torch's own making.
            dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
            with pytest.raises(NotImplementedError, match="jvp"):
                call(dual)


@pytest.mark.parametrize(("world", "keep_kv"), [(1, False), (4, False), (4, True)])
def test_derivatives_through_the_mesh(pool, world, keep_kv):
    pool.run(world, derivatives_through_the_mesh, keep_kv)


def copies(group):
    mesh = SequenceMesh(group, PATTERN, 64)
    holder = torch.nn.Linear(2, 2)
    holder.mesh = mesh
    assert copy.copy(mesh) is copy.deepcopy(mesh) is copy.deepcopy(holder).mesh is mesh
    for save in (pickle.dumps, lambda x: torch.save(x, io.BytesIO())):
        for given in (mesh, holder):
            with pytest.raises(TypeError, match=r"cannot be pickled.*state_dict.*construct SequenceMesh"):
                save(given)


@pytest.mark.parametrize("world", [1, 2])
def test_a_copy_is_the_mesh_and_none_is_pickled(pool, world):
    pool.run(world, copies)
