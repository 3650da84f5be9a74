"""The options of a training run, and of Ray, with their rules.

The docstrings of the fields are the help of `longnet-dist train`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from pathlib import Path
from typing import Literal

from longnet_dist.checkpoints.storage import storage_path
from longnet_dist.data.hugging_face import HUGGING_FACE
from longnet_dist.models.config import DEFAULT_LENGTH, LongNetConfig
from longnet_dist.paths import local_path
from longnet_dist.plan.hardware import HARDWARE
from longnet_dist.plan.pattern import MAX_SIZE
from longnet_dist.training.parallel import ParallelConfig

MAX_SEED = 1 << 40
"""The largest seed; the order of an epoch's windows multiplies it by a million."""
_MAX_AMOUNT = 10**9
_PLACEMENTS = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


@dataclass(frozen=True)
class TrainConfig:
    """The options of a training run. Each sequence is split over all ranks, unless `parallel` says otherwise.

    Raises:
        ValueError: for a value that cannot work, with the rule.
    """

    data: tuple[str, ...] = ()
    """Files, folders and globs; hf:NAME?name=CONFIG&split=SPLIT for a Hugging Face dataset; or one folder that
    `longnet-dist tokenize` wrote. Files .jsonl and .parquet have one document per row; any other file is
    one document. Files .gz, .bz2, .xz and .zst are decompressed. The default is the source of Python's standard
    library."""
    tokenizer: Path | None = None
    """Tokenizer file, *.json (tokenizers) or *.tiktoken. The default is one token per byte."""
    text_field: str = "text"
    """Key or column that holds the text in a row of JSON lines or Parquet."""
    allow_binary: bool = False
    """Also take files that hold NUL bytes, which text does not have, as the bytes they are."""
    seq_len: int = DEFAULT_LENGTH
    """Tokens per sequence, over all ranks that hold it; any number works over any number of ranks."""
    objective: Literal["causal", "mlm"] = "causal"
    """What is learned: the next token, by a decoder (causal), or 15 % of the tokens, hidden as in BERT, by a
    bidirectional encoder (mlm). The encoder has one token id more, the mask."""
    documents: Literal["joined", "separate"] = "joined"
    """Whether a token sees the documents before its own in a sequence (joined, as in the paper), or its own alone."""
    batch_size: int = 1
    """Sequences per forward, over all data-parallel ranks together."""
    grad_accumulation: int = 1
    """Forwards per optimizer step."""
    steps: int = 80
    """Number of optimizer steps."""
    learning_rate: float = 3e-3
    """Peak learning rate, reached after the warmup."""
    warmup_steps: int = 10
    """Number of steps in which the learning rate rises linearly from 0."""
    final_learning_rate: float = 0.1
    """Learning rate at the end of the cosine, as a fraction of the peak."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW betas."""
    weight_decay: float = 0.05
    """AdamW weight decay of matrices; biases and norms have none."""
    clip_norm: float = 2.0
    """Maximum global gradient norm; 0 for no clipping."""
    max_skipped_steps: int = 5
    """Stop the run after this many steps in a row whose loss or gradient norm is not finite. Each is skipped."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Dtype of the parameters. With bfloat16, weights and AdamW's moments are in float32 all the same: see
    docs/training.md."""
    autocast: bool | None = None
    """Compute in bfloat16 wherever torch's autocast does; by default on GPUs with parameters in float32."""
    compile: bool = False
    """Compile each block with torch.compile."""
    seed: int = 0
    """Seed of the initialisation, the order of the data, and dropout."""
    validation_fraction: float = 0.05
    """Fraction of the data, at its end, that is held out for validation."""
    validation_sequences: int = 4
    """Number of sequences per validation."""
    validate_every: int = 40
    """Steps between validations, in addition to the one at the end; 0 for that one only."""
    run_folder: str | Path | None = None
    """Folder that the run writes; by default a new one in runs/, named by the time. If it holds checkpoints, the run
    resumes from the newest. It may be in an object store, s3://BUCKET/PREFIX (extra: s3)."""
    init_from: str | Path | None = None
    """Folder of another run, or of an export, whose weights the run starts with, at step 0. The length and the branches
    may differ from theirs. Not together with --resume."""
    checkpoint_every: int = 0
    """Steps between checkpoints, in addition to the one at the end; 0 for that one only."""
    keep_checkpoints: int = 2
    """Number of the newest checkpoints to keep; at least 2."""
    keep_every: int = 0
    """Never remove the checkpoints of steps that are multiples of this; 0 for none."""
    async_checkpoints: bool = False
    """Write checkpoints in the background."""
    cache: Path = Path("~/.cache/longnet_dist")
    """Folder for tokenised data, which later runs reuse."""
    strategy: str = "auto"
    """How queries meet the keys of other ranks: all_gather, all_to_all, exchange, or auto."""
    hardware: str = ""
    """Speed of a rank, by which the strategy auto compares: cpu, a100, h100, h200, b200, or a file that `longnet-dist
    calibrate` wrote and every rank can read. The default is an estimate for CPUs, or for an H100."""
    keep_kv: bool | None = None
    """Keep what other ranks sent for the backward, instead of sending it again; by default if that is little."""
    wandb: str = ""
    """Project of Weights & Biases to log to; its environment variables (WANDB_MODE, ...) configure it."""
    profile: bool = False
    """Write a trace for Perfetto into traces/ of the run folder: of the third step after this start, or of the last."""
    peak_tflops: float = 0.0
    """Peak of a rank's device, in 10^12 operations per second, for MFU; 0 to omit MFU."""
    timeout: float = 600.0
    """Maximum duration of a collective, in seconds."""
    io_timeout: float = 3600.0
    """Maximum wait for another rank's I/O, in seconds: checkpoints, metrics, the lock of the run folder."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Arrangement of the ranks; by default all hold one sequence."""
    model: LongNetConfig = field(default_factory=LongNetConfig)
    """Architecture of the model, and how it computes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", self.model.for_length(max(1, self.seq_len)))
        data = (self.data,) if isinstance(self.data, str | Path) else self.data
        object.__setattr__(self, "data", tuple(map(str, data)))
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON has lists in place of tuples.
        for path in self.data:
            if not path.startswith(HUGGING_FACE):
                local_path(path)
        for name in ("run_folder", "init_from"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, storage_path(getattr(self, name)))
        for name in ("cache", "tokenizer"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, local_path(getattr(self, name)))
        for option in fields(self):
            _check_number(option.name, getattr(self, option.name))
        for name, minimum in _MINIMA.items():
            if not getattr(self, name) >= minimum:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {minimum}")
        if abs(self.seed) > MAX_SEED:
            raise ValueError(f"seed is {self.seed}; it must be at most {MAX_SEED} (2^40) in magnitude")
        for name in ("timeout", "io_timeout"):
            if getattr(self, name) > _MAX_SECONDS:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at most {_MAX_SECONDS:g} (three years)")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}; both must be at least 0 and below 1")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 1")
        if self.objective not in ("causal", "mlm"):
            raise ValueError(f"objective is {self.objective!r}; it must be causal or mlm")
        if self.objective == "mlm" and not self.model.tie_embeddings:
            raise ValueError("the objective mlm has no output projection of its own: leave tie_embeddings on")
        if self.model.multiway and self.model.multiway_first_id is None:
            raise ValueError("a training with multiway needs model.multiway_first_id, to know each token's kind")
        if self.documents not in ("joined", "separate"):
            raise ValueError(f"documents is {self.documents!r}; it must be joined or separate")
        if self.dtype not in ("float32", "float64", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of float32, float64, bfloat16")

    def with_absolute_paths(self) -> TrainConfig:
        """Return these options with paths that are valid from any working directory of this machine.

        The names of datasets on Hugging Face and paths in object stores stay as they are.
        """
        data = (path if path.startswith(HUGGING_FACE) else str(local_path(path).absolute()) for path in self.data)
        # Paths in a store stay as they are. Others have no `..`, because launchers use the run folder's name.
        folders = {name: getattr(self, name) for name in ("run_folder", "init_from")}
        folders = {n: Path(os.path.abspath(path)) if isinstance(path, Path) else path for n, path in folders.items()}
        tokenizer = None if self.tokenizer is None else self.tokenizer.absolute()
        hardware = self.hardware
        if hardware and hardware not in HARDWARE:
            hardware = str(local_path(hardware).absolute())
        paths = {"tokenizer": tokenizer, "cache": self.cache.absolute(), "hardware": hardware} | folders
        return replace(self, data=tuple(data), **paths)


def _check_number(name: str, value: object) -> None:
    """Check that a number is finite, and an integer is within what a process can count to."""
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{name} is {number}; it must be a finite number")
        if isinstance(number, int) and abs(number) > MAX_SIZE:
            raise ValueError(f"{name} is {number}; it must be at most {MAX_SIZE} (2^48) in magnitude")


_MAX_SECONDS = 1e8
_MINIMA = (
    dict.fromkeys(("seq_len", "batch_size", "grad_accumulation", "steps", "validation_sequences"), 1)
    | dict.fromkeys(("warmup_steps", "validate_every", "checkpoint_every", "keep_every"), 0)
    | dict.fromkeys(("clip_norm", "peak_tflops", "learning_rate", "final_learning_rate", "weight_decay"), 0)
    | dict.fromkeys(("timeout", "io_timeout"), 1e-3)
    | {"max_skipped_steps": 1, "keep_checkpoints": 2}  # Two, because one may be damaged.
)


@dataclass(frozen=True)
class RayConfig:
    """The options with which Ray runs a training.

    Raises:
        ValueError: for a value that cannot work, with the rule.
    """

    min_ranks: int = 0
    """After nodes are lost, resume with as few ranks as this, and grow again when nodes return; 0 for a fixed
    number."""
    cpus_per_rank: float = 1
    """Number of CPUs that each rank reserves."""
    gpus_per_rank: float = 0
    """Number of GPUs that each rank reserves; ranks with GPUs communicate by NCCL."""
    placement: str = "PACK"
    """Ray's placement strategy; PACK uses few nodes, so that most ranks of a segment share one."""
    labels: dict[str, str] = field(default_factory=dict)
    """Ray's label selector for the nodes that may hold ranks."""
    resources: dict[str, float] = field(default_factory=dict)
    """Custom resources of nodes that each rank reserves; unlike labels, they can be combined with min_ranks."""
    max_failures: int = 3
    """Maximum number of restarts after a lost rank or node, not counting announced preemptions; -1 for no maximum."""
    resize_seconds: float = 60.0
    """Seconds between checks whether the cluster has room for more ranks."""

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
        if max(self.min_ranks, self.max_failures) > _MAX_AMOUNT:
            raise ValueError(f"{self}: min_ranks and max_failures must be at most {_MAX_AMOUNT:,}")
        check_resources(self.cpus_per_rank, self.gpus_per_rank, self.placement, self.resources)
        if not 0 < self.resize_seconds < math.inf:
            raise ValueError(f"resize_seconds is {self.resize_seconds}; it must be above 0 and finite")


