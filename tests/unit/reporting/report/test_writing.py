from __future__ import annotations

import contextlib
import csv
import json
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.damage import mutations
from support.run_logs import Logs, events_of_methods, write_logs

from prelora_ds import cli
from prelora_ds.errors import ConfigError
from prelora_ds.reporting.report.figure import Figure
from prelora_ds.reporting.report.figures import all_figures
from prelora_ds.reporting.report.page import MOST_BYTES
from prelora_ds.reporting.report.reading import read_run
from prelora_ds.reporting.report.writing import write_report
from prelora_ds.run.folder import RunFolder
from prelora_ds.run.log import read_lines

LOGS = Logs()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    """Two seeds of one run, of which the first has merges and choices of adapters, and a run of other settings."""
    folder = tmp_path_factory.mktemp("runs")
    return [write_logs(folder / "a", LOGS, events=events_of_methods(LOGS)),
            write_logs(folder / "b", Logs(shift=0.2), "run.seed=1"),
            write_logs(folder / "c", Logs(shift=0.1, stop=7), "convergence.tau=0.5", "train.log_every=7")]


@pytest.fixture(scope="module")
def one(runs: list[RunFolder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "report"
    write_report(runs[:1], out)
    return out


@pytest.fixture
def without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)


def report_of(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / "report.json").read_text())
    return result


# ---- the folder

def test_every_file_opens(one: Path) -> None:
    assert sorted(path.name for path in one.iterdir()) == ["data", "figures", "index.html", "report.json", "report.md"]
    figures = report_of(one)["figures"]
    assert len(figures) == 16
    for figure in figures:
        png, svg, pdf = (one / name for name in figure["files"])
        with Image.open(png) as image:
            image.load()
            assert image.width > 600 and len(image.convert("RGB").getcolors(10**7) or []) > 20
        assert ElementTree.parse(svg).getroot().tag.endswith("svg")
        assert pdf.read_bytes().startswith(b"%PDF-") and b"%%EOF" in pdf.read_bytes()[-20:]
        with (one / figure["data"]).open(newline="") as file:
            assert len(list(csv.reader(file))) > 1
    files = {str(path.relative_to(one)) for path in one.glob("figures/*")}
    assert files == {name for figure in figures for name in figure["files"]}


