"""A tiny training run, for the tests of training in one process."""

from __future__ import annotations

import pytest

from longnet_dist import LongNetConfig, TrainConfig

TINY = LongNetConfig(d_model=16, num_layers=1, num_heads=2, segment_lengths=(32, 128), dilation_rates=(1, 4))


@pytest.fixture
def config(tmp_path):
    """A run of a few steps over a few small files."""
    (tmp_path / "text").mkdir()
    for n in range(4):
        (tmp_path / "text" / f"{n}.txt").write_text(f"the same words again and again {n}\n" * 200)
    return TrainConfig(
        data=(str(tmp_path / "text"),), seq_len=128, steps=6, warmup_steps=2, validation_sequences=2, validate_every=3,
        run_folder=tmp_path / "run", cache=tmp_path / "cache", model=TINY,
    )  # fmt: skip
