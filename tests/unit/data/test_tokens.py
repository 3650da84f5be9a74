"""A failure here means: tokens on disk differ from the documents, or an interrupted or damaged tokenisation passes."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from longnet_dist.cli import app
from longnet_dist.data import writing
from longnet_dist.data.corpus import open_corpus, tokenize
from longnet_dist.data.shards import check_tokens, read_index
from longnet_dist.data.tokenizers import Bytes, load_tokenizer
from longnet_dist.data.writing import write_tokens
from tests.pool import forkserver

DOCUMENTS = [f"document {n}, ümlaut and all\n".encode() * (n % 5) for n in range(40)]


class Reader:
    """Reads `DOCUMENTS`, and fails before one of them."""

    def __init__(self, fails_before: int | None = None, error: Callable[[], object] | None = None) -> None:
        self.fails_before, self.error, self.position = fails_before, error, 0

    def read(self, position):
        for number in range(position or 0, len(DOCUMENTS)):
            if number == self.fails_before:
                self.error()
            self.position = number + 1
            yield DOCUMENTS[number]


def lose_the_network():
    raise OSError("the network is gone")


class Counting(Bytes):
    """Counts the documents that are tokenised."""

    encoded = 0

    def encode(self, documents):
        self.encoded += len(documents)
        return super().encode(documents)


@pytest.fixture
def hugging_face_file(tmp_path):
    """The file of a byte-level BPE tokenizer, which the package tokenizers trains here."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([d.decode() for d in DOCUMENTS], vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def tiktoken(tmp_path):
    """A `*.tiktoken` file with the 256 bytes and two merges, under the name of an encoding."""
    ranks = [bytes([n]) for n in range(256)] + [b"do", b"cu"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)]
    (tmp_path / "cl100k_base.tiktoken").write_bytes(b"".join(lines))
    return tmp_path / "cl100k_base.tiktoken"


@pytest.mark.parametrize("name", ["bytes", "hugging_face_file", "tiktoken"])
def test_tokens_decode_to_the_documents(name, tmp_path, request):
    """With every tokenizer, several shards hold each document, and an end-of-document id after it."""
    tokenizer = load_tokenizer(None if name == "bytes" else request.getfixturevalue(name))
    index = write_tokens(Reader(), tokenizer, tmp_path / "out", "source", shard_tokens=1)
    assert index == read_index(tmp_path / "out")
    assert index.dtype == ("uint32" if name == "tiktoken" else "uint16")
    check_tokens(tmp_path / "out", index)
    tokens = np.concatenate([np.fromfile(tmp_path / "out" / shard.name, index.dtype) for shard in index.shards])
    ends = np.flatnonzero(tokens == tokenizer.end_of_document)
    decoded = [tokenizer.decode(part[:-1].tolist()) for part in np.split(tokens, ends + 1)[:-1]]
    assert decoded == DOCUMENTS
    assert index.num_tokens == len(tokens)
    assert index.tokens_per_byte == len(tokens) / sum(map(len, DOCUMENTS))


def test_a_window_is_read_across_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("longnet_dist.data.writing._BATCH_DOCUMENTS", 3)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": d.decode()}) + "\n" for d in DOCUMENTS))
    folder = tokenize([str(tmp_path / "text.jsonl")], tmp_path / "out", tmp_path, shard_tokens=50)
    assert len(read_index(folder).shards) > 5
    stream = open_corpus([str(folder)], tmp_path, 0.0).train
    all_tokens = np.concatenate([np.append(np.frombuffer(d, np.uint8), np.uint16(256)) for d in DOCUMENTS])
    assert stream.tokens(10**6).tolist() == all_tokens.tolist()
    for window in range(stream.num_windows(100)):
        tokens, labels = stream.read(window, 100, 20, 90)
        assert tokens.tolist() == all_tokens[window * 100 + 20 : window * 100 + 90].tolist()
        assert labels.tolist() == all_tokens[window * 100 + 21 : window * 100 + 91].tolist()
        ends = [n + 1 for n, token in enumerate(all_tokens[window * 100 : window * 100 + 100]) if token == 256]
        assert stream.documents(window, 100).tolist() == [0, *ends, 100]


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shard_tokens", [1, 100, 10**6])
@pytest.mark.parametrize("number", [1, 4, 13, 34])
def test_a_tokenisation_resumes_where_it_failed(tmp_path, monkeypatch, number, shard_tokens):
    """Interrupted by a failing source, it ends with the files of an uninterrupted one, and tokenises nothing twice."""
    monkeypatch.setattr("longnet_dist.data.writing._BATCH_DOCUMENTS", 3)
    expected = write_tokens(Reader(), Bytes(), tmp_path / "expected", "source", shard_tokens)
    with pytest.raises(OSError, match="network"):
        write_tokens(Reader(number, lose_the_network), Bytes(), tmp_path / "out", "source", shard_tokens)
    with pytest.raises(ValueError, match="unfinished tokenisation: run the same"):
        read_index(tmp_path / "out")
    if shard_tokens == 1 and number > 3:
        with pytest.raises(ValueError, match="tokens of other data"):
            write_tokens(Reader(), Bytes(), tmp_path / "out", "another", shard_tokens)
    counting = Counting()
    assert write_tokens(Reader(), counting, tmp_path / "out", "source", shard_tokens) == expected
    assert counting.encoded == len(DOCUMENTS) - number // 3 * 3
    assert files_in(tmp_path / "out") == files_in(tmp_path / "expected")


