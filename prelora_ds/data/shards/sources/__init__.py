"""Reading data sets as their makers publish them.

Each row of `SOURCE_FORMATS` is a format: how it is detected, how its images are listed, and how an
image is read and named. `find` runs once; `read` and `name` run in any process, in any order, and
need only a row of the listing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from prelora_ds.data.shards.reading import broken, check_regular, packing, read_range, reading
from prelora_ds.data.shards.sources import arrays, folder, huggingface, ilsvrc
from prelora_ds.data.shards.sources.listing import Listing, Request, check_classes
from prelora_ds.errors import ConfigError


class SourceFormat(NamedTuple):
    """A format of a source.

    detect: returns a path that shows that a source has this format, otherwise None.
    find: lists the images.
    read: returns the bytes of the encoded image at (file, offset, length).
    name: returns the name of that image for messages.
    """

    detect: Callable[[Path], Path | None]
    find: Callable[[Request], Listing]
    read: Callable[[str, int, int], bytes]
    name: Callable[[str, int, int], str]


def _row(file: str, row: int, _: int) -> str:
    return f"{file}, image {row}"


# In the order in which they are tried; a tree of folders is the last resort.
SOURCE_FORMATS = {
    ilsvrc.FORMAT: SourceFormat(ilsvrc.detect, ilsvrc.find, read_range, ilsvrc.name),
    arrays.CIFAR: SourceFormat(arrays.detect_cifar, arrays.find_cifar, arrays.read_cifar, _row),
    arrays.IDX: SourceFormat(arrays.detect_idx, arrays.find_idx, arrays.read_idx, _row),
    huggingface.FORMAT: SourceFormat(huggingface.detect, huggingface.find, huggingface.read, _row),
    folder.FORMAT: SourceFormat(
        folder.detect, folder.find, read_range, lambda file, offset, length: file
    ),
}


def find_images(request: Request, source_format: str | None = None) -> Listing:
    """List the images of a source that has ``source_format``, or the detected format if None.

    Raises ConfigError for a source without a known format, and for any mistake in it; DiskError if
    the disk fails.
    """
    with reading(request.source, "a source"):
        _check(request, source_format)
        if source_format is None and request.labels is not None:
            source_format = ilsvrc.FORMAT  # the only format that uses --labels
        if source_format is None:
            source_format = _detected(request.source)
        try:
            listing = SOURCE_FORMATS[source_format].find(request)
        except (NotADirectoryError, IsADirectoryError) as error:
            raise ConfigError(
                "--format",
                source_format,
                f"{request.source} does not have this format ({error.strerror})",
                "omit --format",
            ) from error
    if not len(listing.items):
        raise ConfigError(
            "SOURCE",
            str(request.source),
            "the source is empty, it has no images",
            "name another source",
        )
    check_classes(request.source, listing.classes or ())
    return listing


def _detected(source: Path) -> str:
    """Return the format of the source.

    Raises ConfigError if none fits, and if class folders with images fit as well.
    """
    signs = {name: sign for name, form in SOURCE_FORMATS.items() if (sign := form.detect(source))}
    if not signs:
        raise ConfigError(
            "SOURCE",
            str(source),
            f"looks like none of {', '.join(SOURCE_FORMATS)}",
            "name the folder with a sub-folder per class, or give --format",
        )
    source_format = next(iter(signs))
    if source_format != folder.FORMAT and source.is_dir() and (image := folder.first_image(source)):
        raise ConfigError(
            "SOURCE",
            str(source),
            f"contains {signs[source_format].relative_to(source)}, which has the format "
            f"{source_format}, and {image.relative_to(source)}, which is in a folder of images",
            f"give --format {source_format} or --format {folder.FORMAT}, or remove what does not "
            "belong there",
        )
    return source_format


def _check(request: Request, source_format: str | None) -> None:
    source, labels = request.source, request.labels
    if not source.exists():
        raise ConfigError(
            "SOURCE", str(source), "no such file or folder", "name a data set on disk"
        )
    if source_format is not None and source_format not in SOURCE_FORMATS:
        raise ConfigError(
            "--format", source_format, "no such format", f"give one of {', '.join(SOURCE_FORMATS)}"
        )
    if labels is not None:
        with reading(labels, "labels", "--labels"):
            if not labels.exists():
                raise ConfigError(
                    "--labels", str(labels), "no such file", "name a file of labels, or the devkit"
                )
            if source_format not in (None, ilsvrc.FORMAT):
                raise ConfigError(
                    "--labels",
                    str(labels),
                    f"does not apply to the format {source_format}, which contains its labels",
                    f"use it only with {ilsvrc.FORMAT}",
                )
            check_regular(labels)
    check_regular(source)
    if source_format in (None, ilsvrc.FORMAT) and source.is_file() and (packed := packing(source)):
        raise broken(
            source,
            f"is packed with {packed[0]}, and images are read in place",
            f"unpack it with `{packed[1]}`, and name the result",
        )
