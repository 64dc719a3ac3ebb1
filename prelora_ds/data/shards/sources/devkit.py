"""Labels of ILSVRC2012's val images: the devkit, Kaggle's table, or a file with a line for each
image.

The devkit numbers the classes in an order of its own (ILSVRC2012_ID); its meta.mat translates these
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

WANTED = (
    "give --labels: the devkit (ILSVRC2012_devkit_t12.tar.gz, or the folder it unpacks to), or a "
    "file with a line `IMAGE WNID` or `IMAGE LABEL` for each image (such as Kaggle's "
    "LOC_val_solution.csv)"
)
PATIENCE_S = 60.0  # for a file that is read in a second or two
_BESIDE = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12", "LOC_val_solution.csv")
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_WNID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"[0-9]{1,9}")
_BOXES = re.compile(r"(?P<wnid>n\d{8})(\s+-?\d+){4}(\s+n\d{8}(\s+-?\d+){4})*")

Labels = tuple[tuple[str, ...] | None, dict[str, int]]


def labels_beside(folder: Path, levels: int = 0) -> Path | None:
    """The devkit or Kaggle's table in ``folder``, or in one of ``levels`` folders above it."""
    return next(
        (
            path
            for above in (folder, *folder.parents[:levels])
            for name in _BESIDE
            if (path := above / name).exists()
        ),
        None,
    )


def read_labels(source: Path, names: list[str]) -> Labels:
    """(classes, image -> label) for the images ``names``, sorted; classes is None for a file of
    numbers.

    Raises ConfigError for a file or folder that is neither the devkit nor a table of labels.
    """
    with reading(source, "labels", "--labels"):
        kit = _read_devkit(source)
        if kit is None:
            return _read_table(source, names)
    classes, truth = kit
    if len(truth) != len(names):
        raise ConfigError(
            "--labels", str(source), f"{len(truth)} labels for {len(names)} images", WANTED
        )
    return classes, dict(zip(names, truth, strict=True))


class _Line(NamedTuple):
    """A line of a table of labels: its number and text, the image's name without suffix, and the
    label."""

    number: int
    text: str
    image: str
    label: str

    def refused(self, source: Path, problem: str) -> ConfigError:
        where = f"line {self.number}, {self.text[:80]!r}: "
        return ConfigError("--labels", str(source), where + problem, WANTED)


def _read_table(source: Path, names: list[str]) -> Labels:
    """A line with an image and a label for each image; the columns' titles may come first."""
    if packed := packing(source):
        raise ConfigError(
            "--labels", str(source), f"is packed with {packed[0]}", f"unpack it with `{packed[1]}`"
        )
    texts = enumerate(read_text(source, "--labels").splitlines(), 1)
    lines = [_line(source, number, text) for number, text in texts if text.strip()]
    forms = Counter(form for form in (_WNID, _NUMBER) for line in lines if _is(form, line))
    form = max(forms, key=forms.__getitem__, default=_WNID)
    if lines and lines[0].image not in names and not any(_is(f, lines[0]) for f in forms):
        del lines[0]  # titles
    labels: dict[str, str] = {}
    for line in lines:
        if line.image in labels:
            raise line.refused(source, "the image comes twice")
        if not _is(form, line):
            kinds = {_WNID: "a WordNet id", _NUMBER: "a number"}
            raise line.refused(
                source,
                f"the label {line.label!r} is not {kinds[form]}, as other labels are"
                if forms
                else f"the label {line.label!r} is neither a WordNet id nor a number",
            )
        labels[line.image] = line.label
    if form is _NUMBER:
        return None, {name: int(label) for name, label in labels.items()}
    wnids = {wnid: label for label, wnid in enumerate(sorted(set(labels.values())))}
    return tuple(wnids), {name: wnids[label] for name, label in labels.items()}


def _is(form: re.Pattern[str], line: _Line) -> bool:
    return form.fullmatch(line.label) is not None


def _line(source: Path, number: int, text: str) -> _Line:
    """Raises ConfigError unless the line has two fields, separated by a comma, a semicolon, a tab
    or blanks."""
    mark = next((mark for mark in ",;\t" if mark in text), " ")
    row = next(csv.reader([text.strip()], delimiter=mark, skipinitialspace=True))
    fields = [field.strip() for field in row]
    while fields and not fields[-1]:
        fields.pop()
    image, label = (*fields, "", "")[:2]
    # Kaggle has the boxes of the objects in the image after each WordNet id.
    boxes = _BOXES.fullmatch(label)
    line = _Line(number, text.strip(), Path(image).stem, boxes["wnid"] if boxes else label)
    if len(fields) > 2:
        raise line.refused(
            source,
            f"has {len(fields)} fields where an image and a label are wanted; a name with a blank "
            "or a comma in it is written in double quotes",
        )
    if not image or not label:
        raise line.refused(source, "no label" if image else "no image")
    return line


def _read_devkit(source: Path) -> tuple[tuple[str, ...], list[int]] | None:
    """(WordNet ids, label of each val image in the order of names), or None where ``source`` is not
    a devkit."""
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
            f"not a devkit: it lacks {_TRUTH} or {_META}, and the numbers of "
            "the first mean nothing without the second",
            WANTED,
        )
    with reading(source, "a devkit", "--labels"):
        wnid_of = _in_a_process(files[_META])
    wnids = tuple(sorted(wnid_of.values()))
    try:
        return wnids, [wnids.index(wnid_of[int(line)]) for line in files[_TRUTH].split()]
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "--labels", str(source), f"a class that {_META} does not have ({error})", WANTED
        ) from error


def _unpacked(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_TEXT_BYTES:
        raise ValueError(f"{member.name} has {member.size:,} bytes")
    stream = tar.extractfile(member)
    return stream.read() if stream is not None else b""


def _in_a_process(meta: bytes) -> dict[int, str]:
    """`_wnids` in a process of its own: at some damaged files SciPy's reader crashes or never ends.

    Raises ValueError for these, and for what the reader itself finds.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send_wnids, args=(there, meta), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(PATIENCE_S):
            raise ValueError(f"{_META} is damaged: its reader does not end")
        found: dict[int, str] | str = here.recv()
    except EOFError:
        raise ValueError(f"{_META} is damaged: its reader crashed") from None
    finally:
        process.kill()
        process.join()
    if isinstance(found, str):
        raise ValueError(f"{_META}: {found}")
    return found


def _send_wnids(pipe: Connection, meta: bytes) -> None:
    try:
        pipe.send(_wnids(meta))
    except Exception as error:  # a damaged file makes SciPy raise anything
        pipe.send(describe(error))


def _wnids(meta: bytes) -> dict[int, str]:
    """ILSVRC2012_ID -> WordNet id, of the classes."""
    from scipy.io import loadmat

    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    return {
        int(row["ILSVRC2012_ID"]): str(row["WNID"])
        for row in synsets
        if int(row["num_children"]) == 0
    }
