"""Position biases: terms of attention scores that depend on the head and on token positions.

Kernels and operators ask a `PositionBias` for blocks of bias, and know none of its subclasses. To add
a bias, write a subclass in a file of its own.
"""

from __future__ import annotations

import ast
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from longnet_dist.attention.kernels.contract import DistanceTable

_BIASES: dict[str, type[PositionBias]] = {}


class PositionBias(ABC):
    """A term added to attention scores, computed from the parameters of each head and token distances.

    A subclass has a unique `name` without commas, and a constructor that takes `parameters` and then the
    numbers in `settings`. It implements `problem`, `values` and `accumulate_`.

    Args:
        parameters: (P, H), of a floating dtype: P numbers for each query head. It may require a gradient.
    """

    name: ClassVar[str]
    by_distance: ClassVar[bool] = True
    """Whether the bias is a function of the distance; else a subclass has its own `between`."""
    parameters: Tensor

    def __init_subclass__(cls) -> None:
        _BIASES[cls.name] = cls

    @property
    @abstractmethod
    def settings(self) -> tuple[int | float, ...]:
        """The constructor's arguments after `parameters`."""

    @abstractmethod
    def problem(self, num_heads: int, causal: bool) -> str | None:
        """Describe what is wrong with this bias for `num_heads` query heads; None if nothing is."""

    @abstractmethod
    def values(self, parameters: Tensor, distance: Tensor, causal: bool) -> Tensor:
        """Compute the bias, (b, H, I, J), differentiably.

        Args:
            parameters: (b, H, P).
            distance: query position minus key position, int64, (I, J).
            causal: whether a query sees only keys at or before it.
        """

    def between(self, parameters: Tensor, queries: Tensor, keys: Tensor, shift: Tensor, causal: bool) -> Tensor:
        """Compute the bias of pairs of positions, (b, H, I, J); by default, `values` of their distance.

        Args:
            parameters: (b, H, P).
            queries, keys: global positions of the first rectangle's rows, int64, (I,) and (J,).
            shift: (b,), what to add to them for each rectangle. With the strategy all_to_all it is unknown, and 0.
            causal: whether a query sees only keys at or before it.
        """
        return self.values(parameters, queries[:, None] - keys[None, :], causal)

    @abstractmethod
    def accumulate_(self, grad_parameters: Tensor, grad_scores: Tensor, distance: Tensor, causal: bool) -> None:
        """Add the gradient of `values` to `grad_parameters` (b, H, P), in place; `grad_scores` is (b, H, I, J)."""

    @property
    def spec(self) -> str:
        """The name and the settings as text, because operators take no Python objects."""
        return ",".join([self.name, *map(str, self.settings)])  # Plain enough for torch.compile to trace.

    @staticmethod
    def from_spec(spec: str, parameters: Tensor) -> PositionBias:
        """Make the bias that `spec` describes, with these parameters."""
        name, *settings = spec.split(",")
        make: Callable[..., PositionBias] = _BIASES[name]
        return make(parameters, *map(ast.literal_eval, settings))


@dataclass(frozen=True, eq=False)
class T5Bias(PositionBias):
    """T5's relative position bias: one number for each head and bucket of token distances.

    See Raffel et al. 2020 (arXiv 1910.10683), section 2.1.

    Args:
        parameters: (buckets, H), usually learned. The number of buckets is even if attention is causal,
            otherwise a multiple of 4.
        max_distance: a distance in tokens; all keys at least that far share the last bucket.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 4, 8).unbind()
        >>> bias = T5Bias(torch.zeros(32, 4), max_distance=50)
        >>> dilated_attention(q, k, v, Pattern((16,), (1,)), bias=bias).shape
        torch.Size([1, 100, 4, 8])
    """

    parameters: Tensor
    max_distance: int = 128
    name: ClassVar[str] = "t5"

    @property
    def settings(self) -> tuple[int, ...]:
        """The tuple (max_distance,)."""
        return (self.max_distance,)

    def problem(self, num_heads: int, causal: bool) -> str | None:
        """Describe what is wrong with the parameters; None if nothing is."""
        if self.parameters.dim() != 2 or self.parameters.shape[1] != num_heads:
            return f"the T5 bias is {tuple(self.parameters.shape)}; it must be (buckets, H) with H = {num_heads}"
        return t5_problem(len(self.parameters), self.max_distance, causal)

    def values(self, parameters: Tensor, distance: Tensor, causal: bool) -> Tensor:
        """Look up the bias of each pair: (b, H, I, J)."""
        return parameters[..., t5_bucket(distance, parameters.shape[-1], self.max_distance, causal)]

    def accumulate_(self, grad_parameters: Tensor, grad_scores: Tensor, distance: Tensor, causal: bool) -> None:
        """Add the gradient of each pair to its bucket."""
        bucket = t5_bucket(distance, grad_parameters.shape[-1], self.max_distance, causal)
        grad_parameters.index_add_(-1, bucket.flatten(), grad_scores.flatten(-2).to(grad_parameters.dtype))


