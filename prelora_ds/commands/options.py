"""Arguments and options that several commands have, each with one name, one meaning and one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[Path, typer.Argument(help="YAML file, e.g. from launch/recipes/", show_default=False)]

Overrides = Annotated[list[str] | None, typer.Argument(
    metavar="[KEY=VALUE]...", show_default=False,
    help="overrides of recipe keys, such as train.duration='10 epochs'")]

# launch/pretrain.py and DeepSpeed write such options with underscores: both spellings are accepted.
DeepspeedConfig = Annotated[Path | None, typer.Option(
    "--deepspeed-config", "--deepspeed_config", show_default=False,
    help="DeepSpeed JSON, such as ds_configs/zero2.json (default: ZeRO stage 0)")]

AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
