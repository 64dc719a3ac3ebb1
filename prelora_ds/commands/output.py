"""What the commands share: how they end, and how they write the files that a user names."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import traceback
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
def expected_errors_as_messages(*, tracebacks: bool) -> Iterator[None]:
    """End the process of a command on an ExpectedError, with its message and exit code and no traceback.

    A failing disk is treated in the same way, also the one that standard output is written to. If the reader of
    standard output is gone, the exit code is 141, as after SIGPIPE: any other code could be taken for a result.

    tracebacks: whether the traceback is printed before the message.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except ExpectedError as error:
        _print_error(str(error), tracebacks)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # typer and rich turn it into exit code 1
            _discard_output()
            sys.exit(READER_GONE_EXIT_CODE)
        raise
    except BrokenPipeError:
        _discard_output()
        sys.exit(READER_GONE_EXIT_CODE)
    except OSError as error:
        if not is_disk_fault(error):
            raise
        _discard_output()
        _print_error(f"{error}\n  remedy: free some space or repair the disk, then run the same command again",
                     tracebacks)
        sys.exit(TRY_AGAIN_EXIT_CODE)


def _print_error(message: str, with_traceback: bool) -> None:
    if with_traceback:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)


def _discard_output() -> None:
    """Send what is left of standard output to /dev/null, where flushing it at exit cannot fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@contextmanager
def signals_as_exits() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command like an error, so that it leaves terminal and folders tidy."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    former = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def tell(text: str) -> None:
    """Print what a command has done. If it cannot be printed, the work is done all the same: the exit code stays 0."""
    from prelora_ds.hosts.exits import ignore_output_errors

    ignore_output_errors()
    typer.echo(text)


MAY_BE_EMPTY = ("--probe",)  # an empty one turns off the probes of `prelora supervise`


def refuse_empty(arguments: Sequence[str]) -> None:
    """Raise ConfigError for an argument, or a value of an option, that is empty.

    As a path it would mean the current folder, but most likely it is a shell variable that is not set. Words after
    ``--`` belong to another command and are not checked.
    """
    checked = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for before, argument in zip(["", *checked], checked, strict=False):
        option, equals, value = argument.partition("=")
        empty = not argument or (option.startswith("--") and equals and not value)
        if empty and not {before, option} & set(MAY_BE_EMPTY):
            raise ConfigError(option or "argument", shlex.join(["prelora", *arguments]), "is empty",
                              "give it a value (write . for the current folder)")


def refuse_url(path: Path | None, key: str) -> None:
    """Raise ConfigError if ``path``, which will be written, is a URL: it would create local folders of that name."""
    first = "" if path is None or len(path.parts) < 2 else path.parts[0]
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+:", first) and not Path(first).exists():
        raise ConfigError(key, str(path), "is a URL, but the output must be a local folder",
                          "name a folder, for example one where the store is mounted")


def print_json(value: Any) -> None:
    """Print ``value`` as JSON on standard output."""
    from prelora_ds.run.log import json_text

    typer.echo(json_text(value, indent=2))


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
