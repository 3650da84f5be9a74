"""The LongNet layer and its transformer block, and position encodings by global position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from longnet_dist.attention.bias import check_relative_bias
from longnet_dist.attention.ops import dilated_attention
from longnet_dist.distributed.heads import heads_of
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.plan.pattern import Pattern


@dataclass(frozen=True)
class Rotation:
    """Rotary angles of some rows, (L, D / 2) each; xPos also scales queries by `scale` and keys by its inverse."""

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
        xpos_length: int | None = None,
        xpos_scale_base: float = 512.0,
        xpos_future: int = 0,
    ) -> Rotation:
        """Rotary (Su et al. 2021, arXiv 2104.09864), or xPos (Sun et al. 2022, arXiv 2212.10554, equation 14).

        Args:
            positions: global, int64, (L,). Angles are computed in float64: at a position of a
                million, float32 would be off by a twentieth of a radian.
            head_dim: D, even.
            dtype: of the attention; decides the range that xPos must keep to.
            base: the slowest wavelength is about 2 pi base tokens.
            xpos_length: N, the global length, for xPos; None for rotary alone. Scales are centred
                on N / 2, so that they depend on the position and N alone, not on the ranks.
            xpos_scale_base: tokens over which the scale of the fastest dimension falls by 3.5.
            xpos_future: how many tokens ahead of a query a key may be that it sees: 0 where causal. xPos
                *raises* the scores of those, as it lowers those of keys behind.

        Raises:
            ValueError: where a scale would leave the range of `dtype` at this length.
        """
        half = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
        angles = positions.double()[:, None] * base**-half
        kind = torch.promote_types(dtype, torch.float32)
        cos, sin = angles.cos().to(kind), angles.sin().to(kind)
        if xpos_length is None:
            return cls(cos, sin)
        _check_xpos_range(max(xpos_length, 2 * min(xpos_length, xpos_future)), dtype, xpos_scale_base)
        zeta = (half + 0.4) / 1.4
        power = (positions.double() - xpos_length // 2)[:, None] / xpos_scale_base
        return cls(cos, sin, (zeta**power).to(kind))

    def queries(self, q: Tensor) -> Tensor:
        """Rotate (and scale) q, (B, L, H, D)."""
        return self._turn(q, self.scale)

    def keys(self, k: Tensor) -> Tensor:
        """Rotate (and scale by the inverse) k, (B, L, G, D)."""
        return self._turn(k, None if self.scale is None else 1 / self.scale)

    def _turn(self, x: Tensor, scale: Tensor | None) -> Tensor:
        cos, sin = (t if scale is None else t * scale for t in (self.cos, self.sin))
        cos, sin = cos[:, None, :], sin[:, None, :]
        a, b = x.to(cos.dtype).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def _check_xpos_range(length: int, dtype: torch.dtype, scale_base: float) -> None:
    """xPos scales a row p tokens from the middle by up to 3.5^(p / scale_base): refuse what float cannot hold.

    A score of a key p tokens ahead is scaled as much as a row at distance p, so its reach counts twice.
    """
    kind = torch.finfo(dtype)
    # 2^10 is left for the values that are scaled.
    room = min(math.log(kind.max), -math.log(kind.tiny)) - math.log(1024)
    steepest = math.log(1.4 / 0.4)
    longest = int(2 * scale_base * room / steepest)
    if length > longest:
        needed = math.ceil(length * steepest / room / 2)
        raise ValueError(
            f"xPos at length {length} would scale queries, keys or scores beyond the range of {dtype}: with a scale "
            f"base of {scale_base:g} it reaches {longest} tokens, or half as many where keys ahead are seen (not "
            f"causal). Use rotary positions, a scale base of at least {needed}, a dtype of wider range, or a shorter "
            "sequence"
        )


class DilatedAttention(nn.Module):
    """Multi-head dilated attention (LongNet, arXiv 2307.02486), on one device or sequence-parallel.

    Args:
        d_model: E, the width of the input and the output.
        num_heads: H; E must be a multiple.
        dilation_rate: r, an int, or one a branch.
        segment_size: w, an int, or one a branch.
        dropout: probability, on the output.
        causal: a token attends only tokens at or before it.
        use_xpos: xPos rotary encoding by global position.
        use_rel_pos_bias: T5's learned relative bias by true token distance.
        num_kv_heads: G key/value heads, each shared by H / G query heads; H by default.
        qk_norm: RMS-normalise each head's queries and keys before positions.
        bias: of the projections.
        head_phases: see `Pattern`.
        use_rotary: rotary encoding by global position, without xPos's scales.
        inner_norm: Magneto's sub-LayerNorm, before the output projection (arXiv 2210.06423).
        xpos_scale_base: see `Rotation.at`; larger reaches further.
        rel_pos_buckets, rel_pos_max_distance: of the relative bias; distance in tokens.
        kernel: see `dilated_attention`.
        device, dtype: of the parameters.

    Raises:
        ValueError: for sizes that do not fit, with what would.

    Example:
        >>> layer = DilatedAttention(d_model=512, num_heads=8, dilation_rate=2, segment_size=64, dropout=0.2)
        >>> layer(torch.randn(2, 100, 512)).shape
        torch.Size([2, 100, 512])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dilation_rate: int | Sequence[int],
        segment_size: int | Sequence[int],
        dropout: float = 0.0,
        causal: bool = False,
        use_xpos: bool = False,
        use_rel_pos_bias: bool = False,
        *,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        bias: bool = True,
        head_phases: str = "interleaved",
        use_rotary: bool = False,
        inner_norm: bool = False,
        xpos_scale_base: float = 512.0,
        rel_pos_buckets: int = 32,
        rel_pos_max_distance: int = 128,
        kernel: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_heads(d_model, num_heads, num_kv_heads, rotary=use_xpos or use_rotary)
        if use_rel_pos_bias and (reasons := check_relative_bias(rel_pos_buckets, rel_pos_max_distance, causal)):
            raise ValueError(reasons[0])
        self.pattern = Pattern(_per_branch(segment_size), _per_branch(dilation_rate), head_phases)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, d_model // num_heads
        self.d_model, self.causal, self.kernel = d_model, causal, kernel
        self.use_xpos, self.use_rotary, self.xpos_scale_base = use_xpos, use_rotary, xpos_scale_base
        self.rel_pos_max_distance = rel_pos_max_distance
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(d_model, d_model, bias=bias, **kind)
        self.k_proj = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=bias, **kind)
        self.v_proj = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=bias, **kind)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias, **kind)
        self.q_norm = HeadNorm(self.head_dim, **kind) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(self.head_dim, **kind) if qk_norm else nn.Identity()
        self.inner_norm = nn.LayerNorm(d_model, **kind) if inner_norm else nn.Identity()
        self.rel_pos_bias = nn.Parameter(torch.zeros(rel_pos_buckets, num_heads, **kind)) if use_rel_pos_bias else None
        self.dropout = nn.Dropout(dropout)
        self.head_mesh: DeviceMesh | None = None
        """Over which heads are spread, where the projections are (tensor parallelism): see `integrations.pytorch`."""

    def forward(self, x: Tensor, mesh: SequenceMesh | None = None, rotation: Rotation | None = None) -> Tensor:
        """(B, N, E) -> (B, N, E), any N; with a mesh this rank's rows, (B, L, E) -> (B, L, E).

        `rotation` spares layers of one model computing it again; it must be `self.rotation(...)`.

        Raises:
            ValueError: for a wrong shape, a mesh of another pattern, or a length beyond xPos's range.
        """
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            refuse(f"x is {tuple(x.shape)}; it must be (B, N, d_model) with d_model = {self.d_model}", mesh)
        if mesh is not None and x.shape[1] != mesh.shard.num_rows:
            refuse(mesh.wrong_rows("x", x.shape[1]), mesh)
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        parts = 1 if self.head_mesh is None else self.head_mesh.size()
        if k.shape[2] * parts != self.num_kv_heads:
            refuse(
                f"k_proj gives {k.shape[2]} heads here, of {self.num_kv_heads}: where tensor parallelism spreads them, "
                "give longnet_dist.integrations.pytorch.SequenceParallelAttention the head_mesh",
                mesh,
            )
        q, k = self.q_norm(q), self.k_norm(k)
        rotation = rotation or self.rotation(x.shape[1], mesh, v.device, v.dtype)
        if rotation is not None:
            q, k = rotation.queries(q), rotation.keys(k)
        if self.head_mesh is not None:
            q, k, v = (heads_of(x, self.head_mesh) for x in (q, k, v))
        out = dilated_attention(
            q,
            k,
            v,
            self.pattern,
            causal=self.causal,
            mesh=mesh,
            kernel=self.kernel,
            rel_bias=self.rel_pos_bias,
            rel_bias_max_distance=self.rel_pos_max_distance,
        )
        if isinstance(out, DTensor):
            out = out.to_local()
        return self.dropout(self.out_proj(self.inner_norm(out.flatten(2))))

    def rotation(
        self, num_rows: int, mesh: SequenceMesh | None, device: torch.device, dtype: torch.dtype
    ) -> Rotation | None:
        """The rotation of this rank's rows by their global positions; None where this layer has none."""
        if not (self.use_xpos or self.use_rotary):
            return None
        positions = torch.arange(num_rows, device=device) if mesh is None else mesh.positions(device)
        length = num_rows if mesh is None else mesh.seq_len
        return Rotation.at(
            positions,
            self.head_dim,
            dtype,
            xpos_length=length if self.use_xpos else None,
            xpos_scale_base=self.xpos_scale_base,
            xpos_future=0 if self.causal else max(self.pattern.segment_lengths),
        )


