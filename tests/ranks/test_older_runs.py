"""A run of version 0.1.0 is resumed by this version and ends like an uninterrupted one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load
from support.launches import TIMES, Job, traces
from support.zygote import NATIVE_PRODUCTS

from prelora_ds.core.plan import Plan
from prelora_ds.exporting.hf import with_rgb_patches

FIXTURE = Path(__file__).parents[1] / "fixtures/run_of_0.1.0"
SETTINGS = ("checkpoint.every=5 steps", "checkpoint.keep_last=9", "model.hidden_dropout_prob=0.1")


def holds(found, expected, exact):
    """Whether ``found`` equals ``expected``, apart from keys of later versions.

    If not ``exact`` (a processor that adds in another order than the fixture's), numbers may differ
    by BF16 rounding.
    """
    if isinstance(expected, dict):
        return all(holds(found[key], expected[key], exact) for key in expected if key not in TIMES)
    if isinstance(expected, list):
        pairs = zip(found, expected, strict=False)
        return len(found) == len(expected) and all(holds(a, b, exact) for a, b in pairs)
    if isinstance(expected, float) and not exact:
        return found == pytest.approx(expected, abs=2e-2, rel=2e-2)
    return found == expected


def same_weights(found, expected):
    return found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)


@pytest.mark.parametrize("start", ["step-00000016", "step-00000010"])
def test_it_ends_like_an_uninterrupted_run(forge, shards, tmp_path, start):
    """Resume in the LoRA phase, with its frozen base, and in the warm-up, before the switch."""
    import torch

    out = tmp_path / "out"
    shutil.copytree(FIXTURE / "run", out)
    resume = "auto" if start == "step-00000016" else str(out / "checkpoints" / start)
    job = Job(forge, out, shards, *SETTINGS, resume=resume, env={NATIVE_PRODUCTS: "1"})
    assert job.end() == [0, 0], job.said()[-3000:]
    assert start in job.said()

    exact = torch.backends.cpu.get_cpu_capability() == "AVX2"  # the fixture was made with AVX2
    found, expected = traces(out), traces(FIXTURE / "reference")
    for part in ("metrics", "windows"):
        assert holds(found[part], expected[part], exact), part
    for plan, old in zip(found["plans"], expected["plans"], strict=True):
        assert Plan.from_json(plan["plan"]) == Plan.from_json(old["plan"])  # each version encodes it differently
        for key in ("step", "phase", "trainable_parameters", "all_parameters"):
            assert plan[key] == old[key], key
    assert not exact or same_weights(load(found["model"]), with_rgb_patches(load(expected["model"])))
    first = 18 if start == "step-00000016" else 12  # version 0.1.0 wrote no observations
    assert [row["step"] for row in found["observations"]] == list(range(first, 21, 2))
    assert not (out / "plans.jsonl").exists(), "its events file has its current name"
