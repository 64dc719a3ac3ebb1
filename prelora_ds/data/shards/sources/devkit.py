"""Labels of ILSVRC2012's val images: the devkit, Kaggle's table, or a file with a line for each
image.

The devkit numbers the classes in an order of its own (ILSVRC2012_ID); its meta.mat translates these
numbers.
"""

from __future__ import annotations

import io
import multiprocessing
import re
import tarfile
from multiprocessing.connection import Connection
from pathlib import Path

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
            return _read_table(source)
    classes, truth = kit
    if len(truth) != len(names):
        raise ConfigError(
            "--labels", str(source), f"{len(truth)} labels for {len(names)} images", WANTED
        )
    return classes, dict(zip(names, truth, strict=True))


def _read_table(source: Path) -> Labels:
    if packed := packing(source):
        raise ConfigError(
            "--labels", str(source), f"is packed with {packed[0]}", f"unpack it with `{packed[1]}`"
        )
    labels: dict[str, str] = {}
    for number, line in enumerate(read_text(source, "--labels").splitlines(), 1):
        fields = re.split(r"[,\s]+", line.strip())
        if fields[0] in ("", "ImageId"):
            continue
        name = Path(fields[0]).stem
        if len(fields) < 2 or not fields[1] or name in labels:
            problem = f"line {number}, {line[:80]!r}: " + (
                "the image comes twice" if name in labels else "no label"
            )
            raise ConfigError("--labels", str(source), problem, WANTED)
        labels[name] = fields[1]
    if all(_WNID.fullmatch(label) for label in labels.values()):
        wnids = {wnid: label for label, wnid in enumerate(sorted(set(labels.values())))}
        return tuple(wnids), {name: wnids[label] for name, label in labels.items()}
    if wrong := next(
        ((name, label) for name, label in labels.items() if not _NUMBER.fullmatch(label)), None
    ):
        raise ConfigError(
            "--labels",
            str(source),
            f"neither WordNet ids nor numbers: {wrong[0]} has {wrong[1]!r}",
            WANTED,
        )
    return None, {name: int(label) for name, label in labels.items()}


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
