"""The trainer: one process, or a sequence split over all ranks that torchrun (or Ray Train) started."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from longnet_dist.best_effort import BestEffort
from longnet_dist.checkpoints.checkpoints import CheckpointError, Checkpoints
from longnet_dist.data.corpus import unigram_bits, window_order
from longnet_dist.data.shards import TokenStream
from longnet_dist.data.tokenizers import Bytes
from longnet_dist.distributed.collectives import sum_over_ranks
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.distributed.patience import Patience
from longnet_dist.training.config import TrainConfig
from longnet_dist.training.job import changes, corpus_of, figures_of, held, processes, run_folder
from longnet_dist.training.logs import RunLog
from longnet_dist.training.measures import StepCost, measures, step_bytes, step_flops
from longnet_dist.training.optimizer import decayed_and_not, learning_rate
from longnet_dist.training.parallel import make_device_mesh, shard_parameters
from longnet_dist.training.state import make_moments, names_without, restore_random_state, training_state
from longnet_dist.training.stopping import StopFlag, Watch, stop_on_signals

ASK_SECONDS = 5.0
"""How often to ask a launcher whether a machine goes."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    run_folder: Path
    losses: tuple[float, ...]
    """Of every step that this process made, nats a token."""
    step: int
    """The last step."""
    validation_bits_per_byte: float
    """Of the last validation; NaN where a signal stopped the run before one."""
    unigram_bits_per_byte: float
    """Of a model that knows only how frequent each byte is, on the same held-out tokens."""


class Session(Protocol):
    """A launcher above the ranks, such as Ray Train. Every rank calls its methods, in the same steps."""

    def checkpointed(self, path: Path, measured: dict[str, float]) -> None:
        """A checkpoint was written whole; `measured` are the figures of the step before which it was seen."""

    def leaving(self) -> bool:
        """Whether a rank's machine is about to go, so that a checkpoint should be written now."""


def train(config: TrainConfig | None = None, session: Session | None = None) -> TrainResult:
    """Train a LongNet; under torchrun or Ray Train over all their ranks, else on this process alone.

    Writes a run folder: config.json, metrics.jsonl, TensorBoard events and checkpoints. A run folder
    that holds checkpoints is gone on with, from its newest whole one: on as many ranks, and on a
    CPU, bit for bit as if it had never stopped. On SIGTERM or SIGINT the step is finished, a
    checkpoint written, and the result returned; a second signal exits at once. With no argument
    it trains the default model on the default corpus. `session` is for launchers.

    Raises:
        ValueError: for options or data that cannot work, before any step.
        CheckpointError: where every checkpoint is damaged or unreadable, or the last cannot be written.
        RuntimeError: where a rank is lost, or steps are not finite.
    """
    config = config or TrainConfig()
    with processes(config) as device, stop_on_signals() as stop:
        trainer = _Trainer(config, device, session)
        try:
            return trainer.run(stop)
        finally:
            # Also where the run fails: a checkpoint that is half written in the background is worth its end.
            trainer.checkpoints.wait()


