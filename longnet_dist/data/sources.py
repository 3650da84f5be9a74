"""Files of documents: which of them are read, and how."""

from __future__ import annotations

import bz2
import contextlib
import fnmatch
import glob
import io
import json
import lzma
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from longnet_dist.data.hugging_face import HUGGING_FACE
from longnet_dist.extras import extra
from longnet_dist.paths import local_path

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COMPRESSIONS = (".gz", ".bz2", ".xz", ".lzma", ".zst")
"""Endings of compressed files, which are decompressed as they are read."""
_ARCHIVES = (".7z", ".rar", ".tar", ".tbz2", ".tgz", ".txz", ".zip", ".lz4", ".z")
_TABLES = (".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro", ".xlsx")
_NO_TEXT = (
    *(".npy", ".npz", ".pt", ".pth", ".pkl", ".safetensors", ".h5", ".hdf5", ".png", ".jpg", ".jpeg", ".gif", ".webp"),
    *(".tif", ".tiff", ".svs", ".mp3", ".mp4", ".wav", ".pdf", ".pyc", ".so", ".o", ".exe"),
)
_REFUSALS = {
    _ARCHIVES: "is an archive or compressed in a way that is not read here: unpack it, or leave it out",
    _TABLES: "is a table, which is not read here: convert it to .parquet or .jsonl, or leave it out",
    _NO_TEXT: "holds no text: leave it out, or give its bytes another name if they are what you want to train on",
}
"""Endings of files that are refused, with the reason: nobody wants to train on their bytes by mistake."""
_BATCH_ROWS = 1024
_COMPRESSED_BYTES = 1 << 14
"""The number of bytes of a compressed file that are read at a time."""


