"""The relative bias of one rectangle, as kernels see it: a block of rows at a time, and its gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longnet_dist.attention.bias import relative_bucket


@dataclass(frozen=True)
class RectangleBias:
    """`table` (b, H, buckets) for the heads of each batch entry; positions are global, (I,) and (J,)."""

    table: Tensor
    query_positions: Tensor
    key_positions: Tensor
    max_distance: int
    causal: bool

    def _buckets(self, rows: slice) -> Tensor:
        distance = self.query_positions[rows, None] - self.key_positions[None, :]
        return relative_bucket(distance, self.table.shape[-1], self.max_distance, self.causal)

    def of(self, rows: slice) -> Tensor:
        """What is added to the scores of these query rows: (b, H, rows, J)."""
        return self.table[..., self._buckets(rows)]

    def accumulate_(self, grad_table: Tensor, grad_scores: Tensor, rows: slice) -> None:
        """Add to `grad_table` (b, H, buckets) what `grad_scores` (b, H, rows, J) gives each bucket."""
        grad_table.index_add_(-1, self._buckets(rows).flatten(), grad_scores.flatten(-2).to(grad_table.dtype))
