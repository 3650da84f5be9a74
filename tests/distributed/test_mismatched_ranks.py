"""A failure here means: ranks whose arguments disagree hang, crash or compute, instead of all raising one error."""

from __future__ import annotations

import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from longnet_dist import DilatedAttention, LongNetConfig, Pattern, SequenceMesh, dense_reference, dilated_attention
from longnet_dist.attention.kernels import KERNELS, eager
from longnet_dist.plan.hardware import HARDWARE
from tests.pool import Pool

PATTERN = Pattern((8, 16, 64), (1, 2, 4))
CHANGES = {
    "seq_len": 63,
    "chunk": 17,
    "keep_kv": True,
    "strategy": "exchange",
    "hardware": HARDWARE["b200"],
    "reduce_dtype": torch.float64,
    "timeout": 61,
}


def errors_of_different_meshes(group, option, rows):
    """Return the error of each call in turn; rank 1 passes a mesh of the same group with another option."""
    options = {"seq_len": 64, "timeout": 60}
    meshes = [SequenceMesh(group, PATTERN, **options | change) for change in ({}, {option: CHANGES[option]})]
    mesh = meshes[dist.get_rank(group) == 1]
    q = torch.zeros(1, (mesh if rows == "of its own mesh" else meshes[0]).shard.num_rows, 2, 8)
    layer = DilatedAttention(16, 2, PATTERN.dilation_rates, PATTERN.segment_lengths)
    calls = {
        "dilated_attention": lambda: dilated_attention(q, q, q, PATTERN, mesh=mesh),
        "layer": lambda: layer(q.flatten(2), mesh),
        "join": lambda: mesh.join(q),
        "sum": lambda: mesh.sum(q[0, 0]),
        "token_mean": lambda: mesh.token_mean(q[0, 0]),
    }
    errors = {}
    for name, call in calls.items():
        with pytest.raises(ValueError, match="the ranks of one sequence disagree") as caught:
            call()
        errors[name] = str(caught.value)
    return errors


@pytest.mark.parametrize("option", CHANGES)
def test_different_meshes_of_one_group_raise_the_same_error_on_every_rank(pool, option):
    results = pool.run(4, errors_of_different_meshes, option, "of its own mesh", limit=30)
    for call, error in results[0].items():
        assert all(errors[call] == error for errors in results)
        assert re.search(rf"the mesh's {option}: .* on ranks 0, 2-3, .* on rank 1", error), (call, error)


def test_rows_that_do_not_fit_a_different_mesh_are_reported_too(pool):
    results = pool.run(4, errors_of_different_meshes, "chunk", "of the others' mesh", limit=30)
    for call in ("dilated_attention", "join"):
        assert len({errors[call] for errors in results}) == 1
        assert "the mesh's chunk: 16 on ranks 0, 2-3, 17 on rank 1" in results[0][call]
        assert "rank 1: " in results[0][call]


def use_equal_meshes(group):
    """Pass different mesh objects with equal options; the same chunk may be the default or an explicit one."""
    meshes = [SequenceMesh(group, PATTERN, 64, chunk=chunk) for chunk in (None, 32)]
    mesh = meshes[dist.get_rank(group)]
    q = torch.randn(1, 64, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    local = mesh.split(q)
    out = mesh.join(dilated_attention(local, local, local, PATTERN, mesh=mesh))
    assert_close(out, dense_reference(q, q, q, PATTERN), rtol=0, atol=1e-12)
    assert mesh.sum(torch.ones(())).item() == mesh.size


def test_meshes_with_equal_options_are_interchangeable(pool):
    pool.run(2, use_equal_meshes)


def call_collectives_with_different_tensors(group):
    """Return the result or the error of each collective; rank 1 passes a different tensor."""
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
        "mean": lambda: mesh.token_mean(torch.ones(rows - odd)),  # Valid: chunks may be uneven.
    }
    results = {}
    for name, call in calls.items():
        try:
            results[name] = call()
        except ValueError as error:
            results[name] = str(error)
    return results


def test_different_tensors_in_a_collective_raise_the_same_error_on_every_rank(pool):
    results = pool.run(2, call_collectives_with_different_tensors, limit=30)
    assert results[0] == results[1]
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
    for name, message in expected.items():
        assert re.search(message, results[0][name]), results[0]
    assert results[0]["mean"].item() == 1


def disagree(group, what):
    """Return the error that this rank gets, and after how many seconds."""
    rank = dist.get_rank(group)
    odd = rank == 1
    start = time.monotonic()
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
        return str(error), time.monotonic() - start
    return "no error", time.monotonic() - start


