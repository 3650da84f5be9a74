"""Training under Ray Train: Ray starts, places and restarts ranks, each of which runs `longnet_dist.train`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train import Checkpoint, CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from longnet_dist.checkpoints.checkpoints import Checkpoints
from longnet_dist.checkpoints.storage import in_store, storage_path
from longnet_dist.integrations.ray.connection import connect
from longnet_dist.training.config import RayConfig, TrainConfig
from longnet_dist.training.job import local_run_files, lock_run_folder
from longnet_dist.training.processes import warn_if_no_checkpoints
from longnet_dist.training.trainer import TrainResult, train


def train_on_ray(config: TrainConfig, ranks: int, options: RayConfig | None = None) -> TrainResult:
    """Train on a Ray cluster: the one at RAY_ADDRESS, or else one that is started on this machine.

    The run's folder is also Ray's storage, so it must be a path that every node sees, or a place in an object store.
    The run resumes from the newest complete checkpoint in the folder, whatever Ray has registered.

    Args:
        config: as for `train`, with a `run_folder`.
        ranks: number of workers; the largest number if `options.min_ranks` is set.
        options: how Ray runs the workers.

    Returns:
        The result of the training run.

    Raises:
        ValueError: for options or data that cannot work, or if no cluster answers at RAY_ADDRESS.
        RuntimeError: if the run was stopped, or failed more often than `options.max_failures`.

    Example::

        result = train_on_ray(TrainConfig(run_folder="/shared/runs/first"), ranks=2)
    """
    options = options or RayConfig()
    if config.run_folder is None:
        raise ValueError(
            "give --run-folder, a path that every node sees, or s3://BUCKET/PREFIX: a run that fails resumes from it"
        )
    if ranks < max(1, options.min_ranks):
        raise ValueError(f"ranks is {ranks}; it must be at least 1, and at least min_ranks, {options.min_ranks}")
    for count in (ranks, options.min_ranks or ranks):
        config.parallel.fitting(count, config.batch_size)
    config = config.with_absolute_paths()  # Workers have another working directory.
    assert config.run_folder is not None
    folder = storage_path(config.run_folder)
    with lock_run_folder(local_run_files(folder, config, upload=True).folder):
        # Ray's list of the checkpoints of an earlier start. Ray refuses to start if one of them was removed since.
        (folder / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    warn_if_no_checkpoints(config)
    connect(dashboard=True)
    try:
        result = _trainer(config, folder, ranks, options).fit().return_value
    except ray.train.TrainingFailedError as error:
        raise RuntimeError(f"the run in {folder} failed: {error}") from error
    except (SystemExit, RayActorError):  # So Ray ends a run at Ctrl-C.
        result = None
    if isinstance(result, str):
        raise ValueError(result)
    if not isinstance(result, TrainResult):
        newest = Checkpoints(folder / "checkpoints").newest()
        held = "it has no checkpoint yet" if newest is None else f"later steps than those of {newest[0]} are lost"
        raise RuntimeError(
            f"the run in {folder} was stopped, and {held}. To resume: longnet-dist train --resume {folder} "
            f"--launcher ray --ranks {ranks}"
        )
    return result


def _trainer(config: TrainConfig, folder: Path, ranks: int, options: RayConfig) -> TorchTrainer:
    """Translate our options into Ray Train's."""
    return TorchTrainer(
        _run_worker,
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
            storage_path=_ray_path(folder.parent),
            storage_filesystem=_arrow_file_system(folder),
            failure_config=FailureConfig(max_failures=options.max_failures),
        ),
    )


def _ray_path(path: Path) -> str:
    """Return a path in Ray's form: in a store, without the scheme, because Ray gets the file system separately."""
    return path.path if in_store(path) else str(path)  # type: ignore[attr-defined]


def _arrow_file_system(path: Path) -> Any:
    """Return the store's client, which also writes our checkpoints, as a pyarrow file system; None for a disk."""
    if not in_store(path):
        return None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(path.fs))  # type: ignore[attr-defined]


def _run_worker(loop_config: dict[str, Any]) -> TrainResult | str | None:
    """Train as one worker of Ray Train.

    A mistake in options or data is returned as text, because an exception would make Ray restart the run in vain.
    """
    config: TrainConfig = loop_config["config"]
    context = ray.train.get_context()
    config = dataclasses.replace(config, parallel=config.parallel.fitting(context.get_world_size(), config.batch_size))
    try:
        result: TrainResult | str = train(config, _Session())
    except ValueError as error:  # Raised on every rank.
        result = str(error)
    return result if context.get_world_rank() == 0 else None


class _Session:
    """The trainer's link to Ray Train: registers checkpoints, and receives preemption notices."""

    def __init__(self) -> None:
        self._last_notice: Any = None

    def device(self) -> torch.device:
        """Return the first GPU that Ray reserved for this worker; the CPU if it reserved none.

        All workers of a node see all GPUs that are reserved on it, and each may have several or a part of one, so
        LOCAL_RANK does not tell. A worker without a GPU may see GPUs, but its process group is gloo's.
        """
        return get_device()

    def report_checkpoint(self, path: Path, metrics: dict[str, float]) -> None:
        """Register with Ray a checkpoint that is already in the run's folder; nothing is uploaded."""
        ray.train.report(
            metrics,
            # Through Ray's own client: with any other, even of the same store, Ray takes the path for another place.
            checkpoint=Checkpoint(
                _ray_path(path),
                ray.train.get_context().get_storage().storage_filesystem if in_store(path) else None,
            ),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    def is_machine_leaving(self) -> bool:
        """Return whether there is a new notice that a node will be preempted."""
        notice = ray.train.get_preemption_info()
        new = notice is not None and notice != self._last_notice
        self._last_notice = notice
        return new
