"""A folder of checkpoints: manifests with sizes and checksums, atomic commits, retention.

    checkpoints/
      step-00001234/      manifest.json, state.json, one safetensors file per rank
      base-0123456789ab/  the frozen weights, written once; the manifests of checkpoints name it
      latest              the name of the newest checkpoint

This module handles neither ranks nor tensors.
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
MANIFEST = "manifest.json"
RUN_STATE = "state.json"
_STEP = re.compile(r"step-(\d{8,})")


class BrokenCheckpointError(Exception):
    """A checkpoint that does not match its manifest; the text names the file and the difference."""


@dataclass(frozen=True)
class FileRecord:
    """The size and the SHA-256 of a file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return cls(size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class CheckpointManifest:
    """The content of a checkpoint, or of a base (``step`` None).

    It is written last, so a folder that contains a manifest is complete.

    base: the name of the neighbouring folder with the frozen weights.
    acc1: the top-1 accuracy of exactly these weights, or None if they were not evaluated. Version
        0.1.0 may have stored the accuracy of an earlier step here (see `evaluated_acc1`).
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
        text = json.dumps({**data, "sha256": _digest(data)}, indent=1)
        replace_file(folder / MANIFEST, text)

    @classmethod
    def load(cls, folder: Path) -> CheckpointManifest:
        """Read and check the manifest in ``folder``.

        Raises BrokenCheckpointError, and ConfigError if the manifest has another format.
        """
        try:
            data = json.loads((folder / MANIFEST).read_text())
            version = data["format"]
            digest = data.pop("sha256", None)
        except FileNotFoundError as exc:
            raise BrokenCheckpointError(f"{folder}: has no {MANIFEST}") from exc
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise BrokenCheckpointError(f"{folder / MANIFEST}: cannot be read ({exc})") from exc
        if digest != _digest(data):
            raise BrokenCheckpointError(f"{folder / MANIFEST}: checksum mismatch")
        if version != FORMAT:
            raise ConfigError(
                "checkpoint",
                str(folder),
                f"has format {version}, this version reads format {FORMAT}",
                "resume with the version of prelora_ds that wrote it, or start over in another "
                "run.output_dir",
            )
        try:
            manifest = from_json(cls, data)
        except CodecError as exc:
            raise BrokenCheckpointError(f"{folder / MANIFEST}: cannot be parsed ({exc})") from exc
        if problem := manifest._problem():
            raise BrokenCheckpointError(f"{folder / MANIFEST}: {problem}")
        return manifest

    def _problem(self) -> str | None:
        """Describe the first value that is out of its range, or return None.

        A name of a file or a base must not point outside of its folder.
        """
        counts = {"zero_stage": self.zero_stage, "step": self.step or 0}
        counts |= {f"files.{name}.bytes": record.bytes for name, record in self.files.items()}
        negative = [key for key, count in counts.items() if count < 0]
        if negative:
            return f"{negative[0]} is negative"
        if self.world_size < 1:
            return "world_size is less than 1"

        names = [*self.files]
        if self.base is not None:
            names.append(self.base)
        for name in names:
            if not name or name in (".", "..") or "/" in name or "\0" in name:
                return f"{name!r} is not a plain file name"
        if self.acc1 is not None and not 0 <= self.acc1 <= 1:
            return "acc1 is not between 0 and 1"
        return None

    def verify(self, folder: Path, share: slice = slice(None)) -> None:
        """Check the files of ``share`` (a slice of their sorted names) against sizes and checksums.

        Raises BrokenCheckpointError.
        """
        for name in sorted(self.files)[share]:
            path = folder / name
            expected = self.files[name]
            try:
                size = path.stat().st_size
                if size != expected.bytes:
                    raise BrokenCheckpointError(
                        f"{path}: is {size} bytes, expected {expected.bytes}"
                    )
                if FileRecord.of(path) != expected:
                    raise BrokenCheckpointError(f"{path}: checksum mismatch")
            except OSError as exc:
                raise BrokenCheckpointError(f"{path}: cannot be read ({exc.strerror})") from exc


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def base_name(files: Mapping[str, FileRecord]) -> str:
    """Return the folder name of a base that contains ``files``.

    The name is a hash of the content, so a checkpoint that names a base also names its content.
    """
    records = json.dumps({name: to_json(files[name]) for name in sorted(files)})
    return f"base-{hashlib.sha256(records.encode()).hexdigest()[:12]}"


def load_base(root: Path, name: str) -> CheckpointManifest:
    """Return the manifest of the base that a checkpoint in ``root`` names.

    Raises BrokenCheckpointError, also for an intact base of another run that has this name.
    """
    if not (root / name).is_dir():
        raise BrokenCheckpointError(
            f"{root / name}: is missing; it contains the frozen weights of the checkpoint, so copy "
            "it next to the checkpoint"
        )
    manifest = CheckpointManifest.load(root / name)
    expected_name = base_name(manifest.files)
    if expected_name != name:
        raise BrokenCheckpointError(
            f"{root / name}: contains the weights of another run (the base with this content is "
            f"named {expected_name})"
        )
    return manifest


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint folder, or -1 for any other folder."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else -1


def check_name(folder: Path, manifest: CheckpointManifest) -> None:
    """Raise BrokenCheckpointError if the folder name states another step than the manifest."""
    if step_of(folder) not in (-1, manifest.step):
        raise BrokenCheckpointError(
            f"{folder}: contains step {manifest.step}; restore its original name"
        )


def root_of(folder: Path) -> Path:
    """Return the checkpoints folder that contains this checkpoint, also if it was set aside."""
    return folder.parent.parent if folder.parent.name == ASIDE else folder.parent


def list_checkpoints(root: Path) -> list[Path]:
    """List the checkpoint folders in ``root``, newest first, without verifying them."""
    if not root.is_dir():
        return []
    checkpoints = [path for path in root.iterdir() if step_of(path) >= 0]
    return sorted(checkpoints, key=step_of, reverse=True)


def commit(partial: Path, final: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest into ``partial`` and rename it to ``final``.

    On OSError ``final`` does not exist. Call ``sync_folder(final.parent)`` to make the rename
    durable.
    """
    manifest.write(partial)
    partial.rename(final)


def discard_partial(root: Path) -> None:
    """Remove the leftovers of interrupted writes."""
    if not root.is_dir():
        return
    for path in root.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def set_aside(root: Path, folders: Iterable[Path]) -> None:
    """Move checkpoints that this run will not resume from to ``root/aside``."""
    for folder in folders:
        target = root / ASIDE / folder.name
        number = 1
        while target.exists():
            target = root / ASIDE / f"{folder.name}.{number}"
            number += 1
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)


