"""Ray: training under Ray Train, a resident gang of actors that hold one sequence together, and a look at a cluster."""

from longnet_dist.integrations.ray.crew import GangError
from longnet_dist.integrations.ray.gang import SequenceParallelGang
from longnet_dist.integrations.ray.train import train_on_ray

__all__ = ["GangError", "SequenceParallelGang", "train_on_ray"]
