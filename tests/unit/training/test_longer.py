"""A failure here means: a model cannot be trained on longer sequences than before, or silently starts from nothing."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import longnet_dist
from longnet_dist import LongNet, LongNetConfig
from longnet_dist.cli import app
from longnet_dist.data.corpus import window_order
from longnet_dist.nn.rotary import Rotation, Yarn
from longnet_dist.training.job import load_corpus
from longnet_dist.training.state import load_model

LONGER = {"segment_lengths": (64, 512), "dilation_rates": (1, 2)}


def llama(theta: float, factor: float, original: int, head_dim: int) -> LlamaConfig:
    """Return a configuration of transformers with these rotary positions."""
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=int(factor * original),
        rope_parameters=yarn | {"rope_theta": theta},
    )


@pytest.mark.parametrize(
    ("theta", "factor", "original", "head_dim"),
    [(10000.0, 4.0, 2048, 64), (500000.0, 8.0, 8192, 128), (1e6, 1.5, 300, 32), (10000.0, 32.0, 64, 8)],
)
def test_yarn_is_that_of_transformers(theta, factor, original, head_dim):
    config = llama(theta, factor, original, head_dim)
    expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    yarn = Yarn(factor, original)
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    frequencies = yarn.frequencies(plain, theta)
    assert_close(frequencies.float(), expected, rtol=2e-6, atol=0)
    assert (frequencies != plain).any()
    assert yarn.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    positions = torch.arange(0, min(2048, int(factor * original)), 7)
    q, k = torch.randn(2, 1, len(positions), 2, head_dim).unbind()
    theirs = LlamaRotaryEmbedding(config)(q, positions[None])
    theirs_q, theirs_k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *theirs)
    rotation = Rotation.at(positions, head_dim, base=theta, yarn=yarn)
    # Angles in float32, as theirs, are off by up to a rounding of the position.
    error = 8 * torch.finfo(torch.float32).eps * int(positions[-1])
    assert_close(rotation.queries(q), theirs_q.transpose(1, 2), rtol=0, atol=error)
    assert_close(rotation.keys(k), theirs_k.transpose(1, 2), rtol=0, atol=error)


def test_rotary_options_of_a_model_reach_every_layer():
    config = LongNetConfig(d_model=32, num_layers=2, num_heads=2, rope_theta=5000.0)
    yarn = dataclasses.replace(config, yarn_factor=4.0, original_max_position_embeddings=64)
    model, stretched = config.build(), yarn.build()
    stretched.load_state_dict(model.state_dict())
    tokens = torch.randint(257, (1, 100))
    assert not torch.allclose(model(tokens), stretched(tokens))
    for block in stretched.blocks:
        assert (block.attention.rope_theta, block.attention.yarn) == (5000.0, Yarn(4.0, 64))
    expected = Rotation.at(torch.arange(100), 16, base=5000.0)
    rotation = model.blocks[0].attention.rotation(100, None, torch.device("cpu"), torch.float32)
    assert_close(rotation.cos, expected.cos, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_theta": 1.0}, "rope_theta is 1.0; it must be above 1"),
        ({"yarn_factor": 0.5}, "yarn_factor is 0.5; it must be at least 1"),
        ({"yarn_factor": 2.0}, "give the seq_len that the weights were trained with"),
        ({"yarn_factor": 2.0, "original_max_position_embeddings": 64, "position": "xpos"}, "needs position='rotary'"),
    ],
)
def test_rotary_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LongNetConfig(**options)


@pytest.fixture
def trained(config):
    """A short run, with weights that have learned something."""
    longnet_dist.train(config)
    return config


def first_loss(config: longnet_dist.TrainConfig, weights: LongNet) -> float:
    """Return the loss of these weights on the first sequence of a run, with the branches and positions of the run."""
    corpus = load_corpus(config)
    window = window_order(corpus.train.num_windows(config.seq_len), 0, config.seed)[0]
    tokens, targets = corpus.train.read(int(window), config.seq_len, 0, config.seq_len)
    model = config.model.build()
    model.load_state_dict(weights.state_dict())
    return model(tokens[None], targets=targets[None]).item()


@pytest.mark.parametrize("source", ["run", "export"])
def test_longer_sequences_start_with_the_weights_of_another_run(trained, tmp_path, capsys, source):
    folder = trained.run_folder
    if source == "export":
        assert app.main(["export", str(folder), str(tmp_path / "export")]) == 0
        folder = tmp_path / "export"
    model = dataclasses.replace(trained.model, **LONGER, yarn_factor=4.0, original_max_position_embeddings=128)
    longer = dataclasses.replace(
        trained, seq_len=512, steps=2, init_from=folder, model=model, run_folder=tmp_path / "longer", seed=3
    )
    capsys.readouterr()
    result = longnet_dist.train(longer)
    assert (len(result.losses), result.step) == (2, 2)
    assert result.losses[0] == pytest.approx(first_loss(longer, load_model(trained.run_folder)), rel=1e-5)
    new = longnet_dist.train(dataclasses.replace(longer, init_from=None, run_folder=tmp_path / "new"))
    assert result.losses[0] < new.losses[0] - 0.1
    printed = capsys.readouterr().out.replace("\n", " ")
    assert f"step 0 has the weights of {folder}" in printed
    assert "segment_lengths (32, 128) there, (64, 512) here" in printed
    assert json.loads((tmp_path / "longer" / "config.json").read_text())["init_from"] == str(folder)


def test_a_run_with_initial_weights_resumes_from_its_own_checkpoint(trained, tmp_path, capsys):
    run = dataclasses.replace(trained, init_from=trained.run_folder, run_folder=tmp_path / "second", steps=4)
    whole = longnet_dist.train(run)
    for path in (tmp_path / "second" / "checkpoints").iterdir():
        path.rename(path.with_name("later"))
    longnet_dist.train(dataclasses.replace(run, steps=2))
    trained.run_folder.rename(tmp_path / "gone")  # A run that has a checkpoint needs the other run no longer.
    resumed = longnet_dist.train(dataclasses.replace(run, steps=4))
    assert len(resumed.losses) == 2
    assert len(whole.losses) == 4
    with pytest.raises(ValueError, match="holds checkpoints of a run that did not start from"):
        longnet_dist.train(dataclasses.replace(run, init_from=tmp_path / "other"))
    capsys.readouterr()
    assert app.main(["train", "--resume", str(run.run_folder), "--init-from", str(tmp_path / "gone")]) == 2
    assert "give only one of them" in " ".join(capsys.readouterr().err.split())


def test_initial_weights_of_other_shapes_are_listed(trained, tmp_path):
    model = dataclasses.replace(trained.model, ffn_dim=32, qk_norm=True)
    with pytest.raises(ValueError, match="needs its sizes") as error:
        longnet_dist.train(
            dataclasses.replace(trained, init_from=trained.run_folder, model=model, run_folder=tmp_path / "other")
        )
    for part in ("blocks.0.ffn.fc1.weight is (64, 16) there and (32, 16) here", "q_norm.weight is missing there and"):
        assert part in str(error.value)
    assert "embedding" not in str(error.value)
    with pytest.raises(ValueError, match=r"init_from .*nothing: .*nothing holds no checkpoints/step-\*"):
        longnet_dist.train(
            dataclasses.replace(trained, init_from=tmp_path / "nothing", run_folder=tmp_path / "another")
        )