def check_resources(
    cpus_per_rank: float, gpus_per_rank: float, placement: str, resources: dict[str, float] | None = None
) -> None:
    """Check what each rank is to reserve on a Ray cluster, and where.

    Args:
        cpus_per_rank: number of CPUs, above 0.
        gpus_per_rank: number of GPUs; a whole number above 1, because Ray splits only single GPUs.
        placement: Ray's placement strategy.
        resources: amounts of custom resources, by name.

    Raises:
        ValueError: for a value that cannot work, with the rule.
    """
    for name, amount in {"cpus_per_rank": cpus_per_rank, "gpus_per_rank": gpus_per_rank, **(resources or {})}.items():
        if isinstance(amount, bool) or not isinstance(amount, Real) or not 0 <= amount <= _MAX_AMOUNT:
            raise ValueError(f"{name} is {amount!r}; it must be a number between 0 and {_MAX_AMOUNT:,}")
    if not cpus_per_rank:
        raise ValueError("cpus_per_rank is 0; it must be above 0")
    if gpus_per_rank > 1 and gpus_per_rank % 1:
        raise ValueError(f"gpus_per_rank is {gpus_per_rank}; above 1 it must be a whole number")
    if placement not in _PLACEMENTS:
        raise ValueError(f"placement is {placement!r}; it must be one of {', '.join(_PLACEMENTS)}")
