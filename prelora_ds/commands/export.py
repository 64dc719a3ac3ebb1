"""`prelora export`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from prelora_ds.commands.output import refuse_url, tell


def export(
    run_or_checkpoint: Annotated[Path, typer.Argument(help="output folder of a run, or one of its checkpoints",
                                                      show_default=False)],
    out: Annotated[Path, typer.Argument(help="new folder to write", show_default=False)],
    export_format: Annotated[str, typer.Option("--format", help="hf, peft, timm or deepspeed")] = "hf",
    base: Annotated[str, typer.Option("--base", help="frozen weights as training saw them (seen), or in fp32 (fp32)")
                    ] = "seen",
) -> None:
    """Convert a checkpoint (default: the run's newest) to OUT for transformers, peft, timm or DeepSpeed.

    Example: prelora export out/digits_demo exported --format timm
    """
    refuse_url(out, "OUT")
    from prelora_ds.accelerator import choose_accelerator

    # An export only moves values, and a login node may have a GPU that torch cannot use.
    os.environ["DS_ACCELERATOR"] = "cpu"
    choose_accelerator()
    from prelora_ds.exporting.convert import export_checkpoint

    folder = export_checkpoint(run_or_checkpoint, out, export_format, base)
    tell(f"{out}: {folder} as {export_format}")
