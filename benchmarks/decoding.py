"""Measure decoding against the context, in one run: the time per token, and the bytes that caches hold.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py [--picture decoding.png]

- A LongNet whose longest segment has 2^20 tokens, at contexts of about 10^4, 10^5 and 10^6 tokens. It reads one prompt,
  and copies of its caches decode from there on. The contexts are whole first segments (2,048 tokens) apart, so that in
  each turn these are equally full: a ratio is the median over turns.
- A Llama of transformers with random weights and the same sizes, with its own attention and cache, and after `apply`
  with the same pattern and our cache: both by `generate`. The tokens are the last ones before each context. If this is
  a multiple of segment lengths, these segments are full then, and decoding takes longest.

Contestants take turns after a warm-up. On one thread, times are CPU times of the process, which other work on the
machine changes little; else wall times. Before anything is measured, decoding is compared with whole forwards.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import tyro
from matplotlib.figure import Figure
from measure import machine, seconds_in_turns
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from longnet_dist import LongNetConfig, Pattern
from longnet_dist.integrations.transformers import DilatedPast, apply
from longnet_dist.models.generation import READ_AT_ONCE, Sampling, draw_tokens, read_prompt

PATTERN = Pattern.geometric(1 << 20, base=2048, growth=8)
VOCABULARY = 257
LONGNET, OURS, FULL = "LongNet", "Llama, dilated attention", "Llama, its own cache"


@dataclass
class Options:
    """The sizes to measure."""

    contexts: tuple[int, ...] = (10_000, 100_112, 1_001_232)
    """Contexts of the LongNet in tokens, whole first segments apart."""
    llama_contexts: tuple[int, ...] = (1024, 4096, 16384, 32768)
    """Contexts of the Llama, in tokens."""
    width: int = 256
    """Width of the models; a head has 64 dimensions."""
    layers: int = 2
    """Number of layers."""
    tokens: int = 32
    """Tokens of a turn."""
    turns: int = 128
    """Measured turns of the LongNet at each context: turns x tokens are whole first segments."""
    llama_turns: int = 9
    """Measured turns of the Llama at each context."""
    threads: int = 1
    """Number of threads."""
    picture: Path | None = None
    """File for the picture."""


class Contestant(NamedTuple):
    """A model that continues from one context: a turn of decoding, and the bytes of its cache."""

    decode: Callable[[], object]
    num_bytes: Callable[[], int]


Contestants = dict[tuple[str, int], Contestant]


def caches_at(read: Any, cache: Any, prompt: Tensor, contexts: Sequence[int]) -> Iterator[tuple[int, Any, Any]]:
    """Read a prompt once, and yield each context with a copy of the cache and the result of the last part."""
    for first, context in zip((0, *contexts), contexts, strict=False):
        for part in prompt[:, first:context].split(READ_AT_ONCE, dim=1):
            last = read(part, cache)
        yield context, copy.deepcopy(cache), last


def longnet_contestants(options: Options) -> Contestants:
    """Return a LongNet at each context, after comparing its decoding with a whole forward."""
    w, r = PATTERN.segment_lengths, PATTERN.dilation_rates
    sizes = {"d_model": options.width, "num_layers": options.layers, "num_heads": options.width // 64}
    model = LongNetConfig(vocab_size=VOCABULARY, segment_lengths=w, dilation_rates=r, **sizes).build().eval()
    prompt = torch.randint(VOCABULARY, (1, max(options.contexts)))
    caches = model.new_cache()
    parts = [read_prompt(model, part, caches) for part in prompt[:, :2100].split([2040, *[1] * 60], dim=1)]
    torch.testing.assert_close(parts[-1], model(prompt[:, :2100])[:, -1], rtol=1e-4, atol=1e-4)

    def contestant(caches: Any, logits: Tensor) -> Contestant:
        drawn = draw_tokens(model, logits, caches, 1 << 40, Sampling(), seed=0)
        next(drawn)  # The prompt gave the first token, and each further one takes a step.
        return Contestant(lambda: list(islice(drawn, options.tokens)), lambda: sum(x.num_bytes for x in caches))

    states = caches_at(partial(read_prompt, model), model.new_cache(), prompt, options.contexts)
    return {(LONGNET, context): contestant(caches, logits) for context, caches, logits in states}


def llama(options: Options, pattern: Pattern | None) -> Any:
    """Build the same random Llama each time, with dilated attention if there is a pattern."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=options.width * 43 // 16,  # The proportion of Llama 2 7B.
        max_position_embeddings=1 << 20,
        eos_token_id=None,
        **{"num_hidden_layers": options.layers, "num_attention_heads": options.width // 64},
    )
    model = LlamaForCausalLM(config).eval()
    return model if pattern is None else apply(model, pattern)


