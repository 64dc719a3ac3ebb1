"""`prelora evaluate`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from prelora_ds.commands.options import AsJson
from prelora_ds.commands.output import print_json, save_json, tell


def evaluate(
    model: Annotated[Path, typer.Argument(help="folder of an exported model, such as RUN/model", show_default=False)],
    data: Annotated[Path, typer.Option(help="folder of shards to evaluate on")],
    json: AsJson = False,
) -> None:
    """Evaluate an exported MODEL folder (top-1 and top-5), loaded through transformers.

    Writes accuracy.json into it, and the result into the metadata of its README.md. With at most five classes only
    top-1 is measured.

    Example: prelora evaluate out/digits_demo/model --data data/digits/val
    """
    from prelora_ds.core.codec import to_json
    from prelora_ds.data.manifest import data_name
    from prelora_ds.exporting.card import CARD, record_accuracy
    from prelora_ds.run.accuracy import read_accuracy
    from prelora_ds.run.evaluate import evaluate_folder
    from prelora_ds.run.folder import ACCURACY

    result = evaluate_folder(model, data)
    shares = {"acc1": result.acc1} if result.acc5 is None else {"acc1": result.acc1, "acc5": result.acc5}
    # The folder may be published, so the file names the data without the path to them.
    content = {**shares, **to_json(result), "data": data_name(str(data.absolute()))}
    save_json(model / ACCURACY, content, "MODEL")
    try:
        record_accuracy(model, read_accuracy(model / ACCURACY))
    except (OSError, ValueError) as exc:
        typer.echo(f"warning: the result could not be written into {model / CARD}: {exc}", err=True)
    top5 = "" if result.acc5 is None else f", {result.correct5} among the first five ({result.acc5:.2%})"
    if json:
        print_json(content)
    else:
        tell(f"{model} on {data}: {result.correct} of {result.samples} correct ({result.acc1:.2%}){top5}")
    if not math.isfinite(result.loss):
        typer.echo(f"warning: some logits of {model} are not finite; such images count as wrong", err=True)
