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

import math
import operator
import zlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from longnet_dist.distributed.collectives import gather_objects
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.plan.pattern import Pattern

AXIS = "tensor_parallel"
"""Lightning's name of the axis of `self.device_mesh` whose ranks hold one sequence; the other is "data_parallel"."""
_SAMPLER = (
    "samples must be sharded over self.device_mesh['data_parallel'] alone. Lightning does so (use_distributed_sampler="
    "True, and no DistributedSampler of your own), but not for an IterableDataset; and ranks must draw alike"
)

_LOSS = (
    "return token_loss(logits, labels, mesh), or what a model of ours returns: the mean over the tokens of all ranks, "
    "not of this rank's"
)


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

    The loss that `training_step` returns is `token_loss` over the mesh, or another that is the same on all ranks of a
    sequence, and of which each rank's gradient is its own tokens' part. Every batch weighs the same, as ever in
    Lightning; where `training_step` returns `{"loss": loss, "tokens": n}`, n the valid labels of the *whole* sequences
    of the batch, every token does, over the batches that are accumulated and over the groups.

    Each batch is compared by a checksum. Ranks of a sequence draw the same random numbers, for dropout too. Log with
    `sync_dist=True` and the mean over ranks: their sum counts a sequence as often as it has ranks.

    Args:
        sequence_parallel_size: ranks that hold one sequence; "auto" for all that `data_parallel_size` leaves.
        data_parallel_size: groups with samples of their own.
        options: as for `ModelParallelStrategy`.

    Raises:
        ValueError: on every rank, where ranks of one sequence have other batches, losses or counts of tokens, or groups
            have the same batch; where ranks have other seeds or numbers of batches, or a parameter is not sharded over
            all.
    """

    def __init__(
        self, sequence_parallel_size: int | Literal["auto"] = "auto", data_parallel_size: int = 1, **options: Any
    ) -> None:
        super().__init__(data_parallel_size, sequence_parallel_size, **options)
        self._tokens: float | None = None
        self._window: list[float | None] = []
        self._losses: list[Tensor] = []

    def setup_environment(self) -> None:
        """Make the device mesh."""
        if self._tensor_parallel_size == "auto":
            self._tensor_parallel_size = self.world_size // int(self._data_parallel_size)
        super().setup_environment()

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """Around `configure_model`: ranks must go into it alike, as `fully_shard` keeps a part of what each made."""
        if not self._parts:
            states = [torch.get_rng_state()]
            states += [torch.cuda.get_rng_state(self.root_device)] if self.root_device.type == "cuda" else []
            self._same(
                "the state of random numbers, or a parameter, before configure_model",
                _digest([*states, *(p.detach() for p in self._module.parameters() if not p.is_meta)]),
                "call seed_everything with one seed on all ranks, and draw alike on them",
            )
        with super().model_sharded_context():
            yield

    def setup(self, trainer: Trainer) -> None:
        """Prepare the model that `configure_model` made; every gradient must be the mean over all ranks."""
        for part in self._parts:  # FSDP leaves some whole after a validation, which an optimizer must not get.
            part.reshard()
        tensors = [p for part in self._parts for p in part.parameters() if isinstance(p, DTensor)]
        sharded = {id(p) for p in tensors if p.device_mesh.size() == self.world_size}
        trained = [(name, p) for name, p in self._module.named_parameters() if p.requires_grad]
        loose = [name for name, p in trained if id(p) not in sharded]
        if loose:
            raise ValueError(
                f"{len(loose)} parameters ({', '.join(loose[:3])}, ...) are not sharded over all {self.world_size} "
                "ranks, so their gradients would not be summed: in configure_model, call "
                "fully_shard(part, mesh=self.device_mesh), also for one process"
            )
        super().setup(trainer)

    def on_train_start(self) -> None:
        """All ranks must have as many batches, or the last ones would wait."""
        self._same("the number of training batches", self._module.trainer.num_training_batches, _SAMPLER)

    def on_validation_start(self) -> None:
        """All ranks must have as many batches, or the last ones would wait."""
        self._same("the number of validation batches", self._module.trainer.num_val_batches, _SAMPLER)

    def on_test_start(self) -> None:
        """All ranks must have as many batches, or the last ones would wait."""
        self._same("the number of test batches", self._module.trainer.num_test_batches, _SAMPLER)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move the batch, which must be one on the ranks of a sequence, and in training another for each sequence."""
        axis, trainer = self.device_mesh[AXIS], self._module.trainer
        # Groups may have other numbers of batches to predict: there they do not wait for each other.
        over = axis.get_group() if trainer.predicting else None
        groups = self._same("the batch", _digest(batch), _SAMPLER, axis.size(), over)
        if trainer.training and len(groups) > 1 and len(set(groups)) == 1:
            raise ValueError(f"all {len(groups)} data-parallel groups have the same batch: {_SAMPLER}")
        return super().batch_to_device(batch, device, dataloader_idx)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's; takes note of "tokens"."""
        output = super().training_step(*args, **kwargs)
        self._tokens = float(output["tokens"]) if isinstance(output, Mapping) and "tokens" in output else None
        if self._tokens is not None and not self._module.automatic_optimization:
            raise ValueError('"tokens" weighs batches in automatic optimization: leave it out, and scale the loss')
        return output

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Each rank of a sequence makes its part of the gradient, and FSDP takes the mean: scale it to their sum."""
        self._window.append(self._tokens)
        self._losses.append(closure_loss.detach())
        scale = self.device_mesh[AXIS].size() * (1.0 if self._tokens is None else self._tokens)
        return super().backward(closure_loss * scale, optimizer, *args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """After the last backward, and before clipping, the sum over tokens becomes their mean."""

        def weighed() -> Any:
            result = closure()
            self._weigh(optimizer)
            return result

        return super().optimizer_step(optimizer, weighed, model, **kwargs)

    def _weigh(self, optimizer: Optimizer) -> None:
        window, losses = self._window, [float(loss) for loss in self._losses]
        self._window, self._losses = [], []
        self._same("the loss", losses, _LOSS, self.device_mesh[AXIS].size(), alike=_nearly)
        groups = self._same('"tokens"', window, "count the labels of whole sequences", self.device_mesh[AXIS].size())
        counts = [count for group in groups for count in group]
        if all(count is None for count in counts):
            return
        if None in counts:
            raise ValueError('training_step returned "tokens" for some batches of a step only: return it for all')
        # Lightning divided each loss by accumulate_grad_batches, and FSDP took the mean over groups.
        factor = self._module.trainer.accumulate_grad_batches * len(groups) / max(1.0, sum(counts))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    @property
    def _parts(self) -> list[Any]:
        return [part for part in self._module.modules() if isinstance(part, FSDPModule)]

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def _same(
        self,
        what: str,
        mine: Any,
        hint: str,
        size: int | None = None,
        group: ProcessGroup | None = None,
        alike: Callable[[Any, Any], bool] = operator.eq,
    ) -> list[Any]:
        """What each `size` ranks (by default all) have in common, of all or those of `group`; else a ValueError."""
        everyones = gather_objects(mine, group)
        size = size or len(everyones)
        for first in range(0, len(everyones), size):
            if not all(alike(other, everyones[first]) for other in everyones[first : first + size]):
                raise ValueError(
                    f"{what} differs between ranks {first} to {first + size - 1}, which must agree: {hint}"
                )
        return everyones[::size]


def _nearly(a: list[float], b: list[float]) -> bool:
    """Whether losses are the same, of which one may be rounded otherwise; NaN is NaN."""
    return len(a) == len(b) and all(
        math.isclose(x, y, rel_tol=1e-4) or (math.isnan(x) and math.isnan(y)) for x, y in zip(a, b, strict=True)
    )


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