def retain(root: Path, *, last: int, best: int, ticks: Container[int], in_use: str | None) -> None:
    """Remove the checkpoints and bases that are no longer needed.

    Kept are the ``last`` newest checkpoints, the ``best`` most accurate ones (the earlier one of
    equals) and those at the steps ``ticks``. A base is removed if it is not ``in_use`` and no
    checkpoint that is kept or set aside names it.
    """
    folders = list_checkpoints(root)
    manifests = {folder: _manifest_or_none(folder) for folder in folders}
    accuracies = {
        folder: evaluated_acc1(folder, manifest)
        for folder, manifest in manifests.items()
        if manifest is not None
    }
    ranked = sorted(
        (-acc1, step_of(folder), folder)
        for folder, acc1 in accuracies.items()
        if acc1 is not None
    )
    newest = folders[:last]
    most_accurate = [folder for *_, folder in ranked[:best]]
    at_ticks = [folder for folder in folders if step_of(folder) in ticks]
    kept = {*newest, *most_accurate, *at_ticks}

    for folder in folders:
        if folder not in kept:
            # Remove the manifest first: a half-deleted checkpoint must not look complete.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
    _remove_bases(root, kept, in_use)


def _remove_bases(root: Path, kept: Iterable[Path], in_use: str | None) -> None:
    """Remove the bases that neither ``in_use`` nor a checkpoint kept or set aside names."""
    manifests = [_manifest_or_none(folder) for folder in (*kept, *(root / ASIDE).glob("step-*"))]
    if any(manifest is None for manifest in manifests):
        return  # A broken manifest may name any base: remove none.
    named = {in_use, *(manifest.base for manifest in manifests if manifest is not None)}
    for base in root.glob("base-*"):
        if base.name not in named:
            shutil.rmtree(base, ignore_errors=True)


def _manifest_or_none(folder: Path) -> CheckpointManifest | None:
    try:
        return CheckpointManifest.load(folder)
    except (BrokenCheckpointError, ConfigError):
        return None


@dataclass(frozen=True)
class Description:
    """What `prelora checkpoints` lists of a checkpoint.

    broken: why it does not verify; the other fields are None then.
    size: bytes without those of the base.
    """

    name: str
    broken: str | None = None
    step: int | None = None
    phase: str | None = None
    world_size: int | None = None
    zero_stage: int | None = None
    size: int | None = None
    base: str | None = None
    acc1: float | None = None

    def line(self) -> str:
        """Return one line for the terminal."""
        if self.broken is not None or self.size is None:
            return f"{self.name}  BROKEN: {self.broken}"
        base = f" + {self.base}" if self.base else ""
        accuracy = "" if self.acc1 is None else f"  acc1 {self.acc1:.2%}"
        return (
            f"{self.name}  {self.phase:<6}  {self.world_size} ranks, ZeRO {self.zero_stage}  "
            f"{self.size / 2**20:,.1f} MiB{base}{accuracy}  verified"
        )


def describe(folder: Path) -> Description:
    """Verify a checkpoint and describe it."""
    try:
        manifest = CheckpointManifest.load(folder)
        check_name(folder, manifest)
        manifest.verify(folder)
        if manifest.base is not None:
            root = root_of(folder)
            load_base(root, manifest.base).verify(root / manifest.base)
    except (BrokenCheckpointError, ConfigError) as exc:
        return Description(folder.name, broken=str(exc))
    return Description(
        folder.name,
        step=manifest.step,
        phase=manifest.phase,
        world_size=manifest.world_size,
        zero_stage=manifest.zero_stage,
        size=sum(record.bytes for record in manifest.files.values()),
        base=manifest.base,
        acc1=evaluated_acc1(folder, manifest),
    )


def evaluated_acc1(folder: Path, manifest: CheckpointManifest) -> float | None:
    """Return the accuracy in the manifest if the state confirms that these weights were evaluated.

    Version 0.1.0 wrote the accuracy of the last evaluation into every manifest, and no
    ``evaluated_at`` into the state.
    """
    if manifest.acc1 is None:
        return None
    try:
        run = read_run_state(folder).get("run")
    except BrokenCheckpointError:
        return None
    if not isinstance(run, dict):
        return None
    evaluated_at = run.get("evaluated_at")
    return manifest.acc1 if evaluated_at is not None and evaluated_at == manifest.step else None


def read_run_state(folder: Path) -> dict[str, Any]:
    """Read the state.json of a checkpoint. Raises BrokenCheckpointError."""
    try:
        document = json.loads((folder / RUN_STATE).read_text())
    except (OSError, ValueError, RecursionError) as exc:
        raise BrokenCheckpointError(f"{folder / RUN_STATE}: cannot be read ({exc})") from exc
    if not isinstance(document, dict):
        raise BrokenCheckpointError(f"{folder / RUN_STATE}: is not a JSON object")
    return document