class Links(HTMLParser):
    """Collects every src and href, and the text of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.script = ""
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self._inside = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.script += data


def test_the_page_is_small_and_needs_no_network(one: Path) -> None:
    text = (one / "index.html").read_text()
    links = Links()
    links.feed(text)
    assert len(text.encode()) <= MOST_BYTES == 3_000_000
    assert len(links.script) - len(text[text.index('id="specs">'):].partition("</script>")[0]) <= 1_500_000
    targets = [link for link in links.links if not link.startswith(("#", "data:,"))]
    assert targets and all((one / link).is_file() for link in targets)
    assert "@import" not in text.partition("</style>")[0] and "url(" not in text.partition("</style>")[0]


def test_the_summary_in_markdown_is_short_and_names_all_figures(one: Path) -> None:
    text = (one / "report.md").read_text()
    assert len(text.splitlines()) <= 80
    assert all(f"`{figure['name']}`" in text for figure in report_of(one)["figures"])
    assert "The run finished after step 36" in text and "Resumed after step 10 from step-00000010" in text
    assert "Rank 1 on host n2 was slow at step 20" in text and "1 sample could not be read" in text


def test_markdown_of_many_runs_is_cut(tmp_path: Path, without_the_extra: None) -> None:
    runs = [write_logs(tmp_path / f"r{n}", LOGS, f"run.seed={n}", events=events_of_methods(LOGS)) for n in range(30)]
    write_report(runs, tmp_path / "out")
    lines = (tmp_path / "out/report.md").read_text().splitlines()
    assert len(lines) <= 80 and any("more are in report.json" in line for line in lines)
    assert [line for line in lines if line.startswith("## ")] == [
        "## Finals", "## Phases", "## Not run", "## Incidents", "## Origin", "## Figures"]


# ---- what it says

def test_numbers_are_exactly_those_of_the_logs(runs: list[RunFolder], one: Path) -> None:
    rows = read_lines(runs[0].metrics)
    [run] = report_of(one)["runs"]
    assert run["finals"]["final_loss"] == rows[-1]["train/loss"]
    assert run["finals"]["final_acc1"] == rows[-1]["val/acc1"]
    assert run["finals"]["best_acc1"] == max(row["val/acc1"] for row in rows if "val/acc1" in row)
    assert run["samples"] == 36 * 96 and run["ranks"] == 2 and run["peak_rss_bytes"] == 2**31
    assert [phase["phase"] for phase in run["phases"]] == ["full", "warmup", "lora"]
    assert run["phases"][1]["step_s_median"] == 0.5 and run["phases"][1]["bytes_measured"]["weights"] == 1200 * 2**14
    assert report_of(one)["schema_version"] == 1
    assert [run[key] for key in ("command", "commit", "versions", "hosts")] == [None] * 4
    assert "not logged" in (one / "index.html").read_text()


@pytest.fixture(scope="module")
def three(runs: list[RunFolder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("three") / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vl_convert", None)
        write_report(runs, out)
    return out


def test_runs_are_compared_with_the_first_and_seeds_are_averaged(three: Path) -> None:
    result = report_of(three)
    a, b, c = result["runs"]
    for key in ("final_acc1", "final_loss"):
        assert b["difference_to_first"][key] == b["finals"][key] - a["finals"][key]
    assert a["difference_to_first"] is None
    assert b["settings_that_differ"] == ["run.seed: 0 -> 1"]
    assert c["settings_that_differ"] == ["convergence.tau: 1.0 -> 0.5"]  # how often is logged affects no training
    [seeds] = result["seeds"]
    losses = [run["finals"]["final_loss"] for run in (a, b)]
    assert seeds["runs"] == ["a", "b"] and seeds["finals"]["final_loss"] == {"mean": mean(losses), "sd": stdev(losses)}
    text = (three / "report.md").read_text()
    assert "mean ± sd of 2 seeds: a, b" in text and "-0.20 points" in text


def test_a_run_that_has_not_finished_says_so(three: Path) -> None:
    run = report_of(three)["runs"][2]
    assert not run["ended"]
    assert run["verdict"].startswith("The run has not finished: its log ends at step 21 (7.0 of 12 epochs)")
    assert run["not_run"][:2] == ["The run has not finished.", "Not reached: phase lora."]


def test_runs_of_other_models_are_overlaid_with_a_note(
    tmp_path: Path, runs: list[RunFolder], without_the_extra: None
) -> None:
    other = write_logs(tmp_path / "other", Logs(layers=3), "model.num_hidden_layers=3")
    told = write_report([runs[0], other], tmp_path / "out")
    assert any("The runs have different models." in line for line in told)
    assert [figure["name"] for figure in report_of(tmp_path / "out")["figures"] if "ranks" in figure["name"]] == [
        "ranks_1", "ranks_2"]


def test_names_from_logs_and_paths_are_only_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>&|`*\"'"
    folder = write_logs(tmp_path / name.replace("/", "\u2215"), LOGS)
    text = folder.events.read_text().replace("training begins", "<b onclick=x>begins \\ud800")
    folder.events.write_text(text)
    write_report([folder], tmp_path / "out")
    page = (tmp_path / "out/index.html").read_text()
    assert "<script>alert" not in page and "<b onclick" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<b onclick" not in (tmp_path / "out/report.md").read_text()


def test_two_runs_of_one_name_are_told_apart(tmp_path: Path, without_the_extra: None) -> None:
    runs = [write_logs(tmp_path / f"seed{n}/run", LOGS, f"run.seed={n}") for n in range(2)]
    write_report(runs, tmp_path / "out")
    assert [run["run"] for run in report_of(tmp_path / "out")["runs"]] == ["seed0/run", "seed1/run"]


# ---- the command

def prelora(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["prelora", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return 0 if ended.value.code is None else int(ended.value.code)


def test_without_the_extra_one_line_says_how_to_get_the_rest(
    tmp_path: Path, runs: list[RunFolder], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    without_the_extra: None
) -> None:
    assert prelora(monkeypatch, "report", runs[0].path, "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out.splitlines()[-1] == \
        "For the page and the figures as well, install the extra: pip install 'prelora_ds[report]'"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data", "report.json", "report.md"]
    assert len(list((tmp_path / "out/data").iterdir())) == 16


def test_the_table_needs_nothing_of_a_report(runs: list[RunFolder]) -> None:
    code = ("import sys; from prelora_ds import cli; sys.argv = ['prelora', 'report', *sys.argv[1:]]\n"
            "try: cli.main()\n"
            "except SystemExit as ended: assert not ended.code, ended.code\n"
            "print([m for m in ('vl_convert', 'altair', 'jinja2', 'torch', 'numpy') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, *(str(run.path) for run in runs[:2])], capture_output=True,
                          text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.count("full from step 1: training begins") == 2  # a table for each run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("run", "out", "said"), [
    ("none", "new", "RUN = {tmp}/none': does not exist"),
    ("empty", "new", "RUN = {tmp}/empty': does not contain a run"),
    ("old", "new", "does not state when a phase began"),
    ("run", "full", "--out = {tmp}/full': exists and is not empty"),
    ("run", "file", "--out = {tmp}/file': exists and is not a folder"),
    ("run", "run", "--out = {tmp}/run': exists and is not empty"),
    ("run", "run/report", "--out = {tmp}/run/report': is inside the run {tmp}/run"),
    ("run", "other/deep/report", "--out = {tmp}/other/deep/report': is inside the run {tmp}/other"),
    ("run", "file/report", "--out = {tmp}/file/report': cannot be written"),
    ("run", "s3://bucket/report", "is a URL, but the output must be a local folder"),
])
def test_what_cannot_be_reported_is_one_message_and_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: str, out: str, said: str,
    without_the_extra: None
) -> None:
    for name in ("run", "other"):
        write_logs(tmp_path / name, LOGS)
    old = write_logs(tmp_path / "old", LOGS)
    old.events.write_text('{"event": "switch", "step": 3}\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("precious")
    (tmp_path / "file").write_text("precious")
    before = snapshot(tmp_path)
    target = out if ":" in out else tmp_path / out
    assert prelora(monkeypatch, "report", tmp_path / run, "--out", target) == 2
    printed, err = capsys.readouterr()
    assert printed == "" and err.count("error: ") == err.count("remedy: ") == 1 and "Traceback" not in err
    assert said.replace("{tmp}", f"'{tmp_path}", 1).replace("{tmp}", str(tmp_path)) in err
    assert snapshot(tmp_path) == before


def test_a_run_that_is_named_twice_is_refused(tmp_path: Path, runs: list[RunFolder]) -> None:
    with pytest.raises(ConfigError, match="is named twice"):
        write_report([runs[0], runs[1], RunFolder(runs[0].path / "../a")], tmp_path / "out")


def test_an_empty_folder_may_be_the_output(tmp_path: Path, runs: list[RunFolder], without_the_extra: None) -> None:
    (tmp_path / "out").mkdir()
    write_report(runs[:1], tmp_path / "out")
    assert (tmp_path / "out/report.md").is_file()


def test_a_report_that_fails_leaves_nothing(tmp_path: Path, runs: list[RunFolder],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prelora_ds.reporting.report.writing.drawings", full)
    with pytest.raises(ConfigError, match="No space left") as caught:
        write_report(runs[:1], tmp_path / "out")
    assert caught.value.exit_code == 75 and list(tmp_path.iterdir()) == []


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), which=st.sampled_from(["metrics", "events", "windows"]))
def test_damaged_logs_are_reported_or_refused_with_one_message(
    data: st.DataObject, which: str, tmp_path_factory: pytest.TempPathFactory, runs: list[RunFolder],
    without_the_extra: None
) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("damaged") / "run")
    shutil.copytree(runs[0].path, folder.path)
    path = folder.path / f"{which}.jsonl"
    path.write_bytes(data.draw(mutations(path.read_bytes())))
    out = folder.path.with_name("out")
    try:
        write_report([folder], out)
    except ConfigError as error:
        assert error.remedy and not out.exists()
        return
    run = read_run(folder, "run")
    for figure in all_figures([run], 600):
        if isinstance(figure, Figure):
            json.dumps([figure.for_file(), figure.for_page()], allow_nan=False)
    assert len((out / "report.md").read_text().splitlines()) <= 80


# ---- what it costs

LONG = Logs(epochs=300, rows=10, every=125, layers=24, more=False)  # 144 weight norms
PROBE = """
import resource, sys
from pathlib import Path
from prelora_ds.reporting.report.writing import write_report
from prelora_ds.run.folder import RunFolder
write_report([RunFolder(Path(run)) for run in sys.argv[2:]], Path(sys.argv[1]))
print(*(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF,
                                                                          resource.RUSAGE_CHILDREN))))
