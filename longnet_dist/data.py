"""Text and code as one long stream of byte tokens, memory-mapped; each rank reads only its own rows of it."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longnet_dist.documents import read_documents

END_OF_DOCUMENT = 256
"""The token after each document; 0 to 255 are its bytes."""
VOCAB_SIZE = 257


def standard_library() -> list[Path]:
    """The source of the running Python's standard library: about 30 MB that every machine has."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts and "__pycache__" not in p.parts)


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files that files, folders and globs (with `**`) name, sorted, each once; hidden ones only by name.

    Raises:
        ValueError: where one of them names no file.
    """
    found: set[Path] = set()
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            files = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        elif path.is_file():
            files = [path]
        else:
            files = [Path(p) for p in glob.glob(str(path), recursive=True)]
        files = [p for p in files if p.is_file()]
        if not files:
            raise ValueError(
                f"--data {given}: no file there; give files, folders or globs, for example src/ or 'src/**/*.py'"
            )
        found.update(p.resolve() for p in files)
    return sorted(found)


@dataclass(frozen=True)
class Corpus:
    """Documents joined into a stream of tokens, uint16 on disk; its last part is held out for validation."""

    path: Path
    num_tokens: int
    num_validation_tokens: int
    byte_counts: tuple[int, ...]
    """How often each token is in the training part."""

    @property
    def train(self) -> TokenStream:
        """What is trained on."""
        return TokenStream(self.path, 0, self.num_tokens - self.num_validation_tokens)

    @property
    def validation(self) -> TokenStream:
        """What is held out."""
        return TokenStream(self.path, self.num_tokens - self.num_validation_tokens, self.num_tokens)


@dataclass(frozen=True)
class TokenStream:
    """The tokens [start, stop) of a file of uint16."""

    path: Path
    start: int
    stop: int

    def num_windows(self, seq_len: int) -> int:
        """How many windows of `seq_len` tokens it holds, each with the token after it."""
        return max(0, (self.stop - self.start - 1) // seq_len)

    def read(self, window: int, seq_len: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels of the rows [first, last) of a window, int64 each; no other part is read.

        The label of a row is the token after it, so they are shifted before they are split.
        """
        begin = self.start + window * seq_len
        tokens = np.memmap(self.path, np.uint16, "r")[begin + first : begin + last + (last > first)]
        both = torch.from_numpy(tokens.astype(np.int64))
        return both[: last - first], both[1:]

    def tokens(self, limit: int) -> np.ndarray:
        """Up to `limit` tokens from its beginning, as they are on disk."""
        return np.memmap(self.path, np.uint16, "r")[self.start : min(self.stop, self.start + limit)]


def build_corpus(
    files: Sequence[Path], folder: Path, validation_fraction: float, seed: int, text_field: str = "text"
) -> Corpus:
    """Tokenise `files`, shuffled by `seed`, into `folder`; what is there of the same files, unchanged, is used again.

    Written under a temporary name and renamed, so that a crash, or another process building the
    same, leaves no half of it.

    Raises:
        ValueError: where a file holds what cannot be read, naming the place; see `read_documents`.
    """
    described = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(json.dumps([described, validation_fraction, seed, text_field]).encode()).hexdigest()[:16]
    path, description = folder / f"corpus-{key}.bin", folder / f"corpus-{key}.json"
    if not description.exists():
        folder.mkdir(parents=True, exist_ok=True)
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
        with tempfile.NamedTemporaryFile(dir=folder, prefix=path.name, delete=False) as out:
            try:
                for index in order:
                    for text in read_documents(files[index], text_field):
                        document = np.frombuffer(text, np.uint8).astype(np.uint16)
                        out.write(np.append(document, np.uint16(END_OF_DOCUMENT)).tobytes())
            except BaseException:
                os.unlink(out.name)
                raise
            num_tokens = out.tell() // 2
            out.flush()
            os.fsync(out.fileno())
        held_out = int(num_tokens * validation_fraction)
        trained_on = np.memmap(out.name, np.uint16, "r")[: num_tokens - held_out]
        counts = np.bincount(trained_on, minlength=VOCAB_SIZE).tolist()
        os.chmod(out.name, 0o644)
        os.replace(out.name, path)
        write_whole(description, json.dumps([num_tokens, held_out, counts]))
    num_tokens, held_out, counts = json.loads(description.read_text())
    return Corpus(path, num_tokens, held_out, tuple(counts))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole, or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.chmod(out.name, 0o644)
    os.replace(out.name, path)


def unigram_bits(counts: Sequence[int], tokens: np.ndarray) -> float:
    """Bits a token of a model that knows only how often each token is in training (one is added to each count)."""
    smoothed = np.asarray(counts, np.float64) + 1
    bits = -np.log2(smoothed / smoothed.sum())
    return float(bits[tokens].mean())


@lru_cache(maxsize=4)
def window_order(num_windows: int, epoch: int, seed: int) -> Tensor:
    """The order of an epoch's windows: a few integers say where a run is."""
    return torch.randperm(num_windows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
