"""Write the tables of results in README.md and docs/results.md from the files in benchmarks/results.

    python benchmarks/readme.py

tests/unit/test_docs.py compares the tables with the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEADER = "| what | result | limit | better |\n|---|---:|---:|---|\n"
STUDY_HEADER = ("| setting | what it is | seeds | top-1, % | minus full, points | switch after step | mean rank "
                "| FLOPs / full | time at ViT-L's rates |\n|---|---|---:|---:|---:|---:|---:|---:|---:|\n")
CONTROLS_HEADER = "| setting | top-1, points relative to Exp1 |\n|---|---:|\n"
CONTROLS = ("equal_compute", "equal_time", "static_lora", "uniform", "random_ranks", "no_warmup",
            "update_no_warmup", "moments_dropped", "fixed_25", "fixed_50", "dora", "dynavera",
            "dynalora_random", "dynalora_forward", "dynalora_backward", "freezing")
CLOSER_HEADER = ("| setting | validation top-1, % | test top-1, % | test, minus full | FLOPs / full |\n"
                 "|---|---:|---:|---:|---:|\n")
CLOSER = ("exp1", "rate_4", "rate_10", "rate_30", "rate_10_merging", "rate_10_freezing", "exp3", "rate_10_exp3")
CPU_HEADER = ("| setting | CPU-seconds of its phases | together | of full training |\n|---|---|---:|---:|\n")
DIGITS_HEADER = ("| recipe | first step of each phase | merges | choices | top-1 | below full | training loss |\n"
                 "|---|---|---:|---:|---:|---:|---:|\n")


@dataclass(frozen=True)
class Row:
    """what, result, limit: templates; a field such as ``{switch[full_step_s]:.1f}`` is a figure of a result."""

    what: str
    result: str
    limit: str = ""
    better: str = "lower"


ROWS = [
    Row("LoRA step time / full step time, ViT-L blocks, mean rank 30, `branch` kernel",
        "{lora_step[lora_r30_vs_full]:.3f}", "{lora_limit[LoRA, branch]:.3f} (FLOPs)"),
    Row("the same, `merged` kernel", "{lora_step[merged_r30_vs_full]:.3f}", "{lora_limit[LoRA, merged]:.3f} (FLOPs)"),
    Row("the same, unmodified peft with fp32 adapters", "{lora_step[peft_default_vs_full]:.3f}",
        "{lora_limit[peft, as it comes]:.3f} (FLOPs)"),
    Row("the same, peft with BF16 adapters", "{lora_step[peft_same_dtype_vs_full]:.3f}",
        "{lora_limit[peft, adapters in BF16]:.3f} (FLOPs)"),
    Row("step time with a frozen backbone and no adapters / full step time", "{lora_step[frozen_vs_full]:.3f}",
        "{lora_limit[frozen backbone]:.3f} (FLOPs)"),
    Row("step time with adapters in the top half of the blocks only / full step time, ViT-L",
        "{lora_step[half_active_whole_vs_full]:.3f}",
        "{lora_limit[whole model, 24 blocks, top half active]:.3f} (FLOPs)"),
    Row("images per second, fastest LoRA setting / fastest full setting, ViT-L, 2 ranks, 4 images per rank",
        "{zero_stages[lora_vs_full_img_s_at_4_a_rank]:.2f}",
        "(by FLOPs only: {zero_stages[flop_limit]:.2f})", "higher"),
    Row("the same, 1 image per rank", "{zero_stages[lora_vs_full_img_s_at_1_a_rank]:.2f}",
        "(by FLOPs only: {zero_stages[flop_limit]:.2f})", "higher"),
    Row("deviation of measured from predicted bytes, ZeRO 0-3 and offload, all phases",
        "{zero_stages[states_vs_predicted_max]:.3%}", "0"),
    Row("the same for one rank of 64 and of 1,024, ViT-L and a ViT-g of 10^9 parameters: mean / worst",
        "{zero_stages_world[states_vs_predicted_mean]:.1%} / {zero_stages_world[states_vs_predicted_max]:.1%}", "0"),
    Row("step time relative to a bare DeepSpeed loop: prelora_ds", "{overhead[loop_vs_bare]:.3f}", "1"),
    Row("the same: HF Trainer / accelerate",
        "{overhead[hf_trainer_vs_bare]:.3f} / {overhead[accelerate_vs_bare]:.3f}", "1"),
    Row("milliseconds more than the bare loop at steps of {small_step_ms:.0f} ms: prelora_ds / HF Trainer",
        "{overhead_small[loop_own_ms]:.1f} / {overhead_small[hf_trainer_own_ms]:.1f}", "0"),
    Row("our file-system operations at the start: a host with 16 ranks / a host with 1 rank",
        "{start[fs_ops_growth]:.2f}", "1"),
    Row("a switch of ViT-L", "{switch[full_to_warmup_s]:.1f} s ({switch[switch_in_full_steps]:.2f} full steps of "
        "micro-batch 16)"),
    Row("growth of resident memory over 20 rebuilds", "{switch_mb[growth_bytes_20]:.1f} MB", "0"),
    Row("the same when engines are torn down by hand", "{switch_mb[naive_growth_bytes_20]:.0f} MB", "0"),
    Row("deviation of predicted from measured step time, cases outside of the calibration",
        "{plan[worst_held_out_error]:.0%}", "0"),
    Row("loader images per CPU-second relative to webdataset + PIL: crop and flip / RandAugment",
        "{loader[crop_vs_webdataset_pil]:.2f} / {loader[randaugment_vs_webdataset_pil]:.2f}", "{loader_limit:.2f}",
        "higher"),
    Row("blocking time of an asynchronous checkpoint relative to a synchronous one: full / LoRA phase",
        "{checkpoint[holdup_vs_sync]:.3f} / {checkpoint[holdup_vs_sync_lora]:.3f}"),
    Row("bytes of a checkpoint in the full phase / in the LoRA phase, ViT-L",
        "{checkpoint[full_vs_lora_bytes]:.1f}", better=""),
    Row("DynaLoRA step with 2/3 of the adapters active and scattered / LoRA step, ViT-L blocks",
        "{methods[dyna_two_thirds_vs_lora]:.3f}", "(by FLOPs only: {methods_limit[2/3 active, scattered]:.3f})"),
    Row("the same with 1/2 active, everything below them frozen", "{methods[dyna_bottom_half_vs_lora]:.3f}",
        "(by FLOPs only: {methods_limit[1/2 active, bottom frozen]:.3f})"),
    Row("choosing other adapters, 144 adapters of ViT-L, in LoRA steps", "{methods[dyna_reselect_in_steps]:.4f}", "0"),
    Row("a ReLoRA merge of ViT-L at rank 256",
        "{methods[merge_s]:.1f} s ({methods[merge_in_full_steps]:.2f} full steps of micro-batch 16)",
        "{merge_limit_s:.1f} s"),
    Row("points of top-1 below full training, worst of {methods_of_digits} methods on the digits",
        "{methods_digits[largest_points_below_full]:.2f}", "{methods_digits[limit_points_below_full]:.0f}"),
    Row("killed and resumed runs / of which bitwise identical to the uninterrupted run",
        "{faults[kills]:.0f} / {faults[bitwise_resumes]:.0f}", better=""),
]


def tables() -> list[tuple[Path, str, str]]:
    """Return (page, header, whole table) in Markdown."""
    study = {row["setting"]: row for row in json.loads((ROOT / "benchmarks/results/study.json").read_text())["rows"]}
    results = ROOT / "docs/results.md"
    found = [(ROOT / "README.md", HEADER, lines(figures())), (results, STUDY_HEADER, map(study_line, study.values())),
             (results, CONTROLS_HEADER, (control_line(study[name]) for name in CONTROLS if name in study)),
             (results, CLOSER_HEADER, closer_lines()), (results, CPU_HEADER, cpu_lines(study)),
             (ROOT / "docs/methods.md", DIGITS_HEADER, digits_lines())]
    return [(page, header, header + "".join(f"{line}\n" for line in body)) for page, header, body in found]


def study_line(row: Mapping[str, Any]) -> str:
    spread = "" if row["sd"] is None else f" ± {row['sd']:.2f}"
    relative = "" if row["setting"] == "full" else difference(row["minus full"], row["+-"])
    numbers = {"first switch": ",", "mean rank": ".1f", "FLOPs / full": ".3f", "time at ViT-L's rates": ".3f"}
    return line_of(row["setting"], row["about"], row["seeds"], f"{row['test top-1']:.2f}{spread}", relative,
                   *("" if row[column] is None else format(row[column], how) for column, how in numbers.items()))


def control_line(row: Mapping[str, Any]) -> str:
    return line_of(f"`{row['setting']}`", difference(row["minus exp1"], row["+- (exp1)"]))


def closer_lines() -> Iterator[str]:
    """Yield a line per run of seed 0: all of these settings have been tried with it."""
    files = {name: ROOT / f"benchmarks/results/study/{name}-0.json" for name in ("full", *CLOSER)}
    runs = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    full = runs.pop("full")
    for name, run in runs.items():
        yield line_of(f"`{name}`", f"{100 * run['val_acc1']:.2f}", f"{100 * run['test_acc1']:.2f}",
                      difference(100 * (run["test_acc1"] - full["test_acc1"])), f"{run['flops_over_full']:.3f}")


def cpu_lines(study: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line per setting whose steps have been measured alone on the machine."""
    measured = {name: row["CPU-seconds by phase"] for name, row in study.items() if row["CPU-seconds by phase"]}
    for name, seconds in measured.items():
        total = sum(seconds.values())
        yield line_of(f"`{name}`", ", ".join(f"{phase} {value}" for phase, value in seconds.items()), total,
                      f"{total / sum(measured['full'].values()):.2f}")


