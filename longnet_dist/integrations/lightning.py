"""Lightning: a strategy under which each sequence is split over ranks, with parameters sharded by FSDP2.

    class Language(LightningModule):
        def configure_model(self):
            if self.model is None:
                self.mesh = sequence_mesh(self, config.pattern, seq_len=N)
                self.model = config.build()
                fully_shard(self.model, mesh=self.device_mesh)

        def training_step(self, tokens, _):  # Whole sequences, (B, N): every rank of a sequence has the same.
            labels = next_token_labels(tokens)
            loss = self.model(self.mesh.split(tokens), self.mesh, self.mesh.split(labels))
            return {"loss": loss, "tokens": (labels != -100).sum()}

    Trainer(strategy=SequenceParallelStrategy(), devices=8).fit(Language(), loader)

The strategy is Lightning's `ModelParallelStrategy` (device mesh, sampler, checkpoints), with what that leaves to be
silently wrong either done or refused: the scale of gradients, the weight of tokens, other samples or seeds on the ranks
of one sequence, and parameters whose gradients nobody sums.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from longnet_dist.comm import gather_objects
from longnet_dist.mesh import SequenceMesh
from longnet_dist.pattern import Pattern

AXIS = "tensor_parallel"
"""Lightning's name of the axis of `self.device_mesh` whose ranks hold one sequence; the other is "data_parallel"."""


def sequence_mesh(module: LightningModule, pattern: Pattern, seq_len: int, **options: Any) -> SequenceMesh:
    """The mesh of the ranks that hold one sequence, for `configure_model`. Collective.

    Args:
        module: the one whose `configure_model` runs.
        pattern, seq_len, options: as for `SequenceMesh`.

    Raises:
        ValueError: under another strategy than `SequenceParallelStrategy`, and as `SequenceMesh`.
    """
    strategy = module.trainer.strategy
    if not isinstance(strategy, SequenceParallelStrategy):
        raise ValueError(
            f"the Trainer's strategy is {type(strategy).__name__}, under which ranks would get other samples, or scale "
            "gradients otherwise: pass Trainer(strategy=SequenceParallelStrategy()), also for one process"
        )
    return SequenceMesh(strategy.device_mesh[AXIS], pattern, seq_len, **options)


