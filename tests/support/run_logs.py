"""Folders of runs that were never trained, with all that a run may log."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prelora_ds.config.load import dump_yaml, load_config
from prelora_ds.run.folder import RunFolder

ROOT = Path(__file__).parents[2]
FAMILIES = {"q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "o": "attention.o_proj",
            "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
OWNERS = ("weights", "gradients", "masters", "moments", "buffers", "host")


@dataclass(frozen=True)
class Logs:
    """A run of three phases, each a third of it.

    epochs, rows: of the run, and logged rows per epoch; each row stands for ``every`` steps.
    stop: the epoch after which the logs end, for a run that has not finished.
    more: whether the newer columns (norms of W and of s*B*A apart, peak memory) are logged.
    """

    epochs: int = 12
    rows: int = 3
    every: int = 1
    layers: int = 2
    shift: float = 0.0
    stop: int | None = None
    more: bool = True
    norms_in_every_row: bool = False

    @property
    def steps(self) -> int:
        return self.epochs * self.rows * self.every

    @property
    def switches(self) -> tuple[int, int]:
        third = self.epochs // 3 * self.rows * self.every
        return third, 2 * third

    def phase(self, step: int) -> str:
        return ("full", "warmup", "lora")[sum(step > switch for switch in self.switches)]

    def norms(self, step: int) -> dict[str, dict[int, float]]:
        return {family: {layer: 2 + number + layer / 10 + self.shift + math.log1p(step) / 10
                         for layer in range(self.layers)} for number, family in enumerate(FAMILIES)}

    def metrics(self) -> Iterator[dict[str, Any]]:
        for epoch in range(self.epochs if self.stop is None else self.stop):
            for row in range(self.rows):
                step = (epoch * self.rows + row + 1) * self.every
                last = row == self.rows - 1
                columns: dict[str, Any] = {"step": step, "epoch": step / (self.rows * self.every),
                                           "phase": self.phase(step)}
                if last:
                    columns |= {"val/acc1": 1 - 1 / (2 + epoch) - self.shift / 100, "val/acc5": 0.99,
                                "val/loss": 2 / (1 + epoch)}
                if last or self.norms_in_every_row:
                    norms = self.norms(step)
                    kinds = {"norm": 1.0} | ({"norm_base": 0.9, "norm_adapter": 0.1} if self.more else {})
                    columns |= {f"{kind}/{family}.{layer:02d}": norm * factor for kind, factor in kinds.items()
                                for family, layers in norms.items() for layer, norm in layers.items()}
                if self.more:
                    columns |= {"peak_gib": 1.5 - 0.5 * (self.phase(step) == "lora"), "train/acc1": 0.5,
                                "train/acc5": 0.8}
                yield columns | {"lr": 1e-3 * (1 - step / self.steps), "grad_norm": 1.0,
                                 "train/loss": 2.5 - math.log1p(step) / 4 + 0.05 * (step % 2) + self.shift,
                                 "step_s": 0.5, "data_s": 0.125, "img_s": 150.0,
                                 "data/corrupt": int(step == self.every)}

    def plans(self) -> Iterator[dict[str, Any]]:
        adapters = {f"vit.layers.{layer}.{path}": {"kind": "lora", "rank": 4 << (layer % 3), "scaling": 1.0, "seed": 0,
                                                   "options": {}}
                    for layer in range(self.layers) for path in FAMILIES.values()}
        for name, begins, reason, trainable in (("full", 0, "training begins in phase full", 1000),
                                                ("warmup", self.switches[0], "Algorithm 1 passed at test 3", 1200),
                                                ("lora", self.switches[1], "phase warmup has lasted 4 epochs", 200)):
            if self.stop is not None and begins >= self.stop * self.rows * self.every:
                return
            yield {"event": "plan", "step": begins, "phase": name, "reason": reason, "trainable_parameters": trainable,
                   "all_parameters": 1200, "switch": None if begins == 0 else {"seconds": 1.5, "released_bytes": 5},
                   "plan": {"phase": name, "trainable": [], "adapters": {} if name == "full" else adapters,
                            "lr_scale": {}, "active": None, "since_step": begins, "cycle": 0}}
            owned = {owner: trainable * 2**14 for owner in OWNERS}
            yield {"event": "bytes", "step": begins + 1, "phase": name, "predicted": owned,
                   "measured": owned | {"other": 7}, "worst_deviation": 0.0}

    def windows(self) -> Iterator[dict[str, Any]]:
        for index, epoch in enumerate(range(2, (self.epochs if self.stop is None else self.stop) + 1, 2)):
            step = epoch * self.rows * self.every
            norms = {family: {str(layer): norm for layer, norm in layers.items()}
                     for family, layers in self.norms(step).items()}
            yield {"phase": self.phase(step), "index": index, "last_step": step, "loss": 2.5 - math.log1p(step) / 4,
                   "norms": norms, "tests": index, "verdict": None}


def write_logs(path: Path, logs: Logs = Logs(), *overrides: str, events: tuple[dict[str, Any], ...] = (),
               recipe: str = "digits_demo") -> RunFolder:
    """Write config and logs of a run; ``events``: further ones, before the end."""
    folder = RunFolder(path)
    path.mkdir(parents=True)
    config = load_config(ROOT / f"launch/recipes/{recipe}.yaml",
                         [f"run.output_dir={path}", f"train.duration='{logs.epochs} epochs'", *overrides])
    folder.config.write_text(dump_yaml(config))
    end = {"event": "end", "step": logs.steps, "peak_rss_bytes": [2**30, 2**31], "updates": {}, "data": {}}
    every = sorted([*logs.plans(), *events], key=lambda event: event["step"]) + ([end] if logs.stop is None else [])
    for file, rows in ((folder.metrics, logs.metrics()), (folder.events, iter(every)),
                       (folder.windows, logs.windows())):
        with file.open("w") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def events_of_methods(logs: Logs) -> tuple[dict[str, Any], ...]:
    """Merges, choices of adapters, a resume and a straggler, in the LoRA phase of ``logs``."""
    begins, quarter = logs.switches[1], logs.switches[0] // 4
    q, fc1 = (f"vit.layers.{{}}.{FAMILIES[family]}" for family in ("q", "fc1"))
    events: list[dict[str, Any]] = [
        {"event": "resume", "step": 10 * logs.every, "checkpoint": "step-00000010", "world_size": 2, "zero_stage": 2},
        {"event": "straggler", "step": 20 * logs.every, "rank": 1, "host": "n2", "what": "forward", "seconds": 0.3,
         "usual": 0.1, "windows": 1}]
    for number in range(4):
        step = begins + number * quarter
        events.append({"event": "merge", "step": step, "cycle": number, "rule": "zero", "reset_share": 0.9,
                       "output_change": 0.01 * number})
        events.append({"event": "active", "step": step, "updates": {q.format(0): number * quarter, fc1.format(1): 1},
                       "adapters": [q.format(number % 2), fc1.format(1)]})
    return tuple(events)
