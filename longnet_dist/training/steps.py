"""Optimizer steps and validations on this rank's share of the data."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from longnet_dist.data.corpus import Corpus, window_order
from longnet_dist.data.shards import TokenStream
from longnet_dist.distributed.collectives import sum_over_ranks
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.models.decoder import LongNet
from longnet_dist.models.encoder import LongNetEncoder
from longnet_dist.models.masking import mask_tokens
from longnet_dist.nn.multiway import kinds_by_id
from longnet_dist.training.config import TrainConfig
from longnet_dist.training.measures import StepCost
from longnet_dist.training.state import MasterWeights


class StepRunner:
    """Runs optimizer steps and validations. Its methods are collective over all ranks.

    Args:
        config: the run's options.
        device: this rank's device.
        mesh: the ranks that hold one sequence.
        data_ranks: number of data-parallel ranks.
        corpus: the tokenised data.
        model: the model, sharded if there are several ranks.
        weights: the model's weights.
        optimizer: the optimizer of the weights.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        mesh: SequenceMesh,
        data_ranks: int,
        corpus: Corpus,
        model: LongNet | LongNetEncoder,
        weights: MasterWeights,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.config, self.device, self.mesh, self.data_ranks = config, device, mesh, data_ranks
        self.corpus, self.model, self.weights, self.optimizer = corpus, model, weights, optimizer
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.data_rank = self.rank // mesh.size
        self.skipped = 0
        """Number of steps in a row, up to now, that were skipped."""
        self.cost = StepCost()

    def step(self, step: int, vote: Callable[[], Sequence[bool]]) -> tuple[dict[str, float], list[bool]]:
        """Make an optimizer step; skip it if its loss or gradient norm is not finite.

        Args:
            step: the step's number, from 1.
            vote: returns this rank's answers to questions that the ranks decide together. It is called after the
                backward, so that a signal during the step counts.

        Returns:
            The step's metrics, and for each question whether any rank's answer was true.

        Raises:
            RuntimeError: if `max_skipped_steps` steps in a row were skipped.
        """
        rate = learning_rate(self.config, step - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, norm = self._compute_gradients(step)
        # One small collective per step carries every rank's loss and answers.
        loss, *counts = sum_over_ranks([loss / self.num_ranks, *map(float, vote())], self.device)
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            self.weights.round_parameters()
            self.skipped = 0
        else:
            self._skip(step, loss, norm)
        self.optimizer.zero_grad(set_to_none=True)
        metrics = {
            "step": step,
            "loss": loss,
            "bits_per_byte": self.bits_per_byte(loss / math.log(2)),
            "grad_norm": norm,
            "lr": rate,
        }
        return metrics, [count > 0 for count in counts]

    @torch.no_grad()
    def validate(self) -> float:
        """Return the bits per byte over the held-out sequences."""
        self.model.eval()
        windows = range(self._num_held_out())
        losses = [self._loss(self.corpus.validation, [window], [window]).item() for window in windows]
        self.model.train()
        return self.bits_per_byte(sum(losses) / len(losses) / math.log(2))

    def bits_per_byte(self, bits_per_token: float) -> float:
        """Convert bits per token to bits per byte; an end-of-document id is a token without bytes."""
        return bits_per_token * self.corpus.index.tokens_per_byte

    def held_out_labels(self) -> np.ndarray:
        """Return the tokens that a validation predicts."""
        return self.corpus.validation.tokens(self._num_held_out() * self.config.seq_len + 1)[1:]

    def _compute_gradients(self, step: int) -> tuple[float, float]:
        """Run a step's forwards and backwards; return the loss of this rank's sequences, and the global norm."""
        config = self.config
        total = 0.0
        for micro in range(config.grad_accumulation):
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_gradient_sync(micro == config.grad_accumulation - 1)
            loss = self._loss(self.corpus.train, self._windows(step, micro), self._sequences(step, micro))
            # All forwards have equally many tokens, so the mean of their losses is the step's mean over tokens.
            # FSDP takes the mean over all ranks, but those of one sequence hold parts of a sum.
            (loss * (self.mesh.size / config.grad_accumulation)).backward()
            self.weights.take_gradients()
            total += loss.item() / config.grad_accumulation
        norm = nn.utils.clip_grad_norm_(self.weights.parameters, config.clip_norm or math.inf)
        return total, (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def _skip(self, step: int, loss: float, norm: float) -> None:
        self.skipped += 1
        message = f"step {step} is skipped: loss {loss}, gradient norm {norm}"
        if self.rank == 0:
            warnings.warn(message, stacklevel=2)
        if self.skipped >= self.config.max_skipped_steps:
            micros = range(self.config.grad_accumulation)
            windows = [self._windows(step, micro, all_ranks=True) for micro in micros]
            raise RuntimeError(
                f"{self.skipped} steps in a row were not finite, so the run stops; {message}, at sequences {windows} "
                f"of {self.config.seq_len} tokens in {self.corpus.folder}. To resume from the newest checkpoint, lower "
                f"the learning rate or clip_norm; if it is of step {step - self.skipped}, after which no step was "
                "finite, remove it to resume from the one before"
            )

    def _sequences(self, step: int, micro: int, all_ranks: bool = False) -> range:
        """Return the numbers, among all of the run, of the sequences that this rank reads in a forward.

        Args:
            step: the step's number.
            micro: the number of the forward in the step.
            all_ranks: return those of all data-parallel ranks.
        """
        config = self.config
        first = ((step - 1) * config.grad_accumulation + micro) * config.batch_size
        sequences = range(first, first + config.batch_size)
        share = config.batch_size // self.data_ranks
        return sequences if all_ranks else sequences[self.data_rank * share : (self.data_rank + 1) * share]

    def _windows(self, step: int, micro: int, all_ranks: bool = False) -> list[int]:
        """Return the windows of the training stream that these sequences are, which depend on the step alone."""
        per_epoch = self.corpus.train.num_windows(self.config.seq_len)
        return [
            int(window_order(per_epoch, n // per_epoch, self.config.seed)[n % per_epoch])
            for n in self._sequences(step, micro, all_ranks)
        ]

    def _loss(self, stream: TokenStream, windows: Sequence[int], numbers: Sequence[int]) -> Tensor:
        """Return the mean loss of these windows, the same on every rank that holds a part of them.

        Args:
            stream: the tokens.
            windows: the windows to read.
            numbers: a number for each, which decides what of it is hidden if the objective is mlm.
        """
        shard = self.mesh.shard
        began = time.perf_counter()
        rows = [stream.read(window, self.config.seq_len, shard.start, shard.stop) for window in windows]
        kinds = None  # The model knows them by the tokens' ids, unless these are hidden.
        if self.config.objective == "mlm":
            kinds = kinds_by_id(torch.stack([x for x, _ in rows]).to(self.device), self.config.model.multiway_first_id)
            rows = [self._hide(tokens, stream, number) for (tokens, _), number in zip(rows, numbers, strict=True)]
        tokens, labels = (torch.stack(part).to(self.device) for part in zip(*rows, strict=True))
        self.cost.data_seconds += time.perf_counter() - began
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bool(self.config.autocast)):
            if self.config.documents == "joined":
                return self.model(tokens, mesh=self.mesh, targets=labels, token_types=kinds)
            # Sequences have other documents, so each is a call of its own.
            documents = [stream.documents(window, self.config.seq_len) for window in windows]
            all_kinds = [None] * len(windows) if kinds is None else kinds.split(1)
            sequences = zip(tokens.split(1), labels.split(1), documents, all_kinds, strict=True)
            losses = [
                self.model(x, mesh=self.mesh, targets=y, cu_seqlens=offsets, token_types=types)
                for x, y, offsets, types in sequences
            ]
            return torch.stack(losses).mean()

    def _hide(self, tokens: Tensor, stream: TokenStream, number: int) -> tuple[Tensor, Tensor]:
        """Hide tokens of this rank's rows of a sequence; it depends on the seed, the stream and the number alone."""
        seed = self.config.seed % (1 << 64), int(stream == self.corpus.validation), number
        return mask_tokens(
            tokens,
            self.config.seq_len,
            self.mesh.shard.start,
            mask_id=self.config.model.vocab_size - 1,
            num_ids=stream.index.vocab_size,
            seed=seed,
        )

    def _num_held_out(self) -> int:
        return min(self.config.validation_sequences, self.corpus.validation.num_windows(self.config.seq_len))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step: a linear warmup, then a cosine.

    Args:
        config: the run's options.
        step: number of steps completed before it.
    """
    return config.learning_rate * _fraction_of_peak(config, step)


def _fraction_of_peak(config: TrainConfig, step: int) -> float:
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    return config.final_learning_rate + (1 - config.final_learning_rate) * (1 + math.cos(math.pi * progress)) / 2


def parameter_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: matrices with weight decay, biases and norms without.

    Args:
        parameters: the parameters, sharded or not.
        weight_decay: the weight decay of matrices.
    """
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
