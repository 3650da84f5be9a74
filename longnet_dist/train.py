"""The trainer: one process, or a sequence split over all ranks that torchrun (or Ray Train) started."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from longnet_dist.checkpoint import save_checkpoint
from longnet_dist.data import (
    Corpus,
    TokenStream,
    build_corpus,
    find_files,
    standard_library,
    unigram_bits,
    window_order,
    write_whole,
)
from longnet_dist.logs import RunLog
from longnet_dist.mesh import SequenceMesh
from longnet_dist.model import LongNetConfig, token_loss


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The sequence of each step is split over all ranks."""

    data: tuple[str, ...] = ()
    """Files, folders and globs, read as bytes; by default the source of Python's standard library."""
    seq_len: int = 16384
    """Tokens a sequence, N; any number, over any number of ranks."""
    batch_size: int = 1
    """Sequences a forward."""
    grad_accumulation: int = 1
    """Forwards a step."""
    steps: int = 80
    """Optimizer steps."""
    learning_rate: float = 3e-3
    """At its peak, after the warmup."""
    warmup_steps: int = 10
    """Steps in which the learning rate rises from 0."""
    final_learning_rate: float = 0.1
    """At the end of the cosine, as a fraction of the peak."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Of AdamW."""
    weight_decay: float = 0.05
    """Of AdamW, on matrices."""
    clip_norm: float = 2.0
    """The global gradient norm is clipped to this; 0 to leave it."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of the parameters."""
    autocast: bool = False
    """Compute in bfloat16 where torch's autocast does."""
    compile: bool = False
    """Compile the model with torch.compile."""
    seed: int = 0
    """Of the initialisation, the order of the data, and dropout."""
    validation_fraction: float = 0.05
    """The end of the data that is held out."""
    validation_sequences: int = 4
    """Sequences a validation."""
    validate_every: int = 40
    """Steps between validations; there is one at the end in any case. 0 for that one only."""
    checkpoint_every: int = 0
    """Steps between checkpoints; there is one at the end in any case. 0 for that one only."""
    run_folder: Path | None = None
    """The run's folder; by default runs/ and the time."""
    cache: Path = Path("~/.cache/longnet_dist")
    """Where tokenised data is kept between runs."""
    keep_kv: bool = False
    """Keep gathered keys and values for the backward in place of gathering them again."""
    timeout: float = 600.0
    """Seconds that a collective may take."""
    model: LongNetConfig = field(default_factory=LongNetConfig)
    """The architecture."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "grad_accumulation", "steps", "validation_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 1")


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    run_folder: Path
    losses: tuple[float, ...]
    """Of every step, nats a token."""
    validation_bits_per_byte: float
    unigram_bits_per_byte: float
    """Of a model that knows only how frequent each byte is, on the same held-out tokens."""


def train(config: TrainConfig | None = None) -> TrainResult:
    """Train a LongNet; under torchrun or Ray Train over all their ranks, else on this process alone.

    Writes a run folder: config.json, metrics.jsonl, TensorBoard events and checkpoints. With no
    argument it trains the default model on the default corpus.

    Raises:
        ValueError: for options or data that cannot work, before any step.
    """
    config = config or TrainConfig()
    with _processes(config) as device:
        return _Trainer(config, device).run()


class _Trainer:
    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        group = dist.group.WORLD if dist.is_initialized() else None
        limit = timedelta(seconds=config.timeout)
        self.mesh = SequenceMesh(group, config.model.pattern, config.seq_len, keep_kv=config.keep_kv, timeout=limit)
        self.folder = _run_folder(config)
        self.corpus = _corpus(config)
        torch.manual_seed(config.seed)
        self.model = config.model.build(device, getattr(torch, config.dtype))
        # Dropout must differ between chunks, parameters must not.
        torch.manual_seed(config.seed + 1 + self.mesh.rank)
        self.optimizer = torch.optim.AdamW(
            _decayed_and_not(self.model, config.weight_decay), lr=config.learning_rate, betas=config.betas
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: _learning_rate(config, step))
        forward: nn.Module = torch.compile(self.model) if config.compile else self.model  # type: ignore[assignment]
        self.forward = DistributedDataParallel(forward) if group is not None else forward

    def run(self) -> TrainResult:
        config = self.config
        losses, validation = [], math.nan
        validation_tokens = config.validation_sequences * config.seq_len + 1
        unigram = unigram_bits(self.corpus.byte_counts, self.corpus.validation.tokens(validation_tokens)[1:])
        described = dataclasses.asdict(config) | {"ranks": self.mesh.size, "device": str(self.device)}
        with RunLog(self.folder if self.mesh.rank == 0 else None, described, config.steps) as log:
            log.say(f"{self.mesh.size} ranks, {self.mesh.shard.chunk} rows each of {config.seq_len}; run {self.folder}")
            for step in range(1, config.steps + 1):
                began = time.perf_counter()
                measured = self._step(step)
                losses.append(measured["loss"])
                measured |= _rates(config, step, time.perf_counter() - began)
                last = step == config.steps
                if last or (config.validate_every and step % config.validate_every == 0):
                    validation = self._validate() / math.log(2)
                    measured |= {"validation_bits_per_byte": validation, "unigram_bits_per_byte": unigram}
                log.step(measured)
                if last or (config.checkpoint_every and step % config.checkpoint_every == 0):
                    self._save(step)
            log.say(f"validation {validation:.3f} bits per byte; byte-unigram model {unigram:.3f} bits per byte")
        return TrainResult(self.folder, tuple(losses), validation, unigram)

    def _step(self, step: int) -> dict[str, float]:
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for micro in range(config.grad_accumulation):
            last = micro == config.grad_accumulation - 1
            first_window = ((step - 1) * config.grad_accumulation + micro) * config.batch_size
            with contextlib.nullcontext() if last else self._no_sync():
                loss = self._loss(self.corpus.train, range(first_window, first_window + config.batch_size))
                # Every forward has as many tokens as the next, so their mean is the step's mean over tokens.
                # DistributedDataParallel takes the mean over ranks of what is to be summed.
                (loss * (self.mesh.size / config.grad_accumulation)).backward()
            total += loss.detach().double() / config.grad_accumulation
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm or math.inf)
        lr = float(self.schedule.get_last_lr()[0])
        measured = {"step": step, "loss": total.item(), "grad_norm": norm.item(), "lr": lr}
        self.optimizer.step()
        self.schedule.step()
        return measured

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        ddp = isinstance(self.forward, DistributedDataParallel)
        return self.forward.no_sync() if ddp else contextlib.nullcontext()  # type: ignore[operator]

    def _loss(self, stream: TokenStream, windows: range, shuffle: bool = True) -> Tensor:
        """Of the global sequences of these windows, on every rank."""
        tokens, labels = self._read(stream, windows, shuffle)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast):
            logits = self.forward(tokens, mesh=self.mesh)
        return token_loss(logits, labels, self.mesh)

    def _read(self, stream: TokenStream, windows: range, shuffle: bool) -> tuple[Tensor, Tensor]:
        """This rank's rows of some windows: tokens and labels, (B, L) each."""
        config, shard = self.config, self.mesh.shard
        number = stream.num_windows(config.seq_len)
        rows = []
        for window in windows:
            epoch, index = divmod(window, number)
            if shuffle:
                index = int(window_order(number, epoch, config.seed)[index])
            rows.append(stream.read(index, config.seq_len, shard.start, shard.stop))
        tokens, labels = zip(*rows, strict=True)
        return torch.stack(tokens).to(self.device), torch.stack(labels).to(self.device)

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss over the held-out sequences, nats a token."""
        self.forward.eval()
        count = min(self.config.validation_sequences, self.corpus.validation.num_windows(self.config.seq_len))
        losses = [self._loss(self.corpus.validation, range(i, i + 1), shuffle=False).item() for i in range(count)]
        self.forward.train()
        return sum(losses) / len(losses)

    def _save(self, step: int) -> None:
        if self.mesh.rank == 0:
            save_checkpoint(self.folder / f"checkpoint-{step}.pt", self.model, self.optimizer, self.config.model, step)


def _rates(config: TrainConfig, step: int, seconds: float) -> dict[str, float]:
    tokens = config.batch_size * config.grad_accumulation * config.seq_len
    return {"tokens": step * tokens, "tokens_per_second": tokens / seconds, "seconds": seconds}


def _learning_rate(config: TrainConfig, step: int) -> float:
    """Of the step after `step` steps, as a fraction of the peak: linear warmup, then a cosine."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    return config.final_learning_rate + (1 - config.final_learning_rate) * (1 + math.cos(math.pi * progress)) / 2


