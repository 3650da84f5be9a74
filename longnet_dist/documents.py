"""The documents in a file: the whole of it, or the rows of JSON lines and Parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

ROWS_AT_A_TIME = 1024


def read_documents(path: Path, text_field: str = "text") -> Iterator[bytes]:
    """The documents of a file, by its name: `.jsonl`, `.jsonl.zst` and `.parquet` have one a row; any other is one.

    Args:
        path: the file.
        text_field: the key, or the column, that holds a row's text.

    Raises:
        ValueError: naming the file, and the line and byte or the row, where a row is not as it should be,
            or a package is missing.
    """
    if path.name.endswith(".jsonl"):
        with path.open("rb") as file:
            yield from _json_lines(path, file, text_field)
    elif path.name.endswith(".jsonl.zst"):
        yield from _compressed_json_lines(path, text_field)
    elif path.suffix == ".parquet":
        yield from _parquet(path, text_field)
    else:
        yield path.read_bytes()


def _json_lines(path: Path, file: IO[bytes], text_field: str) -> Iterator[bytes]:
    begin = 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                text = json.loads(line.decode())[text_field]
                if not isinstance(text, str):
                    raise ValueError(f"its {text_field!r} is {type(text).__name__}, not text")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}, byte {begin + error.start}: it is not UTF-8") from None
            except (KeyError, TypeError):
                raise ValueError(f"{path}, line {number}, byte {begin}: it is no object with {text_field!r}") from None
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, byte {begin}: {error}") from None
            yield text.encode()
        begin += len(line)


def _compressed_json_lines(path: Path, text_field: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{path} needs the package zstandard: pip install 'longnet-dist[data]'") from None
    try:
        with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as plain:
            yield from _json_lines(path, io.BufferedReader(plain), text_field)
    except zstandard.ZstdError as error:
        raise ValueError(f"{path} cannot be decompressed: {error}") from None


def _parquet(path: Path, text_field: str) -> Iterator[bytes]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path} needs the package pyarrow: pip install 'longnet-dist[data]'") from None
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
