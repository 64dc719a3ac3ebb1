"""A folder of checkpoints: manifests with sizes and checksums, atomic commits, retention. No rank, no tensor.

    checkpoints/
      step-00001234/    manifest.json, state.json, a safetensors file of each rank
      base-0123456789ab/  what is frozen, written once; manifests of checkpoints name it
      latest            the name of the newest
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prelora_ds.core.codec import CodecError, from_json, to_json
from prelora_ds.errors import ConfigError
from prelora_ds.files import replace_file
from prelora_ds.run.folder import ASIDE

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
_STEP = re.compile(r"step-(\d{8,})")


class BrokenCheckpointError(Exception):
    """A checkpoint that is not what its manifest says; the text names file and difference."""


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        with open(path, "rb") as file:
            return cls(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint, or a base (``step`` None), holds; written last, so a folder with one is whole.

    base: the folder beside this one that holds what was frozen. acc1: the top-1 accuracy of these very weights, None
    where they were not evaluated; of a checkpoint of 0.1.0 it may be that of an earlier step (`own_acc1`).
    """

    world_size: int
    zero_stage: int
    phase: str
    files: Mapping[str, FileRecord]
    step: int | None = None
    base: str | None = None
    acc1: float | None = None
    format: int = field(default=FORMAT)

    def write(self, folder: Path) -> None:
        data = to_json(self)
        replace_file(folder / MANIFEST, json.dumps({**data, "sha256": _digest(data)}, indent=1))

    @classmethod
    def load(cls, folder: Path) -> CheckpointManifest:
        """Raises BrokenCheckpointError, and ConfigError when it is of another format."""
        try:
            data = json.loads((folder / MANIFEST).read_text())
            found, digest = data["format"], data.pop("sha256", None)
        except FileNotFoundError as exc:
            raise BrokenCheckpointError(f"{folder}: has no {MANIFEST}") from exc
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise BrokenCheckpointError(f"{folder / MANIFEST}: cannot be read ({exc})") from exc
        if digest != _digest(data):
            raise BrokenCheckpointError(f"{folder / MANIFEST}: its checksum is not that of what was written")
        if found != FORMAT:
            raise ConfigError("checkpoint", str(folder), f"is of format {found}, and this version reads {FORMAT}",
                              "resume with the version of prelora_ds that wrote it, or start in another run.output_dir")
        try:
            manifest = from_json(cls, data)
        except CodecError as exc:
            raise BrokenCheckpointError(f"{folder / MANIFEST}: cannot be understood ({exc})") from exc
        if problem := manifest._problem():
            raise BrokenCheckpointError(f"{folder / MANIFEST}: {problem}")
        return manifest

    def _problem(self) -> str | None:
        """Which value is out of its range, in words. A name of a file or base must not lead out of the folder."""
        numbers = {"world_size": self.world_size, "zero_stage": self.zero_stage, "step": self.step or 0}
        numbers |= {f"files.{name}.bytes": record.bytes for name, record in self.files.items()}
        if bad := [key for key, number in numbers.items() if number < 0]:
            return f"{bad[0]} is not a count"
        if self.world_size < 1:
            return "world_size is not a count of ranks"
        names = [*self.files, *([] if self.base is None else [self.base])]
        if bad := [name for name in names if not name or name in (".", "..") or "/" in name or "\0" in name]:
            return f"{bad[0]!r} is not a name of a file in this folder"
        if self.acc1 is not None and not 0 <= self.acc1 <= 1:
            return "acc1 is not a share"
        return None

    def verify(self, folder: Path, share: slice = slice(None)) -> None:
        """Hold the files of ``share`` (of their sorted names) against sizes and checksums.

        Raises BrokenCheckpointError.
        """
        for name in sorted(self.files)[share]:
            path, expected = folder / name, self.files[name]
            try:
                found = path.stat().st_size
                if found != expected.bytes:
                    raise BrokenCheckpointError(f"{path}: holds {found} bytes, and {expected.bytes} were written")
                if FileRecord.of(path) != expected:
                    raise BrokenCheckpointError(f"{path}: its checksum is not that of what was written")
            except OSError as exc:
                raise BrokenCheckpointError(f"{path}: cannot be read ({exc.strerror})") from exc


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def base_name(files: Mapping[str, FileRecord]) -> str:
    """The folder of a base that holds ``files``: its name says its content, so a checkpoint names that content too."""
    records = json.dumps({name: to_json(files[name]) for name in sorted(files)})
    return f"base-{hashlib.sha256(records.encode()).hexdigest()[:12]}"


def load_base(root: Path, name: str) -> CheckpointManifest:
    """The manifest of the base that a checkpoint in ``root`` names.

    Raises BrokenCheckpointError, also for a whole base of another run that lies under this one's name.
    """
    if not (root / name).is_dir():
        raise BrokenCheckpointError(f"{root / name}: is missing; it holds the frozen weights of the checkpoint, so "
                                    "copy it beside it")
    manifest = CheckpointManifest.load(root / name)
    if base_name(manifest.files) != name:
        raise BrokenCheckpointError(f"{root / name}: holds the weights of another run: by its content its name would "
                                    f"be {base_name(manifest.files)}")
    return manifest


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name; -1 for any other."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else -1


