"""Hugging Face's `Trainer`, with each sequence over the ranks of a mesh, and the data over the meshes of the world.

    args = TrainingArguments("out", max_steps=1000, gradient_accumulation_steps=4)  # first: it starts the process group
    mesh = SequenceMesh(group, pattern, seq_len=N)                                  # None on one process
    model = apply(AutoModelForCausalLM.from_config(config), pattern, mesh)
    DilatedTrainer(model, args, train_dataset=..., data_collator=..., mesh=mesh).train()

Dataset and collator are those of one process: whole sequences, labels not shifted. What would not be the training of
one process is refused, on every rank.
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

from longnet_dist.distributed.collectives import Communicator, gather_objects
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.integrations.transformers import NAME, digest, problem_of_batch, rows_of
from longnet_dist.models.loss import IGNORED

_SAME = (
    "seed", "data_seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "train_sampling_strategy", "dataloader_drop_last",
)  # fmt: skip
"""The arguments on which it depends what is in a batch, and how many there are."""
_OWN_LOSS = "the loss is the model's own, over all ranks"
_NO_LOGITS = "logits would be this rank's rows, and labels shifted; evaluate() gives the loss"


class DilatedTrainer(Trainer):
    """`Trainer`, over the ranks of a sequence as on one process: its losses, as logged, and its parameters.

    `per_device_train_batch_size` counts the sequences of a *mesh*. Every rank of a mesh loads the same whole sequences,
    of the mesh's length; meshes load different ones, as data-parallel processes do. Each token weighs the same, over
    ranks and over the forwards of a step.

    Args:
        *args, **kwargs: as for `Trainer`; the model is `apply`-ed with this mesh.
        mesh: of this rank's sequences; every rank of the job is in one, of equally many ranks. None: each process has
            whole sequences.

    Raises:
        ValueError: for what cannot be exact, or where ranks disagree, on every rank; here, or at the first such batch.
    """

    def __init__(self, *args: Any, mesh: SequenceMesh | None, **kwargs: Any) -> None:
        self.mesh = mesh
        super().__init__(*args, **kwargs)
        self._sequences = _sequences(mesh)
        self._index = next(n for n, ranks in enumerate(self._sequences) if _rank() in ranks)
        everyone = dist.group.WORLD  # That of which Trainer takes the mean.
        self._world = Communicator(everyone, timedelta(minutes=10), _rank()) if everyone is not None else None
        self._agree({name: getattr(self.args, name) for name in _SAME}, self._problem())

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; to what it shares out and gathers, the ranks of a sequence are one process."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_data_loader = self._prepare_data_loader
        self.accelerator.gather_for_metrics = self.gather_function = self._gather_for_metrics

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As `Trainer`'s, of a model that is `apply`-ed with this mesh."""
        model = super().call_model_init(trial)
        if problem := _problem_of_model(model, self.mesh):
            raise ValueError(problem)
        return model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s; also after evaluate(), which marks a model as prepared, to be trained without DDP."""
        if self.model_wrapped is self.model:
            vars(self.model).pop("_is_accelerate_prepared", None)
        return super().train(*args, **kwargs)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Sequences of a step, over all meshes."""
        return super().get_total_train_batch_size(args) // len(self._sequences[0])

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """This rank's rows of the batches of a step, and how many labels *all* ranks have in them."""
        batches = [self._local(batch) for batch in islice(epoch_iterator, num_batches)]
        return batches, self._num_labels(batches)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As `Trainer`'s. It takes the mean over ranks, so it multiplies by their number, and every rank of a sequence
        has the sum over them: right for gradients, of which each has its part, and too large by them to be logged.
        """
        in_ddp = any(isinstance(module, DistributedDataParallel) for module in model.modules())
        if self._world is not None and not in_ddp:
            self._agree({}, "the model is not in DDP, so its gradients would be this rank's alone")
        return super().training_step(model, inputs, *args, **kwargs) / len(self._sequences[0])

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch, of which the mean over sequences is the mean over labels."""
        if not prediction_loss_only:
            self._agree({}, f"predictions are not supported: {_NO_LOGITS}")
        local = self._prepare_inputs(self._local(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**local, num_items_in_batch=self._num_labels([local])).loss
        return loss.detach() * len(self._sequences), None, None

    def predict(self, test_dataset: Dataset[Any], *args: Any, **kwargs: Any) -> Any:
        """Refused: logits would be this rank's rows."""
        self._agree({}, f"predict() is not supported: {_NO_LOGITS}")

    def _agree(self, given: dict[str, Any], problem: str | None = None) -> None:
        """ValueError on every rank of the job, where one has a problem or they differ in what is given."""
        if self._world is not None:
            self._world.agree(given, problem)
        elif problem:
            raise ValueError(problem)

    def _prepare_data_loader(self, loader: DataLoader[Any], *_: Any, **__: Any) -> DataLoader[Any]:
        """As `Accelerator.prepare_data_loader`, for as many processes as there are meshes."""
        accelerator = self.accelerator
        prepared = prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=len(self._sequences),
            process_index=self._index,
            put_on_device=accelerator.device_placement,
            rng_types=accelerator.rng_types.copy(),
            dispatch_batches=False,
            even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )
        accelerator._dataloaders.append(prepared)
        try:
            length = len(prepared)
        except TypeError:  # Of a dataset that has no length.
            length = None
        self._agree({"number of batches": length})
        return prepared

    def _gather_for_metrics(self, x: Tensor, use_gather_object: bool = False) -> Tensor:
        """Of each mesh what its first rank holds; of a last batch, for as many sequences as it has."""
        firsts = [ranks[0] for ranks in self._sequences]
        kept = self.accelerator.gather(x).unflatten(0, (-1, len(x)))[firsts].flatten(0, 1)
        state = self.accelerator.gradient_state
        return kept[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else kept

    def _num_labels(self, batches: list[dict[str, Tensor]]) -> Tensor:
        mine = sum((batch["shift_labels"] != IGNORED).sum() for batch in batches)
        return self.accelerator.gather(torch.as_tensor(mine, device=self.args.device)).sum()

    def _local(self, batch: Any) -> dict[str, Tensor]:
        """This rank's rows, of a batch that all ranks of the sequence have alike: which is looked at, by a digest."""
        whole = dict(batch)
        problem = _problem_of_batch(whole, self.mesh)
        if self._world is not None:
            mine = torch.tensor([digest(whole), problem is not None], device=self._world.device)
            digests, problems = self._world.all_gather(mine, "comparing batches").wait().cpu().unbind(1)
            if any(len(digests[ranks].unique()) > 1 for ranks in self._sequences):
                problem = problem or (
                    "the ranks of a sequence were given different batches: dataset, shuffling and collator must not "
                    "depend on the rank, nor be random by worker"
                )
                problems[0] = 1
            if problems.any():
                self._agree({}, problem)
        elif problem:
            raise ValueError(problem)
        return rows_of(whole, self.mesh)

    def _problem(self) -> str | None:
        """What of the arguments is not the training of one process, over ranks."""
        args, accelerator = self.args, self.accelerator
        sampling, counted = args.train_sampling_strategy, self.model_accepts_loss_kwargs
        refused = (
            (
                accelerator.num_processes != _world_size(),
                f"Accelerate has {accelerator.num_processes} processes, and torch.distributed {_world_size()}: make "
                "the TrainingArguments first, which start it",
            ),
            (args.n_gpu > 1, f"{args.n_gpu} GPUs in one process: start one process for each, with torchrun"),
            (not counted, f"{type(self.model).__name__} takes no num_items_in_batch, to divide its loss by"),
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
        return next((said for found, said in refused if found), None) or _problem_of_model(self.model, self.mesh)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _sequences(mesh: SequenceMesh | None) -> list[list[int]]:
    """The ranks of each mesh of the job, this rank's among them. Collective over all ranks, which find the same."""
    mine = [_rank()] if mesh is None or mesh.group is None else dist.get_process_group_ranks(mesh.group)
    found = sorted(set(map(tuple, gather_objects(mine))))
    if sorted(sum(found, ())) != list(range(_world_size())) or len({len(ranks) for ranks in found}) > 1:
        raise ValueError(
            f"the meshes are over the ranks {', '.join(map(str, found))}: every rank of the job must be in one, and "
            'each have equally many, as in init_device_mesh(device, (dp, sp), mesh_dim_names=("dp", "sp"))["sp"]'
        )
    return [list(ranks) for ranks in found]


def _problem_of_model(model: Any, mesh: SequenceMesh | None) -> str | None:
    stamps: list[Any] = [module._longnet_dist for module in model.modules() if hasattr(module, "_longnet_dist")]
    if not stamps or getattr(model.config, "_attn_implementation", NAME) != NAME:
        return f"{type(model).__name__} does not attend by a pattern: apply(model, pattern, mesh) first"
    if any(stamp.mesh is not mesh for stamp in stamps):
        return (
            f"the model was applied with the mesh {stamps[0].mesh}, and the trainer has {mesh}: pass the same to both"
        )
    return None


def _problem_of_batch(batch: dict[str, Any], mesh: SequenceMesh | None) -> str | None:
    """What of a batch, as the collator made it, could not be split."""
    if not {"input_ids", "labels"} <= set(batch) <= {"input_ids", "labels", "attention_mask", "position_ids"}:
        return (
            f"the collator gave {', '.join(batch)}; it must give input_ids and labels, whole and not shifted, and may "
            "give attention_mask: for example DataCollatorForLanguageModeling(tokenizer, mlm=False). Packed documents "
            "(padding_free) are not supported"
        )
    shapes = {name: tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for name, x in batch.items()}
    if len(set(shapes.values())) > 1 or len(shapes["input_ids"]) != 2:
        return f"the collator gave {shapes}; each must be a tensor, (B, N)"
    return problem_of_batch(batch, mesh)
