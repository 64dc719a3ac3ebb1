"""Lines for the console."""

from __future__ import annotations

from datetime import datetime


def stamped(text: str) -> str:
    """The text with the local date and time in front: ``2026-11-26 07:45:10 text``."""
    return f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}"
