from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import altair
import pytest
from support.run_logs import Logs, events_of_methods, write_logs

from prelora_ds.reporting.report.figure import COLORS, Figure, Table
from prelora_ds.reporting.report.figures import LeftOut, active_adapters, all_figures
from prelora_ds.reporting.report.reading import read_run
from prelora_ds.reporting.report.run import Run
from prelora_ds.run.log import read_lines

LOGS = Logs()
POINTS = 6000


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("runs")
    a = write_logs(folder / "a", LOGS, events=events_of_methods(LOGS))
    b = write_logs(folder / "b", Logs(shift=0.2), "run.seed=1")
    return [read_run(a, "a"), read_run(b, "b")]


def made(runs: list[Run]) -> dict[str, Figure]:
    return {figure.name: figure for figure in all_figures(runs, POINTS) if isinstance(figure, Figure)}


OF_ONE_RUN = ["weight_norms", "loss_over_step", "loss_over_hours", "accuracy_over_step", "accuracy_over_hours",
              "norms_by_layer", "norms_apart", "phases", "throughput", "data_wait", "state_memory", "ranks", "changes",
              "learning_rate"]


def test_a_run_of_three_phases_has_14_figures_and_those_of_its_methods(runs: list[Run]) -> None:
    assert list(made(runs[1:])) == OF_ONE_RUN
    assert list(made(runs[:1])) == [*OF_ONE_RUN, "relora_cycles", "active_adapters"]
    both = made(runs)
    assert "loss_over_step" in both and {"ranks_1", "ranks_2", "relora_cycles_1"} <= both.keys()
    assert "relora_cycles_2" not in both


def test_the_docs_list_every_figure(runs: list[Run]) -> None:
    text = (Path(__file__).parents[4] / "docs/reports.md").read_text()
    rows = "".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    assert re.findall(r"`(\w+)`", rows) == [*OF_ONE_RUN, "relora_cycles", "active_adapters"]


def test_every_view_is_valid_vega_lite(runs: list[Run]) -> None:
    """The schema is Vega-Lite's own. It refuses unknown keys, which a browser would ignore."""
    one, both = made(runs[:1]), made(runs)
    views = [figure.for_page()[0] for figure in [*one.values(), both["weight_norms"], both["phases"]]]
    for spec in [*views, one["ranks"].for_file(), one["changes"].for_file()]:  # each takes a quarter of a second
        altair.Chart.from_dict(json.loads(json.dumps(spec)))  # raises SchemaValidationError


def test_the_data_of_a_figure_are_those_of_the_log(runs: list[Run]) -> None:
    rows = read_lines(runs[0].folder.metrics)
    losses = made(runs[:1])["loss_over_step"].data
    assert losses.columns == ("run", "curve", "step", "hours", "loss")
    assert [(row[2], row[4]) for row in losses.rows] == [(row["step"], row["train/loss"]) for row in rows]
    assert losses.csv().splitlines()[1].split(",")[-1] == repr(rows[0]["train/loss"])
    norms = made(runs[:1])["norms_by_layer"].data
    assert len(norms.rows) == LOGS.epochs * LOGS.layers * 6
    assert [row[-1] for row in norms.rows if row[1] == "fc1.01"] == [
        row["norm/fc1.01"] for row in rows if "norm/fc1.01" in row]


def test_page_and_file_draw_the_same_panels(runs: list[Run]) -> None:
    for figure in made(runs).values():
        of_file = figure.for_file()
        views = of_file["concat"] if len(figure.panels) > 1 else [of_file]
        for panel, view, of_page in zip(figure.panels, views, figure.for_page(), strict=True):
            assert view["data"] == of_page["data"] == panel.spec["data"]
            drawn = [layer["mark"] for layer in view.get("layer", [view])]
            assert [layer["mark"] for layer in of_page.get("layer", [of_page])][: len(drawn)] == drawn


def layers(figure: Figure, mark: str) -> list[dict[str, Any]]:
    return [layer for layer in figure.panels[0].spec["layer"] if layer["mark"]["type"] == mark]


