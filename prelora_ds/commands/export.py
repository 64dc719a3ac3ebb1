"""`prelora export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prelora_ds.commands.output import refuse_url, tell


def export(run_or_checkpoint: Path, out: Path,
           format: Annotated[str, typer.Option(help="hf, peft, timm or deepspeed")] = "hf") -> None:
    """Write a checkpoint (of a run its newest) to OUT, for transformers, peft, timm or DeepSpeed."""
    refuse_url(out, "OUT")
    from prelora_ds.engine.runtime import choose_accelerator

    choose_accelerator()
    from prelora_ds.exporting.convert import export_checkpoint

    folder = export_checkpoint(run_or_checkpoint, out, format)
    tell(f"{out}: {folder} as {format}")