@dataclass(frozen=True, eq=False)
class ALiBiBias(PositionBias):
    """ALiBi: scores fall linearly with the distance, by a slope for each head (Press et al. 2022, arXiv 2108.12409).

    Distances are those of the sequence, whatever the dilation rate. Without `causal` they count in both directions.

    Args:
        parameters: (1, H), the slope of each head: `alibi_slopes(H)` for the published ones. They may be learned.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 4, 8).unbind()
        >>> dilated_attention(q, k, v, Pattern((16,), (1,)), bias=ALiBiBias(alibi_slopes(4))).shape
        torch.Size([1, 100, 4, 8])
    """

    parameters: Tensor
    name: ClassVar[str] = "alibi"

    @property
    def settings(self) -> tuple[int, ...]:
        """There are none."""
        return ()

    def problem(self, num_heads: int, causal: bool) -> str | None:
        """Describe what is wrong with the slopes; None if nothing is."""
        if self.parameters.shape != (1, num_heads):
            return f"the ALiBi bias is {tuple(self.parameters.shape)}; it must be (1, H) with H = {num_heads}"
        return None

    def values(self, parameters: Tensor, distance: Tensor, causal: bool) -> Tensor:
        """Multiply distances by the slopes: (b, H, I, J)."""
        return -parameters[..., None] * distance.abs()

    def accumulate_(self, grad_parameters: Tensor, grad_scores: Tensor, distance: Tensor, causal: bool) -> None:
        """Add the gradient of each pair to its head's slope."""
        weighted = grad_scores * distance.abs().to(grad_scores.dtype)
        grad_parameters.sub_(weighted.sum((-2, -1)).to(grad_parameters.dtype)[..., None])


