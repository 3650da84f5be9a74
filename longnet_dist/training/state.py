"""The state of a training run as a flat dict of tensors, which is what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

from longnet_dist.checkpoints.checkpoints import Checkpoints
from longnet_dist.checkpoints.storage import place
from longnet_dist.checkpoints.verification import State
from longnet_dist.models.config import LongNetConfig
from longnet_dist.models.decoder import LongNet

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter."""


def make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter of an AdamW that made no step yet its moments, so that a checkpoint's can be loaded."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in MOMENTS[1:]}
            optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32)} | moments


def training_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> State:
    """Every tensor that a run resumes from, by name: parameters, AdamW's moments, this rank's random state.

    Tensors alone, because what is not a tensor would be stored as a pickle. FSDP's modules are resharded, because one
    that is still gathered, after a forward without gradients, shows other parameters than those the optimizer has.

    Raises:
        RuntimeError: where the optimizer lacks moments of a parameter of the model, or has those of another.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    state: State = {}
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = parameter.detach()
        moments = optimizer.state.get(parameter, {})  # To index it would make an entry.
        if lacking := [moment for moment in MOMENTS if moment not in moments]:
            raise RuntimeError(f"the optimizer has no {', '.join(lacking)} of {name}, so its state would be lost")
        state |= {f"optimizer.{moment}.{name}": moments[moment] for moment in MOMENTS}
    if len(optimizer.state) != len(state) // (1 + len(MOMENTS)):
        raise RuntimeError(
            f"the optimizer has moments of {len(optimizer.state)} parameters, and the model "
            f"{len(state) // (1 + len(MOMENTS))}: those of others are stale"
        )
    state[f"random.{rank}"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state[f"random_cuda.{rank}"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: State, rank: int) -> None:
    """Set this rank's random states to those in `state`, where it holds them."""
    if f"random.{rank}" in state:
        torch.set_rng_state(state[f"random.{rank}"])
    if f"random_cuda.{rank}" in state:
        torch.cuda.set_rng_state(state[f"random_cuda.{rank}"])


def names_without(state: State, prefixes: Iterable[str]) -> State:
    """Those of `state` whose names begin with none of `prefixes`."""
    return {name: x for name, x in state.items() if not name.startswith(tuple(prefixes))}


def load_model(folder: Path | str) -> LongNet:
    """The model of a run's newest whole checkpoint, on this process alone.

    Args:
        folder: the run's folder.

    Raises:
        FileNotFoundError: where it has no checkpoint.
        CheckpointError: where every one is damaged, or cannot be read.
    """
    checkpoints = Checkpoints(place(folder) / "checkpoints")
    found = checkpoints.newest()
    if found is None:
        raise FileNotFoundError(f"{folder} holds no checkpoints/step-*; give the folder of a run that wrote one")
    path, facts = found
    config = LongNetConfig(**facts["config"]["model"])
    model = config.build(dtype=getattr(torch, facts["config"]["dtype"]))
    checkpoints.load(path, {f"model.{name}": p.detach() for name, p in model.named_parameters()})
    return model