def test_phases_are_bands_switches_rules_with_their_step_and_resumes_ticks(runs: list[Run]) -> None:
    for name, second in (("loss_over_step", 24), ("loss_over_hours", runs[0].hours_at(24))):
        figure = made(runs[:1])[name]
        [band] = layers(figure, "rect")
        assert [(row["phase"], row["end"]) for row in band["data"]["values"]] == [("warmup", second)]
        [rule] = layers(figure, "rule")
        assert [row["label"] for row in rule["data"]["values"]] == ["warmup @ 12", "lora @ 24"]
        labels = [row["label"] for text in layers(figure, "text") for row in text["data"]["values"]]
        assert sorted(labels) == ["lora @ 24", "warmup @ 12"]
        [tick] = layers(figure, "point")
        assert len(tick["data"]["values"]) == 1
    overlaid = made(runs)["loss_over_step"]
    assert layers(overlaid, "rect") == []  # the bands of two runs would cover each other
    assert [rule["mark"]["color"] for rule in layers(overlaid, "rule")] == list(COLORS[:2])


def test_runs_differ_by_color_and_families_of_two_runs_by_color_and_dash(runs: list[Run]) -> None:
    [curves] = layers(made(runs)["loss_over_step"], "line")
    assert curves["encoding"]["color"]["scale"] == {"domain": ["a", "b"], "range": list(COLORS[:2])}
    [curves] = layers(made(runs)["weight_norms"], "line")
    assert curves["encoding"]["color"]["scale"]["domain"] == ["q", "k", "v", "o", "fc1", "fc2"]
    dashes = curves["encoding"]["strokeDash"]["scale"]["range"]
    assert len({tuple(dash) for dash in dashes}) == 2


def test_a_figure_has_no_more_points_than_its_share(runs: list[Run]) -> None:
    for figure in all_figures(runs, 60):
        if isinstance(figure, Figure) and figure.data.columns[:2] == ("run", "curve"):
            counts: dict[tuple[Any, ...], int] = {}
            for row in figure.data.rows:
                counts[tuple(row[:2])] = counts.get(tuple(row[:2]), 0) + 1
            assert max(counts.values()) <= 60 and len(figure.data.rows) <= max(2 * 60, 8 * len(counts)), figure.name


def test_thresholds_are_those_of_the_config(runs: list[Run]) -> None:
    norms, loss = made(runs[:1])["changes"].panels
    for panel, labels in ((norms, ["tau +1 %", "tau -1 %"]), (loss, ["zeta +5 %", "zeta -5 %"])):
        rules = [layer for layer in panel.spec["layer"] if layer["mark"]["type"] == "rule"][-1]
        assert [row["label"] for row in rules["data"]["values"]] == labels


def test_a_choice_of_adapters_counts_until_the_next_one(runs: list[Run]) -> None:
    figure = active_adapters(runs[0], "", POINTS)
    assert isinstance(figure, Figure)
    shares: dict[tuple[Any, Any], float] = {}
    for family, layer, first, last, share in figure.data.rows:
        assert 24 <= first <= last <= 36 and 0 <= share <= 1  # type: ignore[operator]
        shares[family, layer] = shares.get((family, layer), 0.0) + share / 12  # type: ignore[operator]
    # q of layer 0 trains after the choices at steps 24 and 30, q of layer 1 after those at 27 and 33
    assert shares == {("fc1", 1): pytest.approx(1.0), ("q", 0): pytest.approx(0.5), ("q", 1): pytest.approx(0.5)}


@pytest.mark.parametrize(("columns", "missing"), [
    (("norm_base",), "Norms of weights and adapters apart"), (("norm", "norm_base"), "Weight norms per family"),
    (("val/acc1",), "Top-1 accuracy over steps"), (("img_s",), "Throughput over steps"),
    (("data_s",), "Waiting for data"), (("lr",), "Learning rate"), (("train/loss",), "Training loss over hours"),
])
def test_a_figure_whose_columns_are_missing_is_left_out_with_a_sentence(
    tmp_path: Path, columns: tuple[str, ...], missing: str
) -> None:
    folder = write_logs(tmp_path / "run", LOGS)
    rows = [{key: value for key, value in row.items() if key not in columns and key.partition("/")[0] not in columns}
            for row in read_lines(folder.metrics)]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    left_out = {figure.title: figure.why for figure in all_figures([read_run(folder, "run")], POINTS)
                if isinstance(figure, LeftOut)}
    assert missing in left_out and left_out[missing].endswith(".")


def test_short_numbers_are_for_the_page_and_exact_ones_for_the_file() -> None:
    table = Table(("run", "step", "value"), [("a, b", 123456789, 0.123456789), ("c", 1, None)])
    assert table.csv() == 'run,step,value\n"a, b",123456789,0.123456789\nc,1,\n'
    assert table.csv(5) == 'run,step,value\n"a, b",123456789,0.12346\nc,1,\n'
