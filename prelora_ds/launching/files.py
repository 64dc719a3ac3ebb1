"""Files that other processes read while they are written."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def replace_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write ``path`` so that a reader on any host finds the old text or the new one. Raises OSError."""
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.chmod(mode)
    partial.replace(path)
