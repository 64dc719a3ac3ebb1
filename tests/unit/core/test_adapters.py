"""The pure halves of the kinds of adapters, and what docs/methods.md says that they can do."""

from __future__ import annotations

from pathlib import Path

import pytest

from prelora_ds.config.kinds_tables import with_tables
from prelora_ds.core.adapters import KINDS, AdapterSpec, Lora, Needs, kind_of

METHODS = Path(__file__).parents[3] / "docs/methods.md"
ALL = frozenset({Lora.A, Lora.B})


def test_the_tables_of_kinds_in_the_docs_are_what_the_kinds_say() -> None:
    page = METHODS.read_text(encoding="utf-8")
    assert page == with_tables(page), "run `make docs`"


def test_an_unknown_kind_is_told_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match="'boft' is not a kind of adapter; known are lora, dora, vera"):
        kind_of(AdapterSpec("boft", 4, 1.0, 0))


def test_lora_has_two_factors_and_may_leave_one_at_its_first_value() -> None:
    spec = AdapterSpec("lora", 4, 1.0, 0)
    assert KINDS["lora"].parameters((16, 8), spec) == {Lora.A: (4, 8), Lora.B: (16, 4)}
    assert KINDS["lora"].trains(spec) == ALL
    assert KINDS["lora"].trains(AdapterSpec("lora", 4, 1.0, 0, {"train_a": False})) == {Lora.B}


@pytest.mark.parametrize(("needs", "forward", "backward", "keeps"), [
    (Needs(x=True, leaves=ALL, folded=False), 2, 4, True), (Needs(x=False, leaves=ALL, folded=False), 2, 3, True),
    (Needs(x=True, leaves=frozenset({Lora.B}), folded=False), 2, 3, False),
    (Needs(x=True, leaves=ALL, folded=True), 0, 4, True),
    (Needs(x=True, leaves=frozenset(), folded=False), 2, 2, False),
    (Needs(x=False, leaves=frozenset(), folded=False), 2, 0, False)])
def test_lora_costs_as_many_skinny_products_as_it_computes(needs: Needs, forward: int, backward: int,
                                                           keeps: bool) -> None:
    """With as many inputs as outputs, all products have the same cost."""
    one = 2 * 4 * 10 * 8
    cost = KINDS["lora"].cost(AdapterSpec("lora", 4, 1.0, 0), 10, 8, 8, needs)
    assert (cost.forward_flops, cost.backward_flops, cost.keeps_input) == (forward * one, backward * one, keeps)
