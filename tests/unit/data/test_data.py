"""A failure here means: a run trains on something other than its files' content, or silently accepts bad input."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import json
import lzma
import math
import struct

import numpy as np
import pyarrow
import pytest
import torch
import zstandard
from pyarrow import parquet

from longnet_dist import TrainConfig
from longnet_dist.cli import app
from longnet_dist.data import corpus
from longnet_dist.data.corpus import open_corpus, tokenize, unigram_bits, window_order
from longnet_dist.data.sources import find_files, read_documents, standard_library
from longnet_dist.data.tokenizers import Bytes


@pytest.fixture
def folder(tmp_path):
    """A folder of three files: one is hidden, one is not UTF-8, one is in a subfolder."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_bytes(b"first\n")
    (tmp_path / "sub" / "b.bin").write_bytes(bytes(range(1, 256)))
    (tmp_path / ".hidden").write_bytes(b"no")
    return tmp_path


def test_files_folders_and_globs_are_found_once(folder):
    files = find_files([str(folder), str(folder / "a.py"), str(folder / "**" / "*.bin")])
    assert [p.name for p in files] == ["a.py", "b.bin"]


@pytest.mark.parametrize("missing", ["nothing.txt", "*.rs", "empty/"])
def test_a_path_without_files_is_refused(folder, missing):
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="no such file"):
        find_files([str(folder / missing)])


def corpus_of(data, cache, fraction=0.1):
    return open_corpus([str(data)], cache, fraction)


def test_the_stream_is_every_byte_and_an_end_of_document_after_each_document(folder, tmp_path_factory):
    corpus = corpus_of(folder, tmp_path_factory.mktemp("cache"))
    tokens = np.concatenate([corpus.train.tokens(10**6), corpus.validation.tokens(10**6)])
    documents = np.split(tokens, np.flatnonzero(tokens == Bytes.end_of_document) + 1)
    assert sorted(bytes(d[:-1].astype(np.uint8)) for d in documents if len(d)) == [bytes(range(1, 256)), b"first\n"]
    assert len(corpus.validation.tokens(10**6)) == int(len(tokens) * 0.1)


def test_tokens_are_reused_until_a_file_changes(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    first = corpus_of(folder, cache)
    modified = (first.folder / "index.json").stat().st_mtime_ns
    assert (corpus_of(folder, cache).folder / "index.json").stat().st_mtime_ns == modified
    (folder / "a.py").write_bytes(b"changed\n")
    assert corpus_of(folder, cache).folder != first.folder


def test_windows_cover_the_stream_and_labels_are_the_next_tokens(folder, tmp_path_factory):
    stream = corpus_of(folder, tmp_path_factory.mktemp("cache")).train
    all_tokens = stream.tokens(10**6).astype(np.int64)
    assert stream.num_windows(50) == (len(all_tokens) - 1) // 50
    for window in range(stream.num_windows(50)):
        for first, last in ((0, 50), (0, 20), (20, 50), (50, 50)):
            tokens, labels = stream.read(window, 50, first, last)
            begin = window * 50 + first
            assert tokens.tolist() == all_tokens[begin : begin + last - first].tolist()
            assert labels.tolist() == all_tokens[begin + 1 : begin + 1 + last - first].tolist()


def test_an_epoch_has_every_window_once_and_the_next_epoch_another_order():
    first, second = (window_order(100, epoch, seed=0) for epoch in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(100))
    assert first.tolist() != second.tolist()
    assert first.tolist() == window_order(100, 0, seed=0).tolist()


def test_tokens_are_counted_once(tmp_path, monkeypatch):
    """The counts are kept next to the tokens, and counted again if their file is damaged."""
    (tmp_path / "text").write_bytes(b"abracadabra" * 50)
    monkeypatch.setattr(corpus, "_COUNTED_AT_ONCE", 7)
    stream = open_corpus([str(tmp_path / "text")], tmp_path / "cache", 0.1).train
    counts = corpus.count_tokens(stream)
    expected = np.bincount(stream.tokens(1 << 20), minlength=257)
    assert (counts == expected).all()
    (kept,) = stream.folder.glob("unigram-*.npy")
    with monkeypatch.context() as context:
        context.setattr(np, "bincount", None)  # It is not called again.
        assert (corpus.count_tokens(stream) == expected).all()
    kept.write_bytes(kept.read_bytes()[:-8])
    assert (corpus.count_tokens(stream) == expected).all()
    other = dataclasses.replace(stream.index, shards=(dataclasses.replace(stream.index.shards[0], sha256="0"),))
    corpus.count_tokens(dataclasses.replace(stream, index=other))
    assert len(list(stream.folder.glob("unigram-*.npy"))) == 2  # Counts of other tokens are others.


def test_unigram_bits_of_two_bytes(tmp_path):
    """The stream has 300 a, 100 b and one end of document; one is added to the count of each of the 257 ids."""
    (tmp_path / "text").write_text("aaab" * 100)
    stream = corpus_of(tmp_path / "text", tmp_path, 0.0).train
    total = 401 + 257
    expected = -(math.log2(301 / total) + math.log2(101 / total)) / 2
    assert math.isclose(unigram_bits(stream, np.frombuffer(b"ab", np.uint8)), expected)


def test_the_default_corpus_is_python_source():
    files = standard_library()
    assert sum(p.stat().st_size for p in files) > 5_000_000
    assert torch.tensor([p.suffix == ".py" for p in files]).all()


TEXTS = ["first", "zweites, mit Umlaut: ü", "", "last\nof two lines"]


def write_rows(folder, row_format, texts=TEXTS):
    path, row_format = folder / f"rows.{row_format}", row_format.lower()
    lines = "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts).encode()
    if row_format == "jsonl":
        path.write_bytes(lines)
    elif row_format == "jsonl.zst":
        path.write_bytes(zstandard.ZstdCompressor().compress(lines))
    elif row_format == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    else:
        parquet.write_table(pyarrow.table({"text": texts, "other": [1] * len(texts)}), path)
    return path


@pytest.mark.parametrize("row_format", ["jsonl", "jsonl.zst", "jsonl.gz", "parquet", "JSONL", "jsonl.GZ"])
def test_rows_are_documents(tmp_path, row_format):
    path = write_rows(tmp_path, row_format)
    assert [d.decode() for d in read_documents(path)] == TEXTS
    tokens = corpus_of(path, tmp_path / "cache").train.tokens(10**6)
    assert bytes(tokens[:5].astype(np.uint8)) == b"first"
    assert tokens[5] == Bytes.end_of_document


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json}", r"line 2, byte 18: Expecting property name"),
        (b'{"other": 1}', r"line 2, byte 18: it is not an object with the key 'text'"),
        (b"[1]", r"line 2, byte 18: it is not an object with the key 'text'"),
        (b'{"text": 5}', r"line 2, byte 18: its 'text' is int, not text"),
        (b'{"text": "\\ud800"}', r"line 2, byte 18: .* surrogates not allowed"),
        (b'{"text": "\xff"}', r"line 2, byte 28: it is not UTF-8"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine" }\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        corpus_of(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_damaged_files_are_named(tmp_path):
    compressed = write_rows(tmp_path, "jsonl.zst")
    compressed.write_bytes(b"not zstandard")
    with pytest.raises(ValueError, match=r"rows.jsonl.zst cannot be decompressed"):
        list(read_documents(compressed))
    table = write_rows(tmp_path, "parquet")
    with pytest.raises(ValueError, match=r"has no column 'body'; it has text, other"):
        list(read_documents(table, "body"))
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"rows.parquet cannot be read as Parquet"):
        list(read_documents(table))


