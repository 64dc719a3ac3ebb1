"""The output folder: whose it is, and which checkpoints a run goes on from."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from prelora_ds.checkpoints.folder import (
    FOLDER,
    SAVED,
    STATE,
    CheckpointManifest,
    FileRecord,
    commit,
    set_aside,
    step_folder,
)
from prelora_ds.configuring import load_config
from prelora_ds.core import resuming
from prelora_ds.core.config import Config
from prelora_ds.core.errors import ConfigError
from prelora_ds.launching.claim import claim_output
from prelora_ds.overrides import as_override, override

DATA = {"data.train": "1,437 samples, index 01234567", "data.val": "360 samples, index 89abcdef"}


def config(out: Path, *overrides: str) -> Config:
    return load_config("launch/recipes/vit_tiny_debug.yaml",
                       [f"run.output_dir={out}", "data.train=t", "data.val=v", *overrides])


def claim(out: Path, resume: str = "auto", *overrides: str, data: dict[str, str] | None = None,
          steps: int = 20) -> list[Path]:
    """The checkpoints that a run in ``out`` may go on from; it ends at once."""
    found = claim_output(out, config(out, *overrides), resume, data or DATA, steps=steps)
    found.lease.release()
    return list(found.sources)


def checkpoint(run: Path, step: int, *overrides: str, change: Callable[[Any], None] = id) -> Path:
    """A checkpoint of ``run``, without weights. change: of its state."""
    root = run / FOLDER
    partial = root / f".{step}.partial"
    partial.mkdir(parents=True)
    state = {"config": config(run, *overrides).model_dump(mode="json"), "data": DATA,
             "run": {"step": step}}
    change(state)
    (partial / STATE).write_text(json.dumps(state))
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


# ---- logs without checkpoints

def test_logs_whose_checkpoints_were_removed_are_refused_and_kept(tmp_path: Path) -> None:
    """Whether the folder is gone, or only what was in it."""
    out = tmp_path / "out"
    assert claim(out) == []
    begin(out)
    assert claim(out) == []  # ended before its first checkpoint
    saved = checkpoint(out, 10)
    (out / SAVED).touch()
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


def test_a_folder_that_was_emptied_by_hand_takes_a_new_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    claim(out)
    (out / SAVED).touch()
    (out / "config.yaml").unlink()
    assert claim(out) == []
    begin(out)
    assert claim(out) == []  # what the former run had saved is forgotten


# ---- a duration that ends before the checkpoint

@pytest.mark.parametrize(("duration", "steps"), [
    ("10 steps", 10), ("20 steps", 20), ("0.5 epochs", 12)])
def test_a_new_run_has_to_last_longer_than_to_its_checkpoint(
    tmp_path: Path, duration: str, steps: int
) -> None:
    source = checkpoint(tmp_path / "old", 20)
    both = rf"ends the run after step {steps}, and the checkpoint .* is of step 20 already"
    with pytest.raises(ConfigError, match=both) as caught:
        claim(tmp_path / "new", str(source), f"train.duration={duration}", steps=steps)
    assert (caught.value.key, caught.value.value) == ("train.duration", duration)
    assert not (tmp_path / "new/config.yaml").exists()
    assert claim(tmp_path / "new", str(source), "train.duration=21 steps", steps=21) == [source]


def test_the_runs_own_checkpoint_of_its_last_step_is_taken(tmp_path: Path) -> None:
    """It was ended while it wrote its export."""
    out = tmp_path / "out"
    claim(out)
    begin(out)
    last = checkpoint(out, 20)
    assert claim(out) == [last]


# ---- remedies that can be followed

def test_a_run_without_a_checkpoint_is_not_told_to_begin_another_from_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    claim(out)
    begin(out)
    with pytest.raises(ConfigError) as caught:
        claim(out, "auto", "optimizer.lr=0.5")
    assert caught.value.remedy == "set optimizer.lr=0.001, or choose another run.output_dir"
    checkpoint(out, 10)
    with pytest.raises(ConfigError) as caught:
        claim(out, "auto", "optimizer.lr=0.5")
    assert caught.value.remedy == ("set optimizer.lr=0.001, or choose another run.output_dir and "
                                   f"begin it with --resume {out}")
    with pytest.raises(ConfigError) as caught:  # which a new run may not have either
        claim(out, "auto", "lora.r_max=8")
    assert caught.value.remedy == "set lora.r_max=4, or choose another run.output_dir"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=5)


@given(setting=st.tuples(st.just("run.name"), st.text()) | st.tuples(st.sampled_from(
    ["train.duration", "convergence", "lora.dropout", "model.factory_args"]), VALUES))
def test_the_value_of_a_remedy_is_read_back_as_what_it_was(setting: tuple[str, Any]) -> None:
    key, value = setting
    section, name = (*key.split("."), None)[:2]
    try:
        [word], tree = shlex.split(as_override(key, value)), {}
        override(tree, word)
    except ConfigError:  # a text that no file can hold
        return
    assert (tree[section][name] if name else tree[section]) == value


# ---- other versions

def without(*keys: str) -> Callable[[Any], None]:
    """Remove keys of the config as if its version had not had them yet."""
    def change(state: Any) -> None:
        for key in keys:
            *sections, last = key.split(".")
            section = state["config"]
            for name in sections:
                section = section[name]
            del section[last]
    return change


@pytest.mark.parametrize("keys", [
    ("launch",), ("train.divergence",), ("lora.mode", "lora.train_rest"),
    ("data.mixup", "data.cutmix"), ("model.compile",), ("optimizer.eps",),
    ("convergence.statistic",), ("model.factory_args",)])
def test_a_run_of_a_version_without_some_keys_continues(
    tmp_path: Path, keys: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    claim(out)
    begin(out)
    saved = checkpoint(out, 10, change=without(*keys))
    state = {"config": yaml.safe_load((out / "config.yaml").read_text())}
    without(*keys)(state)
    (out / "config.yaml").write_text(yaml.safe_dump(state["config"]))
    assert claim(out) == [saved]
    assert claim(tmp_path / "new", str(saved)) == [saved]


def test_a_key_that_the_old_version_lacked_counts_as_its_default(tmp_path: Path) -> None:
    out = tmp_path / "out"
    claim(out)
    begin(out)
    checkpoint(out, 10, change=without("lora.dropout"))
    kept = out / "config.yaml"
    kept.write_text(kept.read_text().replace("  dropout: 0.0\n", ""))
    with pytest.raises(ConfigError, match=r"lora.dropout = 0.1: was 0.0 in"):
        claim(out, "auto", "lora.dropout=0.1")


def test_what_may_differ_is_not_held_to_the_rules_of_this_version(tmp_path: Path) -> None:
    """The stored run had a DeepSpeed key and an output folder that are refused today."""
    def change(state: Any) -> None:
        state["config"]["deepspeed"]["zero_optimization"]["cpu_offload"] = True
        state["config"]["run"]["output_dir"] = "~/x"
        state["config"]["checkpoint"]["keep_longest"] = 3
    saved = checkpoint(tmp_path / "old", 10, change=change)
    assert claim(tmp_path / "new", str(saved)) == [saved]


def test_settings_of_a_later_version_are_refused_with_their_key(tmp_path: Path) -> None:
    def change(state: Any) -> None:
        state["config"]["lora"]["kind"] = "dora"
    saved = checkpoint(tmp_path / "old", 10, change=change)
    with pytest.raises(ConfigError, match=r"does not take: lora.kind = 'dora' unknown key"):
        claim(tmp_path / "new", str(saved))


def test_a_renamed_key_is_read_by_the_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(resuming.RENAMED, "lora.highest", "lora.r_max")
    monkeypatch.setitem(resuming.RENAMED, "seed", "run.seed")

    def change(state: Any) -> None:
        state["config"]["lora"]["highest"] = state["config"]["lora"].pop("r_max")
        state["config"]["seed"] = state["config"]["run"].pop("seed")
    saved = checkpoint(tmp_path / "old", 10, change=change)
    assert claim(tmp_path / "new", str(saved)) == [saved]
    with pytest.raises(ConfigError, match=r"lora.r_max = 8: was 4 in"):
        claim(tmp_path / "newer", str(saved), "lora.r_max=8")
    recipe = tmp_path / "r.yaml"
    debug = Path("launch/recipes/vit_tiny_debug.yaml").read_text()
    recipe.write_text(debug.replace("r_max:", "highest:"))
    assert load_config(recipe).lora.r_max == 4


@pytest.mark.parametrize("change", [
    lambda state: state.pop("run"), lambda state: state.update(run=[]),
    lambda state: state.pop("config"), lambda state: state.update(config=3),
    lambda state: state.update(data=None), lambda state: state.clear()])
def test_a_state_that_is_not_one_is_left_to_the_loader(tmp_path: Path, change: Any) -> None:
    saved = checkpoint(tmp_path / "old", 10, change=change)
    assert claim(tmp_path / "new", str(saved)) == [saved]


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    too_long = tmp_path.joinpath(*["z" * 250] * 20)
    for out in (tmp_path / "file", tmp_path / "file/below", Path("/proc/x"), too_long):
        with pytest.raises(ConfigError) as caught:
            claim(out)
        assert caught.value.key == "run.output_dir"
