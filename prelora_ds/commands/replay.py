"""`prelora replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prelora_ds.commands.options import AsJson
from prelora_ds.commands.output import print_json
from prelora_ds.errors import ConfigError


def replay(
    output: Annotated[Path, typer.Argument(metavar="RUN", help="output folder of a run", show_default=False)],
    tau: Annotated[str | None, typer.Option(
        help="thresholds of weight norms in per cent, such as 0.5,1", show_default=False)] = None,
    zeta: Annotated[str | None, typer.Option(
        help="thresholds of the loss in per cent, such as 2.5,5", show_default=False)] = None,
    k: Annotated[int | None, typer.Option(min=2, help="how many windows are compared", show_default=False)] = None,
    m: Annotated[int | None, typer.Option(min=1, help="observations per window", show_default=False)] = None,
    every: Annotated[str | None, typer.Option(
        help="as if observed so often, such as '2 epochs'; a multiple of the log's", show_default=False)] = None,
    suggest: Annotated[float | None, typer.Option(
        min=0.0, max=1.0, help="find thresholds that pass at this share of the run", show_default=False)] = None,
    test: Annotated[str | None, typer.Option(
        help="another test in place of the run's own: prelora, t_test, fixed, budget or stable_rank",
        show_default=False)] = None,
    parameters: Annotated[list[str] | None, typer.Option(
        "--set", metavar="KEY=VALUE,...", show_default=False,
        help="values of a parameter of the test, such as alpha=0.01,0.05; may be repeated")] = None,
    ranks: Annotated[str | None, typer.Option(
        help="another rule for ranks in place of the run's own, as in a recipe, such as '{rule: energy, share: 0.9}'",
        show_default=False)] = None,
    csv: Annotated[bool, typer.Option("--csv", help="print the grid as CSV instead of tables")] = False,
    json: AsJson = False,
) -> None:
    """Decide again, from the log of RUN, when its phases would have ended: with its own tests, or with others.

    Several values of a parameter make a grid. The parameters of each test are in docs/config.md, phases.*.until.

    Example: prelora replay out/digits_demo --test t_test --set alpha=0.01,0.05 --set m=5
    """
    from prelora_ds.config.fields import parse_duration, parse_numbers
    from prelora_ds.config.named_tests import parse_parameters, parse_rank_rule
    from prelora_ds.reporting.replay import Settings, read_logged, replayed
    from prelora_ds.reporting.replay_table import grid_as_csv, print_replay
    from prelora_ds.run.folder import RunFolder

    if csv and json:
        raise ConfigError("--csv", True, "and --json exclude each other", "choose one of them")
    given = {"tau": parse_numbers(tau, "--tau"), "zeta": parse_numbers(zeta, "--zeta"),
             "k": None if k is None else (k,), "m": None if m is None else (m,)}
    values = {key: each for key, each in given.items() if each is not None}
    settings = Settings(test, parse_parameters(parameters or [], values), parse_duration(every, "--every"), suggest,
                        parse_rank_rule(ranks))
    result = replayed(read_logged(RunFolder(output)), settings)
    if json:
        print_json(result)
    elif csv:
        typer.echo(grid_as_csv(result), nl=False)
    else:
        print_replay(result)
