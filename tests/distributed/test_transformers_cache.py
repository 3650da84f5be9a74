"""A failure here means: generation with the cache of constant memory differs from generation without one."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.test_transformers import FAMILIES, PATTERN, draw, make_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 9}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generate_with_the_cache_is_generate_without(family, options):
    """Greedy, sampled and by beam search, for a batch; chunks of the prompt, too."""
    from longnet_dist.integrations.transformers import DilatedPast

    model = make_model(family).eval()
    tokens = draw(33)["input_ids"].clamp(min=1)
    options = {"max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None} | options

    def generated(**more):
        torch.manual_seed(0)
        return model.generate(tokens, **(options | more)).tolist()

    expected = generated(use_cache=False)
    assert generated(use_cache=True) == expected
    assert generated(use_cache=True, prefill_chunk_size=7) == expected
    past = DilatedPast(PATTERN)
    assert generated(use_cache=True, cache=past) == expected
    assert past.get_seq_length() == 33 + 19
    assert past.max_bytes() == sum(layer.past.num_bytes for layer in past.layers)


def test_padded_prompts_are_generated_without_the_cache():
    """Their sequences are at other positions, which one cache does not hold."""
    model = make_model("llama").eval()
    tokens = draw(20)["input_ids"].clamp(min=1)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(tokens, attention_mask=mask, **options)
    alone = model.generate(tokens[:1, 5:], **options)
    assert together[0, 20:].tolist() == alone[0, 15:].tolist()


def test_a_model_can_be_pickled():
    import pickle

    model = make_model("llama").eval()
    loaded, tokens = pickle.loads(pickle.dumps(model)), draw(20)["input_ids"].clamp(min=1)
    options = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}
    assert loaded.generate(tokens, **options).tolist() == model.generate(tokens, **options).tolist()


def test_wrong_uses_of_the_cache_raise():
    from longnet_dist.integrations.transformers import DilatedPast

    model = make_model("llama").eval()
    tokens, past = draw(20)["input_ids"][:1], DilatedPast(PATTERN)
    with torch.no_grad():
        model(tokens, cache=past)
        for wrong, message in (
            ({"position_ids": torch.arange(20)[None]}, "must go on from the 20 tokens of the cache"),
            ({"attention_mask": torch.arange(40)[None].clamp(max=1)}, "a cache is for whole sequences without padding"),
        ):
            with pytest.raises(ValueError, match=message):
                model(tokens, cache=past, **wrong)
    with pytest.raises(ValueError, match="cannot go back to fewer tokens"):
        past.layers[0].crop(3)
