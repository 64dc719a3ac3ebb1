"""Mutations of an intact checkpoint: it is read as written or refused; there is no other exception."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.plans import full_plan

from prelora_ds.core.codec import to_json
from prelora_ds.core.divergence import DivergenceWatch
from prelora_ds.core.layout import Layout
from prelora_ds.errors import ConfigError
from prelora_ds.run.checkpoints.checkpoint_folder import (
    MANIFEST,
    RUN_STATE,
    BrokenCheckpointError,
    CheckpointManifest,
    FileRecord,
    describe,
    step_folder,
)

LAYOUT = Layout({"a.weight": (8, 4), "a.bias": (8,)}, {"q": {0: "a"}})
PART = "rank-00000-of-00001.safetensors"
SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one rank, in the form that `Saver` writes."""
    from prelora_ds.core.controller import PhaseState
    from prelora_ds.engine.state import EngineState, Slice
    from prelora_ds.run.checkpoints.part import write_part
    from prelora_ds.run.run_state import RunState

    folder = step_folder(tmp_path_factory.mktemp("checkpoints"), 3)
    folder.mkdir()
    moments = {"exp_avg": torch.ones(32), "exp_avg_sq": torch.ones(32)}
    slices = {"a.weight": Slice(0, torch.arange(32.0), moments), "a.bias": Slice(0, torch.arange(8.0))}
    write_part(EngineState(slices), folder / PART, {"rng": "{}"})
    run = RunState(3, PhaseState(full_plan(LAYOUT)), DivergenceWatch())
    counters = {"global_steps": 3, "global_samples": 24, "micro_steps": 3, "skipped_steps": 0}
    document = {"run": to_json(run), "adam_steps": {"a.weight": 3}, "counters": counters,
                "num_labels": 8, "data": {}, "config": {}}
    (folder / RUN_STATE).write_text(json.dumps(document))
    rewrite_manifest(folder)
    return folder


def rewrite_manifest(folder: Path) -> None:
    """Update the checksums to those of the current files."""
    files = {name: FileRecord.of(folder / name) for name in (PART, RUN_STATE)}
    CheckpointManifest(1, 0, "full", files, 3).write(folder)


def read(folder: Path) -> Any:
    """Return what a run would read from the checkpoint, in a comparable form."""
    from prelora_ds.run.checkpoints.resume import read_checkpoint

    found = read_checkpoint(folder, LAYOUT, 0, 1)
    values = {name: (s.start, s.value.tolist(), {k: m.tolist() for k, m in s.moments.items()})
              for name, s in found.engine.slices.items()}
    return to_json(found.run), values, found.engine.adam_steps, vars(found.counters)


def read_or_refused(original: Path, tmp_path: Path, change: Callable[[Path], None]) -> Any:
    folder = tmp_path / original.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    change(folder)
    assert isinstance(describe(folder).line(), str)
    try:
        return read(folder)
    except (BrokenCheckpointError, ConfigError, OSError) as refused:
        assert str(folder) in str(refused)
        return None


def mutated(data: bytes, seed: int) -> bytes:
    """Change, remove, repeat or insert a few bytes, or cut off the end."""
    rng, changed = random.Random(seed), bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(changed) + 1)
        what = rng.choice(("flip", "cut", "drop", "repeat", "insert"))
        if what == "flip" and i < len(changed):
            changed[i] ^= 1 << rng.randrange(8)
        elif what == "cut":
            del changed[i:]
        elif what == "drop":
            del changed[i: i + rng.randint(1, 8)]
        elif what == "repeat":
            changed[i:i] = changed[i: i + rng.randint(1, 8)]
        else:
            changed[i:i] = rng.choice((b"{", b"}", b"null", b"-1", b'"', b"[]", b"1e999", b"\xff", b"NaN"))
    return bytes(changed)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every value in a JSON tree."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def restructured(tree: Any, seed: int) -> Any:
    """Replace a value by one of another type or range, or remove it."""
    rng, changed = random.Random(seed), copy.deepcopy(tree)
    container, key = rng.choice(list(places(changed)))
    if rng.random() < 0.2 and isinstance(container, dict):
        del container[key]
    else:
        container[key] = rng.choice((None, True, -1, 0, 2**70, 0.5, "", "../x", "x\0", [], {}, [1], {"a": 1}))
    return changed


@given(SEEDS)
@FEW
def test_a_manifest_with_changed_bytes_is_refused_or_reads_the_same(original: Path, tmp_path: Path, seed: int) -> None:
    def change(folder: Path) -> None:
        (folder / MANIFEST).write_bytes(mutated((folder / MANIFEST).read_bytes(), seed))

    assert read_or_refused(original, tmp_path, change) in (None, read(original))


@given(SEEDS)
@FEW
def test_a_manifest_with_other_values_and_a_valid_checksum_is_read_or_refused(
        original: Path, tmp_path: Path, seed: int) -> None:
    def change(folder: Path) -> None:
        from prelora_ds.run.checkpoints import checkpoint_folder as module

        data = json.loads((folder / MANIFEST).read_text())
        del data["sha256"]
        data = restructured(data, seed)
        data["sha256"] = module._digest(data)
        (folder / MANIFEST).write_text(json.dumps(data))

    read_or_refused(original, tmp_path, change)


@given(SEEDS)
@FEW
def test_a_state_with_other_values_is_read_or_refused(original: Path, tmp_path: Path, seed: int) -> None:
    def change(folder: Path) -> None:
        document = restructured(json.loads((folder / RUN_STATE).read_text()), seed)
        (folder / RUN_STATE).write_text(json.dumps(document))
        rewrite_manifest(folder)

    read_or_refused(original, tmp_path, change)


@given(SEEDS)
@FEW
def test_tensor_files_with_changed_bytes_are_read_or_refused(original: Path, tmp_path: Path, seed: int) -> None:
    """The manifest matches the files; otherwise their checksums would be refused first."""
    def change(folder: Path) -> None:
        (folder / PART).write_bytes(mutated((folder / PART).read_bytes(), seed))
        rewrite_manifest(folder)

    read_or_refused(original, tmp_path, change)
