"""Two sets of weights in one layer, for two kinds of tokens, such as text and image patches."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Multiway(nn.Module):
    """A module that works on each row alone, and a copy of it with other weights for rows of a second kind.

    See BEiT-3 (arXiv 2208.10442), section 2.1. The two have the names that torchscale gives them.

    Args:
        module: the module for rows of the first kind. Its copy begins with its own initial weights.

    Example:
        >>> module = Multiway(nn.Linear(8, 4))
        >>> module(torch.randn(2, 3, 8), torch.tensor([[True, False, False], [True, True, False]])).shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.A = module
        self.B = copy.deepcopy(module)
        for part in self.B.modules():
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()

    def forward(self, x: Tensor, token_types: Tensor | None = None) -> Tensor:
        """Apply each module to the rows of its kind, (B, L, E) -> (B, L, F).

        Args:
            x: the rows.
            token_types: (B, L), bool: true for rows of the second kind; by default all are of the first.
        """
        if token_types is None:
            return self.A(x)
        if torch.compiler.is_compiling():  # Compiled code needs shapes that do not depend on values.
            return torch.where(token_types[..., None], self.B(x), self.A(x))
        first_rows, second_rows = self.A(x[~token_types][None])[0], self.B(x[token_types][None])[0]
        out = torch.empty(*x.shape[:-1], first_rows.shape[-1], dtype=first_rows.dtype, device=x.device)
        out[~token_types], out[token_types] = first_rows, second_rows
        return out


def kinds_by_id(tokens: Tensor, first_id: int | None, token_types: Tensor | None = None) -> Tensor | None:
    """Return the kinds of tokens: those that are given, or else by their ids; None if nothing says them.

    Args:
        tokens: (B, L), the ids.
        first_id: the first id of the second kind; see `LongNetConfig.multiway_first_id`.
        token_types: the kinds that the caller gives, or None.
    """
    return tokens >= first_id if token_types is None and first_id is not None else token_types


def apply_to_rows(module: nn.Module, x: Tensor, token_types: Tensor | None) -> Tensor:
    """Apply a module that works on each row alone; `token_types` is for those that are a `Multiway`."""
    return module(x, token_types) if isinstance(module, Multiway) else module(x)