class SequenceParallelStrategy(ModelParallelStrategy):
    """Ranks in groups that hold one sequence each; groups have other samples.

    The loss that `training_step` returns is `token_loss` over the mesh, or another of which each rank's gradient is its
    own tokens' part. By default every batch weighs the same, as ever in Lightning. Where `training_step` returns
    `{"loss": loss, "tokens": n}`, n the valid labels of the *whole* sequences of the batch, every token weighs the same:
    over the batches that are accumulated, and over the groups.

    Args:
        sequence_parallel_size: ranks that hold one sequence; "auto" for all that `data_parallel_size` leaves.
        data_parallel_size: groups with samples of their own.
        options: as for `ModelParallelStrategy`.

    Raises:
        ValueError: on every rank, where ranks of one sequence have other batches, numbers of batches, seeds or counts
            of tokens; where groups have the same batch; where a parameter is not sharded over all ranks.
    """

    def __init__(
        self, sequence_parallel_size: int | Literal["auto"] = "auto", data_parallel_size: int = 1, **options: Any
    ) -> None:
        super().__init__(data_parallel_size, sequence_parallel_size, **options)
        self._tokens: float | None = None
        self._window: list[float | None] = []

    def setup_environment(self) -> None:
        """As there."""
        if self._tensor_parallel_size == "auto":
            self._tensor_parallel_size = self.world_size // int(self._data_parallel_size)
        super().setup_environment()

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """Around `configure_model`: all ranks must go into it alike, as `fully_shard` keeps a part of each one's own."""
        assert self.lightning_module is not None
        parameters = list(self.lightning_module.parameters())
        if not any(isinstance(parameter, DTensor) for parameter in parameters):
            states = [torch.get_rng_state()]
            states += [torch.cuda.get_rng_state(self.root_device)] if self.root_device.type == "cuda" else []
            made = [parameter.detach() for parameter in parameters if not parameter.is_meta]
            self._same(
                "the state of random numbers or the parameters before configure_model",
                _digest([states, made]),
                "call seed_everything(seed) with one seed on all ranks, and draw alike on them",
            )
        with super().model_sharded_context():
            yield

    def setup(self, trainer: Trainer) -> None:
        """As there; first, whether gradients of all parameters will be the mean over all ranks."""
        assert self.lightning_module is not None
        sharded = {
            parameter
            for part in self.lightning_module.modules()
            if isinstance(part, FSDPModule)
            for parameter in part.parameters()
            if isinstance(parameter, DTensor) and parameter.device_mesh.size() == self.world_size
        }
        loose = [
            name for name, p in self.lightning_module.named_parameters() if p.requires_grad and p not in sharded
        ]
        if loose:
            raise ValueError(
                f"{len(loose)} parameters, {', '.join(loose[:3])}..., are not sharded over all {self.world_size} ranks, "
                "so nobody would sum their gradients: in configure_model, fully_shard(part, mesh=self.device_mesh), "
                "also for one process"
            )
        super().setup(trainer)

    def on_train_start(self) -> None:
        """All ranks must have as many batches."""
        assert self.lightning_module is not None
        self._same("the number of batches", self.lightning_module.trainer.num_training_batches, "see the sampler")

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """As there; first, whether each sequence's ranks have one batch, and other sequences' another."""
        assert self.lightning_module is not None
        training, digest = self.lightning_module.trainer.training, _digest(batch)
        hint = (
            f"the sampler must be of {self.device_mesh.size(0)} replicas, by self.device_mesh['data_parallel']: leave it "
            "to Lightning (use_distributed_sampler=True, no DistributedSampler of your own), and draw alike on all ranks"
        )
        groups = self._same("the batch", digest, hint, everywhere=training)
        if training and len(groups) > 1 and len(set(groups)) == 1:
            raise ValueError(f"all {len(groups)} data-parallel groups have the same batch: {hint}; or shard it yourself")
        return super().batch_to_device(batch, device, dataloader_idx)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As there; takes note of "tokens"."""
        assert self.lightning_module is not None
        output = super().training_step(*args, **kwargs)
        self._tokens = float(output["tokens"]) if isinstance(output, Mapping) and "tokens" in output else None
        if self._tokens is not None and not self.lightning_module.automatic_optimization:
            raise ValueError('"tokens" weighs batches in automatic optimization: leave it out, and scale the gradients')
        return output

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """As there: the ranks of a sequence hold parts of its gradient, and FSDP takes their mean."""
        self._window.append(self._tokens)
        scale = self.device_mesh[AXIS].size() * (1 if self._tokens is None else self._tokens)
        return super().backward(closure_loss * scale, optimizer, *args, **kwargs)

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """As there; before clipping, the sum over tokens becomes their mean."""

        def weighed() -> Any:
            result = closure()
            self._weigh(optimizer)
            return result

        return super().optimizer_step(optimizer, weighed, model, **kwargs)

    def _weigh(self, optimizer: Optimizer) -> None:
        assert self.lightning_module is not None
        window, self._window = tuple(self._window), []
        counts = [n for group in self._same('"tokens"', window, "give those of whole sequences") for n in group]
        if not any(n is not None for n in counts):
            return
        if None in counts:
            raise ValueError('training_step returned "tokens" for some batches of a step only: return it for all')
        # Lightning divided each by accumulate_grad_batches, and FSDP took the mean over the groups.
        divided = self.lightning_module.trainer.accumulate_grad_batches * self.device_mesh.size(0)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(divided / max(1.0, sum(counts)))

    def _same(self, what: str, mine: Any, hint: str, everywhere: bool = True) -> list[Any]:
        """What each sequence's ranks have, one a group (or of this group alone). ValueError where they differ."""
        size = self.device_mesh[AXIS].size()
        everyones = gather_objects(mine, None if everywhere else self.device_mesh[AXIS].get_group())
        for first in range(0, len(everyones), size):
            if any(other != everyones[first] for other in everyones[first : first + size]):
                raise ValueError(f"{what} differs between the {size} ranks that hold one sequence: {hint}")
        return everyones[::size]


def _digest(values: Any) -> int:
    """A checksum of the tensors, numbers and text in nested collections."""
    found = [0]

    def add(value: Any) -> Any:
        is_tensor = isinstance(value, Tensor)
        said = f"{value.dtype} {tuple(value.shape)}" if is_tensor else repr(value)
        found[0] = zlib.crc32(said.encode(), found[0])
        if is_tensor:
            found[0] = zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), found[0])
        return value

    apply_to_collection(values, (Tensor, str, int, float), add)
    return found[0]