def write_and_die(folder, number):
    writing._BATCH_DOCUMENTS, writing.SAVE_SECONDS = 3, 0.0
    write_tokens(Reader(number, lambda: os._exit(9)), Bytes(), folder, "source")


@pytest.mark.parametrize("damage", [None, "truncated", "changed", "longer", "removed"])
def test_a_killed_tokenisation_loses_what_was_not_saved(tmp_path, monkeypatch, damage):
    """A shard in progress is saved from time to time. If its file is not as it was saved, the shard begins anew."""
    process = forkserver().Process(target=write_and_die, args=(tmp_path / "out", 20))
    process.start()
    process.join()
    assert process.exitcode == 9
    (unfinished,) = (tmp_path / "out").glob("unfinished-*")
    content = unfinished.read_bytes()
    assert content
    damaged = {"truncated": content[:-2], "changed": b"xx" + content[2:], "longer": content + b"not saved"}
    unfinished.write_bytes(damaged.get(damage, content))
    if damage == "removed":
        unfinished.unlink()
    monkeypatch.setattr("longnet_dist.data.writing._BATCH_DOCUMENTS", 3)
    counting = Counting()
    assert write_tokens(Reader(), counting, tmp_path / "out", "source") == write_tokens(
        Reader(), Bytes(), tmp_path / "expected", "source"
    )
    assert counting.encoded == len(DOCUMENTS) - (18 if damage in (None, "longer") else 0)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "expected")


