"""`longnet-dist train`: a training run on one process, under torchrun, or on a Ray cluster."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import tyro

from longnet_dist.best_effort import tolerate_broken_output
from longnet_dist.cli.options import join_help_lines
from longnet_dist.extras import extra
from longnet_dist.models.config import LongNetConfig
from longnet_dist.training.config import RayConfig, TrainConfig
from longnet_dist.training.parallel import ParallelConfig

join_help_lines(TrainConfig, ParallelConfig, LongNetConfig, RayConfig)


def run_train(
    # Without a default, because that of TrainConfig has chosen its branches already.
    config: Annotated[TrainConfig, tyro.conf.arg(name="")],
    launcher: Literal["none", "ray"] = "none",
    ranks: int = 1,
    ray: RayConfig = RayConfig(),  # noqa: B008
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