@pytest.mark.parametrize(
    ("what", "message"),
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
def test_ranks_that_disagree_all_get_the_same_error_at_once(pool, what, message):
    results = pool.run(4, disagree, what)
    assert len({error for error, _ in results}) == 1
    assert re.search(message, results[0][0]), results[0][0]
    assert all(seconds < 20 for _, seconds in results)


def disagree_in_the_layer(group, what):
    """Return the error that this rank gets from the layer or the model; rank 1 passes other arguments."""
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
            for size in (1, 2):  # Calls that every rank has made before.
                dilated_attention(*[q.expand(size, -1, -1, -1)] * 3, config.pattern, mesh=mesh)
            pattern = "none" if odd and what == "call pattern type" else config.pattern
            q = q.expand(1 + (odd and what == "later batch"), -1, -1, -1)
            dilated_attention(q, q, q, pattern, mesh=mesh)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("layer rows", "rank 1: x has 17 rows"),
        ("layer width", "rank 1: x is .* with d_model = 16"),
        ("model rows", "rank 1: x has 17 rows"),
        ("model dimensions", r"rank 1: tokens is \(16,\)"),
        ("call pattern type", "rank 1: pattern is 'none'"),
        ("later batch", r"\[1, 2, 8\] on ranks 0, 2-3, \[2, 2, 8\] on rank 1"),
    ],
)
def test_a_mistake_of_one_rank_is_an_error_on_every_rank(pool, what, message):
    """This holds in the layer, the model and later calls, too, so that no rank waits until the time limit."""
    errors = pool.run(4, disagree_in_the_layer, what, limit=30)
    assert len(set(errors)) == 1
    assert re.search(message, errors[0]), errors[0]


def call_without_rank_3(group, strategy):
    """Return the errors that this rank gets, at first and in later calls, when rank 3 does not call."""
    mesh = SequenceMesh(group, PATTERN, 64, strategy=strategy, timeout=timedelta(seconds=2))
    q = torch.zeros(1, mesh.shard.num_rows, 4, 8)
    dilated_attention(q, q, q, PATTERN, mesh=mesh)
    if mesh.rank == 3:
        return "", ""
    with pytest.raises(RuntimeError) as caught:
        dilated_attention(q, q, q, PATTERN, mesh=mesh)
    mesh.agree = lambda *arguments: None  # As with NCCL, where only the first call compares arguments.
    with pytest.raises(RuntimeError) as later:
        dilated_attention(q, q, q, PATTERN, mesh=mesh)
    return str(caught.value), str(later.value)


@pytest.mark.parametrize(
    ("strategy", "doing"),
    [
        ("all_gather", "gathering the keys and values"),
        ("all_to_all", "sending queries"),
        ("exchange", "sending keys and values"),
    ],
)
def test_a_missing_rank_is_an_attributed_error_within_the_time_limit(strategy, doing):
    """The test uses its own pool, because the process groups are broken afterwards."""
    pool = Pool()
    try:
        errors = pool.run(4, call_without_rank_3, strategy, limit=60)
    finally:
        pool.close()
    first, later = errors[2]
    assert "rank 2 of the sequence failed while comparing the ranks' arguments" in first
    assert f"rank 2 of the sequence failed while {doing} of branch (w=64, r=4) over ranks 0 to 3" in later
    assert "time limit 2 s" in later
    assert "a rank of that group ended, or did not make the same call" in later


class DyingKernel:
    """The eager kernel, whose process is killed at its first call in a forward, or in a backward."""

    unsupported = staticmethod(eager.unsupported)

    def __init__(self, rank, direction):
        self.dies_in = direction if rank == 3 else ""

    def forward(self, *args, **options):
        if self.dies_in == "forward":
            os.kill(os.getpid(), signal.SIGKILL)
        return eager.forward(*args, **options)

    def backward(self, *args, **options):
        if self.dies_in == "backward":
            os.kill(os.getpid(), signal.SIGKILL)
        return eager.backward(*args, **options)


def die_in_an_exchange(group, strategy, direction, folder):
    """Write the error that this rank gets when rank 3 is killed after exchanges have started."""
    mesh = SequenceMesh(group, PATTERN, 64, strategy=strategy, timeout=timedelta(seconds=5))
    q = torch.zeros(1, mesh.shard.num_rows, 4, 8, requires_grad=True)
    KERNELS["dying"] = DyingKernel(mesh.rank, direction)
    with pytest.raises(RuntimeError) as caught:
        dilated_attention(q, q, q, PATTERN, mesh=mesh, kernel="dying").sum().backward()
    (folder / str(mesh.rank)).write_text(str(caught.value))


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("strategy", ["all_gather", "all_to_all", "exchange"])
def test_a_rank_that_is_killed_in_an_exchange_is_an_attributed_error_on_the_others(strategy, direction, tmp_path):
    """Every other rank gets it within the time limit, with the branch, its ranks, and the one that ended."""
    pool = Pool()
    try:
        with pytest.raises(AssertionError, match="rank 3 of 4: the process ended"):
            pool.run(4, die_in_an_exchange, strategy, direction, tmp_path, limit=60)
    finally:
        pool.close()
    for rank in range(3):
        error = (tmp_path / str(rank)).read_text()
        assert re.search(rf"rank {rank} of the sequence failed while .*branch .* over ranks \d to 3", error), error
        assert re.search(r"the process of rank 3 \(\d+\) has ended", error), error
