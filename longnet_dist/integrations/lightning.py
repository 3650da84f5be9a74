"""Lightning: a strategy that splits each sequence across ranks, with parameters sharded by FSDP2.

    class Language(LightningModule):
        def configure_model(self):
            if self.model is None:
                self.mesh = sequence_mesh(self, config.pattern, seq_len=N)
                self.model = config.build()
                fully_shard(self.model, mesh=self.device_mesh)

        def training_step(self, tokens, _):  # Whole sequences, (B, N), the same on every rank of a sequence.
            targets = next_token_labels(tokens)
            loss = self.model(self.mesh.split(tokens), self.mesh, self.mesh.split(targets))
            return {"loss": loss, "tokens": (targets != -100).sum()}

    Trainer(strategy=SequenceParallelStrategy(), devices=8).fit(Language(), loader)

The strategy extends Lightning's `ModelParallelStrategy`, which makes the device mesh, the sampler and checkpoints. It
adds what would otherwise be silently wrong:

- The scale of gradients and the weight of tokens are corrected.
- Different samples or seeds on the ranks of one sequence raise a ValueError.
- Parameters whose gradients would not be summed over all ranks raise a ValueError.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from longnet_dist import internals
from longnet_dist.distributed.collectives import gather_objects
from longnet_dist.distributed.digest import digest
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.plan.pattern import Pattern

AXIS = "tensor_parallel"
"""Lightning's name for the axis of `self.device_mesh` whose ranks hold one sequence. The other is "data_parallel"."""
_SAMPLER_HINT = (
    "samples must be sharded over self.device_mesh['data_parallel'] alone. Lightning does so (use_distributed_sampler="
    "True, and no DistributedSampler of your own), but not for an IterableDataset; and ranks must draw alike"
)
_LOSS_HINT = (
    "return token_loss(logits, targets, mesh), or what a model of ours returns: the mean over the tokens of all ranks, "
    "not of this rank's"
)


def sequence_mesh(module: LightningModule, pattern: Pattern, seq_len: int, **options: Any) -> SequenceMesh:
    """Make the mesh of the ranks that hold one sequence, in `configure_model`. Collective.

    Args:
        module: The module whose `configure_model` runs.
        pattern: The branches.
        seq_len: The number of tokens per sequence, N.
        **options: Further arguments of `SequenceMesh`.

    Returns:
        The mesh.

    Raises:
        ValueError: If the Trainer's strategy is not a `SequenceParallelStrategy`, or `SequenceMesh` raises.
    """
    strategy = module.trainer.strategy
    if not isinstance(strategy, SequenceParallelStrategy):
        raise ValueError(
            f"the Trainer's strategy is {type(strategy).__name__}, under which ranks would get other samples, or scale "
            "gradients otherwise: pass Trainer(strategy=SequenceParallelStrategy()), also for one process"
        )
    return SequenceMesh(strategy.device_mesh[AXIS], pattern, seq_len, **options)


