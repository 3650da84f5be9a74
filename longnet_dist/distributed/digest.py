"""Comparison of batches between ranks, for trainers whose ranks must load the same ones."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest(batch: Any) -> int:
    """Return a 56-bit hash of the tensors, numbers and text in nested collections.

    Equal batches have the same digest on every rank. So any other object counts only by its type, because its `repr`
    may contain a memory address.

    Args:
        batch: A tensor, number, text or other object, or a mapping, list, tuple or dataclass of these.

    Returns:
        The hash, which fits into an int64, so that ranks can compare it in a tensor.

    Example:
        >>> digest({"input_ids": torch.zeros(2, 3), "names": ["a", "b"]}) == digest({"input_ids": torch.zeros(2, 3)})
        False
    """
    result = hashlib.blake2b(digest_size=7)
    _add(result, batch)
    return int.from_bytes(result.digest(), "big")


def _add(result: Any, value: Any) -> None:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Tensor):
        result.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        result.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        result.update(f"mapping {len(value)};".encode())
        for key in sorted(value, key=repr):
            _add(result, key)
            _add(result, value[key])
    elif isinstance(value, (list, tuple)):
        result.update(f"sequence {len(value)};".encode())
        for item in value:
            _add(result, item)
    elif value is None or isinstance(value, (str, bytes, int, float, complex)):
        result.update(f"{value!r};".encode())
    else:
        result.update(f"{type(value).__qualname__};".encode())
