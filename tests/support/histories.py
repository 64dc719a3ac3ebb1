"""Folders of runs that were never trained: a config and logs with measurements as a test wants them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from prelora_ds.config.load import dump_yaml, load_config
from prelora_ds.config.tree import Config
from prelora_ds.core.codec import to_json
from prelora_ds.core.layout import Layout
from prelora_ds.core.schedule import Timeline
from prelora_ds.core.switch_tests.prelora import Observation
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.setup_record import SetupRecord, write_setup

ROOT = Path(__file__).parents[2]


def settling(step: int, total: int) -> float:
    """Return a norm that grows fast at first, and ever slower to the end of the run."""
    return 100.0 + 50.0 * step / (step + total / 20)


def write_history(folder: RunFolder, recipe: str, *overrides: str, samples: int = 1_281_167, phase: str = "full",
                  norm: Callable[[int, int], float] = settling) -> tuple[Config, Layout]:
    """Write the run of a recipe whose norms follow ``norm(step, total)`` and whose loss falls the same way."""
    import torch

    from prelora_ds.model.families import find_layout
    from prelora_ds.model.vit import build_model

    config = load_config(ROOT / f"launch/recipes/{recipe}.yaml", [*overrides, f"run.output_dir={folder.path}"])
    with torch.device("meta"):
        layout = find_layout(build_model(config.model, 1000), config.families(), config.model.families)
    timeline = Timeline(samples, config.train.global_batch_size, config.train.duration)
    total = timeline.total_steps
    folder.path.mkdir(parents=True)
    folder.config.write_text(dump_yaml(config))
    write_setup(folder, SetupRecord(layout, samples, 4))

    observations, metrics, before = [], [], 0
    for step in sorted(timeline.ticks(config.observe.every)):
        value = norm(step, total)
        norms = {family: {layer: value + layer for layer in layers} for family, layers in layout.targets.items()}
        images = (step - before) * config.train.global_batch_size
        observations.append(to_json(Observation(step, images, 600 / value, norms)))
        metrics.append({"step": step, "epoch": timeline.epoch_at(step), "phase": phase, "train/loss": 600 / value,
                        "step_s": 0.5, "data_s": 0.01, "img_s": 8000.0})
        before = step
    folder.observations.write_text("".join(json.dumps(row) + "\n" for row in observations))
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in metrics))
    folder.events.write_text("")
    return config, layout
