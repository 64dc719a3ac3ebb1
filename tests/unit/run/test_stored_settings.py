"""Stored settings compared with current ones: other versions, and the remedies in errors."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.claims import begin, checkpoint, claim

from prelora_ds.config import changes as resuming
from prelora_ds.config.load import load_config
from prelora_ds.config.overrides import as_override, override
from prelora_ds.errors import ConfigError


def test_a_remedy_names_no_checkpoint_if_the_run_has_none(tmp_path: Path) -> None:
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
                                   f"start a new run with --resume {out}")
    with pytest.raises(ConfigError) as caught:  # a new run may not change it either
        claim(out, "auto", "model.hidden_size=48")
    assert caught.value.remedy == "set model.hidden_size=32, or choose another run.output_dir"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=5)


@given(setting=st.tuples(st.just("run.name"), st.text()) | st.tuples(st.sampled_from(
    ["train.duration", "convergence", "lora.dropout", "model.factory_args"]), VALUES))
def test_the_override_in_a_remedy_is_read_back_exactly(setting: tuple[str, Any]) -> None:
    key, value = setting
    section, name = (*key.split("."), None)[:2]
    try:
        [word], tree = shlex.split(as_override(key, value)), {}
        override(tree, word)
    except ConfigError:  # a text that a file cannot contain
        return
    assert (tree[section][name] if name else tree[section]) == value


# ---- other versions

def without(*keys: str) -> Callable[[Any], None]:
    """Return a function that removes keys of the config, as if its version lacked them."""
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


def test_a_key_that_the_old_version_lacked_has_its_default(tmp_path: Path) -> None:
    out = tmp_path / "out"
    claim(out)
    begin(out)
    checkpoint(out, 10, change=without("lora.dropout"))
    kept = out / "config.yaml"
    kept.write_text(kept.read_text().replace("  dropout: 0.0\n", ""))
    with pytest.raises(ConfigError, match=r"lora.dropout = 0.1: was 0.0 in"):
        claim(out, "auto", "lora.dropout=0.1")


def test_settings_that_may_change_need_not_be_valid_in_this_version(tmp_path: Path) -> None:
    """The stored run had a DeepSpeed key and an output folder that are refused today."""
    def change(state: Any) -> None:
        state["config"]["deepspeed"]["zero_optimization"]["cpu_offload"] = True
        state["config"]["run"]["output_dir"] = "~/x"
        state["config"]["checkpoint"]["keep_longest"] = 3
        state["config"]["checkpoint"]["every"] = "0 steps"
        state["config"]["train"]["eval_every"] = "0 %"
    saved = checkpoint(tmp_path / "old", 10, change=change)
    assert claim(tmp_path / "new", str(saved)) == [saved]


def test_settings_of_a_later_version_are_refused_with_their_key(tmp_path: Path) -> None:
    def change(state: Any) -> None:
        state["config"]["lora"]["kind"] = "dora"
    saved = checkpoint(tmp_path / "old", 10, change=change)
    with pytest.raises(ConfigError, match=r"does not accept: lora.kind = 'dora': unknown key"):
        claim(tmp_path / "new", str(saved))


def test_a_run_of_0_1_0_keeps_the_interval_of_its_measurements(tmp_path: Path) -> None:
    """Version 0.1.0 called it convergence.every; it became observe.every because every run observes."""
    def rename(config: Any) -> None:
        config["convergence"]["every"] = config.pop("observe")["every"]

    out = tmp_path / "out"
    claim(out)
    begin(out)
    saved = checkpoint(out, 10, change=lambda state: rename(state["config"]))
    kept = yaml.safe_load((out / "config.yaml").read_text())
    rename(kept)
    assert kept["convergence"]["every"] == "2 steps"
    (out / "config.yaml").write_text(yaml.safe_dump(kept))
    with pytest.raises(ConfigError, match=r"observe\.every = '4 steps': was '2 steps' in"):
        claim(out, "auto", "observe.every=4 steps")
    assert claim(tmp_path / "new", str(saved), "observe.every=4 steps") == [saved]
    assert claim(out, "auto", "convergence.every=2 steps") == [saved]
    assert "every: 2 steps" in (out / "config.yaml").read_text()


def test_a_renamed_key_is_read_through_the_table_of_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(resuming.RENAMED, "lora.highest", "lora.r_max")
    monkeypatch.setitem(resuming.RENAMED, "seed", "run.seed")

    def change(state: Any) -> None:
        state["config"]["lora"]["highest"] = state["config"]["lora"].pop("r_max")
        state["config"]["seed"] = state["config"]["run"].pop("seed")
    saved = checkpoint(tmp_path / "old", 10, change=change)
    assert claim(tmp_path / "new", str(saved)) == [saved]
    with pytest.raises(ConfigError, match=r"run.seed = 8: was 0 in"):
        claim(tmp_path / "newer", str(saved), "run.seed=8")
    recipe = tmp_path / "r.yaml"
    debug = Path("launch/recipes/vit_tiny_debug.yaml").read_text()
    recipe.write_text(debug.replace("r_max:", "highest:"))
    assert load_config(recipe).lora.r_max == 4
