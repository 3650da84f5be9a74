"""Rotary position encodings by global position: RoPE, with YaRN for longer contexts, and xPos."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Yarn:
    """How YaRN stretches RoPE, so that a model can use a longer context than it was trained with.

    See YaRN (Peng et al. 2023, arXiv 2309.00071, section 3). The names are those of `rope_scaling` in transformers,
    whose {"rope_type": "yarn"} computes the same.

    Args:
        factor: the longer context over the one that was trained; 1 changes nothing.
        original_max_position_embeddings: the context that was trained, in tokens.
        beta_fast: dimensions that rotate at least this often in that context keep their frequencies.
        beta_slow: dimensions that rotate at most this often have them divided by `factor`; those between are blended.

    Raises:
        ValueError: if a value is out of range.

    Example:
        >>> round(Yarn(4.0, 8192).attention_factor, 4)
        1.1386
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"the factor of YaRN is {self.factor}; it must be at least 1")
        if self.original_max_position_embeddings < 1:
            raise ValueError(
                f"original_max_position_embeddings is {self.original_max_position_embeddings}; YaRN needs the number "
                "of tokens that the model was trained with"
            )
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(f"beta_slow {self.beta_slow} must be above 0 and below beta_fast {self.beta_fast}")

    @property
    def attention_factor(self) -> float:
        """The factor of rotated queries and of rotated keys: 1 + log(factor) / 10."""
        return 1 + 0.1 * math.log(self.factor)

    def frequencies(self, frequencies: Tensor, base: float) -> Tensor:
        """Return RoPE's frequencies, (D / 2,) in radians per token, as YaRN changes them."""
        half = len(frequencies)

        def dimension(rotations: float) -> float:
            """The dimension that rotates this often in the original context."""
            length = self.original_max_position_embeddings
            return half * math.log(length / (2 * math.pi * rotations)) / math.log(base)

        first = max(math.floor(dimension(self.beta_fast)), 0)
        last = min(math.ceil(dimension(self.beta_slow)), 2 * half - 1)
        index = torch.arange(half, dtype=frequencies.dtype, device=frequencies.device)
        stretched = ((index - first) / (last - first if last != first else 0.001)).clamp(0, 1)
        return frequencies * (1 - stretched) + frequencies / self.factor * stretched


