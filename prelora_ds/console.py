"""Lines and numbers for the console."""

from __future__ import annotations

from datetime import datetime


def stamped(text: str) -> str:
    """The text with the local date and time in front: ``2026-11-26 07:45:10 text``."""
    return f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}"


def size(count: int) -> str:
    """``count`` bytes in GiB, or in MiB if they are less than one."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
