"""Draw the figures of docs/results.md from the runs of the study.

    python benchmarks/study_figures.py

Each figure is one of `prelora report`, drawn from runs in out/study and copied to docs/results. Runs of seed 0 are
shown: the other seeds are in the table, as means with intervals.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import ROOT
from study_settings import FASHION

TARGET = ROOT / "docs/results"
# The settings of a report -> the name of each figure that is taken from it -> its name here.
REPORTS: dict[tuple[str, ...], dict[str, str]] = {
    ("full", "exp1", "exp2", "exp3"): {
        "weight_norms": "figure_1a", "loss_over_step": "figure_1b", "accuracy_over_step": "figure_4",
        "phases": "figure_7"},
    ("full", "w5", "exp1", "w15"): {"accuracy_over_step": "figure_5", "norms_apart": "figure_6"},
    ("exp1",): {"norms_by_layer": "figure_3"},
    ("relora",): {"relora_cycles": "figure_8"},
}


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    for names, wanted in REPORTS.items():
        runs = [FASHION.out / f"{name}-0" for name in names if (FASHION.out / f"{name}-0/model").exists()]
        if len(runs) < len(names):
            print(f"not all of {', '.join(names)} have finished: {', '.join(wanted.values())} left out")
            continue
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report"
            subprocess.run([sys.executable, "-m", "prelora_ds.cli", "report", *map(str, runs), "--out", str(report)],
                           cwd=ROOT, check=True)
            for drawn, name in wanted.items():
                shutil.copyfile(report / f"figures/{drawn}.svg", TARGET / f"{name}.svg")


if __name__ == "__main__":
    main()
