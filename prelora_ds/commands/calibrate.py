"""`prelora calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prelora_ds.commands.options import DeepspeedConfig, Overrides, Recipe
from prelora_ds.commands.output import save_json, tell


def calibrate(
    recipe: Recipe,
    out: Annotated[Path, typer.Argument(help="JSON file to write", show_default=False)],
    overrides: Overrides = None,
    deepspeed_config: DeepspeedConfig = None,
    ranks: Annotated[int, typer.Option(min=1, help="number of ranks that train on one host")] = 1,
) -> None:
    """Time a few steps of RECIPE's blocks on this machine and write OUT, for `prelora plan --calibration OUT`.

    Example: prelora calibrate launch/recipes/vit_large_in1k_prelora_exp1.yaml rates.json --ranks 4
    """
    from prelora_ds.config.load import load_config
    from prelora_ds.run.calibrate import calibrate as measure

    result = measure(load_config(recipe, overrides or [], deepspeed_config, recipe_key="RECIPE"), ranks)
    save_json(out, result, "OUT")
    for row in result["samples"]:
        tell(f"{row['phase']:7} batch {row['micro_batch_size']:4} rank {row['lora_rank']:3} x {row['accum']}: "
             f"measured {row['measured_s']:.4f} s, fitted {row['fitted_s']:.4f} s")
