"""Claims of the output folder, and the checkpoints that a run may resume from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.claims import DATA, begin, checkpoint, claim, config

from prelora_ds.errors import ConfigError, DiskError, LaunchError
from prelora_ds.run.checkpoints.checkpoint_folder import RUN_STATE, set_aside
from prelora_ds.run.checkpoints.resume import checkpoints_at
from prelora_ds.run.claim import claim_output
from prelora_ds.run.folder import RunFolder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_that_never_started_does_not_fix_its_settings(tmp_path: Path) -> None:
    """It was refused at check-in, for example, and left only config.yaml."""
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


def test_a_path_is_used_once_and_the_same_command_resumes_the_new_run(tmp_path: Path) -> None:
    source, other, out = checkpoint(tmp_path / "old", 15), checkpoint(tmp_path / "older", 3), tmp_path / "new"
    assert claim(out, str(source)) == [source]
    assert claim(out, str(source)) == [source]  # ended before its start
    begin(out)
    assert claim(out, str(source)) == [source]  # ended before its first checkpoint
    assert [path.resolve() for path in claim(out)] == [source]  # without --resume it is the same run
    with pytest.raises(ConfigError, match="belongs to another run"):
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
    root = RunFolder(out).checkpoints
    set_aside(root, [late])
    assert claim(out, str(root / "aside" / late.name)) == [root / "aside" / late.name]


def test_a_new_run_may_change_the_learning_rate_and_the_data_but_a_resumed_one_may_not(tmp_path: Path) -> None:
    source, out = checkpoint(tmp_path / "old", 15), tmp_path / "old"
    others = DATA | {"data.train": "100 samples, index 00000000"}
    assert claim(tmp_path / "new", str(source), "optimizer.lr=0.5", data=others) == [source]
    with pytest.raises(ConfigError, match=r"model.hidden_size = 48: was 32 in"):
        claim(tmp_path / "newer", str(source), "model.hidden_size=48")
    assert not (tmp_path / "newer/config.yaml").exists()
    (out / "config.yaml").write_text((tmp_path / "new/config.yaml").read_text().replace("0.5", "0.001"))
    begin(out)
    with pytest.raises(ConfigError, match=r"data.train = 't': is 100 samples, index 00000000, but the run in"):
        claim(out, data=others)


# ---- logs without checkpoints

def test_logs_whose_checkpoints_were_removed_are_refused_and_kept(tmp_path: Path) -> None:
    """Test a removed folder, and one that is only empty."""
    out = tmp_path / "out"
    assert claim(out) == []
    begin(out)
    assert claim(out) == []  # ended before its first checkpoint
    saved = checkpoint(out, 10)
    RunFolder(out).saved.touch()
    (saved.parent / "latest").write_text(f"{saved.name}\n")
    assert claim(out) == [saved]
    for gone in (saved, saved.parent / "latest", saved.parent):
        away = tmp_path / "away"
        gone.rename(away)
        if gone.name != "latest":
            before = contents(out)
            with pytest.raises(ConfigError, match="whose checkpoints were removed"):
                claim(out)
            assert contents(out) == before
        away.rename(gone)
    assert claim(out) == [saved]


def test_a_run_of_0_1_0_is_known_to_have_checkpoints_once_it_is_continued(tmp_path: Path) -> None:
    out = tmp_path / "out"
    claim(out)
    begin(out)
    saved = checkpoint(out, 10)
    assert claim(out) == [saved]
    saved.rename(tmp_path / "away")
    with pytest.raises(ConfigError, match="whose checkpoints were removed"):
        claim(out)


def test_a_folder_that_was_emptied_by_hand_takes_a_new_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    claim(out)
    RunFolder(out).saved.touch()
    (out / "config.yaml").unlink()
    assert claim(out) == []
    begin(out)
    assert claim(out) == []  # the record of the former run's checkpoints is gone


# ---- a duration that ends before the checkpoint

@pytest.mark.parametrize(("duration", "steps"), [
    ("10 steps", 10), ("20 steps", 20), ("0.5 epochs", 12)])
def test_a_new_run_must_last_longer_than_its_checkpoint(
    tmp_path: Path, duration: str, steps: int
) -> None:
    source = checkpoint(tmp_path / "old", 20)
    both = rf"ends the run after step {steps}, but the checkpoint .* is already at step 20"
    with pytest.raises(ConfigError, match=both) as caught:
        claim(tmp_path / "new", str(source), f"train.duration={duration}", steps=steps)
    assert (caught.value.key, caught.value.value) == ("train.duration", duration)
    assert not (tmp_path / "new/config.yaml").exists()
    assert claim(tmp_path / "new", str(source), "train.duration=21 steps", steps=21) == [source]


def test_a_run_resumes_from_the_checkpoint_of_its_last_step(tmp_path: Path) -> None:
    """It was killed while it wrote its export."""
    out = tmp_path / "out"
    claim(out)
    begin(out)
    last = checkpoint(out, 20)
    assert claim(out) == [last]


# ---- what is damaged

@pytest.mark.parametrize("change", [
    lambda state: state.pop("run"), lambda state: state.update(run=[]),
    lambda state: state.pop("config"), lambda state: state.update(config=3),
    lambda state: state.update(data=None), lambda state: state.clear()])
def test_an_invalid_state_is_left_to_the_loader(tmp_path: Path, change: Any) -> None:
    saved = checkpoint(tmp_path / "old", 10, change=change)
    assert claim(tmp_path / "new", str(saved)) == [saved]


def test_an_impossible_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    too_long = tmp_path.joinpath(*["z" * 250] * 20)
    for out in (tmp_path / "file", tmp_path / "file/below", Path("/proc/x"), too_long):
        with pytest.raises(ConfigError) as caught:
            claim(out)
        assert caught.value.key == "run.output_dir"


@pytest.mark.parametrize("resume", ["", ".", "nothing", "x" * 300, "a\n"])
def test_what_is_not_a_run_is_refused_by_its_name(tmp_path: Path, resume: str) -> None:
    with pytest.raises(ConfigError) as caught:
        claim(tmp_path / "out", resume)
    assert (caught.value.key, caught.value.value) == ("--resume", resume)


def test_an_empty_path_does_not_mean_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = checkpoint(tmp_path, 10)
    wanted = config(tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    assert checkpoints_at(".") == [saved.relative_to(tmp_path)]
    with pytest.raises(ConfigError, match="neither a checkpoint nor a run"):
        claim_output(RunFolder(tmp_path / "new"), wanted, "", DATA, steps=20)


@pytest.mark.parametrize("log", [b"\xff\n", b"{}\n", b"[1]\n", b"end\n"])
def test_a_damaged_log_is_named(tmp_path: Path, log: bytes) -> None:
    claim(tmp_path / "out")
    (tmp_path / "out/events.jsonl").write_bytes(log)
    with pytest.raises(ConfigError, match=r"events\.jsonl"):
        claim(tmp_path / "out")


@pytest.mark.parametrize("name", ["events.jsonl", "plans.jsonl"])  # plans.jsonl: of version 0.1.0
def test_a_finished_run_is_refused(tmp_path: Path, name: str) -> None:
    claim(tmp_path / "out")
    (tmp_path / "out" / name).write_text('{"event": "plan", "step": 0}\n{"event": "end", "step": 20}\n')
    with pytest.raises(ConfigError, match="holds a finished run"):
        claim(tmp_path / "out")


@pytest.mark.parametrize("origin", [b"", b"\xff\xfe", b"\0"])
def test_a_damaged_origin_is_one_message_or_none(tmp_path: Path, origin: bytes) -> None:
    claim(tmp_path / "out")
    (tmp_path / "out/origin").write_bytes(origin)
    try:
        assert claim(tmp_path / "out") == []
    except ConfigError as error:
        assert error.key == "--resume"


# ---- classes

@pytest.mark.parametrize(("known", "problem"), [
    ({"classes": ["cat", "owl"], "num_labels": 2}, "has 'dog' as class 1, but the checkpoint .* has 'owl'"),
    ({"classes": ["cat", "dog", "owl"], "num_labels": 3}, "has 2 classes, but the checkpoint .* has 3"),
    ({"num_labels": 3}, "has 2 classes, but the checkpoint .* has 3"),  # of an earlier version
    ({"num_labels": 2}, None), ({"classes": ["cat", "dog"], "num_labels": 2}, None),
])
@pytest.mark.parametrize("new", [True, False])
def test_data_of_other_classes_are_refused_in_a_new_run_too(
    tmp_path: Path, known: dict[str, object], problem: str | None, new: bool
) -> None:
    source = checkpoint(tmp_path / "old", 15)
    state = json.loads((source / RUN_STATE).read_text())
    (source / RUN_STATE).write_text(json.dumps(state | known))
    out, resume = (tmp_path / "new", str(source)) if new else (tmp_path / "old", "auto")

    def claim_it() -> None:
        claim_output(RunFolder(out), config(out), resume, DATA, ("cat", "dog"), steps=20).lock.release()

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


def test_a_damaged_log_is_reported_before_the_run_resumes(tmp_path: Path) -> None:
    claim(tmp_path)
    begin(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\ngarbage\n{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl': line 2 is not valid JSON"):
        claim(tmp_path)


def test_a_full_disk_is_an_error_that_may_be_retried(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting takes root")
    try:
        with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
            while True:
                filler.write(bytes(4096))
        with pytest.raises((DiskError, LaunchError), match="No space left") as caught:
            claim(disk / "out")
        assert caught.value.exit_code == 75
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# ---- moved, and forked

def test_a_checkpoint_that_was_moved_and_linked_back_is_still_the_run_s_own(tmp_path: Path) -> None:
    out = tmp_path / "out"
    claim(out)
    begin(out)
    saved = checkpoint(out, 10)
    saved.rename(tmp_path / saved.name)
    saved.symlink_to(tmp_path / saved.name)
    before = contents(out)
    assert claim(out) == [saved]
    assert {path: data for path, data in contents(out).items() if path.suffix == ".jsonl"} == {
        path: data for path, data in before.items() if path.suffix == ".jsonl"}
    with pytest.raises(ConfigError, match=r"was 0\.001"):  # as the same run it may not change the learning rate
        claim(out, "auto", "optimizer.lr=1")


def test_a_fork_keeps_the_phases_that_its_checkpoint_has_started(tmp_path: Path) -> None:
    """Later phases and the end of the current one may change. The phase state of 0.1.0 has no index."""
    def in_warmup(state: dict[str, Any]) -> None:
        state["run"]["phase"] = {"plan": {"phase": "warmup"}}

    saved = checkpoint(tmp_path / "old", 10, change=in_warmup)
    for fork in (["lora.warmup=9 steps"], ["lora.train_rest=false"], []):
        assert claim(tmp_path / f"new{len(fork)}", str(saved), *fork) == [saved]
    for override, key in (("convergence=null", "phases.full.until"),
                          ("lora.r_max=8", "phases.warmup.adapters.ranks.r_max"),
                          ("convergence.tau=1", "phases.full.until.tau")):
        with pytest.raises(ConfigError, match="which is in phase warmup") as caught:
            claim(tmp_path / "other", str(saved), override)
        assert caught.value.key == key
    early = checkpoint(tmp_path / "early", 5)
    for fork in ("convergence.tau=1", "lora.r_max=8", "convergence=null"):
        assert claim(tmp_path / fork, str(early), fork) == [early]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_in_the_place_of_the_model_is_reported_before_the_run(tmp_path: Path, kind: str) -> None:
    claim(tmp_path)
    begin(tmp_path)
    (tmp_path / "model").symlink_to(tmp_path) if kind == "link" else (tmp_path / "model").write_text("notes")
    with pytest.raises(ConfigError, match="contains a file or link named model, where the run") as refused:
        claim(tmp_path)
    assert refused.value.key == "run.output_dir"


LIST = ("convergence=null", "lora=null", "observe.every=2 steps")
FULL = "{name: full, until: {test: prelora, tau: 1.0, zeta: 5.0, m: 2}}"
LOW = "{name: low, adapters: {rank: 4, dropout: 0.1}, train: [norms, head], until: 5 steps}"


def phases(*entries: str) -> str:
    return f"phases=[{', '.join(entries)}]"


@pytest.mark.parametrize(("low", "key", "said"), [
    (LOW.replace("rank: 4", "rank: 8"), "adapters.rank", "was 4 in"),
    (LOW.replace("rank: 4", "rank: 4, alpha_over_r: 2"), "adapters.alpha_over_r", "was 1.0 in"),
    (LOW.replace("dropout: 0.1", "weight_decay: 0.5"), "adapters.dropout", "was 0.1 in"),
    (LOW.replace("dropout: 0.1", "dropout: 0.1, weight_decay: 0.5"), "adapters.weight_decay", "was 0.0 in"),
    ("{name: low, train: head, until: 5 steps}", "adapters", "was {'from': 'fresh', 'kind': 'lora', 'rank': 4, "),
    (LOW.replace("5 steps", "5 steps, merge: {every: 9 steps}"), "merge", "was None in"),
    (LOW.replace("[norms, head]", "head"), "train", r"was ['head', 'norms'] in"),
    (LOW.replace("5 steps", "5 steps, rewarm: 2 steps"), "rewarm", "was None in")])
def test_a_fork_that_changes_a_phase_is_refused_with_the_key_of_the_recipe(
        tmp_path: Path, low: str, key: str, said: str) -> None:
    saved = forked_from(tmp_path, *LIST, phases(FULL, LOW, "{name: last}"))
    with pytest.raises(ConfigError) as caught:
        claim(tmp_path / "new", str(saved), *LIST, phases(FULL, low, "{name: last}"))
    assert caught.value.key == f"phases.low.{key}"
    assert caught.value.problem.startswith(said)


@pytest.mark.parametrize("low", [
    LOW.replace("[norms, head]", "[head, norms]"),
    LOW.replace("dropout: 0.1", "dropout: 0.1, mode: branch, options: {train_a: true}"),
    LOW.replace("5 steps", "9 steps")])
def test_a_fork_may_write_a_phase_in_another_way(tmp_path: Path, low: str) -> None:
    saved = forked_from(tmp_path, *LIST, phases(FULL, LOW, "{name: last}"))
    assert claim(tmp_path / "new", str(saved), *LIST, phases(FULL, low, "{name: last}")) == [saved]


def test_a_fork_may_change_kernel_and_stage_together(tmp_path: Path) -> None:
    """The kernel of the source does not fit the stage of the fork, but is not used there."""
    saved = forked_from(tmp_path, "lora.mode=merged", "deepspeed.zero_optimization.stage=2")
    assert claim(tmp_path / "new", str(saved), "lora.mode=branch", "deepspeed.zero_optimization.stage=3") == [saved]


def forked_from(tmp_path: Path, *overrides: str) -> Path:
    """Write a checkpoint of a run in its second phase."""
    def in_second(state: dict[str, Any]) -> None:
        state["run"]["phase"] = {"index": 1, "plan": {"phase": "any"}}

    return checkpoint(tmp_path / "old", 10, *overrides, change=in_second)
