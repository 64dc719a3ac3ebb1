"""What does a step cost on this GPU, and which settings are the fastest?

    python benchmarks/gpu.py                          # all GPUs of this host; about 4 minutes
    srun ... python benchmarks/gpu.py                 # on the ranks of a launcher, without the calibration
    python benchmarks/gpu.py --device cpu --tiny      # rehearse it on a CPU

ViT-L/16 at 224 px in every phase, with the settings that could matter. Each case is built, warmed up and timed. A
second round runs the cases in reverse order if there is time. The micro-batch is 64, or half of it as often as the
predicted memory asks for. The script prints a table and what it would decide, and writes two files: gpu_NAME.json with
all results, and gpu_NAME_rates.json, a calibration for `machine.calibration` and `prelora plan --calibration`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import RESULTS, print_table, record

if TYPE_CHECKING:
    from prelora_ds.hosts.discovery import Ranks as Place

VIT_LARGE = {"image_size": 224, "patch_size": 16, "hidden_size": 1024, "num_hidden_layers": 24,
             "num_attention_heads": 16, "intermediate_size": 4096, "attn_implementation": "sdpa"}
TINY = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 128, "attn_implementation": "sdpa"}
LARGEST_MICRO_BATCH = 64
# What is decided for another setting only if it is this much faster.
WORTH_IT = 0.03
CALIBRATION_SHARE = 0.3  # of the minutes


@dataclass(frozen=True)
class Case:
    """One setting of one phase."""

    phase: str
    stage: int
    mode: str = "branch"
    overlap: bool = False
    compiled: bool = False
    reduce: str = "fp32"

    @property
    def name(self) -> str:
        words = [self.phase, f"ZeRO {self.stage}"]
        words += [self.mode] if self.phase != "full" else []
        words += ["overlap"] * self.overlap + ["compile"] * self.compiled + ["bf16 sums"] * (self.reduce == "bf16")
        return ", ".join(words)


def cases(world: int, *, tiny: bool = False) -> list[Case]:
    """Return the cases, the most important ones first."""
    chosen = [Case("full", 2), Case("lora", 2), Case("lora", 2, "merged"), Case("warmup", 2)]
    if tiny:
        return [*chosen, *([Case("full", 2, overlap=True)] if world > 1 else [])]
    if world > 1:
        chosen += [Case("full", 2, overlap=True), Case("lora", 2, overlap=True),
                   Case("full", 2, overlap=True, reduce="bf16")]
    chosen += [Case("lora", 0), Case("lora", 1), Case("full", 1), Case("full", 0), Case("lora", 0, "merged"),
               Case("full", 2, compiled=True), Case("lora", 2, compiled=True),
               Case("lora", 2, "merged", compiled=True)]
    if world > 1:
        chosen += [Case("warmup", 2, overlap=True), Case("full", 1, overlap=True)]
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0, help="how long it may take")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="gpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the two files")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    if args.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"

    from prelora_ds.accelerator import choose_accelerator, gpu_count
    from prelora_ds.hosts.discovery import SOURCES
    from prelora_ds.hosts.mpi import discover_ranks, with_master_addr

    launched = any(source.is_present(os.environ) for source in SOURCES)
    choose_accelerator()
    if args.device == "gpu" and not gpu_count():
        sys.exit("error: there is no GPU here; --device cpu --tiny rehearses the benchmark on a CPU")
    options = {"model": TINY if args.tiny else VIT_LARGE, "tiny": args.tiny,
               "seconds": 60 * args.minutes * (1.0 if launched else 1 - CALIBRATION_SHARE)}
    if launched:
        found = on_this_rank(options, with_master_addr(discover_ranks(os.environ), None))
    else:
        found = on_this_host(options, max(1, gpu_count()))
    if found is None:  # another rank than the first
        return

    rows, facts, longest = found["rows"], found["facts"], found["longest"]
    print_table([{key: value for key, value in row.items() if key != "case"} for row in rows],
                f"{facts['device']}, {facts['ranks']} ranks, micro-batch {facts['micro_batch']}")
    print_table([facts], "The machine")
    for phase, kernels in longest.items():
        print_table(kernels, f"The longest kernels of a step, {phase}")
    decided = decisions(rows)
    for name, why in decided.items():
        print(f"{name}: {why}")
    for name in found["left out"]:
        print(f"not measured, because the time was over: {name}")

    name = "gpu_" + re.sub(r"[^A-Za-z0-9]+", "-", facts["device"]).strip("-").lower()
    path = record(name, {"decisions": decided, **facts}, rows, folder=args.out,
                  notes="Medians over steps. One case ran after the other. left out: " + ", ".join(found["left out"]))
    print(f"results: {path}")
    if not launched:
        rates = calibrated(options, max(1, gpu_count()), args.out / f"{name}_rates.json")
        print(f"calibration for machine.calibration: {rates}")
    print(f"{time.monotonic() - begun:.0f} s")


def on_this_host(options: Mapping[str, Any], world: int) -> dict[str, Any] | None:
    """Measure on ``world`` ranks of this host."""
    from ranks import Ranks, free_port

    from prelora_ds.hosts.discovery import Ranks as Place

    if world == 1:
        return on_this_rank(options, Place(0, 0, 1, 1, "127.0.0.1", free_port()))
    from gpu_ranks import measure

    ranks = Ranks(measure, dict(options), listed(world, options), world=world)
    found: dict[str, Any] = ranks.gather()[0]
    ranks.join()
    return found


def on_this_rank(options: Mapping[str, Any], ranks: Place) -> dict[str, Any] | None:
    """Measure on all ranks, of which this process is one; returns the result on rank 0 only."""
    import torch
    from gpu_ranks import measure

    from prelora_ds.engine.runtime import init_process_group

    ranks.export(os.environ)
    init_process_group()
    found = measure(None, dict(options), listed(ranks.world_size, options))
    torch.distributed.destroy_process_group()
    return found if ranks.rank == 0 else None


def listed(world: int, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the cases as values that a pipe carries."""
    return [asdict(case) for case in cases(world, tiny=options["tiny"])]


