"""The documents of all sources of a corpus, which can be read from any position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longnet_dist.data.hugging_face import HuggingFaceDocuments
from longnet_dist.data.sources import read_documents


class Documents:
    """The documents of files and datasets, in the order of the sources; satisfies `writing.DocumentReader`.

    Args:
        sources: files, and the names of Hugging Face datasets.
        text_field: the key or column that holds the text of a row.
        require_utf8, allow_binary: see `read_documents`.
    """

    def __init__(
        self, sources: Sequence[Path | str], text_field: str, *, require_utf8: bool = False, allow_binary: bool = False
    ) -> None:
        self._sources = sources
        self._text_field = text_field
        self._options = {"require_utf8": require_utf8, "allow_binary": allow_binary}
        self._source = 0
        self._place: int | HuggingFaceDocuments = 0

    @property
    def position(self) -> dict[str, Any]:
        """Where the next document begins, as JSON holds it: the source, and the place in it."""
        place = self._place if isinstance(self._place, int) else self._place.position
        return {"source": self._source, "place": place}

    def read(self, position: dict[str, Any] | None) -> Iterator[bytes]:
        """Yield the documents from a position on; from the first if it is None.

        Earlier sources are not read again, and of a dataset at most the part since its last position.

        Raises:
            ValueError: if a document cannot be read.
        """
        begin = position or {"source": 0, "place": None}
        for number in range(begin["source"], len(self._sources)):
            source, place = self._sources[number], begin["place"] if number == begin["source"] else None
            self._source = number
            if isinstance(source, str):
                dataset = self._place = HuggingFaceDocuments(source, self._text_field)
                yield from dataset.read(place)
                continue
            for count, document in enumerate(read_documents(source, self._text_field, **self._options), start=1):
                if count > (place or 0):
                    self._place = count
                    yield document
