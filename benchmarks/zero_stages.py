"""What do the ZeRO stages cost in every phase: bytes by owner, seconds by part, bytes communicated?

    python benchmarks/zero_stages.py                # ViT-L/16 at 224 px, 2 ranks; 15 minutes, 22 GiB
    python benchmarks/zero_stages.py --quick        # ViT-B
    python benchmarks/zero_stages.py --world 64     # bytes of one rank of 64, ViT-L and ViT-g
    deepspeed --hostfile HOSTS benchmarks/zero_stages.py --recipe RECIPE [a.b=c ...]    # or any other launcher

The last one measures the phases of a recipe on the ranks that are there (zero_stages_job.py).

Adapters have rank 8, 16, 32 and 64 in turn (mean 30). Forward and backward are without their
communication, which has its own column. "data" is reading, decoding and cropping photographs in the
rank itself. The limit of a LoRA step is the FLOPs of its products relative to those of a full step
(`cost.flops`); small batches gain more than that from communication and optimizer. With ``--world``
torch's fake process group replaces the other ranks: the communicated values are then meaningless,
but the bytes are those of a real rank.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, print_table, record
from lora_step import ATTENTION
from ranks import Ranks
from zero_stages_job import on_the_ranks_of_a_launcher
from zero_stages_ranks import OWNERS, PARTS, phases, states_at_world

from prelora_ds.data.shards import writer
from prelora_ds.errors import ExpectedError

VIT_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "attn_implementation": ATTENTION,
}
VIT_BASE = {"attn_implementation": ATTENTION}
VIT_GIANT = {
    "hidden_size": 1408,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "intermediate_size": 6144,
    "patch_size": 14,
}  # ViT-g/14 (Zhai et al. 2022): 1.01e9 parameters
STAGES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "2 offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "3 offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
}
WORLD = 2
BYTES = ("ZeRO", "phase", *OWNERS, "states off by", "peak GiB")
SECONDS = (
    "ZeRO",
    "phase",
    "step s",
    *(f"{part} s" for part in PARTS),
    "FLOPs of full",
    "sent GB",
    "sent off by",
    "switch s",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="use ViT-B instead of ViT-L")
    parser.add_argument(
        "--micro-batches",
        type=int,
        nargs="+",
        help="images per rank; the tables show the first (default: 4 1; quick: 1)",
    )
    parser.add_argument("--steps", type=int, help="steps to time (default: 3; quick: 2)")
    parser.add_argument(
        "--world", type=int, nargs="+", help="only count the bytes of one rank of this many"
    )
    parser.add_argument("--recipe", help="measure the phases of this recipe on the ranks of the launcher")
    parser.add_argument("--settings", nargs="+", choices=STAGES, default=list(STAGES),
                        help="with --recipe: only these ZeRO stages")
    parser.add_argument("--out", type=Path, default=RESULTS, help="with --recipe: the folder of the result")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # some launchers pass it; LOCAL_RANK is used instead
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="with --recipe: overrides of the recipe")
    args = parser.parse_intermixed_args()
    if args.recipe:
        settings = {name: STAGES[name] for name in args.settings}
        try:
            on_the_ranks_of_a_launcher(args.recipe, args.overrides, settings, args.steps or 3, args.out)
        except ExpectedError as error:
            sys.exit(f"error: {error}")
    elif args.world:
        at_world(args.world)
    else:
        on_two_ranks(
            "ViT-B" if args.quick else "ViT-L",
            VIT_BASE if args.quick else VIT_LARGE,
            args.micro_batches or ([1] if args.quick else [4, 1]),
            args.steps or (2 if args.quick else 3),
            "zero_stages_quick" if args.quick else "zero_stages",
        )


def on_two_ranks(
    title: str, model: Mapping[str, Any], micro: Sequence[int], steps: int, name: str
) -> None:
    """Time all phases at all settings, and count their bytes."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "train"
        writer.write_shards(
            writer.photographs(64),
            shards,
            samples_per_shard=64,
            class_names=writer.PHOTOGRAPH_CLASSES,
        )
        for setting, zero in STAGES.items():
            ranks = Ranks(phases, model, zero, list(micro), steps, shards, world=WORLD)
            rows += [{"ZeRO": setting, **row} for row in ranks.gather()[0]]
            ranks.join()
    best = {size: compare(rows, size) for size in micro}
    where = f"{title}/16 at 224 px, {WORLD} ranks, micro-batch {micro[0]}"
    print_table(
        columns(rows, BYTES),
        f"{where}: GiB of rank 0 after backward, measured, and error of the prediction",
    )
    print_table(
        columns(rows, SECONDS), f"{where}: seconds and bytes communicated per step on rank 0"
    )
    print_table(
        [row for pair in best.values() for row in pair["rows"]],
        "The fastest full-phase setting and the fastest LoRA setting, with the same global batch and data",
    )
    figures = {
        "states_vs_predicted_max": max(row["states off by"] for row in rows),
        "communicated_vs_predicted_max": max(row["sent off by"] for row in rows),
        "lora_vs_full_img_s": best[micro[0]]["ratio"],
        "flop_limit": best[micro[0]]["flop_limit"],
    }
    figures |= {
        f"lora_vs_full_img_s_at_{size}_a_rank": pair["ratio"] for size, pair in best.items()
    }
    record(
        name,
        figures,
        [*rows, *(row for pair in best.values() for row in pair["rows"])],
        "lora_vs_full_img_s: images per second of the fastest LoRA setting divided by those of the fastest "
        "full-phase setting. At this batch each rank takes its share of the global batch in one micro-batch in "
        "both phases, and LoRA needs less memory than full at every stage. Medians over steps; one core per rank, "
        "gloo on loopback. Peak RSS is that of the process so far, so all three phases include the full phase. At "
        "one image per rank the gradient of cls_token is a view of that of all tokens, 0.3 MB for ViT-B, which "
        "stages 0 and 1 hold in addition to the prediction.",
    )


def columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return ``rows`` with the columns ``names`` only."""
    return [{name: row[name] for name in names} for row in rows]


def compare(rows: Sequence[Mapping[str, Any]], size: int) -> dict[str, Any]:
    """Return the fastest full-phase and LoRA settings at ``size`` images per rank, by part."""
    fastest = {
        phase: min(
            (row for row in rows if row["phase"] == phase),
            key=lambda row: row["seconds"][size]["step"],
        )
        for phase in ("full", "lora")
    }
    table = [
        {
            "images per rank": size,
            "phase": phase,
            "ZeRO": row["ZeRO"],
            **{f"{part} s": row["seconds"][size][part] for part in ("step", *PARTS)},
            "img/s": WORLD * size / row["seconds"][size]["step"],
            "FLOPs of full": row["FLOPs of full"],
        }
        for phase, row in fastest.items()
    ]
    return {
        "rows": table,
        "ratio": table[1]["img/s"] / table[0]["img/s"],
        "flop_limit": 1 / fastest["lora"]["FLOPs of full"],
    }


def at_world(worlds: Sequence[int]) -> None:
    """Count the bytes of rank 0 for each world, stage and phase."""
    rows = []
    for title, model in (("ViT-L/16", VIT_LARGE), ("ViT-g/14", VIT_GIANT)):
        for world in worlds:
            for setting in "0123":
                ranks = Ranks(states_at_world, model, STAGES[setting], world, world=1)
                rows += [
                    {"model": title, "ranks": world, "ZeRO": setting, **row}
                    for row in ranks.gather()[0]
                ]
                ranks.join()
    print_table(
        [{k: v for k, v in row.items() if not isinstance(v, dict)} for row in rows],
        "GiB of one rank at the end of backward, measured, and error of the prediction",
    )
    record(
        "zero_stages_world",
        {
            "states_vs_predicted_max": max(row["states off by"] for row in rows),
            "states_vs_predicted_mean": sum(row["states off by"] for row in rows) / len(rows),
        },
        rows,
        "torch's fake process group under real DeepSpeed engines: collectives return at once with meaningless "
        "values, and tensors have the sizes of a real rank. Micro-batch 1, without activations.",
    )


if __name__ == "__main__":
    main()
