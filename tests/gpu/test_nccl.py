"""A failure here means: over NCCL, groups hang or are compared too often, or ranks compute something else."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from longnet_dist import Pattern, SequenceMesh, dilated_attention, internals
from longnet_dist.distributed import collectives
from longnet_dist.plan.exchange import STRATEGIES
from tests.cases import Case
from tests.distributed.test_attention import ALIGNED, UNALIGNED, largest_errors

EPS = torch.finfo(torch.bfloat16).eps
PATTERN = Pattern((16, 64), (1, 4))


@pytest.fixture(params=["lazy", "eager", "two backends"])
def group(request, tmp_path):
    """The default group of one rank; an eager one connects at once, as Lightning's does."""
    backend = "cpu:gloo,cuda:nccl" if request.param == "two backends" else "nccl"
    device = {"device_id": torch.device("cuda", 0)} if request.param == "eager" else {}
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=60), **device)
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_mesh_of_one_computes_what_no_mesh_does(group):
    mesh = SequenceMesh(group, PATTERN, 64)
    q, k, v = torch.randn(3, 2, 64, 4, 16, device="cuda", dtype=torch.bfloat16).unbind()
    expected = dilated_attention(q, k, v, PATTERN, causal=True)
    out = mesh.join(dilated_attention(*map(mesh.split, (q, k, v)), PATTERN, causal=True, mesh=mesh))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert mesh.token_mean(torch.ones(3, device="cuda")).item() == 1


def test_subgroups_are_made_by_their_ranks_alone_and_connect_at_once(group):
    (made,) = collectives.communicators(group, [[(0, 0)]], timedelta(seconds=60)).values()
    assert str(dist.get_backend_config(made.group)) == "cuda:nccl"
    assert made.all_gather(torch.ones(3, device="cuda"), "testing").wait().tolist() == [[1, 1, 1]]
    collectives.pad_process_groups(internals.num_process_groups() + 2)


def test_arguments_are_compared_once_and_after_each_batch(group, monkeypatch):
    compared = []
    original = collectives.Communicator.agree
    monkeypatch.setattr(
        collectives.Communicator, "agree", lambda self, *facts: (compared.append(facts), original(self, *facts))
    )
    mesh = SequenceMesh(group, PATTERN, 64)
    q = torch.randn(1, 64, 4, 16, device="cuda", dtype=torch.bfloat16)
    compared.clear()
    for step in range(3):
        mesh.split(torch.arange(64)[None])
        for _ in range(5):
            dilated_attention(q, q, q, PATTERN, mesh=mesh)
        assert len(compared) == step + 1


def test_tensors_that_the_ranks_cannot_exchange_are_an_error(group):
    mesh = SequenceMesh(group, PATTERN, 64)
    q = torch.randn(1, 64, 4, 16)
    with pytest.raises(ValueError, match="q is on cpu, and the ranks of the mesh exchange tensors on cuda"):
        dilated_attention(q, q, q, PATTERN, mesh=mesh)


def test_groups_end_at_once_after_an_error(group):
    SequenceMesh(group, PATTERN, 64)
    internals.abort_process_groups()
    assert not dist.is_initialized()


def _check_rank(rank: int, ranks: int, store: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    for pattern, N in ((ALIGNED, 128), (UNALIGNED, 125)):
        for strategy in STRATEGIES:
            for causal in (True, False):
                case = Case(pattern, N=N, H=4, G=2, B=2, D=16, causal=causal)
                errors = largest_errors(dist.group.WORLD, case, torch.bfloat16, "cuda", strategy=strategy)
                assert max(errors) < 16 * EPS, (case, strategy, errors)
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_on_gpus_of_their_own_equal_the_oracle(ranks, tmp_path):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"fewer than {ranks} GPUs")
    torch.multiprocessing.spawn(_check_rank, (ranks, str(tmp_path / "store")), nprocs=ranks)
