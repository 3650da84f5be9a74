"""Multi-head dilated attention as a module: the LongNet layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from longnet_dist.attention.api import dilated_attention
from longnet_dist.attention.bias import ALiBiBias, PositionBias, T5Bias, alibi_slopes, t5_problem
from longnet_dist.attention.cache import DilatedCache
from longnet_dist.distributed.heads import heads_of
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.nn.multiway import Multiway, apply_to_rows
from longnet_dist.nn.rotary import Rotation, Yarn, positions_in_documents
from longnet_dist.nn.zero_rows import zero_row_attention
from longnet_dist.plan.pattern import Pattern


class DilatedAttention(nn.Module):
    """Multi-head dilated attention (LongNet, arXiv 2307.02486), on one device or sequence-parallel.

    Args:
        d_model: E, the width of the input and the output.
        num_heads: H, the number of query heads; it must divide E.
        dilation_rate: r of each branch; an int if there is one branch.
        segment_size: w of each branch, in tokens; an int if there is one branch.
        dropout: dropout probability of the output.
        causal: whether a token attends only to itself and to earlier tokens.
        use_xpos: whether to encode global positions with xPos.
        use_rel_pos_bias: whether to add T5's learned relative position bias, by token distance.
        num_kv_heads: G, the number of key/value heads, each shared by H / G query heads; H by default. With 1, all
            queries share one head ("one write head", arXiv 1911.02150).
        qk_norm: how to normalise the queries and keys of each head, before the position encoding: "none", "rms" (or
            True), or "layer" for a LayerNorm without bias.
        bias: whether the projections have a bias.
        head_phases: which rows each head keeps; see `Pattern`.
        use_rotary: whether to encode global positions with RoPE: xPos without its scales.
        inner_norm: whether to apply Magneto's sub-LayerNorm before the output projection (arXiv 2210.06423).
        rope_theta: the base of the angles of RoPE and xPos; a larger one has longer wavelengths.
        yarn: how RoPE is stretched for a context longer than the one that was trained; None for RoPE as it is.
        xpos_scale_base: see `Rotation.at`; a larger base allows longer sequences.
        rel_pos_buckets: the number of buckets of the relative position bias; see `T5Bias`.
        rel_pos_max_distance: a distance in tokens; all keys at least that far share the last bucket.
        use_alibi: whether scores fall with the token distance, by ALiBi's fixed slopes; see `ALiBiBias`.
        multiway: whether projections and norms have second weights, for tokens of a second kind; see `Multiway`.
        kernel: see `dilated_attention`.
        padding: "none", or "torchscale" for weights that were trained with its zero rows; see `zero_row_attention`.
        device, dtype: device and dtype of the parameters.

    Raises:
        ValueError: if the sizes do not fit each other; the message names sizes that would.

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
        qk_norm: bool | str = False,
        bias: bool = True,
        head_phases: str = "interleaved",
        use_rotary: bool = False,
        inner_norm: bool = False,
        rope_theta: float = 10000.0,
        yarn: Yarn | None = None,
        xpos_scale_base: float = 512.0,
        rel_pos_buckets: int = 32,
        rel_pos_max_distance: int = 128,
        use_alibi: bool = False,
        multiway: bool = False,
        kernel: str = "auto",
        padding: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if padding == "torchscale" and (use_rel_pos_bias or use_alibi):
            raise ValueError("padding='torchscale' allows no position bias: its keys of zeros have no position")
        if use_rel_pos_bias and use_alibi:
            raise ValueError("use_rel_pos_bias and use_alibi do not go together: a layer has one position bias")
        if qk_norm not in _HEAD_NORMS:
            raise ValueError(f"qk_norm is {qk_norm!r}; it must be 'none', 'rms' or 'layer'")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_heads(d_model, num_heads, num_kv_heads, rotary=use_xpos or use_rotary)
        if use_rel_pos_bias and (problem := t5_problem(rel_pos_buckets, rel_pos_max_distance, causal)):
            raise ValueError(problem)
        self.pattern = Pattern(_per_branch(segment_size), _per_branch(dilation_rate), head_phases)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, d_model // num_heads
        self.d_model, self.causal, self.kernel, self.padding = d_model, causal, kernel, padding
        self.use_xpos, self.use_rotary, self.xpos_scale_base = use_xpos, use_rotary, xpos_scale_base
        self.rel_pos_max_distance, self.use_alibi, self.multiway = rel_pos_max_distance, use_alibi, multiway
        self.rope_theta, self.yarn = rope_theta, yarn
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wrap: Callable[[nn.Module], nn.Module] = Multiway if multiway else lambda module: module
        self.q_proj = wrap(nn.Linear(d_model, d_model, bias=bias, **factory))
        self.k_proj = wrap(nn.Linear(d_model, num_kv_heads * self.head_dim, bias=bias, **factory))
        self.v_proj = wrap(nn.Linear(d_model, num_kv_heads * self.head_dim, bias=bias, **factory))
        self.out_proj = wrap(nn.Linear(d_model, d_model, bias=bias, **factory))
        self.q_norm = _HEAD_NORMS[qk_norm](self.head_dim, **factory)
        self.k_norm = _HEAD_NORMS[qk_norm](self.head_dim, **factory)
        self.inner_norm = wrap(nn.LayerNorm(d_model, **factory)) if inner_norm else nn.Identity()
        self.rel_pos_bias = (
            nn.Parameter(torch.zeros(rel_pos_buckets, num_heads, **factory)) if use_rel_pos_bias else None
        )
        self.dropout = nn.Dropout(dropout)
        self.head_mesh: DeviceMesh | None = None
        """The ranks that share the heads, if the projections are tensor parallel; see `integrations.pytorch`."""

    @classmethod
    def from_pattern(cls, d_model: int, num_heads: int, pattern: Pattern, **options: Any) -> Self:
        """Build the layer from a `Pattern`.

        Args:
            d_model: E, the width of the input and the output.
            num_heads: H, the number of query heads.
            pattern: the branches, and which rows each head keeps.
            options: the constructor's other arguments.

        Raises:
            ValueError: as the constructor does.

        Example:
            >>> DilatedAttention.from_pattern(32, 4, Pattern((8, 32), (1, 4)), causal=True).pattern.dilation_rates
            (1, 4)
        """
        return cls(
            d_model,
            num_heads,
            pattern.dilation_rates,
            pattern.segment_lengths,
            head_phases=pattern.head_phases,
            **options,
        )

    def forward(
        self,
        x: Tensor,
        mesh: SequenceMesh | None = None,
        rotation: Rotation | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        token_types: Tensor | None = None,
        cache: DilatedCache | None = None,
    ) -> Tensor:
        """Project x to queries, keys and values, attend, and project the result.

        Args:
            x: (B, N, E), any N; with a mesh (B, L, E), this rank's rows.
            mesh: the ranks that hold the sequence; the call is then collective over the mesh's group.
            rotation: the result of `self.rotation(...)`, which the layers of a model can share; computed here by
                default.
            cu_seqlens, lengths: the documents in each sequence, or the number of its tokens; see `dilated_attention`.
                Positions begin anew with each document.
            token_types: (B, N or L), bool: true for tokens of the second kind, if the layer is multiway; by default all
                are of the first.
            cache: the past of the sequence, for inference; see `dilated_attention`.

        Returns:
            A tensor of x's shape.

        Raises:
            ValueError: if x has a wrong shape, the mesh has another pattern, or the length is beyond xPos's range.
        """
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            refuse(f"x is {tuple(x.shape)}; it must be (B, N, d_model) with d_model = {self.d_model}", mesh)
        if mesh is not None and x.shape[1] != mesh.shard.num_rows:
            refuse(mesh.wrong_rows("x", x.shape[1]), mesh)
        if token_types is not None:
            self._check_kinds(x, token_types, mesh)
        q, k, v = (
            apply_to_rows(projection, x, token_types).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        num_head_shards = 1 if self.head_mesh is None else self.head_mesh.size()
        if k.shape[2] * num_head_shards != self.num_kv_heads:
            refuse(
                f"k_proj computes {k.shape[2]} of the {self.num_kv_heads} key/value heads on this rank: if tensor "
                "parallelism shards them, pass head_mesh to "
                "longnet_dist.integrations.pytorch.SequenceParallelAttention",
                mesh,
            )
        q, k = self.q_norm(q), self.k_norm(k)
        rotation = rotation or self.rotation(x.shape[1], mesh, v.device, v.dtype, cu_seqlens, cache)
        if rotation is not None:
            q, k = rotation.queries(q), rotation.keys(k)
        if self.head_mesh is not None:
            q, k, v = (heads_of(x, self.head_mesh) for x in (q, k, v))
        out = self._attend(q, k, v, mesh, cu_seqlens, lengths, cache)
        if isinstance(out, DTensor):
            out = out.to_local()
        normed = apply_to_rows(self.inner_norm, out.flatten(2), token_types)
        return self.dropout(apply_to_rows(self.out_proj, normed, token_types))

    def _check_kinds(self, x: Tensor, token_types: Tensor, mesh: SequenceMesh | None) -> None:
        if not self.multiway:
            refuse("token_types are for a layer with weights for two kinds of tokens: multiway=True", mesh)
        if token_types.shape != x.shape[:2] or token_types.dtype != torch.bool:
            refuse(
                f"token_types is {token_types.dtype} of shape {tuple(token_types.shape)}; it must be bool, (B, N or L) "
                f"= {tuple(x.shape[:2])}",
                mesh,
            )

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mesh: SequenceMesh | None,
        cu_seqlens: Tensor | None,
        lengths: Tensor | None,
        cache: DilatedCache | None,
    ) -> Tensor:
        options: dict[str, Any] = {"causal": self.causal, "mesh": mesh, "kernel": self.kernel, "lengths": lengths}
        if self.padding == "none":
            bias = self._position_bias(q)
            return dilated_attention(q, k, v, self.pattern, bias=bias, cu_seqlens=cu_seqlens, cache=cache, **options)
        if cu_seqlens is not None or cache is not None or isinstance(q, DTensor):
            refuse("padding='torchscale' allows no cu_seqlens, cache or tensor parallelism; use lengths", mesh)
        return zero_row_attention(q, k, v, self.pattern, **options)

    def _position_bias(self, q: Tensor) -> PositionBias | None:
        if self.rel_pos_bias is not None:
            return T5Bias(self.rel_pos_bias, self.rel_pos_max_distance)
        if not self.use_alibi:
            return None
        return ALiBiBias(alibi_slopes(self.num_heads, q.device, torch.promote_types(q.dtype, torch.float32)))

    def rotation(
        self,
        num_rows: int,
        mesh: SequenceMesh | None,
        device: torch.device,
        dtype: torch.dtype,
        cu_seqlens: Tensor | None = None,
        cache: DilatedCache | None = None,
    ) -> Rotation | None:
        """Return the rotation of this rank's rows, by their global positions, or by those in their documents.

        Args:
            num_rows: N; with a mesh L, the number of this rank's rows.
            mesh: the ranks that hold the sequence, or None.
            device: device of the queries and keys.
            dtype: dtype of the attention.
            cu_seqlens: the documents; see `forward`.
            cache: the past, after which positions go on.

        Returns:
            The rotation; None if the layer uses neither xPos nor RoPE.

        Raises:
            ValueError: if the sequence is too long for xPos in this dtype, or its length is not known.
        """
        if not (self.use_xpos or self.use_rotary):
            return None
        positions = torch.arange(num_rows, device=device) if mesh is None else mesh.positions(device)
        length = num_rows if mesh is None else mesh.seq_len
        if cache is not None:
            if self.use_xpos:
                refuse("xPos is centred on the middle of a length that a cache does not know: use rotary", mesh)
            positions = positions + cache.length
        if cu_seqlens is not None:
            if cu_seqlens.dim() != 1:
                refuse(f"cu_seqlens is {tuple(cu_seqlens.shape)}; rotary positions need (documents + 1,)", mesh)
            positions = positions_in_documents(positions, cu_seqlens)
            if self.use_xpos and len(cu_seqlens) > 1:
                length = int(cu_seqlens.diff().max())
        return Rotation.at(
            positions,
            self.head_dim,
            dtype,
            base=self.rope_theta,
            yarn=self.yarn,
            xpos_length=length if self.use_xpos else None,
            xpos_scale_base=self.xpos_scale_base,
            xpos_lookahead=0 if self.causal else max(self.pattern.segment_lengths),
        )