def standard_library() -> list[Path]:
    """Return the source files of the running Python's standard library: about 30 MB that every machine has."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts and "__pycache__" not in p.parts)


def find_files(paths: Sequence[str]) -> list[Path | str]:
    """Find the files and datasets that `paths` names.

    A folder is searched without following links to other folders. A glob follows them, and searches each real folder
    once, so that a loop of links costs no more than the folders in it.

    Args:
        paths: files, folders, globs (with `**`), and Hugging Face datasets, which begin with `hf:`. Hidden files of a
            folder are left out, and so is all that is no regular file.

    Returns:
        The files, sorted and without duplicates, and then the names of the datasets.

    Raises:
        ValueError: if a path matches no file, or a file is an archive, a table that is not read, or no text.
    """
    matches: set[Path] = set()
    for name in paths:
        if name.startswith(HUGGING_FACE):
            continue
        path = local_path(name)
        if path.is_file():
            files = [path]
        elif path.is_dir():
            files = _search(path, ("**", "*"), follow_links=False)
        else:
            files = _search(Path(path.anchor), path.relative_to(path.anchor).parts, follow_links=True)
        if not files:
            raise ValueError(
                f"--data {name}: no such file; give files, folders or globs, for example src/ or 'src/**/*.py'"
            )
        for p in files:
            _format(p)
        matches.update(p.resolve() for p in files)
    return [*sorted(matches), *sorted({name for name in paths if name.startswith(HUGGING_FACE)})]


def _search(root: Path, pattern: tuple[str, ...], follow_links: bool) -> list[Path]:
    """Return the regular files under `root` that match a pattern, given as the parts of a path, in any order."""
    files, searched = [], set()
    pending = [(root, (*pattern, "*") if pattern[-1:] == ("**",) else pattern)]
    while pending:
        folder, parts = pending.pop()
        # What the rest of a pattern finds in a folder does not depend on the links that lead there.
        state = (os.path.realpath(folder), len(parts))
        if not parts or state in searched:
            continue
        searched.add(state)
        part, rest = parts[0], parts[1:]
        if part == "**":
            pending.append((folder, rest))
            rest = parts
        for path in _children(folder, "*" if part == "**" else part):
            if rest:
                if path.is_dir() and (follow_links or not path.is_symlink()):
                    pending.append((path, rest))
            elif path.is_file():
                files.append(path)
    return files


def _children(folder: Path, part: str) -> list[Path]:
    """Return what a part of a glob names in a folder; nothing if the folder cannot be listed, as in a shell."""
    if not glob.has_magic(part):
        return [folder / part]
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return [folder / n for n in fnmatch.filter(names, part) if part.startswith(".") or not n.startswith(".")]


def read_documents(
    path: Path, text_field: str = "text", *, require_utf8: bool = False, allow_binary: bool = False
) -> Iterator[bytes]:
    """Read the documents of a file.

    JSON lines (`.jsonl`) and `.parquet` have one document per row. Any other file is one document. Files in one of
    `COMPRESSIONS`, such as `.jsonl.gz` and `.txt.xz`, are decompressed.

    Args:
        path: the file.
        text_field: the key or column that holds the text of a row.
        require_utf8: whether to refuse a whole-file document that is not UTF-8.
        allow_binary: whether to take a whole-file document with NUL bytes, which text does not have.

    Yields:
        Each document, as bytes.

    Raises:
        ValueError: if a row is malformed, a file is truncated, damaged, or of a kind that is not read,
            or a package is missing. The message names the file, and the line and byte, or the row.
    """
    form, compression = _format(path)
    if form == ".parquet":
        yield from _parquet(path, text_field)
        return
    with path.open("rb") as file, contextlib.ExitStack() as stack:
        plain: IO[bytes] = file
        if compression:
            plain = stack.enter_context(io.BufferedReader(_DecompressedFile(path, file, compression)))
        if form == ".jsonl":
            yield from _json_lines(path, plain, text_field)
            return
        content = plain.read()
    if not allow_binary and (at := content.find(0)) >= 0:
        raise ValueError(
            f"{path}, byte {at}: a NUL byte, as in UTF-16, programs and images, but not in text: convert it to UTF-8, "
            "leave it out, or give --allow-binary to take its bytes as they are"
        )
    if require_utf8:
        try:
            content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, byte {error.start}: it is not UTF-8; leave it out, or train on bytes (no --tokenizer)"
            ) from None
    yield content


def _format(path: Path) -> tuple[str, str]:
    """Return the ending that says how a file's content is read, and that of its compression; "" for none.

    Raises:
        ValueError: if the file is an archive, a table that is not read here, or no text.
    """
    name = path.name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    name = name.removesuffix(compression)
    for endings, reason in _REFUSALS.items():
        if name.endswith(endings):
            raise ValueError(f"{path} {reason}")
    if name.endswith(".parquet") and compression:
        raise ValueError(f"{path} is compressed as a whole, and Parquet compresses its columns: decompress it")
    return next((ending for ending in (".jsonl", ".parquet") if name.endswith(ending)), ""), compression


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
                raise ValueError(
                    f"{path}, line {number}, byte {begin}: it is not an object with the key {text_field!r}"
                ) from None
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, byte {begin}: {error}") from None
            except RecursionError:
                raise ValueError(f"{path}, line {number}, byte {begin}: its JSON is nested too deeply") from None
            yield document
        begin += len(line)


class _DecompressedFile(io.RawIOBase):
    """The decompressed content of a file in one of `COMPRESSIONS`, with all its members or frames.

    A truncated file is an error. (The reader of the package zstandard would silently return less.)
    """

    def __init__(self, path: Path, file: IO[bytes], compression: str) -> None:
        self.path, self.file = path, file
        self.new_decompressor: Callable[[], Any]
        self.error: type[Exception]
        if compression == ".gz":
            self.new_decompressor, self.error = lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS), zlib.error
        elif compression == ".bz2":
            self.new_decompressor, self.error = bz2.BZ2Decompressor, OSError
        elif compression in (".xz", ".lzma"):
            self.new_decompressor, self.error = lzma.LZMADecompressor, lzma.LZMAError
        else:
            with extra("data", path):
                import zstandard
            self.new_decompressor, self.error = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        # One decompressor per member or frame.
        self.frame = self.new_decompressor()
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
                    raise ValueError(f"{self.path} ends too early, at byte {self.file.tell()}: it is truncated")
                return 0
            if self.frame.eof:
                self.frame = self.new_decompressor()
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
            for batch in file.iter_batches(_BATCH_ROWS, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise ValueError(f"{path}, row {row}: its {text_field!r} is {type(text).__name__}, not text")
                    yield text.encode()
                    row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from None