"""


@pytest.mark.long
def test_five_runs_of_300_epochs_take_at_most_10_s_and_500_mb(tmp_path: Path) -> None:
    """The seconds are those of the busier of the two processes on a core: other work on the machine does not count."""
    runs = [write_logs(tmp_path / f"run{n}", LONG, f"run.seed={n}") for n in range(5)]
    began, peak = time.monotonic(), 0
    with subprocess.Popen([sys.executable, "-c", PROBE, str(tmp_path / "out"), *(str(run.path) for run in runs)],
                          stdout=subprocess.PIPE, text=True) as child:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, sum(one.memory_info().rss for one in [process, *process.children(recursive=True)]))
            time.sleep(0.02)
        assert child.stdout is not None and child.returncode == 0
        own_s, other_s = map(float, child.stdout.read().split())
    print(f"{time.monotonic() - began:.1f} s by the clock, {own_s:.1f} and {other_s:.1f} s on a core, "
          f"{peak / 1e6:.0f} MB")
    assert max(own_s, other_s) <= 10 and peak <= 500e6
    assert (tmp_path / "out/index.html").stat().st_size <= MOST_BYTES


def test_reading_does_not_hold_the_rows(tmp_path: Path, without_the_extra: None) -> None:
    """A run with 10 times the rows takes little more memory: what is kept of a column is bounded."""
    folder = write_logs(tmp_path / "run", Logs(epochs=300, rows=30, layers=1))
    run = read_run(folder, "run")
    assert run.steps == 9000
    assert all(len(curve.points()) <= 2000 and len(curve._steps) <= 4000 for curve in run.curves.values())
