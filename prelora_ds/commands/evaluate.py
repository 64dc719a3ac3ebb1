"""`prelora evaluate`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from prelora_ds.commands.output import save_json, tell


def evaluate(
    model: Annotated[Path, typer.Argument(help="folder of an exported model, such as RUN/model", show_default=False)],
    data: Annotated[Path, typer.Option(help="folder of shards to evaluate on")],
) -> None:
    """Evaluate an exported MODEL folder (top-1), loaded through transformers, and write accuracy.json into it."""
    from prelora_ds.core.codec import to_json
    from prelora_ds.run.evaluate import evaluate_folder
    from prelora_ds.run.folder import ACCURACY

    result = evaluate_folder(model, data)
    save_json(model / ACCURACY, {"acc1": result.acc1, **to_json(result)}, "MODEL")
    tell(f"{model} on {data}: {result.correct} of {result.samples} correct ({result.acc1:.2%})")
    if not math.isfinite(result.loss):
        typer.echo(f"warning: some logits of {model} are not finite; such images count as wrong", err=True)
