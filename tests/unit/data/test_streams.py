"""A failure here means: a stream that breaks, or Ctrl-C, costs what was tokenised, or is not heeded."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time

import pytest

from longnet_dist.data import hugging_face, writing
from longnet_dist.data.corpus import open_corpus, tokenize
from longnet_dist.data.shards import read_index
from longnet_dist.data.tokenizers import Bytes

DOCUMENTS = [f"document {n}, ümlaut and all\n".encode() * (n % 5) for n in range(40)]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A dataset of two files of JSON lines."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "rows").mkdir()
    for part in (0, 1):
        lines = [json.dumps({"text": d.decode()}) + "\n" for d in DOCUMENTS[20 * part : 20 * part + 20]]
        (tmp_path / "rows" / f"rows-{part}.jsonl").write_text("".join(lines))
    return tmp_path / "rows"


def test_a_stream_that_breaks_is_opened_again(rows, tmp_path, monkeypatch, capfd):
    """The second file is damaged, and mended while the stream waits."""
    good = (rows / "rows-1.jsonl").read_text()
    (rows / "rows-1.jsonl").write_text('{"text": "cut')
    monkeypatch.setattr(hugging_face, "WAITS", (0.0, 0.0))
    notes = []

    def note(text):
        notes.append(text)
        if len(notes) == 2:
            (rows / "rows-1.jsonl").write_text(good)

    monkeypatch.setattr(hugging_face, "print_note", note)
    folder = tokenize([f"hf:{rows}"], tmp_path / "out", tmp_path)
    tokens = open_corpus([str(folder)], tmp_path, 0.0).train.tokens(10**6)
    assert Bytes().decode(tokens.tolist()) == b"".join(DOCUMENTS)
    assert read_index(folder).shards[0].documents == len(DOCUMENTS)
    assert len(notes) == 2
    assert all("failed after row 20, and is opened again in 0 s" in text for text in notes)


def test_a_stream_that_stays_broken_keeps_what_it_had(rows, tmp_path, monkeypatch):
    """The next start reads nothing again: the first file has other rows then."""
    good = (rows / "rows-1.jsonl").read_text()
    (rows / "rows-1.jsonl").write_text('{"text": "cut')
    monkeypatch.setattr(hugging_face, "WAITS", (0.0,))
    monkeypatch.setattr(writing, "_BATCH_DOCUMENTS", 5)
    with pytest.raises(ValueError, match=r"rows cannot be opened or read after row 20, tried 2 times: "):
        tokenize([f"hf:{rows}"], tmp_path / "out", tmp_path)
    (rows / "rows-1.jsonl").write_text(good)
    (rows / "rows-0.jsonl").write_text('{"text": "other rows"}\n' * 20)
    folder = tokenize([f"hf:{rows}"], tmp_path / "out", tmp_path)
    tokens = open_corpus([str(folder)], tmp_path, 0.0).train.tokens(10**6)
    assert Bytes().decode(tokens.tolist()) == b"".join(DOCUMENTS)


@pytest.mark.parametrize("command", [("tokenize", "--out"), ("train", "--seq-len", "1024", "--cache")])
def test_an_interrupt_ends_a_tokenisation_at_once(tmp_path, command):
    """Ctrl-C: one line, no traceback, and what was tokenised is kept."""
    text = tmp_path / "text.jsonl"
    with text.open("w") as out:
        for n in range(200_000):
            out.write(json.dumps({"text": f"{n} " * 300}) + "\n")
    name, *options = command
    data = [str(text)] if name == "tokenize" else ["--data", str(text)]
    words = [sys.executable, "-m", "longnet_dist", name, *data, *options, str(tmp_path / "out")]
    # A shell that runs the tests in the background has made them ignore SIGINT, which their children inherit.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    job = subprocess.Popen(words, cwd=tmp_path, preexec_fn=heed, **pipes)
    deadline = time.monotonic() + 60
    while not any((tmp_path / "out").glob("**/partial.json")) and time.monotonic() < deadline:
        time.sleep(0.01)  # Only its files show its progress.
    began = time.monotonic()
    job.send_signal(signal.SIGINT)
    output = job.communicate(timeout=30)[0]
    assert time.monotonic() - began < 5, "it should take less than a second"
    assert job.returncode == 130
    assert "Traceback" not in output
    assert "longnet-dist: interrupted" in output
    (partial,) = (tmp_path / "out").glob("**/partial.json")
    assert json.loads(partial.read_text())["resume"]
