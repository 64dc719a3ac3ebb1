from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.damage import mutations

from prelora_ds.errors import ConfigError
from prelora_ds.reporting.table import phase_rows, print_report
from prelora_ds.run.folder import RunFolder

KIB = 1024
PASSED = "Algorithm 1 passed at test 4: all |dW| <= 0.7341 % (tau 1 %), all |dL| <= 4.627 % (zeta 5 %)"


def step(number: int, phase: str, **more: Any) -> dict[str, Any]:
    return {"step": number, "epoch": number / 2, "phase": phase, "train/loss": 3 - number / 10,
            "step_s": number / 1000, "data_s": number / 5000, "img_s": 100.0, "lr": 1e-3, "grad_norm": 1.0} | more


def of(weights: int, gradients: int, masters: int, moments: int, **more: int) -> dict[str, int]:
    """Bytes, given in KiB."""
    owners = {"weights": weights, "gradients": gradients, "masters": masters, "moments": moments} | more
    return {owner: kib * KIB for owner, kib in owners.items()}


def plan(number: int, phase: str, trainable: int, reason: str, seconds: float | None = None) -> dict[str, Any]:
    switch = None if seconds is None else {"seconds": seconds, "released_bytes": 5}
    return {"event": "plan", "step": number, "phase": phase, "reason": reason, "trainable_parameters": trainable,
            "all_parameters": 9999, "switch": switch, "plan": {}}


METRICS = [
    *(step(n, "full") for n in (1, 2, 3)), step(4, "full", **{"val/acc1": 0.25, "val/loss": 2.0}),
    step(5, "warmup"), step(6, "warmup"),
    step(7, "lora"), step(8, "lora", **{"val/acc1": 0.5}), step(9, "lora"), step(10, "lora", **{"val/acc1": 0.6125}),
]
PLANS = [
    plan(0, "full", 1234567, "training begins with all parameters"),
    {"event": "bytes", "step": 3, "phase": "full", "worst_deviation": 0.0,
     "predicted": of(100, 200, 300, 4000, buffers=7), "measured": of(101, 202, 303, 4004, buffers=9, state=1, other=2)},
    plan(4, "warmup", 2345678, PASSED, 1.25),
    plan(6, "lora", 34567, "the warm-up of 3 epochs is over", 2.5),
    {"event": "bytes", "step": 9, "phase": "lora", "worst_deviation": 0.0,
     "predicted": of(110, 20, 30, 40, buffers=0), "measured": of(111, 21, 31, 41, buffers=0)},
]


