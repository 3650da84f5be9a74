"""The transformer block of LongNet: dilated attention and a feed-forward network, with Magneto's sub-LayerNorm."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from longnet_dist.attention.cache import DilatedCache
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.nn.attention import DilatedAttention
from longnet_dist.nn.multiway import Multiway, apply_to_rows
from longnet_dist.nn.rotary import Rotation

_PART = 1 << 13
"""Rows that a feed-forward network transforms at a time, without gradients."""


class FeedForward(nn.Module):
    """Feed-forward network: linear, GELU, Magneto's sub-LayerNorm, linear, dropout.

    Args:
        d_model: E, the width of the input and the output.
        ffn_dim: the hidden width.
        dropout: dropout probability of the output.
        inner_norm: whether there is the sub-LayerNorm.
        device, dtype: device and dtype of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        ffn_dim: int,
        dropout: float = 0.0,
        *,
        inner_norm: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, ffn_dim, device=device, dtype=dtype)
        self.inner_norm = nn.LayerNorm(ffn_dim, device=device, dtype=dtype) if inner_norm else nn.Identity()
        self.fc2 = nn.Linear(ffn_dim, d_model, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each row, (B, L, E) -> (B, L, E).

        Without gradients, rows are transformed in parts, so that the hidden layer of a long sequence never exists as
        a whole.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.shape[1] <= _PART:
            return self._transform(x)
        return torch.cat([self._transform(part) for part in x.split(_PART, dim=1)], dim=1)

    def _transform(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.inner_norm(nn.functional.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm transformer block with sub-LayerNorm (Magneto, arXiv 2210.06423, figure 2).

    Args:
        attention: the attention layer, which also sets the width E, whether there is sub-LayerNorm, and whether tokens
            of a second kind have weights of their own.
        ffn_dim: the hidden width of the feed-forward network.
        dropout: dropout probability of the feed-forward network's output.
        device, dtype: device and dtype of the parameters.
    """

    def __init__(
        self,
        attention: DilatedAttention,
        ffn_dim: int,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        E, sub_norm = attention.d_model, not isinstance(attention.inner_norm, nn.Identity)
        wrap: Callable[[nn.Module], nn.Module] = Multiway if attention.multiway else lambda module: module
        self.attention_norm = wrap(nn.LayerNorm(E, device=device, dtype=dtype))
        self.attention = attention
        self.ffn_norm = wrap(nn.LayerNorm(E, device=device, dtype=dtype))
        self.ffn = wrap(FeedForward(E, ffn_dim, dropout, inner_norm=sub_norm, device=device, dtype=dtype))

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
        """Apply the block, (B, L, E) -> (B, L, E); the other arguments are those of `DilatedAttention.forward`."""
        normed = apply_to_rows(self.attention_norm, x, token_types)
        x = x + self.attention(normed, mesh, rotation, cu_seqlens, lengths, token_types, cache)
        return x + apply_to_rows(self.ffn, apply_to_rows(self.ffn_norm, x, token_types), token_types)

    @torch.no_grad()
    def reset_parameters(self, num_layers: int) -> None:
        """Initialise the weights as Magneto does for a decoder (arXiv 2210.06423, section 3).

        Weights are Xavier normal, with gain sqrt(log(2 M)) except for the query and key projections. Biases are zero.

        Args:
            num_layers: M, the number of blocks in the decoder.
        """
        gain = math.sqrt(math.log(2 * max(num_layers, 2)))
        attention, ffn = self.attention, self.ffn
        parts = {attention.v_proj: gain, attention.out_proj: gain, ffn: gain, attention.q_proj: 1, attention.k_proj: 1}
        for part, gain_of_part in parts.items():
            for module in part.modules():  # One linear layer, or several.
                if isinstance(module, nn.Linear):
                    nn.init.xavier_normal_(module.weight, gain_of_part)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
