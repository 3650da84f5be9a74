"""A failure here means: scores or embeddings of a document depend on the number of ranks, or are wrong on one."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from longnet_dist import LongNetConfig, SequenceMesh
from longnet_dist.inference.embed import embeddings
from longnet_dist.models.loss import log_likelihoods

CONFIG = LongNetConfig(d_model=16, num_layers=2, num_heads=2, segment_lengths=(8, 32), dilation_rates=(1, 4))


def build_model_and_document(num_tokens):
    torch.manual_seed(1)
    return CONFIG.build(dtype=torch.float64).eval(), torch.randint(CONFIG.vocab_size, (2, num_tokens))


@pytest.mark.parametrize("num_tokens", [1, 2, 61])
def test_log_likelihoods_are_those_of_the_next_tokens(num_tokens):
    model, tokens = build_model_and_document(num_tokens)
    with torch.no_grad():
        expected = model(tokens).log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    assert_close(log_likelihoods(model, tokens), expected, rtol=0, atol=1e-12)


def test_embeddings_are_pooled_features():
    model, tokens = build_model_and_document(61)
    with torch.no_grad():
        features = model.features(tokens)
    assert_close(embeddings(model, tokens), features.mean(1), rtol=0, atol=1e-12)
    assert_close(embeddings(model, tokens, pooling="last"), features[:, -1], rtol=0, atol=1e-12)
    assert_close(embeddings(model, tokens, pooling=None), features, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="pooling is 'max'; it must be 'mean', 'last' or None"):
        embeddings(model, tokens, pooling="max")


def infer_over_ranks(group, num_tokens):
    model, tokens = build_model_and_document(num_tokens)
    mesh = SequenceMesh(group, CONFIG.pattern, num_tokens)
    start, stop = mesh.shard.start, mesh.shard.stop
    scores = log_likelihoods(model, tokens[:, start : min(stop + 1, num_tokens)], mesh)
    assert_close(scores, log_likelihoods(model, tokens)[:, start:stop], rtol=0, atol=1e-12)
    for pooling in ("mean", "last"):
        expected = embeddings(model, tokens, pooling=pooling)
        assert_close(embeddings(model, tokens[:, start:stop], mesh, pooling), expected, rtol=0, atol=1e-12)
    features = embeddings(model, tokens[:, start:stop], mesh, pooling=None)
    assert_close(features, embeddings(model, tokens, pooling=None)[:, start:stop], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"it must be \(B, \d+\): the \d+ rows"):
        log_likelihoods(model, tokens.repeat(1, 2), mesh)


@pytest.mark.parametrize(("world", "num_tokens"), [(1, 61), (2, 61), (4, 90), (8, 5)])
def test_results_do_not_depend_on_the_number_of_ranks(pool, world, num_tokens):
    """Chunks are even, uneven or empty."""
    pool.run(world, infer_over_ranks, num_tokens)


def evaluate_and_score(group, num_tokens):
    """Compare scores and bits by position over ranks with those of one process."""
    model, tokens = build_model_and_document(num_tokens)
    mesh = SequenceMesh(group, CONFIG.pattern, num_tokens)
    assert_close(model.score(tokens[0], mesh), model.score(tokens[0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("world", "num_tokens"), [(1, 10), (2, 61), (4, 64), (8, 5)])
def test_a_score_does_not_depend_on_the_number_of_ranks(pool, world, num_tokens):
    pool.run(world, evaluate_and_score, num_tokens)
