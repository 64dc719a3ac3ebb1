"""Blocks that ZeRO-3 gathers and reduces as units (`build.units_of`) train bitwise as blocks in parts do."""

from __future__ import annotations

import pytest
import torch
from deepspeed.utils import get_z3_leaf_modules
from support.plans import lora_plan
from support.runs import LABELS, SMALL, Trainer, config, same

import prelora_ds.engine.build
from prelora_ds.engine.build import units_of
from prelora_ds.model.vit import build_model

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
            assert len(get_z3_leaf_modules(t.engine.module)) == 3 * in_units
            losses = t.train(2)
            for plan in (t.warmup, lora_plan(t.layout, t.warmup, **lora)):
                t.switch(plan)
                losses += t.train(3)
        assert len(get_z3_leaf_modules(t.engine.module)) == units * in_units
        runs.append((losses, t.outputs(), t.whole_state()))
        t.close()
    assert runs[0][0] == runs[1][0] and runs[0][1].equal(runs[1][1]) and same(runs[0][2], runs[1][2]) == []


def test_only_our_vit_and_compiled_blocks_are_units(ranks):
    ranks.run(of_models)


def of_models():
    t = Trainer(config("zero3"))
    blocks = [prefix.removesuffix(".") for prefix in t.layout.blocks]
    compiled = config("zero3", model={**SMALL, "compile": True})
    assert units_of(build_model(t.cfg.model, LABELS), t.full, t.layout, t.cfg) == blocks
    assert units_of(Wrapped(), t.full, t.layout, t.cfg) == []
    assert units_of(Wrapped(), t.full, t.layout, compiled) == blocks
    t.close()


class Wrapped(torch.nn.Module):
    """Some other model."""


def test_a_phase_without_active_cannot_choose_what_trains_in_units(ranks):
    ranks.run(refused)


def refused():
    t = Trainer(config("zero3"), begin="lora")
    with pytest.raises(ValueError, match="phase lora: at ZeRO stage 3 only a phase with `active` can choose"):
        t.engine.set_active(sorted(t.lora.trainable)[:5])
    assert t.engine.plan == t.lora
    t.engine.set_active(t.lora.trainable)
    t.train(1)
    t.close()
