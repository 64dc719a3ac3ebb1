"""`phases:` of a recipe as a list and as a preset: what is read, what overrides reach, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Discriminator, Tag, ValidationError, create_model

from prelora_ds.config.adapters import AdaptersConfig
from prelora_ds.config.changes import binding_differences, what_binds
from prelora_ds.config.documents import write_yaml
from prelora_ds.config.fields import DurationField, Positive, chosen_by
from prelora_ds.config.load import dump_yaml, load_config, validate
from prelora_ds.config.phases import PhaseConfig
from prelora_ds.config.rank_rules import PreloraRule, RankRuleConfig
from prelora_ds.config.tree import Config
from prelora_ds.config.until import PreloraUntil, SwitchTestConfig, _kind_of_until
from prelora_ds.core.duration import Duration
from prelora_ds.core.layout import Layout
from prelora_ds.core.merge import Merge, Reset
from prelora_ds.core.phases import Adapters, PhaseSpec, needed_in_fp32, plans_at_rank
from prelora_ds.core.rank_rules import RANK_RULES, RankRule
from prelora_ds.core.rank_rules.energy import EnergyRanks
from prelora_ds.core.rank_rules.prelora import PreloraRanks
from prelora_ds.core.rank_rules.random import RandomRanks
from prelora_ds.core.rank_rules.stable_rank import StableRanks
from prelora_ds.core.rank_rules.uniform import UniformRank
from prelora_ds.core.switch_tests import SWITCH_TESTS
from prelora_ds.core.switch_tests.prelora import PreloraTest, Verdict, Windowing, WindowStats
from prelora_ds.core.switch_tests.progress import Progress
from prelora_ds.core.switch_tests.stable_rank import StableRankTest
from prelora_ds.errors import ConfigError

BASE: dict[str, Any] = {
    "run": {"name": "r", "output_dir": "o"}, "data": {"train": "t", "val": "v"},
    "model": {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "intermediate_size": 64},
    "train": {"duration": "20 steps", "global_batch_size": 64, "micro_batch_size": 16},
}
TEST = {"test": "prelora", "tau": 1.0, "zeta": 5.0, "k": 2, "m": 2}
LIST: list[dict[str, Any]] = [
    {"name": "full", "until": "8 steps"},
    {"name": "low", "adapters": {"rank": 4, "families": ["q", "v"]}, "train": "adapters", "until": TEST},
    {"name": "thaw", "train": "all", "until": "4 steps", "rewarm": "2 steps", "zero_stage": 1},
    {"name": "last", "train": ["adapters", "head", "norms", r".*\.cls_token"], "lr_scale": {"b": 16.0, "base": 0.1},
     "freeze_below": 1},
]

CYCLE = {"every": "5 steps"}
ADALORA = {"kind": "adalora", "rank": 4}
UPDATE = {"init": "update"}
TOP = {"choose": "top_k", "every": "5 steps"}
LORA = {"name": "b", "adapters": {"rank": 4}, "train": ["adapters", "rest"]}


def method(*phases: dict[str, Any], **sections: Any) -> Config:
    return validate({**BASE, "phases": [deepcopy(phase) for phase in phases], **sections}, "r.yaml")


def refused(*phases: dict[str, Any], **sections: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        method(*phases, **sections)
    return caught.value


# ---- what is read

def test_merges_are_read_with_their_resets() -> None:
    reset = {"rule": "magnitude", "share": 0.75}
    phases = [LIST[0], {**LORA, "until": "9 steps", "merge": {**CYCLE, "reset": reset, "rewarm": "2 steps"}},
              {"name": "joint", "adapters": {"rank": 2, "from": "merge"}}]
    _, relora, joint = method(*phases).specs()
    assert relora.merge == Merge(Duration("5 steps"), Reset("magnitude", 0.75), Duration("2 steps"))
    assert joint.merge is None and joint.adapters is not None and joint.adapters.ranks == UniformRank(2)
    shapes = {"0.q.weight": (8, 8), "0.q.bias": (8,), "head": (2, 8)}
    layout = Layout(shapes, {family: {0: "0.q"} for family in ("q", "k", "v", "o", "fc1", "fc2")})
    plans = plans_at_rank((PhaseSpec("full"), relora, joint), layout)
    assert [plan.cycle for plan in plans] == [0, 0, 1], "the adapters of relora are merged when joint begins"
    last = PhaseSpec("last", train=("adapters",))
    needed = needed_in_fp32((PhaseSpec("full"), relora, last), layout, 1)
    assert needed & shapes.keys() == {"0.q.weight"}, "what the adapters are merged into"


def test_a_list_is_read_phase_by_phase() -> None:
    adapters = Adapters("lora", ("q", "v"), UniformRank(4))
    assert method(*LIST).specs() == (
        PhaseSpec("full", until=Duration("8 steps")),
        PhaseSpec("low", adapters, ("adapters",), PreloraTest(1.0, 5.0, 2, 2)),
        PhaseSpec("thaw", until=Duration("4 steps"), rewarm=Duration("2 steps")),
        PhaseSpec("last", train=("adapters", "head", "norms", r".*\.cls_token"), lr_scale={"b": 16.0, "base": 0.1},
                  freeze_below=1))


@pytest.mark.parametrize(("written", "kept"), [
    ({"adapters": 16.0, "a": 1.0}, {"adapters": 16.0, "a": 1.0}),  # without "a", its factor would be 16
    ({"adapters": 16.0, "a": 16.0}, {"adapters": 16.0}),
    ({"adapters": 1.0, "a": 1.0, "b": 2.0, "base": 1.0}, {"b": 2.0}),
    (1.0, {}),
    (0.5, {"base": 0.5, "adapters": 0.5})])
def test_a_role_keeps_its_factor_unless_it_has_it_anyway(written: Any, kept: dict[str, float]) -> None:
    assert method(*LIST[:2], {"name": "c", "lr_scale": written}).specs()[2].lr_scale == kept


def test_the_preset_is_three_phases_with_the_parameters_of_two_sections() -> None:
    config = validate({**BASE, "convergence": {"tau": 1.0, "zeta": 5.0}, "observe": {"every": "2 steps"},
                       "lora": {"r_min": 2, "r_max": 4, "warmup": "4 steps", "lr_scale": 0.5, "train_rest": False,
                                "train_a": False}, "phases": {"preset": "prelora", "lora": {"zero_stage": 1}}}, "r")
    adapters = Adapters("lora", ("q", "k", "v", "o", "fc1", "fc2"), PreloraRanks(2, 4), 1.0, {"train_a": False})
    assert config.specs() == (
        PhaseSpec("full", until=PreloraTest(1.0, 5.0)),
        PhaseSpec("warmup", adapters, until=Duration("4 steps"), lr_scale={"adapters": 0.5}),
        PhaseSpec("lora", train=("adapters",), lr_scale={"adapters": 0.5, "base": 0.5}))
    assert [config.for_phase(phase.name).zero.stage for phase in config.phase_list] == [0, 0, 1]


def test_without_a_preset_the_convergence_section_decides() -> None:
    assert [p.name for p in validate(BASE, "r").phase_list] == ["full"]
    assert len(validate({**BASE, "convergence": {"tau": 1.0, "zeta": 5.0}}, "r").phase_list) == 3


def test_a_method_is_written_and_read_back(tmp_path: Path) -> None:
    for config in (method(*LIST), validate({**BASE, "phases": {"preset": "full", "full": {"zero_stage": 2}}}, "r")):
        path = tmp_path / "config.yaml"
        path.write_text(dump_yaml(config))
        assert load_config(path) == config


def test_adapters_keep_what_they_are_and_may_change_how_they_train() -> None:
    keep = {**LIST[2], "adapters": {"from": "keep", "dropout": 0.1, "weight_decay": 0.5}}
    config = method(*LIST[:2], keep, LIST[3])
    assert config.specs()[2].adapters is None
    for name in ("thaw", "last"):
        assert (config.for_phase(name).adapters.dropout, config.for_phase(name).adapters.weight_decay) == (0.1, 0.5)
    assert config.for_phase("low").adapters.dropout == 0.0


def test_kept_adapters_train_as_before_except_for_what_is_set(tmp_path: Path) -> None:
    new = {**LIST[1], "adapters": {"rank": 4, "dropout": 0.1, "weight_decay": 0.05, "mode": "peft"}}
    third = {**LIST[2], "adapters": {"from": "keep", "mode": "branch"}}
    fourth = {**LIST[3], "adapters": {"from": "keep", "dropout": 0.0}}
    config = method(LIST[0], new, third, fourth)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    for read in (config, load_config(path)):
        trained = [read.for_phase(name).adapters for name in ("low", "thaw", "last")]
        assert [(a.dropout, a.weight_decay, a.mode) for a in trained] == [
            (0.1, 0.05, "peft"), (0.1, 0.05, "branch"), (0.0, 0.05, "branch")]


def test_norms_are_measured_of_what_any_phase_adapts() -> None:
    assert method(*LIST).families() == ("q", "v")
    assert method({"name": "full"}).families() == ("q", "k", "v", "o", "fc1", "fc2")


# ---- overrides

def overridden(tmp_path: Path, *overrides: str) -> Config:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(write_yaml({**BASE, "phases": LIST}))
    return load_config(recipe, overrides)


def test_an_override_names_a_phase_by_its_name(tmp_path: Path) -> None:
    config = overridden(tmp_path, "phases.low.adapters.rank=8", "phases.low.until.tau=2.5", "phases.full.until=9 steps",
                        "phases.last.micro_batch_size=8", "phases.last.freeze_below=null")
    full, low, _, last = config.phase_list
    assert (low.adapters.rank, low.until.tau, str(full.until)) == (8, 2.5, "9 steps")  # type: ignore[union-attr]
    assert (last.micro_batch_size, last.freeze_below) == (8, None)


@pytest.mark.parametrize("override", ["phases.lora.zero_stage=1", "phases.low=1", "phases.0.until=9 steps"])
def test_an_override_of_a_phase_that_is_not_there_names_those_that_are(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="the phases of this recipe are full, low, thaw, last"):
        overridden(tmp_path, override)


# ---- what is refused, with phase and key

@pytest.mark.parametrize(("phases", "key", "problem"), [
    ([], "phases", "at least one phase"),
    ([{**LIST[0], "until": None}, LIST[3]], "phases.full.until", "is required"),
    ([LIST[0]], "phases.full.until", "lasts until the end of the run"),
    ([LIST[0], {**LIST[0], "until": None}], "phases.full.name", "two phases"),
    ([{"name": "0 x"}], "phases.0 x.name", "should match pattern"),
    ([{"name": "a", "adapters": {"ranks": {"rule": "prelora"}}, "until": TEST}, {"name": "b"}],
     "phases.a.adapters.ranks.rule", "no phase before"),
    ([LIST[0], {"name": "b", "adapters": {"ranks": {"rule": "prelora"}}}], "phases.b.adapters.ranks.rule", "windows"),
    ([LIST[0], {"name": "b", "adapters": {"rank": 4, "ranks": {"rule": "prelora"}}}], "phases.b.adapters.rank",
     "either"),
    ([LIST[0], {"name": "b", "adapters": {}}], "phases.b.adapters.rank", "set either rank"),
    ([LIST[0], {"name": "b", "adapters": {"rank": 4, "kind": "adapter"}}], "phases.b.adapters.kind",
     "known are lora, dora, vera"),
    ([LIST[0], {"name": "b", "adapters": {"rank": 4, "kind": "boft"}}], "phases.b.adapters.kind",
     "keeps a matrix in x in per linear"),
    ([LIST[0], {"name": "b", "adapters": ADALORA, "active": {**TOP, "k": 2}}], "phases.b.active",
     "all train all the time"),
    ([LIST[0], {"name": "b", "adapters": ADALORA, "train": "adapters", "merge": CYCLE}], "phases.b.merge",
     "cannot be merged and begin again"),
    ([LIST[0], {"name": "b", "adapters": ADALORA, "until": "1 step"},
      {"name": "c", "adapters": {"rank": 2, "from": "resize"}}], "phases.c.adapters.from",
     "cannot change theirs"),
    ([LIST[0], {"name": "b", "adapters": {"kind": "adalora", "ranks": {"rule": "uniform", "rank": 4}}}],
     "phases.b.adapters.ranks", "supports only one rank for all"),
    ([LIST[0], {"name": "b", "adapters": {**ADALORA, "options": {"begin": "5 %", "end": "4 %"}}}],
     "phases.b.adapters.options.end", "must be later than begin (5 %)"),
    ([LIST[0], {"name": "b", "adapters": {**ADALORA, "options": {"every": "10 stepps"}}}],
     "phases.b.adapters.options.every", "is not a duration"),
    ([LIST[0], {"name": "b", "adapters": {"rank": 4, "options": {"init": "gausian"}}}],
     "phases.b.adapters.options.init", "is not one of kaiming, gaussian, update"),
    ([{"name": "b", "adapters": {"rank": 4, "options": UPDATE}}], "phases.b.adapters.options.init",
     "the phase before does not train them"),
    ([{**LIST[0], "train": ["head"]}, {"name": "b", "adapters": {"rank": 4, "options": UPDATE}}],
     "phases.b.adapters.options.init", "the phase before does not train them"),
    ([LIST[0], {"name": "b", "adapters": {"rank": 4, "options": {**UPDATE, "train_a": False}}}],
     "phases.b.adapters.options.init", "draws A again from the seed"),
    ([LIST[0], {**LORA, "adapters": {"rank": 4, "options": UPDATE}, "merge": CYCLE}],
     "phases.b.adapters.options.init", "after a merge"),
    ([LIST[0], {"name": "b", "adapters": {"rank": 4, "kind": "dora", "mode": "merged"}}], "phases.b.adapters.mode",
     "not a kernel of the kind dora"),
    ([LIST[0], {"name": "b", "adapters": {"rank": 4, "kind": "vera", "dropout": 0.1}}], "phases.b.adapters.dropout",
     "not possible with the kind vera"),
    ([LIST[0], {"name": "b", "adapters": {"rank": 4, "kind": "dora"}, "until": "1 step"},
      {"name": "c", "adapters": {"from": "keep", "dropout": 0.1}}], "phases.c.adapters.dropout",
     "not possible with the kind dora"),
    ([LIST[0], {"name": "b", "adapters": {"kind": "vera", "ranks": {"rule": "prelora"}}}],
     "phases.b.adapters.ranks", "only one rank for all"),
    ([LIST[0], {**LORA, "adapters": {"rank": 4, "kind": "dora"}, "merge": CYCLE}], "phases.b.merge",
     "cannot be merged and begin again"),
    ([LIST[0], {**LORA, "adapters": {"kind": "ia3"}, "merge": CYCLE}], "phases.b.merge",
     "cannot be merged and begin again"),
    ([LIST[0], {"name": "b", "adapters": {"kind": "ia3"}, "until": "1 step"},
      {"name": "c", "adapters": {"rank": 4, "from": "merge"}}], "phases.c.adapters.from", "cannot be merged"),
    ([LIST[0], {"name": "b", "adapters": {"kind": "ia3", "ranks": {"rule": "prelora"}}}], "phases.b.adapters.ranks",
     "of the kind ia3 have none"),
    ([LIST[0], {"name": "b", "adapters": {"kind": "ia3", "rank": 4}}], "phases.b.adapters.rank",
     "of the kind ia3 have none"),
    ([LIST[0], {"name": "b", "adapters": {"kind": "oft", "rank": 4, "alpha_over_r": 2}}],
     "phases.b.adapters.alpha_over_r", "of the kind oft have no such factor"),
    ([LIST[0], {"name": "b", "adapters": {"kind": "miss", "rank": 4, "rs_alpha": 2}}],
     "phases.b.adapters.rs_alpha", "of the kind miss have no such factor"),
    ([LIST[0], {"name": "b", "adapters": {"kind": "loha", "rank": 4}}], "phases.b.adapters.kind",
     "a matrix of the size of the weight"),
    ([LIST[0], {**LORA, "adapters": {"rank": 4, "kind": "vera"}, "until": "1 step"},
      {"name": "c", "adapters": {"rank": 8, "from": "resize"}}], "phases.c.adapters.from", "cannot change theirs"),
    ([LIST[0], {"name": "b", "adapters": {"rank": 4, "rs_alpha": 8, "alpha_over_r": 2}}],
     "phases.b.adapters.rs_alpha", "sets the scaling by the rank"),
    ([LIST[0], {**LORA, "adapters": {"rank": 4, "rs_alpha": 8}, "until": "1 step"},
      {"name": "c", "adapters": {"rank": 8, "from": "resize"}}], "phases.c.adapters.from", "scales them by their rank"),
    ([LIST[0], {**LORA, "adapters": {"rank": 4, "kind": "vera"}, "lr_scale": {"a": 2}}], "phases.b.lr_scale.a",
     "has base, adapters, b, d"),
    ([LIST[0], {"name": "b", "adapters": {"rank": 4, "families": []}}], "phases.b.adapters.families", "once"),
    ([LIST[0], {"name": "b", "adapters": {"from": "keep"}}], "phases.b.adapters.from", "no adapters before"),
    ([LIST[0], {"name": "b", "adapters": {"from": "keep", "rank": 4}}], "phases.b.adapters.rank", "applies to new"),
    ([*LIST[:2], {"name": "c", "adapters": {"rank": 4}}], "phases.c.adapters.from", "would discard"),
    ([*LIST[:2], {"name": "c", "adapters": {"rank": 4, "from": "merg"}}], "phases.c.adapters.from", "'merge'"),
    ([LIST[0], {"name": "b", "adapters": {"rank": 4, "from": "resize"}}], "phases.b.adapters.from",
     "no adapters before"),
    ([*LIST[:2], {"name": "c", "adapters": {"rank": 4, "families": ["q"], "from": "resize"}}],
     "phases.c.adapters.families", "from: resize takes over"),
    ([LIST[0], {**LIST[1], "adapters": {"rank": 8, "options": {"train_a": False}}},
      {"name": "c", "adapters": {"rank": 4, "from": "resize"}}], "phases.c.adapters.from", "keeps its first value"),
    ([LIST[0], {"name": "b", "adapters": {"rank": 4, "from": "merge"}}], "phases.b.adapters.from",
     "no adapters before"),
    ([LIST[0], {"name": "b", "active": {**TOP, "k": 2}}], "phases.b.active", "there are none"),
    ([LIST[0], {**LORA, "active": {"choose": "top", "k": 2, "every": "5 steps"}}], "phases.b.active.choose", "'top_k'"),
    ([LIST[0], {**LORA, "active": TOP}], "phases.b.active.k", "either k or share"),
    ([LIST[0], {**LORA, "active": {**TOP, "k": 2, "share": 0.5}}], "phases.b.active.k", "either k or share"),
    ([LIST[0], {**LORA, "active": {**TOP, "share": 1.5}}], "phases.b.active.share", "less than or equal to 1"),
    ([LIST[0], {**LORA, "active": {**TOP, "choose": "threshold", "k": 2}}], "phases.b.active.k", "not used by"),
    ([LIST[0], {**LORA, "active": {**TOP, "choose": "threshold"}}], "phases.b.active.share", "needs share"),
    ([LIST[0], {**LORA, "active": {**TOP, "choose": "unconverged"}}], "phases.b.active.tau", "needs tau"),
    ([LIST[0], {**LORA, "active": {**TOP, "k": 2, "tau": 1.0}}], "phases.b.active.tau", "not used by the rule"),
    ([{**LIST[0], "until": "5 steps"}, {**LORA, "active": {**TOP, "choose": "unconverged", "tau": 1.0}}],
     "phases.b.active.choose", "no phase ends by a test"),
    ([LIST[0], {**LORA, "active": {**TOP, "share": 0}}], "phases.b.active.share", "greater than 0"),
    ([LIST[0], {**LORA, "active": {**TOP, "k": 2, "every": "1 step", "importance": "backward"}}],
     "phases.b.active.every", "too short"),
    ([LIST[0], {**LORA, "active": {**TOP, "k": 2, "once_at": "9 steps"}}], "phases.b.active.every", "either every"),
    ([LIST[0], {**LORA, "adapters": {"rank": 4, "dropout": 0.1}, "active": {**TOP, "k": 2}}],
     "phases.b.adapters.dropout", "no inactive"),
    ([LIST[0], {**LORA, "adapters": {"rank": 4, "mode": "peft"}, "active": {**TOP, "k": 2}}],
     "phases.b.adapters.mode", "no inactive"),
    ([LIST[0], {**LORA, "until": "1 step"}, {"name": "c", "adapters": {"from": "keep", "mode": "peft"},
                                             "until": "1 step"}, {"name": "d", "active": {**TOP, "k": 2}}],
     "phases.d.adapters.mode", "no inactive"),
    ([LIST[0], {"name": "b", "train": "rest", "merge": CYCLE}], "phases.b.merge", "there are none"),
    ([LIST[0], {**LORA, "train": "all", "merge": CYCLE}], "phases.b.train", "nothing to merge adapters into"),
    ([{**LORA, "train": "all", "merge": CYCLE}], "phases.b.train", "nothing to merge adapters into"),
    ([{**LORA, "adapters": {"rank": 4, "from": "merge"}}], "phases.b.adapters.from", "no adapters before"),
    ([LIST[0], {**LORA, "merge": {}}], "phases.b.merge.every", "is required"),
    ([LIST[0], {**LORA, "merge": {"every": "0 steps"}}], "phases.b.merge.every", "longer than 0"),
    ([LIST[0], {**LORA, "merge": {**CYCLE, "reset": {"rule": "magnitud"}}}], "phases.b.merge.reset.rule", "magnitude"),
    ([LIST[0], {**LORA, "merge": {**CYCLE, "reset": {"rule": "random", "share": 1.5}}}], "phases.b.merge.reset.share",
     "less than or equal to 1"),
    ([LIST[0], {**LORA, "merge": {**CYCLE, "reset": {"share": 0.5}}}], "phases.b.merge.reset.share", "rule zero"),
    ([*LIST[:2], {"name": "c", "adapters": "none"}], "phases.c.adapters", "would discard"),
    ([LIST[0], {"name": "b", "train": "adapters"}], "phases.b.train", "there are none"),
    ([LIST[0], {"name": "b", "train": 5}], "phases.b.train", "5, which is not a text"),
    ([LIST[0], {"name": "b", "train": ["head", None]}], "phases.b.train", "None, which is not a text"),
    ([LIST[0], {"name": "calibration"}], "phases.calibration.name", "is the former name of machine.calibration"),
    ([LIST[0], {"name": "b", "adapters": {"rank": 4, "families": ["q", "kk"]}}], "phases.b.adapters.families",
     "is not a family of this model"),
    ([LIST[0], {"name": "b", "train": []}], "phases.b.train", "at least one set of parameters"),
    ([LIST[0], {"name": "b", "train": "head("}], "phases.b.train", "neither one of all, adapters"),
    ([LIST[0], {"name": "b", "lr_scale": {"c": 2.0}}], "phases.b.lr_scale.c", "is not a role"),
    ([LIST[0], {"name": "b", "lr_scale": {"a": 2.0}}], "phases.b.lr_scale.a", "which has base"),
    ([*LIST[:2], {"name": "c", "lr_scale": {"c": 2.0}}], "phases.c.lr_scale.c", "which has base, adapters, a, b"),
    ([LIST[0], {"name": "b", "lr_scale": 0}], "phases.b.lr_scale", "greater than 0"),
    ([LIST[0], {"name": "b", "freeze_below": 2}], "phases.b.freeze_below", "layers 0 to 1"),
    ([LIST[0], {"name": "b", "until": {**TEST, "k": 1}}, {"name": "c"}], "phases.b.until.k", "greater than or equal"),
    ([LIST[0], {"name": "b", "until": "soon"}, {"name": "c"}], "phases.b.until", "'soon' is not a duration"),
    ([LIST[0], {"name": "b", "untill": "9 steps"}], "phases.b.untill", "unknown key"),
    ([LIST[0], {"name": "b", "zero_stage": 4}], "phases.b.zero_stage", "0, 1, 2, 3 or 'auto'"),
])
def test_what_cannot_work_is_refused_with_phase_and_key(phases: list[dict[str, Any]], key: str, problem: str) -> None:
    error = refused(*phases)
    assert error.key == key
    assert problem in error.problem


@pytest.mark.parametrize(("phase", "key", "remedy"), [
    ({"active": {**TOP, "choose": "treshold", "share": 0.5}}, "active.choose", "did you mean threshold?"),
    ({"active": {**TOP, "k": 2, "importance": "forwards"}}, "active.importance", "did you mean forward?"),
    ({"merge": {**CYCLE, "reset": {"rule": "magnitud"}}}, "merge.reset.rule", "did you mean magnitude?"),
    ({"adapters": {"ranks": {"rule": "perlora"}}}, "adapters.ranks.rule", "did you mean prelora?"),
    ({"adapters": {"rank": 4, "from": "merged"}}, "adapters.from", "did you mean merge?"),
    ({"until": {**TEST, "test": "prelore"}}, "until.test", "did you mean prelora?"),
    ({"until": {**TEST, "statistic": "means"}}, "until.statistic", "did you mean mean?"),
    ({"adapters": {"rank": 4, "from": "elsewhere"}}, "adapters.from", "choose one of them"),
    ({"zero_stage": 4}, "zero_stage", "choose one of them")])
def test_a_misspelt_choice_is_told_with_the_nearest_one(phase: dict[str, Any], key: str, remedy: str) -> None:
    error = refused(LIST[0], {**LORA, **phase}, {"name": "last"})
    assert (error.key, error.remedy) == (f"phases.b.{key}", remedy)


@pytest.mark.parametrize("when", ["every", "once_at"])
def test_adapters_are_not_chosen_in_compiled_blocks(when: str) -> None:
    active = {"choose": "top_k", "k": 2, when: "5 steps"}
    error = refused(LIST[0], {**LORA, "active": active}, model={**BASE["model"], "compile": True})
    assert (error.key, error.value) == ("phases.b.active", "top_k")
    assert error.remedy == "set model.compile=false, or remove active"
    method(LIST[0], {**LORA, "merge": CYCLE}, model={**BASE["model"], "compile": True})


@pytest.mark.parametrize(("options", "key", "said"), [
    ({"trian_a": False}, "trian_a", "is not an option of the kind lora; did you mean train_a?"),
    ({"rank": 8}, "rank", "is not an option of the kind lora; the kind lora has these options: train_a, init"),
    ({"train_a": "false"}, "train_a", "is not true or false; the default is true"),
    ({"train_a": 0}, "train_a", "is not true or false; the default is true")])
def test_an_option_is_one_of_its_kind_and_has_its_type(options: dict[str, Any], key: str, said: str) -> None:
    error = refused(LIST[0], {"name": "b", "adapters": {"rank": 4, "options": options}})
    assert error.key == f"phases.b.adapters.options.{key}"
    assert f"{error.problem}; {error.remedy}".replace(" (in r.yaml)", "") == said


def test_an_option_with_its_default_makes_no_difference() -> None:
    plain, default, fixed = (
        method(LIST[0], {"name": "b", "adapters": {"rank": 4, "options": options}}).specs()[1].adapters
        for options in ({}, {"train_a": True}, {"train_a": False}))
    assert plain == default != fixed


def test_parameters_of_the_preset_have_no_place_beside_a_list() -> None:
    assert refused(*LIST, convergence={"tau": 1.0, "zeta": 5.0}).key == "convergence"
    assert refused(*LIST, lora={"r_max": 32}).key == "lora"


@pytest.mark.parametrize(("sections", "key"), [
    ({"phases": {"preset": "prelora"}}, "convergence"), ({"lora": {"families": ["q", "kk"]}}, "lora.families"),
    ({"phases": {"preset": "full"}, "convergence": {"tau": 1.0, "zeta": 5.0}}, "convergence"),
    ({"phases": {"preset": "relora"}}, "phases.preset"), ({"phases": {"preset": "authors"}}, "convergence"),
    ({"phases": {"preset": "authors"}, "convergence": {"tau": 1.0, "zeta": 5.0, "joined": {"qk": ["q", "k"]}}},
     "convergence.joined"),
    ({"phases": {"preset": "authors"}, "convergence": {"tau": 1.0, "zeta": 5.0}, "lora": {"alpha_over_r": 4.0}},
     "lora.alpha_over_r"),
    ({"phases": {"preset": "authors"}, "convergence": {"tau": 1.0, "zeta": 5.0}, "lora": {"families": ["q"]}},
     "convergence.joined"),
    ({"convergence": {"tau": 1.0, "zeta": 5.0, "joined": {"out": ["o", "fc3"]}}}, "convergence.joined"),
    ({"convergence": {"tau": 1.0, "zeta": 5.0, "joined": {"q": ["o", "fc2"]}}}, "convergence.joined.q"),
    ({"convergence": {"tau": 1.0, "zeta": 5.0, "joined": {"out": []}}}, "convergence.joined.out"),
    ({"convergence": {"tau": 1.0, "zeta": 5.0, "joined": {"out": ["o", "o"]}}}, "convergence.joined"),
    ({"phases": {"low": {"zero_stage": 1}}}, "phases.low"),
    ({"phases": {"lora": {"train": "all"}}}, "phases.lora.train"),
    ({"phases": {"lora": {"active": {**TOP, "k": 2}}}}, "phases.lora.active"),
    ({"lora": {"active": {**TOP, "k": 2}}}, "lora.active"),
    ({"phases": {"lora": {"merge": CYCLE}}}, "phases.lora.merge"), ({"phases": "prelora"}, "phases")])
def test_a_preset_is_held_to_its_sections(sections: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate({**BASE, **sections}, "r.yaml")
    assert caught.value.key == key


def test_moments_are_kept_unless_a_later_phase_resets_them() -> None:
    first, *rest = LIST
    specs = method(first, {**rest[0], "moments": "reset"}, *rest[1:]).specs()
    assert [spec.resets_moments for spec in specs] == [False, True, False, False]
    with pytest.raises(ConfigError, match=r"has nothing to reset in the first phase") as caught:
        method({**first, "moments": "reset"}, *rest)
    assert caught.value.key == "phases.full.moments"


# ---- a resumed run

def test_a_resumed_run_keeps_its_method_and_may_run_its_phases_otherwise() -> None:
    before = method(*LIST).model_dump(mode="json")
    settings = method(*(phase | {"micro_batch_size": 8, "zero_stage": 2} for phase in LIST)).model_dump(mode="json")
    assert list(binding_differences(before, settings)) == []
    other = method(*LIST[:1], {**LIST[1], "adapters": {"rank": 8, "families": ["q", "v"]}}, *LIST[2:])
    changed = binding_differences(before, other.model_dump(mode="json"))
    assert [key for key, *_ in changed] == ["phases.low.adapters.rank"]
    bound = what_binds(before, settings)
    assert validate(bound, "r").phase_list[1].zero_stage == 2
    assert [phase["name"] for phase in bound["phases"]] == ["full", "low", "thaw", "last"]


def test_overrides_make_a_list_of_phases_of_a_preset(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(write_yaml({**BASE, "convergence": {"tau": 1.0, "zeta": 5.0}, "lora": {"r_max": 32}}))
    config = load_config(recipe, ["phases=[{name: all}]", "convergence=null", "lora=null"])
    assert [phase.name for phase in config.phase_list] == ["all"]


# ---- rules that give ranks

SPECTRA = {"every": "1 step", "spectra": True}

@pytest.mark.parametrize(("ranks", "rule"), [
    ({"rule": "prelora"}, PreloraRanks(8, 64)),
    ({"rule": "prelora", "changes": "signed", "r_max": 32}, PreloraRanks(8, 32, "signed")),
    ({"rule": "uniform", "rank": 5}, UniformRank(5)),
    ({"rule": "random", "r_min": 2}, RandomRanks(2, 64)),
    ({"rule": "random", "draw": "permuted"}, RandomRanks(8, 64, "permuted")),
    ({"rule": "stable_rank", "r_min": 3, "r_max": 50}, StableRanks(r_min=3, r_max=50)),
    ({"rule": "energy", "share": 0.9, "r_min": 0, "settled": 0.5},
     EnergyRanks(share=0.9, r_min=0, r_max=64, settled=0.5)),
])
def test_a_rule_is_named_with_its_parameters(ranks: dict[str, Any], rule: RankRule, tmp_path: Path) -> None:
    config = method({"name": "full", "until": TEST}, {"name": "low", "adapters": {"ranks": ranks}}, observe=SPECTRA)
    adapters = config.specs()[1].adapters
    assert adapters is not None and adapters.ranks == rule
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(("ranks", "key", "remedy"), [
    ({"rule": "ranbom"}, "rule", "did you mean random?"),
    ({"r_min": 4}, "rule", "set it to one of prelora, uniform, random, stable_rank, energy"),
    ({"rule": "uniform"}, "rank", "set phases.low.adapters.ranks.rank"),
    ({"rule": "uniform", "rnk": 4}, "rnk", "did you mean phases.low.adapters.ranks.rank?"),
    ({"rule": "random", "draw": "permutd"}, "draw", "did you mean permuted?"),
    ({"rule": "prelora", "changes": "sign"}, "changes", "did you mean signed?"),
    ({"rule": "random", "r_max": 48}, "r_max", "choose a different value for phases.low.adapters.ranks.r_max"),
    ({"rule": "energy", "share": 0.9, "r_max": 48}, "r_max",
     "choose a different value for phases.low.adapters.ranks.r_max"),
    ({"rule": "energy"}, "share", "set phases.low.adapters.ranks.share"),
    ({"rule": "energy", "share": 90.0}, "share", "choose a different value for phases.low.adapters.ranks.share"),
    ({"rule": "energy", "share": 0.9, "r_min": 0}, "settled", "set it in per cent, or r_min to at least 1"),
    ({"rule": "stable_rank", "settled": 0.5}, "settled", "set r_min to 0, or remove settled"),
    ({"rule": "stable_rank", "r_min": 70}, "r_min", "choose a different value for phases.low.adapters.ranks.r_min"),
    ({"rule": "stable_rank"}, "rule", "set observe.spectra=true"),
    ({"rule": "energy", "share": 0.9}, "rule", "set observe.spectra=true"),
    ("prelora", "", "write it as a mapping, for example {rule: prelora, r_min: 8, r_max: 64}"),
])
def test_a_bad_rule_is_refused_with_phase_key_and_remedy(ranks: Any, key: str, remedy: str) -> None:
    error = refused({"name": "full", "until": TEST}, {"name": "low", "adapters": {"ranks": ranks}})
    assert (error.key, error.remedy) == (f"phases.low.adapters.ranks.{key}".rstrip("."), remedy)


@pytest.mark.parametrize("ranks", [{"rule": "prelora"}, {"rule": "random", "draw": "permuted"}])
def test_a_rule_by_windows_is_refused_where_none_close(ranks: dict[str, Any]) -> None:
    error = refused({"name": "full", "until": "9 steps"}, {"name": "low", "adapters": {"ranks": ranks}})
    assert error.key == "phases.low.adapters.ranks.rule" and "no phase before this one closes any" in error.problem
    method({"name": "low", "adapters": {"ranks": {"rule": "random"}}})


def test_a_test_by_singular_values_needs_a_run_that_observes_them() -> None:
    full = {"name": "full", "until": {"test": "stable_rank", "tau": 1.0, "m": 2}}
    assert method(full, {"name": "rest"}, observe=SPECTRA).specs()[0].until == StableRankTest(1.0, 3, 2)
    error = refused(full, {"name": "rest"})
    assert (error.key, error.value) == ("phases.full.until", full["until"])
    assert error.remedy == "set observe.spectra=true"
    either = {"name": "full", "until": {"any": [full["until"], {"test": "fixed", "at": 0.5}]}}
    assert refused(either, {"name": "rest"}).key == "phases.full.until"


LEAVES_OUT = {"rule": "energy", "share": 0.9, "r_min": 0, "settled": 0.5}


@pytest.mark.parametrize(("low", "key", "said"), [
    ({"adapters": {"ranks": {**LEAVES_OUT, "every": "9 steps"}}}, "adapters.ranks.r_min", "(every: 9 steps)"),
    ({"adapters": {"ranks": LEAVES_OUT}, "active": {**TOP, "k": 2}}, "active.k", "leaves layers without one"),
])
def test_rank_0_is_refused_where_it_would_remove_adapters_or_leave_too_few(low: dict[str, Any], key: str,
                                                                           said: str) -> None:
    full = {"name": "full", "until": TEST}
    error = refused(full, {"name": "low", "train": ["adapters", "rest"], **low}, observe=SPECTRA)
    assert error.key == f"phases.low.{key}" and said in error.problem
    method(full, {"name": "low", "train": ["adapters", "rest"], "adapters": {"ranks": LEAVES_OUT},
                  "active": {"choose": "top_k", "share": 0.5, "every": "5 steps"}}, observe=SPECTRA)


def test_existing_adapters_do_not_get_rank_0() -> None:
    low = {"name": "low", "adapters": {"rank": 4}, "train": ["adapters", "rest"], "until": "9 steps"}
    resized = {"name": "again", "adapters": {"from": "resize", "ranks": LEAVES_OUT}, "train": ["adapters", "rest"]}
    error = refused({"name": "full", "until": TEST}, low, resized, observe=SPECTRA)
    assert (error.key, error.value) == ("phases.again.adapters.ranks.r_min", 0)
    merged = {**resized, "adapters": {"from": "merge", "ranks": LEAVES_OUT}}
    method({"name": "full", "until": TEST}, low, merged, observe=SPECTRA)


# ---- a further rule and a further test, by the recipes of CONTRIBUTING.md

@dataclass(frozen=True)
class FirstLayer:
    """A rule that needs no windows: one rank for the first layer, and 1 for all others."""

    first: int
    windows = 0
    needs = frozenset[str]()

    @property
    def highest(self) -> int:
        return self.first

    def __call__(self, families: Any, windows: Any, seed: int = 0) -> dict[str, dict[int, int]]:
        return {name: {layer: 1 if layer else self.first for layer in layers} for name, layers in families.items()}


class FirstLayerRule(RankRuleConfig):
    rule: Literal["first"]
    first: Positive = 8


@dataclass(frozen=True)
class LossBelow:
    """A test that passes when the loss of a window is below a limit."""

    limit: float
    title = "the limit"
    k = 1
    windowing = Windowing(2)
    needs = frozenset({"loss"})

    def __call__(self, windows: Sequence[WindowStats], progress: Progress) -> Verdict:
        return Verdict(windows[-1].loss < self.limit, "")


class LossUntil(SwitchTestConfig):
    test: Literal["loss"]
    limit: float


def extended(monkeypatch: pytest.MonkeyPatch) -> type[Config]:
    """The config with both, as if they were joined to the unions of the config."""
    monkeypatch.setitem(RANK_RULES, "first", FirstLayer)
    monkeypatch.setitem(SWITCH_TESTS, "loss", LossBelow)
    until = Annotated[
        Annotated[DurationField, Tag("as a duration")] | Annotated[
            Annotated[PreloraUntil, Tag("prelora")] | Annotated[LossUntil, Tag("loss")],
            chosen_by("test", ["prelora", "loss"], "a test", "")[0], Tag("as a test")],
        Discriminator(_kind_of_until)]
    adapters = create_model("Adapters", __base__=AdaptersConfig, ranks=(PreloraRule | FirstLayerRule | None, None))
    phase = create_model("Phase", __base__=PhaseConfig, adapters=(adapters | None, None),
                         until=(until | None, None))
    return create_model("Extended", __base__=Config, phases=(tuple[phase, ...], ...))  # type: ignore[valid-type]


def test_a_further_rule_and_a_further_test_need_only_their_two_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = extended(monkeypatch).model_validate({**BASE, "phases": [
        {"name": "a", "adapters": {"ranks": {"rule": "first", "first": 4}}, "until": {"test": "loss", "limit": 0.5}},
        {"name": "b", "until": TEST}, {"name": "c"}]})
    first, second, _ = config.specs()
    assert first.adapters is not None and first.adapters.ranks == FirstLayer(4)
    assert (first.until, second.until) == (LossBelow(0.5), PreloraTest(1.0, 5.0, 2, 2))
    assert config.model_validate(config.model_dump(mode="json")) == config


def test_a_rule_that_needs_windows_needs_a_test_whatever_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = extended(monkeypatch)
    phases = [{"name": "a", "until": {"test": "loss", "limit": 0.5}},
              {"name": "b", "adapters": {"ranks": {"rule": "prelora"}}}]
    assert len(model.model_validate({**BASE, "phases": phases}).specs()) == 2
    with pytest.raises(ValidationError, match="no phase before this one closes any"):
        model.model_validate({**BASE, "phases": [{**phases[0], "until": "2 steps"}, phases[1]]})


@pytest.mark.parametrize("change", [{"merge": CYCLE}, {"active": {**TOP, "k": 2}}, {"rewarm": "2 steps"},
                                    {"adapters": {"rank": 8}}, {"base": {"dtype": "nf4"}}])
def test_phases_that_train_otherwise_have_another_normal_form(change: dict[str, Any]) -> None:
    assert method(LIST[0], LORA).trained_phases() == method(LIST[0], {**LORA, "zero_stage": 1}).trained_phases()
    assert method(LIST[0], LORA).trained_phases() != method(LIST[0], {**LORA, **change}).trained_phases()


@pytest.mark.parametrize("kept", [[], [{"name": "kept", "adapters": {"from": "keep", "dropout": 0.2},
                                        "until": "9 steps"}]])
def test_adapters_with_other_ranks_are_otherwise_what_they_were(kept: list[dict[str, Any]]) -> None:
    adapters = {"rank": 4, "families": ["q"], "alpha_over_r": 2.0, "dropout": 0.1}
    first = {**LORA, "adapters": adapters, "until": "9 steps"}
    config = method(LIST[0], first, *kept, {"name": "c", "adapters": {"rank": 16, "from": "resize", "dropout": 0.0}})
    before, after = (spec.adapters for spec in config.specs() if spec.adapters is not None)
    assert after.resized and not before.resized
    assert (after.families, after.scaling, after.kind) == (before.families, before.scaling, before.kind)
    assert config.for_phase("c").adapters.dropout == 0.0


@pytest.mark.parametrize(("change", "key", "said"), [
    ({"merge": CYCLE}, "phases.low.adapters.ranks.every", "within a cycle"),
    ({"adapters": {"ranks": {"rule": "prelora", "every": "0 steps"}}}, "phases.low.adapters.ranks.every", "longer"),
    ({"adapters": {"ranks": {"rule": "prelora", "every": "9 steps"}, "options": {"train_a": False}}},
     "phases.low.adapters.ranks.every", "keeps its first value"),
    ({"adapters": {"ranks": {"rule": "uniform", "rank": 4, "every": "9 steps"}}}, "phases.low.adapters.ranks.every",
     "would choose the same ranks again"),
])
def test_ranks_that_cannot_be_chosen_again_are_refused(change: dict[str, Any], key: str, said: str) -> None:
    first = {"name": "full", "until": TEST}
    low = {"name": "low", "adapters": {"ranks": {"rule": "prelora", "every": "9 steps"}}, "train": ["adapters", "rest"]}
    error = refused(first, {**low, **change})
    assert error.key == key and said in error.problem


# ---- quantised weights

NF4 = {"base": {"dtype": "nf4"}}


@pytest.mark.parametrize(("change", "key", "said", "remedy"), [
    ({"train": "all"}, "base.dtype", "this phase trains them (train: all)", "train [adapters, rest]"),
    ({"adapters": None, "train": "rest"}, "base.dtype", "there are none in this phase", "attach adapters"),
    ({"adapters": {"rank": 4, "kind": "dora"}}, "base.dtype", "not possible with adapters of the kind dora",
     "choose the kind lora"),
    ({"adapters": {"rank": 4, "mode": "merged"}}, "adapters.mode", "which b.base.dtype nf4 replaces", "choose branch"),
    ({"adapters": {"rank": 4, "mode": "peft"}}, "adapters.mode", "computes with the weight itself", "choose branch"),
    ({"adapters": {"rank": 4, "dropout": 0.1}}, "adapters.dropout", "runs peft's code", "set it to 0"),
    ({"merge": CYCLE}, "merge", "adds to the weights while the phase lasts", "remove one of the two"),
    ({"adapters": {"ranks": {"rule": "prelora", "every": "5 steps"}}}, "adapters.ranks.every", "adds to the weights",
     "remove one of the two"),
    ({"base": {}}, "base.dtype", "is required", ""),
    ({"base": {"dtype": "int4"}}, "base.dtype", "must be 'int8' or 'nf4'", "did you mean int8?"),
    ({"base": {"dtype": "nf4", "max_output_change": 0}}, "base.max_output_change", "greater than 0", ""),
])
def test_weights_that_cannot_be_quantised_are_refused_with_phase_key_value_and_remedy(
        change: dict[str, Any], key: str, said: str, remedy: str) -> None:
    first = {**LIST[0], "until": TEST}
    error = refused(first, {**LORA, **NF4, **change})
    assert error.key == f"phases.b.{key}"
    assert said in error.problem and remedy in str(error.remedy)


def test_a_phase_with_quantised_weights_computes_in_branches() -> None:
    config = method(LIST[0], {**LORA, **NF4, "until": "1 step"}, {"name": "c", "train": ["adapters", "rest"]})
    assert [spec.base_dtype for spec in config.specs()] == ["bf16", "nf4", "bf16"]  # it is a setting of one phase
    assert [config.for_phase(name).kernel() for name in ("b", "c")] == ["branch", "merged"]


def test_quantised_weights_have_no_place_in_deepspeed_s_format() -> None:
    error = refused(LIST[0], {**LORA, **NF4}, checkpoint={"deepspeed_format": True})
    assert error.key == "phases.b.base.dtype" and "DeepSpeed's own format" in error.problem
