"""A failure here means: a rank computes on a device that its process group cannot use, or that is not its own."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import longnet_dist
from longnet_dist.training.processes import choose_device, init_processes


@pytest.fixture
def gloo_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_rank_has_the_gpu_of_its_number():
    assert choose_device(0, 0) == choose_device(3, 0) == torch.device("cpu")
    assert [choose_device(rank, 2) for rank in range(2)] == [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_a_rank_whose_group_uses_gloo_has_no_gpu(gloo_group):
    """Ray's workers without a reserved GPU are so, and see the machine's GPUs if Ray is told not to hide them."""
    assert choose_device(0, 8) == choose_device(9, 8) == torch.device("cpu")


def test_more_ranks_than_gpus_raise(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match="LOCAL_RANK is 2, and this process sees 2 GPUs: let each process see one GPU"):
        choose_device(2, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ValueError, match=r"sees 1 GPU, because CUDA_VISIBLE_DEVICES is '3': .*fewer ranks"):
        choose_device(1, 1)


def test_a_launcher_assigns_the_device(config):
    """Whatever LOCAL_RANK says, which is no index of a GPU if ranks have several, or a part of one."""

    class Session:
        def device(self):
            raise LookupError("asked for the device")

    with pytest.raises(LookupError, match="asked for the device"):
        longnet_dist.train(config, Session())
    with init_processes(config, torch.device("meta")) as device:
        assert device == torch.device("meta")
