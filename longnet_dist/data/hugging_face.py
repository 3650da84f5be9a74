"""Hugging Face datasets as documents: streamed, tried again after a failure, and resumed where they were left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from longnet_dist.best_effort import print_note
from longnet_dist.extras import extra

HUGGING_FACE = "hf:"
"""The prefix of the name of a Hugging Face dataset."""
WAITS = (1.0, 5.0, 20.0, 60.0)
"""The seconds to wait before each new try, after failures at the same row."""


class HuggingFaceDocuments:
    """The texts of a dataset's rows.

    Args:
        source: `hf:NAME?name=CONFIG&split=SPLIT`. NAME may also be a folder that the package `datasets` reads. The
            options after `?` go to `datasets.load_dataset`.
        text_field: the column that holds the text.

    Raises:
        ValueError: if the package or the name of the dataset is missing.
    """

    def __init__(self, source: str, text_field: str) -> None:
        with extra("hf", f"--data {source}"):
            import datasets
        parts = urlsplit(source)
        if not parts.path:
            raise ValueError(f"--data {source} names no dataset; give hf:NAME?name=CONFIG&split=SPLIT")
        self.source, self.text_field = source, text_field
        options = {"split": "train"} | dict(parse_qsl(parts.query))
        self._open = lambda: datasets.load_dataset(parts.path, streaming=True, **options)
        self._dataset: Any = None
        self._row = 0

    @property
    def position(self) -> dict[str, Any]:
        """Where the next document begins, as JSON holds it."""
        return {"row": self._row, "state": None if self._dataset is None else self._dataset.state_dict()}

    def read(self, position: dict[str, Any] | None) -> Iterator[bytes]:
        """Yield the documents from a position on; from the first if it is None.

        After a failure in the middle of the dataset, of whatever type, it is opened again at the row that failed.

        Raises:
            ValueError: if the dataset cannot be opened, still fails after the last of `WAITS`, or a row has no text.
        """
        position = position or {"row": 0, "state": None}
        failures, failed_row = 0, -1
        while True:
            self._row = position["row"]
            try:
                self._dataset = self._open()
                if position["state"] is not None:
                    self._dataset.load_state_dict(position["state"])
                for row in self._dataset:
                    self._row += 1
                    yield self._text(row)
                return
            except _BadRowError as error:
                raise ValueError(str(error)) from None
            except Exception as error:  # The package raises exceptions of many types.
                failures, failed_row = (failures + 1 if self._row == failed_row else 1), self._row
                opened_before = self._row > 0
                if not opened_before or failures > len(WAITS):
                    where = f" after row {self._row}, tried {failures} times" if opened_before else ""
                    raise ValueError(f"--data {self.source} cannot be opened or read{where}: {error}") from None
                print_note(
                    f"{self.source} failed after row {self._row}, and is opened again in {WAITS[failures - 1]:g} s: "
                    f"{type(error).__name__}: {error}"
                )
                position = self.position if position["row"] != self._row else position
            time.sleep(WAITS[failures - 1])

    def _text(self, row: dict[str, Any]) -> bytes:
        text = row.get(self.text_field)
        if not isinstance(text, str):
            raise _BadRowError(
                f"--data {self.source}, row {self._row - 1}: its {self.text_field!r} is {type(text).__name__}, not "
                f"text; it has {', '.join(row)}: give --text-field"
            )
        return text.encode()


class _BadRowError(Exception):
    """A row without text, for which no new try helps."""
