"""A failure here means: files from an untrusted source hang a run, or make it read or change what they must not."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as checkpoint_metadata
from torch.distributed.checkpoint.metadata import TensorProperties

from longnet_dist.checkpoints.checkpoints import CheckpointError, Checkpoints
from longnet_dist.checkpoints.reader import TensorsOnlyReader
from longnet_dist.checkpoints.storage import MANIFEST
from longnet_dist.checkpoints.verification import find_damage, hash_manifest
from longnet_dist.data.corpus import open_corpus
from longnet_dist.data.sources import find_files, read_documents

pytestmark = pytest.mark.timeout(20)


def test_a_loop_of_links_is_searched_once(tmp_path):
    """Eight links to the folder itself would make 8 ** depth paths, up to the system's limit of about 40 links."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("b")
    for i in range(8):
        (tmp_path / f"link{i}").symlink_to(tmp_path)
    every = [tmp_path / "a.txt", tmp_path / "sub" / "b.txt"]
    for pattern in ("", "**", "**/*", "**/*.txt", "**/**/*.txt"):
        assert find_files([str(tmp_path / pattern)]) == every
    assert find_files([str(tmp_path / "/".join("*" * 30) / "b.txt")]) == every[1:]
    assert find_files([str(tmp_path / "link3" / "**" / "sub" / "?.txt")]) == every[1:]


def test_a_glob_follows_links_and_a_folder_does_not(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "b.txt").write_text("b")
    (tmp_path / "elsewhere" / ".hidden.txt").write_text("no")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("a")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    assert [p.name for p in find_files([str(tmp_path / "data")])] == ["a.txt"]
    assert [p.name for p in find_files([str(tmp_path / "data" / "**" / "*.txt")])] == ["a.txt", "b.txt"]
    assert [p.name for p in find_files([str(tmp_path / "data" / "link")])] == ["b.txt"]
    assert [p.name for p in find_files([str(tmp_path / "data" / "link" / ".*")])] == [".hidden.txt"]
    assert [p.name for p in find_files([str(tmp_path / "*" / ".." / "d*" / "a.*")])] == ["a.txt"]


