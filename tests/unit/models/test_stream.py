"""A failure here means: a stream that is read part by part, or resumed, has another likelihood than the whole."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from longnet_dist import LongNetConfig
from longnet_dist.inference.embed import embeddings
from longnet_dist.inference.stream import FileBytes, Progress, Reading, Repeated, embedding_of_stream, nats_by_position

CONFIG = LongNetConfig(d_model=16, num_layers=2, num_heads=2, segment_lengths=(8, 32, 512), dilation_rates=(1, 4, 16))
EDGES = (10, 100, 4000)


def build():
    torch.manual_seed(0)
    return CONFIG.build(dtype=torch.float64).eval()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(i * i % 251 for i in range(1000)))
    return path


def whole(model, file):
    """Return the negative log-likelihood of each range of positions, from one forward."""
    ids = torch.tensor(list(file.read_bytes()))
    nats = -model.score(ids)
    return [(a, b, nats[a:b].sum().item()) for a, b in ((0, 10), (10, 100), (100, 999))]


@pytest.mark.parametrize("part", [1000, 64, 37])
def test_a_stream_has_the_likelihood_of_the_whole(file, part):
    model, read = build(), []
    found = nats_by_position(model, FileBytes(file), EDGES, Reading(part=part, progress=read.append))
    assert sum(read) == 999
    for (a, b, nats), (first, last, expected) in zip(found, whole(model, file), strict=True):
        assert (a, b) == (first, last)
        assert nats == pytest.approx(expected, abs=1e-9)


def killed(read, model, file, reading, parts):
    """Call `read` in a process of its own, which is killed when it has read some parts."""

    def work():
        torch.set_num_threads(1)
        seen = []

        def die(tokens):
            seen.append(tokens)
            if len(seen) == parts:
                os.kill(os.getpid(), signal.SIGKILL)

        read(model, FileBytes(file), reading=replace(reading, progress=die))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_stream_resumes_to_the_same_number(file, tmp_path):
    """The state is saved after each part; the second call reads only what is left, and removes the state."""
    model, state = build(), tmp_path / "state"
    reading = Reading(state, "this", save_every=0, part=64)
    by_position = partial(nats_by_position, edges=EDGES)
    killed(by_position, model, file, reading, 10)
    assert state.exists()
    with pytest.raises(ValueError, match=r"is the state of this; .*, not of that; "):
        by_position(model, FileBytes(file), reading=replace(reading, identity="that"))
    again = []
    resumed = by_position(model, FileBytes(file), reading=replace(reading, progress=again.append))
    assert again == [576, 64, 64, 64, 64, 64, 64, 39]  # The part after the last saving is read again.
    assert resumed == by_position(model, FileBytes(file), reading=Reading(part=64))
    assert not state.exists()


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("part", [1000, 64, 37])
def test_a_stream_has_the_embedding_of_the_whole(file, part, pooling):
    model = build()
    expected = embeddings(model, torch.tensor(list(file.read_bytes()))[None], pooling=pooling)[0]
    assert_close(embedding_of_stream(model, FileBytes(file), pooling, Reading(part=part)), expected)


def test_a_killed_embedding_resumes_to_the_same_numbers(file, tmp_path):
    model, reading = build(), Reading(tmp_path / "state", save_every=0, part=64)
    killed(embedding_of_stream, model, file, reading, 3)
    with pytest.raises(ValueError, match="is the state of"):
        nats_by_position(model, FileBytes(file), EDGES, reading)
    resumed = embedding_of_stream(model, FileBytes(file), reading=reading)
    assert_close(resumed, embedding_of_stream(model, FileBytes(file), reading=Reading(part=64)), rtol=0, atol=0)


def test_a_terminal_shows_a_bar_and_a_file_shows_lines(monkeypatch, capsys):
    for is_terminal in (True, False):
        monkeypatch.setattr("sys.stderr.isatty", lambda is_terminal=is_terminal: is_terminal)
        progress = Progress(101, every=0)
        for _ in range(10):
            progress(10)
        shown = capsys.readouterr().err
        assert "read 100 of 101 tokens (99.0%)" in shown
        assert shown.endswith("\n")
        assert ("\r[##############################]" in shown) == is_terminal
        assert shown.count("\n") == (1 if is_terminal else 9)  # The first part has no speed yet.


def test_tokens_can_be_repeated():
    tokens = Repeated(torch.arange(5).numpy(), 12)
    assert len(tokens) == 12
    assert tokens.read(3, 12).tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_a_file_of_one_byte_raises(tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(ValueError, match="has 1 tokens; the first is not predicted"):
        FileBytes(tmp_path / "x")
