"""Generation: a prompt is read into caches part by part, and then token after token is drawn from them.

Memory does not grow with the context: a cache holds the kept rows of current segments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longnet_dist.attention.cache import DilatedCache
from longnet_dist.distributed.mesh import SequenceMesh, refuse

if TYPE_CHECKING:
    from longnet_dist.models.decoder import LongNet

READ_AT_ONCE = 4096
"""Tokens of a prompt that are read at once."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Args:
        temperature: the divisor of the logits; 0 takes the likeliest token.
        top_k: draw from this many likeliest tokens; from all if None.
        top_p: draw from the likeliest tokens whose probabilities sum up to at least this.

    Raises:
        ValueError: for a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or None")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a token for each sequence: (B, vocab_size) -> (B,), int64, on the device of the logits."""
        if self.temperature == 0:
            return logits.argmax(-1)
        # On the CPU in float64, so that a seed gives the same tokens on every device.
        scores = logits.double().cpu()
        scores = (scores - scores.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None:
            kept = scores.topk(min(self.top_k, scores.shape[-1])).values
            scores = scores.masked_fill(scores < kept[:, -1:], -torch.inf)
        probabilities, order = scores.softmax(-1).sort(-1, descending=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= self.top_p, 0)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        return order.gather(-1, drawn)[:, 0].to(logits.device)


@torch.no_grad()
def read_prompt(
    model: LongNet,
    prompt: Tensor,
    cache: Sequence[DilatedCache],
    mesh: SequenceMesh | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Read a prompt into caches, and return the logits of the token after it: (B, vocab_size).

    Args:
        model: the model, in eval mode.
        prompt: (B, N), int64, N >= 1; over ranks the whole prompt on each.
        cache: the result of `model.new_cache(B)`.
        mesh: ranks that read the prompt together, with N tokens; every rank then has the whole caches and the logits.
        progress: called with the number of tokens that were read, after each part.
    """
    if prompt.dim() != 2 or not prompt.shape[1]:
        refuse(f"the prompt is {tuple(prompt.shape)}; it must be (B, N) with at least one token", mesh)
    if mesh is not None and mesh.size > 1:
        logits = last_logits(model, model.features(mesh.split(prompt), mesh, cache=cache), mesh)
        if progress is not None:
            progress(prompt.shape[1])
        return logits
    for part in prompt.split(READ_AT_ONCE, dim=1):
        features = model.features(part, cache=cache)
        if progress is not None:
            progress(part.shape[1])
    return model.output(features[:, -1])


@torch.no_grad()
def last_logits(model: LongNet, features: Tensor, mesh: SequenceMesh) -> Tensor:
    """Return the logits of the token after a sequence, on every rank: (B, vocab_size). Collective.

    Args:
        model: the model, in eval mode.
        features: (B, L, d_model), this rank's rows.
        mesh: the ranks that hold the sequence.
    """
    logits = features.new_zeros(len(features), model.config.vocab_size)
    if mesh.shard.stop == mesh.seq_len and mesh.shard.num_rows:
        logits = model.output(features[:, -1])
    return mesh.sum(logits)


def draw_tokens(
    model: LongNet,
    logits: Tensor,
    cache: Sequence[DilatedCache],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[Tensor]:
    """Yield the next token of each sequence, (B,), int64, up to `max_new_tokens` times.

    Args:
        model: the model, in eval mode.
        logits: the result of `read_prompt`.
        cache: the caches that it filled.
        max_new_tokens: how many tokens to draw.
        sampling: how to draw them.
        seed: the seed of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    for number in range(max_new_tokens):
        tokens = sampling.draw(logits, generator)
        yield tokens
        if number + 1 < max_new_tokens:
            logits = read_prompt(model, tokens[:, None], cache)


def stream_tokens(
    model: LongNet,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seed: int = 0,
    mesh: SequenceMesh | None = None,
    progress: Callable[[int], object] | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of each sequence, (B,), int64, up to `max_new_tokens` times.

    Args:
        model, prompt, mesh, progress: see `read_prompt`.
        max_new_tokens: how many tokens to draw.
        sampling: how to draw them.
        seed: the seed of the draws.
    """
    cache = model.new_cache(len(prompt))
    logits = read_prompt(model, prompt, cache, mesh, progress)
    yield from draw_tokens(model, logits, cache, max_new_tokens, sampling, seed)


def continue_sequences(
    model: LongNet,
    prompt: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    stop: Collection[int] = (),
    seed: int = 0,
    mesh: SequenceMesh | None = None,
) -> Tensor | list[Tensor]:
    """Continue sequences; see `LongNet.generate`."""
    if not isinstance(prompt, Tensor):
        return [_generate(model, x[None], max_new_tokens, sampling, stop, seed, mesh)[0] for x in prompt]
    rows = _generate(model, prompt, max_new_tokens, sampling, stop, seed, mesh)
    longest = max((len(row) for row in rows), default=0)
    padded = [torch.cat([row, row[-1:].expand(longest - len(row))]) for row in rows]
    return torch.stack(padded) if padded else prompt


def _generate(
    model: LongNet,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Collection[int],
    seed: int,
    mesh: SequenceMesh | None,
) -> list[Tensor]:
    """Return each sequence with its continuation, which ends with a token of `stop`."""
    ends: list[int | None] = [None] * len(prompt)
    drawn = [prompt]
    for tokens in stream_tokens(model, prompt, max_new_tokens, sampling, seed=seed, mesh=mesh):
        drawn.append(tokens[:, None])
        for row, token in enumerate(tokens.tolist() if stop else ()):
            if token in stop and ends[row] is None:
                ends[row] = prompt.shape[1] + len(drawn) - 1
        if None not in ends:
            break
    return [row[:end] for row, end in zip(torch.cat(drawn, dim=1), ends, strict=True)]
