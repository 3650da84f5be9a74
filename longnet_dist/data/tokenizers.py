"""Documents to token ids: bytes, or any tokenizer file of the packages `tokenizers` and `tiktoken`."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np

from longnet_dist.extras import extra

NUM_BYTES = 256
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
"""What tokenizers call the token at the end of a document; where one has none of them, an id of its own is added."""


class Tokenizer(Protocol):
    """What turns documents into ids."""

    name: str
    """Which it is: a name, and of a file the hash of its content."""
    vocab_size: int
    """Ids are below it, the end of a document's included."""
    end_of_document: int
    """The id after each document."""

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each document, without an end.

        Raises:
            UnicodeDecodeError: where a document must be UTF-8 and is not.
        """
        ...

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of some ids."""
        ...


class Bytes:
    """A token a byte; 256 ends a document."""

    name = "bytes"
    vocab_size = NUM_BYTES + 1
    end_of_document = NUM_BYTES

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        return [np.frombuffer(document, np.uint8) for document in documents]

    def decode(self, ids: Sequence[int]) -> bytes:
        """See `Tokenizer`."""
        return bytes(i for i in ids if i < NUM_BYTES)


class _HuggingFace:
    """A `tokenizer.json`."""

    def __init__(self, path: Path, name: str) -> None:
        from tokenizers import Tokenizer as Fast

        self.name = name
        try:
            self._fast = Fast.from_file(str(path))
        except Exception as error:  # It raises no narrower kind.
            raise ValueError(f"{path} is no tokenizer.json that the package tokenizers reads: {error}") from None
        self._fast.no_truncation()
        self._fast.no_padding()
        vocabulary = self._fast.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=-1) + 1
        self.end_of_document = next((vocabulary[end] for end in END_NAMES if end in vocabulary), size)
        self.vocab_size = max(size, self.end_of_document + 1)

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        encoded = self._fast.encode_batch_fast([d.decode() for d in documents], add_special_tokens=False)
        return [np.asarray(e.ids, np.int64) for e in encoded]

    def decode(self, ids: Sequence[int]) -> bytes:
        """See `Tokenizer`."""
        known = [i for i in ids if i != self.end_of_document]
        return str(self._fast.decode(known, skip_special_tokens=False)).encode()


class _Tiktoken:
    """A file of ranks, a line each: the bytes in base64, and their rank; the encoding is that of its name."""

    def __init__(self, path: Path, name: str) -> None:
        import tiktoken
        from tiktoken_ext import openai_public

        self.name = name
        if path.stem not in openai_public.ENCODING_CONSTRUCTORS:
            raise ValueError(
                f"--tokenizer {path}: ranks do not say how text is cut before they are used, so the file must be named "
                f"as tiktoken names its encoding: {', '.join(openai_public.ENCODING_CONSTRUCTORS)}"
            )
        ranks = _ranks(path)
        try:
            # What it would download is given.
            with patch.object(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks):
                self._encoding = tiktoken.Encoding(**openai_public.ENCODING_CONSTRUCTORS[path.stem]())
        except Exception as error:  # It raises no narrower kind.
            raise ValueError(f"--tokenizer {path} holds no ranks of {path.stem}: {error!r}") from None
        self.vocab_size, self.end_of_document = self._encoding.n_vocab, self._encoding.eot_token

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        encoded = self._encoding.encode_ordinary_batch([d.decode() for d in documents])
        return [np.asarray(ids, np.int64) for ids in encoded]

    def decode(self, ids: Sequence[int]) -> bytes:
        """See `Tokenizer`."""
        return bytes(self._encoding.decode_bytes([i for i in ids if i != self.end_of_document]))


def _ranks(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"--tokenizer {path}, line {number}: it is not bytes in base64 and a rank") from None
    return ranks


def load_tokenizer(path: Path | None) -> Tokenizer:
    """The tokenizer in a file: `*.json` is of the package `tokenizers`, `*.tiktoken` of `tiktoken`; None is bytes.

    Raises:
        ValueError: where the file is missing or not as it should be, or the package is not installed.
    """
    if path is None:
        return Bytes()
    kinds: dict[str, Any] = {".json": _HuggingFace, ".tiktoken": _Tiktoken}
    if path.suffix not in kinds:
        raise ValueError(f"--tokenizer {path}: give a file named *.json (tokenizers) or *.tiktoken")
    if not path.is_file():
        raise ValueError(f"--tokenizer {path}: no file there")
    name = f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    with extra("tokenizers", f"--tokenizer {path}"):
        made: Tokenizer = kinds[path.suffix](path, name)
    return made