def _decayed_and_not(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


@contextlib.contextmanager
def _processes(config: TrainConfig) -> Iterator[torch.device]:
    """The device of this rank, with a process group where a launcher set WORLD_SIZE and none was made yet."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ours = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if ours:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout))
    try:
        yield device
    finally:
        if ours:
            dist.destroy_process_group()


def _run_folder(config: TrainConfig) -> Path:
    """The run's folder, the same on every rank: rank 0 names it and makes it."""
    named = [config.run_folder or Path("runs") / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")]
    if dist.is_initialized():
        dist.broadcast_object_list(named, src=0)
    if not dist.is_initialized() or dist.get_rank() == 0:
        named[0].mkdir(parents=True, exist_ok=True)
        described = dataclasses.asdict(dataclasses.replace(config, run_folder=named[0]))
        write_whole(named[0] / "config.json", json.dumps(described, indent=2, default=str) + "\n")
    return named[0]


def _corpus(config: TrainConfig) -> Corpus:
    """The tokenised data; the first rank of each machine makes it, then the others read it."""

    def build() -> Corpus:
        files = find_files(config.data) if config.data else standard_library()
        return build_corpus(files, config.cache.expanduser(), config.validation_fraction, config.seed)

    corpus, problem = None, None
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            corpus = build()
            problem = _too_short(corpus, config.seq_len)
        except (ValueError, OSError) as error:
            problem = str(error)
    if dist.is_initialized():
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        problem = next((p for p in problems if p), None)
    if problem:
        raise ValueError(problem)
    return corpus or build()


def _too_short(corpus: Corpus, seq_len: int) -> str | None:
    for name, stream in (("training", corpus.train), ("held-out", corpus.validation)):
        if stream.num_windows(seq_len) == 0:
            return (
                f"the {name} part of the data is {stream.stop - stream.start} tokens, and one sequence with the token "
                f"after it is {seq_len + 1}; give more data, a shorter seq_len, or another validation_fraction"
            )
    return None
