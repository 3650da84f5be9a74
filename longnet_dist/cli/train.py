"""`longnet-dist train`: a training run on one process, under torchrun, or on a Ray cluster."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Annotated, Literal

import tyro

from longnet_dist.best_effort import print_note, tolerate_broken_output
from longnet_dist.checkpoints.storage import storage_path
from longnet_dist.cli.options import join_help_lines
from longnet_dist.extras import extra
from longnet_dist.models.config import LongNetConfig
from longnet_dist.training.config import RayConfig, TrainConfig
from longnet_dist.training.parallel import ParallelConfig

join_help_lines(TrainConfig, ParallelConfig, LongNetConfig, RayConfig)


def resumed(folder: str) -> Callable[..., None]:
    """Return `run_train` with the options of a run as defaults.

    Raises:
        ValueError: if the folder is not that of a run.
    """
    from longnet_dist.training.job import read_config

    saved = dataclasses.replace(read_config(storage_path(folder)), run_folder=folder)

    def resume_train(
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = saved,
        launcher: Literal["none", "ray"] = "none",
        ranks: int = 1,
        ray: RayConfig = RayConfig(),  # noqa: B008
        resume: str | None = None,
    ) -> None:
        if config.init_from != saved.init_from:
            raise ValueError("--resume continues a run, and --init-from starts one at step 0: give only one of them")
        for option in dataclasses.fields(config):
            before, now = getattr(saved, option.name), getattr(config, option.name)
            if before != now:
                print_note(f"resuming {folder} with {option.name} {now}, which was {before}")
        run_train(config, launcher, ranks, ray)

    resume_train.__doc__ = run_train.__doc__
    return resume_train


def run_train(
    # Without a default, because that of TrainConfig has chosen its branches already.
    config: Annotated[TrainConfig, tyro.conf.arg(name="")],
    launcher: Literal["none", "ray"] = "none",
    ranks: int = 1,
    ray: RayConfig = RayConfig(),  # noqa: B008
    resume: str | None = None,
) -> None:
    """Train a LongNet on text or code, on one process, under torchrun, or on a Ray cluster.

    Under torchrun, or with Ray, each sequence is split over all ranks:
      torchrun --nproc-per-node 2 -m longnet_dist train --seq-len 32768 --data src/
      longnet-dist train --launcher ray --ranks 8 --run-folder /shared/run --data /shared/src/

    Args:
        config: The options of the run.
        launcher: Launcher that this command starts: ray, or none on one process and under torchrun.
        ranks: Number of ranks that Ray starts; only with --launcher ray.
        ray: How Ray runs the ranks.
        resume: Folder of a run to resume, or its URL in an object store. All options are those of the run, unless they
            are given.
    """
    if launcher == "none":
        if str(ranks) not in ("1", os.environ.get("WORLD_SIZE")):
            raise ValueError(
                f"--ranks is {ranks}, but no launcher starts them: give --launcher ray, or leave --ranks out and start "
                "them with torchrun --nproc-per-node RANKS -m longnet_dist train"
            )
        if ray != RayConfig():
            raise ValueError("--ray.* options need --launcher ray")
        from longnet_dist.training.trainer import train

        with tolerate_broken_output():
            train(config)
        return
    with extra("ray", "--launcher ray"):
        from longnet_dist.integrations.ray import train_on_ray
    train_on_ray(config, ranks, ray)
