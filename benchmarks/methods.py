"""What do DynaLoRA, ReLoRA, the kinds of adapters and quantised weights save and cost, compared with other steps?

    python benchmarks/methods.py

2 ranks, ZeRO 2, BF16, micro-batch 16, in four parts:

- DynaLoRA on blocks of ViT-L: steps in which 2/3, 1/2 or 1/3 of the adapters train, compared with a
  LoRA step in which all do. They are scattered, or those of the last blocks with everything below
  frozen. All variants take turns on one live engine. The mean rank is 30. Head, norms and
  embeddings train as well, except below the lowest active block where the bottom is frozen.
- Each kind of adapter on these blocks, with the kernel branch, compared with a step of LoRA and a full
  one. Before each turn the engine is rebuilt for the kind.
- LoRA steps of the same blocks on frozen weights in int8 and in NF4, compared with those on BF16 weights, which take
  turns with them on one live engine.
- Re-selections on ViT-L with 144 adapters, compared with its LoRA step.
- Merges of adapters of rank 256 into ViT-L, part by part, compared with its full step.

Goals: at most 0.985 of a LoRA step with 2/3 active and scattered, and at most 0.75 with 1/2 active
and the bottom frozen; a re-selection within 0.05 of a LoRA step; a merge within 0.5 of a full step;
at most 1.2 of a LoRA step with DoRA, and 1.1 with VeRA of rank 64.
It takes 9 GiB per rank.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from statistics import mean, median, quantiles
from typing import Any

from harness import interleaved, print_table, record
from methods_ranks import (
    FULL,
    MERGED_RANK,
    PARTS,
    RANK_FOR_ALL,
    RESETS,
    STAGE,
    Variant,
    merges,
    reselections,
    steps_of_kinds,
    steps_of_variants,
    steps_on_bases,
)
from ranks import Ranks
from switch import VIT_LARGE, on_ranks

from prelora_ds.core.adapters import KINDS
from prelora_ds.core.quantised import BF16, BYTES

LORA = "LoRA, all active"
SCATTERED = "2/3 active, scattered"
# Name in the table -> the variant, and the name of its figure.
VARIANTS = {
    LORA: (Variant(1), None),
    SCATTERED: (Variant(2 / 3), "dyna_two_thirds_vs_lora"),
    "1/2 active, scattered": (Variant(1 / 2), "dyna_half_vs_lora"),
    "1/3 active, scattered": (Variant(1 / 3), "dyna_third_vs_lora"),
    "2/3 active, bottom frozen": (Variant(2 / 3, bottom_frozen=True), "dyna_bottom_two_thirds_vs_lora"),
    "1/2 active, bottom frozen": (Variant(1 / 2, bottom_frozen=True), "dyna_bottom_half_vs_lora"),
    "1/3 active, bottom frozen": (Variant(1 / 3, bottom_frozen=True), "dyna_bottom_third_vs_lora"),
    "2/3 active, scattered, importance measured": (
        Variant(2 / 3, importance=True),
        "dyna_two_thirds_measured_vs_lora",
    ),
}
WORLD = 2
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, default=6, help="blocks for the steps with some adapters active"
    )
    parser.add_argument(
        "--whole-layers", type=int, default=24, help="blocks for re-selections and merges"
    )
    parser.add_argument(
        "--image-size", type=int, default=224, help="with 32, a quick trial of the script"
    )
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        help="turns of each variant that are counted, after a first one that is not",
    )
    parser.add_argument("--kind-rounds", type=int, default=5, help="the same for the kinds of adapters")
    parser.add_argument(
        "--steps", type=int, default=2, help="LoRA and full steps of ViT-L, after first ones"
    )
    parser.add_argument("--choices", type=int, default=50, help="re-selections")
    parser.add_argument("--merges", type=int, default=2, help="merges for each rule of RESETS")
    args = parser.parse_args()
    # Blocks use eager attention as in lora_step.py; ViT-L uses sdpa as in switch.py, which stores less.
    whole = VIT_LARGE | {"image_size": args.image_size, "num_hidden_layers": args.whole_layers}
    blocks = whole | {"num_hidden_layers": args.layers, "attn_implementation": "eager"}

    variants, next_step = rows_of_variants(blocks, args.micro_batch, args.rounds)
    print_table(variants, f"{args.layers} blocks of ViT-L, micro-batch {args.micro_batch}")
    kinds = rows_of_kinds(blocks, args.micro_batch, args.kind_rounds)
    print_table(kinds, f"Kinds of adapters on {args.layers} blocks of ViT-L, micro-batch {args.micro_batch}")
    bases = [row_of_base(blocks, args.micro_batch, args.rounds, dtype) for dtype in BYTES]
    print_table(bases, "LoRA steps on quantised weights")
    choice = row_of_reselections(
        on_ranks(reselections, whole, args.micro_batch, args.steps, args.choices)
    )
    print_table([choice], "Re-selections on the live engine")
    by_rank = on_ranks(merges, whole, args.micro_batch, args.steps, args.merges)
    full_step = median(slowest([r["steps"] for r in by_rank]))
    by_rule = {rule: rows_of_merge(by_rank, rule, full_step) for rule in RESETS}
    parts = [row for rows in by_rule.values() for row in rows]
    print_table(parts, f"Merges at rank {MERGED_RANK}; a full step takes {full_step:.2f} s")

    record(
        "methods",
        {
            **{
                figure: row["of LoRA"]
                for row, (_, figure) in zip(variants, VARIANTS.values(), strict=True)
                if figure is not None
            },
            **{f"{row['kind']}_vs_lora": row["of LoRA"] for row in kinds if row["kind"] not in (FULL, "lora")},
            "lora_vs_full": next(row["of full"] for row in kinds if row["kind"] == "lora"),
            "dyna_next_step_vs_first": next_step,
            **{f"{row['base']}_base_vs_lora": row["of LoRA"] for row in bases},
            "dyna_reselect_in_steps": choice["LoRA steps"],
            "dyna_reselect_s": choice["median s"],
            "merge_in_full_steps": by_rule["zero"][-1]["full steps"],
            "merge_limit_in_full_steps": by_rule["zero"][-1]["limit, s"] / full_step,
            "merge_magnitude_in_full_steps": by_rule["magnitude"][-1]["full steps"],
            "merge_s": by_rule["zero"][-1]["seconds"],
            "full_step_s": full_step,
            "full_step_peak_gib": max(r["peak_rss"] for r in by_rank) / GIB,
        },
        [*variants, *kinds, *bases, choice, *parts],
        f"{WORLD} ranks with one core each, ZeRO {STAGE}, micro-batch {args.micro_batch}, images of "
        f"{args.image_size} pixels. Variants: {args.layers} blocks, eager attention, mean rank 30; head, norms and "
        "embeddings train, except below the lowest active block where the bottom is frozen. Each turn chooses adapters "
        "again, scattered ones at random, and takes one step. of LoRA: median over rounds of the ratio to the "
        "LoRA step of the same round. FLOPs are not a limit: they count neither memory traffic nor the smaller "
        "gradients that are communicated. Saved activations: predicted. Importance is measured only where "
        "the row says so. "
        f"Kinds: the same blocks, kernel branch, mean rank 30, except {RANK_FOR_ALL}; each turn builds the engine and "
        "takes two steps, of which the second counts. of full: to the full step of the same round. owned: by the "
        "census of rank 0 between two steps. "
        "int8_base_vs_lora, nf4_base_vs_lora: median over rounds of the ratio of a LoRA step on quantised weights to "
        "one on BF16 weights; each product makes the BF16 weights from the codes. "
        "dyna_next_step_vs_first: the second step after a re-selection of 2/3, divided by the first. Re-selections and "
        f"merges: {args.whole_layers} blocks, sdpa attention, without activation checkpointing. Merges: the frozen "
        "weights are parked, kernel branch; parts on rank 0. Limits of parts: bytes written at the speed of a memory "
        "copy, and products (float64 for the merge, BF16 for the probes) at the speed of a large one.",
    )


def rows_of_variants(
    model: Mapping[str, Any], micro: int, rounds: int
) -> tuple[list[dict[str, Any]], float]:
    """Return a row per variant, and the ratio of the second to the first step after a re-selection."""
    ranks = Ranks(steps_of_variants, model, micro, world=WORLD)
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}

    def turn(name: str) -> float:
        """Take a turn; return the seconds of the step after the re-selection on the slower rank."""
        taken = answers[name]
        ranks.send((VARIANTS[name][0], len(taken), 2 if name == SCATTERED else 1))
        by_rank = ranks.gather()
        taken.append(by_rank[0] | {"seconds": slowest([r["seconds"] for r in by_rank])})
        first: float = taken[-1]["seconds"][0]
        return first

    seconds = interleaved({name: lambda n=name: turn(n) for name in VARIANTS}, rounds)
    ranks.send(None)
    ranks.gather()
    ranks.join()

    rows = []
    for name in VARIANTS:
        ratios = [a / b for a, b in zip(seconds[name], seconds[LORA], strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        of_lora = {
            key: mean(a[key] for a in answers[name]) / mean(a[key] for a in answers[LORA])
            for key in ("flops", "saved")
        }
        rows.append(
            {
                "variant": name,
                "step s": median(seconds[name]),
                "of LoRA": middle,
                "quartiles": f"{low:.3f}-{high:.3f}",
                "limit by FLOPs only": of_lora["flops"],
                "saved activations, of LoRA": of_lora["saved"],
            }
        )
    pairs = [answer["seconds"] for answer in answers[SCATTERED][1:]]
    return rows, median(second / first for first, second in pairs)


def rows_of_kinds(model: Mapping[str, Any], micro: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for full training and for each kind of adapter."""
    ranks = Ranks(steps_of_kinds, model, micro, world=WORLD)
    answers: dict[str, dict[str, Any]] = {}

    def turn(name: str) -> float:
        """Take a turn; return the seconds of its step on the slower rank."""
        ranks.send(name)
        by_rank = ranks.gather()
        answers[name] = by_rank[0]
        return max(r["seconds"] for r in by_rank)

    seconds = interleaved({name: lambda n=name: turn(n) for name in (FULL, *KINDS)}, rounds)
    ranks.send(None)
    ranks.gather()
    ranks.join()

    def ratio(name: str, other: str) -> float:
        return median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))

    return [
        {
            "kind": name,
            "rank": "-" if name == FULL or not KINDS[name].can.ranked else RANK_FOR_ALL.get(name, "8-64"),
            "parameters that train": answer["trains"],
            "owned, GiB": answer["bytes"] / GIB,
            "step s": median(seconds[name]),
            "of LoRA": ratio(name, "lora"),
            "of full": ratio(name, FULL),
            "limit by FLOPs only, of full": answer["flops"] / answers[FULL]["flops"],
        }
        for name, answer in answers.items()
    ]


