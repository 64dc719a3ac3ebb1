"""The recipes of a method: the one for ViT-L and its twin on the digits are the same method."""

from __future__ import annotations

from pathlib import Path

import pytest

from prelora_ds.config.load import load_config
from prelora_ds.config.tree import Config
from prelora_ds.core.duration import Duration
from prelora_ds.core.phases import Adapters, PhaseSpec
from prelora_ds.core.rank_rules.uniform import UniformRank
from prelora_ds.core.switch_tests.prelora import PreloraTest

RECIPES = Path(__file__).resolve().parents[3] / "launch" / "recipes"
METHODS = ["static_lora", "relora", "prelora_relora", "dynalora", "prelora_w5", "prelora_w15", "prelora_authors",
           "dora", "dynavera", "qlora"]
PAIRS = {"digits_full": "vit_large_in1k"} | {f"digits_{name}": f"vit_large_in1k_{name}" for name in METHODS}
WIDTH = 16  # ViT-L's width / that of the digits recipes


def recipe(name: str) -> Config:
    return load_config(RECIPES / f"{name}.yaml")


def shape(spec: PhaseSpec) -> tuple[object, ...]:
    """What makes a phase the same in both recipes: everything but durations, ranks and numbers of adapters."""
    until = "duration" if isinstance(spec.until, Duration) else None
    if until is None and spec.until is not None:
        until = f"{spec.until.title} {spec.until.tau} {spec.until.zeta} {spec.until.k}"
    adapters = spec.adapters and (spec.adapters.kind, type(spec.adapters.ranks))
    active = spec.selection and (spec.selection.choose, spec.selection.every, spec.selection.importance)
    return (spec.name, spec.train, until, adapters, spec.merge and spec.merge.reset, spec.lr_scale, active,
            spec.base_dtype, spec.rewarm is None, spec.merge is None or spec.merge.rewarm is None)


@pytest.mark.parametrize("name", PAIRS)
def test_a_twin_walks_through_the_phases_of_its_recipe(name: str) -> None:
    twin, large = recipe(name), recipe(PAIRS[name])
    assert [shape(spec) for spec in twin.specs()] == [shape(spec) for spec in large.specs()]
    assert large.model.hidden_size == WIDTH * twin.model.hidden_size
    for small, big in zip(twin.specs(), large.specs(), strict=True):
        if small.adapters is not None and big.adapters is not None:
            assert big.adapters.ranks.highest == WIDTH * small.adapters.ranks.highest
        if small.selection is not None and big.selection is not None:
            k, of = small.selection.k, big.selection.k
            assert k is not None and of is not None
            assert k * large.model.num_hidden_layers == of * twin.model.num_hidden_layers


def test_every_recipe_for_the_digits_has_a_twin() -> None:
    names = {path.stem for path in RECIPES.glob("digits_*.yaml")}
    assert names - {"digits_demo"} == set(PAIRS)


def test_the_twins_differ_only_in_their_method() -> None:
    full = recipe("digits_full")
    for name in PAIRS:
        twin = recipe(name)
        for section in ("model", "data", "optimizer", "train", "observe", "checkpoint"):
            assert getattr(twin, section) == getattr(full, section), name


def test_the_authors_run_is_exp1_but_for_what_their_code_does() -> None:
    exp1, found = recipe("vit_large_in1k_prelora_exp1"), recipe("vit_large_in1k_prelora_authors")
    same = {"run": exp1.run, "phases": exp1.phases}
    assert found.model_copy(update=same) == exp1
    test, (_, warmup, lora) = found.specs()[0].until, found.specs()
    assert test == PreloraTest(1.0, 5.0, 3, 3, "last", "mean_of_layers", True, "sliding", {"output": ("o", "fc2")})
    assert warmup.adapters == Adapters("lora", ("q", "k", "v", "o", "fc1", "fc2"), UniformRank(64), 2.0)
    assert (warmup.rewarm, lora.rewarm, lora.train) == (Duration("100 steps"), None, ("adapters", "rest"))


@pytest.mark.parametrize("w", [5, 15])
def test_the_warm_ups_differ_from_exp1_only_in_their_length(w: int) -> None:
    exp1 = recipe("vit_large_in1k_prelora_exp1")
    found = recipe(f"vit_large_in1k_prelora_w{w}")
    assert found.lora.warmup == Duration(f"{w} epochs")
    assert found.model_copy(update={"run": exp1.run, "lora": exp1.lora}) == exp1
    assert found.lora.model_copy(update={"warmup": exp1.lora.warmup}) == exp1.lora
