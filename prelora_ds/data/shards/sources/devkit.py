"""Labels of ILSVRC2012's val images: the devkit, Kaggle's table, or a file with a line per image.

The devkit numbers the classes in its own order (ILSVRC2012_ID); its meta.mat translates these
numbers.
"""

from __future__ import annotations

import csv
import io
import multiprocessing
import re
import tarfile
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from prelora_ds.data.shards.reading import MAX_TEXT_BYTES, describe, packing, read_text, reading
from prelora_ds.errors import ConfigError

HOW_TO_GIVE_LABELS = (
    "give --labels: the devkit (ILSVRC2012_devkit_t12.tar.gz, or the folder it unpacks to), or a "
    "file with one line `IMAGE WNID` or `IMAGE LABEL` per image (such as Kaggle's "
    "LOC_val_solution.csv)"
)
PATIENCE_S = 60.0  # reading the file takes a second or two
_LABEL_FILES = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12", "LOC_val_solution.csv")
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_WNID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"[0-9]{1,9}")
_BOXES = re.compile(r"(?P<wnid>n\d{8})(\s+-?\d+){4}(\s+n\d{8}(\s+-?\d+){4})*")

Labels = tuple[tuple[str, ...] | None, dict[str, int]]


def labels_next_to(folder: Path, levels: int = 0) -> Path | None:
    """Return the devkit or Kaggle's table in ``folder``, or in the ``levels`` folders above it."""
    return next(
        (
            path
            for above in (folder, *folder.parents[:levels])
            for name in _LABEL_FILES
            if (path := above / name).exists()
        ),
        None,
    )


def read_labels(source: Path, names: list[str]) -> Labels:
    """Return (classes, image -> label) for the images ``names``, which must be sorted.

    The classes are None for a file of numbers. Raises ConfigError for a file or folder that is
    neither the devkit nor a table of labels.
    """
    with reading(source, "labels", "--labels"):
        kit = _read_devkit(source)
        if kit is None:
            return _read_table(source, names)
    classes, truth = kit
    if len(truth) != len(names):
        raise ConfigError(
            "--labels",
            str(source),
            f"{len(truth)} labels for {len(names)} images",
            HOW_TO_GIVE_LABELS,
        )
    return classes, dict(zip(names, truth, strict=True))


class _Line(NamedTuple):
    """A line of a table of labels; ``image`` is the name of the image without its suffix."""

    number: int
    text: str
    image: str
    label: str

    def refused(self, source: Path, problem: str) -> ConfigError:
        location = f"line {self.number}, {self.text[:80]!r}: "
        return ConfigError("--labels", str(source), location + problem, HOW_TO_GIVE_LABELS)


def _read_table(source: Path, names: list[str]) -> Labels:
    """Read a table with one line per image; the first line may contain the titles."""
    if packed := packing(source):
        raise ConfigError(
            "--labels", str(source), f"is packed with {packed[0]}", f"unpack it with `{packed[1]}`"
        )
    texts = enumerate(read_text(source, "--labels").splitlines(), 1)
    lines = [_line(source, number, text) for number, text in texts if text.strip()]
    forms = Counter(form for form in (_WNID, _NUMBER) for line in lines if _is(form, line))
    form = max(forms, key=forms.__getitem__, default=_WNID)
    if lines and lines[0].image not in names and not any(_is(f, lines[0]) for f in forms):
        del lines[0]  # the titles
    labels: dict[str, str] = {}
    for line in lines:
        if line.image in labels:
            raise line.refused(source, "the image is listed twice")
        if not _is(form, line):
            problem = "is neither a WordNet id nor a number"
            if forms:
                kinds = {_WNID: "a WordNet id", _NUMBER: "a number"}
                problem = f"is not {kinds[form]}, as other labels are"
            raise line.refused(source, f"the label {line.label!r} {problem}")
        labels[line.image] = line.label
    if form is _NUMBER:
        return None, {name: int(label) for name, label in labels.items()}
    wnids = {wnid: label for label, wnid in enumerate(sorted(set(labels.values())))}
    return tuple(wnids), {name: wnids[label] for name, label in labels.items()}