class _Trainer:
    def __init__(self, config: TrainConfig, device: torch.device, session: Session | None = None) -> None:
        self.config, self.device, self.session = config, device, session
        self.asked = time.monotonic()
        device_mesh = make_device_mesh(config.parallel, device.type)
        replicate, shard, _ = config.parallel.degrees(dist.get_world_size() if dist.is_initialized() else 1)
        self.data_ranks = replicate * shard
        if config.batch_size % self.data_ranks:
            raise ValueError(
                f"batch_size {config.batch_size} is not a multiple of the {self.data_ranks} data-parallel ranks "
                "(dp_replicate x dp_shard) that share it"
            )
        limit, patient = timedelta(seconds=config.timeout), timedelta(seconds=config.io_timeout)
        group = None if device_mesh is None else device_mesh["sp"].get_group()
        self.mesh = SequenceMesh(group, config.model.pattern, config.seq_len, keep_kv=config.keep_kv, timeout=limit)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.data_rank = self.rank // self.mesh.size
        self.patience = Patience(patient)
        self.corpus = corpus_of(config)
        self.folder = run_folder(config, self.patience)
        self.figures = figures_of(self.folder, config, self.rank == 0)
        torch.manual_seed(config.seed)
        self.model = config.model.build(device, getattr(torch, config.dtype))
        # Dropout must differ between ranks, parameters must not.
        torch.manual_seed(config.seed + 1 + self.rank)
        if config.compile:
            for block in self.model.blocks:
                block.compile(fullgraph=True)
        shard_parameters(self.model, self.model.blocks, device_mesh)
        self.optimizer = torch.optim.AdamW(decayed_and_not(self.model, config.weight_decay), betas=config.betas)
        where, keep = self.folder / "checkpoints", (config.keep_checkpoints, config.keep_every)
        self.checkpoints = Checkpoints(where, *keep, config.async_checkpoints, patient)
        self.skipped = 0
        self.cost = StepCost()
        self.ask = False
        self.told: Path | None = None
        """The last checkpoint that the launcher knows of."""

    def run(self, stop: StopFlag) -> TrainResult:
        config = self.config
        losses, validation, measured, first = [], math.nan, {}, self.rank == 0
        unigram = self._per_byte(unigram_bits(self.corpus.train, self._held_out_tokens()))
        with (
            held(self.figures.folder, self.patience),
            self.figures,
            RunLog(self.figures.folder if first else None, self._resolved(), config.steps, config.wandb) as log,
        ):
            step = self._resume(log)
            log.begin(step)
            self.patience.gather(None, "open metrics.jsonl and the other figures")
            profiled = min(step + 3, config.steps) if config.profile else 0
            flops = step_flops(config, self.model)
            received = step_bytes(config, self.mesh.shard, self.data_ranks)
            watch = Watch(self.figures.folder / "traces", self.rank, self.num_ranks, config.timeout)
            log.say(f"{self.num_ranks} ranks, {self.mesh.shard.chunk} rows of {config.seq_len} each; run {self.folder}")
            while step < config.steps and not stop.agreed:
                step += 1
                self.cost = StepCost()
                began = time.perf_counter()
                with watch.over(f"step {step}"), self._profiled(step == profiled):
                    measured = self._step(step, stop)
                losses.append(measured["loss"])
                self.cost.seconds = time.perf_counter() - began
                measured |= measures(config, step, self.cost, flops, received, self.num_ranks)
                if step == config.steps or (config.validate_every and step % config.validate_every == 0):
                    with watch.over(f"validation after step {step}"):
                        validation = self._validate()
                    measured |= {"validation_bits_per_byte": validation, "unigram_bits_per_byte": unigram}
                log.step(measured)
                due = config.checkpoint_every and step % config.checkpoint_every == 0
                if due or step == config.steps or stop.agreed or self._leaving():
                    with watch.over(f"checkpoint of step {step}", config.io_timeout):
                        self._checkpoint(step, measured, log)
            self.checkpoints.wait()
            self._checkpointed(measured)
            if self.checkpoints.problem is not None:
                raise CheckpointError(
                    f"the run ended after step {step} without a checkpoint of it: {self.checkpoints.problem}; "
                    f"{self.checkpoints.describe_newest()}"
                )
            if step < config.steps:
                log.say(
                    f"stopped by a signal after step {step}, with a checkpoint: the same command goes on from it, "
                    f"with --run-folder {self.folder}"
                )
            else:
                validation = self._validate() if math.isnan(validation) else validation
                kind = "byte" if self.corpus.index.tokenizer == Bytes.name else "token"
                log.say(f"validation {validation:.3f} bits per byte; {kind}-unigram model {unigram:.3f} bits per byte")
        return TrainResult(self.folder, tuple(losses), step, validation, unigram)

    def _checkpoint(self, step: int, measured: dict[str, float], log: RunLog) -> None:
        if self.skipped:
            self.checkpoints.withhold(step, f"steps are being skipped, the last {self.skipped} in a row")
            return
        log.flush()  # Before it: a run that goes on from there has the figures up to there.
        self.figures.keep()
        self.patience.gather(None, "write the metrics")
        self.checkpoints.save(step, self._state(), self._facts(step))
        self._checkpointed(measured)

    def _checkpointed(self, measured: dict[str, float]) -> None:
        """Tell the launcher of a checkpoint that it does not know."""
        latest = self.checkpoints.latest
        if self.session is not None and latest is not None and latest != self.told:
            self.session.checkpointed(latest, measured)
            self.told = latest

    def _leaving(self) -> bool:
        """Whether to write a checkpoint because a machine goes; asked now and then, in steps that rank 0 decides."""
        if self.session is None or not self.ask:
            return False
        self.asked = time.monotonic()
        return self.session.leaving()

    @contextlib.contextmanager
    def _profiled(self, wanted: bool) -> Iterator[None]:
        """Write a trace of one step, where it is wanted; Perfetto opens it."""
        if not wanted:
            yield
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            yield
        with BestEffort("profiler traces"):
            path = self.figures.folder / "traces" / f"profile-rank-{self.rank}.json.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
        self.patience.gather(None, "write the profiler's trace")

    def _step(self, step: int, stop: StopFlag) -> dict[str, float]:
        """One optimizer step; skipped where it is not finite."""
        config = self.config
        rate = learning_rate(config, step - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, norm = self._loss_and_gradients(step)
        # One small collective a step: every rank's loss, whether any was told to stop, and whether it is time to ask.
        ask = self.rank == 0 and time.monotonic() - self.asked > ASK_SECONDS
        loss, told, asks = sum_over_ranks([loss / self.num_ranks, float(stop.requested), float(ask)], self.device)
        stop.agreed, self.ask = told > 0, asks > 0
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            self.skipped = 0
        else:
            self._skip(step, loss, norm)
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "step": step,
            "loss": loss,
            "bits_per_byte": self._per_byte(loss / math.log(2)),
            "grad_norm": norm,
            "lr": rate,
        }

    def _loss_and_gradients(self, step: int) -> tuple[float, float]:
        """Forward and backward of a step: the loss of this rank's sequences, and the global gradient norm."""
        config = self.config
        total = 0.0
        for micro in range(config.grad_accumulation):
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_gradient_sync(micro == config.grad_accumulation - 1)
            loss = self._loss(self.corpus.train, self._windows(step, micro))
            # Every forward has as many tokens as the next, so their mean is the step's mean over tokens.
            # FSDP takes the mean over all ranks; those of one sequence hold parts, which are to be summed.
            (loss * (self.mesh.size / config.grad_accumulation)).backward()
            total += loss.item() / config.grad_accumulation
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm or math.inf)
        return total, (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def _skip(self, step: int, loss: float, norm: float) -> None:
        self.skipped += 1
        said = f"step {step} is skipped: loss {loss}, gradient norm {norm}"
        if self.rank == 0:
            warnings.warn(said, stacklevel=2)
        if self.skipped >= self.config.most_skipped:
            windows = [self._windows(step, micro, every=True) for micro in range(self.config.grad_accumulation)]
            raise RuntimeError(
                f"{self.skipped} steps in a row were not finite, so the run stops; {said}, at sequences {windows} of "
                f"{self.config.seq_len} tokens in {self.corpus.folder}. To go on from the newest "
                "checkpoint, lower the learning rate or clip_norm; if it is of "
                f"step {step - self.skipped}, after which no step was finite, remove it to go on from the one before"
            )

    def _windows(self, step: int, micro: int, every: bool = False) -> list[int]:
        """Which windows of the training stream this data-parallel rank reads: from the step alone."""
        config = self.config
        share = config.batch_size // self.data_ranks
        first = ((step - 1) * config.grad_accumulation + micro) * config.batch_size
        mine = range(first, first + config.batch_size)[slice(None) if every else slice(self.data_rank * share, None)]
        number = self.corpus.train.num_windows(config.seq_len)
        return [
            int(window_order(number, window // number, config.seed)[window % number])
            for window in (mine if every else mine[:share])
        ]

    def _loss(self, stream: TokenStream, windows: Sequence[int]) -> Tensor:
        """Of these windows, on every rank that holds them."""
        shard = self.mesh.shard
        began = time.perf_counter()
        rows = [stream.read(window, self.config.seq_len, shard.start, shard.stop) for window in windows]
        tokens, labels = (torch.stack(part).to(self.device) for part in zip(*rows, strict=True))
        self.cost.data_seconds += time.perf_counter() - began
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast):
            return self.model(tokens, mesh=self.mesh, labels=labels)

    @torch.no_grad()
    def _validate(self) -> float:
        """Bits per byte over the held-out sequences."""
        self.model.eval()
        losses = [self._loss(self.corpus.validation, [window]).item() for window in range(self._num_held_out())]
        self.model.train()
        return self._per_byte(sum(losses) / len(losses) / math.log(2))

    def _per_byte(self, bits_per_token: float) -> float:
        """By the bytes that a token stands for in the data; an end of a document is a token, and no bytes."""
        return bits_per_token * self.corpus.index.tokens_per_byte

    def _num_held_out(self) -> int:
        return min(self.config.validation_sequences, self.corpus.validation.num_windows(self.config.seq_len))

    def _held_out_tokens(self) -> np.ndarray:
        """The labels of a validation."""
        return self.corpus.validation.tokens(self._num_held_out() * self.config.seq_len + 1)[1:]

    def _resolved(self) -> dict[str, Any]:
        """The configuration with every default filled in, and what the run found: JSON can hold it."""
        config = dataclasses.replace(self.config, run_folder=self.folder, model=self.config.model.resolved)
        found = {
            "corpus": ", ".join(self.config.data) or f"the standard library of Python {platform.python_version()}",
            "tokens": hashlib.sha256("".join(s.sha256 for s in self.corpus.index.shards).encode()).hexdigest()[:16],
            "tokens_by": self.corpus.index.tokenizer,
            "ranks": self.num_ranks,
            "rows_a_rank": self.mesh.shard.chunk,
            "device": str(self.device),
        }
        return json.loads(json.dumps(dataclasses.asdict(config) | found, default=str))

    def _state(self) -> dict[str, Tensor]:
        return training_state(self.model, self.optimizer, self.rank)

    def _facts(self, step: int) -> dict[str, Any]:
        return {"step": step, "ranks": self.num_ranks, "config": self._resolved()}

    def _resume(self, log: RunLog) -> int:
        """Go on from the newest whole checkpoint in the run's folder, if there is one; the step it is of."""
        found = self.checkpoints.newest(log.say)
        if found is None:
            return 0
        path, facts = found
        for change in changes(facts["config"], self._resolved(), path):
            log.say(change)
        make_moments(self.optimizer)
        state = self._state()
        # Random states are of ranks: on another number of ranks each has its fresh one.
        if facts["ranks"] != self.num_ranks:
            state = names_without(state, ["random"])
        self.checkpoints.load(path, state)
        restore_random_state(state, self.rank)
        log.say(f"going on from {path}, of step {facts['step']} on {facts['ranks']} ranks")
        return int(facts["step"])
