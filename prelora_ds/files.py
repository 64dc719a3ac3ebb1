"""Write files and folders atomically: completely, or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

# The suffix of the names of unfinished files and folders, which begin with a dot.
PARTIAL = ".partial"


def replace_file(path: Path, data: str | bytes | memoryview, *, durable: bool = True,
                 executable: bool = False) -> None:
    """Replace ``path`` atomically: write ``data`` to a temporary file and rename that file.

    A reader, on this host or another, finds the old content or the new one and never a part of it.

    durable: content and name are on disk when this returns, so they survive a power cut. This takes
        milliseconds on a local disk, and longer on a shared one.

    Raises OSError; ``path`` is then unchanged, and the temporary file is removed.
    """
    content = data.encode() if isinstance(data, str) else data
    name = path.name.lstrip(".")
    partial = path.with_name(f".{name}.{socket.gethostname()}.{uuid4().hex}{PARTIAL}")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if executable:
            partial.chmod(0o755)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


@contextmanager
def new_folder(path: Path, *, replace: bool) -> Iterator[Path]:
    """Yield a temporary folder to write into; at the end, sync it and rename it to ``path``.

    replace: replace an existing folder ``path``, and remove the leftovers of an earlier attempt
        that was killed. Only for a caller that is the only one to write it. If replace is false, an
        existing folder is an OSError.

    After an exception ``path`` is unchanged, and the temporary folder is removed. Raises OSError.
    """
    if replace:
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}{PARTIAL}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _sync(file)
        if replace:
            shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync ``folder`` to disk, so that renames in it are durable. Raises OSError."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
