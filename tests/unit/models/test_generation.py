"""A failure here means: generation from caches differs from the model's logits over the whole text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from longnet_dist import LongNetConfig
from longnet_dist.models import generation
from longnet_dist.models.generation import Sampling


def build(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 32, "num_layers": 2, "num_heads": 4}
    pattern = {"segment_lengths": (6, 20, 80), "dilation_rates": (1, 3, 8)}
    return LongNetConfig(**(sizes | pattern | options)).build(dtype=torch.float64).eval()


@torch.no_grad()
def greedy_without_cache(model, tokens, count):
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.sampled_from(["rotary", "alibi", "t5", "none"]))
def test_parts_have_the_logits_of_the_whole(sizes, position):
    model, tokens = build(position=position, num_kv_heads=2), torch.randint(40, (2, sum(sizes)))
    cache = model.new_cache(2)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split(sizes, dim=1)]
        assert_close(torch.cat(parts, dim=1), model(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("read_at_once", [7, 4096])
def test_greedy_generation_is_that_without_a_cache(monkeypatch, read_at_once):
    monkeypatch.setattr(generation, "READ_AT_ONCE", read_at_once)
    model, prompt = build(), torch.randint(40, (3, 25))
    assert torch.equal(model.generate(prompt, 30), greedy_without_cache(model, prompt, 30))
    streamed = torch.stack(list(model.stream(prompt, 30)), dim=1)
    assert torch.equal(streamed, model.generate(prompt, 30)[:, 25:])


def test_prompts_of_other_lengths_are_continued_alone():
    model, prompts = build(), [torch.randint(40, (n,)) for n in (1, 30, 8)]
    for prompt, continued in zip(prompts, model.generate(prompts, 9), strict=True):
        assert torch.equal(continued, greedy_without_cache(model, prompt[None], 9)[0])


def test_a_sequence_ends_with_a_stop_token():
    model, prompt = build(), torch.randint(40, (2, 25))
    free = model.generate(prompt, 20, temperature=1.0, seed=3)
    stop = free[0, 30].item()
    ended = model.generate(prompt, 20, temperature=1.0, seed=3, stop=[stop])
    first = [row.tolist().index(stop) if stop in row else 19 for row in free[:, 25:]]
    assert ended.shape[1] == 26 + max(first)
    for row, end in enumerate(first):
        assert torch.equal(ended[row, : 26 + end], free[row, : 26 + end])
        assert (ended[row, 25 + end :] == ended[row, 25 + end]).all()


def test_draws_follow_the_probabilities():
    """Of 20,000 draws, top_k and top_p leave out the right tokens, and the shares of others are their probabilities."""
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    for sampling, expected in (
        (Sampling(1.0), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(1.0, top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(1.0, top_p=0.75), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(1.0, top_p=0.76), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
        (Sampling(0.5), [x / 0.345 for x in (0.25, 0.0625, 0.0225, 0.01)]),
        (Sampling(), [1.0, 0, 0, 0]),
        (Sampling(1e-310), [1.0, 0, 0, 0]),
    ):
        shares = sampling.draw(logits, generator).bincount(minlength=4) / 20_000
        assert_close(shares, torch.tensor(expected), rtol=0, atol=0.015)
    drawn = [build().generate(torch.zeros(1, 4, dtype=torch.int64), 20, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.int64)}, "at least one token"),
    ],
)
def test_wrong_options_raise(options, message):
    arguments = {"prompt": torch.zeros(1, 3, dtype=torch.int64), "max_new_tokens": 2} | options
    with pytest.raises(ValueError, match=message):
        build().generate(**arguments)


def test_caches_of_other_lengths_or_numbers_raise():
    """After a call that ended between two layers, a retry would be silently wrong."""
    model, tokens = build(), torch.zeros(1, 3, dtype=torch.int64)
    cache = model.new_cache()
    with torch.no_grad():
        model(tokens, cache=cache)
        cache[1].length = 1
        with pytest.raises(ValueError, match=r"have seen \[3, 1\] tokens"):
            model(tokens, cache=cache)
        with pytest.raises(ValueError, match="there are 1 caches for 2 layers"):
            model(tokens, cache=cache[:1])


def test_xpos_and_zero_rows_name_the_alternative():
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="does not know: use rotary"):
        build(position="xpos").generate(tokens, 2)
    with pytest.raises(ValueError, match="allows no cu_seqlens, cache"):
        build(padding="torchscale").generate(tokens, 2)
