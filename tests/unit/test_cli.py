"""A failure here means: the command line does not do what its help says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from longnet_dist import LongNetConfig, TrainConfig
from longnet_dist.cli import app


@pytest.mark.parametrize("ending", ["png", "svg"])
@pytest.mark.parametrize("options", [[], ["--ranks", "4", "--heads", "6"], ["--no-causal", "--head-phases", "blocked"]])
def test_draw(tmp_path, ending, options, capsys):
    out = tmp_path / f"pattern.{ending}"
    assert app.main(["draw", "--out", str(out), *options]) == 0
    assert out.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seq-len", "100000"], "a picture shows 1 to 1024 tokens"),
        (["--dilation-rates", "1", "2"], "segment_lengths has 3 entries"),
        (["--out", "pattern.xyz"], "ends in .png, .svg or .pdf"),
    ],
)
def test_errors_are_one_line_and_exit_2(options, said, capsys):
    assert app.main(["draw", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not Path("pattern.xyz").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--ranks", "0"], "--ranks is 0"),
        (["plan", "--seq-len", "-5"], "--seq-len is -5"),
        (["plan", "--kv-heads", "3"], "must divide --heads 8"),
        (["draw", "--heads", "0"], "--heads is 0"),
        (["draw", "--out", "no-such-folder/x.png"], "no-such-folder"),
        (["draw", "--out", "noending"], "ends in .png"),
        (["train", "--run-folder", "pyproject.toml"], "pyproject.toml"),
        (["train", "--model.vocab-size", "100"], "vocab_size is 100"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, said, capsys):
    assert app.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_doctor(capsys):
    assert app.main(["doctor"]) == 0
    said = capsys.readouterr().out
    for expected in ("torch 2.", "gloo: usable", "cpu   float32   torch  usable", "cuda  bfloat16"):
        assert expected in said


def test_plan(capsys):
    assert app.main(["plan", "--ranks", "4"]) == 0
    said = capsys.readouterr().out
    assert "branch (w=8192, r=4): within the chunk" in said
    assert "branch (w=32768, r=16): 12,582,912 bytes" in said


def test_help_documents_every_option(capsys):
    with pytest.raises(SystemExit):
        app.main(["train", "--help"])
    said = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        if field.name != "model":
            assert f"--{field.name.replace('_', '-')}" in said
    for field in dataclasses.fields(LongNetConfig):
        assert f"--model.{field.name.replace('_', '-')}" in said


def test_no_option_is_taken_by_torchrun():
    """torchrun reads abbreviations of its own options even after the module's name: --run would be one."""
    from torch.distributed.run import get_args_parser

    torchruns = {o for action in get_args_parser()._actions for o in action.option_strings}
    ours = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(TrainConfig)]
    assert not [o for o in ours if any(t.startswith(o) for t in torchruns)]