def decisions(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what the measurements would decide, and why."""
    ms = {Case(**row["case"]): row["step ms"] for row in rows}
    decided = {}
    for setting, kept, label, phase, usual, other in (
            ("lora.mode", "branch", "merged", "lora", Case("lora", 2), Case("lora", 2, "merged")),
            ("overlap_comm", "false", "true", "full", Case("full", 2), Case("full", 2, overlap=True)),
            ("train.reduce_dtype", "fp32", "bf16", "full", Case("full", 2, overlap=True),
             Case("full", 2, overlap=True, reduce="bf16")),
            ("model.compile, full", "false", "true", "full", Case("full", 2), Case("full", 2, compiled=True)),
            ("model.compile, lora", "false", "true", "lora", Case("lora", 2), Case("lora", 2, compiled=True))):
        if usual in ms and other in ms:
            chosen = label if ms[other] < ms[usual] * (1 - WORTH_IT) else kept
            decided[setting] = (f"{chosen} (a {phase} step takes {ms[other]:.1f} ms with {label}, {ms[usual]:.1f} ms "
                                f"with {kept})")
    stages = {case.stage: value for case, value in ms.items() if case == Case("lora", case.stage)}
    if stages:
        best = min(stages, key=lambda stage: stages[stage])
        listed = ", ".join(f"{value:.1f} ms at {stage}" for stage, value in sorted(stages.items()))
        decided["phases.lora.zero_stage"] = f"{best} ({listed})"
    return decided


def calibrated(options: Mapping[str, Any], ranks: int, path: Path) -> Path:
    """Write a calibration of this host with ``ranks`` ranks to ``path``."""
    from gpu_ranks import config_of

    from prelora_ds.run.calibrate import calibrate

    micro = 4 if options["tiny"] else LARGEST_MICRO_BATCH // 4
    result = calibrate(config_of(options["model"], Case("full", 2), micro, 1), ranks)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
