"""`prelora plan` from the command line to the table and the JSON."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from prelora_ds import cli
from prelora_ds.config.load import load_config
from prelora_ds.core.adapters import KINDS as ADAPTERS
from prelora_ds.core.adapters.refused import REFUSED
from prelora_ds.core.controller import PhaseController
from prelora_ds.core.schedule import Timeline
from prelora_ds.cost.timing import KINDS
from prelora_ds.reporting.forecast_table import print_forecast, print_kinds
from prelora_ds.start import check_phases

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "launch/recipes/vit_large_in1k_prelora_exp1.yaml"
SMALL = ("model.hidden_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=4",
         "model.intermediate_size=128", "train.global_batch_size=256", "train.micro_batch_size=16")


def plan(monkeypatch: pytest.MonkeyPatch, *arguments: object, recipe: Path = RECIPE, stage: int | str = 2) -> int:
    deepspeed = ROOT / f"ds_configs/zero{stage}.json"
    monkeypatch.setattr(sys, "argv", ["prelora", "plan", str(recipe), *map(str, arguments),
                                      "--deepspeed-config", str(deepspeed)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object, **options: Any) -> dict[str, Any]:
        """Return the JSON that `prelora plan` prints, and print the tables as without --json."""
        before = capsys.readouterr().out
        assert plan(monkeypatch, *arguments, "--json", **options) == 0
        result = json.loads(capsys.readouterr().out)
        print(before)
        print_forecast(result)
        return result

    return run


@pytest.mark.parametrize("recipe", sorted((ROOT / "launch/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_planned(recipe: Path, planned: Any) -> None:
    result = planned("--gpus-per-host", 2, recipe=recipe)
    assert {row["phase"] for row in result["rows"]} == {spec.name for spec in load_config(recipe).specs()}


def test_the_paper_s_run_on_16_hosts(planned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = planned("--hosts", 16, "--gpus-per-host", 4, "--walltime", "6h")
    out = capsys.readouterr().out
    assert "predicted" in out and "not measured" in out
    assert [result[key] for key in ("world_size", "images", "labels", "grad_accum_steps")] == [64, 1281167, 1000, 1]
    assert [(r["stage"], r["phase"]) for r in result["rows"]] == [(s, p) for s in range(4)
                                                                  for p in ("full", "warmup", "lora")]
    full, _, lora = (r for r in result["rows"] if r["stage"] == 2)
    assert full["weights_bytes"] == 2 * 304_326_632
    assert full["moments_bytes"] == 8 * 304_326_632 // 64
    assert lora["gflop_per_image"] == pytest.approx(266, rel=2e-3)
    assert full["fits"] and lora["step_s"] < full["step_s"]
    assert full["epoch_s"] == pytest.approx(full["step_s"] * 1281167 / 4096)
    assert full["peak_bytes"] >= full["activations_bytes"] + full["weights_bytes"]
    for run in result["runs"]:
        assert run["earliest"]["jobs"] == math.ceil(run["earliest"]["hours"] / 6)
        assert sum(run["earliest"]["steps"].values()) == run["never"]["steps"]["full"]
    # Three windows of three epochs, then ten epochs of warm-up, of 312.8 steps.
    assert result["runs"][0]["earliest"]["steps"]["full"] == math.ceil(9 * 1281167 / 4096)
    assert result["runs"][0]["earliest"]["steps"]["warmup"] == pytest.approx(10 * 1281167 / 4096, abs=1)


def test_what_does_not_fit_is_said(planned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = planned("train.micro_batch_size=512", "--hosts", 2)
    assert {r["fits"] for r in result["rows"]} == {False}
    assert all(0 < r["largest_micro_batch"] <= 256 if r["stage"] else r["largest_micro_batch"] == 0  # no accumulation
               for r in result["rows"])
    assert " no " in capsys.readouterr().out


def test_stage_0_is_left_out_where_gradients_accumulate_and_offload_is_added(planned: Any) -> None:
    result = planned(*SMALL, "--gpus-per-host", 8, stage="2_offload")
    assert [(r["stage"], r["offload_optimizer"]) for r in result["rows"][::3]] == [(1, False), (2, False), (3, False),
                                                                                   (2, True)]


def test_a_baseline_has_one_phase_and_its_data_their_own_size(planned: Any, tmp_path: Path) -> None:
    result = planned(*SMALL, "--images", 1000, recipe=ROOT / "launch/recipes/vit_large_in1k.yaml")
    assert {r["phase"] for r in result["rows"]} == {"full"}
    assert result["images"] == 1000
    assert all(run["earliest"] is None and run["never"]["jobs"] is None for run in result["runs"])


def test_it_says_which_images_and_classes_it_assumed(
    planned: Any, capsys: pytest.CaptureFixture[str], shards: Path
) -> None:
    assumed = "(assumed, as in ImageNet-1k: data.train has no manifest here)"
    planned(*SMALL)
    out = capsys.readouterr().out
    assert f"images per epoch: 1,281,167 {assumed}" in out and f"classes: 1,000 {assumed}" in out
    planned(*SMALL, f"data.train={shards / 'train'}")
    out = " ".join(capsys.readouterr().out.split())
    assert f"images per epoch: 1,437 (data.train = {shards / 'train'})" in out
    assert f"classes: 10 (data.train = {shards / 'train'})" in out and "assumed," not in out
    planned(*SMALL, "--images", 1000)
    assert "images per epoch: 1,000 (--images)" in capsys.readouterr().out


def test_shards_without_a_manifest_have_the_images_that_the_recipe_tells(
    planned: Any, shards: Path
) -> None:
    result = planned(
        *SMALL,
        "data.reader=webdataset",
        "data.samples_per_epoch=5000",
        f"data.val={shards / 'val'}",
    )
    assert (result["images"], result["images_from"]) == (5000, "data.samples_per_epoch")
    assert (result["labels"], result["labels_from"]) == (10, f"data.val = {shards / 'val'}")


def test_json_or_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(monkeypatch, *SMALL) == 0
    tables = capsys.readouterr().out
    assert plan(monkeypatch, *SMALL, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    print_forecast(result)
    assert capsys.readouterr().out == tables


def test_the_rank_is_one_that_the_recipe_can_give_and_its_own_stage_is_marked(
        planned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(*SMALL)["mean_rank"] == 30
    assert "\nZeRO 2 (configured)\n" in capsys.readouterr().out
    assert planned(*SMALL, "lora.r_min=2", "lora.r_max=4")["mean_rank"] == 4
    assert planned(*SMALL, "--mean-rank", 16)["mean_rank"] == 16


def test_what_a_phase_freezes_for_a_later_one_is_in_the_host_s_memory(
        planned: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = planned(*SMALL)["rows"]
    assert all(row["host_bytes"] == 0 for row in preset)
    assert "host, MiB" not in capsys.readouterr().out
    recipe = with_phases(tmp_path, {"name": "low", "adapters": {"rank": 4, "mode": "branch"}, "train": "adapters",
                                     "until": "4 steps"},
                         {"name": "thaw", "train": "all"})
    rows = planned(*SMALL, recipe=recipe, stage=1)["rows"]
    assert "host, MiB" in capsys.readouterr().out
    low, thaw = (row for row in rows if row["stage"] == 1)
    model = preset[0]["weights_bytes"] // 2
    assert (low["host_bytes"], thaw["host_bytes"]) == (4 * model // 4, 0), "4 bytes an element over 4 ranks"


def with_phases(folder: Path, *phases: dict[str, Any]) -> Path:
    """A copy of the recipe with these phases."""
    values = yaml.safe_load(RECIPE.read_text())
    for section in ("convergence", "lora"):
        values.pop(section, None)
    recipe = folder / "phases.yaml"
    recipe.write_text(yaml.safe_dump({**values, "phases": list(phases)}))
    return recipe


FULL = {"name": "full", "until": "10 epochs"}
DETAILS = ("training at a time", "merge")


def test_only_a_method_with_choices_or_merges_says_something_about_them(
        planned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = planned(*SMALL)["rows"]
    assert all(row["active"] is None and row["merge"] is None for row in rows)
    assert [row["ranks"] for row in rows[:3]] == [[], [30], [30]]
    assert not any(word in capsys.readouterr().out for word in DETAILS)


@pytest.mark.parametrize("cut", [False, True])
def test_the_adapters_that_train_at_a_time(planned: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                           cut: bool) -> None:
    active = {"choose": "top_k", "k": 3, "every": "50 steps", "cut_backward": cut}
    dyna = {"name": "dyna", "adapters": {"rank": 8, "families": ["q", "fc1", "fc2"]}, "train": "adapters"}
    some, all_of_them = (planned(*SMALL, recipe=with_phases(tmp_path, FULL, {**dyna, **more}))["rows"][1]
                         for more in ({"active": active}, {}))
    out = capsys.readouterr().out
    # Two blocks of three adapters: q has 8 * (64 + 64) elements, each of the others 8 * (64 + 128).
    counts = some["active"]
    assert (counts["adapters"], counts["adapters_in_all"], counts["parameters_in_all"]) == (3, 6, 8192)
    assert counts["parameters"] in {1024 * q + 1536 * (3 - q) for q in range(3)}
    assert "50%" in out and f"{counts['parameters'] / 8192:.0%}" in out and "this one draw" in out
    assert some["gflop_per_image"] < all_of_them["gflop_per_image"]
    assert some["activations_bytes"] <= all_of_them["activations_bytes"]
    assert (some["stage"], some["phase"]) == (1, "dyna")
    # Another choice may need more memory, so whether it fits is that of all adapters; states differ in gradients only.
    same = ("peak_bytes", "largest_micro_batch", "weights_bytes", "masters_bytes", "moments_bytes")
    assert all(some[key] == all_of_them[key] for key in same)
    assert all_of_them["gradients_bytes"] - some["gradients_bytes"] == 2 * (8192 - counts["parameters"])


def test_the_first_choice_is_that_of_the_run(planned: Any, tmp_path: Path) -> None:
    dyna = {"name": "dyna", "adapters": {"rank": 8}, "train": "adapters",
            "active": {"choose": "random", "k": 2, "every": "50 steps"}}
    recipe = with_phases(tmp_path, dyna)
    found = {seed: planned(*SMALL, f"run.seed={seed}", recipe=recipe)["rows"][0]["active"]["parameters"]
             for seed in range(5)}
    assert len(set(found.values())) > 1
    config = load_config(recipe, [*SMALL, "run.seed=3"], ROOT / "ds_configs/zero2.json", recipe_key="RECIPE")
    layout = check_phases(config, 1000)
    controller = PhaseController(layout=layout, timeline=Timeline(1000, 256, config.train.duration),
                                 phases=config.specs(), seed=config.run.seed)
    plan = controller.initial().plan
    shapes = plan.parameters(layout)
    assert found[3] == sum(math.prod(shapes[name]) for name in plan.training())


def test_merges_are_counted_and_their_seconds_are_part_of_the_run(
        planned: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    relora = {"name": "relora", "train": ["adapters", "rest"], "until": "20 epochs",
              "merge": {"every": "100 steps"}}
    lora = {"name": "lora", "adapters": {"rank": 8, "from": "merge"}, "train": ["adapters", "rest"]}
    found = {}
    for mode in ("branch", "merged"):
        phases = (FULL, {**relora, "adapters": {"rank": 16, "mode": mode}}, lora)
        found[mode] = planned(*SMALL, "--images", 25600, "train.duration=50 epochs", "observe.every=1 epoch",
                              recipe=with_phases(tmp_path, *phases))
    out = capsys.readouterr().out
    assert "merges per epoch" in out and "merges in relora: 19" in out and "all merges" in out
    branch, merged = (next(row for row in result["rows"] if (row["stage"], row["phase"]) == (2, "relora"))
                      for result in found.values())
    assert (branch["ranks"], branch["merge"]["every_steps"], branch["merge"]["per_epoch"]) == ([16], 100, 1.0)
    # The kernel merged keeps the fp32 weights in the module: 2 blocks of 4 * 64 * 64 + 2 * 64 * 128 elements.
    assert (branch["host_bytes"], merged["host_bytes"]) == (4 * 65536 // 4, 0)
    assert merged["weights_bytes"] - branch["weights_bytes"] == 4 * 65536
    run = next(run for run in found["branch"]["runs"] if run["stage"] == 2)["never"]
    steps_s = {row["phase"]: row["step_s"] for row in found["branch"]["rows"] if row["stage"] == 2}
    seconds = sum(count * steps_s[phase] for phase, count in run["steps"].items())
    assert run["merges"] == {"relora": 19}
    assert run["hours"] == pytest.approx((seconds + 19 * branch["merge"]["seconds"]) / 3600)


def test_a_cpu_has_bytes_and_with_a_calibration_times(planned: Any, tmp_path: Path) -> None:
    bare = planned(*SMALL, "--gpu", "CPU", "--gpus-per-host", 2)
    assert all(r["step_s"] is None and r["fits"] is None and r["weights_bytes"] for r in bare["rows"])
    rates = {"seconds": dict.fromkeys(KINDS, 1.0), "source": "a test", "measured": True, "sharing": 2.0}
    (tmp_path / "c.json").write_text(json.dumps({"rates": rates, "memory_gib": 8.0, "samples": []}))
    alone, both = (planned(*SMALL, f"train.global_batch_size={128 * n}", "--gpu", "CPU", "--gpus-per-host", n,
                           "--calibration", tmp_path / "c.json")["rows"] for n in (1, 2))
    assert all(r["fits"] and r["step_s"] > 0 for r in (*alone, *both))
    assert both[0]["step_s"] > 1.9 * alone[0]["step_s"]


@pytest.mark.parametrize(("arguments", "key", "remedy"), [
    (["--gpu", "A100-50"], "--gpu = 'A100-50'", "did you mean A100-80"),
    (["--gpus-per-host", 3], "train.micro_batch_size = 16", "choose a micro-batch"),
    (["--walltime", "soon"], "--walltime = 'soon'", "write 6h"),
    (["--walltime", "0h"], "--walltime = '0h'", "write 6h"),
    (["--calibration", "none.json"], "--calibration = 'none.json'", "prelora calibrate"),
    (["model.factory=a.b:c", "model.families.x=(?P<layer>.)", "lora.families=[x]"], "model.factory",
     "without model.factory"),
])
def test_a_mistake_is_one_message_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[object], key: str, remedy: str
) -> None:
    assert plan(monkeypatch, *SMALL, *arguments) == 2
    err = capsys.readouterr().err
    assert key in err and remedy in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("text", "seconds"), [("6h", 21600), ("1.5h", 5400), ("90m", 5400), ("24:00:00", 86400)])
def test_walltimes(text: str, seconds: float) -> None:
    from prelora_ds.config.fields import parse_walltime

    assert parse_walltime(text) == seconds


@pytest.mark.parametrize("change", [
    {"rates": {"source": "x", "measured": True, "seconds": {}}},
    {"rates": {"source": "x", "measured": True, "seconds": "a"}},
    {"memory_gib": -4}, {"memory_gib": "4"}, {"rates": None}, {"rates": {"seconds": 1}},
])
def test_a_calibration_of_other_content_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    from prelora_ds.cost.machines import read_calibration
    from prelora_ds.errors import ConfigError

    path = tmp_path / "c.json"
    good = {"rates": {"source": "x", "measured": True, "seconds": dict.fromkeys(KINDS, 1.0)}, "memory_gib": 4.0}
    path.write_text(json.dumps(good))
    assert read_calibration(path, "--calibration")[1] == 4.0
    path.write_text(json.dumps(good | change))
    with pytest.raises(ConfigError, match="is not a calibration"):
        read_calibration(path, "--calibration")


def test_a_phase_that_trains_nothing_is_refused_by_its_name(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = with_phases(tmp_path, {"name": "full", "until": "2 steps"},
                         {"name": "none", "train": ["embeddings"], "freeze_below": 1})
    assert plan(monkeypatch, *SMALL, recipe=recipe) == 2
    assert "phases.none" in (said := capsys.readouterr().err) and "no parameter would train" in said


def test_a_block_size_that_does_not_divide_a_linear_is_refused_by_its_key(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank, said in ((24, "choose among 2, 4, 8, 16, 32, 64"), (1, "cannot be divided into blocks of this size")):
        recipe = with_phases(tmp_path, {"name": "full", "until": "2 steps"},
                             {"name": "turned", "adapters": {"kind": "oft", "rank": rank}})
        assert plan(monkeypatch, *SMALL, recipe=recipe) == 2
        message = capsys.readouterr().err
        assert f"phases.turned.adapters.rank = {rank}" in message and said in message


# ---- kinds of adapters side by side

def test_all_kinds_are_compared_and_the_others_refused_with_their_reason(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(monkeypatch, "--adapter", "all", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["kind"]: row for row in result["kinds"]}
    assert rows.keys() == ADAPTERS.keys() | REFUSED.keys()
    assert [kind for kind, row in rows.items() if row["refused"] is None] == list(ADAPTERS)
    assert rows["vera"]["adapter_parameters"] == 24 * (144 * 64 + 6 * 30)  # outputs of six linears, and the rank
    assert rows["dora"]["adapter_parameters"] - rows["lora"]["adapter_parameters"] == 24 * 144 * 64
    assert rows["vera"]["states_bytes"] < rows["lora"]["states_bytes"] < rows["dora"]["states_bytes"]
    assert rows["vera"]["activations_bytes"] < rows["lora"]["activations_bytes"] < rows["dora"]["activations_bytes"]
    assert rows["lora"]["step_s"] < rows["dora"]["step_s"]
    assert {kind for kind, row in rows.items() if row["slower_than"] == "full"} == {"dora", "lokr"}
    print_kinds(result, Console(width=200))
    said = capsys.readouterr().out
    assert "parameters of adapters" in said and "refused: shira: gives the weight" in said
    assert "slower than a step of full training (phase full): dora, lokr." in said


def test_a_kind_that_a_recipe_cannot_have_is_refused_in_one_message(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    relora = ROOT / "launch/recipes/vit_large_in1k_relora.yaml"
    for arguments, said in (
            (("--adapter", "boft"), "--adapter = 'boft': keeps a matrix in x in"),
            (("--adapter", "dorra"), "did you mean dora?")):
        assert plan(monkeypatch, *arguments) == 2
        assert said in capsys.readouterr().err
    assert plan(monkeypatch, "--adapter", "dora", recipe=relora) == 2
    assert "phases.relora.merge: adapters of the kind dora cannot be merged" in capsys.readouterr().err
    assert plan(monkeypatch, "--adapter", "all", recipe=ROOT / "launch/recipes/vit_large_in1k.yaml") == 2
    assert "has none in full" in capsys.readouterr().err
