"""The output folder: whose it is, and which checkpoints a run goes on from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from prelora_ds.checkpoints.folder import FOLDER, STATE, CheckpointManifest, FileRecord, commit, set_aside, step_folder
from prelora_ds.configuring import load_config
from prelora_ds.core.config import Config
from prelora_ds.core.errors import ConfigError, LaunchError, NotSavedError
from prelora_ds.launching.claim import claim_output

DATA = {"data.train": "1,437 samples, index 01234567", "data.val": "360 samples, index 89abcdef"}


def config(out: Path, *overrides: str) -> Config:
    return load_config("launch/recipes/vit_tiny_debug.yaml",
                       [f"run.output_dir={out}", "data.train=t", "data.val=v", *overrides])


def claim(out: Path, resume: str = "auto", *overrides: str, data: dict[str, str] | None = None) -> list[Path]:
    """The checkpoints that a run in ``out`` may go on from; it ends at once."""
    found = claim_output(out, config(out, *overrides), resume, data or DATA)
    found.lease.release()
    return list(found.sources)


def checkpoint(run: Path, step: int, *overrides: str) -> Path:
    """A checkpoint of ``run``, without weights."""
    root = run / FOLDER
    partial = root / f".{step}.partial"
    partial.mkdir(parents=True)
    (partial / STATE).write_text(json.dumps(
        {"config": config(run, *overrides).model_dump(mode="json"), "data": DATA}))
    commit(partial, step_folder(root, step),
           CheckpointManifest(1, 0, "full", {STATE: FileRecord.of(partial / STATE)}, step))
    return step_folder(root, step)


def begin(run: Path) -> None:
    (run / "plans.jsonl").write_text('{"event": "plan", "step": 0}\n')


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_that_never_began_binds_nobody_to_its_settings(tmp_path: Path) -> None:
    """Its roll call was refused, say: what it left is config.yaml."""
    out = tmp_path / "out"
    assert claim(out) == [] and (out / "config.yaml").is_file()
    assert claim(out, "never", "optimizer.lr=0.5") == []
    begin(out)
    with pytest.raises(ConfigError, match=r"optimizer.lr = 0.001: was 0.5 in"):
        claim(out)


def test_somebody_elses_folder_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("theirs: 1\n")
    with pytest.raises(ConfigError):
        claim(tmp_path)
    assert contents(tmp_path) == {tmp_path / "config.yaml": b"theirs: 1\n"}


def test_a_path_is_gone_to_once_and_the_same_command_goes_on(tmp_path: Path) -> None:
    source, other, out = checkpoint(tmp_path / "old", 15), checkpoint(tmp_path / "older", 3), tmp_path / "new"
    assert claim(out, str(source)) == [source]
    assert claim(out, str(source)) == [source]  # ended before it began
    begin(out)
    assert claim(out, str(source)) == [source]  # ended before its first checkpoint
    assert [path.resolve() for path in claim(out)] == [source]  # and with --resume left out it is no other run
    with pytest.raises(ConfigError, match="is of another run"):
        claim(out, str(other))
    own = checkpoint(out, 18)
    assert claim(out, str(source)) == claim(out) == [own]


def test_a_path_in_the_run_itself_goes_back_to_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    early, late = checkpoint(out, 3), checkpoint(out, 6)
    claim(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/config.yaml").rename(out / "config.yaml")
    begin(out)
    assert claim(out, "auto") == [late, early]
    assert claim(out, str(early)) == [early]
    set_aside(out / FOLDER, [late])
    assert claim(out, str(out / FOLDER / "aside" / late.name)) == [out / FOLDER / "aside" / late.name]


def test_a_new_run_may_have_other_rates_and_data_and_a_resumed_one_may_not(tmp_path: Path) -> None:
    source, out = checkpoint(tmp_path / "old", 15), tmp_path / "old"
    others = DATA | {"data.train": "100 samples, index 00000000"}
    assert claim(tmp_path / "new", str(source), "optimizer.lr=0.5", data=others) == [source]
    with pytest.raises(ConfigError, match=r"lora.r_max = 8: was 4 in"):
        claim(tmp_path / "newer", str(source), "lora.r_max=8")
    assert not (tmp_path / "newer/config.yaml").exists()
    (out / "config.yaml").write_text((tmp_path / "new/config.yaml").read_text().replace("0.5", "0.001"))
    begin(out)
    with pytest.raises(ConfigError, match=r"data.train = 't': has 100 samples, index 00000000, and the run in"):
        claim(out, data=others)


@pytest.mark.parametrize(("known", "problem"), [
    ({"classes": ["cat", "owl"], "num_labels": 2}, "has 'dog' as its class 1, and the checkpoint .* has 'owl'"),
    ({"classes": ["cat", "dog", "owl"], "num_labels": 3}, "has 2 classes, and the checkpoint .* has 3"),
    ({"num_labels": 3}, "has 2 classes, and the checkpoint .* has 3"),  # of an earlier version
    ({"num_labels": 2}, None), ({"classes": ["cat", "dog"], "num_labels": 2}, None),
])
@pytest.mark.parametrize("new", [True, False])
def test_data_of_other_classes_are_refused_in_a_new_run_too(
    tmp_path: Path, known: dict[str, object], problem: str | None, new: bool
) -> None:
    source = checkpoint(tmp_path / "old", 15)
    state = json.loads((source / STATE).read_text())
    (source / STATE).write_text(json.dumps(state | known))
    out, resume = (tmp_path / "new", str(source)) if new else (tmp_path / "old", "auto")

    def claim_it() -> None:
        claim_output(out, config(out), resume, DATA, ("cat", "dog")).lease.release()

    if not new:
        claim(tmp_path / "elsewhere")
        text = (tmp_path / "elsewhere/config.yaml").read_text()
        (out / "config.yaml").write_text(text.replace(str(tmp_path / "elsewhere"), str(out)))
    if problem is None:
        claim_it()
        return
    with pytest.raises(ConfigError, match=problem) as caught:
        claim_it()
    assert caught.value.key == "data.train"
    assert not (tmp_path / "new/config.yaml").exists()


def test_a_damaged_log_is_told_before_the_run_resumes(tmp_path: Path) -> None:
    claim(tmp_path)
    begin(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\ngarbage\n{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl': line 2 is not JSON"):
        claim(tmp_path)


def test_a_full_disk_is_worth_another_try(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting takes root")
    try:
        with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
            while True:
                filler.write(bytes(4096))
        with pytest.raises((NotSavedError, LaunchError), match="No space left") as caught:
            claim(disk / "out")
        assert caught.value.exit_code == 75
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