class HeadNorm(nn.RMSNorm):
    """RMS normalisation of each head, in the precision of its weight, which autocast does not see to."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, H, D) -> (B, L, H, D), in the dtype given."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class FeedForward(nn.Module):
    """Linear, GELU, Magneto's sub-LayerNorm, linear."""

    def __init__(self, d_model: int, ffn_dim: int, dropout: float, **kind: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, ffn_dim, **kind)
        self.inner_norm = nn.LayerNorm(ffn_dim, **kind)
        self.fc2 = nn.Linear(ffn_dim, d_model, **kind)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, E) -> (B, L, E)."""
        return self.dropout(self.fc2(self.inner_norm(nn.functional.gelu(self.fc1(x)))))


class Block(nn.Module):
    """A pre-norm transformer block with sub-LayerNorm (Magneto, arXiv 2210.06423, figure 2)."""

    def __init__(self, attention: DilatedAttention, ffn_dim: int, dropout: float = 0.0, **kind: Any) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(attention.d_model, **kind)
        self.attention = attention
        self.ffn_norm = nn.LayerNorm(attention.d_model, **kind)
        self.ffn = FeedForward(attention.d_model, ffn_dim, dropout, **kind)

    def forward(self, x: Tensor, mesh: SequenceMesh | None = None, rotation: Rotation | None = None) -> Tensor:
        """(B, L, E) -> (B, L, E)."""
        x = x + self.attention(self.attention_norm(x), mesh, rotation)
        return x + self.ffn(self.ffn_norm(x))

    @torch.no_grad()
    def reset_parameters(self, num_layers: int) -> None:
        """Magneto's, for a decoder of `num_layers`, M (section 3): Xavier, gain sqrt(log(2 M)) but for q and k."""
        gain = math.sqrt(math.log(2 * max(num_layers, 2)))
        attention, ffn = self.attention, self.ffn
        for linear in (attention.v_proj, attention.out_proj, ffn.fc1, ffn.fc2):
            nn.init.xavier_normal_(linear.weight, gain)
        for linear in (attention.q_proj, attention.k_proj):
            nn.init.xavier_normal_(linear.weight)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def _per_branch(value: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _check_heads(d_model: int, num_heads: int, num_kv_heads: int, rotary: bool) -> None:
    if num_heads < 1 or d_model % num_heads:
        fits = [h for h in range(1, d_model + 1) if d_model % h == 0]
        near = min(fits, key=lambda h: abs(h - num_heads), default=1)
        raise ValueError(
            f"d_model {d_model} cannot be cut into {num_heads} heads; num_heads must divide it: for example {near}"
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        fits = [g for g in range(1, num_heads + 1) if num_heads % g == 0]
        raise ValueError(f"num_kv_heads is {num_kv_heads}; it must divide num_heads = {num_heads}: one of {fits}")
    if rotary and d_model // num_heads % 2:
        raise ValueError(
            f"the head dim {d_model} / {num_heads} = {d_model // num_heads} is odd, and rotary positions turn pairs of "
            "dimensions; use a d_model that is a multiple of 2 * num_heads"
        )