class SequenceParallelStrategy(ModelParallelStrategy):
    """A strategy in which each group of ranks holds one sequence at a time, and groups have different samples.

    `training_step` returns `token_loss` over the mesh, or another loss that is the same on all ranks of a sequence. Its
    gradient on each rank must be the part of that rank's tokens. It can weigh batches in two ways:

    - It returns `loss`: every batch weighs the same, as usual in Lightning.
    - It returns `{"loss": loss, "tokens": n}`, where n counts the valid labels of the batch's *whole* sequences: every
      token weighs the same, across accumulated batches and across groups.

    Batches are compared between ranks by a digest. All ranks of a sequence draw the same random numbers, for dropout
    too. Log with `sync_dist=True` and the mean over ranks: a sum would count a sequence once per rank.

    Args:
        sequence_parallel_size: The number of ranks that hold one sequence; "auto" for world size / data_parallel_size.
        data_parallel_size: The number of groups of ranks.
        **options: Further arguments of `ModelParallelStrategy`.

    Raises:
        ValueError: On every rank, and before the optimizer's step:

            - if ranks of one sequence have different batches, losses or numbers of tokens;
            - if all groups have the same batch;
            - if ranks have different seeds or numbers of batches;
            - if a parameter is not sharded over all ranks.
    """

    def __init__(
        self, sequence_parallel_size: int | Literal["auto"] = "auto", data_parallel_size: int = 1, **options: Any
    ) -> None:
        super().__init__(data_parallel_size, sequence_parallel_size, **options)
        self._tokens: float | None = None  # The "tokens" of the last training_step.
        # The numbers of tokens and the losses of the batches since the last optimizer step.
        self._window: list[float | None] = []
        self._losses: list[Tensor] = []

    def setup_environment(self) -> None:
        """Make the device mesh."""
        internals.fill_tensor_parallel_axis(self)
        super().setup_environment()

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """Enter the context of `configure_model`, after checking that all ranks bring the same state.

        Every rank builds the whole model, and `fully_shard` retains a part of it on each. So the random numbers and the
        parameters of all ranks must be equal.
        """
        if not self._sharded_parts:
            states = [torch.get_rng_state()]
            states += [torch.cuda.get_rng_state(self.root_device)] if self.root_device.type == "cuda" else []
            self._require_same(
                "the state of random numbers, or a parameter, before configure_model",
                digest([*states, *(p.detach() for p in self._module.parameters() if not p.is_meta)]),
                "call seed_everything with one seed on all ranks, and draw alike on them",
            )
        with super().model_sharded_context():
            yield

    def setup(self, trainer: Trainer) -> None:
        """Prepare the model, after checking that FSDP averages every gradient over all ranks."""
        # After a validation FSDP leaves some parameters gathered, and an optimizer must not receive those.
        for part in self._sharded_parts:
            part.reshard()
        tensors = [p for part in self._sharded_parts for p in part.parameters() if isinstance(p, DTensor)]
        sharded = {id(p) for p in tensors if p.device_mesh.size() == self.world_size}
        trained = [(name, p) for name, p in self._module.named_parameters() if p.requires_grad]
        unsharded = [name for name, p in trained if id(p) not in sharded]
        if unsharded:
            raise ValueError(
                f"{len(unsharded)} parameters ({', '.join(unsharded[:3])}, ...) are not sharded over all "
                f"{self.world_size} ranks, so their gradients would not be summed: in configure_model, call "
                "fully_shard(part, mesh=self.device_mesh), also for one process"
            )
        super().setup(trainer)

    def on_train_start(self) -> None:
        """Check that all ranks have equally many batches: a rank with more would wait for the others in vain."""
        self._require_same("the number of training batches", self._module.trainer.num_training_batches, _SAMPLER_HINT)

    def on_validation_start(self) -> None:
        """Check that all ranks have equally many batches: a rank with more would wait for the others in vain."""
        self._require_same("the number of validation batches", self._module.trainer.num_val_batches, _SAMPLER_HINT)

    def on_test_start(self) -> None:
        """Check that all ranks have equally many batches: a rank with more would wait for the others in vain."""
        self._require_same("the number of test batches", self._module.trainer.num_test_batches, _SAMPLER_HINT)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Check a batch, and move it to the device.

        Ranks of one sequence must have the same batch, and in training the groups must have different ones.
        """
        axis, trainer = self.device_mesh[AXIS], self._module.trainer
        # Groups may have different numbers of batches to predict, so then they are not compared with each other.
        process_group = axis.get_group() if trainer.predicting else None
        digests = self._require_same("the batch", digest(batch), _SAMPLER_HINT, axis.size(), process_group)
        if trainer.training and len(digests) > 1 and len(set(digests)) == 1:
            raise ValueError(f"all {len(digests)} data-parallel groups have the same batch: {_SAMPLER_HINT}")
        return super().batch_to_device(batch, device, dataloader_idx)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's `training_step`, and record the "tokens" that it returns."""
        output = super().training_step(*args, **kwargs)
        self._tokens = float(output["tokens"]) if isinstance(output, Mapping) and "tokens" in output else None
        if self._tokens is not None and not self._module.automatic_optimization:
            raise ValueError('"tokens" weighs batches in automatic optimization: leave it out, and scale the loss')
        return output

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the gradients, scaled so that FSDP's mean over ranks is the sum over the ranks of a sequence."""
        self._window.append(self._tokens)
        self._losses.append(closure_loss.detach())
        scale = self.device_mesh[AXIS].size() * (1.0 if self._tokens is None else self._tokens)
        return super().backward(closure_loss * scale, optimizer, *args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Run a step, in which gradients become means over tokens after the last backward and before clipping."""

        def closure_with_weights() -> Any:
            result = closure()
            self._divide_by_tokens(optimizer)
            return result

        return super().optimizer_step(optimizer, closure_with_weights, model, **kwargs)

    def _divide_by_tokens(self, optimizer: Optimizer) -> None:
        """Compare the losses and numbers of tokens between ranks, and turn sums over tokens into means."""
        window, losses = self._window, [float(loss) for loss in self._losses]
        self._window, self._losses = [], []
        size = self.device_mesh[AXIS].size()
        self._require_same("the loss", losses, _LOSS_HINT, size, equal=_nearly_equal)
        windows = self._require_same('"tokens"', window, "count the labels of whole sequences", size)
        counts = [count for group in windows for count in group]
        if all(count is None for count in counts):
            return
        if None in counts:
            raise ValueError('training_step returned "tokens" for some batches of a step only: return it for all')
        # Lightning divided each loss by accumulate_grad_batches, and FSDP took the mean over groups.
        factor = self._module.trainer.accumulate_grad_batches * len(windows) / max(1.0, sum(counts))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    @property
    def _sharded_parts(self) -> list[Any]:
        return [part for part in self._module.modules() if isinstance(part, FSDPModule)]

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def _require_same(
        self,
        what: str,
        value: Any,
        hint: str,
        size: int | None = None,
        process_group: ProcessGroup | None = None,
        equal: Callable[[Any, Any], bool] = operator.eq,
    ) -> list[Any]:
        """Return one value for each group of `size` consecutive ranks, whose values must be the same. Collective.

        Args:
            what: The name of the value.
            value: This rank's value.
            hint: How to make it the same, for the error.
            size: The number of consecutive ranks that must have the same value; None for all.
            process_group: The ranks to compare; None for all.
            equal: Whether two values are the same.

        Raises:
            ValueError: If values differ; on every rank.
        """
        values = gather_objects(value, process_group)
        size = size or len(values)
        for first in range(0, len(values), size):
            if not all(equal(other, values[first]) for other in values[first : first + size]):
                raise ValueError(
                    f"{what} differs between ranks {first} to {first + size - 1}, which must agree: {hint}"
                )
        return values[::size]


def _nearly_equal(a: list[float], b: list[float]) -> bool:
    """Compare losses that may be rounded differently; NaN equals NaN."""
    return len(a) == len(b) and all(
        math.isclose(x, y, rel_tol=1e-4) or (math.isnan(x) and math.isnan(y)) for x, y in zip(a, b, strict=True)
    )
