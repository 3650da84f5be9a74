"""A failure here means: masked pretraining hides other tokens than it says, or its runs do not resume or export."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from torch.testing import assert_close

import longnet_dist
from longnet_dist import LongNet, LongNetEncoder, TrainConfig
from longnet_dist.cli.app import main
from longnet_dist.models.masking import mask_tokens
from longnet_dist.training.state import load_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")


def test_tokens_are_hidden_as_in_bert():
    tokens = torch.randint(100, (20_000,), generator=torch.Generator().manual_seed(0))
    inputs, targets = mask_tokens(tokens, 20_000, 0, mask_id=1000, num_ids=100, seed=[1, 2])
    chosen = targets != -100
    assert chosen.sum() == 3000
    assert torch.equal(targets[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    masked, kept = (inputs == 1000)[chosen], (inputs == tokens)[chosen]
    assert abs(masked.float().mean() - 0.8) < 0.03
    assert abs(kept.float().mean() - 0.101) < 0.02  # A random token is the true one in 1 of 100 cases.
    assert inputs[inputs != 1000].max() < 100
    other = mask_tokens(tokens, 20_000, 0, mask_id=1000, num_ids=100, seed=[1, 3])[1] != -100
    assert 0.1 < (other & chosen).sum() / 3000 < 0.2


@pytest.mark.parametrize("edges", [[0, 37], [0, 10, 10, 37], [0, 19, 37]])
def test_parts_are_parts_of_the_whole(edges):
    tokens, options = torch.arange(37), {"mask_id": 99, "num_ids": 37, "seed": [5]}
    parts = [mask_tokens(tokens[a:b], 37, a, **options) for a, b in itertools.pairwise(edges)]
    for joined, whole in zip(
        map(torch.cat, zip(*parts, strict=True)), mask_tokens(tokens, 37, 0, **options), strict=True
    ):
        assert torch.equal(joined, whole)


def test_the_loss_is_the_mean_over_hidden_tokens():
    torch.manual_seed(0)
    config = longnet_dist.LongNetConfig(d_model=16, num_layers=1, segment_lengths=(8, 32), dilation_rates=(1, 4))
    encoder = LongNetEncoder(config, dtype=torch.float64)
    tokens, targets = torch.randint(257, (2, 2, 40)).unbind()
    targets[:, ::3] = -100
    logits = encoder(tokens) @ encoder.embedding.weight.T
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_close(encoder(tokens, targets=targets), expected, rtol=0, atol=1e-12)
    offsets = torch.tensor([0, 13, 40])
    alone = [
        encoder(tokens[:, a:b], targets=targets[:, a:b]) * (targets[:, a:b] != -100).sum()
        for a, b in ((0, 13), (13, 40))
    ]
    documents = encoder(tokens, targets=targets, cu_seqlens=offsets)
    assert_close(documents * (targets != -100).sum(), sum(alone), rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="targets are for an encoder of token ids"):
        encoder(tokens, targets=targets, pooling="mean")


def test_a_run_is_exported_as_an_encoder(config, tmp_path, capsys):
    config = dataclasses.replace(config, objective="mlm", steps=2)
    longnet_dist.train(config)
    encoder = load_model(config.run_folder).eval()
    assert isinstance(encoder, LongNetEncoder)
    assert encoder.config.vocab_size == 258
    assert "bits per hidden byte" in capsys.readouterr().out
    assert main(["export", str(config.run_folder), str(tmp_path / "out")]) == 0
    exported = LongNetEncoder.from_pretrained(tmp_path / "out")
    tokens = torch.randint(257, (1, 50))
    assert_close(exported(tokens), encoder(tokens), rtol=0, atol=0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["objective"] == "mlm"
    with pytest.raises(ValueError, match=r"holds an encoder, for LongNetEncoder\.from_pretrained"):
        LongNet.from_pretrained(tmp_path / "out")
    for command in (["eval", str(config.run_folder)], ["score", __file__, "--model", str(tmp_path / "out")]):
        assert main(command) == 2
        assert "an encoder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is of the objective mlm, and this run's is causal"):
        longnet_dist.train(dataclasses.replace(config, objective="causal", steps=5))


@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_an_interrupted_run_hides_the_same_tokens(config, tmp_path, documents):
    """The same losses to the last bit, with a constant learning rate."""
    config = dataclasses.replace(
        config, objective="mlm", documents=documents, steps=4, final_learning_rate=1.0, warmup_steps=0
    )
    whole = longnet_dist.train(config)
    parts = []
    for steps in (2, 4):
        part = longnet_dist.train(dataclasses.replace(config, run_folder=tmp_path / "parts", steps=steps))
        parts += part.losses
    assert tuple(parts) == whole.losses


def test_training_and_validation_hide_other_tokens(config, monkeypatch):
    """The first sequence of each has the number 0."""
    seeds = []

    def record(*arguments, seed, **options):
        seeds.append(seed)
        return mask_tokens(*arguments, seed=seed, **options)

    monkeypatch.setattr(longnet_dist.training.steps, "mask_tokens", record)
    longnet_dist.train(dataclasses.replace(config, objective="mlm", steps=1, validation_sequences=1))
    assert seeds == [(0, 0, 0), (0, 1, 0)]


@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_hidden_tokens_keep_their_kind(config, monkeypatch, tmp_path, documents):
    """A multiway encoder sees the kinds of the true tokens, not of the mask; its run is exported with both weights."""
    hidden, seen = [], []
    forward = LongNetEncoder.forward

    def record(tokens, *arguments, **options):
        hidden.append(tokens)
        return mask_tokens(tokens, *arguments, **options)

    def observe(self, inputs, *arguments, token_types, **options):
        seen.extend(token_types)
        return forward(self, inputs, *arguments, token_types=token_types, **options)

    monkeypatch.setattr(longnet_dist.training.steps, "mask_tokens", record)
    monkeypatch.setattr(LongNetEncoder, "forward", observe)
    model = dataclasses.replace(config.model, multiway=True, multiway_first_id=100)
    longnet_dist.train(dataclasses.replace(config, objective="mlm", documents=documents, steps=1, model=model))
    assert len(seen) == len(hidden) > 1
    for tokens, kinds in zip(hidden, seen, strict=True):
        assert torch.equal(kinds, tokens >= 100)
    monkeypatch.undo()
    assert main(["export", str(config.run_folder), str(tmp_path / "out")]) == 0
    exported, trained = LongNetEncoder.from_pretrained(tmp_path / "out"), load_model(config.run_folder).eval()
    tokens = torch.randint(257, (1, 50))
    assert_close(exported(tokens), trained(tokens), rtol=0, atol=0)
    assert (exported(tokens) - exported(tokens, token_types=tokens < 0)).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"is of another model: .*multiway True there, False here"):
        longnet_dist.train(dataclasses.replace(config, objective="mlm", documents=documents, steps=2))
    first = dataclasses.replace(model, multiway_first_id=257)
    with pytest.raises(ValueError, match="none would be of the second kind"):
        longnet_dist.train(dataclasses.replace(config, objective="mlm", run_folder=tmp_path / "other", model=first))


def test_a_decoder_is_no_encoder(tmp_path):
    longnet_dist.LongNetConfig(d_model=16, num_layers=1).build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a decoder, for LongNet\.from_pretrained"):
        LongNetEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only an encoder of token ids"):
        LongNetEncoder(longnet_dist.LongNetConfig(d_model=16, num_layers=1), class_token=True).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "bert"}, "it must be causal or mlm"),
        ({"objective": "mlm", "model": longnet_dist.LongNetConfig(tie_embeddings=False)}, "leave tie_embeddings on"),
        ({"model": longnet_dist.LongNetConfig(multiway=True)}, "needs model.multiway_first_id"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)