def test_a_killed_tokenisation_resumes(tmp_path):
    """The real command, which SIGKILL ends between shards."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} " * 500}) + "\n" for n in range(40_000)))
    command = ["-m", "longnet_dist", "tokenize", str(text), "--shard-tokens", "100000", "--out"]
    job = subprocess.Popen([sys.executable, *command, str(tmp_path / "out")], stdout=subprocess.DEVNULL)
    partial = tmp_path / "out" / "partial.json"
    deadline = time.monotonic() + 60
    while not (partial.exists() and json.loads(partial.read_text())["shards"]) and time.monotonic() < deadline:
        time.sleep(0.002)  # Only its files show its progress.
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    before = len(json.loads(partial.read_text())["shards"])
    assert not (tmp_path / "out" / "index.json").exists()
    for folder in ("out", "expected"):
        assert app.main([*command[2:], str(tmp_path / folder)]) == 0
    index = read_index(tmp_path / "out")
    assert len(index.shards) > before
    assert index == read_index(tmp_path / "expected")


def test_a_tokenisation_without_a_shard_is_neither_text_nor_in_the_way(tmp_path):
    """Interrupted in its first shard, it is not read as text, and other data may replace it."""

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(Reader(5, interrupt), Bytes(), tmp_path / "out", "source")
    (tmp_path / "out" / "unfinished-of-a-killed-process").write_bytes(b"part of a shard")
    with pytest.raises(ValueError, match="unfinished tokenisation: run the same"):
        open_corpus([str(tmp_path / "out")], tmp_path / "cache", 0.1)
    index = write_tokens(Reader(), Bytes(), tmp_path / "out", "another")
    assert index == read_index(tmp_path / "out")


def write_tokens_of_a_text(tmp_path):
    (tmp_path / "text.txt").write_text("some words again\n" * 50)
    return tokenize([str(tmp_path / "text.txt")], tmp_path / "tokens", tmp_path)


def test_damage_is_named_with_file_and_byte(tmp_path):
    folder = write_tokens_of_a_text(tmp_path)
    shard = folder / "tokens-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:100] + b"\xff\xff" + content[102:])
    with pytest.raises(ValueError, match=r"tokens-00000.bin, byte 100: token id 65535, and the vocabulary"):
        open_corpus([str(folder)], tmp_path / "cache", 0.1)
    shard.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(
        ValueError, match=r"tokens-00000.bin has changed since it was written; remove .*tokens, and tokenise"
    ):
        open_corpus([str(folder)], tmp_path / "cache", 0.1)
    with pytest.raises(ValueError, match=r"must be the only --data"):
        open_corpus([str(folder), str(tmp_path / "text.txt")], tmp_path / "cache", 0.1)
    shard.write_bytes(content[:99])
    with pytest.raises(ValueError, match=r"tokens-00000.bin ends at byte 99, and .* records 1702 bytes"):
        open_corpus([str(folder)], tmp_path / "cache", 0.1)
    shard.unlink()
    with pytest.raises(ValueError, match=r"tokens-00000.bin is missing"):
        open_corpus([str(folder)], tmp_path / "cache", 0.1)
    (folder / "index.json").rename(folder / "partial.json")
    with pytest.raises(ValueError, match="holds an unfinished tokenisation"):
        open_corpus([str(folder)], tmp_path / "cache", 0.1)
    (folder / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index.json cannot be read"):
        open_corpus([str(folder)], tmp_path / "cache", 0.1)


@pytest.mark.parametrize("name", ["mine.cl100k_base", "mine.gpt2"])
def test_a_tiktoken_file_with_ranks_of_its_own_is_read(name, tmp_path):
    """Nothing is downloaded, and the end of a document follows the file's ranks."""
    lines = [f"{base64.b64encode(bytes([n])).decode()} {n}" for n in range(256)]
    lines.append(f"{base64.b64encode(b'ab').decode()} 256")
    (tmp_path / f"{name}.tiktoken").write_text("\n".join(lines))
    tokenizer = load_tokenizer(str(tmp_path / f"{name}.tiktoken"))
    assert tokenizer.encode([b"abc ab"])[0].tolist() == [256, ord("c"), ord(" "), 256]
    assert (tokenizer.end_of_document, tokenizer.vocab_size) == (257, 258)


def test_bad_tokenizers_and_texts_are_refused(tmp_path, hugging_face_file):
    for name, content, message in (
        ("x.model", "", r"give a file named \*.json"),
        ("x.json", "{}", "is not a tokenizer.json"),
        ("x.tiktoken", "", "its name must be that of an encoding, or end in it"),
        ("cl100k_base.tiktoken", "YQ== 0\nno\n", r"cl100k_base.tiktoken, line 2: it is not a token in base64"),
        ("r50k_base.tiktoken", "YQ== 0\n", r"does not hold the ranks of r50k_base"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        load_tokenizer(tmp_path / "missing.json")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin.txt, byte 3: it is not UTF-8"):
        tokenize([str(tmp_path / "latin.txt")], tmp_path / "a", tmp_path, tokenizer=hugging_face_file)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="every document is empty"):
        tokenize([str(tmp_path / "empty.txt")], tmp_path / "b", tmp_path)


def test_a_hugging_face_dataset_is_streamed(tmp_path, monkeypatch):
    """The package datasets streams a folder of JSON lines."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "rows").mkdir()
    rows = [{"text": d.decode(), "n": n} for n, d in enumerate(DOCUMENTS)]
    (tmp_path / "rows" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tokenize([f"hf:{tmp_path / 'rows'}?split=train"], tmp_path / "out", tmp_path)
    tokens = open_corpus([str(folder)], tmp_path, 0.0).train.tokens(10**6)
    assert Bytes().decode(tokens.tolist()) == b"".join(DOCUMENTS)
    with pytest.raises(ValueError, match=r"row 0: its 'body' is NoneType, not text; it has text, n"):
        tokenize([f"hf:{tmp_path / 'rows'}"], tmp_path / "other", tmp_path, text_field="body")
    with pytest.raises(ValueError, match=r"cannot be opened or read"):
        tokenize([f"hf:{tmp_path / 'rows'}?split=nothing"], tmp_path / "other", tmp_path)
    (tmp_path / "rows" / "rows.jsonl").write_text('{"text": "fine"}\n{"text": "cut')
    with pytest.raises(ValueError, match=r"rows cannot be opened or read: "):
        tokenize([f"hf:{tmp_path / 'rows'}"], tmp_path / "cut", tmp_path)
