"""Folders of checkpoints without ranks: what a manifest detects, what is kept, what a crash leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from prelora_ds.errors import ConfigError
from prelora_ds.files import replace_file
from prelora_ds.run.checkpoints.checkpoint_folder import (
    BrokenCheckpointError,
    CheckpointManifest,
    FileRecord,
    base_name,
    commit,
    describe,
    discard_partial,
    list_checkpoints,
    retain,
    set_aside,
    step_folder,
    step_of,
)
from prelora_ds.run.folder import ASIDE

FIXTURE = Path(__file__).parents[2] / "fixtures" / "run_of_0.1.0" / "run"
ITS_STEP = object()


def make(root: Path, step: int, *, acc1: float | None = None, base: str | None = None,
         evaluated_at: object = ITS_STEP) -> Path:
    partial, final = root / f".step-{step}.partial", step_folder(root, step)
    partial.mkdir(parents=True)
    (partial / "rank").write_bytes(bytes(range(200)))
    if acc1 is not None:
        at = step if evaluated_at is ITS_STEP else evaluated_at
        (partial / "state.json").write_text(json.dumps({"run": {"evaluated_at": at}}))
    files = {path.name: FileRecord.of(path) for path in partial.iterdir()}
    commit(partial, final, CheckpointManifest(2, 1, "full", files, step, base, acc1))
    return final


def make_base(root: Path, name: str) -> None:
    (root / name).mkdir(parents=True)
    CheckpointManifest(2, 0, "lora", {}).write(root / name)


def make_named_base(root: Path, content: bytes) -> str:
    """Write a base that is named by its content, as a run does."""
    (root / "new").mkdir(parents=True)
    (root / "new" / "rank").write_bytes(content)
    files = {"rank": FileRecord.of(root / "new" / "rank")}
    commit(root / "new", root / base_name(files), CheckpointManifest(2, 0, "lora", files))
    return base_name(files)


def steps(root: Path) -> list[int]:
    return [step_of(folder) for folder in list_checkpoints(root)]


def test_a_manifest_comes_back_as_it_was_written_and_its_files_verify(tmp_path: Path) -> None:
    folder = make(tmp_path, 12, acc1=0.5, base="base-x")
    manifest = CheckpointManifest.load(folder)
    manifest.verify(folder)
    assert (manifest.step, manifest.base, manifest.acc1, manifest.world_size) == (12, "base-x", 0.5, 2)
    assert manifest.files["rank"].bytes == 200


@pytest.mark.parametrize("byte", range(0, 200, 37))
def test_every_flipped_byte_of_a_file_is_detected(tmp_path: Path, byte: int) -> None:
    folder = make(tmp_path, 1)
    data = bytearray((folder / "rank").read_bytes())
    data[byte] ^= 1
    (folder / "rank").write_bytes(data)
    with pytest.raises(BrokenCheckpointError, match="rank: checksum mismatch"):
        CheckpointManifest.load(folder).verify(folder)


def test_every_flipped_byte_of_a_manifest_is_detected(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for i in range(len(whole)):
        data = bytearray(whole)
        data[i] ^= 1
        path.write_bytes(data)
        try:
            found = CheckpointManifest.load(folder)
        except BrokenCheckpointError:
            continue
        assert json.loads(data) == json.loads(whole) and found.step == 1, i  # only white space differs


@pytest.mark.parametrize("length", [0, 199])
def test_a_short_file_is_reported_with_both_sizes(tmp_path: Path, length: int) -> None:
    folder = make(tmp_path, 1)
    with (folder / "rank").open("r+b") as file:
        file.truncate(length)
    with pytest.raises(BrokenCheckpointError, match=f"is {length} bytes, expected 200"):
        CheckpointManifest.load(folder).verify(folder)


def test_a_missing_file_and_a_missing_manifest_are_reported(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    (folder / "rank").unlink()
    with pytest.raises(BrokenCheckpointError, match="rank: cannot be read"):
        CheckpointManifest.load(folder).verify(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(BrokenCheckpointError, match=r"has no manifest\.json"):
        CheckpointManifest.load(folder)


def test_another_format_is_refused_with_both_numbers_and_a_remedy(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    CheckpointManifest(2, 1, "full", {}, 1, format=0).write(folder)
    with pytest.raises(ConfigError, match=r"has format 0, this version reads format 1\n  remedy: resume with"):
        CheckpointManifest.load(folder)


def test_kept_are_the_last_the_best_and_those_at_ticks(tmp_path: Path) -> None:
    for step, acc1 in ((10, None), (20, 0.7), (30, 0.9), (40, 0.8), (50, 0.1), (60, 0.2)):
        make(tmp_path, step, acc1=acc1)
    retain(tmp_path, last=2, best=1, ticks={10}, in_use=None)
    assert steps(tmp_path) == [60, 50, 30, 10]


def test_a_base_is_kept_as_long_as_a_checkpoint_names_it_or_the_run_uses_it(tmp_path: Path) -> None:
    for name in ("base-old", "base-named", "base-used"):
        make_base(tmp_path, name)
    make(tmp_path, 1, base="base-old")
    make(tmp_path, 2, base="base-named")
    retain(tmp_path, last=1, best=0, ticks=(), in_use="base-used")
    assert steps(tmp_path) == [2] and {p.name for p in tmp_path.glob("base-*")} == {"base-named", "base-used"}
    set_aside(tmp_path, [step_folder(tmp_path, 2)])
    make(tmp_path, 3)
    retain(tmp_path, last=1, best=0, ticks=(), in_use=None)
    assert {p.name for p in tmp_path.glob("base-*")} == {"base-named"}  # the base of the one that was set aside


def test_a_checkpoint_that_was_copied_without_its_base_says_what_to_copy(tmp_path: Path) -> None:
    folder = make(tmp_path, 2, base="base-0123456789ab")
    missing = f"{tmp_path}/base-0123456789ab: is missing; it contains the frozen weights"
    assert missing in describe(folder).line()


def test_no_base_is_removed_while_a_manifest_is_broken(tmp_path: Path) -> None:
    make_base(tmp_path, "base-x")
    (make(tmp_path, 1, base="base-x") / "manifest.json").write_text("{")
    retain(tmp_path, last=5, best=0, ticks=(), in_use=None)
    assert (tmp_path / "base-x").exists()


def test_set_aside_twice_keeps_both(tmp_path: Path) -> None:
    for _ in range(2):
        set_aside(tmp_path, [make(tmp_path, 7)])
    assert sorted(p.name for p in (tmp_path / ASIDE).iterdir()) == ["step-00000007", "step-00000007.1"]


def test_only_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    make(tmp_path, 3)
    (tmp_path / ".step-00000004.partial").mkdir()
    (tmp_path / ".step-00000004.partial" / "rank").write_text("half")
    (tmp_path / ".latest.partial").write_text("half")
    replace_file(tmp_path / "latest", "step-00000003\n")
    discard_partial(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003"]


def test_a_commit_over_an_existing_checkpoint_does_not_change_it(tmp_path: Path) -> None:
    folder = make(tmp_path, 5, acc1=0.25)
    (tmp_path / ".new.partial").mkdir()
    with pytest.raises(OSError, match="not empty"):
        commit(tmp_path / ".new.partial", folder, CheckpointManifest(1, 1, "full", {}, 5))
    assert CheckpointManifest.load(folder).acc1 == 0.25


def test_a_checkpoint_that_was_set_aside_still_has_its_base(tmp_path: Path) -> None:
    set_aside(tmp_path, [make(tmp_path, 3, base=make_named_base(tmp_path, b"frozen"))])
    assert describe(tmp_path / ASIDE / "step-00000003").line().endswith("verified")


def test_a_base_of_another_run_under_this_run_s_name_is_detected(tmp_path: Path) -> None:
    name, other = make_named_base(tmp_path / "a", b"frozen"), make_named_base(tmp_path / "b", b"FROZEN")
    folder = make(tmp_path / "a", 3, base=name)
    for path in (tmp_path / "b" / other).iterdir():
        shutil.copy(path, tmp_path / "a" / name)
    said = describe(folder).line()
    assert "BROKEN" in said and "contains the weights of another run" in said and other in said


def test_the_best_are_evaluated_ones_and_the_earlier_of_equals(tmp_path: Path) -> None:
    for step, acc1 in ((1, 0.25), (2, 0.5), (3, 0.5), (4, None), (5, None)):
        make(tmp_path, step, acc1=acc1)
    retain(tmp_path, last=1, best=1, ticks=(), in_use=None)
    assert steps(tmp_path) == [5, 2]


def test_a_checkpoint_under_the_name_of_another_step_is_detected(tmp_path: Path) -> None:
    make(tmp_path, 10).rename(step_folder(tmp_path, 25))
    said = describe(step_folder(tmp_path, 25)).line()
    assert "BROKEN" in said and "contains step 10" in said


def test_a_checkpoint_of_0_1_0_has_no_accuracy_unless_its_state_confirms_an_evaluation() -> None:
    folder = step_folder(FIXTURE / "checkpoints", 16)
    assert CheckpointManifest.load(folder).acc1 == 0.1  # of the evaluation at step 10
    assert "acc1" not in describe(folder).line() and describe(folder).line().endswith("verified")


def test_an_accuracy_counts_if_the_state_was_evaluated_at_this_step(tmp_path: Path) -> None:
    assert "acc1 50.00%" in describe(make(tmp_path, 7, acc1=0.5)).line()
    assert "acc1 0.00%" in describe(make(tmp_path, 8, acc1=0.0)).line()
    for step, evaluated_at in ((9, 8), (10, None), (11, "11"), (12, [])):
        assert "acc1" not in describe(make(tmp_path, step, acc1=0.5, evaluated_at=evaluated_at)).line()


def test_an_accuracy_of_other_weights_keeps_no_checkpoint(tmp_path: Path) -> None:
    for step, evaluated_at in ((10, None), (20, 20), (30, 20), (40, 40)):
        make(tmp_path, step, acc1=0.9 if step != 40 else 0.8, evaluated_at=evaluated_at)
    (step_folder(tmp_path, 40) / "state.json").unlink()  # broken, so its accuracy is unknown
    make(tmp_path, 50)
    retain(tmp_path, last=1, best=3, ticks=(), in_use=None)
    assert steps(tmp_path) == [50, 20]
