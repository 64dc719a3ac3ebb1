"""How long does a checkpoint block training, and how small is it in the LoRA phase?

    python benchmarks/checkpoint.py            # ViT-L/16 at 224 px, 2 ranks, ZeRO 2: 8 GiB per rank
    python benchmarks/checkpoint.py --quick    # a small ViT instead

In the full phase and in the LoRA phase (ranks 8, 16, 32 and 64 in turn: 30 on average) two kinds of
saves take turns: a synchronous one (copy, write, fsync, read back, checksum, vote, commit), and an
asynchronous one, of which only the copy and the commit block a step. Steps continue while it
writes, and the table shows how much slower they are. The limit of the copy is the rank's bytes at
the speed of a memory copy. Goals: an asynchronous save blocks for less than 10 % of a synchronous
one, and a checkpoint of the LoRA phase is 8 times smaller.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from typing import Any

from harness import ROOT, print_table, record
from ranks import Ranks
from switch import VIT_LARGE, VIT_SMALL
from switch_ranks import copy_bytes_per_second, first_engine, one_step

RANKS = (8, 16, 32, 64)
WORLD = 2
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="use a small ViT instead of ViT-L")
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    (ROOT / "out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "out") as folder:
        ranks = Ranks(
            saves,
            VIT_SMALL if args.quick else VIT_LARGE,
            args.micro_batch,
            args.rounds,
            folder,
            world=WORLD,
        )
        by_rank = ranks.gather()
        ranks.join()
    rows = [
        {"phase": phase, **{key: max(r[phase][key] for r in by_rank) for key in by_rank[0][phase]}}
        for phase in ("full", "lora")
    ]
    print_table(rows, "Checkpoints on the slower rank")
    full, lora = rows
    figures = {
        "holdup_vs_sync": full["hold-up, s"] / full["sync, s"],
        "limit_holdup_vs_sync": 0.1,
        "holdup_vs_sync_lora": lora["hold-up, s"] / lora["sync, s"],
        "steps_slowed_vs_sync": full["steps slowed by, s"] / full["sync, s"],
        "full_vs_lora_bytes": full["checkpoint, MiB"] / lora["checkpoint, MiB"],
        "goal_full_vs_lora_bytes": 8,
        "base_bytes": lora["base, MiB"] * MIB,
        "mean_rank": mean(RANKS),
    }
    record(
        "checkpoint_quick" if args.quick else "checkpoint",
        figures,
        rows,
        f"Micro-batch {args.micro_batch}, {WORLD} ranks, ZeRO 2, one thread per rank. hold-up: copy and commit, "
        f"medians of {args.rounds}. first: the first copy, into memory that is not mapped yet. steps "
        "slowed by: the extra seconds of all steps during a write; the writing thread and the rank "
        "share a core here. checkpoint: all files of one, without the base, which is written once.",
    )


def saves(
    pipe: Connection, model: dict[str, Any], micro: int, rounds: int, folder: str
) -> dict[str, Any]:
    """Return the cost of saves on this rank, by phase."""
    from prelora_ds.core.schedule import Timeline
    from prelora_ds.engine.transition import transition
    from prelora_ds.run.checkpoints.saver import Saver
    from prelora_ds.run.folder import RunFolder

    engine, _ = first_engine(model, micro, stage=2)
    config = engine.run_config
    timeline = Timeline(10**6, config.train.global_batch_size, config.train.duration)
    saver = Saver(RunFolder(Path(folder)), config, timeline, say=lambda text: None)
    copy_speed = copy_bytes_per_second()
    costs = {"full": one_phase(engine, saver, rounds, 0, copy_speed)}
    warmup, lora = plans(engine.layout)
    for plan in (warmup, lora):
        engine, _ = transition(engine, plan, keep_frozen=saver.save_frozen)
        one_step(engine)
    costs["lora"] = one_phase(engine, saver, rounds, 1000, copy_speed)
    saver.close()
    return costs


def plans(layout: Any) -> tuple[Any, Any]:
    """Return the plans of the warm-up and of the LoRA phase."""
    from support.plans import lora_plan, warmup_plan

    ranks = {
        family: {layer: RANKS[(i + layer) % len(RANKS)] for layer in layers}
        for i, (family, layers) in enumerate(layout.targets.items())
    }
    warmup = warmup_plan(layout, ranks)
    return warmup, lora_plan(layout, warmup)


def one_phase(
    engine: Any, saver: Any, rounds: int, first_step: int, copy_speed: float
) -> dict[str, float]:
    """Time synchronous and asynchronous saves in turn, with steps between them."""
    from prelora_ds.core.controller import PhaseState
    from prelora_ds.core.divergence import DivergenceWatch
    from prelora_ds.run.checkpoints.checkpoint_folder import CheckpointManifest, list_checkpoints
    from prelora_ds.run.run_state import RunState

    step = first_step
    sync, copies, commits = [], [], []
    undisturbed: list[float] = []  # seconds of steps without a write
    slowed: list[tuple[float, int]] = []  # during each write: seconds of all steps, their number
    for _ in range(rounds + 1):  # of the first round, a warm-up, only the first copy counts
        for asynchronous in (True, False):
            step += 1
            undisturbed += [one_step(engine) for _ in range(2)]
            state = RunState(step, PhaseState(engine.plan), DivergenceWatch())
            begun = time.perf_counter()
            assert saver.save(engine, state, wait=not asynchronous)
            seconds = time.perf_counter() - begun
            if not asynchronous:
                sync.append(seconds)
                continue
            during = []
            while any_writes(saver):
                during.append(one_step(engine))
            begun = time.perf_counter()
            assert saver.finish_pending()
            copies.append(seconds)
            commits.append(time.perf_counter() - begun)
            slowed.append((sum(during), len(during)))
    manifest = CheckpointManifest.load(list_checkpoints(saver.root)[0])
    rank_bytes = manifest.files[f"rank-{saver._rank:05d}-of-{WORLD:05d}.safetensors"].bytes
    base = CheckpointManifest.load(saver.root / saver.base) if saver.base else None
    return {
        "sync, s": median(sync[1:]),
        "copy, s": median(copies[1:]),
        "limit of the copy, s": rank_bytes / copy_speed,
        "commit, s": median(commits[1:]),
        "hold-up, s": median(a + b for a, b in zip(copies[1:], commits[1:], strict=True)),
        "first copy, s": copies[0],
        "step, s": median(undisturbed),
        "steps slowed by, s": median(s - n * median(undisturbed) for s, n in slowed[1:]),
        "checkpoint, MiB": sum(f.bytes for f in manifest.files.values()) / MIB,
        "base, MiB": sum(f.bytes for f in base.files.values()) / MIB if base else 0.0,
    }


def any_writes(saver: Any) -> bool:
    """Return whether any rank still writes; in a run this is reduced together with the loss."""
    import torch

    writing = torch.tensor([float(saver.writing)])
    torch.distributed.all_reduce(writing)
    return bool(writing)


if __name__ == "__main__":
    main()
