"""ImageNet's and torchvision's tree: a folder for each class, images anywhere below."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from prelora_ds.core.errors import ConfigError
from prelora_ds.data.sources.listing import Listing, Request, broken, choose_split, items

KIND = "imagefolder"
# torchvision's ImageFolder takes these.
_IMAGES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
_SPLITS = {"train", "val", "valid", "validation", "test"}


def detect(source: Path) -> bool:
    return source.is_dir() and any(entry.is_dir() for entry in source.iterdir())


def find(request: Request) -> Listing:
    """Labels are the places of the folders in alphabetical order. Raises ConfigError for a class without images."""
    top, names = request.source, _folders(request.source)
    if names and set(names) <= _SPLITS:
        top = top / choose_split(names, request)
        names = _folders(top)
    elif request.split is not None:
        raise ConfigError("--split", request.split, f"{top} is not divided into {', '.join(sorted(_SPLITS))}",
                          "leave it out, and name the folder of the split")
    if not names:
        raise broken(top, "no folder with a sub-folder per class")
    files, labels, others = [], [], Counter[str]()
    for label, name in enumerate(names):
        found = sorted(_below(top / name))
        images = [file for file in found if Path(file).suffix.lower() in _IMAGES]
        others.update(Path(file).suffix.lower() or "no suffix" for file in found)
        if not images:
            raise broken(top / name, "this class has no images")
        files += images
        labels += [label] * len(images)
    others = Counter({suffix: count for suffix, count in others.items() if suffix not in _IMAGES})
    return Listing(KIND, tuple(names), tuple(files), items(range(len(files)), labels, 0, -1),
                   ", ".join(f"{count} files with {suffix}" for suffix, count in sorted(others.items())))


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())


def _below(folder: Path) -> list[str]:
    def stop(error: OSError) -> None:
        raise broken(folder, f"cannot be listed ({error})")

    return [os.path.join(path, name) for path, _, names in os.walk(folder, onerror=stop, followlinks=True)
            for name in names]
