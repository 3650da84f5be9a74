"""Hugging Face's `Trainer`, with each sequence split across the ranks of a mesh, and different data on each mesh.

    args = TrainingArguments("out", max_steps=1000, gradient_accumulation_steps=4)  # first: it starts the process group
    mesh = SequenceMesh(group, pattern, seq_len=N)                                  # None on one process
    model = apply(AutoModelForCausalLM.from_config(config), pattern, mesh)
    DilatedTrainer(model, args, train_dataset=..., data_collator=..., mesh=mesh).train()

Dataset and collator are those for one process: whole sequences, and labels that are not shifted. Options and batches
with which ranks would not train as one process does raise a ValueError on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from longnet_dist import internals
from longnet_dist.distributed.collectives import Communicator, gather_objects
from longnet_dist.distributed.digest import digest
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.integrations._transformers_batches import PACKING
from longnet_dist.integrations.transformers import NAME, problem_of_batch, split_checked_batch
from longnet_dist.models.loss import IGNORED

_SHARED_ARGUMENTS = (
    "seed", "data_seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "train_sampling_strategy", "dataloader_drop_last",
)  # fmt: skip
"""The arguments that decide what is in a batch, and how many batches there are."""
_OWN_LOSS = "the loss is the model's own, over all ranks"
_NO_LOGITS = "logits would be this rank's rows, and labels shifted; evaluate() gives the loss"


class DilatedTrainer(Trainer):
    """A `Trainer` that splits sequences across ranks, and learns and logs the same as one process.

    `per_device_train_batch_size` counts the sequences of a *mesh*. Every rank of a mesh loads the same whole sequences,
    of the mesh's length; meshes load different ones, as data-parallel processes do. Each token weighs the same, across
    ranks and across the micro-batches of a step.

    Args:
        *args, **kwargs: The arguments of `Trainer`; the model is one that `apply` returned for this mesh.
        mesh: The ranks that hold this rank's sequences. Every rank of the job is in one mesh, and all meshes have
            equally many ranks. If None, each process has whole sequences.

    Raises:
        ValueError: If training would not be exact, or ranks disagree. Every rank raises, here or at the first such
            batch.
    """

    def __init__(self, *args: Any, mesh: SequenceMesh | None, **kwargs: Any) -> None:
        self.mesh = mesh
        super().__init__(*args, **kwargs)
        self._mesh_ranks = _ranks_of_meshes(mesh)
        self._mesh_index = next(n for n, ranks in enumerate(self._mesh_ranks) if _rank() in ranks)
        world = dist.group.WORLD  # Trainer takes means over the whole world.
        self._world = Communicator(world, timedelta(minutes=10), _rank()) if world is not None else None
        self._agree({name: getattr(self.args, name) for name in _SHARED_ARGUMENTS}, self._problem())

    def create_accelerator_and_postprocess(self) -> None:
        """Make an accelerator that distributes data and gathers results per mesh, not per process."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_data_loader = self._prepare_data_loader
        self.accelerator.gather_for_metrics = self.gather_function = self._gather_for_metrics

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Call `model_init`, whose model must be one that `apply` returned for this mesh."""
        model = super().call_model_init(trial)
        if problem := _problem_of_model(model, self.mesh):
            raise ValueError(problem)
        return model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train the model, and prepare it again if evaluate() has prepared it, which it does without DDP."""
        if self.model_wrapped is self.model:
            internals.mark_as_unprepared(self.model)
        return super().train(*args, **kwargs)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Return the number of sequences per step, over all meshes."""
        return super().get_total_train_batch_size(args) // len(self._mesh_ranks[0])

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Return this rank's rows of a step's batches, and the number of labels that *all* ranks have in them."""
        batches = [self._split(batch) for batch in islice(epoch_iterator, num_batches)]
        return batches, self._num_labels(batches)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run a forward and a backward, and return the loss to be logged.

        `Trainer` multiplies the loss by the number of ranks, because DDP takes the mean of gradients. That suits
        gradients, of which each rank has only a part. But every rank of a mesh has the whole loss, so the logged value
        must be divided by their number.
        """
        in_ddp = any(isinstance(module, DistributedDataParallel) for module in model.modules())
        if self._world is not None and not in_ddp:
            self._agree({}, "the model is not in DDP, so its gradients would be this rank's alone")
        return super().training_step(model, inputs, *args, **kwargs) / len(self._mesh_ranks[0])

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Return a loss whose mean over sequences, which `Trainer` takes, is the mean over labels."""
        if not prediction_loss_only:
            self._agree({}, f"predictions are not supported: {_NO_LOGITS}")
        local = self._prepare_inputs(self._split(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**local, num_items_in_batch=self._num_labels([local])).loss
        return loss.detach() * len(self._mesh_ranks), None, None

    def predict(self, test_dataset: Dataset[Any], *args: Any, **kwargs: Any) -> Any:
        """Raise a ValueError: the logits would be those of this rank's rows."""
        self._agree({}, f"predict() is not supported: {_NO_LOGITS}")

    def _agree(self, values: dict[str, Any], problem: str | None = None) -> None:
        """Raise ValueError on every rank of the job if any rank has a problem, or values differ."""
        if self._world is not None:
            self._world.agree(values, problem)
        elif problem:
            raise ValueError(problem)

    def _prepare_data_loader(self, loader: DataLoader[Any], *_: Any, **__: Any) -> DataLoader[Any]:
        """Do what `Accelerator.prepare_data_loader` does, with one share of the data per mesh."""
        accelerator = self.accelerator
        prepared = prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=len(self._mesh_ranks),
            process_index=self._mesh_index,
            put_on_device=accelerator.device_placement,
            rng_types=accelerator.rng_types.copy(),
            dispatch_batches=False,
            even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )
        internals.add_data_loader(accelerator, prepared)
        try:
            length = len(prepared)
        except TypeError:  # The dataset has no length.
            length = None
        self._agree({"number of batches": length})
        return prepared

    def _gather_for_metrics(self, x: Tensor, use_gather_object: bool = False) -> Tensor:
        """Gather the tensor of each mesh's first rank, without the sequences that pad the last batch."""
        first_ranks = [ranks[0] for ranks in self._mesh_ranks]
        gathered = self.accelerator.gather(x).unflatten(0, (-1, len(x)))[first_ranks].flatten(0, 1)
        state = self.accelerator.gradient_state
        return gathered[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else gathered

    def _num_labels(self, batches: list[dict[str, Tensor]]) -> Tensor:
        local = sum((batch["shift_labels"] != IGNORED).sum() for batch in batches)
        return self.accelerator.gather(torch.as_tensor(local, device=self.args.device)).sum()

    def _split(self, batch: Any) -> dict[str, Tensor]:
        """Return this rank's rows of a batch, after comparing the batch between the ranks of the mesh."""
        whole = dict(batch)
        problem = _problem_of_batch(whole, self.mesh)
        if self._world is not None:
            local = torch.tensor([digest(whole), problem is not None], device=self._world.device)
            digests, problems = self._world.all_gather(local, "comparing batches").wait().cpu().unbind(1)
            if any(len(digests[ranks].unique()) > 1 for ranks in self._mesh_ranks):
                problem = problem or (
                    "the ranks of a sequence have different batches: dataset, shuffling and collator must not "
                    "depend on the rank, nor be random by worker"
                )
                problems[0] = 1
            if problems.any():
                self._agree({}, problem)
        elif problem:
            raise ValueError(problem)
        return split_checked_batch(whole, self.mesh)

    def _problem(self) -> str | None:
        """Return why these arguments would not train as one process does; None if they would."""
        args, accelerator = self.args, self.accelerator
        sampling = args.train_sampling_strategy
        problems = (
            (
                accelerator.num_processes != _world_size(),
                f"Accelerate has {accelerator.num_processes} processes, and torch.distributed {_world_size()}: make "
                "the TrainingArguments first, which start it",
            ),
            (args.n_gpu > 1, f"{args.n_gpu} GPUs in one process: start one process for each, with torchrun"),
            (
                not self.model_accepts_loss_kwargs,
                f"{type(self.model).__name__} takes no num_items_in_batch, to divide its loss by",
            ),
            (
                not args.average_tokens_across_devices,
                "average_tokens_across_devices must be True: tokens weigh the same",
            ),
            (args.label_smoothing_factor, f"label_smoothing_factor must be 0: {_OWN_LOSS}"),
            (self.compute_loss_func, f"compute_loss_func must be None: {_OWN_LOSS}"),
            (args.use_liger_kernel, f"use_liger_kernel must be False: {_OWN_LOSS}"),
            (self.compute_metrics, f"compute_metrics must be None: {_NO_LOGITS}"),
            (args.neftune_noise_alpha, "neftune_noise_alpha must be None: its noise is by this rank's number of rows"),
            (args.torch_compile, "torch_compile must be False: traced, transformers asks for a mask of its own"),
            (args.auto_find_batch_size, "auto_find_batch_size must be False: ranks would find different ones"),
            (
                sampling not in ("random", "sequential"),
                f"train_sampling_strategy is {sampling!r}; it must be 'random' or 'sequential': all are equally long",
            ),
            (
                accelerator.dispatch_batches or accelerator.split_batches,
                "dispatch_batches and split_batches must be off: every rank of a sequence loads its whole batch",
            ),
            (
                accelerator.parallelism_config,
                "parallelism_config must be None: the mesh says which ranks hold a sequence",
            ),
            (self.is_deepspeed_enabled or self.is_fsdp_enabled, "DeepSpeed and FSDP are not supported: use DDP"),
        )
        problem = next((message for applies, message in problems if applies), None)
        return problem or _problem_of_model(self.model, self.mesh)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _ranks_of_meshes(mesh: SequenceMesh | None) -> list[list[int]]:
    """Return the ranks of each mesh of the job, in the same order on every rank. Collective over all ranks."""
    local = [_rank()] if mesh is None or mesh.group is None else dist.get_process_group_ranks(mesh.group)
    meshes = sorted(set(map(tuple, gather_objects(local))))
    if sorted(sum(meshes, ())) != list(range(_world_size())) or len({len(ranks) for ranks in meshes}) > 1:
        raise ValueError(
            f"the meshes are over the ranks {', '.join(map(str, meshes))}: every rank of the job must be in one, and "
            'each have equally many, as in init_device_mesh(device, (dp, sp), mesh_dim_names=("dp", "sp"))["sp"]'
        )
    return [list(ranks) for ranks in meshes]


def _problem_of_model(model: Any, mesh: SequenceMesh | None) -> str | None:
    """Return why a model does not fit the trainer; None if it does."""
    stamps: list[Any] = [module._longnet_dist for module in model.modules() if hasattr(module, "_longnet_dist")]
    if not stamps or internals.attention_implementation(model.config) != NAME:
        return f"{type(model).__name__} does not attend by a pattern: apply(model, pattern, mesh) first"
    if any(stamp.mesh is not mesh for stamp in stamps):
        return (
            f"the model was applied with the mesh {stamps[0].mesh}, and the trainer has {mesh}: pass the same to both"
        )
    return None


def _problem_of_batch(batch: dict[str, Any], mesh: SequenceMesh | None) -> str | None:
    """Return why a batch, as the collator made it, cannot be split; None if it can."""
    known = {"input_ids", "labels", "attention_mask", "position_ids", *PACKING}
    if not {"input_ids", "labels"} <= set(batch) <= known:
        return (
            f"the collator returned {', '.join(batch)}; it must return input_ids and labels, whole and not shifted, "
            "and may return attention_mask, position_ids and cu_seq_lens_q: for example "
            "DataCollatorForLanguageModeling(tokenizer, mlm=False), or DataCollatorWithFlattening()"
        )
    tensors = {name: x for name, x in batch.items() if name not in PACKING}
    shapes = {name: tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for name, x in tensors.items()}
    if len(set(shapes.values())) > 1 or len(shapes["input_ids"]) != 2:
        return f"the collator returned {shapes}; each must be a tensor, (B, N)"
    return problem_of_batch(batch, mesh)
