"""A cache of transformers' own interface whose memory does not grow with the context."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from longnet_dist.attention.cache import DilatedCache
from longnet_dist.plan.pattern import Pattern


class _DilatedLayer(CacheLayerMixin):
    """The past of one layer, which dilated attention reads and extends."""

    is_sliding = False

    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        self.pattern = pattern
        self.past: DilatedCache | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory, for keys of this shape, (B, G, L, D)."""
        batch, heads, _, dim = key_states.shape
        self.past = DilatedCache(self.pattern, batch, heads, dim, key_states.device, key_states.dtype)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys and values alone: the attention itself appends them to the past."""
        if self.past is None:
            self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that a mask would have, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens that were seen."""
        return 0 if self.past is None else self.past.length

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        if self.past is not None:
            self.past.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue each sequence from another one."""
        if self.past is not None:
            self.past.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        if self.past is not None:
            self.past.reorder(torch.arange(self.past.rows.shape[1]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        if self.past is not None:
            self.past.reorder(indices)

    def crop(self, max_length: int) -> None:
        """Refuse: rows that were replaced cannot come back."""
        raise ValueError("this cache cannot go back to fewer tokens, as assisted generation does")

    def offload(self) -> None:
        """Do nothing: the memory is small."""

    def prefetch(self) -> None:
        """Do nothing."""


class DilatedPast(Cache):
    """The past of a model with dilated attention, in constant memory: of each layer the kept rows of current segments.

    `generate` on a model to which `apply` was applied uses it. All sequences of the batch have equally many tokens.

    Args:
        pattern: the pattern of the model.
    """

    def __init__(self, pattern: Pattern) -> None:
        layer: Any = partial(_DilatedLayer, pattern)
        super().__init__(layer_class_to_replicate=layer)

    def of_layer(self, number: int) -> DilatedCache:
        """Return the past of a layer, whose keys have been given to `update`."""
        layer = self.layers[number]
        assert isinstance(layer, _DilatedLayer)
        assert layer.past is not None
        return layer.past

    def max_bytes(self) -> int:
        """Return the most bytes that the layers so far ever hold."""
        return sum(self.of_layer(number).max_bytes() for number in range(len(self.layers)))
