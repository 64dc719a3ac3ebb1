"""What the commands share: how they end, and how they write the files that a user names."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from prelora_ds.errors import (
    READER_GONE_EXIT_CODE,
    TRY_AGAIN_EXIT_CODE,
    ConfigError,
    ExpectedError,
    cannot_write,
    is_disk_fault,
)


@contextmanager
def one_message() -> Iterator[None]:
    """For a command of one process: an ExpectedError is a line and its exit code, not a traceback.

    So is a disk that fails, also under the standard output. Where the reader of that is gone, the command ends
    with 141, as if it had met SIGPIPE: any other code may say something of what it looked at.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except ExpectedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # typer and rich make it a 1
            _give_up_output()
            sys.exit(READER_GONE_EXIT_CODE)
        raise
    except BrokenPipeError:
        _give_up_output()
        sys.exit(READER_GONE_EXIT_CODE)
    except OSError as error:
        if not is_disk_fault(error):
            raise
        _give_up_output()
        print(f"error: {error}\n"
              "  remedy: make room, or repair the disk; then give the same command again", file=sys.stderr)
        sys.exit(TRY_AGAIN_EXIT_CODE)


def _give_up_output() -> None:
    """What is left of the output would fail once more at the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def tell(text: str) -> None:
    """Print what a command has done, after it is done: where that cannot be written, nothing is left to do again."""
    from prelora_ds.hosts.exits import ignore_output_errors

    ignore_output_errors()
    typer.echo(text)


MAY_BE_EMPTY = ("--probe",)  # of `prelora supervise`: no probe


def refuse_empty(arguments: Sequence[str]) -> None:
    """Raise ConfigError for an argument of a command line, or the value of an option, that is empty.

    As a path it would be the current folder, and it is rather a variable of the shell that is not set. What follows
    ``--`` is a command of its own.
    """
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for before, argument in zip(["", *own], own, strict=False):
        option, equals, value = argument.partition("=")
        empty = not argument or (option.startswith("--") and equals and not value)
        if empty and not {before, option} & set(MAY_BE_EMPTY):
            raise ConfigError(option or "argument", shlex.join(["prelora", *arguments]), "is empty",
                              "give it a value; . is the current folder")


def refuse_url(path: Path | None, key: str) -> None:
    """Raise ConfigError for a URL in the place of a folder that is written: it would become folders of that name."""
    first = "" if path is None or len(path.parts) < 2 else path.parts[0]
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+:", first) and not Path(first).exists():
        raise ConfigError(key, str(path), "is a URL, and this is written to a file system",
                          "name a folder there, for example where the store is mounted")


def save_json(path: Path, value: Any, key: str) -> None:
    """Write ``value`` as JSON to the path that the user named by ``key``. Raises ConfigError."""
    from prelora_ds.run.log import json_text

    save(path, json_text(value, indent=2) + "\n", key)


def save(path: Path, text: str, key: str, *, executable: bool = False) -> None:
    """Write ``text`` to the path that the user named by ``key``. Raises ConfigError."""
    from prelora_ds.files import replace_file

    try:
        replace_file(path, text, executable=executable)
    except OSError as exc:
        raise cannot_write(key, path, exc) from exc
