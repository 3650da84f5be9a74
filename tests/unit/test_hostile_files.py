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
