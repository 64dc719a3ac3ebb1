"""`prelora shards build`: shards of a source, by many processes on many hosts, and again after a kill.

Everything is written to ``OUT.partial``, which becomes ``OUT`` when it is whole. Its sub-folder ``work`` has the plan
(the request, the images in their order, the classes) and, once a shard is on the disk, that shard's rows. What a shard
holds is a function of the plan and the shard's number alone, so it does not matter who writes it,
and when. Where an image cannot be read, ``work`` has the shard's bad images instead of its rows,
until the next try.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from prelora_ds.data.manifest import Manifest, Shard, save_manifest
from prelora_ds.data.parallel import map_unordered
from prelora_ds.data.rows import ROW
from prelora_ds.data.shards.bad_images import LIST_NAME, BadImage, refusal, told, write_list
from prelora_ds.data.shards.build_plan import (
    Options,
    announced,
    check_same,
    misplaced_error,
    read_plan,
    resolved,
    what_is_asked,
    with_skip_bad,
    write_plan,
)
from prelora_ds.data.shards.images import prepare
from prelora_ds.data.shards.reading import AGAIN, describe, not_accessible
from prelora_ds.data.shards.scan import index_shard
from prelora_ds.data.shards.sources import SOURCE_FORMATS
from prelora_ds.data.shards.sources.listing import Request
from prelora_ds.data.shards.waiting import await_files
from prelora_ds.data.shards.writer import write_tar
from prelora_ds.errors import ConfigError, DiskError, ExpectedError, is_disk_fault
from prelora_ds.files import replace_file

Progress = Callable[[int, int], None]
PATIENCE_S = 600.0  # how long rank 0 waits for other ranks while none of them writes anything
PLAN_PATIENCE_S = (
    4 * 3600.0
)  # how long these wait for rank 0, which may have a million files to list

_RESULTS = (".npz", ".bad")  # of a shard in ``work``: its rows, or the images that make it fail


class StalledError(ExpectedError, RuntimeError):
    """Other ranks of the build have stopped writing."""


class _Job(NamedTuple):
    folder: Path
    shard: int
    source: str
    source_format: str
    options: Options
    samples: list[tuple[str, str, int, int, int]]  # key, file, offset, length, label


def build(
    request: Request,
    out: Path,
    options: Options,
    *,
    source_format: str | None = None,
    like: Path | None = None,
    workers: int = 1,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Manifest | None:
    """Write the shards of ``request`` to the new folder ``out``; each rank its part, and rank 0 the manifest.

    ``like`` is a folder of shards whose classes to take. Returns the manifest on rank 0, None on others. Raises
    ConfigError when ``out`` exists, for an unfinished build with other options, and for a source
    with mistakes; all images that cannot be read are listed in one, unless ``options.skip_bad``
    leaves them out. Raises DiskError when the disk is full or fails, and StalledError on rank 0
    when other ranks have stopped.
    """
    labels = request.labels and resolved(request.labels)
    request = Request(resolved(request.source), request.split, labels)
    out, like = out.absolute(), like and resolved(like)
    asked = what_is_asked(request, options, source_format, like)
    with _disk_told(out):
        if misplaced := misplaced_error(request.source, out):
            if rank:
                return None  # the command line is that of all ranks, and rank 0 tells
            raise misplaced
        if os.path.lexists(out):
            # Rank 0 has ended, or tells what is wrong.
            return None if rank else _finished(out, asked)
        partial = out.with_name(f"{out.name}.partial")
        work = partial / "work"
        planned_at = work / "plan.json"
        if rank == 0:
            if not planned_at.exists():
                with announced(work) if world_size > 1 else nullcontext():
                    write_plan(work, asked, request, source_format, options, like)
        else:
            await_files(lambda: work.exists() or out.exists(), partial, PATIENCE_S)
            await_files(lambda: planned_at.exists() or not work.exists(), partial, PLAN_PATIENCE_S)
            if not planned_at.exists():
                return None  # rank 0 has ended, and tells why
        try:
            plan, items = read_plan(work)
        except FileNotFoundError:
            if rank and out.exists():
                return None  # rank 0 found all done, and has given the folder its name
            raise
        planned = with_skip_bad(plan["asked"], options)
        if rank and asked != planned | {"Pillow": asked["Pillow"]}:
            return None  # rank 0 tells; Pillow is this host's own
        check_same(asked, planned, partial)
        if rank == 0 and planned != plan["asked"]:
            replace_file(work / "plan.json", json.dumps(plan | {"asked": planned}).encode())
        if rank == 0 and plan["passed_over"]:
            say(f"passed over: {plan['skipped']}")
        shards = -(-len(items) // options.samples_per_shard)

        def done() -> int:
            if not work.exists():
                return shards
            return sum(name.endswith(_RESULTS) for name in os.listdir(work))

        mine = [n for n in range(rank, shards, world_size) if not (work / f"{n:06d}.npz").exists()]
        for number in mine:
            (work / f"{number:06d}.bad").unlink(missing_ok=True)
        progress(done(), shards)
        for _ in map_unordered(
            _write_shard,
            (_job(partial, n, plan, items, options) for n in mine),
            max(1, min(workers, len(mine))),
        ):
            progress(done(), shards)
        if rank:
            return None

        def all_done() -> bool:
            progress(now := done(), shards)
            return now == shards

        if not await_files(all_done, partial, PATIENCE_S):
            missing = [
                n
                for n in range(shards)
                if not any((work / f"{n:06d}{end}").exists() for end in _RESULTS)
            ]
            raise StalledError(
                f"{partial}: other ranks have written nothing for {PATIENCE_S:.0f} s, and "
                f"{len(missing)} shards are missing, the first is number {missing[0]}\n"
                f"  remedy: {AGAIN}"
            )
        _refuse_bad(partial, request.source)
        left_out = _finish(partial, shards, plan["classes"])
        os.rename(partial, out)
        if left_out:
            say(
                f"left out {len(left_out)} of {len(items)} images, which cannot be read "
                f"({out / LIST_NAME} lists all):\n{told(left_out)}"
            )
        shutil.rmtree(out / "work")
    return Manifest.load(out, "OUT")


def _finished(out: Path, asked: dict[str, Any]) -> Manifest:
    """A build that was killed between its last two steps. Raises ConfigError for any other folder."""
    plan = out / "work" / "plan.json"
    if not plan.exists() or json.loads(plan.read_text())["asked"] != asked:
        raise ConfigError("OUT", str(out), "exists already", "remove it, or give another folder")
    shutil.rmtree(out / "work")
    return Manifest.load(out, "OUT")


def _job(
    partial: Path, shard: int, plan: dict[str, Any], items: NDArray[np.void], options: Options
) -> _Job:
    start = shard * options.samples_per_shard
    rows = items[start : start + options.samples_per_shard].tolist()
    return _Job(
        partial,
        shard,
        plan["asked"]["SOURCE"],
        plan["kind"],
        options,
        [
            (f"{start + i:08d}", plan["files"][file], offset, length, label)
            for i, (file, label, offset, length, _) in enumerate(rows)
        ],
    )


def _write_shard(job: _Job) -> None:
    """Write a shard, look through what is on the disk, and only then say that it is done; or what
    is bad in it."""
    path = job.folder / f"shard-{job.shard:06d}.tar"
    hidden = path.with_name(f".{path.name}.{uuid4().hex}")
    result = job.folder / "work" / f"{job.shard:06d}"
    bad: list[BadImage] = []
    shard, rows = None, np.empty(0, ROW)
    try:
        write_tar(hidden, _samples(job, bad))
        if bad and not job.options.skip_bad:
            replace_file(result.with_suffix(".bad"), json.dumps(bad).encode())
            return
        if len(bad) < len(job.samples):
            scanned = index_shard(hidden, "OUT")
            shard, rows = scanned.shard._replace(name=path.name), scanned.rows
            hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, shard=np.array(json.dumps(shard)), rows=rows, bad=np.array(json.dumps(bad)))
    replace_file(result.with_suffix(".npz"), buffer.getvalue())


def _samples(job: _Job, bad: list[BadImage]) -> Iterator[tuple[str, bytes, str, int]]:
    """The images of a shard that can be read; the others are added to ``bad``. Raises DiskError."""
    source_format = SOURCE_FORMATS[job.source_format]
    for key, file, offset, length, label in job.samples:
        try:
            data = source_format.read(file, offset, length)
            data, extension = prepare(
                data, resize_short=job.options.resize_short, quality=job.options.quality
            )
        except ExpectedError:
            raise
        except Exception as error:  # what a file holds can make its reader raise anything
            image, problem = source_format.name(file, offset, length), describe(error)
            if isinstance(error, OSError):
                problem = error.strerror or problem
                if is_disk_fault(error) or not os.path.exists(job.source):
                    raise DiskError(
                        "SOURCE",
                        image,
                        f"cannot be read ({problem})",
                        f"see to the disk, and {AGAIN}",
                    ) from error
            bad.append(BadImage(image, problem))
        else:
            yield key, data, extension, label


def _refuse_bad(partial: Path, source: Path) -> None:
    """Raises ConfigError with all images that made a shard fail; the next try looks at them
    anew."""
    files = sorted((partial / "work").glob("*.bad"))
    bad = [BadImage(*one) for file in files for one in json.loads(file.read_text())]
    write_list(partial, bad)
    for file in files:
        file.unlink()
    if bad:
        raise refusal(source, partial, bad)


def _finish(partial: Path, count: int, classes: Sequence[str]) -> list[BadImage]:
    """Write the manifest, and the list of the images that are left out, which is returned."""
    shards, rows, bad = [], [], []
    for number in range(count):
        path = partial / "work" / f"{number:06d}.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                shard, of_shard, left_out = (
                    json.loads(str(file["shard"])),
                    file["rows"],
                    json.loads(str(file["bad"])) if "bad" in file else [],
                )
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ConfigError(
                "OUT",
                str(path),
                f"is damaged ({describe(error)})",
                f"remove this file, and {AGAIN}",
            ) from error
        bad += [BadImage(*one) for one in left_out]
        if shard is not None:
            shards.append(Shard(*shard))
            rows.append(of_shard)
    write_list(partial, bad)
    if not shards:
        raise ConfigError(
            "SOURCE",
            "all images",
            f"none of the {len(bad)} images can be read:\n{told(bad)}",
            f"name another source, and remove {partial}",
        )
    for path in partial.iterdir():
        if path.name.startswith("."):
            path.unlink()  # left by a kill
    save_manifest(partial, classes, shards, rows)
    return bad


@contextmanager
def _disk_told(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            path = error.filename or out
            raise not_accessible("OUT", path, error, "cannot be written") from error
        raise DiskError(
            "OUT",
            str(out),
            f"the disk is full ({error.strerror}); the shards written "
            f"so far are kept in {out.name}.partial",
            f"free space, and {AGAIN}",
        ) from error
