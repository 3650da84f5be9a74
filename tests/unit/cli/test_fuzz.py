"""A failure here means: nonsense on the command line, or in a file, ends in a traceback, a hang or a silent success."""

from __future__ import annotations

import dataclasses
import inspect
import json
import multiprocessing
import os
import random
import shutil
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longnet_dist import TrainConfig
from longnet_dist.checkpoints.checkpoints import CheckpointError, Checkpoints
from longnet_dist.checkpoints.storage import MANIFEST
from longnet_dist.cli import app
from longnet_dist.data.corpus import open_corpus
from longnet_dist.data.sources import read_documents

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LIMIT = 30
"""Seconds after which a command counts as hung."""
TINY = (
    *("--seq-len", "32", "--steps", "1", "--data", "text.txt", "--cache", "cache"),
    *("--model.d-model", "16", "--model.num-layers", "1", "--model.num-heads", "2"),
    *("--model.segment-lengths", "32", "--model.dilation-rates", "1"),
)
COMMANDS = {
    "train": ["train", *TINY],
    "tokenize": ["tokenize", "text.txt", "--out", "tokens"],
    "draw": ["draw", "--seq-len", "16"],
    "plan": ["plan"],
    "eval": ["eval", "run", "--edges", "8"],
    "score": ["score", "text.txt", "--model", "run"],
    "embed": ["embed", "text.txt", "--model", "run", "--out", "vectors"],
    "generate": ["generate", "run", "--prompt", "a", "--max-new-tokens", "2"],
    "report": ["report", "run"],
    "doctor": ["doctor", "--cluster"],
}
NONSENSE = {
    int: ("nonsense", "1.5", "nan", "", "-1", str(1 << 63), str(1 << 70)),
    float: ("nonsense", "nan", "inf", "-inf", "-1", ""),
    bool: ("nonsense",),
    Path: ("", "s3://bucket/x", "/dev/null/x", "~nobody-of-this-name/x"),
}
CHOICE = ("nonsense", "", "nan")
SENSIBLE = {("train", "seed", "-1"), ("tokenize", "seed", "-1"), ("train", "ray.max-failures", "-1")}


def options_of(hint: Any, name: str) -> Iterator[tuple[str, type | None]]:
    """Yield each option that a parameter makes, with the type of its value; None for a choice."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        prefix = "" if hint is TrainConfig else f"{name}."
        for field in dataclasses.fields(hint):
            yield from options_of(hints[field.name], prefix + field.name.replace("_", "-"))
    elif typing.get_origin(hint) is typing.Literal or name.endswith("kernel"):
        yield name, None
    else:
        kinds = [hint, *typing.get_args(hint)]
        yield from ((name, kind) for kind in NONSENSE if kind in kinds)


def cases() -> Iterator[tuple[str, str, str]]:
    for command in COMMANDS:
        function = app.SUBCOMMANDS[command]
        hints = typing.get_type_hints(function, include_extras=True)
        for parameter in inspect.signature(function).parameters:
            hint = hints[parameter]
            for option, kind in options_of(hint, parameter.replace("_", "-")):
                for value in CHOICE if kind is None else NONSENSE[kind]:
                    yield command, option, value


def run_quietly(arguments: list[str], log: str, results: Any) -> None:
    """Run a command in a process of its own, and report its exit status, or the exception that left it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    try:
        result: object = app.main(arguments)
    except SystemExit as end:
        result = end.code
    except BaseException as error:
        result = repr(error)
    sys.stdout.flush()
    sys.stderr.flush()
    results.send(result)


def outcome(arguments: list[str]) -> object:
    """Return the exit status of a command, or what went wrong in it, which includes a hang."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_quietly, args=(arguments, "log", sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(LIMIT) else "a hang"
    except EOFError:
        return "a crash"
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize(
    "command",
    [pytest.param(name, marks=[pytest.mark.exhaustive] if name == "generate" else []) for name in COMMANDS],
)
@pytest.mark.timeout(600)
def test_nonsense_on_the_command_line_is_refused(command, tmp_path, monkeypatch):
    """A new option is covered as soon as it has a type. Each value must be refused with exit status 1 or 2.

    Options of type text are left out, because any text may be right. No cluster is at RAY_ADDRESS.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    Path("text.txt").write_text("some words again\n" * 100)
    assert outcome(["train", *TINY, "--run-folder", "run"]) == 0, Path("log").read_text()
    wrong = {}
    for name, option, value in cases():
        if name == command and (name, option, value) not in SENSIBLE:
            launcher = ["--launcher", "ray", "--run-folder", "other"] if option.startswith("ray.") else []
            result = outcome([*COMMANDS[command], *launcher, f"--{option}={value}"])
            text = Path("log").read_text()
            accepted = result not in (1, 2) or "nothing answers at" in text
            if accepted or "Traceback" in text or not text.strip():
                wrong[f"{command} --{option}={value!r}"] = result
    assert not wrong, "\n".join(f"{case}: {result}" for case, result in wrong.items())


