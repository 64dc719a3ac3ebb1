"""Which code this is: the version of the package, its commit, and the versions of what it runs on."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__version__ = "0.1.0"  # setup.py reads this line

_PACKAGES = ("torch", "deepspeed", "transformers", "peft")


def git_commit() -> str | None:
    """Return the commit of this package's checkout, with ``-dirty`` if it has changes; None if it is not a checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package, and of the packages that decide the numbers of a run."""
    found = {"python": platform.python_version(), "prelora_ds": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
