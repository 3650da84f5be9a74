"""A failure here means: a command in the documents trains a model that does not see the whole sequence."""

from __future__ import annotations

import re
import shlex
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from longnet_dist.cli.app import parse
from longnet_dist.models.config import LongNetConfig
from longnet_dist.training.config import TrainConfig

ROOT = Path(__file__).parents[3]
FILES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "launchers").iterdir(), ROOT / "Makefile"]
LONGEST = 1 << 16
"""Longer sequences are cut to this, so that a model can read them here."""


def commands() -> list[tuple[str, list[str]]]:
    """Return the arguments of every training command in the documents and launchers, by file."""
    found = []
    for path in FILES:
        text = path.read_text().replace("\\\n", " ")
        for line in text.splitlines():
            match = re.search(r"longnet[-_]dist train (.*)", line)
            if match and ("--" in match[1] or "$@" in match[1]):
                found.append((path.name, shlex.split(match[1].partition("`")[0], comments=True)))
    return [entry for entry in found if not {"--help", "--resume"} & {*entry[1]}]


def train_config(arguments: list[str]) -> TrainConfig:
    """Return the options of a command, as the command line reads them."""
    known = [argument for argument in arguments if argument not in ("$@", "...")]
    call = parse(["train", *(argument.replace("$RANKS", "2") for argument in known)])
    return call.keywords["config"]


@pytest.mark.parametrize(("file", "arguments"), commands())
def test_each_command_trains_on_the_whole_sequence(file, arguments):
    config = train_config(arguments)
    assert config.model.pattern.reach(config.seq_len) == config.seq_len
    assert last_logits_depend_on_the_first_tokens(min(config.seq_len, LONGEST))


def test_given_branches_are_kept():
    branches = ["--model.segment-lengths", "64", "256", "--model.dilation-rates", "1", "4"]
    assert train_config(["--seq-len", "4096", *branches]).model.segment_lengths == (64, 256)
    assert train_config(["--seq-len", "5000"]).model.segment_lengths == (1024, 4096, 16384)


@lru_cache
def last_logits_depend_on_the_first_tokens(seq_len: int) -> bool:
    """Return whether the logits at the end change with the tokens at the start, in the default pattern."""
    torch.manual_seed(0)
    model = TrainConfig(seq_len=seq_len, model=LongNetConfig(d_model=8, num_layers=2, num_heads=4)).model.build().eval()
    tokens = torch.randint(257, (1, seq_len))
    changed = tokens.clone()
    changed[:, :64] = (tokens[:, :64] + 1) % 257
    with torch.no_grad():
        before, after = (model.output(model.features(x)[:, -1]) for x in (tokens, changed))
    return not torch.equal(before, after)


def test_the_documents_have_such_commands():
    assert {"README.md", "ray.md", "torchrun.sh"} <= {file for file, _ in commands()}
