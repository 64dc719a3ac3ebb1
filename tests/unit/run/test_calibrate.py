from __future__ import annotations

import random
from dataclasses import replace

import pytest
from support.runs import config

from prelora_ds.cost.timing import KINDS, Rates, Work
from prelora_ds.errors import ConfigError
from prelora_ds.run.calibrate import calibration_cases, case_work, fit


def test_a_fit_finds_the_costs_that_made_the_samples() -> None:
    draw = random.Random(0)
    costs = {"gemm_tflop": 2.0, "traffic_gb": 0.3, "state_gb": 0.5, "calls": 0.01, "wire_gb": 0.0}
    works = [Work(**{kind: draw.uniform(1, 2) for kind in costs}) for _ in range(8)]
    samples = [(work, sum(cost * getattr(work, kind) for kind, cost in costs.items())) for work in works]
    assert fit(samples) == pytest.approx(dict.fromkeys(KINDS, 0.0) | costs, abs=1e-9)


def test_no_cost_is_negative_where_plain_least_squares_would_have_one() -> None:
    samples = [(Work(gemm_tflop=1.0, calls=1.0), 1.0), (Work(gemm_tflop=2.0, calls=1.0), 2.2),
               (Work(gemm_tflop=4.0, calls=1.0), 4.6)]
    costs = fit(samples)
    assert costs["calls"] == 0
    assert costs["gemm_tflop"] == pytest.approx(1.1, rel=0.1)


def test_the_cases_separate_the_kinds_of_work() -> None:
    """Rates fitted to times of the cost model predict the times of other cases."""
    cfg = config("zero2", micro=8)
    made = Rates({"gemm_tflop": 3.0, "adapter_tflop": 1.0, "traffic_gb": 0.2, "state_gb": 0.4, "calls": 0.05,
                  "tensors": 0.02, "host_gb": 0.0, "wire_gb": 0.0, "hops": 0.0}, "made up", measured=True)
    cases = calibration_cases(cfg)
    fitted = Rates(fit([(w, made.step_seconds(w)) for w in (case_work(cfg, case, 1) for case in cases)]), "", True)
    for case in (replace(cases[0], micro_batch_size=64, layers=4), replace(cases[3], lora_rank=32)):
        work = case_work(cfg, case, 1)
        assert fitted.step_seconds(work) == pytest.approx(made.step_seconds(work), rel=0.01)


def test_a_micro_batch_of_one_cannot_be_halved() -> None:
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size"):
        calibration_cases(config("zero2", micro=1))
