"""How much time do our loop, Hugging Face's Trainer and accelerate add to a bare DeepSpeed loop?

    python benchmarks/overhead.py [--small] [--rounds 40] [--turn 4]

2 ranks, ZeRO 2, BF16, a ViT-S on the digits. All loops exist at the same time, each in its own
ranks, and take turns of a few steps, so that drift of the machine affects all of them equally. A
second bare loop shows the resolution of the measurement. The limit is the bare loop. Goals: ours
takes at most 1.01 of it at steps of half a second, and at most 2 ms more at small steps. Takes
about 8 minutes on 2 cores.

With --small the model is a ViT of width 32 with 2 blocks, whose steps take about 15 ms, and a turn
has 20 steps. Takes about two minutes. The result is overhead_small.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import overhead_loops as loops
import torch
from harness import ROOT, interleaved, print_table, record
from ranks import Ranks

LOOPS = {
    "bare": loops.bare,
    "bare again": loops.bare,
    "ours": loops.ours,
    "hf_trainer": loops.hf_trainer,
    "accelerate": loops.accelerate,
}
WORLD = 2


@dataclass(frozen=True)
class Size:
    """A model, its batch over all ranks, and the steps of a turn."""

    width: int
    blocks: int
    heads: int
    batch: int
    turn: int


VIT_S = Size(width=384, blocks=12, heads=6, batch=64, turn=4)
SMALL = Size(width=32, blocks=2, heads=2, batch=16, turn=20)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=40,
        help="turns of each loop that are counted, after a first one that is not",
    )
    parser.add_argument("--turn", type=int, help="steps per turn")
    parser.add_argument("--small", action="store_true", help="measure a model with small steps")
    args = parser.parse_args()
    size = SMALL if args.small else VIT_S
    turn_steps = args.turn or size.turn
    os.chdir(ROOT)
    (ROOT / "out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=ROOT / "out"
    ) as temporary:  # on a real disk, as the logs of a run
        folder = Path(temporary)
        write_recipe(
            folder, size, steps=(args.rounds + 1) * turn_steps + 1
        )  # the last step only ends the last turn
        started = {
            name: Ranks(loop, folder, turn_steps, world=WORLD, grouped=loop is not loops.ours)
            for name, loop in LOOPS.items()
        }
        seconds = interleaved(
            {name: lambda r=ranks: turn(r) / turn_steps for name, ranks in started.items()},
            args.rounds,
        )
        losses = {name: finish(ranks) for name, ranks in started.items()}
    rows = [
        row(name, seconds[name], seconds["bare"], losses[name], losses["bare"]) for name in LOOPS
    ]
    print_table(rows, f"Seconds per step, {args.rounds} turns of {turn_steps} steps each")
    by_loop = {r["loop"]: r["over bare"] for r in rows}
    record(
        "overhead_small" if args.small else "overhead",
        {
            "loop_vs_bare": by_loop["ours"],
            "hf_trainer_vs_bare": by_loop["hf_trainer"],
            "accelerate_vs_bare": by_loop["accelerate"],
            "bare_again_vs_bare": by_loop["bare again"],
            "loop_own_ms": own_ms(seconds["ours"], seconds["bare"]),
            "hf_trainer_own_ms": own_ms(seconds["hf_trainer"], seconds["bare"]),
            "accelerate_own_ms": own_ms(seconds["accelerate"], seconds["bare"]),
            "bare_step_s": median(seconds["bare"]),
            "largest_loss_difference": max(r["largest loss difference"] for r in rows),
        },
        rows,
        "over bare: median over turns of the ratio to the bare loop's turn of the same round, with its quartiles. "
        "own_ms: the median of the difference, per step. means over bare: includes rare work (norms of all weights "
        "once per epoch of 1,437 images). Ours "
        "and the Trainer log every step to TensorBoard, ours also to metrics.jsonl; the bare loop "
        "and accelerate's keep the loss. Largest loss difference: to the bare loop, over all steps.",
    )


def turn(ranks: Ranks) -> float:
    """Return the seconds of a turn on the slower rank."""
    ranks.send("go")
    return max(ranks.gather())


def finish(ranks: Ranks) -> list[float]:
    """Return the loss of each step: the mean over ranks in fp32, as in a reduction."""
    ranks.send("go")
    by_rank = torch.tensor(ranks.gather(), dtype=torch.float32)
    ranks.join()
    losses: list[float] = (by_rank.sum(0) / WORLD).tolist()
    return losses


def row(
    name: str,
    seconds: Sequence[float],
    bare: Sequence[float],
    losses: Sequence[float],
    bare_losses: Sequence[float],
) -> dict[str, Any]:
    """Return the row of one loop."""
    ratios = [a / b for a, b in zip(seconds, bare, strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    return {
        "loop": name,
        "s/step": median(seconds),
        "limit (bare), s/step": median(bare),
        "over bare": middle,
        "quartiles": f"{low:.3f}-{high:.3f}",
        "means over bare": mean(seconds) / mean(bare),
        "last loss": losses[-1],
        "largest loss difference": max(
            abs(a - b) for a, b in zip(losses, bare_losses, strict=True)
        ),
    }


def own_ms(seconds: Sequence[float], bare: Sequence[float]) -> float:
    """Return how many ms longer than a bare one a step is, as the median over turns."""
    return 1e3 * median(a - b for a, b in zip(seconds, bare, strict=True))


def write_recipe(folder: Path, size: Size, steps: int) -> None:
    """Write shards of the digits, and the recipe that all loops follow, into ``folder``."""
    from prelora_ds.data.shards.writer import write_digits

    write_digits(folder)
    recipe = {
        "run": {"name": "overhead", "output_dir": str(folder / "ours"), "seed": 0},
        "model": {
            "image_size": 8,
            "patch_size": 2,
            "num_channels": 1,
            "hidden_size": size.width,
            "num_hidden_layers": size.blocks,
            "num_attention_heads": size.heads,
            "intermediate_size": 4 * size.width,
            "attn_implementation": "eager",
        },
        "data": {
            "train": str(folder / "train"),
            "val": str(folder / "val"),
            "crop": "none",
            "flip": False,
            "workers": 0,
        },
        # A constant learning rate, which every loop supports.
        "optimizer": {"lr": 3e-4, "weight_decay": 0.05, "warmup": "0 steps", "min_lr_ratio": 1.0},
        "train": {
            "duration": f"{steps} steps",
            "global_batch_size": size.batch,
            "micro_batch_size": size.batch // WORLD,
            "eval_every": f"{steps} steps",
        },
        "checkpoint": {"every": None},  # measured by checkpoint.py
    }
    (folder / loops.RECIPE).write_text(json.dumps(recipe))


if __name__ == "__main__":
    main()
