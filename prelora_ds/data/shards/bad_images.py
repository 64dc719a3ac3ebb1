"""The unreadable images of a build: they are all listed at once, and ``--skip-bad`` omits them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from prelora_ds.errors import ConfigError
from prelora_ds.files import replace_file

LIST_NAME = "bad-images.txt"
_SHOWN = 20


class BadImage(NamedTuple):
    """An image, named by its file and its position there, and why it cannot be read."""

    image: str
    problem: str


def write_list(folder: Path, bad: Sequence[BadImage]) -> None:
    """Write the list file in ``folder``; if ``bad`` is empty, remove that of an earlier try."""
    if not bad:
        (folder / LIST_NAME).unlink(missing_ok=True)
        return
    text = "".join(f"{image}: {problem}\n" for image, problem in bad)
    replace_file(folder / LIST_NAME, text.encode(errors="backslashreplace"))


def summary(bad: Sequence[BadImage]) -> str:
    """Return one line for each of the first images, and the number of the others."""
    more = len(bad) - _SHOWN
    lines = [f"  {image}: {problem}" for image, problem in bad[:_SHOWN]]
    if more > 0:
        lines.append(f"  and {more} more")
    return "\n".join(lines)


def refusal(source: Path, partial: Path, bad: Sequence[BadImage]) -> ConfigError:
    """Return the error that ends a build without --skip-bad."""
    remedy = (
        f"repair {'it' if len(bad) == 1 else 'them'} and run the same command again, which writes "
        f"only the missing shards; or add --skip-bad to leave out unreadable images; or remove "
        f"{partial} to start over with the current contents of the source"
    )
    if len(bad) == 1:
        return ConfigError(
            "SOURCE", bad[0].image, f"this image cannot be read: {bad[0].problem}", remedy
        )
    return ConfigError(
        "SOURCE",
        str(source),
        f"{len(bad)} images cannot be read (all are listed in {partial / LIST_NAME}):\n"
        f"{summary(bad)}",
        remedy,
    )
