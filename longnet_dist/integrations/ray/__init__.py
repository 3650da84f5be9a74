"""Ray: training under Ray Train, a resident gang of actors that hold one sequence together, and a look at a cluster."""

from typing import TYPE_CHECKING, Any

from longnet_dist.integrations.ray.crew import GangError
from longnet_dist.integrations.ray.gang import SequenceParallelGang

if TYPE_CHECKING:
    from longnet_dist.integrations.ray.train import train_on_ray

__all__ = ["GangError", "SequenceParallelGang", "train_on_ray"]


def __getattr__(name: str) -> Any:
    """`train_on_ray`, where it is asked for: an actor of a gang starts without the seconds of Ray Train's import."""
    if name != "train_on_ray":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from longnet_dist.integrations.ray import train

    return train.train_on_ray