def llama_contestants(options: Options) -> Contestants:
    """Return the Llama at each context with both caches, after comparing ours with a whole dense forward."""
    dense = Pattern((512,), (1,))
    model, past, tokens = llama(options, dense), DilatedPast(dense), torch.randint(VOCABULARY, (1, 512))
    parts = [model(input_ids=part, cache=past).logits for part in tokens.split([480, *[1] * 32], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), llama(options, None)(tokens).logits, rtol=1e-4, atol=1e-4)
    ahead = (options.llama_turns + 1) * options.tokens
    starts = [context - ahead for context in options.llama_contexts]
    prompt = torch.randint(VOCABULARY, (1, max(starts) + 1))

    def contestant(model: Any, sequence: Tensor, cache: Any, num_bytes: Callable[[Any], int]) -> Contestant:
        def decode() -> None:
            nonlocal sequence
            sequence = model.generate(sequence, cache=cache, max_new_tokens=options.tokens, do_sample=False)

        return Contestant(decode, lambda: sum(map(num_bytes, cache.layers)))

    contestants = {}
    for name, pattern, empty, num_bytes in (
        (FULL, None, DynamicCache(), lambda layer: layer.keys.nbytes + layer.values.nbytes),
        (OURS, PATTERN, DilatedPast(PATTERN), lambda layer: layer.past.num_bytes),
    ):
        model = llama(options, pattern)
        states = caches_at(lambda part, cache, of=model: of(input_ids=part, cache=cache), empty, prompt, starts)
        for start, cache, _ in states:
            contestants[name, start + ahead] = contestant(model, prompt[:, : start + 1], cache, num_bytes)
    return contestants


def measure(contestants: Contestants, turns: int, options: Options) -> dict[tuple[str, int], list[float]]:
    """Return the milliseconds per token of each turn, without a first one to warm up."""
    clock = time.process_time if options.threads == 1 else time.perf_counter
    seconds = seconds_in_turns({key: x.decode for key, x in contestants.items()}, 1 + turns, clock=clock)
    return {key: [1e3 * x / options.tokens for x in of_turns[1:]] for key, of_turns in seconds.items()}


@torch.no_grad()
def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    longnets, llamas = longnet_contestants(options), llama_contestants(options)
    times = measure(longnets, options.turns, options) | measure(llamas, options.llama_turns, options)
    sizes = {key: contestant.num_bytes() for key, contestant in (longnets | llamas).items()}
    assert len({size for (name, _), size in sizes.items() if name != FULL}) == 1, sizes
    medians = {key: statistics.median(of_turns) for key, of_turns in times.items()}
    sizes_of_models = f"{options.layers} layers, width {options.width}, {options.width // 64} heads, {VOCABULARY} ids"
    lines = [f"{machine()}, transformers {transformers.__version__}; float32, batch 1, {sizes_of_models}; {PATTERN}\n"]
    lines += ["| context | contestant | cache, MiB | ms per token (quartiles) | ratio |", "|---:|---|---:|---:|---:|"]
    for key in sorted(times, key=lambda key: (key[0] != LONGNET, key[1], key[0])):
        name, context = key
        low, _, high = statistics.quantiles(times[key], n=4)
        baseline = times[(LONGNET, options.contexts[0]) if name == LONGNET else (FULL, context)]
        ratio = statistics.median(x / y for x, y in zip(times[key], baseline, strict=True))
        cells = f"{context:,}", name, f"{sizes[key] / 2**20:.1f}", f"{medians[key]:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {' | '.join(cells)} | {ratio:.2f} |")
    print(*lines, sep="\n")
    if options.picture is not None:
        draw(options.picture, {key: size / 2**20 for key, size in sizes.items()}, medians)


def draw(out: Path, mebibytes: dict[tuple[str, int], float], milliseconds: dict[tuple[str, int], float]) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, values, label in zip(panels, (mebibytes, milliseconds), ("cache, MiB", "ms per token"), strict=True):
        for name, style in ((FULL, "o-C1"), (OURS, "o-C0"), (LONGNET, "s--C0")):
            points = sorted((context, value) for (of, context), value in values.items() if of == name)
            panel.plot(*zip(*points, strict=True), style, label=name)
        panel.set(xlabel="context, tokens", ylabel=label, xscale="log")
        panel.grid(alpha=0.3)
    (context, size), last = max((key[1], x) for key, x in mebibytes.items() if key[0] == FULL), panels[0].get_xlim()[1]
    panels[0].plot((context, last), (size, size * last / context), ":C1", label="Llama, its own cache, computed")
    panels[0].set_yscale("log", base=2)
    panels[0].yaxis.set_major_formatter("{x:,.0f}")
    panels[0].legend(fontsize=8)
    panels[1].set_ylim(bottom=0)
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
