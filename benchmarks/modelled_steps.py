"""Print the table of modelled steps for docs/first-gpu.md. Nothing is measured.

    python benchmarks/modelled_steps.py

Milliseconds of an optimizer step of ViT-L/16 at ZeRO 2 with one micro-batch of 64 per rank, from data sheets
(`cost.timing`), with gradients that are sent during the backward pass.
"""

from __future__ import annotations

from gpu import LARGEST_MICRO_BATCH, VIT_LARGE, Case
from gpu_ranks import candidate

from prelora_ds.cost.timing import data_sheet_rates

SHOWN = ("A100-40", "H100", "GH200", "MI250X")
RANKS_PER_HOST = 4
HOSTS = (1, 16)
PHASES = {"full": Case("full", 2, overlap=True), "warm-up": Case("warmup", 2, overlap=True),
          "LoRA, branch": Case("lora", 2, overlap=True), "LoRA, merged": Case("lora", 2, "merged", overlap=True)}


def table() -> str:
    """Return the table in Markdown."""
    lines = [f"| modelled, ms per step | ranks | {' | '.join(PHASES)} |", f"|---|---:|{'---:|' * len(PHASES)}"]
    for hosts in HOSTS:
        world = hosts * RANKS_PER_HOST
        work = {name: candidate(VIT_LARGE, case, LARGEST_MICRO_BATCH, world).work for name, case in PHASES.items()}
        for gpu in SHOWN:
            rates = data_sheet_rates(gpu, hosts=hosts)
            ms = [f"{1e3 * rates.step_seconds(each, RANKS_PER_HOST):.0f}" for each in work.values()]
            lines.append(f"| {gpu} | {world} | {' | '.join(ms)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
