from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
from support.run_logs import Logs, write_logs

from prelora_ds.core.switch_tests.prelora import WindowStats, partially_converged
from prelora_ds.errors import ConfigError
from prelora_ds.reporting.report.reading import read_run
from prelora_ds.reporting.report.run import Run
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import read_lines

LOGS = Logs()


def read(folder: RunFolder) -> Run:
    return read_run(folder, "run")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return write_logs(tmp_path / "run", LOGS)


def test_every_number_of_a_row_is_a_point_of_its_column(folder: RunFolder) -> None:
    run = read(folder)
    rows = read_lines(folder.metrics)
    for column in ("train/loss", "val/acc1", "lr", "norm/q.01", "norm_base/fc2.00", "peak_gib", "data/corrupt"):
        logged = [(row["step"], row[column]) for row in rows if column in row]
        assert [(p.step, p.value) for p in run.curves[column].points()] == logged
        assert run.last[column] == logged[-1][1]
    means = [fmean(row[f"norm/q.{layer:02d}"] for layer in range(LOGS.layers)) for row in rows if "norm/q.00" in row]
    assert [p.value for p in run.curves["mean norm/q"].points()] == means
    assert run.curves["data wait"].points()[0].value == 100 * 0.125 / (0.5 + 0.125)
    assert (run.families(), run.layers("q")) == (["q", "k", "v", "o", "fc1", "fc2"], [0, 1])


def test_hours_are_those_of_steps_waits_and_switches(tmp_path: Path) -> None:
    logs = Logs(every=5)  # a row stands for five steps, and has their means
    run = read(write_logs(tmp_path / "run", logs))
    steps = logs.steps * (0.5 + 0.125)
    assert run.hours == pytest.approx((steps + 2 * 1.5) / 3600)
    assert run.hours_at(logs.switches[0]) == pytest.approx(logs.switches[0] * 0.625 / 3600)


def test_phases_have_their_own_rows_bytes_and_ranks(folder: RunFolder) -> None:
    run = read(folder)
    assert [(p.name, p.begins, p.ends, p.switch_s) for p in run.phases] == [
        ("full", 0, 12, None), ("warmup", 12, 24, 1.5), ("lora", 24, 36, 1.5)]
    assert [len(p.step_s) for p in run.phases] == [12, 12, 12]
    assert [p.predicted and p.predicted["weights"] for p in run.phases] == [1000 * 2**14, 1200 * 2**14, 200 * 2**14]
    assert [p.peaks["peak_gib"] for p in run.phases] == [1.5, 1.5, 1.0]
    (_, warmup), (_, lora) = run.phases[1].ranks[0], run.phases[2].ranks[0]
    assert run.phases[0].ranks == [] and warmup[("q", 0)] == 4 and lora[("fc2", 1)] == 8


def test_a_plan_with_other_ranks_belongs_to_its_phase(folder: RunFolder) -> None:
    """Ranks may change during a phase (`adapters.ranks.every`), which is a switch as well."""
    events = read_lines(folder.events)
    lora = next(row for row in events if row.get("phase") == "lora")
    for step, rank in ((28, 2), (32, 2)):  # the second change leaves all ranks as they are
        adapters = {path: spec | {"rank": rank} for path, spec in lora["plan"]["adapters"].items()}
        events.insert(-1, lora | {"step": step, "plan": lora["plan"] | {"adapters": adapters}})
    folder.events.write_text("".join(json.dumps(row) + "\n" for row in events))
    phase = read(folder).phases[2]
    assert len(read(folder).phases) == 3 and (phase.begins, phase.switch_s) == (24, 4.5)
    assert [(step, ranks[("q", 0)]) for step, ranks in phase.ranks] == [(25, 4), (29, 2)]


def test_pruned_components_are_not_part_of_a_rank(folder: RunFolder) -> None:
    events = read_lines(folder.events)
    warmup = next(row for row in events if row.get("phase") == "warmup")
    remaining = {path: 1 for path in warmup["plan"]["adapters"]}
    events.append({"event": "pruned", "step": warmup["step"] + 2, "remaining": remaining})
    events.sort(key=lambda row: row["step"])
    folder.events.write_text("".join(json.dumps(row) + "\n" for row in events))
    _, warmup, lora = read(folder).phases
    begins = warmup.begins + 1
    assert [(step, ranks[("q", 0)]) for step, ranks in warmup.ranks] == [(begins, 4), (begins + 2, 1)]
    assert [set(ranks.values()) for _, ranks in lora.ranks] == [{1}]  # its plan has the same adapters


def test_changes_are_those_of_algorithm_1(folder: RunFolder) -> None:
    run = read(folder)
    windows = [WindowStats(row["index"], row["last_step"], row["loss"],
                           {family: {int(layer): norm for layer, norm in layers.items()}
                            for family, layers in row["norms"].items()}) for row in read_lines(folder.windows)]
    verdict = partially_converged(windows, k=len(windows), tau=1, zeta=1)
    for family, changes in verdict.norm_changes.items():
        assert tuple(p.value for p in run.curves[f"change/{family}"].points()) == changes
    assert tuple(p.value for p in run.curves["change/loss"].points()) == verdict.loss_changes