def garbled(content: bytes, random_: random.Random) -> bytes:
    """Flip bytes of a file, cut it, or replace it."""
    data = bytearray(content)
    match random_.randrange(4):
        case 0:
            data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        case 1:
            data = data[: random_.randrange(len(data))]
        case 2:
            data = bytearray(random_.randbytes(random_.randrange(200)))
        case _:
            at = random_.randrange(len(data))
            data[at : at + 8] = random_.randbytes(8)
    return bytes(data)


def try_garbled(folder: Path, files: list[str], use: Callable[[Path], object], times: int) -> None:
    """Garble each file of copies of a folder, and use the copy, which may raise nothing but errors for people."""
    random_ = random.Random(0)
    for _ in range(times):
        for file in files:
            copy = folder.parent / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
            (copy / file).write_bytes(garbled((copy / file).read_bytes(), random_))
            try:
                use(copy)
            except (ValueError, CheckpointError, OSError):
                pass
            except Exception as error:
                saved = (copy / file).read_bytes()
                raise AssertionError(f"{error!r} for {file} of {saved[:300]!r}") from error


@pytest.mark.parametrize("verified", [True, False])
def test_garbled_checkpoints(tmp_path, verified):
    """With and without the manifest's hashes, which a hostile author can compute."""
    tensors = {"model.a": torch.ones(30), "model.b": torch.zeros(4, 5, dtype=torch.float16)}
    Checkpoints(tmp_path / "run").save(1, tensors, {"step": 1})
    step = "step-00000001"
    files = sorted(path.name for path in (tmp_path / "run" / step).iterdir())

    def use(run: Path) -> None:
        checkpoints = Checkpoints(run)
        if verified:
            checkpoints.newest(lambda message: None)
            raise AssertionError("garbled bytes were not noticed")
        loaded = {name: torch.empty_like(x) for name, x in tensors.items()}
        checkpoints.load(run / step, loaded)

    names = [name for name in files if verified or name != MANIFEST]
    try_garbled(tmp_path / "run", [f"{step}/{name}" for name in names], use, 60)


def test_garbled_data(tmp_path):
    import gzip

    folder = tmp_path / "data"
    folder.mkdir()
    rows = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(20)).encode()
    (folder / "rows.jsonl").write_bytes(rows)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(rows))
    try:
        import pyarrow
        import zstandard
        from pyarrow import parquet
    except ImportError:
        pass
    else:
        (folder / "rows.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(rows))
        parquet.write_table(pyarrow.table({"text": [f"document {i}" for i in range(20)]}), folder / "rows.parquet")
    files = sorted(path.name for path in folder.iterdir())
    try_garbled(folder, files, lambda copy: [list(read_documents(copy / file)) for file in files], 60)


def test_garbled_tokens(tmp_path):
    (tmp_path / "text.txt").write_text("some words again\n" * 100)
    built = open_corpus([str(tmp_path / "text.txt")], tmp_path / "cache", 0.1).folder
    files = ["index.json", "tokens-00000.bin"]

    def use(copy: Path) -> None:
        open_corpus([str(copy)], tmp_path / "cache", 0.1).train.read(0, 8, 0, 8)

    try_garbled(built, files, use, 60)


@pytest.mark.parametrize(
    "line", ["", "3", "null", "[]", '{"text": null}', '{"text": {}}', '"text"', '{"text": "\\ud800"}']
)
def test_odd_rows(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    if line:
        with pytest.raises(ValueError, match=r"rows\.jsonl, line 1"):
            list(read_documents(tmp_path / "rows.jsonl"))
    else:
        assert not list(read_documents(tmp_path / "rows.jsonl"))
