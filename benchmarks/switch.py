"""What does a switch cost in seconds and bytes, and what remains if an engine is released by hand?

    python benchmarks/switch.py            # ViT-L/16 at 224 px, 2 ranks, ZeRO 2: 8 GiB per rank
    python benchmarks/switch.py --quick    # a small ViT instead

Both switches, from full to warm-up and from there to LoRA, are timed part by part. The limit of a
part is the time that a rank needs to copy its bytes in memory. Goal: at most 4 full-phase steps of
ViT-L. Then a small ViT is rebuilt 20 times, by us and by hand (`engine.destroy(); del engine,
optimizer; gc.collect()`).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from harness import ROOT, print_table, record
from ranks import Ranks
from switch_ranks import freed_by_hand, freed_by_us, rebuilt_by_hand, rebuilt_by_us, switches

VIT_LARGE = {
    "image_size": 224,
    "patch_size": 16,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
VIT_SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
SWITCHES = ("full -> warmup", "warmup -> lora")
REBUILDS = 20
WORLD = 2
GIB = 2**30
GOAL_STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="use a small ViT instead of ViT-L")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument(
        "--steps",
        type=int,
        default=2,
        help="full-phase steps to measure, after a first one that is not",
    )
    args = parser.parse_args()
    name, model = ("switch_quick", VIT_SMALL) if args.quick else ("switch", VIT_LARGE)
    (ROOT / "out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "out") as base:
        by_rank = on_ranks(switches, model, args.micro_batch, args.steps, Path(base))
    step = median(max(seconds) for seconds in zip(*(r["steps"] for r in by_rank), strict=True))
    parts, memory, down = (
        rows_of_parts(by_rank[0], step),
        rows_of_memory(by_rank),
        rows_of_teardown(),
    )
    print_table(parts, f"Parts of a switch; a full-phase step takes {step:.2f} s")
    print_table(memory, "Memory per rank, on the worst rank")
    print_table(down, f"Releasing an engine of a small ViT, and {REBUILDS} rebuilds")

    seconds = {s: max(r[s]["seconds"] for r in by_rank) for s in SWITCHES}
    ours, by_hand, without_module, *_ = down
    record(
        name,
        {
            "switch_in_full_steps": max(seconds.values()) / step,
            "full_step_s": step,
            "goal_holds_above_step_s": max(seconds.values()) / GOAL_STEPS,
            "full_to_warmup_s": seconds[SWITCHES[0]],
            "warmup_to_lora_s": seconds[SWITCHES[1]],
            "switch_peak_over_step_peak": max(r["peak RSS, GiB"] for r in memory[1:])
            / memory[0]["peak RSS, GiB"],
            "growth_bytes_20": ours["growth, bytes"],
            "naive_growth_bytes_20": by_hand["growth, bytes"],
            "freed_share": ours["freed share"],
            "naive_freed_share": by_hand["freed share"],
            "naive_freed_share_without_module": without_module["freed share"],
        },
        [*parts, *memory, *down],
        f"Micro-batch {args.micro_batch}, {WORLD} ranks, ZeRO 2. switch_in_full_steps: the slower switch divided by "
        "the median full-phase step. Steps on a CPU are slow; with the same seconds the goal is met only if a step "
        "takes more than goal_holds_above_step_s. Live tensors: counted at the end of each part. Limits: the rank's "
        "bytes of a part at the speed of a memory copy; none for a part that moves no bytes. Freed share: for ours of "
        "all bytes of the engine; by hand of all but the module's weights, from which the next engine is built. "
        "Growth: of resident memory on the worst rank.",
    )


def on_ranks(function: Any, *args: Any) -> list[Any]:
    """Run ``function`` on all ranks, and return its results by rank."""
    ranks = Ranks(function, *args, world=WORLD)
    results = ranks.gather()
    ranks.join()
    return results


def rows_of_parts(report: dict[str, Any], step: float) -> list[dict[str, Any]]:
    """Return the seconds of each part on rank 0, with its limit.

    A trained element has 12 bytes of state, sharded over the ranks, and 2 bytes of weight on each.
    """
    rows = []
    for switch in SWITCHES:
        before, after = report[switch]["elements"]
        limits = {
            "export": 12 * before / WORLD,
            "build: module": 2 * report["elements"],
            "restore": 12 * after / WORLD + 2 * report["elements"],
            "do ranks agree": 2 * report["elements"],
            "write the base": 4 * max(0, before - after) / WORLD,
        }
        measured = report[switch]["parts"] | {"total": report[switch]["seconds"]}
        limits["total"] = sum(limits.values())
        for part, seconds in measured.items():
            limit = limits[part] / report["copy_bytes_s"] if part in limits else None
            rows.append(
                {
                    "switch": switch,
                    "part": part,
                    "seconds": seconds,
                    "limit, s": limit,
                    "full steps": seconds / step,
                }
            )
    return rows


def rows_of_memory(by_rank: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the peaks of the worst rank. The limit of a switch is the peak of a full step."""
    peaks = {"a full-phase step": [(r["step_peak_rss"], r["live_bytes"]) for r in by_rank]}
    peaks |= {s: [(r[s]["peak_rss"], r[s]["live_bytes"]) for r in by_rank] for s in SWITCHES}
    worst = {
        when: [max(values) / GIB for values in zip(*of_ranks, strict=True)]
        for when, of_ranks in peaks.items()
    }
    return [
        {
            "when": when,
            "peak RSS, GiB": peak,
            "limit (a step's), GiB": worst["a full-phase step"][0],
            "live tensors, GiB": live,
        }
        for when, (peak, live) in worst.items()
    ]


def rows_of_teardown() -> list[dict[str, Any]]:
    """Return what each way frees at stages 2 and 3, and what rebuilds leave at 2, on the worst rank."""
    ways = {
        "ours": (freed_by_us, ()),
        "by hand": (freed_by_hand, (True,)),
        "by hand, module dropped too": (freed_by_hand, (False,)),
    }
    rows = []
    for stage in (2, 3):
        for way, (function, options) in ways.items():
            nbytes, shares = zip(*on_ranks(function, VIT_SMALL, stage, *options), strict=True)
            rows.append(
                {
                    "stage": stage,
                    "way": way,
                    "engine, bytes": max(nbytes),
                    "freed share": min(shares),
                    "limit, share": 1.0,
                }
            )
    for row, function in zip(rows, (rebuilt_by_us, rebuilt_by_hand), strict=False):
        seconds, grown = zip(*on_ranks(function, VIT_SMALL, REBUILDS), strict=True)
        row |= {"growth, bytes": max(grown), "limit, bytes": 0, "s/rebuild": max(seconds)}
    return rows


if __name__ == "__main__":
    main()