def test_a_pipe_is_no_data(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for pattern in ("pipe", "*", ""):
        with pytest.raises(ValueError, match="no such file"):
            find_files([str(tmp_path / pattern)])


def test_deeply_nested_json_is_an_error_with_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + "[" * 100_000 + "]" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2, byte 17: its JSON is nested too deeply"):
        list(read_documents(path))


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of one tensor."""
    Checkpoints(tmp_path / "checkpoints").save(1, {"model.a": torch.ones(3)}, {"step": 1})
    return tmp_path / "checkpoints" / "step-00000001"


def rewrite_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as a hostile author would, who knows how to compute its hash."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    change(manifest)
    manifest["sha256"] = hash_manifest({name: x for name, x in manifest.items() if name != "sha256"})
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["/dev/zero", "../outside", "sub/../../outside", "..", ".", "", "a\0b", "/etc/passwd"])
def test_a_manifest_lists_plain_names_only(checkpoint, name):
    (checkpoint.parent / "outside").write_text("")
    (checkpoint / "sub").mkdir()
    empty = {"bytes": 0, "sha256": "0" * 64}
    rewrite_manifest(checkpoint, lambda manifest: manifest["files"].update({name: empty}))
    problem, damaged = find_damage(checkpoint, 0, 1)
    assert problem == f"manifest.json lists {name!r}, and only files of the checkpoint's own folder are read"
    assert damaged


@pytest.mark.parametrize("name", ["__0_0.distcp", MANIFEST])
@pytest.mark.parametrize("replacement", ["a pipe", "/dev/zero", "a link outside"])
def test_only_regular_files_are_read(checkpoint, name, replacement):
    """It may be a mistake of a person, so it is no proof of damage, for which a checkpoint may be removed."""
    file = checkpoint / name
    os.rename(file, checkpoint.parent / "outside")
    if replacement == "a pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(replacement if replacement == "/dev/zero" else checkpoint.parent / "outside")
    problem, damaged = find_damage(checkpoint, 0, 1)
    assert name in problem
    assert "it is no regular file, and symbolic links are not followed" in problem
    assert not damaged


def test_sizes_are_compared_before_anything_is_hashed(checkpoint):
    """A hole of 8 TiB would take hours to hash."""
    os.truncate(checkpoint / "__0_0.distcp", 1 << 43)
    assert find_damage(checkpoint, 0, 1)[0].startswith("__0_0.distcp is not as it was written (8796093022208 bytes now")


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": {"x": 3}},
        {"files": {"x": {"bytes": 1}}},
        {"files": {"x": {"bytes": "1", "sha256": "0"}}},
        {"files": None},
        {"facts": None},
        {"facts": [1]},
    ],
)
def test_a_malformed_manifest_is_damage(checkpoint, change):
    rewrite_manifest(checkpoint, lambda manifest: manifest.update(change))
    problem, damaged = find_damage(checkpoint, 0, 1)
    assert problem.startswith("manifest.json cannot be read")
    assert damaged


def test_a_deeply_nested_manifest_is_damage(checkpoint):
    (checkpoint / MANIFEST).write_text("[" * 100_000)
    assert find_damage(checkpoint, 0, 1)[1]


def pickled(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


METADATA = "torch.distributed.checkpoint.metadata"
STATE = pickle.dumps({"hacked": 1}, 2)[2:-1]


@pytest.mark.parametrize(
    ("parts", "target"),
    [
        ((named(METADATA, "MetadataIndex"), b"N", STATE, b"\x86", b"b"), "<class '.*MetadataIndex'>"),
        ((named(METADATA, "TensorProperties"), b"N", STATE, b"\x86", b"b"), "<class '.*TensorProperties'>"),
        ((named("torch", "Size"), b"N", STATE, b"\x86", b"b"), "<class 'torch.Size'>"),
        ((named("torch", "float32"), b"N", STATE, b"\x86", b"b"), "torch.float32"),
        ((named("torch.serialization", "_get_layout"), STATE, b"b"), "<function _get_layout"),
        ((named(METADATA, "_MEM_FORMAT_ENCODING"), b"K\x00\x85R", STATE, b"b"), "<_MEM_FORMAT_ENCODING"),
    ],
)
def test_metadata_sets_attributes_of_no_class_or_function(checkpoint, parts, target):
    (checkpoint / ".metadata").write_bytes(pickled(*parts))
    with pytest.raises(pickle.UnpicklingError, match=f"sets attributes of {target}"):
        TensorsOnlyReader(checkpoint).read_metadata()
    everything = [getattr(checkpoint_metadata, name) for name in dir(checkpoint_metadata)]
    assert not any(hasattr(x, "hacked") for x in [*everything, TensorProperties, torch.serialization._get_layout])


@pytest.mark.parametrize(
    "content", [b"", b"garbage", pickled(b"}"), pickled(b"K\x01"), pickled(b"K\x01b"), pickled(b"h\x09")]
)
def test_malformed_metadata_is_an_error_with_the_checkpoint(checkpoint, content):
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(pickle.UnpicklingError, match=r"the metadata of checkpoint .*step-00000001 is malformed"):
        TensorsOnlyReader(checkpoint).read_metadata()
    with pytest.raises(CheckpointError, match="step-00000001 cannot be read: the metadata of"):
        Checkpoints(checkpoint.parent).load(checkpoint, {"model.a": torch.zeros(3)})


@pytest.mark.parametrize("name", ["../outside", "/dev/zero", "/etc/passwd"])
def test_metadata_names_files_of_its_own_folder(checkpoint, name):
    metadata = TensorsOnlyReader(checkpoint).read_metadata()
    for place in metadata.storage_data.values():
        place.relative_path = name
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=f"names the file '{name}', and only files of its own folder"):
        Checkpoints(checkpoint.parent).load(checkpoint, {"model.a": torch.zeros(3)})


@pytest.fixture
def tokens(tmp_path):
    """A folder of tokens, and what opens it."""
    (tmp_path / "text.txt").write_text("some words\n" * 20)
    folder = open_corpus([str(tmp_path / "text.txt")], tmp_path / "cache", 0.1).folder
    folder.rename(tmp_path / "tokens")
    return tmp_path / "tokens"


def rewrite_index(tokens: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((tokens / "index.json").read_text())
    change(index)
    (tokens / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["/dev/zero", "../tokens-00000.bin", "/etc/passwd", "a\0b", 3])
def test_an_index_names_shards_of_its_own_folder(tokens, name):
    os.link(tokens / "tokens-00000.bin", tokens.parent / "tokens-00000.bin")
    rewrite_index(tokens, lambda index: index["shards"][0].update(name=name))
    with pytest.raises(ValueError, match=r"index.json cannot be read .*; remove .*tokens, and tokenise the data again"):
        open_corpus([str(tokens)], tokens.parent / "cache", 0.1)


@pytest.mark.parametrize("replacement", ["a pipe", "/dev/zero", "a link outside"])
def test_a_shard_is_a_regular_file(tokens, replacement):
    shard = tokens / "tokens-00000.bin"
    os.rename(shard, tokens.parent / "outside")
    if replacement == "a pipe":
        os.mkfifo(shard)
    else:
        shard.symlink_to(replacement if replacement == "/dev/zero" else tokens.parent / "outside")
    with pytest.raises(ValueError, match=r"tokens-00000.bin is no regular file"):
        open_corpus([str(tokens)], tokens.parent / "cache", 0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "O"},
        {"dtype": "float64"},
        {"dtype": 3},
        {"vocab_size": "257"},
        {"vocab_size": -1},
        {"end_of_document": 10**30},
        {"shards": {}},
        {"shards": [3]},
        {"tokenizer": None},
        {"unknown": 1},
    ],
)
def test_a_malformed_index_is_an_error_with_its_file(tokens, change):
    rewrite_index(tokens, lambda index: index.update(change))
    with pytest.raises(ValueError, match=r"index.json cannot be read .*; remove .*tokens, and tokenise the data again"):
        open_corpus([str(tokens)], tokens.parent / "cache", 0.1)