def row_of_base(model: Mapping[str, Any], micro: int, rounds: int, dtype: str) -> dict[str, Any]:
    """Return the row of LoRA steps on weights in ``dtype``."""
    ranks = Ranks(steps_on_bases, model, micro, dtype, world=WORLD)

    def turn(base: str) -> float:
        ranks.send(base)
        return max(ranks.gather())

    seconds = interleaved({base: lambda b=base: turn(b) for base in (BF16, dtype)}, rounds)
    ranks.send(None)
    ranks.gather()
    ranks.join()
    low, middle, high = quantiles([a / b for a, b in zip(seconds[dtype], seconds[BF16], strict=True)], n=4)
    return {
        "base": dtype,
        "step s": median(seconds[dtype]),
        "on BF16, s": median(seconds[BF16]),
        "of LoRA": middle,
        "quartiles": f"{low:.3f}-{high:.3f}",
    }


def row_of_reselections(by_rank: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the row of the re-selections on ViT-L."""
    step = median(slowest([r["steps"] for r in by_rank]))
    seconds = slowest([r["reselections"] for r in by_rank])
    return {
        "adapters": by_rank[0]["adapters"],
        "re-selections": len(seconds),
        "median s": median(seconds),
        "slowest s": max(seconds),
        "limit, s": 0.0,
        "LoRA step s": step,
        "LoRA steps": median(seconds) / step,
    }


def rows_of_merge(
    by_rank: Sequence[Mapping[str, Any]], rule: str, full_step: float
) -> list[dict[str, Any]]:
    """Return the median seconds of each part of the merges with ``rule``, and of the whole merge."""
    of_ranks = [[m for m in r["merges"] if m["rule"] == rule] for r in by_rank]
    total = median(slowest([[m["seconds"] for m in of_rank] for of_rank in of_ranks]))
    parts = {part: median(m["parts"][part] for m in of_ranks[0]) for part in PARTS}
    limits = by_rank[0]["limits"]
    measured = parts | {"the rest": total - sum(parts.values()), "total": total}
    least = limits | {"total": sum(limits.values())}
    return [
        {
            "moments reset": rule,
            "part": part,
            "seconds": seconds,
            "limit, s": least.get(part),
            "full steps": seconds / full_step,
        }
        for part, seconds in measured.items()
    ]


def slowest(by_rank: Sequence[Sequence[float]]) -> list[float]:
    """Return the seconds of the slowest rank, one by one."""
    return [max(seconds) for seconds in zip(*by_rank, strict=True)]


if __name__ == "__main__":
    main()
