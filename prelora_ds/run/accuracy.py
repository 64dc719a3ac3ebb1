"""The accuracy.json that `prelora evaluate` writes into a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from prelora_ds.errors import ConfigError
from prelora_ds.run.parsed import Count, Record, Text, parsed


class StoredAccuracy(Record):
    """A stored result: ``correct`` of ``samples`` are correct.

    correct5: of how many the right class is among the first five; None for at most five classes,
        and in files of earlier versions, the first of which wrote neither data nor identity.
    """

    correct: Count
    samples: Annotated[Count, Field(ge=1)]
    correct5: Count | None = None
    data: Text | None = None
    identity: Text | None = None

    @model_validator(mode="after")
    def _at_most_all_are_right(self) -> StoredAccuracy:
        among5 = self.samples if self.correct5 is None else self.correct5
        if not self.correct <= among5 <= self.samples:
            raise ValueError(f"{self.correct} and {among5} of {self.samples} cannot be right")
        return self


def read_accuracy(path: Path) -> StoredAccuracy:
    """Read an accuracy.json. Raises ConfigError."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as exc:
        raise ConfigError(
            "log", str(path), f"cannot be read ({exc.strerror})", "make it readable"
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(
            "log", str(path), f"is not JSON ({exc})", "write it again with `prelora evaluate`"
        ) from exc
    return parsed(StoredAccuracy, content, path, "the file")
