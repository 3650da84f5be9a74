"""Training under Ray Train, a resident gang of actors that share one sequence, and a diagnosis of a Ray cluster."""

from typing import TYPE_CHECKING, Any

from longnet_dist.integrations.ray.crew import GangError
from longnet_dist.integrations.ray.gang import SequenceParallelGang

if TYPE_CHECKING:
    from longnet_dist.integrations.ray.train import train_on_ray

__all__ = ["GangError", "SequenceParallelGang", "train_on_ray"]


def __getattr__(name: str) -> Any:
    """Import `train_on_ray` on first use, so that a gang's actors start without the seconds that Ray Train takes."""
    if name != "train_on_ray":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from longnet_dist.integrations.ray import train

    return train.train_on_ray