LINES = [json.dumps({"text": f"row {n}"}).encode() + b"\n" for n in range(20)]
HALVES = [b"".join(LINES[:10]), b"".join(LINES[10:])]
ZSTD, SKIPPABLE = zstandard.ZstdCompressor(), struct.pack("<II", 0x184D2A50, 5) + b"skips"
UNSIZED = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True)
ARCHIVES = {
    "one frame": ("zst", [ZSTD.compress(b"".join(LINES))]),
    "no content size": ("zst", [UNSIZED.compress(b"".join(LINES))]),
    "several frames": ("zst", [ZSTD.compress(half) for half in HALVES]),
    "skippable frames": ("zst", [SKIPPABLE, ZSTD.compress(HALVES[0]), SKIPPABLE, UNSIZED.compress(HALVES[1])]),
    "one member": ("gz", [gzip.compress(b"".join(LINES))]),
    "several members": ("gz", [gzip.compress(half) for half in HALVES]),
    "bzip2": ("bz2", [bz2.compress(half) for half in HALVES]),
    "xz": ("xz", [lzma.compress(half) for half in HALVES]),
}


@pytest.mark.parametrize("block", [7, 1 << 16])
@pytest.mark.parametrize("archive", ARCHIVES)
def test_a_compressed_file_is_read_completely_or_refused(tmp_path, monkeypatch, archive, block):
    """Files are truncated anywhere except between frames, even to nothing; damaged; or have trailing bytes."""
    monkeypatch.setattr("longnet_dist.data.sources._COMPRESSED_BYTES", block)
    ending, frames = ARCHIVES[archive]
    path, complete = tmp_path / f"rows.jsonl.{ending}", b"".join(frames)
    path.write_bytes(complete)
    assert [document.decode() for document in read_documents(path)] == [f"row {n}" for n in range(20)]
    boundaries = {sum(map(len, frames[:n])) for n in range(1, len(frames))}
    truncated = [complete[:cut] for cut in range(len(complete)) if cut not in boundaries]
    for content in (*truncated, complete + b"x", complete + b"trailing garbage", b"\x00" + complete):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"rows.jsonl.{ending} (ends too early|cannot be decompressed)"):
            list(read_documents(path))
    path.write_bytes(complete[:-3])
    with pytest.raises(ValueError, match="ends too early, at byte"):
        corpus_of(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("index.json"))


