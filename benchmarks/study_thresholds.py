"""Find out by replay where Algorithm 1 would end the full runs of the study, for a grid of thresholds.

    python benchmarks/study_thresholds.py

It reads the logs of the full runs in out/study, and trains nothing. A window of m = 3 observations is 1 % of a run.
"""

from __future__ import annotations

import sys
from itertools import product
from statistics import mean

from harness import print_table, record
from study_settings import FASHION

from prelora_ds.reporting.replay import Settings, read_logged, replayed
from prelora_ds.run.folder import RunFolder

TAU = (2.0, 1.0, 0.5, 0.25, 0.1)
ZETA = (100.0, 5.0, 2.5, 1.0)  # the first never holds a switch back
M = (1, 3, 9)


def main() -> None:
    runs = sorted(path for path in FASHION.out.glob("full-*") if (path / "model").exists())
    if not runs:
        sys.exit(f"{FASHION.out} has no full run that has finished; make study begins with them")
    logs = [read_logged(RunFolder(path)) for path in runs]
    steps: dict[tuple[int, float, float], list[int]] = {key: [] for key in product(M, TAU, ZETA)}
    for log, m in product(logs, M):
        found = replayed(log, Settings("prelora", {"tau": TAU, "zeta": ZETA, "k": (3,), "m": (m,)}))
        for row in found["grid"]:
            if row["step"] is not None:
                steps[m, row["tau"], row["zeta"]].append(row["step"])
    rows = [{"m": m, "tau, %": tau, "zeta, %": zeta, "runs that switch": len(at),
             "switch, share of the run": round(mean(at) / FASHION.steps, 3) if at else None,
             "first": min(at, default=None), "last": max(at, default=None)} for (m, tau, zeta), at in steps.items()]
    print_table(rows, f"Algorithm 1 with k = 3 on {len(runs)} full runs of {FASHION.steps} steps")
    record("study_thresholds", {"runs": len(runs)}, rows, "first, last: the step of the first and of the last switch.")


if __name__ == "__main__":
    main()
