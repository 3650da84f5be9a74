"""Keys that queries do not see, as a term of the scores: position biases that depend on places, not on distances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from longnet_dist.attention.api import dilated_attention
from longnet_dist.attention.bias import PositionBias
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.plan.pattern import Pattern

DROPPED = -1e30
"""The term of a dropped score. With -inf, a rectangle that drops all keys of a query would give NaN; merged with others
by its lse, it has no weight."""


@dataclass(frozen=True, eq=False)
class MaskBias(PositionBias):
    """A mask of scores as a position bias. A subclass implements `between`; the parameters have no gradient."""

    parameters: Tensor
    name: ClassVar[str] = "mask"

    @property
    def settings(self) -> tuple[int | float, ...]:
        """There are none."""
        return ()

    def problem(self, num_heads: int, causal: bool) -> str | None:
        """Describe what is wrong with the mask; None if nothing is."""
        heads = self.parameters.shape[-1]
        return None if heads == num_heads else f"the mask is for {heads} heads, and there are {num_heads} query heads"

    def values(self, parameters: Tensor, distance: Tensor, causal: bool) -> NoReturn:
        """Refuse: a mask is not a function of distances."""
        raise NotImplementedError

    def accumulate_(self, grad_parameters: Tensor, grad_scores: Tensor, distance: Tensor, causal: bool) -> None:
        """Do nothing."""


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: MaskBias, mesh: SequenceMesh | None, **options: Any
) -> Tensor:
    """Compute dilated attention without the keys that a mask drops; 0 for queries that then see no key.

    Args:
        q, k, v, pattern, mesh: see `dilated_attention`.
        bias: the mask.
        options: `causal` and `scale` of `dilated_attention`.

    Raises:
        ValueError: as `dilated_attention` does, and for a mesh that may trade heads for rows.
    """
    names = () if mesh is None else (mesh.strategy,) if isinstance(mesh.strategy, str) else mesh.strategy
    if not {"all_gather", "exchange"}.issuperset(names):
        refuse(
            f"the mesh's strategy is {names}; with all_to_all, and so with auto, masks cannot know where a head's rows "
            "lie: make the mesh with strategy='exchange' or 'all_gather'",
            mesh,
        )
    out, lse = dilated_attention(q, k, v, pattern, mesh=mesh, bias=bias, return_lse=True, **options)
    return torch.where((lse < DROPPED / 2)[..., None], 0, out)