@dataclass(frozen=True)
class Rotation:
    """The rotary encoding of L rows: rotations by angles and, for xPos, scales.

    Args:
        cos, sin: cosines and sines of the angles, (L, D / 2); with YaRN times its attention factor.
        scale: the factor of queries, (L, D / 2), and the divisor of keys; None for RoPE.
    """

    cos: Tensor
    sin: Tensor
    scale: Tensor | None = None

    @classmethod
    def at(
        cls,
        positions: Tensor,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        *,
        base: float = 10000.0,
        yarn: Yarn | None = None,
        xpos_length: int | None = None,
        xpos_scale_base: float = 512.0,
        xpos_lookahead: int = 0,
    ) -> Rotation:
        """Compute the rotation of rows at `positions`.

        The angles are those of RoPE (Su et al. 2021, arXiv 2104.09864). The scales are those of xPos (Sun et al. 2022,
        arXiv 2212.10554, equation 14).

        Args:
            positions: global positions, (L,), int64. Angles are computed in float64, because in float32 the angle of
                position 1,000,000 is off by a twentieth of a radian.
            head_dim: D, even.
            dtype: dtype of the attention, within whose range xPos's scales must stay.
            base: the longest wavelength in tokens, divided by about 2 pi; `rope_theta` in transformers.
            yarn: how the frequencies are stretched for a longer context; None for RoPE's own.
            xpos_length: N, the global sequence length, for xPos; None for RoPE alone. The scale is 1 at N / 2, on any
                number of ranks.
            xpos_scale_base: number of tokens over which the scale of the fastest dimension falls by a factor of 3.5.
            xpos_lookahead: largest distance, in tokens, of a visible key ahead of its query; 0 for causal attention.
                xPos lowers the scores of keys behind a query, and *raises* those of keys ahead.

        Returns:
            The rotation, float32 (float64 if `dtype` is float64).

        Raises:
            ValueError: if a scale would leave the range of `dtype` at this length.

        Example:
            >>> rotation = Rotation.at(torch.arange(10), head_dim=8)
            >>> rotation.queries(torch.randn(1, 10, 4, 8)).shape
            torch.Size([1, 10, 4, 8])
        """
        half = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
        frequencies = base**-half if yarn is None else yarn.frequencies(base**-half, base)
        angles = positions.double()[:, None] * frequencies
        factor = 1.0 if yarn is None else yarn.attention_factor
        table_dtype = torch.promote_types(dtype, torch.float32)
        cos, sin = (angles.cos() * factor).to(table_dtype), (angles.sin() * factor).to(table_dtype)
        if xpos_length is None:
            return cls(cos, sin)
        _check_xpos_range(max(xpos_length, 2 * min(xpos_length, xpos_lookahead)), dtype, xpos_scale_base)
        zeta = (half + 0.4) / 1.4
        power = (positions.double() - xpos_length // 2)[:, None] / xpos_scale_base
        return cls(cos, sin, (zeta**power).to(table_dtype))

    def queries(self, q: Tensor) -> Tensor:
        """Rotate the queries, (B, L, H, D), and scale them if this is xPos."""
        return self._rotate(q, self.scale)

    def keys(self, k: Tensor) -> Tensor:
        """Rotate the keys, (B, L, G, D), and scale them by the inverse if this is xPos."""
        return self._rotate(k, None if self.scale is None else 1 / self.scale)

    def _rotate(self, x: Tensor, scale: Tensor | None) -> Tensor:
        cos, sin = (t if scale is None else t * scale for t in (self.cos, self.sin))
        cos, sin = cos[:, None, :], sin[:, None, :]
        a, b = x.to(cos.dtype).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def positions_in_documents(positions: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the position of each row in its document.

    Args:
        positions: global positions, (L,), int64.
        cu_seqlens: the offsets of documents, (documents + 1,) or (B, documents + 1); see `dilated_attention`.

    Returns:
        int64, (L,) or (B, L).

    Example:
        >>> positions_in_documents(torch.arange(6), torch.tensor([0, 2, 2, 6]))
        tensor([0, 1, 0, 1, 2, 3])
    """
    offsets = cu_seqlens.to(positions.device, torch.int64)
    if offsets.dim() == 2:
        return torch.stack([positions_in_documents(positions, of_sequence) for of_sequence in offsets])
    if len(offsets) < 2:
        return positions
    return positions - offsets[torch.searchsorted(offsets[:-1], positions, right=True) - 1]


def _check_xpos_range(length: int, dtype: torch.dtype, scale_base: float) -> None:
    """Raise ValueError if xPos at this length would scale values beyond the range of `dtype`.

    The scale of a row p tokens from the middle is up to 3.5^(p / scale_base). That is also the largest factor of the
    score of a key p tokens ahead. A row is at most length / 2 from the middle. So a lookahead of p tokens is as bad as
    a length of 2 p.
    """
    limits = torch.finfo(dtype)
    # The values that are scaled may be as large as 2^10.
    headroom = min(math.log(limits.max), -math.log(limits.tiny)) - math.log(1024)
    steepest = math.log(1.4 / 0.4)
    longest = int(2 * scale_base * headroom / steepest)
    if length > longest:
        needed = math.ceil(length * steepest / headroom / 2)
        raise ValueError(
            f"xPos at length {length} would scale queries, keys or scores beyond the range of {dtype}: with a scale "
            f"base of {scale_base:g} it reaches {longest} tokens, or half as many if queries see keys ahead of them "
            f"(not causal). Use rotary positions, a scale base of at least {needed}, a dtype with a wider range, or a "
            "shorter sequence"
        )
