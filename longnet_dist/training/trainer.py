"""The trainer: trains on this process alone, or over all ranks that torchrun or Ray Train started."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_dist.best_effort import print_note
from longnet_dist.checkpoints.checkpoints import CheckpointError, Checkpoints
from longnet_dist.checkpoints.storage import storage_path
from longnet_dist.data.corpus import unigram_bits
from longnet_dist.data.tokenizers import Bytes
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.distributed.patience import Patience
from longnet_dist.models.decoder import LongNet
from longnet_dist.models.encoder import LongNetEncoder
from longnet_dist.plan.hardware import Hardware
from longnet_dist.training.config import TrainConfig
from longnet_dist.training.job import (
    create_run_folder,
    describe_changes,
    fit_to_ranks,
    load_corpus,
    local_run_files,
    lock_run_folder,
    name_run_folder,
    num_data_ranks,
    num_token_ids,
)
from longnet_dist.training.logs import RunLog
from longnet_dist.training.measures import StepCost, describe_run, step_bytes, step_flops, step_metrics, write_profile
from longnet_dist.training.parallel import make_device_mesh, shard_parameters
from longnet_dist.training.processes import init_processes
from longnet_dist.training.state import (
    MasterWeights,
    build_model,
    initialise,
    make_moments,
    restore_random_state,
    training_state,
    without_prefixes,
)
from longnet_dist.training.steps import StepRunner, parameter_groups
from longnet_dist.training.stopping import StopFlag, Watch, stop_on_signals

ASK_SECONDS = 5.0
"""How often the launcher is asked whether a machine is leaving, in seconds."""


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run."""

    run_folder: Path
    """The folder that the run wrote."""
    losses: tuple[float, ...]
    """The loss of every step since this start, in nats per token."""
    step: int
    """The number of the last step."""
    validation_bits_per_byte: float
    """Bits per byte in the last validation; NaN if a signal stopped the run before one."""
    unigram_bits_per_byte: float
    """Bits per byte, on the same held-out tokens, of a model that knows only how frequent each token is."""


class Session(Protocol):
    """A launcher above the ranks, such as Ray Train. Every rank calls its methods, in the same steps."""

    def report_checkpoint(self, path: Path, metrics: dict[str, float]) -> None:
        """Report a complete checkpoint, with the metrics of the last step."""

    def device(self) -> torch.device | None:
        """Return the device that the launcher assigned to this rank; None to choose it by LOCAL_RANK."""

    def is_machine_leaving(self) -> bool:
        """Return whether a rank's machine is about to leave, so that a checkpoint should be written now."""


def train(config: TrainConfig | None = None, session: Session | None = None) -> TrainResult:
    """Train a LongNet, on this process alone, or over all ranks of torchrun or Ray Train.

    Writes a run folder with config.json, metrics.jsonl, TensorBoard events and checkpoints. If the folder
    already holds checkpoints, the run resumes from the newest complete one. On CPUs, with the same number of
    ranks, the result is bit for bit that of a run that never stopped. On SIGTERM, SIGINT, SIGHUP, SIGUSR1 or
    SIGUSR2 the trainer finishes the step, writes a checkpoint, and returns. A second signal exits at once.

    Args:
        config: the options; by default, those of the default model on the default corpus.
        session: the launcher, if it takes part in checkpoints.

    Returns:
        The result of the run.

    Raises:
        ValueError: for options or data that cannot work, before any step.
        CheckpointError: if every checkpoint is damaged or unreadable, or the last one cannot be written.
        RuntimeError: if a rank is lost, or too many steps in a row are not finite.

    Example::

        result = train(TrainConfig(data="corpus/", steps=100, run_folder="runs/first"))
    """
    config = config or TrainConfig()
    assigned = None if session is None else session.device()
    with init_processes(config, assigned) as device:
        trainer = _Trainer(config, device, session)  # A signal while it reads data ends the process at once.
        try:
            with stop_on_signals() as stop:
                return trainer.run(stop)
        finally:
            # Even if the run fails, a checkpoint that is being written in the background is worth completing.
            trainer.checkpoints.wait()


