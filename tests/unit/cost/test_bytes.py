from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.plans import full_plan, lora_plan, warmup_plan

from prelora_ds.config.tree import ZeroSettings
from prelora_ds.core.codec import to_json
from prelora_ds.core.layout import Layout
from prelora_ds.cost.bytes import Bytes, bucket_elements, predict_bytes, worst_deviation

# 2048 + 64 + 40 = 2152 elements; an adapter of rank 4 adds 4 * 32 + 64 * 4 = 384.
LAYOUT = Layout({"a.weight": (64, 32), "a.bias": (64,), "embed": (10, 4)}, {"x": {0: "a"}})
FULL = full_plan(LAYOUT)
WARMUP = warmup_plan(LAYOUT, {"x": {0: 4}})
LORA = lora_plan(LAYOUT, WARMUP)
PARTLY = replace(LORA, active=frozenset({"a.lora_B.weight", "embed"}))  # 256 + 40 of 424 elements train
BARE_LORA = lora_plan(LAYOUT, WARMUP, train_rest=False)
ZERO3 = {"reduce_bucket_size": 1000, "persistence_threshold": 64}


def predicted(plan, zero: ZeroSettings, world: int = 2, after: bool = True) -> Bytes:
    return predict_bytes(plan, LAYOUT, zero, world, after_backward=after)


@pytest.mark.parametrize(("zero", "after", "expected"), [
    # weights 2n; gradients; masters 4n; moments 8n; buffers. n = 2152, two ranks.
    (ZeroSettings(0), False, Bytes(4304, 0, 8608, 17216, 0)),
    (ZeroSettings(0), True, Bytes(4304, 4304, 8608, 17216, 0)),
    (ZeroSettings(1), False, Bytes(4304, 8608, 4304, 8608, 0)),
    (ZeroSettings(1), True, Bytes(4304, 12912, 4304, 8608, 0)),
    (ZeroSettings(2), False, Bytes(4304, 0, 4304, 8608, 0)),
    (ZeroSettings(2), True, Bytes(4304, 4304, 4304, 8608, 0)),
    # Staging: half of the parameters in BF16, and the largest one twice.
    (ZeroSettings(2, offload_optimizer=True), False, Bytes(4304, 4304, 4304, 8608, 2152 + 8192)),
    (ZeroSettings(2, offload_optimizer=True), True, Bytes(4304, 8608, 4304, 8608, 2152 + 8192)),
    # Bias (64 elements, the threshold) and embedding (40) are kept whole; the bucket holds 1000 elements in fp32.
    (ZeroSettings(3, **ZERO3), False, Bytes(2152 + 208, 4304, 4304, 8608, 4000)),
    (ZeroSettings(3, **ZERO3), True, Bytes(2152 + 208, 4304, 4304, 8608, 4000)),
    (ZeroSettings(3, offload_optimizer=True, **ZERO3), False, Bytes(2152 + 208, 8608, 4304, 8608, 4000)),
    (ZeroSettings(3, offload_optimizer=True, **ZERO3), True, Bytes(2152 + 208, 8608, 4304, 8608, 4000)),
    # By default every one of these small parameters is kept whole, and one bucket holds all gradients.
    (ZeroSettings(3), True, Bytes(2152 + 4304, 4304, 4304, 8608, 8608)),
])
def test_bytes_of_the_full_phase_on_two_ranks(zero: ZeroSettings, after: bool, expected: Bytes) -> None:
    assert predicted(FULL, zero, 2, after) == expected


@pytest.mark.parametrize(("shapes", "expected"), [
    ([(1000, 1000), (40,)], 1000040),  # all of less than the smallest bucket
    ([(1024, 1024), (40,)], 1024 * 1024),
    ([(1000, 1000)] * 24, 3000000),
    ([(1000, 1000)] * 24 + [(1,)], 3000001),
    ([(1000, 1000)] * 8 + [(4000, 1000)], 4000000),  # the largest parameter
])
def test_gradients_have_eight_buckets_that_are_neither_small_nor_smaller_than_a_parameter(
        shapes: list[tuple[int, ...]], expected: int) -> None:
    layout = Layout({f"{number}.weight": shape for number, shape in enumerate(shapes)}, {})
    plan, total = full_plan(layout), sum(map(math.prod, shapes))
    assert bucket_elements(plan, layout, ZeroSettings(2)) == expected
    assert bucket_elements(plan, layout, ZeroSettings(3, reduce_bucket_size=7)) == 7
    assert bucket_elements(plan, layout, ZeroSettings(3, reduce_bucket_size=10**9)) == total


@pytest.mark.parametrize(("zero", "expected"), [
    # n = 2536, t = 384 + 40 = 424.
    (ZeroSettings(0), Bytes(5072, 848, 1696, 3392, 0)),
    (ZeroSettings(1), Bytes(5072, 2544, 848, 1696, 0)),
    (ZeroSettings(2), Bytes(5072, 848, 848, 1696, 0)),
    # The largest parameter that trains is lora_B with 256 elements.
    (ZeroSettings(2, offload_optimizer=True), Bytes(5072, 1696, 848, 1696, 424 + 1024)),
    (ZeroSettings(3, **ZERO3), Bytes(2536 + 208, 848, 848, 1696, 1696)),
])
def test_bytes_of_the_lora_phase_on_two_ranks(zero: ZeroSettings, expected: Bytes) -> None:
    assert predicted(LORA, zero) == expected