class HeadNorm(nn.RMSNorm):
    """RMS normalisation of each head, in the dtype of its weight. (Autocast does not cast the input.)"""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each head, (B, L, H, D) -> (B, L, H, D), in x's dtype."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class HeadLayerNorm(nn.LayerNorm):
    """Layer normalisation of each head, without bias, in the dtype of its weight."""

    def __init__(self, head_dim: int, **factory: Any) -> None:
        super().__init__(head_dim, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each head, (B, L, H, D) -> (B, L, H, D), in x's dtype."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


_HEAD_NORMS: dict[bool | str, Callable[..., nn.Module]] = {
    **dict.fromkeys((False, "none"), nn.Identity),
    **dict.fromkeys((True, "rms"), HeadNorm),
    "layer": HeadLayerNorm,
}


def _per_branch(value: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _check_heads(d_model: int, num_heads: int, num_kv_heads: int, rotary: bool) -> None:
    if num_heads < 1 or d_model % num_heads:
        divisors = [h for h in range(1, d_model + 1) if d_model % h == 0]
        near = min(divisors, key=lambda h: abs(h - num_heads), default=1)
        raise ValueError(
            f"d_model {d_model} cannot be split into {num_heads} heads; num_heads must divide it: for example {near}"
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        divisors = [g for g in range(1, num_heads + 1) if num_heads % g == 0]
        raise ValueError(f"num_kv_heads is {num_kv_heads}; it must divide num_heads = {num_heads}: one of {divisors}")
    if rotary and d_model // num_heads % 2:
        raise ValueError(
            f"the head dim {d_model} / {num_heads} = {d_model // num_heads} is odd, and rotary encodings rotate pairs "
            "of dimensions; use a d_model that is a multiple of 2 * num_heads"
        )
