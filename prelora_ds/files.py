"""Files and folders that are written whole, or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

PARTIAL = ".partial"  # how the name of what is being written ends; it begins with a dot


def replace_file(path: Path, data: str | bytes | memoryview, *, durable: bool = True,
                 executable: bool = False) -> None:
    """Write ``data`` under another name beside ``path``, and then give it that name.

    A reader, on this host or another, finds the old content or the new one and never a part.

    durable: content and name are on disk when this returns, so that they survive a power cut. It
    takes milliseconds on a local disk, and more on a shared one.

    Raises OSError; then ``path`` is as it was, and nothing else is left.
    """
    content = data.encode() if isinstance(data, str) else data
    partial = path.with_name(f".{path.name.lstrip('.')}.{socket.gethostname()}.{uuid4().hex}{PARTIAL}")
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
    """A folder to write into, which gets the name ``path`` at the end, whole and on disk.

    replace: whether a folder of that name is replaced, for a caller that is the only one to write it;
    what an earlier try left after a kill is removed then, too. Without, such a folder is an OSError.

    After an exception ``path`` is as it was, and nothing else is left. Raises OSError.
    """
    if replace:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)
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
    """Bring the names in ``folder`` to disk. Raises OSError."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
