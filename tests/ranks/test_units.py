"""Blocks that ZeRO-3 gathers and reduces as units (`build.units_of`) train bitwise as blocks in parts do."""

from __future__ import annotations

import pytest
from support.plans import lora_plan
from support.runs import SMALL, Trainer, config, same

import prelora_ds.engine.build
from prelora_ds.engine.build import units_of

CHECKPOINTED = {"model": {**SMALL, "activation_checkpointing": True}}


@pytest.mark.parametrize(("zero", "lora", "sections", "units"), [
    ("zero3", {}, {"micro": 2}, 3),
    ("zero3", {"train_rest": False}, {}, 2),
    ("zero3", {"freeze_below": 1}, CHECKPOINTED, 1),
    ("zero3_offload", {"train_rest": False}, {"micro": 2}, 2),
])
def test_units_change_no_bit(ranks, zero, lora, sections, units):
    ranks.run(in_both_ways, zero=zero, lora=lora, sections=sections, units=units)


def in_both_ways(zero, lora, sections, units):
    runs = []
    for in_units in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if not in_units:
                patch.setattr(prelora_ds.engine.build, "units_of", lambda *_: [])
            t = Trainer(config(zero, **sections))
            losses = t.train(2)
            last = lora_plan(t.layout, t.warmup, **lora)
            for plan in (t.warmup, last):
                t.switch(plan)
                losses += t.train(3)
        assert len(units_of(t.full, t.layout, t.cfg)) == 3 and len(units_of(last, t.layout, t.cfg)) == units
        runs.append((losses, t.outputs(), t.whole_state()))
        t.close()
    assert runs[0][0] == runs[1][0] and runs[0][1].equal(runs[1][1]) and same(runs[0][2], runs[1][2]) == []


def test_a_phase_without_active_cannot_choose_what_trains_in_units(ranks):
    ranks.run(refused)


def refused():
    t = Trainer(config("zero3"), begin="lora")
    with pytest.raises(ValueError, match="phase lora has no `active` in the recipe"):
        t.engine.set_active(sorted(t.lora.trainable)[:5])
    assert t.engine.plan == t.lora
    t.engine.set_active(t.lora.trainable)
    t.train(1)
    t.close()