def test_a_run_in_progress_has_no_end(tmp_path: Path) -> None:
    folder = write_logs(tmp_path / "run", Logs(stop=5))
    with folder.metrics.open("a") as file:
        file.write('{"step": 99, "epo')  # a row that is being written
    run = read(folder)
    assert (run.end, run.steps, [p.name for p in run.phases], run.notes) == (None, 15, ["full", "warmup"], [])


@pytest.mark.parametrize("line", ["not JSON", "[1]", '{"step": 0, "epoch": 0}', '{"step": "x"}', '{"step": 5}', ""])
def test_a_damaged_line_is_named_and_passed_by(folder: RunFolder, line: str) -> None:
    whole = read(folder)
    rows = folder.metrics.read_text().splitlines()
    folder.metrics.write_text("\n".join([*rows[:7], line, *rows[7:]]) + "\n")
    run = read(folder)
    assert len(run.notes) == 1 and run.notes[0].startswith("metrics.jsonl: line 8 ")
    assert run.curves["train/loss"].points() == whole.curves["train/loss"].points()
    assert (run.hours, run.last) == (whole.hours, whole.last)


def test_a_step_that_comes_again_is_passed_by(folder: RunFolder) -> None:
    rows = folder.metrics.read_text().splitlines()
    folder.metrics.write_text("\n".join([*rows[:7], rows[3], *rows[7:]]) + "\n")
    assert "line 8 has step 4 again" in read(folder).notes[0]


def test_of_many_damaged_lines_ten_are_named(folder: RunFolder) -> None:
    with folder.events.open("a") as file:
        file.write("{\n" * 50)
    notes = read(folder).notes
    assert len(notes) == 11 and notes[-1] == "events.jsonl: further damaged lines are passed by."


def test_a_fork_has_only_its_own_steps_and_hours(tmp_path: Path) -> None:
    folder = write_logs(tmp_path / "run", LOGS)
    rows = read_lines(folder.metrics)
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] > 24))
    resume = {"event": "resume", "step": 24, "checkpoint": "step-00000024", "world_size": 2, "zero_stage": 2}
    events = [row for row in read_lines(folder.events) if row["step"] >= 24]
    folder.events.write_text("".join(json.dumps(row) + "\n" for row in [resume, *events]))
    run = read(folder)
    assert (run.first_step, run.steps, [p.name for p in run.phases]) == (24, 36, ["lora"])
    assert run.hours == pytest.approx((12 * 0.625 + 1.5) / 3600)


def test_attempts_of_a_supervised_run_are_described(folder: RunFolder) -> None:
    for number, files in enumerate(({"failure.json": '{"code": 85, "why": "no progress for 60 s", "hosts": []}'},
                                    {"DONE": ""}, {}), start=1):
        attempt = folder.supervise / f"attempt-{number}"
        attempt.mkdir(parents=True)
        (attempt / "hostfile").write_text("n1 slots=4\nn2 slots=4\n")
        for name, text in files.items():
            (attempt / name).write_text(text)
    run = read(folder)
    assert run.attempts == ["Attempt 1 failed with exit code 85: no progress for 60 s.", "Attempt 2 succeeded.",
                            "Attempt 3 has not ended, or left no record of its end."]
    assert run.attempt_hosts == 2


def test_what_a_later_version_logs_about_a_job_is_kept(folder: RunFolder) -> None:
    start = {"event": "start", "step": 0, "command": "deepspeed x", "commit": "0123abc", "versions": {"torch": "2"}}
    with folder.events.open("a") as file:
        file.write(json.dumps(start) + "\n")
    assert read(folder).facts == {"command": "deepspeed x", "commit": "0123abc", "versions": {"torch": "2"}}


def test_a_config_that_is_missing_or_of_another_version_is_noted(folder: RunFolder) -> None:
    folder.config.write_text("nonsense: 1\n")
    run = read(folder)
    assert run.config is None and run.config_hash is not None and "config.yaml" in run.notes[0]
    assert run.phases[1].ranks[0][1][("q", 0)] == 4  # the names of the ViT are known without it
    folder.config.unlink()
    assert read(folder).config_hash is None


@pytest.mark.parametrize("damage", [
    lambda folder: folder.metrics.unlink(), lambda folder: folder.events.unlink(),
    lambda folder: folder.metrics.write_text(""), lambda folder: folder.events.write_text(""),
])
def test_a_folder_without_a_run_is_refused(folder: RunFolder, damage: object) -> None:
    damage(folder)  # type: ignore[operator]
    with pytest.raises(ConfigError) as caught:
        read(folder)
    assert caught.value.key == "RUN"


def test_a_run_of_version_0_1_0_is_read(folder: RunFolder) -> None:
    expected = [(p.name, p.ends) for p in read(folder).phases]
    folder.events.rename(folder.former_events)
    folder.windows.unlink()
    run = read(folder)
    assert [(p.name, p.ends) for p in run.phases] == expected