def test_every_truncation_of_parquet_is_refused(tmp_path):
    path = write_rows(tmp_path, "parquet")
    complete = path.read_bytes()
    for cut in range(len(complete)):
        path.write_bytes(complete[:cut])
        with pytest.raises(ValueError, match=r"rows.parquet cannot be read as Parquet"):
            list(read_documents(path))


def test_damaged_parquet_is_read_or_refused(tmp_path):
    """No damaged byte leads to an exception of another type."""
    path = write_rows(tmp_path, "parquet")
    complete = path.read_bytes()
    for position in range(len(complete)):
        path.write_bytes(complete[:position] + bytes([complete[position] ^ 255]) + complete[position + 1 :])
        try:
            message = f"{path}: {list(read_documents(path))}"
        except ValueError as error:
            message = str(error)
        assert str(path) in message


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, ZSTD.compress])
def test_a_compressed_text_is_one_document_and_not_compressed_bytes(tmp_path, compress):
    ending = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz"}.get(compress, "zst")
    for name, content, expected in (
        ("a.txt", b"some text\n" * 3, [b"some text\n" * 3]),
        ("a.json", b'{"text": "x"}', [b'{"text": "x"}']),
        ("a.jsonl", b"".join(LINES), [f"row {n}".encode() for n in range(20)]),
    ):
        path = tmp_path / f"{name}.{ending}"
        path.write_bytes(compress(content))
        assert list(read_documents(path)) == expected
        path.write_bytes(compress(content)[:-3])
        with pytest.raises(ValueError, match=rf"{name}.{ending} (ends too early|cannot be decompressed)"):
            list(read_documents(path))


@pytest.mark.parametrize("content", ["text".encode("utf-16"), b"\x7fELF\x02\0\0"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_what_looks_binary_is_refused_unless_asked_for(folder, tmp_path_factory, compress, content):
    path = folder / "sub" / ("binary" if compress is bytes else "binary.gz")
    path.write_bytes(compress(content))
    with pytest.raises(ValueError, match=rf"{path.name}, byte {content.index(0)}: a NUL byte.* --allow-binary"):
        corpus_of(folder, tmp_path_factory.mktemp("cache"))
    cache = tmp_path_factory.mktemp("cache")
    index = open_corpus([str(path)], cache, 0.1, allow_binary=True).index
    assert sum(shard.num_bytes for shard in index.shards) == len(content)
    out = str(tmp_path_factory.mktemp("out") / "tokens")
    assert app.main(["tokenize", str(path), "--out", out]) == 2
    assert app.main(["tokenize", str(path), "--out", out, "--allow-binary"]) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "is an archive") for name in ("a.ZIP", "a.tgz", "a.tar", "a.tar.gz", "a.7z")),
        *((name, "is a table") for name in ("a.csv", "a.csv.gz", "a.arrow", "a.tsv")),
        *((name, "holds no text") for name in ("a.npy", "a.PNG", "a.pkl", "a.safetensors")),
        ("a.parquet.gz", "is compressed as a whole"),
    ],
)
def test_files_that_are_no_text_are_refused_by_name(folder, tmp_path_factory, name, message):
    (folder / "sub" / name).write_bytes(b"text")
    for path in (folder, folder / "sub" / name):
        with pytest.raises(ValueError, match=f"{name} {message}"):
            corpus_of(path, tmp_path_factory.mktemp("cache"))
    with pytest.raises(ValueError, match=f"{name} {message}"):
        list(read_documents(folder / "sub" / name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "names no file or folder"),
        ("~nobody-of-this-name/text", "no home folder"),
        ("s3://bucket/text", "no path on this machine"),
    ],
)
def test_a_name_that_cannot_be_a_path_is_refused(tmp_path, name, message):
    for call in (lambda: find_files([name]), lambda: corpus_of(name, tmp_path), lambda: TrainConfig(data=name)):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_folder_with_an_unrelated_index_json_is_text(folder, tmp_path_factory):
    (folder / "index.json").write_text('{"name": "a package"}')
    corpus = corpus_of(folder, tmp_path_factory.mktemp("cache"))
    assert sum(shard.documents for shard in corpus.index.shards) == 3


def test_tokens_are_not_tokenised_again(folder, tmp_path_factory):
    """Tokens are refused as a folder, as part of a folder, as files, and in an output folder inside the data."""
    out = tmp_path_factory.mktemp("out")
    tokens = tokenize([str(folder / "a.py")], out / "tokens", out)
    for path in (tokens, out, tokens / "*", tokens / "tokens-00000.bin"):
        with pytest.raises(ValueError, match=rf"{tokens} is already tokenised: use train --data {tokens}"):
            tokenize([str(path)], out.parent / "again", out.parent)
    with pytest.raises(ValueError, match="is already tokenised"):
        corpus_of(out, tmp_path_factory.mktemp("cache"))
    for inside in (folder, folder / "sub" / "tokens"):
        with pytest.raises(ValueError, match=rf"{inside} is inside --data {folder}"):
            tokenize([str(folder)], inside, inside)
    tokenize([str(folder)], folder / ".cache" / "tokens", folder)
    assert corpus_of(tokens, out).index.num_tokens == 7
