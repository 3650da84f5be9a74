"""The documents in files: the whole of each, or the rows of JSON lines and Parquet; or of a Hugging Face dataset."""

from __future__ import annotations

import glob
import io
import json
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from longnet_dist.extras import extra
from longnet_dist.paths import local_path

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

ROWS_AT_A_TIME = 1024
HUGGING_FACE = "hf:"
ROWS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""The endings of files that have a document per row."""
COMPRESSED = (".7z", ".bz2", ".gz", ".lz4", ".lzma", ".rar", ".tbz2", ".tgz", ".txz", ".xz", ".z", ".zip", ".zst")
"""The endings of files that are refused, except those of `ROWS`."""
_COMPRESSED_BYTES = 1 << 14


def standard_library() -> list[Path]:
    """The source of the running Python's standard library: about 30 MB that every machine has."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts and "__pycache__" not in p.parts)


def find_files(paths: Sequence[str]) -> list[Path | str]:
    """The files that files, folders and globs (with `**`) name, sorted, each once; hidden ones only by name.

    What begins with `hf:` is a Hugging Face dataset, and passed on.

    Raises:
        ValueError: if one of them names no file, or a file is compressed in a way that is not read.
    """
    found: set[Path] = set()
    for given in paths:
        if given.startswith(HUGGING_FACE):
            continue
        path = local_path(given)
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
        for p in files:
            _ending(p)
        found.update(p.resolve() for p in files)
    return [*sorted(found), *sorted({given for given in paths if given.startswith(HUGGING_FACE)})]


def read_documents(source: Path | str, text_field: str = "text", only_text: bool = False) -> Iterator[bytes]:
    """The documents of a file, by its name: one per row for the endings in `ROWS`, one for any other file.

    Args:
        source: the file; or `hf:NAME?name=CONFIG&split=SPLIT`, a Hugging Face dataset (or a folder that the package
            `datasets` reads), which is streamed: what follows the `?` goes to `datasets.load_dataset`.
        text_field: the key, or the column, that holds a row's text.
        only_text: whether a file that is not UTF-8 is an error.

    Raises:
        ValueError: naming the file, and the line and byte or the row, where a row is not as it should be,
            a file is cut short, damaged or compressed in a way that is not read, or a package is missing.
    """
    if isinstance(source, str):
        yield from _streamed(source, text_field)
        return
    path = source
    ending = _ending(path)
    if ending == ".jsonl":
        with path.open("rb") as file:
            yield from _json_lines(path, file, text_field)
    elif ending in (".jsonl.gz", ".jsonl.zst"):
        with path.open("rb") as file, io.BufferedReader(_Decompressed(path, file, ending)) as plain:
            yield from _json_lines(path, plain, text_field)
    elif ending == ".parquet":
        yield from _parquet(path, text_field)
    else:
        content = path.read_bytes()
        if only_text:
            try:
                content.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, byte {error.start}: it is not UTF-8; leave it out, or train on bytes (no --tokenizer)"
                ) from None
        yield content


def _ending(path: Path) -> str | None:
    """The one of `ROWS` that a file's name ends in; None for a file that is one document.

    Raises:
        ValueError: if it is compressed in another way: training on compressed bytes is what nobody wants.
    """
    name = path.name.lower()
    ending = next((ending for ending in ROWS if name.endswith(ending)), None)
    if ending is None and name.endswith(COMPRESSED):
        raise ValueError(
            f"{path} is compressed, and only .jsonl.gz, .jsonl.zst and .parquet are decompressed here: decompress it, "
            "or leave it out"
        )
    return ending


def _json_lines(path: Path, file: IO[bytes], text_field: str) -> Iterator[bytes]:
    begin = 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                text = json.loads(line.decode())[text_field]
                if not isinstance(text, str):
                    raise ValueError(f"its {text_field!r} is {type(text).__name__}, not text")
                document = text.encode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}, byte {begin + error.start}: it is not UTF-8") from None
            except (KeyError, TypeError):
                raise ValueError(f"{path}, line {number}, byte {begin}: it is no object with {text_field!r}") from None
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, byte {begin}: {error}") from None
            yield document
        begin += len(line)


class _Decompressed(io.RawIOBase):
    """The content of a gzip or Zstandard file: all its members or frames, and an error unless the last one ends.

    (The readers of the package zstandard take a file that was cut short for a shorter one.)
    """

    def __init__(self, path: Path, file: IO[bytes], ending: str) -> None:
        self.path, self.file = path, file
        self.begin: Callable[[], Any]
        self.error: type[Exception]
        if ending == ".jsonl.gz":
            self.begin, self.error = lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS), zlib.error
        else:
            with extra("data", path):
                import zstandard
            self.begin, self.error = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        self.frame = self.begin()
        self.plain = b""

    def readable(self) -> bool:
        """See `io.IOBase`."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """See `io.RawIOBase`."""
        view = memoryview(buffer)
        while not self.plain:
            compressed = (self.frame.unused_data if self.frame.eof else b"") or self.file.read(_COMPRESSED_BYTES)
            if not compressed:
                if not self.frame.eof:
                    raise ValueError(f"{self.path} ends too early, at byte {self.file.tell()}: it is not whole")
                return 0
            if self.frame.eof:
                self.frame = self.begin()
            try:
                self.plain = self.frame.decompress(compressed)
            except self.error as error:
                raise ValueError(f"{self.path} cannot be decompressed: {error}") from None
        count = min(len(view), len(self.plain))
        view[:count], self.plain = self.plain[:count], self.plain[count:]
        return count


def _parquet(path: Path, text_field: str) -> Iterator[bytes]:
    with extra("data", path):
        import pyarrow
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise ValueError(f"{path} has no column {text_field!r}; it has {', '.join(file.schema_arrow.names)}")
            row = 0
            for batch in file.iter_batches(ROWS_AT_A_TIME, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise ValueError(f"{path}, row {row}: its {text_field!r} is {type(text).__name__}, not text")
                    yield text.encode()
                    row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from None


def _streamed(source: str, text_field: str) -> Iterator[bytes]:
    with extra("hf", f"--data {source}"):
        import datasets
    parts = urlsplit(source)
    if not parts.path:
        raise ValueError(f"--data {source} names no dataset; give hf:NAME?name=CONFIG&split=SPLIT")
    options = {"split": "train"} | dict(parse_qsl(parts.query))

    def rows() -> Iterator[dict[str, Any]]:
        try:
            yield from datasets.load_dataset(parts.path, streaming=True, **options)
        except Exception as error:  # It raises a dozen kinds.
            raise ValueError(f"--data {source} cannot be opened or read: {error}") from None

    for number, row in enumerate(rows()):
        text = row.get(text_field)
        if not isinstance(text, str):
            raise ValueError(
                f"--data {source}, row {number}: its {text_field!r} is {type(text).__name__}, not text; it has "
                f"{', '.join(row)}: give --text-field"
            )
        yield text.encode()
