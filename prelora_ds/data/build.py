"""`prelora shards build`: shards of a source, by many processes on many hosts, and again after a kill.

Everything is written to ``OUT.partial``, which becomes ``OUT`` when it is whole. Its sub-folder ``work`` has the plan
(the request, the images in their order, the classes) and, once a shard is on the disk, that shard's rows. What a shard
holds is a function of the plan and the shard's number alone, so it does not matter who writes it, and when.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import PIL
from numpy.typing import NDArray

from prelora_ds.core.errors import ConfigError, ExpectedError
from prelora_ds.data.images import UnreadableImageError, prepare
from prelora_ds.data.manifest import Manifest, Shard, save_manifest, write_whole
from prelora_ds.data.parallel import unordered
from prelora_ds.data.scan import index_shard
from prelora_ds.data.sources import KINDS, find_images
from prelora_ds.data.sources.listing import Listing, Request
from prelora_ds.data.writer import write_tar

Progress = Callable[[int, int], None]
PATIENCE_S = 600.0  # how long rank 0 waits for other ranks while none of them writes anything
PLAN_PATIENCE_S = 4 * 3600.0  # how long these wait for rank 0, which may have a million files to list
_WINDOW = 16  # blocks of a file that are shuffled together
_AGAIN = "run the same command again: it goes on where it stopped"


class StalledError(ExpectedError, RuntimeError):
    """Other ranks of the build have stopped writing."""


@dataclass(frozen=True)
class Options:
    """What, beside the source, fixes the bytes of the shards."""

    samples_per_shard: int = 1024
    seed: int = 0
    resize_short: int | None = None
    quality: int = 90


class _Job(NamedTuple):
    folder: Path
    shard: int
    kind: str
    options: Options
    samples: list[tuple[str, str, int, int, int]]  # key, file, offset, length, label


def build(request: Request, out: Path, options: Options, *, kind: str | None = None, like: Path | None = None,
          workers: int = 1, rank: int = 0, world_size: int = 1, progress: Progress = lambda done, total: None,
          say: Callable[[str], None] = lambda text: None) -> Manifest | None:
    """Write the shards of ``request`` to the new folder ``out``; each rank its part, and rank 0 the manifest.

    ``like`` is a folder of shards whose classes to take. Returns the manifest on rank 0, None on others. Raises
    ConfigError when ``out`` exists, for an unfinished build with other options, for a source with mistakes (an image
    that cannot be read is named), and when the disk is full; StalledError on rank 0 when other ranks have stopped.
    """
    out, partial = out.absolute(), out.absolute().with_name(f"{out.name}.partial")
    asked = _asked(request, options, kind, like)
    if out.exists():
        if rank == 0:
            return _finished(out, asked)
        return None  # rank 0 has ended, or tells what is wrong
    work = partial / "work"
    with _disk_full_told(out):
        if rank == 0:
            if not (work / "plan.json").exists():
                _write_plan(work, asked, find_images(request, kind), options, like)
        elif not _await(lambda: (work / "plan.json").exists() or out.exists(), partial, PLAN_PATIENCE_S) \
                or out.exists():
            return None
        try:
            plan = json.loads((work / "plan.json").read_text())
            items = np.load(work / "items.npy", mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            if rank and out.exists():
                return None  # rank 0 found all done, and has given the folder its name
            raise
        if rank and asked != plan["asked"] | {"Pillow": asked["Pillow"]}:
            return None  # the command line is that of all ranks, and rank 0 tells; Pillow is this host's own
        _check_same(asked, plan["asked"], partial)
        if rank == 0 and plan["passed_over"]:
            say(f"passed over, as no images: {plan['passed_over']}")
        shards = -(-len(items) // options.samples_per_shard)

        def done() -> int:
            return sum(name.endswith(".npz") for name in os.listdir(work)) if work.exists() else shards

        progress(done(), shards)
        mine = (number for number in range(rank, shards, world_size) if not (work / f"{number:06d}.npz").exists())
        for _ in unordered(_write_shard, (_job(partial, n, plan, items, options) for n in mine), workers):
            progress(done(), shards)
        if rank:
            return None

        def all_done() -> bool:
            progress(now := done(), shards)
            return now == shards

        if not _await(all_done, partial, PATIENCE_S):
            missing = [n for n in range(shards) if not (work / f"{n:06d}.npz").exists()]
            raise StalledError(f"{partial}: other ranks have written nothing for {PATIENCE_S:.0f} s, and "
                               f"{len(missing)} shards are missing, the first is number {missing[0]}\n"
                               f"  remedy: {_AGAIN}")
        _finish(partial, shards, plan["classes"])
        os.rename(partial, out)
    shutil.rmtree(out / "work")
    return Manifest.load(out, "OUT")


def _asked(request: Request, options: Options, kind: str | None, like: Path | None) -> dict[str, Any]:
    paths = {"SOURCE": request.source, "--labels": request.labels, "--like": like}
    settings = {f"--{name.replace('_', '-')}": value for name, value in asdict(options).items()}
    return {**{name: None if path is None else str(path.absolute()) for name, path in paths.items()},
            "--split": request.split, "--format": kind, **settings, "Pillow": PIL.__version__}


def _finished(out: Path, asked: dict[str, Any]) -> Manifest:
    """A build that was killed between its last two steps. Raises ConfigError for any other folder."""
    plan = out / "work" / "plan.json"
    if not plan.exists() or json.loads(plan.read_text())["asked"] != asked:
        raise ConfigError("OUT", str(out), "exists already", "remove it, or give another folder")
    shutil.rmtree(out / "work")
    return Manifest.load(out, "OUT")


def _check_same(asked: dict[str, Any], planned: dict[str, Any], partial: Path) -> None:
    for key, value in asked.items():
        if planned.get(key) != value:
            raise ConfigError(key, value, f"the unfinished build in {partial} has {planned.get(key)!r}",
                              "give the same options to go on with it, or remove that folder to begin anew")


def _write_plan(work: Path, asked: dict[str, Any], listing: Listing, options: Options, like: Path | None) -> None:
    classes, labels = _classes(listing, None if like is None else Manifest.load(like, "--like").classes)
    items = listing.items.copy()
    items["label"] = labels
    work.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, items[_order(items, options.seed)], allow_pickle=False)
    write_whole(work / "items.npy", buffer.getvalue())
    plan = {"asked": asked, "kind": listing.kind, "classes": classes, "files": listing.files,
            "passed_over": listing.passed_over}
    write_whole(work / "plan.json", json.dumps(plan).encode())


def _classes(listing: Listing, like: Sequence[str] | None) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """(class names, label of each item). Raises ConfigError for a label or a name that is of no class."""
    labels, named = listing.items["label"], listing.classes
    lowest, highest = int(labels.min()), int(labels.max())
    count = len(named if named is not None else like if like is not None else range(highest + 1))
    if lowest < 0 or highest >= count:
        index = int(np.argmax((labels < 0) | (labels >= count)))
        item = listing.items[index]
        raise ConfigError("SOURCE", listing.files[item["file"]],
                          f"image {index} of the source ({item['offset']} in this file) has the label "
                          f"{labels[index]}, and there are {count} classes", "mend the labels")
    if named is None:
        return tuple(like) if like is not None else tuple(map(str, range(count))), labels
    if like is None:
        return named, labels
    numbers = {name: number for number, name in enumerate(like)}
    if unknown := [name for name in named if name not in numbers]:
        raise ConfigError("--like", "its classes", f"{len(unknown)} classes of the source are not among them, the "
                          f"first is {unknown[0]!r}", "name the shards of the same data set")
    return tuple(like), np.array([numbers[name] for name in named], np.int32)[labels]


def _order(items: NDArray[np.void], seed: int) -> NDArray[np.int64]:
    """A shuffle by ``seed``; of blocks, and of images within windows of blocks, where images are read by the block."""
    # As in `epoch_order`: NumPy keeps the raw stream of a bit generator for good, but not what is made of it.
    bits = np.random.PCG64(np.random.SeedSequence(seed))
    order = np.argsort(bits.random_raw(len(items)), kind="stable")
    blocks = np.stack([items["file"], items["block"]], axis=1)
    if not items["block"].any():
        return order
    numbers = np.unique(blocks, axis=0, return_inverse=True)[1].reshape(-1)
    place = np.argsort(np.argsort(bits.random_raw(numbers.max() + 1), kind="stable"), kind="stable")
    return order[np.argsort(place[numbers[order]] // _WINDOW, kind="stable")]


def _job(partial: Path, shard: int, plan: dict[str, Any], items: NDArray[np.void], options: Options) -> _Job:
    start = shard * options.samples_per_shard
    rows = items[start:start + options.samples_per_shard].tolist()
    return _Job(partial, shard, plan["kind"], options,
                [(f"{start + i:08d}", plan["files"][file], offset, length, label)
                 for i, (file, label, offset, length, _) in enumerate(rows)])


def _write_shard(job: _Job) -> None:
    """Write a shard, look through what is on the disk, and only then say that it is done."""
    path = job.folder / f"shard-{job.shard:06d}.tar"
    hidden = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        write_tar(hidden, _samples(job))
        scanned = index_shard(hidden, "OUT")
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)
    buffer, shard = io.BytesIO(), scanned.shard._replace(name=path.name)
    np.savez(buffer, shard=np.array(json.dumps(shard)), rows=scanned.rows)
    write_whole(job.folder / "work" / f"{job.shard:06d}.npz", buffer.getvalue())


def _samples(job: _Job) -> Iterator[tuple[str, bytes, str, int]]:
    for key, file, offset, length, label in job.samples:
        try:
            data = KINDS[job.kind].read(file, offset, length)
            data, extension = prepare(data, resize_short=job.options.resize_short, quality=job.options.quality)
        except (UnreadableImageError, OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            where = "" if length < 0 else f" at {offset}"
            raise ConfigError("SOURCE", file, f"the image{where} cannot be read ({error})",
                              f"mend it, and {_AGAIN}; or remove it and {job.folder}, and begin anew") from error
        yield key, data, extension, label


def _finish(partial: Path, count: int, classes: Sequence[str]) -> None:
    shards, rows = [], []
    for number in range(count):
        with np.load(partial / "work" / f"{number:06d}.npz", allow_pickle=False) as file:
            shards.append(Shard(*json.loads(str(file["shard"]))))
            rows.append(file["rows"])
    for path in partial.iterdir():
        if path.name.startswith("."):
            path.unlink()  # left by a kill
    save_manifest(partial, classes, shards, rows)


def _await(condition: Callable[[], bool], folder: Path, patience_s: float) -> bool:
    """Whether ``condition`` came true while files in ``folder`` still changed."""
    newest, since, pause_s = None, time.monotonic(), 0.1
    while not condition():
        now = _newest(folder)
        if now != newest:
            newest, since = now, time.monotonic()
        elif time.monotonic() - since > patience_s:
            return False
        time.sleep(pause_s)
        pause_s = min(1.3 * pause_s, 5.0)
    return True


def _newest(folder: Path) -> tuple[float, int]:
    """Changes whenever a file in ``folder`` is written to. Sizes as well: clocks of other hosts may stand still."""
    times, sizes = [0.0], 0
    try:
        for entry in [*os.scandir(folder), *os.scandir(folder / "work")]:
            stat = entry.stat()
            times.append(stat.st_mtime)
            sizes += stat.st_size
    except FileNotFoundError:
        pass  # renamed under our eyes
    return max(times), sizes


@contextmanager
def _disk_full_told(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError("OUT", str(out), f"the disk is full ({error.strerror}); the shards written so far are kept "
                          f"in {out.name}.partial", f"free space, and {_AGAIN}") from error
