"""A failure here means: a run on one process does not train, or does not say what it did."""

from __future__ import annotations

import json

import pytest
import torch

import longnet_dist
from longnet_dist import LongNetConfig, TrainConfig
from longnet_dist.checkpoint import load_model

TINY = LongNetConfig(d_model=16, num_layers=1, num_heads=2, segment_lengths=(32, 128), dilation_rates=(1, 4))


@pytest.fixture
def config(tmp_path):
    """A few small files, and a run of a few steps."""
    (tmp_path / "text").mkdir()
    for n in range(4):
        (tmp_path / "text" / f"{n}.txt").write_text(f"the same words again and again {n}\n" * 200)
    return TrainConfig(
        data=(str(tmp_path / "text"),), seq_len=128, steps=6, warmup_steps=2, validation_sequences=2, validate_every=3,
        run_folder=tmp_path / "run", cache=tmp_path / "cache", model=TINY,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_a_run_writes_its_folder(config, capsys):
    result = longnet_dist.train(config)
    lines = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "tokens", "tokens_per_second", "lr", "grad_norm"} <= line.keys() for line in lines)
    assert [line["tokens"] for line in lines] == [128 * n for n in range(1, 7)]
    assert ["validation_bits_per_byte" in line for line in lines] == [False, False, True] * 2
    assert tuple(line["loss"] for line in lines) == result.losses
    saved = json.loads((config.run_folder / "config.json").read_text())
    assert saved["model"]["d_model"] == 16
    assert saved["seq_len"] == 128
    assert list(config.run_folder.glob("events.out.tfevents.*"))
    said = capsys.readouterr().out
    assert "bits per byte; byte-unigram model" in said
    assert "tokens/s" in said
    model = load_model(config.run_folder / "checkpoint-6.pt")
    assert model(torch.zeros(1, 10, dtype=torch.int64)).shape == (1, 10, 257)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_accumulated_steps_are_steps_of_larger_batches(config):
    import dataclasses

    base = {"dtype": "float64", "steps": 3}
    one = longnet_dist.train(dataclasses.replace(config, **base, batch_size=4))
    many = longnet_dist.train(dataclasses.replace(config, **base, batch_size=2, grad_accumulation=2))
    assert one.losses == pytest.approx(many.losses, rel=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_it_learns(config):
    import dataclasses

    result = longnet_dist.train(dataclasses.replace(config, steps=60, learning_rate=1e-2, autocast=True))
    assert result.validation_bits_per_byte < result.unigram_bits_per_byte


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": ("nothing-there/",)}, "no file there"),
        ({"seq_len": 10**6}, "one sequence with the token after it is 1000001"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"validation_fraction": 1.5}, "must lie between 0 and 1"),
    ],
)
def test_bad_options_are_errors_before_any_step(config, change, said):
    import dataclasses

    with pytest.raises(ValueError, match=said):
        longnet_dist.train(dataclasses.replace(config, **change))