def write(folder: Path, metrics: list[dict[str, Any]], plans: list[dict[str, Any]]) -> Path:
    for name, rows in (("metrics", metrics), ("events", plans)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write(tmp_path, METRICS, PLANS)


def printed(folder: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_report(RunFolder(folder), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def cells(text: str) -> dict[str, list[str]]:
    """Label -> cells of the table's lines."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    return {line[0]: line[1:] for line in lines}


def test_a_phase_goes_from_the_step_after_its_plan_to_the_step_of_the_next(run: Path) -> None:
    rows = phase_rows(RunFolder(run))
    assert [(r["phase"], r["first_step"], r["last_step"]) for r in rows] == [
        ("full", 1, 4), ("warmup", 5, 6), ("lora", 7, 10)]
    assert [r["epochs"] for r in rows] == [2.0, 1.0, 2.0]


def test_a_run_that_goes_on_from_another_has_only_its_own_steps(tmp_path: Path) -> None:
    began = {"event": "resume", "step": 8, "checkpoint": "step-00000008", "world_size": 2, "zero_stage": 2}
    [lora] = phase_rows(RunFolder(write(tmp_path, METRICS[8:], [began, PLANS[3], PLANS[4]])))
    assert (lora["first_step"], lora["last_step"], lora["epochs"]) == (9, 10, 1.0)


def test_times_losses_and_accuracy_are_of_the_phases_own_steps(run: Path) -> None:
    full, warmup, lora = phase_rows(RunFolder(run))
    assert [r["step_s"] for r in (full, warmup, lora)] == pytest.approx([.0025, .0055, .0085])
    assert [r["data_s"] for r in (full, warmup, lora)] == pytest.approx([.0005, .0011, .0017])
    assert [r["loss"] for r in (full, warmup, lora)] == pytest.approx([2.6, 2.4, 2.0])
    assert [r["acc1"] for r in (full, warmup, lora)] == [0.25, None, 0.6125]


def test_bytes_are_those_measured_under_the_phase_or_none(run: Path) -> None:
    full, warmup, lora = phase_rows(RunFolder(run))
    assert (full["predicted"], full["measured"]) == (PLANS[1]["predicted"], PLANS[1]["measured"])
    assert (warmup["predicted"], warmup["measured"]) == (None, None)
    assert (lora["predicted"], lora["measured"]) == (PLANS[4]["predicted"], PLANS[4]["measured"])


def test_reasons_and_switches_are_the_plans(run: Path) -> None:
    rows = phase_rows(RunFolder(run))
    assert [r["reason"] for r in rows] == ["training begins with all parameters", PASSED,
                                           "the warm-up of 3 epochs is over"]
    assert [r["switch_s"] for r in rows] == [None, 1.25, 2.5]
    assert [r["trainable_parameters"] for r in rows] == [1234567, 2345678, 34567]


def test_a_plan_that_begins_at_the_last_step_has_no_figures(tmp_path: Path) -> None:
    lora = phase_rows(RunFolder(write(tmp_path, METRICS[:6], PLANS[:4])))[-1]
    assert (lora["first_step"], lora["last_step"], lora["epochs"]) == (7, 6, 0.0)
    assert [lora[key] for key in ("predicted", "measured", "step_s", "data_s", "loss", "acc1")] == [None] * 6
    assert cells(printed(tmp_path))["training loss, last"] == ["2.6000", "2.4000", "-"]


def test_the_printed_table_holds_every_figure(run: Path) -> None:
    text = printed(run)
    assert text.splitlines()[0] == f"{run}: memory per rank at the end of a backward pass, predicted / measured"
    assert cells(text) == {
        "epochs": ["2.0", "1.0", "2.0"],
        "steps": ["1-4", "5-6", "7-10"],
        "trainable parameters": ["1,234,567", "2,345,678", "34,567"],
        "weights, KiB": ["100 / 101", "-", "110 / 111"],
        "gradients, KiB": ["200 / 202", "-", "20 / 21"],
        "masters, KiB": ["300 / 303", "-", "30 / 31"],
        "moments, KiB": ["4,000 / 4,004", "-", "40 / 41"],
        "sum of these, KiB": ["4,600 / 4,610", "-", "200 / 204"],
        "step, ms (median)": ["2.5", "5.5", "8.5"],
        "waiting for data, ms": ["0.5", "1.1", "1.7"],
        "training loss, last": ["2.6000", "2.4000", "2.0000"],
        "validation top-1, last": ["25.00 %", "-", "61.25 %"],
    }


def test_below_the_table_stands_why_each_phase_began(run: Path) -> None:
    lines = printed(run).splitlines()
    assert lines[-3:] == [
        "full from step 1: training begins with all parameters",
        f"warmup from step 5: {PASSED} (switch: 1.2 s)",
        "lora from step 7: the warm-up of 3 epochs is over (switch: 2.5 s)",
    ]


OWN, OTHER = "360 samples, index 01234567", "360 samples, index 89abcdef"


@pytest.mark.parametrize(("named", "own", "said"), [
    ({"data": "data/val", "identity": OWN}, OWN, "on data/val, the run's data.val"),
    ({"data": "elsewhere", "identity": OTHER}, OWN,
     "on elsewhere, which is not the run's data.val"),
    ({"data": "data/val", "identity": OWN}, None, "on data/val"),  # a run of an earlier version
    ({"data": "data/val"}, OWN, "on data/val"),
    ({}, OWN, "on unnamed data"),
])
def test_the_exported_models_accuracy_is_told_with_its_data(
    run: Path, named: dict[str, str], own: str | None, said: str
) -> None:
    assert "exported model" not in printed(run)
    end = {"event": "end", "step": 10, "peak_rss_bytes": [2**30]}
    write(run, METRICS, [*PLANS, end | ({} if own is None else {"data": {"data.val": own}})])
    (run / "model").mkdir()
    (run / "model/accuracy.json").write_text(json.dumps({"correct": 347, "samples": 360, **named}))
    assert printed(run).splitlines()[-1] == f"exported model {said}: 347 of 360 correct (96.39%)"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"correct": 1}',
        b'{"correct": 1, "samples": 0}',
        b'{"correct": 361, "samples": 360}',
        b'{"correct": true, "samples": 360}',
        b"\xff\xfe",
        b"[" * 9999,
        b'{"correct": 1, "samples": 2, "data": 3}',
        b'{"correct": 1, "samples": ' + b"9" * 5000 + b"}",
    ],
)
def test_an_accuracy_that_cannot_be_understood_is_refused(run: Path, content: bytes) -> None:
    (run / "model").mkdir()
    (run / "model/accuracy.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        printed(run)
    assert caught.value.value == str(run / "model/accuracy.json")


def test_a_run_that_diverged_is_told_without_the_loss_that_json_does_not_have(
    tmp_path: Path,
) -> None:
    """Its last row has no times, and in logs of earlier versions NaN."""
    last = {"step": 3, "epoch": 1.5, "phase": "full", "train/loss": float("nan"), "grad_norm": None}
    [full] = phase_rows(RunFolder(write(tmp_path, [*METRICS[:2], last], PLANS[:1])))
    assert (full["last_step"], full["loss"], full["step_s"]) == (
        3,
        pytest.approx(2.8),
        pytest.approx(0.0015),
    )
    assert phase_rows(RunFolder(write(tmp_path, [*METRICS[:2], last | {"train/loss": None}], PLANS[:1]))) == [
        full
    ]


def test_the_peak_of_the_hungriest_rank_is_told_when_the_run_has_ended(run: Path) -> None:
    assert "peak resident" not in printed(run)
    write(run, METRICS, [*PLANS, {"event": "end", "step": 10, "peak_rss_bytes": [2**30, 3 * 2**29, 2**20]}])
    assert printed(run).splitlines()[-1] == "peak resident memory per rank: 1.50 GiB"
    assert len(phase_rows(RunFolder(run))) == 3


@pytest.mark.parametrize(
    ("metrics", "plans", "problem"),
    [
        ([], PLANS, "has not logged a step"),
        (METRICS, [], "does not state when a phase began"),
        (METRICS, [PLANS[1]], "does not state when a phase began"),
        ([{"step": 0, "epoch": 0.0}], PLANS, "line 1 cannot be understood: step"),
        ([METRICS[0], {"step": 2}], PLANS, "line 2 cannot be understood: epoch"),
        ([{"step": 1, "epoch": "1"}], PLANS, "line 1 cannot be understood: epoch"),
        (METRICS, [{"event": "plan", "step": 0}], "line 1 cannot be understood: phase"),
        (METRICS, [PLANS[0], PLANS[1] | {"measured": {}}], "line 2 cannot be understood"),
        (
            METRICS,
            [PLANS[0], {"event": "end", "step": 9, "peak_rss_bytes": []}],
            "line 2 cannot be understood",
        ),
    ],
)
def test_logs_without_what_a_report_needs_are_refused(
    tmp_path: Path, metrics: list[dict[str, Any]], plans: list[dict[str, Any]], problem: str
) -> None:
    write(tmp_path, metrics, plans)
    for read in (lambda folder: phase_rows(RunFolder(folder)), printed):
        with pytest.raises(ConfigError, match=problem):
            read(tmp_path)


def test_what_rich_would_take_for_markup_is_printed_as_it_is(tmp_path: Path) -> None:
    text = printed(write(tmp_path, METRICS, [plan(0, "[/bold]", 1, "[red]because")]))
    assert "[/bold]" in text and "[/bold] from step 1: [red]because" in text


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


EVENTS = [
    *PLANS,
    {"event": "end", "step": 10, "peak_rss_bytes": [2**30, 5], "data": {"data.val": OWN}},
]
ACCURACY = json.dumps(
    {"acc1": 0.5, "correct": 180, "samples": 360, "loss": 1.5, "data": "x", "identity": OWN}
)


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    data=st.data(), which=st.sampled_from(["metrics.jsonl", "events.jsonl", "model/accuracy.json"])
)
def test_damaged_files_are_reported_or_refused_with_one_message(
    data: st.DataObject, which: str, tmp_path: Path
) -> None:
    write(tmp_path, METRICS, EVENTS)
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model/accuracy.json").write_text(ACCURACY)
    content = {"metrics.jsonl": lines_of(METRICS), "events.jsonl": lines_of(EVENTS),
               "model/accuracy.json": ACCURACY.encode()}[which]
    (tmp_path / which).write_bytes(data.draw(mutations(content)))
    try:
        text = printed(tmp_path)
    except ConfigError as error:
        assert error.remedy and error.key in ("log", "RUN")
        return
    text.encode()  # a terminal can show it
    assert "from step" in text and "exported model" in text


def test_a_run_of_version_0_1_0_that_nobody_resumed_is_reported(run: Path) -> None:
    expected = printed(run)
    (run / "events.jsonl").rename(run / "plans.jsonl")
    assert printed(run) == expected
    (run / "events.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"events\.jsonl does not state when a phase began"):
        printed(run)


@pytest.mark.parametrize("there", [(), ("metrics.jsonl",), ("events.jsonl",), ("plans.jsonl",)])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, there: tuple[str, ...]) -> None:
    for name in there:
        (tmp_path / name).write_text("")
    for read in (lambda folder: phase_rows(RunFolder(folder)), printed):
        with pytest.raises(ConfigError) as caught:
            read(tmp_path)
        error = caught.value
        assert (error.key, error.value, error.problem) == ("RUN", str(tmp_path), "does not contain a run")


def test_a_folder_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        phase_rows(RunFolder(tmp_path / "none"))
