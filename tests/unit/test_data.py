"""A failure here means: what is trained on is not what the files hold, or bad input passes in silence."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow
import pytest
import torch
import zstandard
from pyarrow import parquet

from longnet_dist.data.corpus import open_corpus, unigram_bits, window_order
from longnet_dist.data.sources import find_files, read_documents, standard_library
from longnet_dist.data.tokenizers import Bytes


@pytest.fixture
def folder(tmp_path):
    """Three files, one of them hidden, one not text, one in a subfolder."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_bytes(b"first\n")
    (tmp_path / "sub" / "b.bin").write_bytes(bytes(range(256)))
    (tmp_path / ".hidden").write_bytes(b"no")
    return tmp_path


def test_finds_files_folders_and_globs_once(folder):
    found = find_files([str(folder), str(folder / "a.py"), str(folder / "**" / "*.bin")])
    assert [p.name for p in found] == ["a.py", "b.bin"]


@pytest.mark.parametrize("missing", ["nothing.txt", "*.rs", "empty/"])
def test_what_matches_nothing_is_an_error(folder, missing):
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="no file there"):
        find_files([str(folder / missing)])


def corpus_of(data, cache, fraction=0.1):
    return open_corpus([str(data)], cache, fraction)


def test_the_stream_is_every_byte_and_an_end_after_each_document(folder, tmp_path_factory):
    corpus = corpus_of(folder, tmp_path_factory.mktemp("cache"))
    tokens = np.concatenate([corpus.train.tokens(10**6), corpus.validation.tokens(10**6)])
    documents = np.split(tokens, np.flatnonzero(tokens == Bytes.end_of_document) + 1)
    assert sorted(bytes(d[:-1].astype(np.uint8)) for d in documents if len(d)) == [bytes(range(256)), b"first\n"]
    assert len(corpus.validation.tokens(10**6)) == int(len(tokens) * 0.1)


def test_what_is_built_is_used_again_until_a_file_changes(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    first = corpus_of(folder, cache)
    written = (first.folder / "index.json").stat().st_mtime_ns
    assert (corpus_of(folder, cache).folder / "index.json").stat().st_mtime_ns == written
    (folder / "a.py").write_bytes(b"changed\n")
    assert corpus_of(folder, cache).folder != first.folder


def test_windows_cover_the_stream_and_labels_are_the_next_tokens(folder, tmp_path_factory):
    stream = corpus_of(folder, tmp_path_factory.mktemp("cache")).train
    whole = stream.tokens(10**6).astype(np.int64)
    assert stream.num_windows(50) == (len(whole) - 1) // 50
    for window in range(stream.num_windows(50)):
        for first, last in ((0, 50), (0, 20), (20, 50), (50, 50)):
            tokens, labels = stream.read(window, 50, first, last)
            begin = window * 50 + first
            assert tokens.tolist() == whole[begin : begin + last - first].tolist()
            assert labels.tolist() == whole[begin + 1 : begin + 1 + last - first].tolist()


def test_an_epoch_is_every_window_once_and_the_next_another_order():
    first, second = (window_order(100, epoch, seed=0) for epoch in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(100))
    assert first.tolist() != second.tolist()
    assert first.tolist() == window_order(100, 0, seed=0).tolist()


def test_unigram_bits_of_two_bytes(tmp_path):
    """Of 300 a, 100 b and one end, each and every other id once more."""
    (tmp_path / "text").write_text("aaab" * 100)
    stream = corpus_of(tmp_path / "text", tmp_path, 0.0).train
    total = 401 + 257
    expected = -(math.log2(301 / total) + math.log2(101 / total)) / 2
    assert math.isclose(unigram_bits(stream, np.frombuffer(b"ab", np.uint8)), expected)


def test_the_default_corpus_is_there():
    files = standard_library()
    assert sum(p.stat().st_size for p in files) > 5_000_000
    assert torch.tensor([p.suffix == ".py" for p in files]).all()


TEXTS = ["first", "zweites, mit Umlaut: ü", "", "last\nof two lines"]


def _written(folder, kind, texts=TEXTS):
    path = folder / f"rows.{kind}"
    lines = "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts).encode()
    if kind == "jsonl":
        path.write_bytes(lines)
    elif kind == "jsonl.zst":
        path.write_bytes(zstandard.ZstdCompressor().compress(lines))
    else:
        parquet.write_table(pyarrow.table({"text": texts, "other": [1] * len(texts)}), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "parquet"])
def test_rows_are_documents(tmp_path, kind):
    path = _written(tmp_path, kind)
    assert [d.decode() for d in read_documents(path)] == TEXTS
    tokens = corpus_of(path, tmp_path / "cache").train.tokens(10**6)
    assert bytes(tokens[:5].astype(np.uint8)) == b"first"
    assert tokens[5] == Bytes.end_of_document


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{not json}", r"line 2, byte 18: Expecting property name"),
        (b'{"other": 1}', r"line 2, byte 18: it is no object with 'text'"),
        (b"[1]", r"line 2, byte 18: it is no object with 'text'"),
        (b'{"text": 5}', r"line 2, byte 18: its 'text' is int, not text"),
        (b'{"text": "\\ud800"}', r"line 2, byte 18: .* surrogates not allowed"),
        (b'{"text": "\xff"}', r"line 2, byte 28: it is not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine" }\n' + line + b"\n")
    with pytest.raises(ValueError, match=said):
        corpus_of(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_bad_archives_are_named(tmp_path):
    compressed = _written(tmp_path, "jsonl.zst")
    compressed.write_bytes(b"not zstandard")
    with pytest.raises(ValueError, match=r"rows.jsonl.zst cannot be decompressed"):
        list(read_documents(compressed))
    table = _written(tmp_path, "parquet")
    with pytest.raises(ValueError, match=r"has no column 'body'; it has text, other"):
        list(read_documents(table, "body"))
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"rows.parquet cannot be read as Parquet"):
        list(read_documents(table))
