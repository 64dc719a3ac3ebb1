"""Images of a build that cannot be read. All of them are listed at once; ``--skip-bad`` leaves them
out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from prelora_ds.errors import ConfigError
from prelora_ds.files import replace_file

LIST_NAME = "bad-images.txt"
_SHOWN = 20


class BadImage(NamedTuple):
    """An image, by its file and its place in it, and why it cannot be read."""

    image: str
    problem: str


def write_list(folder: Path, bad: Sequence[BadImage]) -> None:
    """Write all of them to a file in ``folder``; without any, remove the list of an earlier try."""
    if not bad:
        (folder / LIST_NAME).unlink(missing_ok=True)
        return
    text = "".join(f"{one.image}: {one.problem}\n" for one in bad)
    replace_file(folder / LIST_NAME, text.encode(errors="backslashreplace"))


def told(bad: Sequence[BadImage]) -> str:
    """A line for each of the first ones, and how many follow."""
    more = len(bad) - _SHOWN
    return "\n".join(
        [f"  {one.image}: {one.problem}" for one in bad[:_SHOWN]]
        + ([f"  and {more} more"] if more > 0 else [])
    )


def refusal(source: Path, partial: Path, bad: Sequence[BadImage]) -> ConfigError:
    """What ends a build without --skip-bad."""
    again = (
        f"repair {'it' if len(bad) == 1 else 'them'} and run the same command again, which writes "
        f"only the shards that are missing; or add --skip-bad to leave out what cannot be read; or "
        f"remove {partial} to begin anew with what is then in the source"
    )
    if len(bad) == 1:
        return ConfigError(
            "SOURCE", bad[0].image, f"this image cannot be read: {bad[0].problem}", again
        )
    return ConfigError(
        "SOURCE",
        str(source),
        f"{len(bad)} images cannot be read (all are listed in {partial / LIST_NAME}):\n{told(bad)}",
        again,
    )