@pytest.mark.parametrize(("zero", "gradients"), [
    (ZeroSettings(0), 2 * 296), (ZeroSettings(1), 4 * 424 + 2 * 296), (ZeroSettings(2), 4 * 424 // 2),
    (ZeroSettings(2, offload_optimizer=True), 8 * 424 // 2),
    # Stage 3 fills the gaps with zeros in BF16, but not with offload.
    (ZeroSettings(3, **ZERO3), 4 * 424 // 2 + 2 * 128 // 2),
    (ZeroSettings(3, offload_optimizer=True, **ZERO3), 8 * 424 // 2),
])
def test_what_does_not_train_now_changes_the_gradients_of_a_backward_pass_only(zero: ZeroSettings, gradients: int
                                                                               ) -> None:
    assert predicted(PARTLY, zero) == replace(predicted(LORA, zero), gradients=gradients)
    assert predicted(PARTLY, zero, after=False) == predicted(LORA, zero, after=False)


@pytest.mark.parametrize("kernel", ["branch", "merged"])
def test_parked_values_take_4_bytes_unless_they_train_or_the_kernel_keeps_them(kernel: str) -> None:
    """The weight has 2048 elements, its bias 64; the embedding trains."""
    found = predict_bytes(LORA, LAYOUT, ZeroSettings(2), 2, after_backward=False, kernel=kernel,
                          parked=frozenset({"a.weight", "a.bias", "embed"}))
    assert found.host == 4 * (64 + (2048 if kernel == "branch" else 0)) // 2
    assert found.weights == 2 * 2536 + (4 * 2048 if kernel == "merged" else 0)


@pytest.mark.parametrize("zero", [ZeroSettings(stage, offload) for stage in (0, 1, 2, 3)
                                  for offload in (False, True) if stage > 1 or not offload])
@pytest.mark.parametrize(("plan", "trained"), [(LORA, 424), (BARE_LORA, 384), (WARMUP, 2536)])
def test_what_belongs_to_training_is_in_proportion_to_what_trains(zero: ZeroSettings, plan, trained: int) -> None:
    full, other = predicted(FULL, zero), predicted(plan, zero)
    for owner in ("gradients", "masters", "moments"):
        assert getattr(other, owner) * 2152 == getattr(full, owner) * trained
        assert getattr(full, owner) > 0


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_what_a_stage_shards_is_divided_by_the_ranks(world: int) -> None:
    def shares(zero: ZeroSettings) -> dict[str, float]:
        one, many = (vars(predicted(FULL, zero, w)) for w in (1, world))
        return {owner: one[owner] / many[owner] for owner in ("weights", "gradients", "masters", "moments")}

    assert shares(ZeroSettings(0)) == {"weights": 1, "gradients": 1, "masters": 1, "moments": 1}
    assert shares(ZeroSettings(1)) == {"weights": 1, "gradients": 1, "masters": world, "moments": world}
    assert shares(ZeroSettings(2)) == {"weights": 1, "gradients": world, "masters": world, "moments": world}
    assert shares(ZeroSettings(3, persistence_threshold=0)) == {"weights": world, "gradients": world, "masters": world,
                                                                "moments": world}


@given(st.sampled_from([FULL, WARMUP, LORA, PARTLY, BARE_LORA]), st.integers(0, 3), st.integers(1, 64), st.booleans())
def test_no_owner_grows_with_the_ranks_or_shrinks_in_the_backward_pass(plan, stage, world, after) -> None:
    zero = ZeroSettings(stage)
    now, more = (vars(predicted(plan, zero, w, after)) for w in (world, world + 1))
    padding = 8 * (world + 1) * len(plan.parameters(LAYOUT)) if stage == 3 else 0
    if stage == 3 and world == 1:  # from two ranks on, small parameters are gathered in addition to the partitions
        padding += 2 * sum(map(math.prod, plan.parameters(LAYOUT).values()))
    assert all(more[owner] <= now[owner] + padding for owner in now)
    rest, end = (vars(predicted(plan, zero, world, a)) for a in (False, True))
    assert all(rest[owner] <= end[owner] for owner in rest)


def test_stage_3_pads_each_parameter_to_a_multiple_of_the_ranks() -> None:
    """2048, 64 and 40 elements on 60 ranks are 2100, 120 and 60; the last two are kept whole."""
    found = predicted(FULL, ZeroSettings(3, **ZERO3), 60)
    assert found == Bytes(2 * (35 + 2 + 1) + 2 * 180, 4 * 38, 4 * 38, 8 * 38, 4000)


def test_a_world_of_one_gathers_nothing_at_stage_3() -> None:
    assert predicted(FULL, ZeroSettings(3, **ZERO3), 1).weights == 2 * (2048 + 64 + 40)


def test_the_total_and_the_json_hold_every_owner() -> None:
    found = Bytes(1, 20, 300, 4000, 50000)
    assert found.total == 54321
    assert to_json(found) == {"weights": 1, "gradients": 20, "masters": 300, "moments": 4000, "buffers": 50000,
                              "host": 0}


@pytest.mark.parametrize(("measured", "expected"), [
    ({}, 0.0),
    ({"moments": 440}, 1 / 11),  # of the larger of the two, on either side
    ({"moments": 360}, 0.1),
    ({"weights": 99, "masters": 150}, 0.25),  # the worst of two
    ({"buffers": 7}, 1.0),  # nothing predicted
    ({"gradients": 0}, 1.0),  # nothing there
    ({"state": 10**9, "other": 10**9}, 0.0),  # what is not predicted is not compared
])
def test_worst_deviation(measured: dict[str, int], expected: float) -> None:
    wanted = Bytes(weights=100, gradients=50, masters=200, moments=400, buffers=0)
    assert worst_deviation(wanted, vars(wanted) | measured) == pytest.approx(expected)


def test_no_bytes_on_either_side_do_not_deviate() -> None:
    nothing = Bytes(0, 0, 0, 0, 0)
    assert worst_deviation(nothing, vars(nothing)) == 0.0
