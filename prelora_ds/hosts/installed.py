"""What is installed on a host, and has to be the same on all of them."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Packages that compute or that decode images: their versions must be the same on all hosts.
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "prelora_ds", "torchvision", "numpy",
            "pillow", "simplejpeg")


def environment_fingerprint(config_text: str, installed: Mapping[str, str]) -> dict[str, str]:
    """Return what must be the same on all hosts: the version of Python, the config, and what is ``installed``."""
    return {"python": platform.python_version(),
            "config": hashlib.sha256(config_text.encode()).hexdigest()[:12]} | dict(installed)


def installed_code() -> dict[str, str]:
    """Return the hash of the code of prelora_ds and the versions of packages, which one rank of a host reads."""
    installed = {"prelora_ds code": code_digest()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "none"
    return installed


def code_digest() -> str:
    """Hash all Python files of the package, which detects another commit or a local edit."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
