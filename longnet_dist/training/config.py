"""The options of a training run, and of Ray for one, with their rules. The command line is read from here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from longnet_dist.checkpoints.storage import place
from longnet_dist.data.sources import HUGGING_FACE
from longnet_dist.models.config import LongNetConfig
from longnet_dist.paths import local_path
from longnet_dist.training.parallel import ParallelConfig


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The sequences of each step are split over all ranks; see `parallel`.

    Raises:
        ValueError: for a value that cannot work, with the rule.
    """

    data: tuple[str, ...] = ()
    """Files, folders and globs: .jsonl, .jsonl.gz, .jsonl.zst and .parquet have a document a row, any other file is
    one document. Or hf:NAME?name=CONFIG&split=SPLIT, a Hugging Face dataset; or a folder that `longnet-dist tokenize`
    wrote. By default the source of Python's standard library."""
    tokenizer: Path | None = None
    """A tokenizer's file, *.json (tokenizers) or *.tiktoken; bytes by default."""
    text_field: str = "text"
    """The key or column that holds the text of a row of JSON lines or Parquet."""
    seq_len: int = 16384
    """Tokens a sequence, N; any number, over any number of ranks."""
    batch_size: int = 1
    """Sequences a forward, over all data-parallel ranks together."""
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
    most_skipped: int = 5
    """Steps in a row whose loss or gradient norm is not finite, each skipped, after which the run stops."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of the parameters."""
    autocast: bool = False
    """Compute in bfloat16 where torch's autocast does."""
    compile: bool = False
    """Compile each block with torch.compile."""
    seed: int = 0
    """Of the initialisation, the order of the data, and dropout."""
    validation_fraction: float = 0.05
    """The end of the data that is held out."""
    validation_sequences: int = 4
    """Sequences a validation."""
    validate_every: int = 40
    """Steps between validations; there is one at the end in any case. 0 for that one only."""
    run_folder: str | Path | None = None
    """The run's folder; by default runs/ and the time. A run that finds checkpoints in it goes on from the newest. Or
    a place in an object store, s3://BUCKET/PREFIX (extra: s3)."""
    checkpoint_every: int = 0
    """Steps between checkpoints; there is one at the end in any case. 0 for that one only."""
    keep_checkpoints: int = 2
    """How many of the newest to keep; at least 2."""
    keep_every: int = 0
    """Keep the checkpoints of every so many steps for good; 0 for none."""
    async_checkpoints: bool = False
    """Write checkpoints in the background."""
    cache: Path = Path("~/.cache/longnet_dist")
    """Where tokenised data is kept between runs."""
    keep_kv: bool = False
    """Keep gathered keys and values for the backward in place of gathering them again."""
    wandb: str = ""
    """Log to this project of Weights & Biases, too; its own variables (WANDB_MODE, ...) say how."""
    profile: bool = False
    """Write a trace of the third step of this start (or the last) into traces/ of the run's folder, for Perfetto."""
    peak_tflops: float = 0.0
    """What a rank's device can do, in 10^12 operations a second, for MFU; 0 to leave MFU out."""
    timeout: float = 600.0
    """Seconds that a collective may take."""
    io_timeout: float = 3600.0
    """Seconds that ranks wait for another rank's I/O: checkpoints, metrics, the lock of the run's folder."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks are arranged; all in one sequence by default."""
    model: LongNetConfig = field(default_factory=LongNetConfig)
    """The architecture."""

    def __post_init__(self) -> None:
        data = (self.data,) if isinstance(self.data, str | Path) else self.data
        object.__setattr__(self, "data", tuple(map(str, data)))
        for path in self.data:
            if not path.startswith(HUGGING_FACE):
                local_path(path)
        if self.run_folder is not None:
            object.__setattr__(self, "run_folder", place(self.run_folder))
        for name in ("cache", "tokenizer"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, local_path(getattr(self, name)))
        least = dict.fromkeys(("seq_len", "batch_size", "grad_accumulation", "steps", "validation_sequences"), 1)
        least |= dict.fromkeys(
            (
                "warmup_steps",
                "validate_every",
                "checkpoint_every",
                "keep_every",
                "clip_norm",
                "peak_tflops",
                "learning_rate",
                "final_learning_rate",
                "weight_decay",
            ),
            0,
        )
        # One of two may be damaged.
        for name, value in (
            least | {"keep_checkpoints": 2, "most_skipped": 1, "timeout": 1e-3, "io_timeout": 1e-3}
        ).items():
            if not getattr(self, name) >= value:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {value}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 1")
        if self.dtype not in ("float32", "float64", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of float32, float64, bfloat16")


@dataclass(frozen=True)
class RayConfig:
    """How Ray runs a training.

    Raises:
        ValueError: for a value that cannot work, with the rule.
    """

    min_ranks: int = 0
    """Where nodes are lost, go on with as few as this many, and grow again when they are back; 0 for a fixed number."""
    cpus_per_rank: float = 1
    """CPUs that each rank reserves."""
    gpus_per_rank: float = 0
    """GPUs that each rank reserves; with one, ranks talk by NCCL."""
    placement: str = "PACK"
    """Ray's placement strategy; PACK keeps the ranks of a segment together."""
    labels: dict[str, str] = field(default_factory=dict)
    """Of the nodes that may hold ranks, Ray's label selector."""
    resources: dict[str, float] = field(default_factory=dict)
    """What else each rank reserves: custom resources of nodes, which, other than labels, go with min_ranks."""
    max_failures: int = 3
    """Restarts after a lost rank or node; -1 for any number. Preemptions that were announced do not count."""
    resize_seconds: float = 60.0
    """How often to look whether there is room for more ranks."""

    def __post_init__(self) -> None:
        if self.labels and self.min_ranks:
            raise ValueError(
                "labels and min_ranks do not go together, because Ray counts the room on all nodes, whatever their "
                "labels: give the nodes a custom resource, and each rank a part of it (resources)"
            )
        if self.min_ranks < 0 or self.max_failures < -1 or not self.cpus_per_rank > 0 or self.gpus_per_rank < 0:
            raise ValueError(
                f"{self}: min_ranks and gpus_per_rank must be 0 or more, cpus_per_rank above 0, max_failures -1 or more"
            )
