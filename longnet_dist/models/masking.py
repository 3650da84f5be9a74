"""Masked tokens, from which an encoder learns: which are hidden, and how."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from longnet_dist.models.loss import IGNORED

SHARE = 0.15
"""Share of the tokens that are to be predicted."""


def mask_tokens(
    tokens: Tensor, seq_len: int, first: int, *, mask_id: int, num_ids: int, seed: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Hide tokens as BERT does (Devlin et al. 2019, arXiv 1810.04805, section 3.1), and return them as targets.

    15 % of a sequence's tokens are to be predicted, chosen at random: exactly that many, at least 1, so that all
    sequences of a step have equally many. Of these, 80 % are replaced by the mask, and 10 % by random tokens.

    The choice depends on the arguments alone. So ranks that hold parts of a sequence choose for the whole of it.

    Args:
        tokens: (L,), int64: the rows [first, first + L) of a sequence.
        seq_len: N, the length of the sequence.
        first: the number of the first row.
        mask_id: the id of the mask.
        num_ids: the number of ids from which random tokens are drawn.
        seed: integers of at least 0, which identify the sequence.

    Returns:
        The tokens to give to the model, and the targets, both (L,); a target of -100 does not count.

    Example:
        >>> tokens, targets = mask_tokens(torch.arange(20), 20, 0, mask_id=99, num_ids=20, seed=[0])
        >>> (targets >= 0).sum()
        tensor(3)
    """
    generator = np.random.default_rng(list(seed))
    count = max(1, round(SHARE * seq_len))
    chosen = generator.choice(seq_len, count, replace=False)
    how, random_ids = generator.random(count), generator.integers(num_ids, size=count)
    here = (chosen >= first) & (chosen < first + len(tokens))
    rows = torch.from_numpy(chosen[here] - first)
    inputs, targets = tokens.clone(), torch.full_like(tokens, IGNORED)
    targets[rows] = tokens[rows]
    hidden = np.where(how < 0.8, mask_id, random_ids)[here]
    inputs[rows] = torch.where(torch.from_numpy(how[here] < 0.9), torch.from_numpy(hidden), tokens[rows])
    return inputs, targets
