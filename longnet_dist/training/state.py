"""The state of a training run as a flat dict of tensors, for checkpoints; and models loaded from checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

from longnet_dist.checkpoints.checkpoints import Checkpoints
from longnet_dist.checkpoints.storage import storage_path
from longnet_dist.checkpoints.verification import State
from longnet_dist.models.config import LongNetConfig
from longnet_dist.models.decoder import LongNet
from longnet_dist.models.encoder import LongNetEncoder

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""The names under which AdamW stores its state of a parameter."""


class MasterWeights:
    """What the optimizer updates: a model's parameters, and float32 copies of those with less precision.

    An update of a bfloat16 number is lost if it is smaller than half the distance to the next one, 1/256 of the number.
    So the copies and AdamW's moments are in float32. The parameters, in which the model computes, are rounded copies.

    Args:
        model: the model, sharded or not. It must keep its parameters from now on.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.by_name: dict[str, torch.nn.Parameter] = {}
        self._pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        for name, parameter in model.named_parameters():
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            if parameter.dtype == dtype:
                self.by_name[name] = parameter
                continue
            self.by_name[name] = torch.nn.Parameter(parameter.detach().to(dtype))
            self._pairs.append((parameter, self.by_name[name]))

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The tensors to update."""
        return list(self.by_name.values())

    def take_gradients(self) -> None:
        """Add the gradients of a backward to those of the copies, and remove them from the parameters."""
        for parameter, master in self._pairs:
            if parameter.grad is not None:
                grad = parameter.grad.to(master.dtype)
                master.grad = grad if master.grad is None else master.grad + grad
                parameter.grad = None

    @torch.no_grad()
    def round_parameters(self) -> None:
        """Set the parameters to their copies, rounded."""
        for parameter, master in self._pairs:
            parameter.copy_(master)


def make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Create the moments of an AdamW that has made no step yet, so that a checkpoint can be loaded into them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in MOMENTS[1:]}
            optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32)} | moments


def training_state(weights: MasterWeights, optimizer: torch.optim.Optimizer, rank: int) -> State:
    """Collect the tensors that a run resumes from: weights, AdamW's moments, and this rank's random state.

    There are only tensors, because DCP would store anything else as a pickle. FSDP modules are resharded first: after
    a forward without gradients one may still be gathered, and its parameters are then not those of the optimizer.

    Args:
        weights: those of a model, of any sharding.
        optimizer: AdamW over them.
        rank: this rank, which names the random state.

    Returns:
        The tensors, which share memory with weights and optimizer. Their names begin with `model.`, `optimizer.`
        or `random`.

    Raises:
        RuntimeError: if the optimizer lacks moments of a parameter of the model, or has those of another parameter.
    """
    for module in weights.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    state: State = {}
    for name, parameter in weights.by_name.items():
        state[f"model.{name}"] = parameter.detach()
        moments = optimizer.state.get(parameter, {})  # Indexing would create an entry.
        if missing := [moment for moment in MOMENTS if moment not in moments]:
            raise RuntimeError(f"the optimizer has no {', '.join(missing)} of {name}, so its state would be lost")
        state |= {f"optimizer.{moment}.{name}": moments[moment] for moment in MOMENTS}
    num_parameters = len(state) // (1 + len(MOMENTS))
    if len(optimizer.state) != num_parameters:
        raise RuntimeError(
            f"the optimizer has moments of {len(optimizer.state)} parameters, and the model "
            f"{num_parameters}: those of others are stale"
        )
    state[f"random.{rank}"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state[f"random_cuda.{rank}"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: State, rank: int) -> None:
    """Set this rank's random states to those in `state`, if it holds them."""
    if f"random.{rank}" in state:
        torch.set_rng_state(state[f"random.{rank}"])
    if f"random_cuda.{rank}" in state:
        torch.cuda.set_rng_state(state[f"random_cuda.{rank}"])


def without_prefixes(state: State, prefixes: Iterable[str]) -> State:
    """Return the tensors of `state` whose names begin with none of `prefixes`."""
    return {name: x for name, x in state.items() if not name.startswith(tuple(prefixes))}


def build_model(
    objective: str, config: LongNetConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LongNet | LongNetEncoder:
    """Build the model that an objective trains, with newly initialised parameters.

    Args:
        objective: see `TrainConfig.objective`.
        config: the architecture.
        device, dtype: device and dtype of the parameters.
    """
    return LongNetEncoder(config, device=device, dtype=dtype) if objective == "mlm" else LongNet(config, device, dtype)


def load_model(folder: Path | str) -> LongNet | LongNetEncoder:
    """Load the model from a run's newest complete checkpoint, on this process alone.

    Args:
        folder: the run folder.

    Returns:
        The model, with the run's dtype, in training mode: an encoder if the run's objective was mlm.

    Raises:
        FileNotFoundError: if the run has no checkpoint.
        CheckpointError: if every checkpoint is damaged, or cannot be read.

    Example::

        model = load_model("runs/first").eval()
    """
    checkpoints = Checkpoints(storage_path(folder) / "checkpoints")
    newest = checkpoints.newest()
    if newest is None:
        raise FileNotFoundError(f"{folder} holds no checkpoints/step-*; give the folder of a run that wrote one")
    path, facts = newest
    config = LongNetConfig(**facts["config"]["model"])
    dtype = getattr(torch, facts["config"]["dtype"])
    wide = torch.promote_types(dtype, torch.float32)
    model = build_model(facts["config"].get("objective", "causal"), config, dtype=wide)
    checkpoints.load(path, {f"model.{name}": p.detach() for name, p in model.named_parameters()})
    return model.to(dtype)
