"""Results and gradients that are merged as they come, in the precision of the inputs: float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from longnet_dist.attention.rows import accumulation_dtype, is_whole, own_memory, rectangle
from longnet_dist.plan.blocks import Heads, Rows

_NEVER = 1 << 30
"""Above the number of any branch."""


class SummedRows:
    """A sum of rectangles with the shape of `like`, (B, L, G, ...); rows to which nothing was added are 0.

    Rectangles are added in the order of their branches, so that the sum has the same bits however they were
    computed. Those of branches before `first_shared` are added at once, and others wait for `result`.
    """

    def __init__(self, like: Tensor, first_shared: int) -> None:
        self.like = like
        self.first_shared = first_shared
        self.dtype = accumulation_dtype(like.dtype)
        self.total: Tensor | None = None
        self.waiting: list[tuple[int, Heads, Rows, Tensor]] = []

    def add(self, branch: int, heads: Heads, rows: Rows, part: Tensor) -> None:
        """Add `part`, which has as many elements as the rectangle. Its memory may become that of the sum."""
        if branch >= self.first_shared:
            self.waiting.append((branch, heads, rows, part))
        elif self.total is None and is_whole(self.like, heads, rows):
            self.total = own_memory(part.reshape(self.like.shape).to(self.dtype))
        else:
            target = rectangle(self._total(), heads, rows)
            target += part.reshape(target.shape)

    def result(self) -> Tensor:
        """The sum, in the accumulation dtype."""
        waiting, self.waiting = sorted(self.waiting, key=lambda entry: entry[0]), []
        self.first_shared = _NEVER
        for entry in waiting:
            self.add(*entry)
        return self._total()

    def _total(self) -> Tensor:
        if self.total is None:
            self.total = torch.zeros(self.like.shape, dtype=self.dtype, device=self.like.device)
        return self.total


class MergedRows:
    """Attention results of all queries, merged over more and more keys by an online softmax on (out, lse).

    A row that has seen no key yet has out 0 and lse -inf. The order of merges is that of `SummedRows`.

    Args:
        like: a tensor with the shape of the queries, (B, L, G, H / G, D).
        first_shared: the number of the first branch whose results wait.
    """

    def __init__(self, like: Tensor, first_shared: int) -> None:
        self.like = like
        self.first_shared = first_shared
        self.out: Tensor | None = None
        self.lse: Tensor | None = None
        self.waiting: list[tuple[int, Heads, Rows, Tensor, Tensor]] = []

    def merge(self, branch: int, heads: Heads, rows: Rows, out: Tensor, lse: Tensor) -> None:
        """Merge the results of a rectangle over other keys: `out` and a finite `lse`, in the rectangle's order."""
        if branch >= self.first_shared:
            self.waiting.append((branch, heads, rows, out, lse))
            return
        if self.out is None and is_whole(self.like, heads, rows):
            self.out = own_memory(out.reshape(self.like.shape).to(accumulation_dtype(self.like.dtype)))
            self.lse = own_memory(lse.reshape(self.like.shape[:-1]))
            return
        merged_out, merged_lse = (rectangle(x, heads, rows) for x in self._merged())
        _merge_into(merged_out, merged_lse, out.reshape(merged_out.shape), lse.reshape(merged_lse.shape))

    def result(self) -> tuple[Tensor, Tensor]:
        """The merged (out, lse), in the accumulation dtype."""
        waiting, self.waiting = sorted(self.waiting, key=lambda entry: entry[0]), []
        self.first_shared = _NEVER
        for entry in waiting:
            self.merge(*entry)
        return self._merged()

    def _merged(self) -> tuple[Tensor, Tensor]:
        if self.out is None or self.lse is None:
            dtype, device = accumulation_dtype(self.like.dtype), self.like.device
            self.out = torch.zeros(self.like.shape, dtype=dtype, device=device)
            self.lse = torch.full(self.like.shape[:-1], -torch.inf, dtype=dtype, device=device)
        return self.out, self.lse


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the results of the same queries over two sets of keys; returns (out, lse) in the accumulation dtype."""
    out, lse = out.to(accumulation_dtype(out.dtype), copy=True), lse.clone()
    _merge_into(out, lse, other_out, other_lse)
    return out, lse


def _merge_into(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    # On CPUs in float64: in float32 the bits of an exp depend on whether it falls into a vector or a loop's remainder.
    ours, others = (x.double() if x.device.type == "cpu" else x for x in (lse, other_lse))
    # An lse of -inf gives the other side all the weight: a row's first merge is a copy.
    weight = torch.sigmoid(others - ours).to(out.dtype)
    out.lerp_(other_out.to(out.dtype), weight.unsqueeze(-1))
    lse.copy_(torch.logaddexp(ours, others))
