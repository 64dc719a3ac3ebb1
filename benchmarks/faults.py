"""Is a run that is killed and resumed many times bitwise identical to an uninterrupted run?

    python benchmarks/faults.py            # make test-faults: 32 kills in PreLoRA, 12 in ReLoRA and DynaLoRA
    python benchmarks/faults.py --kills 60 --kills-in-stages 20 --seed 7

With each method one run at each ZeRO stage is left undisturbed. In other runs ranks are killed with
SIGKILL at moments drawn by the seed: in a step, a switch, a merge, a choice of adapters, at a window's end,
in an evaluation, while frozen weights or a checkpoint are copied, written, voted on or committed, while one is
read, and in the export. Each time the same command starts the run again. All logged losses and norms, all
verdicts, plans, merges and choices, and all bits of the exported model are compared. Goal and limit: all of
them are equal.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ROOT, print_table, record

sys.path.insert(0, str(ROOT / "tests"))
from support.launches import Job, Zygote, differences, traces, zygote

from prelora_ds.data.shards.writer import write_digits
from prelora_ds.run.checkpoints.checkpoint_folder import list_checkpoints, step_of
from prelora_ds.run.claim import is_finished
from prelora_ds.run.folder import RunFolder

STAGES = (0, 1, 2, 3)
WORLD = 2
SETTINGS = ("checkpoint.every=2 steps", "model.hidden_dropout_prob=0.1", "train.eval_every=5 steps")
STAGES_OF_ADAPTERS = (
    "phases=[{name: relora, adapters: {rank: 4}, train: [adapters, rest], until: 8 steps, "
    "merge: {every: 3 steps, reset: {rule: magnitude, share: 0.75}, rewarm: 2 steps}}, "
    "{name: dynalora, adapters: {rank: 4, from: merge}, train: [adapters, rest], "
    "active: {choose: discounted, k: 3, every: 3 steps, cut_backward: true}}]",
    "convergence=null", "lora=null")
# Place -> (the last call that may be interrupted, seconds of a call on a slow machine).
PLACES = {
    "step": (12, 0.1),
    "copy": (5, 0.01),
    "write": (5, 0.05),
    "vote": (5, 0.02),
    "commit": (5, 0.01),
    "evaluate": (3, 0.1),
    "restore": (1, 0.05),
    "export": (1, 0.1),
}


@dataclass(frozen=True, eq=False)
class Method:
    """A method whose runs are killed: its overrides, and the places where only such a run can be killed."""

    name: str
    overrides: tuple[str, ...]
    places: Mapping[str, tuple[int, float]]


PRELORA = Method("PreLoRA", (), {"window": (5, 0.02), "switch": (2, 0.5)})
ADAPTERS = Method("ReLoRA, DynaLoRA", STAGES_OF_ADAPTERS, {
    "merge": (2, 0.05), "choice": (4, 0.005), "base": (3, 0.05), "switch": (1, 0.5)})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=32, help="in PreLoRA")
    parser.add_argument("--kills-in-stages", type=int, default=12, help="in ReLoRA and DynaLoRA")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kills = {PRELORA: args.kills, ADAPTERS: args.kills_in_stages}
    with tempfile.TemporaryDirectory() as folder, zygote() as forge:
        shards = Path(folder) / "digits"
        write_digits(shards)
        rows = [
            row
            for method, count in kills.items()
            for zero in STAGES
            for row in stage(forge, Path(folder), shards, method, zero, -(-count // len(STAGES)), args.seed)
        ]
    print_table(rows, f"Kills, seed {args.seed}")
    resumes = sum(row["bitwise"] for row in rows)
    record(
        "faults",
        {
            "kills": len(rows),
            "bitwise_resumes": resumes,
            "limit_bitwise_resumes": len(rows),
            "seed": args.seed,
        },
        rows,
        f"{WORLD} ranks, gloo. A kill counts as resumed bitwise if its run ended with every logged loss, norm, "
        "decision and exported bit equal. Ranks are forked from a process that has imported torch and DeepSpeed.",
    )
    if resumes != len(rows):
        sys.exit(1)


def stage(
    forge: Zygote, folder: Path, shards: Path, method: Method, zero: int, kills: int, seed: int
) -> list[dict[str, Any]]:
    """Kill ranks ``kills`` times at stage ``zero``, in as many runs as needed; return a row each."""
    if not kills:
        return []
    settings = (*SETTINGS, *method.overrides)
    if zero == 0:
        settings += ("train.micro_batch_size=32",)
    rng = random.Random(f"{seed}/{method.name}/{zero}")
    name = f"{method.name.split(',')[0]}-zero{zero}"
    undisturbed = folder / name
    job = Job(forge, undisturbed, shards, *settings, zero=zero)
    if any(job.end()):
        sys.exit(job.said())

    everywhere = [*PLACES, *method.places]
    places = rng.sample(everywhere, len(everywhere))
    rows: list[dict[str, Any]] = []
    runs = 0
    while len(rows) < kills:
        runs += 1
        out = folder / f"{name}-{runs}"
        killed = one_run(forge, out, shards, method, settings, zero, rng, places, kills - len(rows))
        different = differences(traces(undisturbed), traces(out))
        rows += [
            {"method": method.name, **row, "bitwise": not different, "differs in": "; ".join(different)}
            for row in killed
        ]
    return rows


def one_run(
    forge: Zygote,
    out: Path,
    shards: Path,
    method: Method,
    settings: tuple[str, ...],
    zero: int,
    rng: random.Random,
    places: list[str],
    kills: int,
) -> list[dict[str, Any]]:
    """Take one run to its end with at most ``kills`` kills, not counting those that come too late."""
    rows: list[dict[str, Any]] = []
    while True:
        newest = list_checkpoints(RunFolder(out).checkpoints)
        faults = {}
        if len(rows) < kills:
            place = places[0]
            places.append(places.pop(0))
            last_call, seconds = (PLACES | method.places)[place]
            call = rng.randint(1, last_call)
            delay = round(rng.random() * seconds, 3)
            rank = 0 if place == "commit" else rng.randrange(WORLD)
            faults = {rank: {"place": place, "call": call, "delay": delay}}
        begun = time.monotonic()
        job = Job(forge, out, shards, *settings, zero=zero, faults=faults)
        exit_codes = job.end()
        if exit_codes == [0] * WORLD:
            return rows
        if not faults or exit_codes[rank] != -9:
            sys.exit(job.said())
        rows.append(
            {
                "stage": zero,
                "from step": step_of(newest[0]) if newest else 0,
                "place": place,
                "call": call,
                "rank": rank,
                "delay, s": delay,
                "seconds": time.monotonic() - begun,
            }
        )
        if is_finished(RunFolder(out)):  # killed while exiting, after everything was written
            return rows


if __name__ == "__main__":
    main()
