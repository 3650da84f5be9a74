"""Tokenizers: bytes, and the tokenizer files of the packages `tokenizers` and `tiktoken`."""

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
"""Names that tokenizers give to the end-of-document token. A tokenizer with none of them gets an additional id."""


class Tokenizer(Protocol):
    """Converts documents to token ids and back."""

    name: str
    """A name that identifies the tokenizer; that of a file includes a hash of its content."""
    vocab_size: int
    """Number of token ids, including the end-of-document id; all ids are below it."""
    end_of_document: int
    """The id that follows each document."""

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Encode each document, without an end-of-document id.

        Args:
            documents: the documents; UTF-8, unless the tokenizer is `Bytes`.

        Returns:
            The token ids of each document, as an array of integers.

        Raises:
            UnicodeDecodeError: if the tokenizer needs UTF-8 and a document is not.
        """
        ...

    def decode(self, ids: Sequence[int]) -> bytes:
        """Decode token ids, leaving out end-of-document ids."""
        ...


class Bytes:
    """Byte tokenizer: each byte is a token, and 256 ends a document."""

    name = "bytes"
    vocab_size = NUM_BYTES + 1
    end_of_document = NUM_BYTES

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        return [np.frombuffer(document, np.uint8) for document in documents]

    def decode(self, ids: Sequence[int]) -> bytes:
        """See `Tokenizer`."""
        return bytes(i for i in ids if i < NUM_BYTES)


class _HuggingFaceTokenizer:
    """The tokenizer in a `tokenizer.json` of the package `tokenizers`."""

    def __init__(self, path: Path, name: str) -> None:
        from tokenizers import Tokenizer as Fast

        self.name = name
        try:
            self._fast = Fast.from_file(str(path))
        except Exception as error:  # It raises nothing more specific.
            raise ValueError(
                f"--tokenizer {path} is not a tokenizer.json that the package tokenizers can read: {error}"
            ) from None
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
        text_ids = [i for i in ids if i != self.end_of_document]
        return str(self._fast.decode(text_ids, skip_special_tokens=False)).encode()


class _TiktokenTokenizer:
    """The tokenizer in a `*.tiktoken` file, in which each line is a token in base64 and its rank.

    The file's name selects the encoding, because the package, not the file, holds its other parts: the pattern that
    splits text, and the special tokens. A file with ranks of its own, NAME.ENCODING.tiktoken, is split in that
    encoding's way, and has one special token after its ranks, the end of a document.
    """

    def __init__(self, path: Path, name: str) -> None:
        import tiktoken
        from tiktoken_ext import openai_public

        self.name = name
        encoding = path.stem.rpartition(".")[2]
        if encoding not in openai_public.ENCODING_CONSTRUCTORS:
            raise ValueError(
                f"--tokenizer {path}: the file does not say how to split text before its ranks apply, so its name must "
                "be that of an encoding, or end in it, as NAME.cl100k_base.tiktoken: "
                f"{', '.join(openai_public.ENCODING_CONSTRUCTORS)}"
            )
        ranks = _read_ranks(path)
        try:
            # The constructors would download the ranks; use the file's.
            with (
                patch.object(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks),
                patch.object(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: ranks),
            ):
                options = openai_public.ENCODING_CONSTRUCTORS[encoding]()
            if encoding != path.stem:
                size = max(ranks.values()) + 1
                options |= {"special_tokens": {"<|endoftext|>": size}, "explicit_n_vocab": None}
            self._encoding = tiktoken.Encoding(**options)
        except Exception as error:  # It raises nothing more specific.
            raise ValueError(f"--tokenizer {path} does not hold the ranks of {encoding}: {error!r}") from None
        self.vocab_size, self.end_of_document = self._encoding.n_vocab, self._encoding.eot_token

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        encoded = self._encoding.encode_ordinary_batch([d.decode() for d in documents])
        return [np.asarray(ids, np.int64) for ids in encoded]

    def decode(self, ids: Sequence[int]) -> bytes:
        """See `Tokenizer`."""
        return bytes(self._encoding.decode_bytes([i for i in ids if i != self.end_of_document]))


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"--tokenizer {path}, line {number}: it is not a token in base64 and a rank") from None
    return ranks


def load_tokenizer(path: Path | str | None = None) -> Tokenizer:
    """Load the tokenizer in a file.

    Args:
        path: a file `*.json` of the package `tokenizers`, or `*.tiktoken` of the package `tiktoken`; None for bytes.
            A `*.tiktoken` file is named by its encoding, as `cl100k_base.tiktoken`, or `mine.cl100k_base.tiktoken` if
            its ranks are its own. Nothing is downloaded.

    Returns:
        The tokenizer.

    Raises:
        ValueError: if the file is missing or malformed, or the package is not installed.

    Example:
        >>> load_tokenizer(None).encode([b"abc"])[0].tolist()
        [97, 98, 99]
    """
    if path is None:
        return Bytes()
    path = Path(path)
    classes: dict[str, Any] = {".json": _HuggingFaceTokenizer, ".tiktoken": _TiktokenTokenizer}
    if path.suffix not in classes:
        raise ValueError(f"--tokenizer {path}: give a file named *.json (tokenizers) or *.tiktoken")
    if not path.is_file():
        raise ValueError(f"--tokenizer {path}: no such file")
    name = f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    with extra("tokenizers", f"--tokenizer {path}"):
        tokenizer: Tokenizer = classes[path.suffix](path, name)
    return tokenizer
