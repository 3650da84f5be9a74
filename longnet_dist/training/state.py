"""The state of a training run as a flat dict of tensors, for checkpoints; and models loaded from checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from longnet_dist.checkpoints.checkpoints import Checkpoints
from longnet_dist.checkpoints.storage import as_os_error, storage_path
from longnet_dist.checkpoints.verification import State
from longnet_dist.data.tokenizers import Bytes
from longnet_dist.distributed.patience import Patience
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
    model, options = _load_checkpoint(storage_path(folder))
    return model.to(getattr(torch, options["dtype"]))


def is_export(folder: Path) -> bool:
    """Return whether a folder holds a model that `longnet-dist export` wrote."""
    return (folder / "model.safetensors").exists()


@torch.no_grad()
def initialise(
    weights: MasterWeights, source: Path, config: LongNetConfig, tokens_by: str, patience: Patience
) -> list[str]:
    """Set the weights to those of another run's newest checkpoint, or of an export. Collective.

    Args:
        weights: the weights of the new run, of any sharding.
        source: the folder of the other run, or of the export.
        config: the architecture of the new run, with every default filled in.
        tokens_by: the name of the tokenizer of the new run's tokens.
        patience: the means by which ranks wait for one another.

    Returns:
        Sentences that say whose weights these are, and what differs from their model and tokens.

    Raises:
        ValueError: on every rank, if the source cannot be read, or has other tensors, with the names of all of them.
        CheckpointError: if every checkpoint of the other run is damaged, or cannot be read.
    """
    model: LongNet | LongNetEncoder | None = None
    their_tokens_by, problem = Bytes.name, None
    try:
        with as_os_error():
            if is_export(source):
                model = LongNet.from_pretrained(source)
                about = json.loads((source / "config.json").read_text()).get("tokenizer") or {}
                their_tokens_by = about.get("name", Bytes.name)
            else:
                model, options = _load_checkpoint(source)
                their_tokens_by = options.get("tokens_by", Bytes.name)
            problem = _describe_misfit(dict(model.named_parameters()), weights.by_name)
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem := next((p for p in patience.gather(problem, f"load {source}") if p), None):
        raise ValueError(f"init_from {source}: {problem}")
    assert model is not None
    for name, parameter in model.named_parameters():
        own = weights.by_name[name]
        full = parameter.to(own.device, own.dtype)
        if isinstance(own, DTensor):
            # Every rank has the whole tensor, so that nothing needs to be sent.
            full = distribute_tensor(full, own.device_mesh, own.placements, src_data_rank=None)
        own.copy_(full)
    weights.round_parameters()
    before, now = asdict(model.config.resolved), asdict(config)
    changed = [f"{name} {before[name]} there, {now[name]} here" for name in now if before[name] != now[name]]
    lines = [f"step 0 has the weights of {source}" + (f"; of the model, {', '.join(changed)}" if changed else "")]
    if tokens_by != their_tokens_by:
        lines.append(f"these weights know tokens by {their_tokens_by}, and the data's are by {tokens_by}")
    return lines


def _describe_misfit(theirs: dict[str, torch.nn.Parameter], ours: dict[str, torch.nn.Parameter]) -> str | None:
    """List the tensors that are not in both models with one shape; None if there are none."""

    def shape(tensors: dict[str, torch.nn.Parameter], name: str) -> str:
        return str(tuple(tensors[name].shape)) if name in tensors else "missing"

    names = [name for name in theirs | ours if shape(theirs, name) != shape(ours, name)]
    if not names:
        return None
    listed = "; ".join(f"{name} is {shape(theirs, name)} there and {shape(ours, name)} here" for name in names)
    return f"its tensors are not those of this model, which needs its sizes (--model.*): {listed}"


def _load_checkpoint(folder: Path) -> tuple[LongNet | LongNetEncoder, dict[str, Any]]:
    """Load the newest complete checkpoint of a run; return the model in float32 at least, and the run's options."""
    checkpoints = Checkpoints(folder / "checkpoints")
    newest = checkpoints.newest()
    if newest is None:
        raise FileNotFoundError(f"{folder} holds no checkpoints/step-*; give the folder of a run that wrote one")
    path, facts = newest
    options = facts["config"]
    dtype = torch.promote_types(getattr(torch, options["dtype"]), torch.float32)
    model = build_model(options.get("objective", "causal"), LongNetConfig(**options["model"]), dtype=dtype)
    checkpoints.load(path, {f"model.{name}": p.detach() for name, p in model.named_parameters()})
    return model, options
