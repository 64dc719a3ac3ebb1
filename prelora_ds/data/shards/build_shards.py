"""`prelora shards build`: writing the shards of a source with many processes on many hosts.

Everything is written to ``OUT.partial``, which is renamed to ``OUT`` when it is complete. Its
sub-folder ``work`` contains the plan (the request, the images in their order, the classes) and,
once a shard is on the disk, the rows of that shard. The content of a shard is a function of the
plan and of the shard's number only, so any process can write it at any time, also after a kill.
If an image of a shard cannot be read, ``work`` contains the shard's bad images instead of its rows,
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
from prelora_ds.data.shards.bad_images import LIST_NAME, BadImage, refusal, summary, write_list
from prelora_ds.data.shards.build_plan import (
    Options,
    announced,
    check_same_options,
    misplaced_error,
    read_plan,
    requested_options,
    resolved,
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
# How long rank 0 waits for the other ranks while none of them writes anything.
PATIENCE_S = 600.0
# How long the other ranks wait for rank 0, which may have to list a million files.
PLAN_PATIENCE_S = 4 * 3600.0

# The result of a shard in ``work``: its rows, or the images that make it fail.
_RESULTS = (".npz", ".bad")


class StalledError(ExpectedError, RuntimeError):
    """Other ranks of a build have stopped writing, or never started."""


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
    """Write the shards of ``request`` to the new folder ``out``.

    Each rank writes its part of the shards, and rank 0 the manifest, which it returns; the other
    ranks return None.

    like: a folder of shards whose classes are used.
    progress: called with the numbers of finished and of all shards.
    say: called with each message for the user.

    Raises ConfigError if ``out`` exists, for an unfinished build with other options, and for a
    source with mistakes; one error lists all unreadable images, unless ``options.skip_bad`` leaves
    them out. Raises DiskError if the disk is full or fails, and StalledError if other ranks
    have stopped or never started.
    """
    labels = request.labels and resolved(request.labels)
    request = Request(resolved(request.source), request.split, labels)
    out, like = out.absolute(), like and resolved(like)
    requested = requested_options(request, options, source_format, like)
    with _disk_errors_explained(out):
        if misplaced := misplaced_error(request.source, out):
            if rank:
                return None  # all ranks have this command line, and rank 0 reports the error
            raise misplaced
        if os.path.lexists(out):
            # On other ranks: rank 0 has finished, or reports the error.
            return None if rank else _finish_killed_build(out, requested)
        partial = out.with_name(f"{out.name}.partial")
        work = partial / "work"
        planned_at = work / "plan.json"
        if rank == 0:
            if not planned_at.exists():
                with announced(work) if world_size > 1 else nullcontext():
                    write_plan(work, requested, request, source_format, options, like)
        else:
            begun = await_files(lambda: work.exists() or out.exists(), partial, PATIENCE_S)
            is_planned = begun and await_files(
                lambda: planned_at.exists() or not work.exists(), partial, PLAN_PATIENCE_S
            )
            if not is_planned:
                waited_s = PLAN_PATIENCE_S if begun else PATIENCE_S
                raise StalledError(
                    f"{partial}: rank 0 has written no plan of the build, and nothing else for "
                    f"{waited_s:.0f} s\n  remedy: {AGAIN}"
                )
            if not planned_at.exists():
                return None  # rank 0 has ended and reported why
        try:
            plan, items = read_plan(work)
        except FileNotFoundError:
            if rank and out.exists():
                return None  # rank 0 has finished the build and renamed the folder
            raise
        planned = with_skip_bad(plan["asked"], options)
        if rank and requested != planned | {"Pillow": requested["Pillow"]}:
            # All ranks share the command line, so rank 0 reports the mismatch; only the Pillow
            # version is per host.
            return None
        check_same_options(requested, planned, partial)
        if rank == 0 and planned != plan["asked"]:
            replace_file(work / "plan.json", json.dumps(plan | {"asked": planned}).encode())
        if rank == 0 and plan["passed_over"]:
            say(f"skipped: {plan['passed_over']}")
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
            write_shard,
            (_job(partial, n, plan, items, options) for n in mine),
            max(1, min(workers, len(mine))),
        ):
            progress(done(), shards)
        if rank:
            return None

        def all_done() -> bool:
            finished = done()
            progress(finished, shards)
            return finished == shards

        if not await_files(all_done, partial, PATIENCE_S):
            missing = [
                n
                for n in range(shards)
                if not any((work / f"{n:06d}{end}").exists() for end in _RESULTS)
            ]
            raise StalledError(
                f"{partial}: the other ranks have written nothing for {PATIENCE_S:.0f} s, and "
                f"{len(missing)} shards are missing, the first is number {missing[0]}\n"
                f"  remedy: {AGAIN}"
            )
        _refuse_bad(partial, request.source)
        left_out = _finish(partial, shards, plan["classes"])
        os.rename(partial, out)
        if left_out:
            say(
                f"left out {len(left_out)} of {len(items)} images, which cannot be read "
                f"({out / LIST_NAME} lists all):\n{summary(left_out)}"
            )
        shutil.rmtree(out / "work")
    return Manifest.load(out, "OUT")


def _finish_killed_build(out: Path, requested: dict[str, Any]) -> Manifest:
    """Finish a build that was killed just before its last step; otherwise raise ConfigError."""
    plan = out / "work" / "plan.json"
    if not plan.exists() or json.loads(plan.read_text())["asked"] != requested:
        raise ConfigError("OUT", str(out), "already exists", "remove it, or give another folder")
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


def write_shard(job: _Job) -> None:
    """Write a shard, scan what is on the disk, and only then record its rows or its bad images."""
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
    """Yield the readable images of a shard and add the others to ``bad``. Raises DiskError."""
    source_format = SOURCE_FORMATS[job.source_format]
    for key, file, offset, length, label in job.samples:
        try:
            data = source_format.read(file, offset, length)
            data, extension = prepare(
                data, resize_short=job.options.resize_short, quality=job.options.quality
            )
        except ExpectedError:
            raise
        # A reader can raise anything for a damaged file.
        except Exception as error:
            image, problem = source_format.name(file, offset, length), describe(error)
            if isinstance(error, OSError):
                problem = error.strerror or problem
                if is_disk_fault(error) or not os.path.exists(job.source):
                    raise DiskError(
                        "SOURCE",
                        image,
                        f"cannot be read ({problem})",
                        f"check the disk, and {AGAIN}",
                    ) from error
            bad.append(BadImage(image, problem))
        else:
            yield key, data, extension, label


def _refuse_bad(partial: Path, source: Path) -> None:
    """Raise ConfigError with all images that made a shard fail; the next try reads them again."""
    files = sorted((partial / "work").glob("*.bad"))
    bad = [BadImage(*one) for file in files for one in json.loads(file.read_text())]
    write_list(partial, bad)
    for file in files:
        file.unlink()
    if bad:
        raise refusal(source, partial, bad)


def _finish(partial: Path, count: int, classes: Sequence[str]) -> list[BadImage]:
    """Write the manifest and the list of the images that are left out; return these images."""
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
            f"none of the {len(bad)} images can be read:\n{summary(bad)}",
            f"name another source, and remove {partial}",
        )
    for path in partial.iterdir():
        if path.name.startswith("."):
            path.unlink()  # left by a killed process
    save_manifest(partial, classes, shards, rows)
    return bad


@contextmanager
def _disk_errors_explained(out: Path) -> Iterator[None]:
    """Turn an OSError into a DiskError or ConfigError with a remedy."""
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
