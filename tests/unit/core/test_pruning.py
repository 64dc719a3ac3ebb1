"""When components of adapters are pruned, how many remain, and which; compared with peft's AdaLoRA."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from prelora_ds.core.adapters import AdaLora, OptionError
from prelora_ds.core.duration import Duration
from prelora_ds.core.pruning import Cut, Pruning, largest
from prelora_ds.core.schedule import Timeline

TIMELINE = Timeline(100, 16, Duration("1000 steps"))
COMPONENTS = 12 * 12


def pruning(**options: str | float) -> Pruning:
    return AdaLora().pruning({"begin": "100 steps", "end": "300 steps", "every": "10 steps", **options})


def cuts(rule: Pruning, *, since: int = 0, skipped: frozenset[int] = frozenset()) -> dict[int, Cut]:
    """Step -> what it prunes, in a run in which the updates of the steps ``skipped`` are not made."""
    found, last = {}, 0
    for step in range(since + 1, TIMELINE.total_steps + 1):
        found[step] = rule.cut(TIMELINE, COMPONENTS, since=since, last=last, step=step)
        if found[step].keep is not None and step not in skipped:
            last = step
    return found


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_as_many_components_remain_as_with_peft(share: float) -> None:
    model = nn.ModuleDict({f"p{i}": nn.ModuleDict({"lora_A": nn.ParameterDict({"default": torch.zeros(12, 2)})})
                           for i in range(12)})
    config = AdaLoraConfig(init_r=12, target_r=int(12 * share), tinit=100, tfinal=700, deltaT=10, total_step=1000)
    peft = RankAllocator(model, config, "default")
    found = cuts(pruning(share=share))
    for step in range(1, 300):
        budget, prunes = peft.budget_schedule(step)
        assert found[step] == Cut(budget if prunes else None), step
    assert found[300] == Cut(round(share * COMPONENTS))  # peft prunes by force then
    assert all(found[step] == Cut(final=True) for step in range(301, 1001))


def test_times_are_counted_from_the_step_after_which_the_adapters_were_attached() -> None:
    first = cuts(pruning())
    assert cuts(pruning(), since=50) == {step + 50: cut for step, cut in first.items() if step <= 950}
    assert cuts(pruning(begin="10 %", end="30 %")) == first


def test_pruning_ends_where_the_run_ends_and_where_its_period_does_not() -> None:
    assert cuts(pruning(every="70 steps"))[300] == Cut(COMPONENTS // 2)
    late = cuts(pruning(), since=800)
    assert late[1000] == Cut(COMPONENTS // 2) and late[990].keep is not None
    assert not any(cut.keep for cut in cuts(pruning(), since=950).values()), "the run ends before pruning begins"


def test_a_final_cut_whose_update_was_skipped_is_made_later() -> None:
    found = cuts(pruning(), skipped=frozenset({200, 300, 301}))
    assert [found[step].keep for step in (300, 301, 302)] == [COMPONENTS // 2] * 3
    assert found[201] == Cut() and found[303] == Cut(final=True)


@given(st.lists(st.floats(0, 1), min_size=1), st.data())
def test_the_largest_scores_remain_and_of_equal_ones_the_first(scores: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(scores)))
    kept = largest(scores, count)
    assert len(kept) == count
    for i in kept:
        for j in set(range(len(scores))) - kept:
            assert (scores[i], -i) > (scores[j], -j)


@pytest.mark.parametrize(("options", "name"), [
    ({"share": 0.0}, "share"), ({"share": 1.5}, "share"), ({"beta1": 1.0}, "beta1"), ({"beta2": -0.1}, "beta2"),
    ({"orthogonality": -1.0}, "orthogonality"), ({"begin": "soon"}, "begin"), ({"begin": "300 steps"}, "end"),
    ({"end": "0 %"}, "end"), ({"every": "0 steps"}, "every")])
def test_an_option_that_is_not_possible_is_named(options: dict[str, str | float], name: str) -> None:
    with pytest.raises(OptionError) as caught:
        pruning(**options)
    assert caught.value.option == name
