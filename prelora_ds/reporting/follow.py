"""Read the rows that a growing log has got since the last time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK = 1 << 20  # bytes that are read at once


class LogFollower:
    """A JSON-lines file that another process writes.

    damaged: the numbers of the lines that are not JSON objects, which are skipped.
    problem: why the file could not be read the last time, or None.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start_over()
        self._file: tuple[int, int] | None = None
        self.problem: str | None = None

    def _start_over(self) -> None:
        self._offset = 0
        self._lines = 0
        self._torn = b""
        self.damaged: list[int] = []

    def read(self) -> tuple[bool, Iterator[dict[str, Any]]]:
        """Return whether the file was cut back or replaced, and its new rows: after that, all of them.

        The last line may still be in writing, so it waits for its end. A file that is missing has no rows.
        """
        try:
            stat = os.stat(self._path)
        except OSError:
            replaced = self._file is not None
            self._file = None
            self._start_over()
            return replaced, iter(())
        file = stat.st_dev, stat.st_ino
        replaced = self._file is not None and (file != self._file or stat.st_size < self._offset)
        if file != self._file or replaced:
            self._start_over()
        self._file = file
        return replaced, self._rows() if stat.st_size > self._offset else iter(())

    def _rows(self) -> Iterator[dict[str, Any]]:
        self.problem = None
        try:
            yield from self._new_rows()
        except OSError as exc:
            self.problem = exc.strerror or str(exc)

    def _new_rows(self) -> Iterator[dict[str, Any]]:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            while chunk := file.read(CHUNK):
                self._offset += len(chunk)
                *lines, self._torn = (self._torn + chunk).split(b"\n")
                for line in lines:
                    self._lines += 1
                    row = _parsed(line)
                    if row is None:
                        self.damaged.append(self._lines)
                    else:
                        yield row


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