def check_name(folder: Path, manifest: CheckpointManifest) -> None:
    """Raise BrokenCheckpointError where a checkpoint has the name of another step."""
    if step_of(folder) not in (-1, manifest.step):
        raise BrokenCheckpointError(f"{folder}: holds step {manifest.step}; give it back its own name")


def root_of(folder: Path) -> Path:
    """The folder of checkpoints that one is of, also when it was set aside."""
    return folder.parent.parent if folder.parent.name == ASIDE else folder.parent


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders in ``root``, newest first; whether they are whole is not looked at."""
    found = [path for path in root.iterdir() if step_of(path) >= 0] if root.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def commit(partial: Path, final: Path, manifest: CheckpointManifest) -> None:
    """Give the files in ``partial`` their manifest and their name. Raises OSError, with ``final`` not there.

    Whether the name itself is on disk is for `sync_folder` of the folder around it.
    """
    manifest.write(partial)
    partial.rename(final)


def discard_partial(root: Path) -> None:
    """Remove what writing left that did not come to its end."""
    for path in root.glob(".*.partial") if root.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def set_aside(root: Path, folders: Iterable[Path]) -> None:
    """Move checkpoints that the run will not go on from out of the way of those it will write."""
    for folder in folders:
        target, number = root / ASIDE / folder.name, 1
        while target.exists():
            target, number = root / ASIDE / f"{folder.name}.{number}", number + 1
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)


def retain(root: Path, *, last: int, best: int, ticks: Container[int], in_use: str | None) -> None:
    """Remove all checkpoints but the ``last`` newest, the ``best`` most accurate (of equal ones the earlier) and those
    at ``ticks``; then the bases that none of the kept, nor any set aside, refers to, ``in_use`` apart."""
    folders = list_checkpoints(root)
    accuracies = {folder: own_acc1(folder, manifest) for folder in folders if (manifest := _manifest_or_none(folder))}
    ranked = sorted((-acc1, step_of(folder), folder) for folder, acc1 in accuracies.items() if acc1 is not None)
    kept = {*folders[:last], *(f for *_, f in ranked[:best]), *(f for f in folders if step_of(f) in ticks)}
    for folder in folders:
        if folder not in kept:
            (folder / MANIFEST).unlink(missing_ok=True)  # half removed, it must not look whole
            shutil.rmtree(folder, ignore_errors=True)
    _remove_bases(root, kept, in_use)


def _remove_bases(root: Path, kept: Iterable[Path], in_use: str | None) -> None:
    manifests = [_manifest_or_none(folder) for folder in (*kept, *(root / ASIDE).glob("step-*"))]
    if any(manifest is None for manifest in manifests):
        return  # what a broken one refers to is not known
    named = {in_use, *(manifest.base for manifest in manifests if manifest is not None)}
    for base in root.glob("base-*"):
        if base.name not in named:
            shutil.rmtree(base, ignore_errors=True)


def _manifest_or_none(folder: Path) -> CheckpointManifest | None:
    try:
        return CheckpointManifest.load(folder)
    except (BrokenCheckpointError, ConfigError):
        return None


def describe(folder: Path) -> str:
    """A line: step, phase, ranks and stage, bytes without the base, and whether all of it verifies."""
    try:
        manifest = CheckpointManifest.load(folder)
        check_name(folder, manifest)
        manifest.verify(folder)
        if manifest.base is not None:
            load_base(root_of(folder), manifest.base).verify(root_of(folder) / manifest.base)
        verdict = "verified"
    except (BrokenCheckpointError, ConfigError) as exc:
        return f"{folder.name}  BROKEN: {exc}"
    mib = sum(record.bytes for record in manifest.files.values()) / 2**20
    acc1 = own_acc1(folder, manifest)
    accuracy = "" if acc1 is None else f"  acc1 {acc1:.2%}"
    base = f" + {manifest.base}" if manifest.base else ""
    return (f"{folder.name}  {manifest.phase:<6}  {manifest.world_size} ranks, ZeRO {manifest.zero_stage}  "
            f"{mib:,.1f} MiB{base}{accuracy}  {verdict}")


def own_acc1(folder: Path, manifest: CheckpointManifest) -> float | None:
    """The accuracy in the manifest, where the state says that these very weights were evaluated.

    Version 0.1.0 wrote that of the last evaluation into each manifest, and no ``evaluated_at`` into the state.
    """
    if manifest.acc1 is None:
        return None
    try:
        run = read_run_state(folder).get("run")
    except BrokenCheckpointError:
        return None
    evaluated_at = run.get("evaluated_at") if isinstance(run, dict) else None
    return manifest.acc1 if evaluated_at is not None and evaluated_at == manifest.step else None


def read_run_state(folder: Path) -> dict[str, Any]:
    """The JSON of a checkpoint's state.json. Raises BrokenCheckpointError."""
    try:
        document = json.loads((folder / STATE).read_text())
    except (OSError, ValueError, RecursionError) as exc:
        raise BrokenCheckpointError(f"{folder / STATE}: cannot be read ({exc})") from exc
    if not isinstance(document, dict):
        raise BrokenCheckpointError(f"{folder / STATE}: is not a JSON object")
    return document
