"""A failure here means: a mistake is answered by a traceback, or not at all, in place of a line that explains it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

import longnet_dist
from longnet_dist import LongNetConfig, TrainConfig
from longnet_dist.cli import app
from longnet_dist.plan.pattern import Pattern
from longnet_dist.training.job import read_config
from longnet_dist.training.parallel import ParallelConfig

TINY = (
    *("--seq-len", "64", "--steps", "2", "--data", "text.txt", "--cache", "cache", "--run-folder", "run"),
    *("--model.d-model", "16", "--model.num-layers", "1", "--model.num-heads", "2"),
    *("--model.segment-lengths", "64", "--model.dilation-rates", "1"),
)


@pytest.fixture(autouse=True)
def _text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some words again\n" * 400)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def refusal(arguments, capsys) -> str:
    """Run a command that must fail, and return its line on stderr."""
    capsys.readouterr()
    try:
        status = app.main(arguments)
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status in (1, 2)
    assert error.startswith("longnet-dist: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "x"),
        OSError(28, "No space left on device"),
        BlockingIOError(11, "no lock"),
        RuntimeError("first\n  second\n"),
        NotImplementedError("no kernel"),
        RecursionError("maximum recursion depth exceeded"),
        OverflowError("too large"),
        MemoryError(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ],
)
def test_failures_are_one_line(error, monkeypatch, capsys):
    def fail(config):
        raise error

    monkeypatch.setattr("longnet_dist.training.trainer.train", fail)
    assert len(refusal(["train"], capsys)) > len("longnet-dist: \n")


@pytest.mark.parametrize("error", [AssertionError, TypeError, AttributeError, KeyError, IndexError])
def test_our_own_errors_keep_their_traceback(error, monkeypatch):
    def fail(config):
        raise error

    monkeypatch.setattr("longnet_dist.training.trainer.train", fail)
    with pytest.raises(error):
        app.main(["train"])


FLOATS = [f.name for f in dataclasses.fields(TrainConfig) if f.type == "float"]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("option", [*FLOATS, "model.dropout", "betas"])
def test_numbers_are_finite(option, value, capsys):
    values = [value, value] if option == "betas" else [value]
    option = option.replace("_", "-")
    assert option.split(".")[-1].replace("-", "_") in refusal(["train", *TINY, f"--{option}", *values], capsys)


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("timeout", "0", "at least 0.001"),
        ("timeout", "1e300", "at most 1e+08"),
        ("io-timeout", "1e12", "at most 1e+08"),
        ("seed", str(2**44), "at most 1099511627776"),
        ("seed", str(-(2**70)), "at most 281474976710656"),
        ("seq-len", str(2**63), "at most 281474976710656"),
        ("steps", str(2**70), "at most 281474976710656"),
        ("model.ffn-dim", "-1", "at least 1"),
        ("model.ffn-dim", "0", "at least 1"),
        ("model.num-kv-heads", "-2", "at least 1"),
        ("model.vocab-size", str(2**63), "at most 2^48"),
        ("model.segment-lengths", str(2**63 - 1), "at most 281474976710656"),
        ("model.segment-lengths", str(2**70), "at most 281474976710656"),
        ("model.d-model", str(2**40), ""),
    ],
)
def test_sizes_are_those_of_a_computer(option, value, rule, capsys):
    assert rule in refusal(["train", *TINY, f"--{option}", value], capsys)


def test_betas_are_below_one():
    with pytest.raises(ValueError, match="betas is"):
        TrainConfig(betas=(0.9, 1.0))


@pytest.mark.parametrize("length", [2**63 - 1, 2**63, 2**70])
def test_segments_are_those_of_a_computer(length):
    with pytest.raises(ValueError, match=f"segment_lengths has {length}; every entry must be at most"):
        Pattern((length,), (1,))
    assert Pattern((2**48,), (1,))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_are_too_few(dtype):
    q = torch.ones(1, 16, 2, 8).to(dtype)
    with pytest.raises(ValueError, match=rf"torch does not compute in {dtype}: convert q, k and v to torch.bfloat16"):
        longnet_dist.dilated_attention(q, q, q, pattern=Pattern((8,), (1,)))


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"LOCAL_RANK": "5"}, "LOCAL_RANK is '5'; it must be an integer of at least 0 and below the number of ranks"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; it must be an integer of at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, and RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2'; it must be an integer of at least 0 and below the number"),
        ({"WORLD_SIZE": "2", "RANK": "1.5"}, "RANK is '1.5'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "2"}, "LOCAL_RANK is '2'"),
    ],
)
def test_the_variables_of_a_launcher_are_checked(variables, problem, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert problem in refusal(["train", *TINY], capsys)


def test_weights_and_biases_without_a_key(tmp_path):
    """In a process of its own, with which the server of Weights & Biases ends."""
    environment = {n: x for n, x in os.environ.items() if not n.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "WANDB_SILENT": "true", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "longnet_dist", "train", *TINY, "--wandb", "project"]
    with (tmp_path / "errors").open("w") as out:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, timeout=100
        )
    assert done.returncode == 2
    text = (tmp_path / "errors").read_text()
    assert "longnet-dist: --wandb project: " in text
    assert "set WANDB_API_KEY or WANDB_MODE=offline, or leave the option out" in text
    assert "Traceback" not in text


STEP = {"step": 1, "tokens": 100, "loss": 1.5}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[1, 2]", "line 2 is list; it must be an object"),
        ("null", "line 2 is NoneType"),
        ("{", "line 2 cannot be read"),
        ("[" * 100_000, "line 2 cannot be read"),
        (json.dumps(STEP | {"loss": "1.5"}), "line 2 has loss '1.5'; it must be a finite number or null"),
        (json.dumps(STEP | {"tokens": None}), "line 2 has tokens None; it must be a finite number"),
        (json.dumps(STEP | {"grad_norm": True}), "line 2 has grad_norm True"),
        (json.dumps(STEP | {"loss": float("inf")}), "line 2 has loss inf"),
        (json.dumps(STEP | {"peak_memory_bytes": 10**400}), "line 2 has peak_memory_bytes 1000"),
        (json.dumps({"tokens": 100, "loss": 1.5}), "line 2 has no step; it must be a finite number"),
        (json.dumps({"step": 1, "loss": 1.5}), "line 2 has no tokens"),
    ],
)
@pytest.mark.parametrize("out", ["x.png", "x.html"])
def test_odd_metrics_are_named_by_line(line, problem, out, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(STEP) + "\n" + line + "\n")
    assert f"metrics.jsonl, {problem}" in refusal(["report", str(tmp_path), "--out", out], capsys)


def test_a_report_of_values_that_are_null(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(STEP | {"loss": None, "mfu": None}) + "\n" + "unfinished")
    assert app.main(["report", str(tmp_path), "--out", "x.html"]) == 0


def config_of(tmp_path, **options):
    (tmp_path / "config.json").write_text(json.dumps(options))
    return read_config(tmp_path)


def test_an_older_config_has_defaults(tmp_path):
    config = config_of(tmp_path, seq_len=64, model={"d_model": 32, "num_heads": 2})
    assert config == TrainConfig(seq_len=64, model=LongNetConfig(d_model=32, num_heads=2))
    assert config_of(tmp_path, model={}, parallel={"sp": 1}).parallel == ParallelConfig(sp=1)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"model": {"width": 3}}, "model has unknown options: width"),
        ({"parallel": {"tp": 3}}, "parallel has unknown options: tp"),
        ({"model": 3}, ""),
        ({"seq_len": "x"}, ""),
        ({"model": {"d_model": "x"}}, "d_model is 'x'"),
        ({"steps": None}, ""),
    ],
)
def test_an_odd_config_is_named(options, problem, tmp_path):
    with pytest.raises(ValueError, match=f"config.json does not hold the options of a run: .*{problem}"):
        config_of(tmp_path, **options)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json does not hold the options of a run"):
        read_config(tmp_path)
