"""`phases.*.until`: the tests that a recipe can select, alone and together, and what is refused."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from prelora_ds.config.documents import write_yaml
from prelora_ds.config.load import dump_yaml, load_config, validate
from prelora_ds.config.named_tests import changed_test, make_test, name_of, parameters_of, parse_parameters
from prelora_ds.config.tree import Config
from prelora_ds.core.switch_tests import SWITCH_TESTS, SwitchTest
from prelora_ds.core.switch_tests.budget import BudgetTest
from prelora_ds.core.switch_tests.combined import AllOf, AnyOf
from prelora_ds.core.switch_tests.fixed import FixedTest
from prelora_ds.core.switch_tests.prelora import PreloraTest
from prelora_ds.core.switch_tests.t_test import LossTTest
from prelora_ds.errors import ConfigError

BASE: dict[str, Any] = {
    "run": {"name": "r", "output_dir": "o"}, "data": {"train": "t", "val": "v"},
    "model": {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "intermediate_size": 64},
    "train": {"duration": "20 steps", "global_batch_size": 64, "micro_batch_size": 16},
}
PRELORA = {"test": "prelora", "tau": 1.0, "zeta": 5.0}
T_TEST = {"test": "t_test", "m": 3}
FIXED = {"test": "fixed", "at": 0.5}
LORA = {"name": "lora", "adapters": {"rank": 4}, "train": ["adapters", "rest"]}
BY_RULE = {**LORA, "adapters": {"ranks": {"rule": "prelora"}}}


def method(until: Any, last: dict[str, Any] = LORA, **sections: Any) -> Config:
    phases = [{"name": "full", "until": deepcopy(until)}, deepcopy(last)]
    return validate({**BASE, "phases": phases, **sections}, "r.yaml")


@pytest.mark.parametrize(("until", "test"), [
    ({**PRELORA, "strict": True, "windows": "sliding"}, PreloraTest(1.0, 5.0, strict=True, windows="sliding")),
    ({"test": "t_test"}, LossTTest(0.05, 2, 10)),
    ({"test": "t_test", "alpha": 0.01, "k": 3, "m": 5}, LossTTest(0.01, 3, 5)),
    (FIXED, FixedTest(0.5)), ({**FIXED, "m": 2}, FixedTest(0.5, 2)),
    ({"test": "budget", "share": 0.4}, BudgetTest(share=0.4)),
    ({"test": "budget", "flops": 1e18, "m": 2}, BudgetTest(flops=1e18, m=2)),
    ({"any": [PRELORA, T_TEST, FIXED]}, AnyOf((PreloraTest(1.0, 5.0), LossTTest(m=3), FixedTest(0.5)))),
    ({"all": [FIXED, {"test": "budget", "share": 1}]}, AllOf((FixedTest(0.5), BudgetTest(share=1.0)))),
])
def test_every_test_is_read_and_written(until: dict[str, Any], test: SwitchTest, tmp_path: Path) -> None:
    config = method(until)
    assert config.specs()[0].until == test
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    assert load_config(path) == config
    assert config.trained_phases()[0]["until"] == config.phase_list[0].until.model_dump(mode="json")  # type: ignore[union-attr]


def test_the_preset_has_the_options_of_algorithm_1() -> None:
    config = validate({**BASE, "convergence": {"tau": 1.0, "zeta": 5.0, "strict": True, "windows": "sliding"}}, "r")
    assert config.specs()[0].until == PreloraTest(1.0, 5.0, strict=True, windows="sliding")


def test_ranks_by_a_rule_need_a_test_that_makes_windows() -> None:
    for until in (PRELORA, T_TEST, {**FIXED, "m": 2}, {"any": [FIXED, T_TEST]}):
        assert method(until, BY_RULE).specs()[1].adapters is not None
    for until in (FIXED, {"test": "budget", "share": 0.4}, {"all": [FIXED, FIXED]}):
        with pytest.raises(ConfigError, match="no phase before this one closes any") as caught:
            method(until, BY_RULE)
        assert caught.value.key == "phases.lora.adapters.ranks.rule"


@pytest.mark.parametrize(("until", "key", "said", "remedy"), [
    ({"test": "t_tset"}, "until.test", "is not a test; known are prelora, t_test, fixed", "did you mean t_test?"),
    ({"test": "zzz"}, "until.test", "is not a test", "choose one of them"),
    ({"test": 3}, "until.test", "is not a test", "choose one of them"),
    ({"tau": 1.0}, "until.test", "is required", "set it to one of prelora, t_test, fixed, budget"),
    ({"any": [FIXED, {"test": "perlora"}]}, "until.any.1.test", "is not a test", "did you mean prelora?"),
    ({"all": [FIXED, "5 steps"]}, "until.all.1", "is not a test", "write it as a mapping"),
    ({"any": [FIXED, {**T_TEST, "alpha": 2.0}]}, "until.any.1.alpha", "less than 1", "choose a different value"),
    ({"test": "fixed"}, "until.at", "is required", "set phases.full.until.at"),
    ({"test": "fixed", "at": 1.0}, "until.at", "less than 1", "choose a different value"),
    ({"test": "fixed", "at": "half"}, "until.at", "number", "set it to a number"),
    ({**FIXED, "alpha": 0.1}, "until.alpha", "unknown key", "valid keys: test, m, at"),
    ({**T_TEST, "alhpa": 0.1}, "until.alhpa", "unknown key", "did you mean phases.full.until.alpha?"),
    ({**PRELORA, "windows": "slidding"}, "until.windows", "must be", "did you mean sliding?"),
    ({**T_TEST, "m": 1}, "until.m", "greater than or equal to 2", "choose a different value"),
    ({"test": "budget"}, "until.share", "set either share or flops", "set one of them"),
    ({"test": "budget", "share": 0.4, "flops": 1e9}, "until.share", "set either share or flops", "set one of them"),
    ({"any": [FIXED]}, "until.any", "fewer than two", "write a single test without it"),
    ({"any": [FIXED, FIXED], "all": [FIXED, FIXED]}, "until.all", "does not go with the other keys", "remove"),
    ({"any": [FIXED, FIXED], "test": "fixed"}, "until.test", "does not go with the other keys", "remove"),
    ({"any": [PRELORA, {"test": "t_test"}]}, "until.any",
     "prelora has m 3, statistic mean and disjoint windows; t_test has m 10", "set the same m"),
    ({"all": [{**PRELORA, "windows": "sliding"}, T_TEST]}, "until.all", "sliding windows; t_test", "windows: disjoint"),
])
def test_what_is_refused_names_phase_key_and_remedy(until: Any, key: str, said: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        method(until)
    error = caught.value
    assert (error.key, said in error.problem, remedy in error.remedy) == (f"phases.full.{key}", True, True), error


def test_a_budget_needs_costs_that_do_not_depend_on_what_is_measured() -> None:
    budget = {"test": "budget", "share": 0.4}
    dyna = {**LORA, "active": {"choose": "top_k", "k": 2, "every": "5 steps"}}
    phases = [{"name": "full", "until": "5 steps"}, {**dyna, "until": budget}, {"name": "last"}]
    with pytest.raises(ConfigError, match=r"depend on the adapters that are chosen \(lora.active\)") as caught:
        validate({**BASE, "phases": phases}, "r")
    assert caught.value.key == "phases.lora.until"
    assert method(budget, dyna), "a phase before that one may end by a budget"
    model = {"factory": "some.module:make", "families": {"q": r"blocks\.(?P<layer>\d+)\.q"}}
    for until in (budget, {"any": [FIXED, budget]}):
        with pytest.raises(ConfigError, match="only known for the built-in ViT"):
            method(until, {"name": "lora", "adapters": {"rank": 2, "families": ["q"]}}, model=model)


def test_an_override_sets_a_parameter_or_replaces_the_test(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(write_yaml({**BASE, "phases": [{"name": "full", "until": PRELORA}, LORA]}))
    assert load_config(recipe, ["phases.full.until.strict=true"]).specs()[0].until == PreloraTest(1.0, 5.0, strict=True)
    replaced = ["phases.full.until=null", "phases.full.until={test: fixed, at: 0.25}"]
    assert load_config(recipe, replaced).specs()[0].until == FixedTest(0.25)


# ---- by name

def test_a_test_is_made_of_its_name_and_parameters() -> None:
    made = {"prelora": make_test("prelora", {"tau": 1, "zeta": 5.0}), "t_test": make_test("t_test", {}),
            "fixed": make_test("fixed", {"at": 0.5}), "budget": make_test("budget", {"share": 0.5}),
            "stable_rank": make_test("stable_rank", {"tau": 1.0})}
    assert made.keys() == SWITCH_TESTS.keys() and made["prelora"] == PreloraTest(1.0, 5.0)
    for name, test in made.items():
        assert name_of(test) == name and make_test(name, parameters_of(test)) == test
    assert changed_test(made["fixed"], {"at": 0.25, "alpha": 0.1}) == FixedTest(0.25)


@pytest.mark.parametrize(("name", "parameters", "key", "said", "remedy"), [
    ("t_tset", {}, "--test", "is not a test", "did you mean t_test?"),
    ("fixed", {}, "--set at", "is required by the test fixed", "--set at=VALUE"),
    ("fixed", {"att": 0.5}, "--set att", "is not a parameter of the test fixed, which has m, at", "did you mean at?"),
    ("fixed", {"at": "half"}, "--set at", "must be a valid number", "choose a different value"),
    ("t_test", {"alpha": 7.0}, "--set alpha", "must be less than 1", "choose a different value"),
    ("budget", {}, "--set share", "set either share or flops", "choose a different value"),
])
def test_bad_parameters_name_their_option(name: str, parameters: dict[str, Any], key: str, said: str,
                                          remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_test(name, parameters)
    assert (caught.value.key, said in caught.value.problem, remedy in caught.value.remedy) == (key, True, True), \
        caught.value


def test_parameters_are_read_as_yaml_reads_them() -> None:
    assert parse_parameters(["alpha=0.01,0.05", "m=5", "strict=true,false", "windows=sliding"], {"k": (3,)}) == {
        "k": (3,), "alpha": (0.01, 0.05), "m": (5,), "strict": (True, False), "windows": ("sliding",)}
    for wrong in (["alpha"], ["=5"], ["alpha="], ["alpha=1,,2"], ["m=007"], ["m=1", "m=2"], ["k=2"]):
        with pytest.raises(ConfigError) as caught:
            parse_parameters(wrong, {"k": (3,)})
        assert caught.value.key == "--set"
