"""A real browser for the pages that tests look at."""

from __future__ import annotations

import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# They keep Chromium from looking for its makers' hosts.
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
