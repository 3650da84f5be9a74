"""The processes of a run: this rank's device and process group, and options that agree on every rank."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from longnet_dist import internals
from longnet_dist.distributed.collectives import gather_objects
from longnet_dist.training.config import TrainConfig
from longnet_dist.training.stopping import end_with_parent


@contextlib.contextmanager
def init_processes(config: TrainConfig, device: torch.device | None = None) -> Iterator[torch.device]:
    """Provide this rank's device, and a process group if a launcher set WORLD_SIZE and there is none yet.

    Args:
        config: the run's options.
        device: the device that the launcher assigned to this rank; None to choose it by LOCAL_RANK.

    Yields:
        The device.

    Raises:
        ValueError: on every rank, if the ranks have different options; on this rank, if it has no device.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _prepare_for_torchrun(config)
    local_rank, num_ranks = _read_launch()
    device = device or choose_device(local_rank, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    owns_group = not dist.is_initialized() and num_ranks > 1
    if owns_group:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout))
    try:
        _compare_options(config)
        yield device
    except BaseException:
        if owns_group:
            _leave_at_once(device)
        raise
    if owns_group:
        dist.destroy_process_group()


def _leave_at_once(device: torch.device) -> None:
    """Leave the process group after an error on this rank; the others may wait in a collective."""
    if device.type == "cuda":
        internals.abort_process_groups()
    else:
        dist.destroy_process_group()


def choose_device(local_rank: int, num_gpus: int) -> torch.device:
    """Return the device of a rank: its GPU, or the CPU if there is none or a process group exists that cannot use one.

    Args:
        local_rank: the rank on its machine.
        num_gpus: number of GPUs that this process sees.

    Raises:
        ValueError: if there are fewer GPUs than ranks.
    """
    backends = dist.get_backend_config() if dist.is_initialized() else "cuda:nccl"
    if not num_gpus or "cuda:" not in backends or "cuda:gloo" in backends:
        return torch.device("cpu")
    if local_rank >= num_gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = "" if visible is None else f", because CUDA_VISIBLE_DEVICES is {visible!r}"
        raise ValueError(
            f"LOCAL_RANK is {local_rank}, and this process sees {num_gpus} GPU{'s' * (num_gpus > 1)}{reason}: let each "
            "process see one GPU for each rank of its machine, or start fewer ranks"
        )
    return torch.device("cuda", local_rank)


def _read_launch() -> tuple[int, int]:
    """Return this process's rank on its machine, and the number of ranks, from the launcher's variables.

    Raises:
        ValueError: if they cannot be those of a launcher.
    """
    num_ranks = _read_integer("WORLD_SIZE", 1, 1, None)
    if not dist.is_initialized() and num_ranks > 1 and "RANK" not in os.environ:
        raise ValueError(f"WORLD_SIZE is {num_ranks}, and RANK is not set; torchrun and other launchers set both")
    _read_integer("RANK", 0, 0, None if dist.is_initialized() else num_ranks)
    return _read_integer("LOCAL_RANK", 0, 0, dist.get_world_size() if dist.is_initialized() else num_ranks), num_ranks


def _read_integer(name: str, default: int, minimum: int, end: int | None) -> int:
    """Return a variable of the environment, an integer from `minimum` to below `end`."""
    text = os.environ.get(name, str(default))
    try:
        value = int(text)
    except ValueError:
        value = minimum - 1
    if value < minimum or (end is not None and value >= end):
        limit = "" if end is None else f" and below the number of ranks, which is {end}"
        raise ValueError(
            f"the variable {name} is {text!r}; it must be an integer of at least {minimum}{limit}: launchers set it, "
            "so unset it to train in one process alone"
        )
    return value


def _prepare_for_torchrun(config: TrainConfig) -> None:
    """End with torchrun's agent, and warn of what would make its restarts fail."""
    end_with_parent()
    if not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        return
    warn_if_no_checkpoints(config)
    if internals.UNSHARED_RENDEZVOUS not in os.environ:
        warnings.warn(
            f"most restarts of torchrun fail unless {internals.UNSHARED_RENDEZVOUS}=1 is set: set it, or use "
            "launchers/torchrun.sh, which does",
            stacklevel=3,
        )


def warn_if_no_checkpoints(config: TrainConfig) -> None:
    """Warn that a launcher which restarts failed runs will find no checkpoint, if the options ask for none."""
    if not config.checkpoint_every:
        warnings.warn(
            "no checkpoint before the end: after a failure the run begins anew; give --checkpoint-every", stacklevel=2
        )


def _compare_options(config: TrainConfig) -> None:
    """Check that every rank has the same options. Otherwise ranks would train different models."""
    options_by_rank = [
        {name: json.dumps(value, default=str) for name, value in options.items()}
        for options in gather_objects(dataclasses.asdict(config))
    ]
    for rank, options in enumerate(options_by_rank):
        for name, value in options.items():
            if value != options_by_rank[0][name]:
                raise ValueError(
                    f"every rank must have the same options: {name} is {options_by_rank[0][name]} on rank 0, and "
                    f"{value} on rank {rank}"
                )