def digits_lines() -> Iterator[str]:
    """Yield a line per method on the digits; the first one is full training."""
    runs = json.loads((ROOT / "benchmarks/results/methods_digits.json").read_text())["rows"]
    for run in runs:
        below = runs[0]["accuracy, %"] - run["accuracy, %"]
        yield line_of(f"`{run['recipe']}`", run["phases"], run["merges"] or "", run["choices"] or "",
                      f"{run['accuracy, %']:.2f} %", f"{below:.2f}".replace("-", "−"), f"{run['loss']:.3f}")


def difference(value: float, interval: float | None = None) -> str:
    """Return the points with their sign, and half the width of the interval if it is known."""
    return f"{value:+.2f}".replace("-", "−") + ("" if interval is None else f" ± {interval:.2f}")


def line_of(*cells: object) -> str:
    return " ".join(["|", *(f"{cell} |" if cell else "|" for cell in map(str, cells))])


def lines(values: dict[str, Any]) -> Iterator[str]:
    for row in ROWS:
        cells = [text.format_map(values).replace("%", " %") for text in (row.what, row.result, row.limit)]
        yield line_of(*cells, row.better)


def figures() -> dict[str, Any]:
    """Return the figures of each result by its name, and those that are derived from its rows."""
    results = {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("*.json")}
    values: dict[str, Any] = {name: result["figures"] for name, result in results.items()}
    methods, loader = values["methods"], values["loader"]
    return values | {
        "lora_limit": _column(results["lora_step"], "limit by FLOPs"),
        "methods_limit": _column(results["methods"], "limit by FLOPs only"),
        "merge_limit_s": methods["merge_limit_in_full_steps"] * methods["full_step_s"],
        "small_step_ms": 1e3 * values["overhead_small"]["bare_step_s"],
        "loader_limit": loader["crop_vs_webdataset_pil"] / loader["crop_vs_ideal"],
        "switch_mb": {name: value / 1e6 for name, value in values["switch"].items()},
        "methods_of_digits": values["methods_digits"]["runs"] - 1,
    }


def _column(result: dict[str, Any], column: str) -> dict[str, float]:
    return {row["variant"]: row[column] for row in result["rows"] if "variant" in row and column in row}


def main() -> None:
    for page, header, table in tables():
        text = page.read_text(encoding="utf-8")
        before, _, rest = text.partition(header)
        _, _, after = f"\n{rest}".partition("\n\n")
        page.write_text(f"{before}{table}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
