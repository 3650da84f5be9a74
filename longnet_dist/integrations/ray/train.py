"""Training under Ray Train: Ray starts, places and restarts the ranks; what they run is `longnet_dist.train`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from longnet_dist.checkpoints.storage import in_store, place
from longnet_dist.data.sources import HUGGING_FACE
from longnet_dist.integrations.ray.crew import connect
from longnet_dist.training.config import RayConfig, TrainConfig
from longnet_dist.training.job import figures_of, held, warn_of_no_checkpoint
from longnet_dist.training.parallel import ParallelConfig
from longnet_dist.training.trainer import TrainResult, train


def train_on_ray(config: TrainConfig, ranks: int, options: RayConfig | None = None) -> TrainResult:
    """Train on `ranks` workers of the cluster that RAY_ADDRESS names, or else of one that is started here.

    The run's folder is Ray's storage, too: it must be a path that every node sees, or a place in an object store. On
    start, the newest whole checkpoint in it wins, whatever Ray has registered.

    Args:
        config: as for `train`, with a `run_folder`.
        ranks: workers; the most of them, where `options.min_ranks` is given.
        options: how Ray runs them.

    Raises:
        ValueError: for options that cannot work.
        RuntimeError: where the run failed more often than it may.
    """
    options = options or RayConfig()
    if config.run_folder is None:
        raise ValueError(
            "give --run-folder, a path that every node sees, or s3://BUCKET/PREFIX: what is lost goes on from there"
        )
    if ranks < max(1, options.min_ranks):
        raise ValueError(f"ranks is {ranks}; it must be at least 1, and at least min_ranks, {options.min_ranks}")
    for count in (ranks, options.min_ranks or ranks):
        arrangement(config, count)
    config = _absolute(config)
    assert config.run_folder is not None
    folder = place(config.run_folder)
    with held(figures_of(folder, config, first=True).folder):
        # What Ray registered of an earlier start: it would refuse one whose checkpoints our retention has removed.
        (folder / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    warn_of_no_checkpoint(config)
    connect(dashboard=True)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"config": config},
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if options.gpus_per_rank else "gloo", timeout_s=max(1, round(config.timeout))
        ),
        scaling_config=ScalingConfig(
            num_workers=(options.min_ranks, ranks) if options.min_ranks else ranks,
            use_gpu=options.gpus_per_rank > 0,
            resources_per_worker={"CPU": options.cpus_per_rank}
            | ({"GPU": options.gpus_per_rank} if options.gpus_per_rank else {})
            | options.resources,
            placement_strategy=options.placement,
            label_selector=options.labels or None,
            elastic_resize_monitor_interval_s=options.resize_seconds,
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=_in_rays_words(folder.parent),
            storage_filesystem=_file_system(folder),
            failure_config=FailureConfig(max_failures=options.max_failures),
        ),
    )
    try:
        result = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        raise RuntimeError(f"the run in {folder} failed: {error}") from error
    if isinstance(result, str):
        raise ValueError(result)
    if not isinstance(result, TrainResult):
        raise RuntimeError(f"the run in {folder} ended without a result: it was stopped")
    return result


def arrangement(config: TrainConfig, ranks: int) -> ParallelConfig:
    """The axes of this many ranks: those of `config`, or the nearest that fit, with all ranks in use.

    Fewer ranks than were asked for are fewer ranks a sequence; where the data-parallel axes do not divide their number,
    the most sequences at a time that do, and that divide the batch. The losses are the same in every arrangement.

    Raises:
        ValueError: where `sp` is fixed, and does not fit.
    """
    asked = config.parallel
    data = asked.dp_replicate * asked.dp_shard
    if ranks % data == 0 or asked.sp:
        asked.degrees(ranks)
        return asked
    fits = max(n for n in range(1, min(data, ranks) + 1) if ranks % n == 0 and config.batch_size % n == 0)
    return ParallelConfig(dp_replicate=1, dp_shard=fits, sp=ranks // fits)


def _absolute(config: TrainConfig) -> TrainConfig:
    """Paths as they are from here: a worker has another current folder."""
    data = tuple(path if path.startswith(HUGGING_FACE) else _from_here(path) for path in config.data)
    given = {name: getattr(config, name) for name in ("run_folder", "tokenizer", "cache")}
    here = {name: path for name, path in given.items() if path is not None and not in_store(path)}
    paths: dict[str, Any] = {name: Path(_from_here(path)) for name, path in here.items()}
    return dataclasses.replace(config, data=data, **paths)


def _from_here(path: str | Path) -> str:
    return os.path.abspath(Path(path).expanduser())


def _in_rays_words(path: Path) -> str:
    """Ray names a store by its file system, and a path in it without the scheme."""
    return path.path if in_store(path) else str(path)  # type: ignore[attr-defined]


def _file_system(path: Path) -> Any:
    """A store as pyarrow, and so Ray, knows one: the very client by which checkpoints go there; None of a disk."""
    if not in_store(path):
        return None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(path.fs))  # type: ignore[attr-defined]


def _work(given: dict[str, Any]) -> TrainResult | str | None:
    """What a worker of Ray Train runs; a mistake in options or data is returned, as to start anew would not help."""
    config: TrainConfig = given["config"]
    context = ray.train.get_context()
    config = dataclasses.replace(config, parallel=arrangement(config, context.get_world_size()))
    try:
        result: TrainResult | str = train(config, _Session())
    except ValueError as error:  # Raised on every rank.
        result = str(error)
    return result if context.get_world_rank() == 0 else None


class _Session:
    """What Ray Train hears of the run, and tells it."""

    def __init__(self) -> None:
        self._saved_for: Any = None

    def checkpointed(self, path: Path, measured: dict[str, float]) -> None:
        """Register a checkpoint that our protocol has written: nothing is uploaded."""
        ray.train.report(
            measured,
            # By Ray's own client of the storage: it takes any other, of the same store too, for another place.
            checkpoint=Checkpoint(
                _in_rays_words(path),
                ray.train.get_context().get_storage().storage_filesystem if in_store(path) else None,
            ),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    def leaving(self) -> bool:
        """Whether a node was announced to go, of which this is the first that is heard."""
        info = ray.train.get_preemption_info()
        new = info is not None and info != self._saved_for
        self._saved_for = info
        return new