def alibi_slopes(
    num_heads: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return ALiBi's published slopes, (1, H): 2^(-8 / H), 2^(-16 / H), ..., 2^-8.

    If H is no power of 2, they are those of the next lower power P, and then every other one of 2 P heads.

    Args:
        num_heads: H, at least 1.
        device, dtype: device and dtype of the slopes.

    Example:
        >>> alibi_slopes(3)
        tensor([[0.0625, 0.0039, 0.2500]])
    """
    power = 1 << (num_heads.bit_length() - 1)
    first = torch.arange(1, power + 1, device=device, dtype=torch.float64) / power
    more = (2 * torch.arange(num_heads - power, device=device, dtype=torch.float64) + 1) / (2 * power)
    return torch.exp2(-8 * torch.cat([first, more]))[None].to(dtype)


@dataclass(frozen=True)
class BiasOfRectangle:
    """A position bias on one rectangle, as kernels take it: implements `kernels.contract.RectangleBias`.

    Args:
        bias: the bias of the call.
        parameters: its parameters for the heads of each rectangle, (b, H, P).
        query_positions, key_positions: global positions in the first rectangle, int64, (I,) and (J,).
        shift: (b,), what to add to them for each rectangle; None if the bias depends on distances alone.
        causal: whether a query sees only keys at or before it.
        distinct: rectangle b has the parameters of b % `distinct`.
        rate: consecutive positions of a run are `rate` tokens apart.
        query_run: (position, number of rows) of the queries.
        key_runs: the same of each run of keys.
    """

    bias: PositionBias
    parameters: Tensor
    query_positions: Tensor
    key_positions: Tensor
    shift: Tensor | None
    causal: bool
    distinct: int
    rate: int
    query_run: tuple[int, int]
    key_runs: tuple[tuple[int, int], ...]

    def of(self, rows: slice) -> Tensor:
        """The term added to the scores of these query rows: (b, H, rows, J)."""
        queries = self.query_positions[rows]
        if self.shift is None:
            return self.bias.values(self.parameters, queries[:, None] - self.key_positions[None, :], self.causal)
        return self.bias.between(self.parameters, queries, self.key_positions, self.shift, self.causal)

    def accumulate_(self, grad_parameters: Tensor, grad_scores: Tensor, rows: slice) -> None:
        """Add the gradient that `grad_scores` (b, H, rows, J) implies to `grad_parameters` (b, H, P), in place."""
        distance = self.query_positions[rows, None] - self.key_positions[None, :]
        self.bias.accumulate_(grad_parameters, grad_scores, distance, self.causal)

    def by_distance(self) -> DistanceTable:
        """The bias as a table with an entry for every `rate` tokens, from the last key to the first."""
        values = self.bias.values(self.parameters[: self.distinct], self._distances, self.causal)
        return DistanceTable(values.squeeze(2).float().contiguous(), self._table_runs)

    def gradient_of_distances(self, grad_values: Tensor) -> Tensor:
        """Return the gradient of the parameters, (T, H, P), from that of the table's values, (T, H, N)."""
        grad = torch.zeros_like(self.parameters[: self.distinct], dtype=grad_values.dtype)
        self.bias.accumulate_(grad, grad_values.unsqueeze(2), self._distances, self.causal)
        return grad

    @property
    def _distances(self) -> Tensor:
        """The distance of each entry of the table, (1, N)."""
        least, most = self._extent
        return self.rate * torch.arange(least, most + 1, device=self.parameters.device)[None]

    @property
    def _extent(self) -> tuple[int, int]:
        """The least and the largest distance, in units of `rate`."""
        (query, queries), last = self.query_run, self.key_runs[-1]
        to_first, to_last = ((query - key) // self.rate for key, _ in (self.key_runs[0], last))
        return to_last - (last[1] - 1), to_first + queries - 1

    @property
    def _table_runs(self) -> tuple[tuple[int, int], ...]:
        least, _ = self._extent
        firsts = accumulate((count for _, count in self.key_runs[:-1]), initial=0)
        distances = ((self.query_run[0] - key) // self.rate for key, _ in self.key_runs)
        return tuple((first, distance - least + first) for first, distance in zip(firsts, distances, strict=True))


def t5_bucket(distance: Tensor, num_buckets: int, max_distance: int, causal: bool) -> Tensor:
    """Return the bucket of each token distance (query position minus key position), int64.

    Small distances have a bucket each. Larger ones share buckets that grow geometrically up to
    `max_distance` tokens. If not causal, the first half of the buckets is for keys at or before the
    query, the second half for keys after it.
    """
    offset = torch.zeros_like(distance)
    if not causal:
        num_buckets //= 2
        offset = num_buckets * (distance < 0)
    distance = distance.clamp(min=0) if causal else distance.abs()
    exact = num_buckets // 2
    # float64, because in float32 a distance near a bucket's edge may fall on either side of it.
    growth = torch.log(distance.clamp(min=1).double() / exact) / math.log(max_distance / exact)
    large = exact + (growth * (num_buckets - exact)).long()
    return offset + torch.where(distance < exact, distance, large.clamp(max=num_buckets - 1))


def t5_problem(num_buckets: int, max_distance: int, causal: bool) -> str | None:
    """Describe why these numbers do not define buckets; None if they do."""
    least = 2 if causal else 4
    if num_buckets < least or num_buckets % least:
        return f"the T5 bias has {num_buckets} buckets; it needs a multiple of {least}, for example 32"
    exact = num_buckets // least
    if max_distance <= exact:
        return f"max_distance is {max_distance}; with {num_buckets} buckets it must be above {exact}"
    return None
