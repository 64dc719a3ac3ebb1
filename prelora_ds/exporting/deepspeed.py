"""Write a checkpoint as DeepSpeed's own folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from prelora_ds.config.phases import PhaseSettings
from prelora_ds.config.tree import Config
from prelora_ds.core.layout import Layout
from prelora_ds.run.checkpoints.resume import Checkpoint

_ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def write_deepspeed(
    config: Config, classes: Sequence[str], layout: Layout, checkpoint: Checkpoint, folder: Path
) -> None:
    """Write ``checkpoint`` to ``folder`` as DeepSpeed does for one rank at stage 2, with the moments.

    Raises OSError or RuntimeError.
    """
    from prelora_ds.engine.build import build_engine
    from prelora_ds.engine.release import release
    from prelora_ds.engine.runtime import init_process_group

    for key, value in _ONE_RANK.items():
        os.environ.setdefault(key, value)
    init_process_group()
    # Use stage 2: DeepSpeed 0.19's stage 1 optimizer for BF16 writes neither its stage nor what is
    # frozen, and zero_to_fp32.py needs both. Use the kernel "branch": a merged weight would include
    # the adapters that are stored next to it.
    phase = checkpoint.run.phase.plan.phase
    settings = PhaseSettings(micro_batch_size=config.train.global_batch_size, zero_stage=2)
    export_config = config.with_settings(phase, settings).with_kernel("branch")
    engine = build_engine(
        export_config,
        checkpoint.run.phase.plan,
        layout,
        len(classes),
        checkpoint.engine,
        checkpoint.counters,
    )
    state = {"classes": list(classes)}
    engine.ds.save_checkpoint(str(folder), tag=checkpoint.folder.name, client_state=state)
    release(engine)
