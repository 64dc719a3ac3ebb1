"""Data sets as their makers give them: what images are in them, and the bytes of one.

A kind of source is a row of `KINDS`: how it looks, how its images are found, and how one is read. `find` runs once;
`read` runs in any process, in any order, with nothing but a row of the listing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from prelora_ds.core.errors import ConfigError
from prelora_ds.data.sources import arrays, folder, huggingface, ilsvrc
from prelora_ds.data.sources.listing import Listing, Request, read_range


class Kind(NamedTuple):
    """``read(file, offset, length)`` gives the bytes of an encoded image."""

    detect: Callable[[Path], bool]
    find: Callable[[Request], Listing]
    read: Callable[[str, int, int], bytes]


# In the order they are tried; a tree of folders is what is left.
KINDS = {
    ilsvrc.KIND: Kind(ilsvrc.detect, ilsvrc.find, read_range),
    arrays.CIFAR: Kind(arrays.detect_cifar, arrays.find_cifar, arrays.read_cifar),
    arrays.IDX: Kind(arrays.detect_idx, arrays.find_idx, arrays.read_idx),
    huggingface.KIND: Kind(huggingface.detect, huggingface.find, huggingface.read),
    folder.KIND: Kind(folder.detect, folder.find, read_range),
}


def find_images(request: Request, kind: str | None = None) -> Listing:
    """The images of a source, of ``kind`` or of the first that fits it. Raises ConfigError for a source of no kind."""
    if not request.source.exists():
        raise ConfigError("SOURCE", str(request.source), "no such file or folder", "name a data set on disk")
    if kind is None:
        kind = next((name for name, tried in KINDS.items() if tried.detect(request.source)), None)
    if kind is None:
        raise ConfigError("SOURCE", str(request.source), f"looks like none of {', '.join(KINDS)}",
                          "name the folder with a sub-folder per class, or give --format")
    if kind not in KINDS:
        raise ConfigError("--format", kind, "no such format", f"give one of {', '.join(KINDS)}")
    if request.labels is not None and (kind != ilsvrc.KIND or not request.labels.exists()):
        raise ConfigError("--labels", str(request.labels), f"no such file, or not for {kind}",
                          f"give it with {ilsvrc.KIND} alone")
    try:
        listing = KINDS[kind].find(request)
    except (NotADirectoryError, IsADirectoryError) as error:
        raise ConfigError("--format", kind, f"{request.source} is none ({error.strerror})", "leave it out") from error
    if not len(listing.items):
        raise ConfigError("SOURCE", str(request.source), "the source is empty, it has no images", "name another")
    return listing