class _Trainer:
    """One training run on this rank."""

    def __init__(self, config: TrainConfig, device: torch.device, session: Session | None = None) -> None:
        if config.autocast is None:
            config = dataclasses.replace(config, autocast=device.type == "cuda" and config.dtype == "float32")
        self.device, self.session = device, session
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        limit, io_limit = timedelta(seconds=config.timeout), timedelta(seconds=config.io_timeout)
        self.patience = Patience(io_limit)
        self.folder = name_run_folder(config, self.patience)
        self.config = config = fit_to_ranks(config, self.folder, self.num_ranks, self.patience)
        device_mesh = make_device_mesh(config.parallel, device.type)
        data_ranks = num_data_ranks(config, self.num_ranks)
        group = None if device_mesh is None else device_mesh["sp"].get_group()
        self.mesh = SequenceMesh(
            group,
            config.model.pattern,
            config.seq_len,
            strategy=config.strategy,
            hardware=Hardware.read(config.hardware) if config.hardware else None,
            keep_kv=config.keep_kv,
            timeout=limit,
        )
        if self.rank == 0:
            source = ", ".join(config.data) or "the source of Python's standard library"
            print_note(f"reading {source}, tokenised once into {config.cache}", sys.stdout)
        self.corpus = load_corpus(config)
        if config.model.vocab_size < (required := num_token_ids(self.corpus, config)):
            model = dataclasses.replace(config.model, vocab_size=required)
            self.config = config = dataclasses.replace(config, model=model)
        create_run_folder(self.folder, self.patience)
        self.files = local_run_files(self.folder, config, self.rank == 0)
        self.model = self._build_model()
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        shard_parameters(self.model, self.model.blocks, device_mesh)
        self.weights = MasterWeights(self.model)
        groups = parameter_groups(self.weights.parameters, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas)
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", config.keep_checkpoints, config.keep_every, config.async_checkpoints, io_limit
        )
        self.steps = StepRunner(
            config, device, self.mesh, data_ranks, self.corpus, self.model, self.weights, self.optimizer
        )
        self.costs = step_flops(config, self.model), step_bytes(config, self.mesh, data_ranks)
        self.watch = Watch(self.files.folder / "traces", self.rank, self.num_ranks, config.timeout)
        self.losses: list[float] = []
        self.metrics: dict[str, float] = {}
        self.validation = math.nan
        self.last_asked = time.monotonic()
        self.last_reported: Path | None = None
        """The last checkpoint reported to the launcher."""

    def run(self, stop: StopFlag) -> TrainResult:
        """Train from the newest checkpoint, or from the start, to the last step or until a stop is agreed."""
        config, folder = self.config, self.files.folder
        unigram = self.steps.bits_per_byte(unigram_bits(self.corpus.train, self.steps.held_out_labels()))
        with (
            lock_run_folder(folder, self.patience),
            self.files,
            RunLog(folder if self.rank == 0 else None, self._resolved_options(), config.steps, config.wandb) as log,
        ):
            step = self._resume(log)
            log.begin(step)
            self.patience.gather(None, "open metrics.jsonl and the other logs")
            for line in describe_run(config, self.corpus, self.mesh, self.num_parameters, self.costs[1]):
                log.print_line(line)
            log.print_line(f"run: {self.folder}, on {self.num_ranks} rank{'s' * (self.num_ranks > 1)}")
            profiled = min(step + 3, config.steps) if config.profile else 0
            while step < config.steps and not stop.agreed:
                step += 1
                self._make_step(step, stop, unigram, step == profiled, log)
            self._finish(step, unigram, log)
        return TrainResult(self.folder, tuple(self.losses), step, self.validation, unigram)

    def _build_model(self) -> LongNet | LongNetEncoder:
        config = self.config
        torch.manual_seed(config.seed)
        model = build_model(config.objective, config.model, self.device, getattr(torch, config.dtype))
        # Dropout must differ between ranks, parameters must not.
        torch.manual_seed(config.seed + 1 + self.rank)
        if config.compile:
            for block in model.blocks:
                block.compile(fullgraph=True)
        return model

    def _make_step(self, step: int, stop: StopFlag, unigram: float, profiled: bool, log: RunLog) -> None:
        """Make a step, and what is due after it: a validation, a line of metrics, a checkpoint."""
        config = self.config
        self.steps.cost = StepCost()
        began, waited = time.perf_counter(), self.mesh.exposed_seconds
        with self.watch.over(f"step {step}"), self._profile(profiled):
            self.metrics, (stop.agreed, ask) = self.steps.step(step, lambda: (stop.requested, self._is_time_to_ask()))
        self.losses.append(self.metrics["loss"])
        self.steps.cost.seconds = time.perf_counter() - began
        self.steps.cost.exposed_seconds = self.mesh.exposed_seconds - waited
        self.metrics |= step_metrics(config, step, self.steps.cost, *self.costs, self.num_ranks)
        if step == config.steps or (config.validate_every and step % config.validate_every == 0):
            with self.watch.over(f"validation after step {step}"):
                self.validation = self.steps.validate()
            self.metrics |= {"validation_bits_per_byte": self.validation, "unigram_bits_per_byte": unigram}
        log.step(self.metrics)
        due = config.checkpoint_every and step % config.checkpoint_every == 0
        if due or step == config.steps or stop.agreed or (ask and self._is_machine_leaving()):
            with self.watch.over(f"checkpoint of step {step}", config.io_timeout):
                self._save_checkpoint(step, log)

    def _finish(self, step: int, unigram: float, log: RunLog) -> None:
        """Wait for the last checkpoint, and print how the run ended."""
        self.checkpoints.wait()
        self._report_checkpoint()
        if self.checkpoints.problem is not None:
            raise CheckpointError(
                f"the run ended after step {step} without a checkpoint of it: {self.checkpoints.problem}; "
                f"{self.checkpoints.describe_newest()}"
            )
        if step < self.config.steps:
            log.print_line(
                f"stopped by a signal after step {step}, with a checkpoint; to resume: longnet-dist train --resume "
                f"{self.folder}"
            )
            return
        if math.isnan(self.validation):
            self.validation = self.steps.validate()
        is_mlm = self.config.objective == "mlm"
        unit = "byte" if self.corpus.index.tokenizer == Bytes.name else "token"
        log.print_line(
            f"validation {self.validation:.3f} bits per {'hidden ' * is_mlm}byte; "
            f"{unit}-unigram model {unigram:.3f} bits per byte"
        )
        log.print_line(
            f"checkpoint: {self.checkpoints.latest}\n"
            + ("" if is_mlm else f"next: longnet-dist eval {self.folder}    bits per byte, by position\n")
            + f"{'next: ' if is_mlm else '      '}longnet-dist report {self.folder}    its curves\n"
            f"      longnet-dist export {self.folder} FOLDER    for LongNet{'Encoder' * is_mlm}.from_pretrained"
        )

    def _save_checkpoint(self, step: int, log: RunLog) -> None:
        if self.steps.skipped:
            reason = f"steps are being skipped, the last {self.steps.skipped} in a row"
            self.checkpoints.withhold(step, reason)
            return
        # Metrics first: a run that resumes from the checkpoint must have every line up to its step.
        log.flush()
        self.files.upload()
        self.patience.gather(None, "write the metrics")
        facts = {"step": step, "ranks": self.num_ranks, "config": self._resolved_options()}
        self.checkpoints.save(step, self._state(), facts)
        self._report_checkpoint()

    def _report_checkpoint(self) -> None:
        """Report the newest checkpoint to the launcher, once."""
        latest = self.checkpoints.latest
        if self.session is not None and latest is not None and latest != self.last_reported:
            self.session.report_checkpoint(latest, self.metrics)
            self.last_reported = latest

    def _is_time_to_ask(self) -> bool:
        return self.rank == 0 and time.monotonic() - self.last_asked > ASK_SECONDS

    def _is_machine_leaving(self) -> bool:
        """Ask the launcher. Every rank calls this, after the steps in which rank 0 decides to ask."""
        self.last_asked = time.monotonic()
        return self.session is not None and self.session.is_machine_leaving()

    @contextlib.contextmanager
    def _profile(self, enabled: bool) -> Iterator[None]:
        """Write a trace of the context's body, for Perfetto, if `enabled`."""
        if not enabled:
            yield
            return
        with write_profile(self.files.folder / "traces" / f"profile-rank-{self.rank}.json.gz", self.device):
            yield
        self.patience.gather(None, "write the profiler's trace")

    def _resolved_options(self) -> dict[str, Any]:
        """Return the options with every default filled in, and facts about data and ranks, as JSON holds them."""
        # Absolute paths, so that `eval` and others find the data from any folder.
        config = self.config.with_absolute_paths()
        config = dataclasses.replace(config, run_folder=self.folder, model=config.model.resolved)
        facts = {
            "corpus": ", ".join(self.config.data) or f"the standard library of Python {platform.python_version()}",
            "tokens": self.corpus.tokens_hash,
            "tokens_by": self.corpus.index.tokenizer,
            "ranks": self.num_ranks,
            "rows_a_rank": self.mesh.shard.chunk,
            "device": str(self.device),
        }
        return json.loads(json.dumps(dataclasses.asdict(config) | facts, default=str))

    def _state(self) -> dict[str, Tensor]:
        return training_state(self.weights, self.optimizer, self.rank)

    def _resume(self, log: RunLog) -> int:
        """Restore the newest complete checkpoint in the run folder, if there is one; return its step, or 0."""
        newest, source = self.checkpoints.newest(log.print_line), self.config.init_from
        if newest is None:
            if source is not None:
                model, tokens_by = self.config.model.resolved, self.corpus.index.tokenizer
                for line in initialise(self.weights, storage_path(source), model, tokens_by, self.patience):
                    log.print_line(line)
            return 0
        path, facts = newest
        if source is not None and facts["config"].get("init_from") != self._resolved_options()["init_from"]:
            raise ValueError(
                f"{self.folder} holds checkpoints of a run that did not start from {source}: give another run_folder, "
                "or leave init_from out to resume"
            )
        for change in describe_changes(facts["config"], self._resolved_options(), path):
            log.print_line(change)
        make_moments(self.optimizer)
        state = self._state()
        # Random states belong to ranks. Over another number of ranks, each keeps its new one.
        if facts["ranks"] != self.num_ranks:
            state = without_prefixes(state, ["random"])
        self.checkpoints.load(path, state)
        self.weights.round_parameters()
        restore_random_state(state, self.rank)
        log.print_line(f"resuming from {path}, of step {facts['step']} on {facts['ranks']} ranks")
        return int(facts["step"])
