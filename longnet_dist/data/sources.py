"""The documents in files: the whole of each, or the rows of JSON lines and Parquet; or of a Hugging Face dataset."""

from __future__ import annotations

import glob
import io
import json
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO
from urllib.parse import parse_qsl, urlsplit

from longnet_dist.extras import extra

ROWS_AT_A_TIME = 1024
HUGGING_FACE = "hf:"


def standard_library() -> list[Path]:
    """The source of the running Python's standard library: about 30 MB that every machine has."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts and "__pycache__" not in p.parts)


def find_files(paths: Sequence[str]) -> list[Path | str]:
    """The files that files, folders and globs (with `**`) name, sorted, each once; hidden ones only by name.

    What begins with `hf:` is a Hugging Face dataset, and passed on.

    Raises:
        ValueError: where one of them names no file.
    """
    found: set[Path] = set()
    for given in paths:
        if given.startswith(HUGGING_FACE):
            continue
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
    return [*sorted(found), *sorted({given for given in paths if given.startswith(HUGGING_FACE)})]


def read_documents(source: Path | str, text_field: str = "text", only_text: bool = False) -> Iterator[bytes]:
    """The documents of a file, by its name: `.jsonl`, `.jsonl.zst` and `.parquet` have one a row; any other is one.

    Args:
        source: the file; or `hf:NAME?name=CONFIG&split=SPLIT`, a Hugging Face dataset (or a folder that the package
            `datasets` reads), which is streamed: what follows the `?` goes to `datasets.load_dataset`.
        text_field: the key, or the column, that holds a row's text.
        only_text: whether a file that is not UTF-8 is an error.

    Raises:
        ValueError: naming the file, and the line and byte or the row, where a row is not as it should be,
            or a package is missing.
    """
    if isinstance(source, str):
        yield from _streamed(source, text_field)
        return
    path = source
    if path.name.endswith(".jsonl"):
        with path.open("rb") as file:
            yield from _json_lines(path, file, text_field)
    elif path.name.endswith(".jsonl.zst"):
        yield from _compressed_json_lines(path, text_field)
    elif path.suffix == ".parquet":
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


def _compressed_json_lines(path: Path, text_field: str) -> Iterator[bytes]:
    with extra("data", path):
        import zstandard
    try:
        with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as plain:
            yield from _json_lines(path, io.BufferedReader(plain), text_field)
    except zstandard.ZstdError as error:
        raise ValueError(f"{path} cannot be decompressed: {error}") from None


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
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from None


def _streamed(source: str, text_field: str) -> Iterator[bytes]:
    with extra("hf", f"--data {source}"):
        import datasets
    parts = urlsplit(source)
    options = {"split": "train"} | dict(parse_qsl(parts.query))
    try:
        rows = datasets.load_dataset(parts.path, streaming=True, **options)
    except Exception as error:  # It raises a dozen kinds.
        raise ValueError(f"--data {source} cannot be opened: {error}") from None
    for number, row in enumerate(rows):
        text = row.get(text_field)
        if not isinstance(text, str):
            raise ValueError(
                f"--data {source}, row {number}: its {text_field!r} is {type(text).__name__}, not text; it has "
                f"{', '.join(row)}: give --text-field"
            )
        yield text.encode()