def _is(form: re.Pattern[str], line: _Line) -> bool:
    return form.fullmatch(line.label) is not None


def _line(source: Path, number: int, text: str) -> _Line:
    """Parse a line of two fields, separated by a comma, a semicolon, a tab or blanks.

    Raises ConfigError for any other line.
    """
    mark = next((mark for mark in ",;\t" if mark in text), " ")
    row = next(csv.reader([text.strip()], delimiter=mark, skipinitialspace=True))
    fields = [field.strip() for field in row]
    while fields and not fields[-1]:
        fields.pop()
    image, label = (*fields, "", "")[:2]
    # In Kaggle's table the bounding boxes of the objects follow each WordNet id.
    boxes = _BOXES.fullmatch(label)
    line = _Line(number, text.strip(), Path(image).stem, boxes["wnid"] if boxes else label)
    if len(fields) > 2:
        raise line.refused(
            source,
            f"has {len(fields)} fields, expected an image and a label; put a name that contains a "
            "blank or a comma in double quotes",
        )
    if not image or not label:
        raise line.refused(source, "no label" if image else "no image")
    return line


def _read_devkit(source: Path) -> tuple[tuple[str, ...], list[int]] | None:
    """Return (WordNet ids, label of each val image in the order of names).

    Returns None if ``source`` is not a devkit.
    """
    if source.name == _TRUTH:
        source = source.parent
    if source.is_dir():
        files = {
            name: path.read_bytes()
            for name in (_TRUTH, _META)
            for path in (source / name, source / "data" / name, *source.glob(f"*/data/{name}"))
            if path.is_file()
        }
    elif tarfile.is_tarfile(source):
        with tarfile.open(source) as tar:
            files = {
                Path(member.name).name: _unpacked(tar, member)
                for member in tar
                if Path(member.name).name in (_TRUTH, _META) and member.isfile()
            }
    else:
        return None
    if files.keys() != {_TRUTH, _META}:
        raise ConfigError(
            "--labels",
            str(source),
            f"is not a devkit: both {_TRUTH} and {_META} are required",
            HOW_TO_GIVE_LABELS,
        )
    with reading(source, "a devkit", "--labels"):
        wnid_of = _wnids_in_a_process(files[_META])
    wnids = tuple(sorted(wnid_of.values()))
    try:
        return wnids, [wnids.index(wnid_of[int(line)]) for line in files[_TRUTH].split()]
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "--labels",
            str(source),
            f"contains a class that is missing from {_META} ({error})",
            HOW_TO_GIVE_LABELS,
        ) from error


def _unpacked(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_TEXT_BYTES:
        raise ValueError(f"{member.name} has {member.size:,} bytes")
    stream = tar.extractfile(member)
    return stream.read() if stream is not None else b""


def _wnids_in_a_process(meta: bytes) -> dict[int, str]:
    """Run `_wnids` in a separate process: SciPy's reader can crash or hang on damaged files.

    Raises ValueError for these, and for problems that the reader reports.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send_wnids, args=(there, meta), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(PATIENCE_S):
            raise ValueError(f"{_META} is damaged: reading it does not end")
        answer: dict[int, str] | str = here.recv()
    except EOFError:
        raise ValueError(f"{_META} is damaged: reading it crashed") from None
    finally:
        process.kill()
        process.join()
    if isinstance(answer, str):
        raise ValueError(f"{_META}: {answer}")
    return answer


def _send_wnids(pipe: Connection, meta: bytes) -> None:
    try:
        pipe.send(_wnids(meta))
    except Exception as error:  # SciPy raises anything for damaged files
        pipe.send(describe(error))


def _wnids(meta: bytes) -> dict[int, str]:
    """Return a map from ILSVRC2012_ID to WordNet id."""
    from scipy.io import loadmat

    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    return {
        int(row["ILSVRC2012_ID"]): str(row["WNID"])
        for row in synsets
        if int(row["num_children"]) == 0
    }
